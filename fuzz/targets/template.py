"""Fuzz target for chat templates: mutated real ones, and ones built from constructs the sandbox limits."""

from __future__ import annotations

import random
import time
from pathlib import Path

from reference.toy_tokenizer import CHAT_TEMPLATE
from support.server_fakes import TEMPLATE, TOOLS

from pydiffusion.chat.template import ChatTemplate
from pydiffusion.chat.template_source import find_template
from pydiffusion.errors import PyDiffusionError

from . import mutation

#: Seconds of CPU time that a template may take: the sandbox's work limit on a slow machine.
TIME_LIMIT = 60.0
_SOURCES = (CHAT_TEMPLATE, TEMPLATE, find_template("diffusion-gemma"))
_MESSAGES = [
    {"role": "user", "content": " hi "},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "x"},
]
_VALUES = [
    "messages", "tools", "bos_token", "'x'", "1", "0", "-1", "2.5", "none", "true", "[1, 2]", "{'a': 1}",
    "range(9)",
    "range(99999)", "messages[0]", "messages[0].content", "n", "n.s", "loop", "loop.index", "self",
    "namespace(s=1)",
    "cycler('a')", "joiner(',')", "dict(a=1)", "10 ** 9", "'x' * 999", "missing", "varargs", "caller",
    "2 ** 62",
]  # fmt: skip
_FILTERS = [
    "abs", "batch(2)", "batch(99999999)", "capitalize", "center(9)", "center(99999999)", "default('x')",
    "dictsort",
    "escape", "filesizeformat", "first", "float", "forceescape", "format(1)", "groupby('role')", "indent(9)",
    "indent(99999999)", "int", "int(base=36)", "items", "join(',')", "last", "length", "list", "lower",
    "map('upper')",
    "map(attribute='role')", "max", "min", "pprint", "random", "reject", "replace('', 'xxxxxxxx')",
    "replace('x', 'yy')",
    "reverse", "round(300)", "safe", "select", "selectattr('role')", "slice(2)", "slice(99999999)", "sort",
    "string",
    "striptags", "sum", "sum(start=[])", "title", "tojson", "tojson(indent=9)", "tojson(indent=99999999)",
    "trim",
    "truncate(2)", "unique", "upper", "urlencode", "urlize", "wordcount", "wordwrap(1)", "xmlattr",
]  # fmt: skip
_METHODS = [
    ".upper()", ".split('')", ".split()", ".join(messages)", ".replace('', 'y')", ".zfill(999999999)",
    ".encode()",
    ".format(1)", ".items()", ".keys()", ".get('role')", ".append(1)", ".__class__", ".content", "[0]",
    "[-1]",
    "['role']", "[::-1]", "()", ".expandtabs(999999999)", ".translate({120: 'yyyy'})",
    ".to_bytes(99999999)", ".count('x')",
]  # fmt: skip
_TESTS = [
    "defined",
    "none",
    "string",
    "mapping",
    "iterable",
    "sameas(1)",
    "divisibleby(0)",
    "in([1])",
    "callable",
]
_OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or"]


def _expression(draw: random.Random, depth: int = 3) -> str:
    kind = draw.randrange(8) if depth else 0
    if kind < 2:
        return draw.choice(_VALUES)
    inner = _expression(draw, depth - 1)
    if kind == 2:
        return f"({inner} | {draw.choice(_FILTERS)})"
    if kind == 3:
        return f"({inner}){draw.choice(_METHODS)}"
    if kind == 4:
        return f"({inner} is {draw.choice(_TESTS)})"
    if kind == 5:
        return f"({inner} if {_expression(draw, 1)} else {_expression(draw, 1)})"
    return f"({inner} {draw.choice(_OPERATORS)} {_expression(draw, depth - 1)})"


def _statement(draw: random.Random, depth: int = 3) -> str:
    kind = draw.randrange(9) if depth else 0
    if kind < 3:
        return "{{ " + _expression(draw) + " }}"
    inner = "".join(_statement(draw, depth - 1) for _ in range(draw.randrange(1, 3)))
    first = _expression(draw, 2)
    return draw.choice(
        (
            "{% for v in " + first + " %}" + inner + "{% endfor %}",
            "{% for v in " + first + " recursive %}" + inner + "{{ loop(" + first + ") }}{% endfor %}",
            "{% if " + first + " %}" + inner + "{% else %}x{% endif %}",
            "{% set n = namespace(s='xy') %}{% for v in range(70) %}{% set n.s = n.s " + draw.choice("+~*%")
            + " n.s %}" + inner + "{% endfor %}",
            "{% set n %}" + inner + inner + "{% endset %}{{ n }}",
            "{% macro f(n) %}" + inner + draw.choice(("", "{{ f(n) }}",
            "{{ f(n) ~ f(n) }}")) + "{% endmacro %}{{ f(9) }}",
            "{% filter " + draw.choice(_FILTERS) + " %}" + inner + "{% endfilter %}",
            "{% set n = " + first + " %}" + inner,
            "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
            "{% call f() %}" + inner + "{% endcall %}",
        )
    )  # fmt: skip


class Target:
    """A template renders, or is refused with a typed error, within the time limit."""

    def __init__(self, folder: Path) -> None:
        for source in _SOURCES:
            assert self.one(source) == "done"

    def close(self) -> None:
        pass

    def make(self, draw: random.Random) -> str:
        """Create an input: a template's source."""
        kind = draw.randrange(4)
        if kind == 0:
            whole = draw.choice(_SOURCES).encode()
            return mutation.damaged(draw, whole).decode("utf-8", "replace")
        if kind == 1:
            source = draw.choice(_SOURCES)
            at = draw.randrange(len(source))
            return source[:at] + _statement(draw, 2) + source[at:]
        return "".join(_statement(draw) for _ in range(draw.randrange(1, 4)))

    def one(self, source: str) -> str:
        """Compile and render it."""
        started = time.process_time()
        try:
            text = ChatTemplate(source).render(
                _MESSAGES, bos_token="<bos>", tools=TOOLS, enable_thinking=True
            )
            assert isinstance(text, str) and len(text) <= 16_000_000
            outcome = "done"
        except PyDiffusionError as error:
            outcome = "refused"
            assert len(str(error)) < 100_000, len(str(error))
        seconds = time.process_time() - started
        assert seconds < TIME_LIMIT, f"took {seconds:.0f} s"
        return outcome
