"""Chat template: renders messages to a prompt with the model file's jinja2 template.

The template is untrusted code: it runs in jinja2's sandbox with limits on work and output size, so that a
damaged or hostile file can't hang the process or exhaust memory.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from traceback import walk_tb
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pydiffusion.errors import PyDiffusionError

from .messages import Message, normalize_messages, normalize_tools

# Several times the longest context (262,144 tokens, about a million characters).
_MAX_CHARACTERS = 16_000_000
_MAX_ELEMENTS = 1_000_000
# Limit on loop iterations and elements visited by filters per rendering, and the cost of a call in these:
# seconds.
_MAX_WORK = 10_000_000
_CALL_WORK = 100
_MAX_MESSAGE = 500
# A format with a field width of many digits, or with a width given as an argument.
_WIDE_FIELD = re.compile(r"\d{5}|\*")
# Probe texts of parts, and a field that no template knows.
_PROBES, _UNKNOWN = ("first-part", "second-part"), "unknown-field"


class ChatTemplate:
    """A compiled chat template; thread-safe."""

    def __init__(self, source: str) -> None:
        """Compile the template. Raises PyDiffusionError with the line of a syntax error."""
        try:
            self._template = _Environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise PyDiffusionError(f"chat template, line {error.lineno}: {_brief(error.message)}") from None
        except (jinja2.TemplateError, RecursionError, ValueError, OverflowError) as error:
            raise PyDiffusionError(f"the chat template can't be compiled: {_brief(error)}") from None
        self._knows_parts_of: dict[str, bool] = {}  # by role

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        bos_token: str = "",
        eos_token: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render the prompt for messages, ``{"role": ..., "content": ...}``.

        variables: other template variables, such as ``enable_thinking``.
        Raises ValueError for malformed messages; PyDiffusionError, with the template's line, if the template
        fails or rejects them.
        """
        names = {
            "messages": self.prepare(messages),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": bos_token,
            "eos_token": eos_token,
            "tools": normalize_tools(tools),
            "documents": None,  # defined in transformers too, where templates compare it with none
            **variables,
        }
        try:
            return self._text(names)
        except Exception as error:
            line = _template_line(error)
            where = "chat template" if line is None else f"chat template, line {line}"
            what = str(error) or type(error).__name__
            raise PyDiffusionError(f"{where}: {what}") from error

    def prepare(self, messages: Iterable[Any]) -> list[Message]:
        """Normalize messages for this template; idempotent.

        Content parts are kept, since templates differ in what they put between them, but are joined to one
        text if this template does not support parts. Raises ValueError for malformed messages.
        """
        prepared = normalize_messages(messages)
        for message in prepared:
            parts = message["content"]
            if isinstance(parts, list) and not self._knows_parts(message["role"]):
                message["content"] = "".join(part["text"] for part in parts)
        return prepared

    def _knows_parts(self, role: str) -> bool:
        """Whether the template renders the texts of content parts, not the list's repr.

        Tested by rendering two parts, once per role: whether the source loops over content somewhere is not
        enough, since Gemma 4's first template did so for the user and not for the system. The probe has an
        unknown field, which only shows up if the whole list is printed.
        """
        known = self._knows_parts_of.get(role)
        if known is None:
            probe = [{"type": "text", "text": text, _UNKNOWN: _UNKNOWN} for text in _PROBES]
            names = {"messages": _conversation(role, probe), "add_generation_prompt": True, "tools": None}
            try:
                text = self._text({**names, "bos_token": "", "eos_token": ""})
            except Exception:  # any error: what the template can't render, it does not support
                text = ""
            known = all(probe in text for probe in _PROBES) and _UNKNOWN not in text
            self._knows_parts_of[role] = known
        return known

    def _text(self, names: dict[str, Any]) -> str:
        token = _work_left.set([_MAX_WORK])
        try:
            return self._joined(names)
        finally:
            _work_left.reset(token)

    def _joined(self, names: dict[str, Any]) -> str:
        parts, size = [], 0
        for part in self._template.generate(names):
            size += len(part)
            _check_size(size)
            parts.append(part)
        return "".join(parts)


def _conversation(role: str, content: Any) -> list[Message]:
    """A conversation valid for any template, with a message of this role and content."""
    message = {"role": role, "content": content}
    asked = {"role": "user", "content": "Hello"}
    if role == "user":
        return [message]
    if role == "system":
        return [message, asked]
    if role == "tool":
        function = {"name": "f", "arguments": {}}
        call = {"id": "123456789", "type": "function", "function": function}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [asked, called, {**message, "name": "f", "tool_call_id": call["id"]}]
    return [asked, message, asked]


def _brief(message: object) -> str:
    """An error of the compiler on one line; it may quote a name of any length."""
    return " ".join(str(message).split())[:_MAX_MESSAGE]


def _template_line(error: BaseException) -> int | None:
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else None


# Limits. Work is counted per rendering, in a one-element list shared by all its parts.

_work_left: ContextVar[list[int]] = ContextVar("work_left")


def _charge(amount: int) -> None:
    left = _work_left.get(None)
    if left is None:  # compiling, not rendering
        return
    left[0] -= amount
    if left[0] < 0:
        raise jinja2.TemplateRuntimeError(f"the template does too much work (limit: {_MAX_WORK:,} rounds)")


def _check_size(n_characters: int) -> None:
    if n_characters > _MAX_CHARACTERS:
        raise jinja2.TemplateRuntimeError(
            f"the template produces too much text (limit: {_MAX_CHARACTERS:,} characters)"
        )


def _checked(value: Any) -> Any:
    if isinstance(value, (str, bytes)):
        _check_size(len(value))
    elif isinstance(value, (list, tuple)) and len(value) > _MAX_ELEMENTS:
        raise jinja2.TemplateRuntimeError(
            f"the template builds too long a list (limit: {_MAX_ELEMENTS:,} elements)"
        )
    elif isinstance(value, int) and value.bit_length() > 256:
        raise jinja2.TemplateRuntimeError("the template uses too large a number")
    return value


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function``: charge its work, check the sizes of arguments and result."""

    # copies the attribute by which jinja2 recognises filters that take the context
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, tuple, dict, range)):
                _charge(len(value))
            elif isinstance(value, str):
                _charge(len(value) // 64)
            elif isinstance(value, int):
                _check_size(value)
        _charge(_CALL_WORK)
        return _checked(function(*args, **kwargs))

    return call


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _charge(1)
        yield value


def _concatenated(values: list[Any]) -> str:
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


# Names that no template can spell.
_COUNTED, _CONCATENATED, _CHECKED = " counted", " concatenated", " checked"


class _Limits(NodeTransformer):
    """Inserts limits where a template loops or concatenates, which the sandbox does not intercept."""

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


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
            optimized=False,  # constant folding would run filters at compile time
        )
        self.filters |= {"tojson": _to_json, "format": _format}
        self.filters = {name: _bounded(function) for name, function in self.filters.items()}
        self.filters |= {_COUNTED: _counted, _CONCATENATED: _concatenated, _CHECKED: _checked}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"namespace": _Namespace, "dict": _Dict()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Limits(self).visit(super()._parse(source, name, filename))

    # A field of a namespace may be called "self".
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        result = _bounded(super().call)(__context, __obj, *args, **kwargs)
        if isinstance(result, range):
            _charge(len(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _charge(1)
        if operator == "*":
            _check_size(_length_or_number(left) * _length_or_number(right))
        elif operator == "**" and not all(
            isinstance(v, (int, float)) and abs(v) < 1000 for v in (left, right)
        ):
            raise jinja2.TemplateRuntimeError("the template uses too large a number")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return _checked(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped


def _length_or_number(value: Any) -> Any:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else value


def _check_format(pattern: str) -> None:
    if _WIDE_FIELD.search(pattern):
        raise jinja2.TemplateRuntimeError(f"a format with so wide a field is not allowed: {pattern[:40]!r}")


def _format(pattern: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(pattern))
    return str(pattern) % (kwargs or args)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateRuntimeError(str(message))


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
