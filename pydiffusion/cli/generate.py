"""``pydiffusion generate``: generate text from one prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _open, _options, _prompt
from ._images import Part, image_parts, with_images
from ._input import check_encodable, read_text_or_stdin
from ._run import prefill, run

if TYPE_CHECKING:
    from pydiffusion import Completion, DiffusionModel
    from pydiffusion.vision.prompt import Prompt as ImagePrompt

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT...", help="As -p; of several words, with blanks between them.", show_default=False
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="Prompt; - reads standard input, the default in a pipe.",
        show_default=False,
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option("-f", "--file", help="Path of a file with the prompt.", show_default=False),
]


@dataclass(frozen=True)
class Asked:
    """How a prompt is passed on and its answer printed, as the options of ``generate`` say.

    images: files, which go before the prompt.
    """

    chat: bool | None = None
    system: str | None = None
    special: bool = False
    show: bool = False
    quiet: bool = False
    as_json: bool = False
    images: tuple[Path, ...] = ()


@_options.takes(choices=_options.TEXT, constraint=_options.CONSTRAINT, runtime=_options.IMAGE_RUNTIME)
def command(
    model: _options.ModelOrFirst = None,
    words: Words = None,
    prompt: Prompt = None,
    file: PromptFile = None,
    *,
    choices: dict[str, Any],
    temperature: _options.Temperature = None,
    constraint: dict[str, Any],
    runtime: dict[str, Any],
    chat: _prompt.Chat = None,
    system: _prompt.System = None,
    special: _prompt.Special = False,
    show: Annotated[
        bool,
        typer.Option(
            "--show", help="Draw the canvas while it is denoised, on a terminal, not only its steps."
        ),
    ] = False,
    quiet: _options.Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    image: _options.Images = None,
) -> None:
    """Generate text from a prompt, printed canvas by canvas."""
    choices |= {"temperature": temperature, **_open.constraint_of(constraint)}
    model, left = _open.model_and_rest(model, words or [])
    asked = Asked(chat, system, special, show, quiet, as_json, tuple(image or ()))
    text = read_prompt(left, prompt, file, empty_is_wrong=chat is not False)
    generate(model, text, choices, runtime, asked)


def generate(
    path: Path, text: str, choices: Mapping[str, Any], runtime: Mapping[str, Any], asked: Asked
) -> None:
    """Load the model and print its answer. choices: fields of GenerationOptions, and temperature."""
    _prompt.check(asked.chat, asked.system, asked.special, runtime["chat_template"], bool(asked.images))
    _open.check_options(choices)  # report invalid options before loading the model
    check_encodable(asked.system or "", "--system")
    images = image_parts(asked.images)
    opened = _open.open_model(path, runtime, quiet=asked.quiet)
    ids = _prompt_ids(opened, text, images, asked)
    session = opened.new_session()
    prefill(session, ids, asked.quiet)
    options = _open.make_options(opened, **choices)
    done = run(opened, session, options, show=asked.show, quiet=asked.quiet, text=not asked.as_json)
    if asked.as_json:
        print(json.dumps(_as_dict(done), ensure_ascii=False))


def read_prompt(
    words: Sequence[str], options: Sequence[str] | None, file: Path | None, *, empty_is_wrong: bool
) -> str:
    """The prompt of the words, of ``-p``, of ``-f``, or of standard input; a usage error for two of them."""
    given = [*(options or ()), *([" ".join(words)] if words else ())]
    if len(given) + (file is not None) > 1:
        raise typer.BadParameter("the prompt is given twice; of -p TEXT, -f FILE and PROMPT give one")
    if not given and file is None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt: -p TEXT, or -p - and the text on standard input")
    if file is None and given and given[0] != "-":
        if empty_is_wrong and not given[0].strip():
            raise typer.BadParameter("the prompt is empty; give a text, or - to read standard input")
        return check_encodable(given[0], "the prompt")
    text = read_text_or_stdin(file or Path("-"))
    if empty_is_wrong and not text.strip():
        raise ValueError(f"{file or 'standard input'} is empty; it should be the prompt")
    return text


def _prompt_ids(
    model: DiffusionModel, text: str, images: Sequence[Part], asked: Asked
) -> list[int] | ImagePrompt:
    if not _prompt.uses_chat(model, asked.chat, asked.system, asked.special, bool(images)):
        return model.tokenize(text, parse_special=asked.special)
    messages: list[dict[str, Any]] = [{"role": "user", "content": with_images(text, images)}]
    if asked.system is not None:
        messages.insert(0, {"role": "system", "content": asked.system})
    return model.chat_prompt(messages)


def _as_dict(done: Completion) -> dict[str, Any]:
    return {
        "text": done.text,
        "tokens": done.tokens.tolist(),
        "finish_reason": done.finish_reason,
        "n_prompt": done.n_prompt,
        "steps": done.steps,
        "canvas_steps": list(done.canvas_steps),
        "seed": done.seed,
        "timings": done.timings,
    }
