"""``pydiffusion batch``: answer many prompts from a JSONL file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _open, _options, _prompt
from ._text import say

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel
    from pydiffusion.openai.batch.answer_file import AnswerFile
    from pydiffusion.openai.batch.answering import Defaults
    from pydiffusion.openai.batch.lines import Line

_Seed = Annotated[
    int | None,
    typer.Option(
        "-s",
        "--seed",
        callback=lambda value: None if value == -1 else value,
        help="Random seed of the first line; each further line adds 1. [default: random, and reported]",
    ),
]
_OPTIONS = {**_options.TEXT, "seed": _Seed}


@_options.takes(choices=_OPTIONS, constraint=_options.CONSTRAINT, runtime=_options.IMAGE_RUNTIME)
def command(
    model: _options.ModelPath,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            "--output-file",
            help="Path of the JSONL file for the answers, - for standard output; existing ones are kept.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Argument(
            metavar="PROMPTS",
            help='Path of the JSONL file, - for standard input: per line {"prompt": TEXT} or '
            '{"messages": [...]}, and options, or a request in OpenAI\'s batch form.',
            show_default=False,
        ),
    ] = None,
    input_file: Annotated[
        Path | None, typer.Option("-i", "--input-file", help="PROMPTS, as vLLM's run-batch spells it.")
    ] = None,
    *,
    choices: dict[str, Any],
    temperature: _options.Temperature = None,
    constraint: dict[str, Any],
    chat: _prompt.Chat = None,
    system: _prompt.System = None,
    special: _prompt.Special = False,
    lines: Annotated[
        bool, typer.Option("--lines", help="Take each line of PROMPTS as a prompt, not as JSON.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse lines with fields that have no effect here.")
    ] = False,
    parallel: Annotated[
        int, typer.Option("--parallel", help="Maximum number of sequences denoised in one batch.")
    ] = 4,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Retry lines that failed.")] = False,
    runtime: dict[str, Any],
) -> None:
    """Answer the prompts of a JSONL file; run it again to resume."""
    from pydiffusion.openai.batch.answer_file import AnswerFile
    from pydiffusion.openai.batch.answering import Defaults
    from pydiffusion.openai.batch.lines import read_input, read_lines

    if (prompts is None) == (input_file is None):
        raise typer.BadParameter("give the file of prompts, as PROMPTS or with -i")
    prompts = prompts or input_file
    assert prompts is not None
    if [str(prompts), constraint["json_schema"], str(constraint["grammar_file"])].count("-") > 1:
        raise typer.BadParameter("only one of PROMPTS, --json-schema and --grammar-file can be -")
    choices |= {"temperature": temperature, **_open.constraint_of(constraint)}
    _prompt.check(chat, system, special, runtime["chat_template"])
    _open.check_options(choices)
    if parallel < 1:
        raise typer.BadParameter(f"--parallel is {parallel}; permitted is an integer of at least 1")
    defaults = Defaults(choices, chat, system, special, strict)
    name = "standard input" if str(prompts) == "-" else str(prompts)
    found = read_lines(read_input(prompts), name, plain=lines, salt=defaults.salt)
    _tell_of_repeated_ids(found)
    with AnswerFile(output, found, source=prompts, retry_errors=retry_errors) as answers:
        left = [line for line in found if line.number not in answers.finished]
        if answers.finished:
            say(
                f"{output.name} has {len(answers.finished)} of {len(found)} answers already, which are kept,"
                " whatever model and options made them"
            )
        n_failed = 0
        if left:
            opened = _open.open_model(model, runtime, min(parallel, len(left)))
            n_failed = _answer(opened, left, defaults, parallel, answers)
        n_failed_before = sum(answers.finished.values())
    target = "standard output" if str(output) == "-" else output
    say(f"{len(left) - n_failed} answered, {n_failed} failed: {target}")
    if n_failed_before:
        say(f"{n_failed_before} failed in earlier runs: --retry-errors answers them again")
    if n_failed or n_failed_before:
        raise typer.Exit(1)


def _answer(
    model: DiffusionModel, lines: list[Line], defaults: Defaults, n_parallel: int, answers: AnswerFile
) -> int:
    """Write the answers; returns how many lines failed."""
    from pydiffusion.openai.batch.answering import answer_lines, error_of

    from ._progress import progress

    plain = sum(line.form == "short" and isinstance(line.fields.get("prompt"), str) for line in lines)
    chat = _prompt.uses_chat(model, defaults.chat, defaults.system, defaults.special)
    if plain and chat and defaults.chat is None:
        say("prompts are passed as user messages through the chat template (--raw passes them as they are)")
    n_done = n_failed = 0
    try:
        with progress(f"answering {len(lines)} prompts") as update:
            for answer in answer_lines(model, lines, defaults, n_parallel=n_parallel):
                answers.write(answer)
                n_done += 1
                n_failed += error_of(answer) is not None
                update(n_done, len(lines))
    except KeyboardInterrupt:
        say(
            f"{n_done} of {len(lines)} answered"
            + (": the same command goes on" if answers.is_regular else "")
        )
        raise
    return n_failed


def _tell_of_repeated_ids(lines: list[Line]) -> None:
    from pydiffusion.openai.batch.lines import repeated_ids

    repeated = repeated_ids(lines)
    if repeated:
        own_id, numbers = next(iter(repeated.items()))
        more = f", and {len(repeated) - 1} more ids are not unique" if len(repeated) > 1 else ""
        where = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        say(f"pydiffusion: warning: lines {where} have the same id, {own_id}{more}; each gets an answer")
