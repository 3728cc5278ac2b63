"""Writes the option tables of cli.md from the commands themselves; --check says whether they are current.

python docs/cli_reference.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from pydiffusion.cli import app

PAGE = Path(__file__).with_name("cli.md")
BEGIN, END = "<!-- options of {} -->", "<!-- end -->"


def tables() -> dict[str, str]:
    """A table in Markdown of every command's arguments and options."""
    group = typer.main.get_command(app)
    return {name: _table(command) for name, command in group.commands.items()}  # type: ignore[attr-defined]


def _table(command: Any) -> str:
    rows = ["| argument or option | meaning |", "|---|---|"]
    for parameter in command.params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "argument":
            names = [(parameter.metavar or parameter.name).upper()]
        required = " Required." if parameter.required and parameter.param_type_name == "option" else ""
        default = ""
        if isinstance(parameter.default, (str, int)) and not isinstance(parameter.default, bool):
            default = f" [default: {parameter.default}]"
        spelled = ", ".join(f"`{name}`" for name in names)
        rows.append(f"| {spelled} | {parameter.help}{required}{default} |")
    return "\n".join(rows)


def filled(page: str) -> str:
    """The page with every table between its marks made anew. ValueError for a command without a place."""
    for name, table in tables().items():
        head, mark, rest = page.partition(BEGIN.format(name))
        _, end, tail = rest.partition(END)
        if not mark or not end:
            raise ValueError(f"cli.md has no place for the options of {name!r}")
        page = f"{head}{mark}\n\n{table}\n\n{end}{tail}"
    return page


def main() -> int:
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print("cli.md is not current: run python docs/cli_reference.py", file=sys.stderr)
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
