"""Measure how the cost of a denoising step depends on the context length and the batch size.

python benchmarks/step_costs.py [MODEL] [--threads N] [--blocks 16] [--prompt 128] [--rounds 5]

Without MODEL, a synthetic one of 0.4e9 weights (mid, q4_k_m) is created. Prints medians:
- batch: time of a step of 1, 2 and 4 canvases in one graph, and the throughput relative to one canvas;
- blocks: time of a step in block 1 and in a late block, with and without attention (only attention should
  grow with the context), and the time to commit an early and a late block.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from pydiffusion import _native
from pydiffusion._util.cpus import step_threads
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.testing.synthetic import write_synthetic


def begin(session: _native.Session, seed: int, n_blocks: int, steps: int) -> None:
    """Begin a generation whose canvases never settle, so every step is a full one."""
    endless = {"steps": steps, "stability_threshold": steps, "confidence_threshold": 0.0}
    options = {**ENTROPY_BOUND_DEFAULTS, **endless}
    session.begin(max_tokens=n_blocks * 100_000, seed=seed, eos=[], **options)


def new_session(model: _native.Model, n_prompt: int, n_ctx: int, seed: int = 0) -> _native.Session:
    session = _native.Session(model, n_ctx)
    ids = np.random.default_rng(seed).integers(0, model.n_vocab, n_prompt).astype(np.int32)
    session.encode(ids)
    return session


def batches(model: _native.Model, n_prompt: int, rounds: int) -> None:
    """Time steps of batches of 1, 2 and 4 sessions."""
    n_ctx = n_prompt + 2 * model.canvas_length
    sessions = [new_session(model, n_prompt, n_ctx, seed) for seed in range(4)]
    seconds: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for n in seconds:
        batch = _native.Batch(model)
        for session in sessions[:n]:
            begin(session, 1, 1, 100)
        for _ in range(rounds + 1):
            started = time.perf_counter()
            batch.next_steps(sessions[:n])
            seconds[n].append(time.perf_counter() - started)
    one = statistics.median(seconds[1][1:])
    for n, elapsed in seconds.items():
        step = statistics.median(elapsed[1:])
        print(f"batch {n}: step {1e3 * step:.0f} ms, {n * one / step:.2f} times the throughput of one canvas")


def attention_seconds(session: _native.Session) -> float:
    return statistics.median(session.profile_step()["attention"][0] for _ in range(3))


def blocks(model: _native.Model, n_prompt: int, n_blocks: int, rounds: int) -> None:
    """Time steps in the first and the last block of a generation."""
    n_ctx = n_prompt + (n_blocks + 1) * model.canvas_length
    session = new_session(model, n_prompt, n_ctx)
    begin(session, 2, n_blocks, rounds + 1)
    steps: dict[int, list[float]] = {}
    commits: dict[int, float] = {}
    for block in range(1, n_blocks + 1):
        for i in range(rounds + 1):
            before = session.n_encoded
            started = time.perf_counter()
            session.next_step()
            elapsed = time.perf_counter() - started
            if i == 0:  # commits the previous block, and has no self-conditioning
                commits[block] = elapsed
                assert session.n_encoded - before == (model.canvas_length if block > 1 else 0)
            else:
                steps.setdefault(block, []).append(elapsed)
    first, last = statistics.median(steps[1]), statistics.median(steps[n_blocks])
    early = new_session(model, n_prompt, n_ctx)
    late = new_session(model, n_prompt + (n_blocks - 1) * model.canvas_length, n_ctx)
    attention = []
    for other in (early, late):
        begin(other, 3, 1, 10)
        other.next_step()
        other.next_step()
        attention.append(attention_seconds(other))
    grown = attention[1] - attention[0]
    print(
        f"block 1: step {1e3 * first:.0f} ms; block {n_blocks}: {1e3 * last:.0f} ms, ratio {last / first:.2f}"
    )
    print(
        f"attention over the longer context takes {1e3 * grown:.0f} ms more; without that the ratio is "
        f"{(last - grown) / first:.2f}"
    )
    print(
        f"commit and first step of the next block: block 2 {1e3 * commits[2]:.0f} ms, "
        f"block {n_blocks} {1e3 * commits[n_blocks]:.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=step_threads().n)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pydiffusion-costs-") as folder:
        path = arguments.model or write_synthetic("mid", Path(folder) / "mid.gguf", "q4_k_m")
        model = _native.Model(str(path), arguments.threads)
        batches(model, arguments.prompt, arguments.rounds)
        blocks(model, arguments.prompt, arguments.blocks, arguments.rounds)


if __name__ == "__main__":
    main()
