"""Measure the KL divergence of quantized demo models with and without an imatrix, on known answers.

python benchmarks/quantization_imatrix.py [--types q4_k_m q3_k_m q2_k] [--cases 32] [--threads 1]

The last column is the change of the mean KL with the imatrix, with its standard error over the cases.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from quantization import demo_texts

from pydiffusion import DiffusionModel, _native
from pydiffusion.convert import collect_imatrix, convert
from pydiffusion.demo import checkpoint_path, tasks
from pydiffusion.quality.evaluation import NOISE, compare_logits

N_OBSERVED = 150


def cases(model: DiffusionModel, number: int) -> list[tuple[list[int], np.ndarray]]:
    """Return (prompt, canvas of the correct answer) of held-out tasks."""
    rng, result, size = random.Random(7), [], model.canvas_length
    end = model.metadata["tokenizer.ggml.eos_token_ids"][0]
    for index in range(number):
        example = tasks.generate(list(tasks.TASKS)[index % len(tasks.TASKS)], rng, held_out=True)
        answer = [*model.tokenize(example.answer, add_bos=False), *[end] * size][:size]
        prompt = model.chat_prompt([{"role": "user", "content": example.prompt}])
        result.append((prompt, np.array(answer, np.int32)))
    return result


def logits(model: DiffusionModel, inputs: list, reference: list[np.ndarray] | None) -> list[np.ndarray]:
    """Compute logits per case and noise level, without and with self-conditioning (on ``reference``)."""
    result: list[np.ndarray] = []
    for index, (prompt, clean) in enumerate(inputs):
        session = model.new_session(len(prompt) + len(clean))
        session.encode(prompt)
        for level, t in enumerate(NOISE):
            u, tokens = _native.random_draws(1000 + index, level, 0, len(clean), model.n_vocab)
            canvas = np.where(u < t, tokens, clean).astype(np.int32)
            result.append(session.denoise(canvas))
            first = result[-1] if reference is None else reference[len(result) - 1]
            result.append(session.denoise(canvas, first / np.float32(0.4 + 0.4 * t)))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q3_k_m", "q2_k"])
    parser.add_argument("--cases", type=int, default=32, help="held-out tasks")
    parser.add_argument("--threads", type=int, help="[default: all; use 1 on a busy machine]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, (f32, imatrix_path, target) = (
            checkpoint_path(),
            (Path(temporary) / n for n in ("f", "i", "m")),
        )
        convert(folder, f32, "f32")
        collect_imatrix(f32, demo_texts(f32, N_OBSERVED), imatrix_path, n_threads=arguments.threads)
        with DiffusionModel(f32, n_threads=arguments.threads) as reference:
            inputs = cases(reference, arguments.cases)
            expected = logits(reference, inputs, None)
        for type in arguments.types:
            by_case: list[np.ndarray] = []
            for imatrix in (None, imatrix_path):
                bits = convert(folder, target, type, imatrix=imatrix).bits_per_weight
                with DiffusionModel(target, n_threads=arguments.threads) as model:
                    found = logits(model, inputs, expected)
                pairs = [compare_logits(a, b) for a, b in zip(expected, found, strict=True)]
                kl, same = (np.concatenate(part) for part in zip(*pairs, strict=True))
                by_case.append(kl.reshape(len(inputs), -1).mean(axis=1))
                change = ""
                if imatrix is not None:
                    less = (by_case[1] - by_case[0]) / by_case[0].mean()
                    change = f"{less.mean():+.0%} ± {less.std(ddof=1) / len(less) ** 0.5:.0%}"
                label = f"{type}{'' if imatrix is None else ', imatrix'}"
                figures = f"{kl.mean():.5f} | {np.quantile(kl, 0.99):.4f} | {same.mean():.2%} | {change}"
                print(f"| {label} | {bits:.2f} | {figures} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
