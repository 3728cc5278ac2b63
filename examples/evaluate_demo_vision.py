"""Evaluate how the demo model reads and solves pictures of held-out puzzles.

The pictures are drawn from a seed with the fonts of --fonts, or Pillow's own. For each reader the share of
givens read right (the character nearest to the soft token), of cells, of pictures without a mistake, and of
puzzles solved; in brackets the 95% interval (Wilson).

    python examples/evaluate_demo_vision.py --transformers --types f16 q8_0 --number 200
    python examples/evaluate_demo_vision.py --types q8_0 --fonts FOLDER
"""

from __future__ import annotations

import argparse
import io
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from pydiffusion.demo import checkpoint_path, pictures, puzzles, reading, sudoku

Reader = Callable[[Sequence[bytes], int], list[tuple[np.ndarray, str]]]
"""(PNG files, seed) -> (features (64, d), answer) of each."""
_QUESTION = "sudoku"


@dataclass
class Tally:
    """What was read right and solved."""

    givens: list[bool] = field(default_factory=list)
    cells: list[bool] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    solved: list[bool] = field(default_factory=list)

    def add(self, puzzle: str, solution: str, read: str, answer: str) -> None:
        """Count one picture."""
        right = [a == b for a, b in zip(puzzle, read, strict=True)]
        self.cells += right
        self.givens += [ok for ok, cell in zip(right, puzzle, strict=True) if cell != "."]
        self.whole.append(all(right))
        self.solved.append(answer.strip() == sudoku.as_rows(solution))

    def row(self, name: str) -> str:
        """A row of the table."""
        return (
            f"| {name} | "
            + " | ".join(map(interval, (self.givens, self.cells, self.whole, self.solved)))
            + " |"
        )


def interval(hits: Sequence[bool]) -> str:
    """The share of hits in percent and its 95% interval."""
    n, share, z = len(hits), sum(hits) / len(hits), 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return f"{100 * share:.1f}% ({100 * (centre - half):.1f} to {100 * (centre + half):.1f})"


def draw_pictures(pairs: Sequence[tuple[str, str]], fonts: Sequence[str], seed: int) -> list[bytes]:
    """A PNG of each puzzle, as varied as in training."""
    rng = random.Random(seed)
    drawn = []
    for puzzle, _ in pairs:
        buffer = io.BytesIO()
        pictures.draw(puzzle, pictures.Look.random(rng, fonts), rng).save(buffer, "PNG")
        drawn.append(buffer.getvalue())
    return drawn


def transformers_reader(checkpoint: Path) -> Reader:
    """Read with transformers in float32: its image processor, its tower, its `generate`."""
    import torch
    from PIL import Image
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from demo_recipe.evaluate import load_checkpoint
    from demo_recipe.soft_prompt import HEAD, TAIL

    model, tokenizer = load_checkpoint(checkpoint)
    processor = Gemma4ImageProcessorPil.from_pretrained(checkpoint)
    ends = set(model.generation_config.eos_token_id)

    @torch.no_grad()
    def read(files: Sequence[bytes], seed: int) -> list[tuple[np.ndarray, str]]:
        torch.manual_seed(seed)
        result = []
        for start in range(0, len(files), 50):
            images = [Image.open(io.BytesIO(file)) for file in files[start : start + 50]]
            inputs = processor(images, return_tensors="pt")
            features = model.model.encoder.get_image_features(
                inputs["pixel_values"], inputs["image_position_ids"], return_dict=True
            ).pooler_output.view(len(images), reading.N_SOFT_TOKENS, -1)
            text = HEAD + "<|image|>" * reading.N_SOFT_TOKENS + TAIL
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            prompt = torch.tensor([ids] * len(images))
            kinds = (prompt == model.config.image_token_id).long()
            output = model.generate(
                prompt,
                pixel_values=inputs["pixel_values"],
                image_position_ids=inputs["image_position_ids"],
                mm_token_type_ids=kinds,
                max_new_tokens=model.config.canvas_length,
            )
            for row, own in zip(output.sequences[:, len(ids) :].tolist(), features.numpy(), strict=True):
                end = next((i for i, token in enumerate(row) if token in ends), len(row))
                result.append((own, tokenizer.decode(row[:end])))
        return result

    return read


def gguf_reader(model_path: Path, mmproj: Path) -> Reader:
    """Read with pydiffusion: its preprocessing, its tower, its sampler."""
    from pydiffusion import DiffusionModel, GenerationOptions

    model = DiffusionModel(model_path, mmproj=mmproj)

    def read(files: Sequence[bytes], seed: int) -> list[tuple[np.ndarray, str]]:
        result = []
        for index, file in enumerate(files):
            features = model.encode_image(file)
            content = [{"type": "text", "text": _QUESTION}, {"type": "image", "image": file}]
            prompt = model.chat_prompt([{"role": "user", "content": content}])
            options = GenerationOptions(max_tokens=48, seed=seed + index)
            result.append((features, model.generate(prompt, options).text))
        return result

    return read


def evaluate(name: str, reader: Reader, sets: dict[str, list[bytes]], pairs, seed: int) -> list[str]:
    """The table's rows of one reader."""
    embeddings = reading.character_embeddings(checkpoint_path())
    rows = []
    for fonts, files in sets.items():
        tally = Tally()
        for (puzzle, solution), (features, answer) in zip(pairs, reader(files, seed), strict=True):
            tally.add(puzzle, solution, reading.read_cells(features, embeddings), answer)
        rows.append(tally.row(f"{name}, {fonts}"))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def font_sets(folders: Sequence[str]) -> dict[str, list[str]]:
    """Lists of fonts by the name of the set."""
    if not folders:
        return {"Pillow's font": [pictures.DEFAULT_FONT]}
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from demo_recipe.vision import training_fonts

    known, held_out = training_fonts(list(folders))
    return {"fonts of the training": known, "held-out fonts": held_out}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="folder to evaluate; default: the one in the package")
    parser.add_argument("--transformers", action="store_true", help="read with transformers, float32")
    parser.add_argument(
        "--types", nargs="*", default=[], help="read with files of these types (f16, q8_0, ...)"
    )
    parser.add_argument("--fonts", nargs="*", default=[], help="folders of the fonts that the training used")
    parser.add_argument("--number", type=int, default=None, help="number of puzzles; default: all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    checkpoint = arguments.checkpoint or checkpoint_path()
    pairs = puzzles()[: arguments.number]
    sets = {
        name: draw_pictures(pairs, fonts, arguments.seed)
        for name, fonts in font_sets(arguments.fonts).items()
    }
    rows = []
    if arguments.transformers:
        rows += evaluate("transformers float32", transformers_reader(checkpoint), sets, pairs, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.types:
            from pydiffusion.convert import convert, convert_mmproj

            model, mmproj = Path(folder) / f"demo-{kind}.gguf", Path(folder) / f"mmproj-{kind}.gguf"
            convert(checkpoint, model, type=kind)
            convert_mmproj(checkpoint, mmproj, type=kind)
            rows += evaluate(f"pydiffusion {kind}", gguf_reader(model, mmproj), sets, pairs, arguments.seed)
    print(
        "| held-out puzzles, 95% intervals | givens read | cells read | pictures without a mistake | solved |"
    )
    print("|---|---|---|---|---|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
