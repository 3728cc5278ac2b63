"""Denoising steps under a random load, for beside_busy.py."""

from __future__ import annotations

import random
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise

from busy_programs import Span, Worker, start_busy_process

from pydiffusion.testing.machine_load import fair_share, session_share

MAX_BUSY = 3


class RandomLoad:
    """0 to 3 busy processes in sessions of their own; another number of them every 0.2 to 5 seconds."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._changes: list[tuple[float, int]] = [(time.perf_counter(), 0)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._change)

    def __enter__(self) -> RandomLoad:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _change(self) -> None:
        processes: list[subprocess.Popen] = []
        try:
            while not self._stop.wait(self._random.uniform(0.2, 5.0)):
                wanted = self._random.randint(0, MAX_BUSY)
                while len(processes) < wanted:
                    processes.append(start_busy_process())
                while len(processes) > wanted:
                    stopped = processes.pop()
                    stopped.kill()
                    stopped.wait()
                self._changes.append((time.perf_counter(), wanted))
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def during(self, span: Span) -> dict[int, float]:
        """Number of busy processes -> seconds of the span."""
        seconds: dict[int, float] = defaultdict(float)
        for (start, n), (end, _) in pairwise([*self._changes, (span[1], 0)]):
            seconds[n] += max(0.0, min(end, span[1]) - max(start, span[0]))
        return seconds


def measure_under_load(
    workers: Mapping[tuple[str, int], Worker], n_seconds: float, seed: int, n_cpus: int
) -> tuple[dict, bool]:
    """Time steps under a random load for so long; print their distribution per worker.

    Steps are compared with what the fair share of the CPUs gives: the number of quiet steps that it would
    have allowed in the same time. Returns the figures, and whether all texts were those of the quiet machine.
    """
    quiet = {key: statistics.median(e - s for s, e in w.ask("step 8")) for key, w in workers.items()}
    texts = {key: [w.ask(f"text {i}") for i in range(3)] for key, w in workers.items()}
    spans: dict[tuple[str, int], list[Span]] = {key: [] for key in workers}
    n_texts, wrong = 0, 0
    with RandomLoad(seed) as load:
        end, i = time.perf_counter() + n_seconds, 0
        while time.perf_counter() < end:
            for key, worker in workers.items():
                spans[key] += [(s, e) for s, e in worker.ask("step 10")]
                wrong += worker.ask(f"text {i % 3}") != texts[key][i % 3]
                n_texts += 1
            i += 1
        figures = {}
        for key, its in spans.items():
            figures["{} {}".format(*key)] = _report(key, its, quiet[key], load, n_cpus)
    print(f"texts under load equal to those before: {n_texts - wrong} of {n_texts}")
    same = all(text == next(iter(texts.values())) for text in texts.values())
    print(f"texts of all builds and numbers of threads: {'the same' if same else 'not the same'}")
    return figures, not wrong


def _report(
    key: tuple[str, int], spans: list[Span], quiet: float, load: RandomLoad, n_cpus: int
) -> dict[str, list[float]]:
    build, n_threads = key
    alone = fair_share(n_cpus, n_threads, 0)
    by_thread = {k: fair_share(n_cpus, n_threads, k) / alone for k in range(MAX_BUSY + 1)}
    by_session = {k: session_share(n_cpus, n_threads, [1] * k) / alone for k in range(MAX_BUSY + 1)}
    print(f"{build}, {n_threads} threads: {len(spans)} steps, quiet {1e3 * quiet:.0f} ms")
    figures = {"ms": [1e3 * (end - start) for start, end in spans]}
    for name, share in (("fair share by thread", by_thread), ("fair share by session", by_session)):
        figures[name] = [
            sum(seconds * share[n] for n, seconds in load.during(span).items()) / quiet for span in spans
        ]
    for name, values in figures.items():
        cuts = statistics.quantiles(values, n=100)
        unit = "" if name == "ms" else " times"
        print(
            f"  {name}: median {cuts[49]:.4g}{unit}, 90% {cuts[89]:.4g}, 99% {cuts[98]:.4g},"
            f" worst {max(values):.4g}"
        )
    beyond = sum(value > 4 for value in figures["fair share by thread"])
    print(f"  beyond 4 times the fair share by thread: {beyond}")
    return figures
