"""Compare the time of a denoising step with transformers on the same CPU, alternating in one process.

    python benchmarks/against_transformers.py [--types q4_k_m q8_0] [--threads 2] [--rounds 5]

Creates a random bf16 checkpoint of 438e6 weights (d 1024, 12 layers, 4 of 32 experts of size 256, dense 1536,
vocabulary 32768, canvas 256), converts it, encodes a prompt of 128 tokens with both, and times steps with
self-conditioning in the order A B A B. transformers runs in bfloat16 with eager attention and its default
experts. Random weights give flat distributions, so self-conditioning is a dense matmul here, the worst case.
Needs the `reference` extra.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # keeps idle torch threads from spinning

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from reference import random_checkpoint
from reference.toy_tokenizer import tokenizer_json
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from pydiffusion import DiffusionModel, convert
from pydiffusion._util.cpus import step_threads

MID = random_checkpoint.Shape(
    1024, "sssssf" * 2, 8, 4, 128, 1, 256, 1536, 256, 32, 4, 512, 256, 32768, context=4096
)  # fmt: skip
N_PROMPT = 128
N_TOKENS = 512


def transformers_step(folder: Path, prompt: np.ndarray, canvas: np.ndarray) -> Callable[[], None]:
    """Return a function that runs one step in bfloat16."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    ids = torch.from_numpy(canvas.astype(np.int64))[None]
    with torch.no_grad():
        model.model.encoder(
            input_ids=torch.from_numpy(prompt.astype(np.int64))[None],
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.bool),
            past_key_values=cache,
        )
        conditioning = model(past_key_values=cache, decoder_input_ids=ids).logits

    @torch.no_grad()
    def step() -> None:
        model(past_key_values=cache, decoder_input_ids=ids, self_conditioning_logits=conditioning)

    return step


def our_step(path: Path, n_threads: int, prompt: np.ndarray) -> Callable[[], None]:
    """Return a function that runs one step, including the sampler."""
    model = DiffusionModel(path, n_threads=n_threads, n_ctx=1024)
    session = model.new_session()
    session.encode(prompt)
    endless = {"steps": 10**6, "stability_threshold": 10**6, "confidence_threshold": 0.0, "seed": 1}
    events = session.generate(max_tokens=1, eos=(), **endless)
    next(events)  # the first step has no self-conditioning
    return lambda: next(events)


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q8_0"])
    parser.add_argument("--threads", type=int, default=step_threads().n)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder for checkpoint and files, reused if they exist")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.keep or Path(temporary)
        folder = work / "mid-checkpoint"
        random_checkpoint.SHAPES["mid"] = MID
        # The toy tokenizer's text is too short for this vocabulary; ids from N_TOKENS on have no text.
        random_checkpoint.tokenizer_json = lambda _: tokenizer_json(N_TOKENS)
        if not (folder / "tokenizer_config.json").exists():
            random_checkpoint.write_checkpoint(folder, "mid", dtype="bf16")
        rng = np.random.default_rng(0)
        prompt = rng.integers(0, MID.vocab, N_PROMPT).astype(np.int32)
        canvas = rng.integers(0, MID.vocab, MID.canvas).astype(np.int32)
        steps = {"transformers bf16": transformers_step(folder, prompt, canvas)}
        for type_name in arguments.types:
            path = work / f"mid-{type_name}.gguf"
            if not path.exists():
                convert.convert(folder, path, type_name)
            steps[type_name] = our_step(path, arguments.threads, prompt)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(arguments.rounds + 1):
            for name, step in steps.items():
                elapsed = seconds(step)
                if turn:  # the first round is warm-up
                    times[name].append(elapsed)
    reference = times["transformers bf16"]
    for name, elapsed in times.items():
        ratios = [a / b for a, b in zip(reference, elapsed, strict=True)]
        print(
            f"{name:20} {1e3 * statistics.median(elapsed):7.0f} ms per step (best {1e3 * min(elapsed):.0f}), "
            f"speedup {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
