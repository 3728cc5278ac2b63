"""Compare padding with fallback types, and mixes with more bits in some parts with plain recipes.

    python benchmarks/quantization_choices.py padding FOLDER --types q4_k_m q3_k_m
    python benchmarks/quantization_choices.py mixes FOLDER --types q4_k_m q3_k_m [--imatrix FILE]

padding: each type with and without padding: bits per weight, KL divergence from f32, CPU time of a denoising
step (summed over threads, so other load does not matter). mixes: each type plain, and with attention,
embedding and dense MLP at q8_0 cumulatively, sorted by size; --fit chooses among these. FOLDER is a
checkpoint; by default the demo model's, with its tasks as prompts. benchmarks/checkpoint.py creates larger
ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pydiffusion import DiffusionModel
from pydiffusion.convert import convert, evaluate_family
from pydiffusion.convert.gguf.report import ConversionReport
from pydiffusion.convert.quantization import sizes

PARTS = ("attention", "embedding", "dense")  # in the order of sizes.UPGRADES
PROMPTS = ("the river runs", "0 1 2 3 4 5 6 7", "a")


def milliseconds_per_step(path: Path, number: int, n_threads: int | None) -> float:
    """Return the minimum CPU time over ``number`` steps with self-conditioning after a prompt."""
    with DiffusionModel(path, n_threads=n_threads) as model:
        session = model.new_session(2 * model.canvas_length + 32)
        session.encode(model.tokenize("the river runs"))
        canvas = np.arange(model.canvas_length, dtype=np.int32) % model.n_vocab
        logits = session.denoise(canvas)
        times = []
        for _ in range(number):
            started = time.process_time()
            session.denoise(canvas, logits)
            times.append(time.process_time() - started)
    return 1000 * min(times)


def padding(folder: Path, types: list[str], out: Path) -> list[tuple[str, ConversionReport]]:
    reports = []
    for type in types:
        for label, pad in (("padded", True), ("fallback", False)):
            reports.append((f"{type} {label}", convert(folder, out / f"{type}-{label}.gguf", type, pad=pad)))
    return reports


def mixes(
    folder: Path, types: list[str], out: Path, imatrix: Path | None
) -> list[tuple[str, ConversionReport]]:
    """Convert to each plain type, and with the parts that --fit upgrades at q8_0, cumulatively."""
    reports = []
    for type in types:
        overrides: list[tuple[str, str]] = []
        label = type
        for part, (pattern, _) in zip(("", *PARTS), (("", ()), *sizes.UPGRADES), strict=True):
            if part:
                overrides.append((pattern, "q8_0"))
                label += f" + {part}"
            target = out / f"{label.replace(' ', '')}.gguf"
            options = {"tensor_types": overrides, "imatrix": imatrix}
            reports.append((label, convert(folder, target, type, **options)))
    return sorted(reports, key=lambda one: one[1].n_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("padding", "mixes"))
    parser.add_argument("folder", type=Path, nargs="?", help="checkpoint [default: the demo model's]")
    parser.add_argument("--types", nargs="+", default=["q4_k_m"])
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--max-steps", type=int, help="steps of each canvas [default: the file's]")
    parser.add_argument("--threads", type=int, help="[default: all; use 1 on a busy machine]")
    parser.add_argument("--steps", type=int, default=9, help="steps to time")
    arguments = parser.parse_args()
    prompts = PROMPTS
    if arguments.folder is None:
        from pydiffusion.demo import checkpoint_path

        arguments.folder, prompts = checkpoint_path(), None
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        convert(arguments.folder, out / "f32.gguf", "f32")
        if arguments.what == "padding":
            reports = padding(arguments.folder, arguments.types, out)
        else:
            reports = mixes(arguments.folder, arguments.types, out, arguments.imatrix)
        files = [report.target for _, report in reports]
        found = evaluate_family(
            files,
            out / "f32.gguf",
            prompts,
            max_tokens=arguments.tokens,
            steps=arguments.max_steps,
            n_threads=arguments.threads,
        )
        print("| file | MB | bits per weight | mean KL | 99% KL | top 1 | CPU ms per step |")
        print("|---|---|---|---|---|---|---|")
        for (label, written), measured in zip(reports, found, strict=True):
            cells = (
                label,
                f"{written.n_bytes / 1e6:.1f}",
                f"{written.bits_per_weight:.2f}",
                f"{measured.mean_kl:.5f}",
                f"{measured.kl_99:.4f}",
                f"{measured.top1:.2%}",
                f"{milliseconds_per_step(written.target, arguments.steps, arguments.threads):.0f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
