"""Find what the pages tell a reader to run: fenced blocks, commands within text, usage lines of examples.

A block that can't run here has an HTML comment right before it, ``<!-- not run: needs a GPU -->``; one that
takes more than a few seconds has ``<!-- slow -->``. Both are invisible to readers.
"""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token

from support.paths import REPOSITORY

SHELL = ("sh", "bash", "console")
RUN = (*SHELL, "python")
#: Shown, not run. A program's output, a picture of folders: text.
SHOWN = ("text", "json", "cpp", "jinja", "yaml", "toml", "ini", "diff")
_MARK = re.compile(r"<!--\s*(not run|slow)\s*(?::\s*(.*?))?\s*-->\s*\Z", re.DOTALL)
_USAGE = re.compile(
    r"^ *(?:python (?:examples|benchmarks)/|scripts/|pydiffusion ).*(?:\n {8,}\S.*)*", re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or the usage lines of a script."""

    page: str
    """Path of the page below the repository's root."""
    line: int
    """Line of the block's first line of text, from 1."""
    language: str
    text: str
    mark: str = ""
    """"not run", "slow" or nothing."""
    reason: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def script(self) -> str:
        """What a shell is to run: of a console block the commands, without prompts and output."""
        if self.language != "console":
            return self.text
        lines = self.text.splitlines()
        return "".join(f"{line[2:]}\n" for line in lines if line.startswith(("$ ", "> ")))


@dataclass(frozen=True)
class Mention:
    """A command ``pydiffusion ...`` within a text or a table."""

    place: str
    command: str


def pages() -> list[str]:
    """All pages with something to run."""
    found = [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *sorted((REPOSITORY / "docs").rglob("*.md")),
    ]
    return [path.relative_to(REPOSITORY).as_posix() for path in found]


def scripts() -> list[str]:
    """All examples, whose docstrings say how to call them."""
    return [
        path.relative_to(REPOSITORY).as_posix() for path in sorted((REPOSITORY / "examples").glob("*.py"))
    ]


def page_blocks(page: str, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page in order, also those in lists. ValueError for a mark without a block."""
    blocks, mark = [], None
    for token in _tokens(page, text):
        if token.type == "fence":
            found = _MARK.search(mark.content) if mark else None
            language = token.info.split()[0] if token.info.split() else ""
            kind, reason = (found[1], found[2] or "") if found else ("", "")
            blocks.append(Block(page, token.map[0] + 2, language, token.content, kind, reason))
            mark = None
        elif mark:
            raise ValueError(f"{page}:{mark.map[0] + 1}: no block follows {mark.content!r}")
        elif token.type == "html_block" and _MARK.search(token.content):
            mark = token
    return blocks


def mentions(page: str, text: str | None = None) -> list[Mention]:
    """Commands in code within text."""
    return [
        Mention(f"{page}:{token.map[0] + 1}", " ".join(child.content.split()))
        for token in _tokens(page, text)
        if token.type == "inline"
        for child in token.children or []
        if child.type == "code_inline" and child.content.startswith("pydiffusion ")
    ]


def usage(script: str) -> Block:
    """The command lines in a script's docstring, without optional parts."""
    docstring = (
        ast.get_docstring(ast.parse((REPOSITORY / script).read_text(encoding="utf-8")), clean=False) or ""
    )
    lines = [" ".join(re.sub(r"\[.*?\]", "", found.group()).split()) for found in _USAGE.finditer(docstring)]
    return Block(script, 1, "sh", "".join(f"{line}\n" for line in lines))


def commands(block: Block) -> Iterator[Mention]:
    """The commands ``pydiffusion ...`` of a shell block, whether it runs or not."""
    script = re.sub(r"\\\n", " ", block.script)
    for line in script.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        current: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();<>|&") and word:
                if current[:1] == ["pydiffusion"]:
                    yield Mention(block.place, shlex.join(current))
                current = []
            elif current or "=" not in word:  # not a variable set for the command
                current.append(word)


def _tokens(page: str, text: str | None) -> list[Token]:
    if text is None:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
    return MarkdownIt("commonmark").enable("table").parse(text)


def unknown_options(command: str, application: Any) -> str:
    """What is wrong with a command's name or options, or an empty string; nothing runs.

    An option at the end may lack its value, as when a text speaks of it.
    """
    group = _group(application)
    words = shlex.split(command)[1:]
    if not words or words[0].startswith("-"):
        return _parsed(group, words)
    if words[0] == "COMMAND" or words[0].startswith("llama-"):  # whose flags are translated when it runs
        return ""
    while words and hasattr(group, "commands"):  # a command, or a group of commands and then one of these
        if words[0] not in group.commands:
            return f"there is no command {words[0]!r}"
        group, words = group.commands[words[0]], words[1:]
    return _parsed(group, words)


@functools.cache
def _group(application: Any) -> Any:
    return typer.main.get_command(application)


def _parsed(command: Any, words: list[str]) -> str:
    wrong = ""
    for more in ([], ["0"]):
        try:
            command.make_parser(command.context_class(command)).parse_args([*words, *more])
            return ""
        except Exception as error:  # of click, or of the copy that typer has in it
            if not hasattr(error, "format_message"):
                raise
            wrong = wrong or error.format_message()
    return wrong
