"""``pydiffusion batch``: answer many prompts from a JSONL file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from . import _open, _options
from ._text import say

if TYPE_CHECKING:
    from pydiffusion import Completion, DiffusionModel, GenerationOptions

_OWN = ("id", "prompt", "messages")
_Json = dict[str, Any]
_Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="Random seed of the first line; each further line adds 1. [default: random, and reported]",
    ),
]
_OPTIONS = {**_options.TEXT, "seed": _Seed}


@_options.takes(choices=_OPTIONS, runtime=_options.CHAT_RUNTIME)
def command(
    model: _options.ModelPath,
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS",
            help='Path of the JSONL file: per line {"prompt": TEXT} or {"messages": [...]}, and options.',
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Path of the JSONL file for the answers; existing ones are kept.",
            show_default=False,
        ),
    ],
    *,
    choices: dict[str, Any],
    parallel: Annotated[
        int, typer.Option("--parallel", help="Maximum number of sequences denoised in one batch.")
    ] = 4,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Retry lines that failed.")] = False,
    runtime: dict[str, Any],
) -> None:
    """Answer the prompts of a JSONL file; run it again to resume."""
    from ._progress import progress

    _open.make_options(**choices)
    if parallel < 1:
        raise typer.BadParameter(f"--parallel is {parallel}; permitted is an integer of at least 1")
    lines = _read_lines(prompts)
    finished = _read_finished(output, lines, retry_errors)
    left = [line for line in lines if line.number not in finished]
    if finished:
        say(f"{output.name} has {len(finished)} of {len(lines)} answers already")
    n_errors = 0
    if left:
        opened = _open.open_model(model, runtime, min(parallel, len(left)))
        with output.open("ab") as file, progress(f"answering {len(left)} prompts") as update:
            for i, answer in enumerate(_answers(opened, left, choices, parallel)):
                n_errors += "error" in answer
                _write(file, answer)
                update(i + 1, len(left))
    say(f"{len(left) - n_errors} answered, {n_errors} failed: {output}")
    if n_errors:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Line:
    """number: counted from 1.  digest: detects whether the line has changed since it was answered."""

    number: int
    digest: str
    fields: _Json
    error: str | None = None


def _read_lines(path: Path) -> list[_Line]:
    lines = []
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        if not raw.strip():
            continue
        digest = f"{zlib.crc32(raw.strip()):08x}"
        try:
            given = json.loads(raw)
            given = {"prompt": given} if isinstance(given, str) else given
            lines.append(_Line(number, digest, given if isinstance(given, dict) else {}, _wrong(given)))
        except (ValueError, RecursionError) as error:
            lines.append(_Line(number, digest, {}, f"not valid JSON: {error}"))
    return lines


def _wrong(given: Any) -> str | None:
    """Error message for an invalid line, or None."""
    from pydiffusion import GenerationOptions

    if not isinstance(given, dict):
        return "a line must be an object or a string"
    if ("prompt" in given) == ("messages" in given):
        return "give a prompt or messages"
    if "prompt" in given and not isinstance(given["prompt"], str):
        return "prompt must be a string"
    known = {field.name for field in fields(GenerationOptions)}
    unknown = sorted(given.keys() - known - set(_OWN))
    return f"unknown option {unknown[0]!r}" if unknown else None


def _read_finished(path: Path, lines: Sequence[_Line], retry_errors: bool) -> set[int]:
    """Numbers of the answered lines. A truncated answer is removed from the file."""
    from pydiffusion._util import atomic

    if not path.exists():
        return set()
    number_to_digest = {line.number: line.digest for line in lines}
    kept, finished = [], set()
    data = path.read_bytes()
    for raw in data.splitlines(keepends=True):
        try:
            answer = json.loads(raw)
            number, digest = answer["line"], answer["digest"]
        except (ValueError, KeyError, TypeError):
            if raw.endswith(b"\n"):
                raise ValueError(
                    f"{path} contains a line that is not an answer: give another file with -o"
                ) from None
            continue
        if number_to_digest.get(number) != digest:
            raise ValueError(
                f"{path} answers other prompts: line {number} has changed since; give another file with -o"
            )
        if "error" in answer and retry_errors:
            continue
        kept.append(raw if raw.endswith(b"\n") else raw + b"\n")
        finished.add(number)
    if b"".join(kept) != data:
        with atomic.replacing(path) as new:
            new.write(b"".join(kept))
    return finished


def _answers(
    model: DiffusionModel, lines: Sequence[_Line], choices: _Json, n_parallel: int
) -> Iterator[_Json]:
    """Yield an answer for each line, in order of completion."""
    ready: list[tuple[_Line, str | list[int], GenerationOptions]] = []
    for line in lines:
        try:
            if line.error is not None:
                raise ValueError(line.error)
            ready.append((line, *_request(model, line, choices)))
        except Exception as error:  # an error fails this line only
            yield _head(line) | {"error": str(error)}
    outcomes = model.generate_batch(
        [prompt for _, prompt, _ in ready], [options for _, _, options in ready], n_parallel=n_parallel
    )
    for index, outcome in outcomes:
        line = ready[index][0]
        if isinstance(outcome, Exception):
            yield _head(line) | {"error": str(outcome)}
        else:
            yield _head(line) | _answer(model, line, outcome)


def _request(model: DiffusionModel, line: _Line, choices: _Json) -> tuple[str | list[int], GenerationOptions]:
    from pydiffusion import GenerationOptions

    own = {name: value for name, value in line.fields.items() if name not in _OWN}
    merged = {**choices, **own}
    if "seed" not in own and choices["seed"] is not None:
        merged["seed"] = (choices["seed"] + line.number - 1) % 2**64
    if merged["max_tokens"] in (None, -1):
        merged["max_tokens"] = model.n_ctx
    options = GenerationOptions(**merged)
    if "prompt" in line.fields:
        return line.fields["prompt"], options
    return model.chat_prompt(line.fields["messages"]), options


def _head(line: _Line) -> _Json:
    own_id = {"id": line.fields["id"]} if "id" in line.fields else {}
    return {"line": line.number, **own_id, "digest": line.digest}


def _answer(model: DiffusionModel, line: _Line, done: Completion) -> _Json:
    from pydiffusion.events import Content, Reasoning, ToolCall
    from pydiffusion.generation.streaming import ChatStream

    text = done.text
    more: _Json = {}
    if "messages" in line.fields:
        stream = ChatStream(model.tokenizer, ())
        stream.feed(done.tokens, last=True)
        text = "".join(part.text for part in stream.parts if isinstance(part, Content))
        thought = "".join(part.text for part in stream.parts if isinstance(part, Reasoning))
        calls = [
            {"name": part.name, "arguments": part.arguments}
            for part in stream.parts
            if isinstance(part, ToolCall)
        ]
        more = ({"reasoning": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})
    return {
        "text": text,
        **more,
        "finish_reason": done.finish_reason,
        "seed": done.seed,
        "steps": done.steps,
        "prompt_tokens": done.n_prompt,
        "tokens": len(done.tokens),
    }


def _write(file: BinaryIO, answer: _Json) -> None:
    """Write and flush one line, so that an interruption truncates at most the last one."""
    file.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    file.flush()
