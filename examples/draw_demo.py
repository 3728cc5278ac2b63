"""Render docs/demo.svg: a held-out sudoku from noise to its solution, as shown by `pydiffusion demo`.

python examples/draw_demo.py --puzzle 3 docs/demo.svg
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from pydiffusion import DiffusionModel, GenerationOptions
from pydiffusion.cli._display import CanvasDisplay
from pydiffusion.convert import convert
from pydiffusion.demo import checkpoint_path, puzzles, tasks
from pydiffusion.events import DraftEvent


def main() -> None:
    """Solve a puzzle and draw it next to a few of the drafts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path)
    parser.add_argument("--puzzle", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--panels", type=int, default=5, help="number of drafts to draw")
    arguments = parser.parse_args()
    example = tasks.sudoku_example(*puzzles()[arguments.puzzle])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.gguf"
        convert(checkpoint_path(), path, type="q4_k_m")
        model = DiffusionModel(path)
        events = model.stream(
            model.chat_prompt([{"role": "user", "content": example.prompt}]),
            GenerationOptions(max_tokens=model.canvas_length, seed=arguments.seed),
        )
        drafts = [event for event in events if isinstance(event, DraftEvent)]
    display = CanvasDisplay(model.tokenizer, (1, 6))
    chosen = np.unique(np.linspace(0, len(drafts) - 1, arguments.panels).round().astype(int))
    panels = [_panel(Text(example.prompt), "puzzle")]
    for index in chosen:
        draft = drafts[index]
        title = f"step {index + 1}, entropy {float(np.mean(draft.entropy)):.2f}"
        panels.append(_panel(display.styled(draft.tokens, draft.accepted), title))
    console = Console(record=True, width=108, file=io.StringIO(), force_terminal=True)
    console.print(Columns(panels, equal=True))
    right = tasks.check(
        example.task, example.prompt, display.styled(drafts[-1].tokens, drafts[-1].accepted).plain
    )
    print(f"{len(drafts)} steps, {'right' if right else 'wrong'}")
    arguments.target.write_text(
        console.export_svg(title="pydiffusion demo", unique_id="demo"), encoding="utf-8"
    )


def _panel(text: Text, title: str) -> Panel:
    return Panel(text, title=title, width=34, height=10)


if __name__ == "__main__":
    main()
