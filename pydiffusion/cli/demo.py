"""``pydiffusion demo``: convert and run the demo model that ships with the package."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _open, _options
from ._demo_image import draw_puzzle, read_picture
from ._demo_lora import chosen_adapters, solve_upright
from ._run import SECONDS_PER_STEP, prefill, run
from ._text import say

if TYPE_CHECKING:
    from pydiffusion.demo.tasks import Example


def command(
    task: Annotated[
        str, typer.Option("--task", help="Task to solve: sudoku, sort, reverse, add, json, count.")
    ] = "sudoku",
    puzzle: Annotated[
        int | None, typer.Option("--puzzle", help="Index of a held-out sudoku, from 0. [default: random]")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Random seed of the puzzle and the generation. [default: random]"),
    ] = None,
    image: Annotated[
        bool, typer.Option("--image", help="Draw the sudoku to a PNG file, and read and solve the picture.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="PNG file for --image, overwritten. [default: a temporary file]"),
    ] = None,
    lora: Annotated[
        bool,
        typer.Option(
            "--lora",
            help="Solve a sudoku whose boxes are 3 rows by 2 columns, without an adapter (LoRA) and with it.",
        ),
    ] = False,
    adapter: Annotated[
        str | None,
        typer.Argument(
            metavar="[ADAPTER]",
            help="PATH[:SCALE] of the adapter for --lora. [default: the one in the package]",
            show_default=False,
        ),
    ] = None,
    steps: _options.Steps = None,
    threads: _options.Threads = None,
) -> None:
    """Show the demo model solve a held-out puzzle, step by step. Converts it first, to q4_k_m."""
    chosen_seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    options = _open.make_options(steps=steps, seed=chosen_seed)
    if picture is not None and not image:
        raise typer.BadParameter("--picture goes with --image")
    if image and task != "sudoku":
        raise typer.BadParameter("--image goes with --task sudoku")
    if adapter is not None and not lora:
        raise typer.BadParameter(f"{adapter}: an adapter goes with --lora")
    if lora and (image or task != "sudoku"):
        raise typer.BadParameter("--lora goes with --task sudoku and without --image")
    if lora:
        with ExitStack() as stack:
            adapters = chosen_adapters(adapter)  # first: what is wrong with it is told at once
            model = _open.open_model(_converted(stack), {"threads": threads})
            solve_upright(model, adapters, puzzle, options)
        return
    example = _example(task, puzzle, chosen_seed)
    with ExitStack() as stack:
        runtime: dict[str, Any] = {"threads": threads}
        content: Any = example.prompt
        if image:
            cells = example.prompt.removeprefix("sudoku\n").replace("\n", "")
            drawn = draw_puzzle(cells, picture, chosen_seed)
            runtime["mmproj"] = _converted(stack, "mmproj")
        model = _open.open_model(_converted(stack), runtime)
        if image:
            content = read_picture(model, drawn, cells)
        else:
            print(example.prompt, end="\n\n", flush=True)
        session = model.new_session()
        prefill(session, model.chat_prompt([{"role": "user", "content": content}]))
        done = run(model, session, options, show=True, seconds_per_step=SECONDS_PER_STEP)
    from pydiffusion.demo import tasks

    right = tasks.check(example.task, example.prompt, done.text)
    print("\nRight." if right else f"\nWrong. It should be:\n{example.answer}")


def _example(task: str, puzzle: int | None, seed: int) -> Example:
    from pydiffusion import demo
    from pydiffusion.demo import tasks

    if task not in tasks.TASKS:
        raise typer.BadParameter(f"--task is {task!r}; permitted are {', '.join(tasks.TASKS)}")
    if task != "sudoku":
        if puzzle is not None:
            raise typer.BadParameter("--puzzle goes with --task sudoku")
        return tasks.generate(task, random.Random(seed), held_out=True)
    puzzles = demo.puzzles()
    if puzzle is None:
        puzzle = random.Random(seed).randrange(len(puzzles))
    if not 0 <= puzzle < len(puzzles):
        raise typer.BadParameter(f"--puzzle is {puzzle}; permitted is 0 to {len(puzzles) - 1}")
    say(f"held-out puzzle {puzzle} of {len(puzzles)}")
    return tasks.sudoku_example(*puzzles[puzzle])


def _converted(stack: ExitStack, part: str = "q4_k_m") -> Path:
    """Path of the demo model's GGUF: from the cache, else converted now, to a temporary folder if need be.

    part: the type of the text model's file, or "mmproj" for the vision tower's.
    """
    from pydiffusion import convert, demo

    from ._progress import conversion_progress

    checkpoint = demo.checkpoint_path()
    name = f"demo-{part}-{_fingerprint(checkpoint)}.gguf"
    folder = _cache_folder()
    if (folder / name).is_file():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pydiffusion-")))
    with conversion_progress(folder / name) as update:
        if part == "mmproj":
            report = convert.convert_mmproj(checkpoint, folder / name, type="f16", progress=update)
        else:
            report = convert.convert(checkpoint, folder / name, type=part, progress=update)
    say(f"converted the demo checkpoint to {part} in {report.seconds:.1f} s: {report.target}")
    return folder / name


def _fingerprint(folder: Path) -> str:
    """Digest of checkpoint and version, so that no stale conversion is used."""
    from pydiffusion import __version__

    digest = hashlib.sha256(__version__.encode())
    for path in sorted(folder.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _cache_folder() -> Path:
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "pydiffusion"
