"""What the server adds to a session, and what requests side by side cost: all of it from one run, as ratios.

python benchmarks/server.py [MODEL] [--threads N] [--prompt N] [--steps N] [--repeat N]

Without a model, one of random weights is made ("mid", 438e6 weights, q4_k_m). Requests and bare sessions take
turns, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from pydiffusion import CanvasEvent, DiffusionModel, DraftEvent, GenerationOptions
from pydiffusion.synthetic import write_synthetic

N_TIMED = 3  # drafts at a session's beginning that say what a step takes


class Bench:
    """A server process and, in this one, the same model bare."""

    def __init__(self, path: Path, url: str, arguments: argparse.Namespace) -> None:
        self.url = url
        self.n_steps = arguments.steps
        self.model = DiffusionModel(path, n_ctx=2048, n_threads=arguments.threads)
        rng = np.random.default_rng(0)
        low, high = (260, self.model.n_vocab) if self.model.n_vocab > 1000 else (40, 90)
        self._prompts = rng.integers(low, high, (10_000, arguments.prompt)).tolist()

    def prompt(self) -> list[int]:
        """One that no cache has."""
        return self._prompts.pop()

    @property
    def choices(self) -> dict[str, Any]:
        """One canvas of all its steps."""
        return {"steps": self.n_steps, "confidence_threshold": 0.0, "max_tokens": 1, "seed": 1}

    def bare(self, prompt: list[int]) -> list[float]:
        """Seconds from the prompt's arrival to each draft, and to the canvas."""
        session = self.model.new_session()
        started = time.perf_counter()
        session.prefill(prompt)
        return [
            time.perf_counter() - started
            for event in session.generate(GenerationOptions(**self.choices))
            if isinstance(event, DraftEvent | CanvasEvent)
        ]

    def served(self, prompt: list[int], drafts: bool = True) -> list[float]:
        """The same through the server; without drafts, to the text alone."""
        body = self.choices | {"prompt": prompt, "stream": True, "stream_options": {"diffusion": drafts}}
        times = []
        started = time.perf_counter()
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=600) as stream:
            for line in stream.iter_lines():
                now = time.perf_counter() - started
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    is_draft = event.get("diffusion", {}).get("type") == "draft"
                    if is_draft or (event["choices"] and event["choices"][0]["text"]):
                        times.append(now)
        return times

    def metric(self, name: str) -> float:
        text = httpx.get(self.url + "/metrics").text
        found = re.search(rf"^pydiffusion_{name} (\S+)", text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def leave(self) -> tuple[float, int]:
        """Hang up at the third draft: seconds until no work is left, steps that the client did not see."""
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

    def together(self, n: int) -> tuple[float, list[float]]:
        """n requests at once: seconds until all are done, and to the first draft of each."""
        first: list[float] = []
        prompts = [self.prompt() for _ in range(n)]
        threads = [
            threading.Thread(target=lambda prompt=prompt: first.append(self.served(prompt)[0]))
            for prompt in prompts
        ]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started, first


def overhead(bench: Bench, n_repeat: int) -> None:
    """The server against the bare session, a request and a session in turns."""
    pairs = []
    bench.bare(bench.prompt()), bench.served(bench.prompt())  # caches and pages warm
    for i in range(n_repeat):
        prompt = bench.prompt()
        calls = [bench.bare, bench.served] if i % 2 else [bench.served, bench.bare]
        done = {call.__name__: call(prompt) for call in calls}
        pairs.append((done["bare"], done["served"]))
    step = statistics.median(b - a for bare, _ in pairs for a, b in pairwise(bare[:-1]))
    served_step = statistics.median(b - a for _, served in pairs for a, b in pairwise(served[:-1]))
    first = statistics.median(served[0] for _, served in pairs)
    text = statistics.median(served[-1] for _, served in pairs)
    extra_first = statistics.median(served[0] - bare[0] for bare, served in pairs)
    print(f"a step, bare: {1e3 * step:.1f} ms; between two draft events: {served_step / step:.4f} of it")
    print(f"first draft event after {first / step:.2f} steps, {extra_first / step:+.3f} against the session")
    print(f"first settled text after {text / step:.2f} steps, of which the canvas takes {bench.n_steps}")


def event_cost(bench: Bench) -> None:
    """The server's own work for a draft event, by the clock of the processor: nothing else disturbs it."""
    from pydiffusion.server.drafts import draft_fields
    from pydiffusion.server.http import to_json

    session = bench.model.new_session()
    session.prefill(bench.prompt())
    events = session.generate(GenerationOptions(**bench.choices))
    draft = next(event for event in events if isinstance(event, DraftEvent))
    steps = []
    for _ in range(N_TIMED):
        started = time.perf_counter()
        next(events)
        steps.append(time.perf_counter() - started)
    started = time.thread_time()
    for _ in range(100):
        to_json({"diffusion": draft_fields(0, draft, bench.model.tokenizer)})
    seconds = (time.thread_time() - started) / 100
    print(f"making a draft event: {1e3 * seconds:.2f} ms of processor, {seconds / min(steps):.4f} of a step")


def several(bench: Bench, n_repeat: int) -> None:
    alone = statistics.median(bench.together(1)[0] for _ in range(n_repeat))
    for n in (2, 4):
        runs = [bench.together(n) for _ in range(n_repeat)]
        seconds = statistics.median(run[0] for run in runs)
        first = statistics.median(max(run[1]) for run in runs)
        print(
            f"{n} requests at once: done after {seconds / alone:.2f} times one alone (a queue: {n}),"
            f" all have a first draft after {first / alone:.2f} (a queue: {n - 1} and more)"
        )


def leaving(bench: Bench, n_repeat: int) -> None:
    gone = [bench.leave() for _ in range(n_repeat)]
    step = statistics.median(np.diff(bench.bare(bench.prompt()))[:-1])
    print(
        f"a client hangs up: idle after {statistics.median(g[0] for g in gone) / step:.2f} steps (median), at"
        f" most {max(g[0] for g in gone) / step:.2f}; steps that it did not see: {[g[1] for g in gone]}"
    )


@contextmanager
def serving(path: Path, n_threads: int) -> Iterator[str]:
    command = [sys.executable, "-m", "pydiffusion", "serve", "-m", str(path), "--port", "0"]
    command += ["--threads", str(n_threads), "--ctx", "2048"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"serving on (http://\S+)", line):
                    yield found[1]
                    break
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=8, help="of each canvas")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or write_synthetic("mid", Path(folder) / "mid.gguf")
        with serving(path, arguments.threads) as url:
            bench = Bench(path, url, arguments)
            overhead(bench, arguments.repeat)
            event_cost(bench)
            leaving(bench, arguments.repeat)
            several(bench, max(1, arguments.repeat // 2))


if __name__ == "__main__":
    main()
