"""Quantize a checkpoint to several types and compare each file with f32; prints a Markdown table.

python benchmarks/quantization.py                                  # the demo model and its tasks
python benchmarks/quantization.py FOLDER --prompts prompts.txt --imatrix text.txt --types q4_k_m iq3_s
python benchmarks/quantization.py FOLDER --random 2 --max-steps 4      # a checkpoint of random weights

The demo model's imatrix is collected on 150 of its training tasks. With an imatrix, every type below 8 bits
(or those of --imatrix-types) is also quantized with it. --random uses texts of random tokens, different ones
for prompts and imatrix. Types that padding changes are tested with and without it. KL is in nats per
position.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from pydiffusion.convert import (
    ConversionProgress,
    collect_imatrix,
    convert,
    evaluate_family,
    plan_sizes,
    plot,
)
from pydiffusion.convert.quantization.recipes import NEEDS_IMATRIX
from pydiffusion.quality.evaluation import NOISE

TYPES = ("bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_m", "q2_k")


class Progress:
    """Prints a line on stderr every 30 seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, state: ConversionProgress) -> None:
        if time.monotonic() - self.last > 30:
            self.last = time.monotonic()
            print(f"{state.done_bytes} of {state.total_bytes} prompts", file=sys.stderr)


def random_texts(model: Path, number: int, seed: int) -> list[list[int]]:
    """Return texts of random token ids, a canvas and 64 tokens long, without control and byte tokens."""
    from pydiffusion import DiffusionModel

    rng = random.Random(seed)
    with DiffusionModel(model) as opened:
        n_tokens = opened.canvas_length + 64
        return [[rng.randrange(512, opened.n_vocab) for _ in range(n_tokens)] for _ in range(number)]


def random_prompts(model: Path, number: int) -> list[str]:
    from pydiffusion import DiffusionModel

    with DiffusionModel(model) as opened:
        return [opened.detokenize(ids[:64]) for ids in random_texts(model, number, seed=1)]


def imatrix_texts(arguments: argparse.Namespace, reference: Path) -> list[str] | list[list[int]]:
    if arguments.random:
        return random_texts(reference, arguments.random, seed=2)
    if arguments.imatrix:
        return arguments.imatrix.read_text(encoding="utf-8").splitlines()
    return demo_texts(reference)


def variants(folder: Path, type: str, imatrix: Path | None) -> list[tuple[str, dict]]:
    """Return (label, keyword arguments of convert) of each distinct way to quantize to a type."""
    result: list[tuple[str, dict]] = [("", {})]
    if plan_sizes(folder, type).n_bytes != plan_sizes(folder, type, pad=False).n_bytes:
        result.append((" unpadded", {"pad": False}))
    if imatrix is not None and type not in ("bf16", "f16", "q8_0"):
        result.append((" imatrix", {"imatrix": imatrix}))
    planned = plan_sizes(folder, type, has_imatrix=imatrix is not None)
    if any(tensor.type in NEEDS_IMATRIX for tensor in planned.tensors):
        result = [variant for variant in result if "imatrix" in variant[1]]
    return result


def demo_texts(model: Path, number: int = 150) -> list[list[int]]:
    """Return conversations of demo tasks as tokens, padded with eos so that answers fill whole canvases."""
    from pydiffusion import DiffusionModel
    from pydiffusion.demo import tasks

    rng, texts = random.Random(1), []
    with DiffusionModel(model) as opened:
        end = opened.metadata["tokenizer.ggml.eos_token_ids"][0]
        for index in range(number):
            example = tasks.generate(list(tasks.TASKS)[index % len(tasks.TASKS)], rng, held_out=False)
            answer = [*opened.tokenize(example.answer, add_bos=False), end]
            answer += [end] * (-len(answer) % opened.canvas_length)
            texts.append(opened.chat_prompt([{"role": "user", "content": example.prompt}]) + answer)
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="checkpoint [default: the demo model's]")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--prompts", type=Path, help="a prompt per line [default: the demo model's tasks]")
    parser.add_argument("--imatrix", type=Path, help="text for the imatrix, one per line")
    parser.add_argument(
        "--random", type=int, metavar="N", help="N random texts as prompts, N for the imatrix"
    )
    parser.add_argument(
        "--imatrix-types",
        nargs="*",
        help="types to quantize with the imatrix too [default: all below 8 bits]",
    )
    parser.add_argument("--noise", type=float, nargs="+", default=NOISE, help="fractions of replaced tokens")
    parser.add_argument("--tokens", type=int, default=144, help="tokens of each answer")
    parser.add_argument("--max-steps", type=int, help="steps of each canvas [default: the file's]")
    parser.add_argument("--threads", type=int, help="[default: all; use 1 on a busy machine]")
    parser.add_argument("--plot", type=Path, help="also write a plot (png, svg, pdf)")
    arguments = parser.parse_args()
    is_demo = arguments.folder is None
    if is_demo:
        from pydiffusion.demo import checkpoint_path

        arguments.folder = checkpoint_path()
    prompts = arguments.prompts and arguments.prompts.read_text(encoding="utf-8").splitlines()
    print("| file | bits per weight | mean KL | 99% KL | top 1 | steps per canvas | equal answers | solved |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        reference, imatrix = Path(temporary) / "f32.gguf", None
        convert(arguments.folder, reference, "f32")
        if arguments.random:
            prompts = random_prompts(reference, arguments.random)
        if arguments.imatrix or arguments.random or is_demo:
            imatrix = Path(temporary) / "imatrix.gguf"
            texts = imatrix_texts(arguments, reference)
            collect_imatrix(reference, texts, imatrix, n_threads=arguments.threads)
        reports = []
        for type in arguments.types:
            wants = arguments.imatrix_types is None or type in arguments.imatrix_types
            for label, options in variants(arguments.folder, type, imatrix if wants else None):
                target = Path(temporary) / f"{type}{label.replace(' ', '-')}.gguf"
                reports.append((f"{type}{label}", convert(arguments.folder, target, type, **options)))
        found = evaluate_family(
            [written.target for _, written in reports],
            reference,
            prompts,
            noise=arguments.noise,
            max_tokens=arguments.tokens,
            steps=arguments.max_steps,
            n_threads=arguments.threads,
            progress=Progress(),
        )
        for (label, written), measured in zip(reports, found, strict=True):
            solved = "" if measured.solved is None else f"{measured.solved:.0%}"
            cells = (
                label,
                f"{written.bits_per_weight:.2f}",
                f"{measured.mean_kl:.5f}",
                f"{measured.kl_99:.4f}",
                f"{measured.top1:.2%}",
                f"{measured.steps:.2f}",
                f"{measured.same_answers:.0%}",
                solved,
            )
            print(f"| {' | '.join(cells)} |")
        solved = "" if found[0].solved is None else f"{found[0].reference_solved:.0%}"
        print(f"| f32 (reference) | 32.00 | | | | {found[0].reference_steps:.2f} | | {solved} |", flush=True)
        if arguments.plot:
            plot(found, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
