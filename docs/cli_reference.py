"""Write the option tables of cli.md from the commands; --check only reports whether they are current.

python docs/cli_reference.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from pydiffusion.cli import app
from pydiffusion.cli._options import RUNTIME, SAMPLER

PAGE = Path(__file__).with_name("cli.md")
BEGIN, END = "<!-- options of {} -->", "<!-- end -->"
# Groups that several commands have in common are listed once, as in the first command that has them.
SHARED: Mapping[str, Mapping[str, Any]] = {"sampler": SAMPLER, "runtime": RUNTIME}


def tables() -> dict[str, str]:
    """Markdown tables of the options of each command and of each shared group, by name."""
    commands = dict(_commands(typer.main.get_command(app)))
    rows = {name: _rows(command) for name, command in commands.items()}
    shared = {
        group: next(
            {name: found[name] for name in options}
            for found in rows.values()
            if options.keys() <= found.keys()
        )
        for group, options in SHARED.items()
    }
    return {
        **{group: _table(list(lines.values())) for group, lines in shared.items()},
        **{name: _command_table(found, shared) for name, found in rows.items()},
    }


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """The commands of a group, by name: ``convert``, ``lora convert``."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield before + name, command


def _command_table(rows: Mapping[str, str], shared: Mapping[str, Mapping[str, str]]) -> str:
    """A command's table, with a link in place of the groups that it has in full."""
    groups = {group: lines for group, lines in shared.items() if lines.keys() <= rows.keys()}
    elsewhere = {row for lines in groups.values() for row in lines.values()}
    links = " and ".join(f"[{group} options](#{group}-options)" for group in groups)
    table = _table([row for row in rows.values() if row not in elsewhere])
    return f"{table}\n\nAnd the {links}." if links else table


def _table(rows: Sequence[str]) -> str:
    return "\n".join(["| argument or option | meaning |", "|---|---|", *rows])


def _rows(command: Any) -> dict[str, str]:
    """A row per argument and option, by parameter name."""
    rows = {}
    for parameter in command.params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "argument":
            names = [(parameter.metavar or parameter.name).upper()]
        required = " Required." if parameter.required and parameter.param_type_name == "option" else ""
        default = ""
        if isinstance(parameter.default, (str, int)) and not isinstance(parameter.default, bool):
            default = f" [default: {parameter.default}]"
        spelled = ", ".join(f"`{name}`" for name in names)
        meaning = f"{parameter.help}{required}{default}".replace("|", r"\|")
        rows[parameter.name] = f"| {spelled} | {meaning} |"
    return rows


def filled(page: str) -> str:
    """The page with current tables between their marks. ValueError for a table without marks."""
    for name, table in tables().items():
        head, mark, rest = page.partition(BEGIN.format(name))
        _, end, tail = rest.partition(END)
        if not mark or not end:
            raise ValueError(
                f"cli.md has no marks for the options of {name!r}: add {BEGIN.format(name)} {END}"
            )
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
