"""The sandbox of chat templates.

A template is untrusted code: it runs in jinja2's sandbox with limits on work and output size, so that a
damaged or hostile file can't hang the process or exhaust memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# Several times the longest context (262,144 tokens, about a million characters).
_MAX_CHARACTERS = 16_000_000
_MAX_ELEMENTS = 1_000_000
# Limit on loop iterations and elements visited by filters per rendering, and the cost of a call in these:
# seconds.
_MAX_WORK = 10_000_000
_CALL_WORK = 100
_CHARACTERS_PER_WORK = 64  # so that all texts and lists that a rendering makes have 640 MB at most
_ELEMENT_WORK = 5  # of an element that is looked at within lists
# Work per character of filters that are slow.
_SLOW_FILTERS = {"wordwrap": 100, "urlize": 10, "striptags": 10, "title": 1}
# Filters that don't look into the elements of what they are given, as all others may.
_SHALLOW_FILTERS = frozenset(
    ("length", "count", "list", "first", "last", "reverse", "default", "d", "items", "attr", "batch", "slice",
     "map", "select", "reject", "selectattr", "rejectattr", "safe")
)  # fmt: skip
# A format with a field width of many digits, or with a width given as an argument.
_WIDE_FIELD = re.compile(r"\d{5}|\*")


# Work is counted per rendering, in a one-element list shared by all its parts.
_work_left: ContextVar[list[int]] = ContextVar("work_left")


@contextlib.contextmanager
def limited_work() -> Iterator[None]:
    """Count the work of a rendering within the block, and stop it at the limit."""
    token = _work_left.set([_MAX_WORK])
    try:
        yield
    finally:
        _work_left.reset(token)


def _charge(amount: int) -> None:
    left = _work_left.get(None)
    if left is None:  # compiling, not rendering
        return
    left[0] -= amount
    if left[0] < 0:
        raise jinja2.TemplateRuntimeError(f"the template does too much work (limit: {_MAX_WORK:,} rounds)")


def check_size(n_characters: int) -> None:
    """Raise TemplateRuntimeError if this is more text than a template may produce."""
    if n_characters > _MAX_CHARACTERS:
        raise jinja2.TemplateRuntimeError(
            f"the template produces too much text (limit: {_MAX_CHARACTERS:,} characters)"
        )


def _checked(value: Any) -> Any:
    if isinstance(value, (str, bytes)):
        check_size(len(value))
        _charge(len(value) // _CHARACTERS_PER_WORK)
    elif isinstance(value, (list, tuple)):
        if len(value) > _MAX_ELEMENTS:
            raise jinja2.TemplateRuntimeError(
                f"the template builds too long a list (limit: {_MAX_ELEMENTS:,} elements)"
            )
        _charge(len(value) * 8 // _CHARACTERS_PER_WORK)
    elif isinstance(value, int) and value.bit_length() > 256:
        raise jinja2.TemplateRuntimeError("the template uses too large a number")
    return value


def _checked_within(value: Any) -> Any:
    """The value, if all that it contains is not too much to print or compare: a few lists that contain each
    other several times can be astronomically long.
    """
    waiting, n_characters = [value], 0
    while waiting:
        found = waiting.pop()
        if isinstance(found, (str, bytes)):
            n_characters += len(found)
            check_size(n_characters)
        elif isinstance(found, (list, tuple, set, frozenset)):
            _charge(_ELEMENT_WORK * len(found))
            waiting += found
        elif isinstance(found, dict):
            _charge(_ELEMENT_WORK * len(found))
            waiting += [*found, *found.values()]
        elif isinstance(found, _Namespace):
            # All others of its attributes are fields of the template's.
            waiting.append(object.__getattribute__(found, "_Namespace__attrs"))
    return value


def _bounded(
    function: Callable[..., Any], within: bool = False, per_character: float = 1 / _CHARACTERS_PER_WORK
) -> Callable[..., Any]:
    """Wrap ``function``: charge its work, check the sizes of arguments and result; ``within``: also of what
    lists contain.
    """

    # copies the attribute by which jinja2 recognises filters that take the context
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple, dict, range)):
                _charge(len(value))
            elif isinstance(value, str):
                _charge(int(len(value) * per_character))
            elif isinstance(value, int):
                check_size(value)
            if within:
                _checked_within(value)
        _charge(_CALL_WORK)
        return _checked(function(*args, **kwargs))

    return call


def _comparing(test: Any) -> Callable[..., Any]:
    """Wrap a test (``is``): check what its arguments contain."""

    @functools.wraps(test)
    def call(*args: Any) -> Any:
        for value in args:
            _checked_within(value)
        return test(*args)

    return call


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _charge(1)
        yield value


def _concatenated(values: list[Any]) -> str:
    _checked_within(values)
    texts = [str(value) for value in values]
    check_size(sum(map(len, texts)))
    return _checked("".join(texts))


# Names that no template can spell.
_COUNTED, _CONCATENATED, _CHECKED, _WITHIN = " counted", " concatenated", " checked", " within"


class _Limits(NodeTransformer):
    """Inserts limits where a template loops, concatenates, compares or prints, which the sandbox does not
    intercept.
    """

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def _filter(self, node: nodes.Node | None, name: str, line: int) -> nodes.Filter:
        wrapped = nodes.Filter(node, name, [], [], None, None)
        wrapped.set_lineno(line)
        wrapped.set_environment(self._environment)
        return wrapped

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = self._filter(node.iter, _COUNTED, node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes), _CONCATENATED, node.lineno)

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, nodes.TemplateData) else self._filter(part, _WITHIN, part.lineno)
            for part in node.nodes
        ]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = self._filter(node.expr, _WITHIN, node.expr.lineno)
        for operand in node.ops:
            operand.expr = self._filter(operand.expr, _WITHIN, operand.expr.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return self._filter(node, _CHECKED, node.lineno)
        node.arg = self._hashed(node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = self._hashed(node.key)
        return node

    def _hashed(self, key: nodes.Expr) -> nodes.Expr:
        return key if isinstance(key, nodes.Const) else self._filter(key, _WITHIN, key.lineno)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        self.generic_visit(node)
        node.filter = self._filter(node.filter, _CHECKED, node.lineno)
        return node


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's text for training; renders its body only.

    As in transformers the body is a scope: what it sets is unset behind it.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """As jinja2's, without names that Python could take for its own."""

    def __init__(*args: Any, **fields: Any) -> None:  # no name of its own: a template may set a field "self"
        named = dict(*args[1:], **fields)
        for name in named:
            _check_field(name)
        Namespace.__init__(args[0], named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_field(name)
        super().__setitem__(name, value)


def _check_field(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            f"a namespace can't have a field {name[:40]!r}: its name begins with an underscore"
        )


class _Dict:
    """``dict``, but for its methods, with which a template could change what it was given."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits, and with what transformers defines for templates."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
            optimized=False,  # constant folding would run filters at compile time
        )
        self.filters |= {"tojson": _to_json, "format": _format, "indent": _indented(self.filters["indent"])}
        self.filters["replace"] = _replaced(self.filters["replace"])
        self.filters = {
            name: _bounded(
                function, name not in _SHALLOW_FILTERS, _SLOW_FILTERS.get(name, 1 / _CHARACTERS_PER_WORK)
            )
            for name, function in self.filters.items()
        }
        self.filters |= {_COUNTED: _counted, _CONCATENATED: _concatenated, _CHECKED: _checked}
        self.filters[_WITHIN] = _checked_within
        self.tests = {name: _comparing(function) for name, function in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"namespace": _Namespace, "dict": _Dict()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Limits(self).visit(super()._parse(source, name, filename))

    # A field of a namespace may be called "self".
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        of_python = isinstance(owner, (str, list, tuple, dict))
        if isinstance(owner, str):
            _check_method(owner, __obj.__name__, args)
        result = _bounded(super().call, within=of_python)(__context, __obj, *args, **kwargs)
        if isinstance(result, range):
            _charge(len(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _charge(1)
        if operator == "*":
            check_size(_length_or_number(left) * _length_or_number(right))
        elif operator == "**" and not all(
            isinstance(v, (int, float)) and abs(v) < 1000 for v in (left, right)
        ):
            raise jinja2.TemplateRuntimeError("the template uses too large a number")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            _checked_within(right)
        return _checked(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
            return _bounded(wrapped, within=True)
        return wrapped


def _check_method(text: str, name: str, args: Sequence[Any]) -> None:
    """Check the size of a method's result before it is made."""
    if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        check_size(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], (list, tuple, dict, str)):
        check_size(len(text) * len(args[0]))
    elif name == "translate" and args and isinstance(args[0], dict):
        check_size(len(text) * max([1, *(len(new) for new in args[0].values() if isinstance(new, str))]))


def _length_or_number(value: Any) -> Any:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else value


def _check_format(pattern: str) -> None:
    if _WIDE_FIELD.search(pattern):
        raise jinja2.TemplateRuntimeError(f"a format with so wide a field is not allowed: {pattern[:40]!r}")


def _format(pattern: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(pattern))
    return str(pattern) % (kwargs or args)


def _indented(indent: Callable[..., str]) -> Callable[..., str]:
    """jinja2's ``indent``, with the size of its result checked before it is made."""

    def call(text: Any, width: int | str = 4, *args: Any, **kwargs: Any) -> str:
        text = str(text)
        n_characters = width if isinstance(width, int) else len(width)
        check_size(len(text) + n_characters * (len(text.splitlines()) + 1))
        return indent(text, width, *args, **kwargs)

    return call


def _replaced(replace: Callable[..., str]) -> Callable[..., str]:
    """jinja2's ``replace``, with the size of its result checked before it is made."""

    @functools.wraps(replace)
    def call(evaluation: Any, text: Any, *args: Any, **kwargs: Any) -> str:
        _check_method(str(text), "replace", [str(arg) for arg in args])
        return replace(evaluation, text, *args, **kwargs)

    return call


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateRuntimeError(str(_checked_within(message)))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja2's tojson escapes for HTML, which models were not trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
