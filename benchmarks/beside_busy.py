"""A denoising step alone and beside a busy program of another login session, in turns, as ratios.

    python benchmarks/beside_busy.py MODEL.gguf [--threads 1 2] [--rounds 5] [--steps 4] [--kernels auto]

Linux shares the CPUs among login sessions, not threads: what `setsid` starts counts as much as all threads
of this program together, as a browser or a build on a desktop does. In each round every number of threads
takes its steps first alone, then beside one such process that computes without pause. Steps have dense
self-conditioning, behind a prompt of 128 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from pydiffusion import DiffusionModel

N_PROMPT = 128


def stepper(model: DiffusionModel) -> Callable[[], float]:
    """A function that takes a step and returns its seconds."""
    rng = np.random.default_rng(0)
    session = model.new_session()
    session.encode(rng.integers(0, model.n_vocab, N_PROMPT).astype(np.int32))
    canvas = rng.integers(0, model.n_vocab, model.canvas_length).astype(np.int32)
    conditioning = rng.standard_normal((model.canvas_length, model.n_vocab)).astype(np.float32)

    def step() -> float:
        started = time.perf_counter()
        session.denoise(canvas, conditioning)
        return time.perf_counter() - started

    step()
    return step


@contextmanager
def busy_program() -> Iterator[None]:
    """One process that computes, in a session of its own."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        time.sleep(0.3)
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--kernels", default="auto")
    given = parser.parse_args()
    models = {n: DiffusionModel(given.model, n_threads=n, kernels=given.kernels) for n in given.threads}
    steppers = {n: stepper(model) for n, model in models.items()}
    alone: dict[int, list[float]] = {n: [] for n in steppers}
    beside: dict[int, list[float]] = {n: [] for n in steppers}
    for _ in range(given.rounds):
        for n, step in steppers.items():
            alone[n] += [step() for _ in range(given.steps)]
            with busy_program():
                beside[n] += [step() for _ in range(given.steps)]
    for n in steppers:
        quiet, busy = (1e3 * statistics.median(times[n]) for times in (alone, beside))
        print(f"{n} threads: alone {quiet:.1f} ms, beside {busy:.1f} ms, ratio {busy / quiet:.2f}")


if __name__ == "__main__":
    main()
