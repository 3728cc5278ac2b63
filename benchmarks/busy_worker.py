"""Worker of beside_busy.py: a model that runs what its standard input says, one command a line.

    python benchmarks/busy_worker.py MODEL.gguf THREADS KERNELS

Commands are ``step N``, ``prefill N_TOKENS``, ``text SEED``, ``convert SOURCE``; the reply is a line
of JSON, of each run's start and end in seconds of ``time.perf_counter``, or a digest of the text. A program
of its own, so that different builds of the package can be measured in turns.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion import DiffusionModel, EndEvent

N_PROMPT = 128
N_CTX = 2048


class Worker:
    def __init__(self, model: DiffusionModel) -> None:
        self._model = model
        rng = np.random.default_rng(0)
        self._ids = rng.integers(0, model.n_vocab, N_CTX).astype(np.int32)
        self._canvas = rng.integers(0, model.n_vocab, model.canvas_length).astype(np.int32)
        self._conditioning = rng.standard_normal((model.canvas_length, model.n_vocab)).astype(np.float32)
        self._session = model.new_session()
        self._session.encode(self._ids[:N_PROMPT])
        self.step("1")

    def step(self, count: str) -> list[tuple[float, float]]:
        """Denoising steps with dense self-conditioning, after a prompt of 128 tokens."""
        return [
            timed(lambda: self._session.denoise(self._canvas, self._conditioning)) for _ in range(int(count))
        ]

    def prefill(self, n_tokens: str) -> list[tuple[float, float]]:
        session = self._model.new_session()
        return [timed(lambda: session.encode(self._ids[: int(n_tokens)]))]

    def text(self, seed: str) -> str:
        """Digest of a seeded generation: every step's draft, and the text's tokens."""
        session = self._model.new_session()
        session.encode(self._ids[:16])
        options = {"max_tokens": 32, "steps": 3, "seed": int(seed), "confidence_threshold": 0.0}
        digest = hashlib.sha256()
        for event in session.generate(**options):
            if not isinstance(event, EndEvent):
                digest.update(event.tokens.tobytes())
        return digest.hexdigest()

    def convert(self, source: str) -> list[tuple[float, float]]:
        """A checkpoint's folder, or a GGUF file, to q4_k_m."""
        from pydiffusion.convert import convert, quantize

        work = convert if Path(source).is_dir() else quantize
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "q4_k_m.gguf"
            return [timed(lambda: work(source, target, "q4_k_m", n_threads=self._model.n_threads))]


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    started = time.perf_counter()
    work()
    return started, time.perf_counter()


def main() -> None:
    path, threads, kernels = sys.argv[1:]
    worker = Worker(DiffusionModel(path, n_ctx=N_CTX, n_threads=int(threads), kernels=kernels))
    print("ready", flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        print(json.dumps(getattr(worker, command)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
