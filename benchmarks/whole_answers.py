"""Measure loading, memory and whole answers of a model on the CPU of a Linux machine.

    python benchmarks/whole_answers.py MODEL [--prompt 16 1024] [--steps 16 48] [--cold] [--leave 18G]

An answer is one canvas, denoised with every number of steps after every length of prompt, on random tokens,
with the adaptive stop off. --cold takes the file out of the page cache first. --leave occupies memory until
only this much is available, as MemAvailable in /proc/meminfo counts it, before the model is loaded.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pydiffusion import DiffusionModel, DraftEvent, GenerationOptions, Session
from pydiffusion.convert import parse_size


def kilobytes(file: str, key: str) -> int:
    """A value of a file in /proc, in bytes."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return 1024 * int(value)


class MemoryPeak(threading.Thread):
    """The largest memory of this process since it began, by kind: of its own, and of mapped files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.files = 0

    def run(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, kilobytes("/proc/self/status", "RssAnon"))
            self.files = max(self.files, kilobytes("/proc/self/status", "RssFile"))
            time.sleep(0.02)


def occupy(n_left: int) -> mmap.mmap | None:
    """Memory that can't be reclaimed (nor, without swap, moved out), until ``n_left`` bytes are available."""
    n_bytes = kilobytes("/proc/meminfo", "MemAvailable") - n_left
    if n_bytes <= 0:
        return None
    taken = mmap.mmap(-1, n_bytes)
    for page in range(0, n_bytes, mmap.PAGESIZE):
        taken[page] = 1
    return taken


def evict(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def step_seconds(session: Session, n_steps: int) -> Iterator[float]:
    """Denoise a canvas; yields the time of each step."""
    options = GenerationOptions(
        max_tokens=session.model.canvas_length, steps=n_steps, stability_threshold=n_steps,
        confidence_threshold=0.0, seed=0, eos=[],
    )  # fmt: skip
    started = time.perf_counter()
    for event in session.generate(options):
        if isinstance(event, DraftEvent):
            yield time.perf_counter() - started
            started = time.perf_counter()


def measure_answer(model: DiffusionModel, n_prompt: int, n_steps: int) -> None:
    session = model.new_session(n_prompt + model.canvas_length)
    prompt = np.random.default_rng(0).integers(0, model.n_vocab, n_prompt)
    started = time.perf_counter()
    session.encode(prompt)
    prefill = time.perf_counter() - started
    steps = list(step_seconds(session, n_steps))
    assert len(steps) == n_steps, f"{len(steps)} of {n_steps} steps"
    print(
        f"prompt of {n_prompt}: {prefill:.1f} s, {n_prompt / prefill:.0f} tokens/s; {n_steps} steps: first "
        f"{steps[0]:.2f} s, median {statistics.median(steps):.2f}, {min(steps):.2f} to {max(steps):.2f}; "
        f"answer of {model.canvas_length} tokens: {prefill + sum(steps):.1f} s",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, nargs="+", default=[16, 1024])
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 48])
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--leave", type=parse_size)
    arguments = parser.parse_args()
    taken = None if arguments.leave is None else occupy(arguments.leave)
    if arguments.cold:
        evict(arguments.model)
    print(f"available: {kilobytes('/proc/meminfo', 'MemAvailable') / 1e9:.1f} GB")
    peak = MemoryPeak()
    peak.start()
    started = time.perf_counter()
    model = DiffusionModel(arguments.model, n_gpu_layers=0, kernels=arguments.kernels)
    print(f"loaded in {time.perf_counter() - started:.1f} s", flush=True)
    for n_prompt in arguments.prompt:
        for n_steps in arguments.steps:
            measure_answer(model, n_prompt, n_steps)
    peak_bytes = kilobytes("/proc/self/status", "VmHWM") - (0 if taken is None else len(taken))
    print(
        f"peak memory {peak_bytes / 1e9:.2f} GB: mapped files {peak.files / 1e9:.2f}, its own "
        f"{peak.anonymous / 1e9:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
