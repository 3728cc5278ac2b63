"""Time denoising steps on an idle machine and next to a busy process of another login session.

    python benchmarks/beside_busy.py MODEL.gguf [--threads 1 2] [--rounds 5] [--steps 4] [--kernels auto]

Linux shares CPU time among login sessions, not threads: a process started by `setsid`, like a browser or a
build on a desktop, gets as much as all threads of this program together. Each round times steps for every
number of threads, first alone, then next to such a process in a busy loop. Steps have dense
self-conditioning, after a prompt of 128 tokens.
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
    """Return a function that runs a step and returns its seconds."""
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
def busy_process() -> Iterator[None]:
    """Run a busy loop in a process with its own session."""
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
    arguments = parser.parse_args()
    models = {
        n: DiffusionModel(arguments.model, n_threads=n, kernels=arguments.kernels) for n in arguments.threads
    }
    steppers = {n: stepper(model) for n, model in models.items()}
    alone: dict[int, list[float]] = {n: [] for n in steppers}
    contended: dict[int, list[float]] = {n: [] for n in steppers}
    for _ in range(arguments.rounds):
        for n, step in steppers.items():
            alone[n] += [step() for _ in range(arguments.steps)]
            with busy_process():
                contended[n] += [step() for _ in range(arguments.steps)]
    for n in steppers:
        quiet, busy = (1e3 * statistics.median(times[n]) for times in (alone, contended))
        print(
            f"{n} threads: alone {quiet:.1f} ms, next to busy process {busy:.1f} ms, ratio {busy / quiet:.2f}"
        )


if __name__ == "__main__":
    main()
