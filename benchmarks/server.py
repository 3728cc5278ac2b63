"""Measure the server's overhead over a bare session, and the cost of concurrent requests, as ratios.

python benchmarks/server.py [MODEL] [--threads N] [--prompt N] [--steps N] [--repeat N]

Without a model, one with random weights is created ("mid", 438e6 weights, q4_k_m). Requests and bare sessions
alternate, so that other load affects both equally.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from pydiffusion import CanvasEvent, DiffusionModel, DraftEvent, GenerationOptions
from pydiffusion.testing.synthetic import write_synthetic


@dataclass
class Timed:
    """Timings of one canvas.

    drafts, text: seconds since the request. between: seconds per step outside of native calls.
    """

    drafts: list[float]
    text: float
    between: float

    @property
    def steps(self) -> list[float]:
        return [b - a for a, b in pairwise(self.drafts)]


class Bench:
    """A server process, and the same model in this process."""

    def __init__(self, path: Path, url: str, pid: int, arguments: argparse.Namespace) -> None:
        self.url = url
        self._pid = pid
        self.n_steps = arguments.steps
        self.model = DiffusionModel(path, n_ctx=2048, n_threads=arguments.threads)
        self._session = self.model.new_session()
        rng = np.random.default_rng(0)
        low, high = (260, self.model.n_vocab) if self.model.n_vocab > 1000 else (40, 90)
        self._prompts = rng.integers(low, high, (10_000, arguments.prompt)).tolist()

    def prompt(self) -> list[int]:
        """Return a prompt that is in no cache."""
        return self._prompts.pop()

    @property
    def choices(self) -> dict[str, Any]:
        """Options for one canvas with all its steps."""
        return {"steps": self.n_steps, "confidence_threshold": 0.0, "max_tokens": 1, "seed": 1}

    def _between(self, timings: Mapping[str, float]) -> float:
        native = timings["prompt"] + timings["encode"] + timings["denoise"]
        return (timings["total"] - native) / self.n_steps

    def bare(self, prompt: list[int]) -> Timed:
        drafts, text, between = [], 0.0, 0.0
        started = time.perf_counter()
        self._session.prefill(prompt)
        for event in self._session.generate(GenerationOptions(**self.choices)):
            if isinstance(event, DraftEvent):
                drafts.append(time.perf_counter() - started)
            elif isinstance(event, CanvasEvent):
                text = time.perf_counter() - started
            else:
                between = self._between(event.timings)
        return Timed(drafts, text, between)

    def served(self, prompt: list[int]) -> Timed:
        body = self.choices | {"prompt": prompt, "stream": True, "stream_options": {"diffusion": True}}
        drafts, text, between = [], 0.0, 0.0
        started = time.perf_counter()
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=600) as stream:
            for line in stream.iter_lines():
                now = time.perf_counter() - started
                event = json.loads(line[6:]) if line.startswith("data: {") else {"choices": []}
                kind = event.get("diffusion", {}).get("type")
                if kind == "draft":
                    drafts.append(now)
                elif kind == "summary":
                    between = self._between(event["diffusion"]["timings"])
                    text = text or now  # if the canvas begins with an eos
                elif event["choices"]:
                    text = now
        return Timed(drafts, text, between)

    def loop_seconds(self) -> float:
        """Return the CPU time of the server's event loop, its first thread."""
        return int(Path(f"/proc/{self._pid}/task/{self._pid}/schedstat").read_text().split()[0]) / 1e9

    def metric(self, name: str) -> float:
        text = httpx.get(self.url + "/metrics").text
        found = re.search(rf"^pydiffusion_{name} (\S+)", text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def disconnect(self) -> tuple[float, int]:
        """Disconnect at the third draft; return (seconds until the server is idle, steps missed)."""
        before, seen = self.metric("steps_total"), 0
        body = self.choices | {
            "prompt": self.prompt(), "steps": 10_000, "stream": True, "stream_options": {"diffusion": True},
        }  # fmt: skip
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=600) as stream:
            for line in stream.iter_lines():
                seen += '"type":"draft"' in line
                if seen == 3:
                    break
        left = time.perf_counter()
        while httpx.get(self.url + "/health").json()["active"]:
            time.sleep(0.001)
        return time.perf_counter() - left, int(self.metric("steps_total") - before) - seen

    def concurrent(self, n: int) -> tuple[float, list[float]]:
        """Send n requests at once; return (seconds until all are done, seconds to each first draft)."""
        first: list[float] = []
        prompts = [self.prompt() for _ in range(n)]
        threads = [
            threading.Thread(target=lambda prompt=prompt: first.append(self.served(prompt).drafts[0]))
            for prompt in prompts
        ]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started, first


def overhead(bench: Bench, n_repeat: int) -> float:
    """Compare the server with a bare session, alternating; return the seconds of a step."""
    bare, served, loop = [], [], []
    bench.bare(bench.prompt()), bench.served(bench.prompt())  # warm up
    for _ in range(n_repeat):
        prompt = bench.prompt()
        bare.append(bench.bare(prompt))
        before = bench.loop_seconds()
        served.append(bench.served(prompt))
        loop.append((bench.loop_seconds() - before) / bench.n_steps)
    step = min(min(run.steps) for run in bare)
    print(f"step of the bare session: {1e3 * step:.1f} ms, best of {n_repeat * (bench.n_steps - 1)}")
    first = [min(run.drafts[0] for run in runs) / step for runs in (bare, served)]
    print(f"first draft after {first[1]:.2f} steps, bare {first[0]:.2f}")
    text = [min(run.text for run in runs) / step for runs in (bare, served)]
    print(
        f"first settled text after {text[1]:.2f} steps, bare {text[0]:.2f}: a canvas of {bench.n_steps} steps"
    )
    apart = [statistics.median(s for run in runs for s in run.steps) for runs in (bare, served)]
    print(f"time between two drafts: {apart[1] / apart[0]:.4f} of the bare session's (medians)")
    between = [statistics.median(run.between for run in runs) for runs in (bare, served)]
    print(
        f"time between native steps: {1e3 * between[1]:.2f} ms, bare {1e3 * between[0]:.2f}:"
        f" {(between[1] - between[0]) / step:+.4f} of a step"
    )
    event = statistics.median(loop)
    print(f"event loop CPU time per step of a request: {1e3 * event:.2f} ms, {event / step:.4f} of a step")
    return step


def concurrency(bench: Bench, n_repeat: int) -> None:
    """Compare concurrent requests with a single one, best of several."""
    alone = min(bench.concurrent(1)[0] for _ in range(n_repeat))
    for n in (2, 4):
        runs = [bench.concurrent(n) for _ in range(n_repeat)]
        seconds = min(run[0] for run in runs)
        first = min(max(run[1]) for run in runs)
        print(
            f"{n} concurrent requests: done after {seconds / alone:.2f} times a single one (in a queue: {n}),"
            f" all have a first draft after {first / alone:.2f} (in a queue: more than {n - 1})"
        )


def disconnects(bench: Bench, n_repeat: int, step: float) -> None:
    gone = [bench.disconnect() for _ in range(n_repeat)]
    print(
        f"client disconnects: idle after {statistics.median(g[0] for g in gone) / step:.2f} steps (median),"
        f" at most {max(g[0] for g in gone) / step:.2f}; steps that it missed: {[g[1] for g in gone]}"
    )


@contextmanager
def serving(path: Path, n_threads: int, python_path: str = "") -> Iterator[tuple[str, int]]:
    """Run the server in a login session of its own; yields its address and process id."""
    environment = os.environ | ({"PYTHONPATH": python_path} if python_path else {})
    command = [sys.executable, "-m", "pydiffusion", "serve", "-m", str(path), "--port", "0"]
    command += ["--threads", str(n_threads), "--ctx", "2048"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"serving on (http://\S+)", line):
                    yield found[1], process.pid
                    break
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=8, help="steps of each canvas")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or write_synthetic("mid", Path(folder) / "mid.gguf")
        with serving(path, arguments.threads) as (url, pid):
            bench = Bench(path, url, pid, arguments)
            step = overhead(bench, arguments.repeat)
            disconnects(bench, arguments.repeat, step)
            concurrency(bench, max(1, arguments.repeat // 2))


if __name__ == "__main__":
    main()
