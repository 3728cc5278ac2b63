"""Measure denoising, prefill, conversion and the server on a quiet machine and beside other programs.

    python benchmarks/beside_busy.py MODEL.gguf [--threads 1 2] [--rounds 5] [--kernels auto]
        [--work step prefill convert server] [--beside quiet 1 2 3 second] [--source FOLDER_OR_GGUF]
        [--load SECONDS] [--build NAME=PYTHONPATH ...] [--json FILE]

--beside: nothing; so many busy processes, each in a login session of its own (``setsid``), like a browser or
a build on a desktop; a second pydiffusion that does the same with as many threads. --load: steps under a
random load instead, 0 to 3 such processes that start and stop at random times, with seeded texts in between.
--build: several builds of the package, each by the PYTHONPATH that it is imported from.

All that is measured alternates: in each round every number of threads of every build, in the opposite order
in every other round. Each is a process and a login session of its own.

The columns: median, quartiles and maximum; the median against the quiet one, and against what it would be at
the fair share of the CPUs: by thread, and by login session, which is what Linux gives where autogroups are on
(``pydiffusion.testing.machine_load``). Then what the scheduler did with our threads: CPUs that they ran on,
and threads that waited for one; the rest slept. Last, CPU time per run against the quiet one's: above 1 is
waste.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from busy_load import measure_under_load
from busy_programs import Program, Result, Server, Span, Worker, busy_processes, run
from server import serving

from pydiffusion.testing.machine_load import fair_share, session_share

CPUS = len(os.sched_getaffinity(0))
Key = tuple[str, int]  # build, number of threads


@dataclass
class Runs:
    """Runs of one kind. spans: those to time; the rest: sums over all runs."""

    spans: list[Span] = field(default_factory=list)
    n: int = 0
    wall: float = 0.0
    ran: float = 0.0
    waited: float = 0.0
    others: float = 0.0

    def add(self, result: Result, spans: Sequence[Span]) -> None:
        self.spans += spans
        self.n += len(result.spans)
        self.wall += result.wall
        self.ran += result.times.ran
        self.waited += result.times.waited
        self.others += result.others

    @property
    def milliseconds(self) -> list[float]:
        return [1e3 * (end - start) for start, end in self.spans]


class Programs:
    """The workers and servers by build and number of threads, started on first use."""

    def __init__(self, arguments: argparse.Namespace, stack: ExitStack) -> None:
        self._arguments, self._stack = arguments, stack
        self._builds = dict(one.split("=", 1) for one in arguments.build) or {"this": ""}
        self._programs: dict[tuple[Key, str], Program] = {}
        self.keys = [(build, n) for build in self._builds for n in arguments.threads]

    def worker(self, key: Key, role: str = "worker") -> Worker:
        if (key, role) not in self._programs:
            a = self._arguments
            made = Worker(a.model, key[1], a.kernels, self._builds[key[0]])
            self._stack.callback(made.close)
            self._programs[key, role] = made
        return self._programs[key, role]  # type: ignore[return-value]

    def server(self, key: Key) -> Program:
        if (key, "server") not in self._programs:
            started = serving(Path(self._arguments.model), key[1], self._builds[key[0]])
            self._programs[key, "server"] = Server(*self._stack.enter_context(started))
        return self._programs[key, "server"]


def measure(arguments: argparse.Namespace, programs: Programs) -> dict[tuple[Key, str, str], Runs]:
    """Runs by build and threads, work, and what ran beside it."""
    runs: dict[tuple[Key, str, str], Runs] = defaultdict(Runs)
    commands = {
        "step": f"step {arguments.steps}",
        "server": f"step {max(1, arguments.steps // 2)}",
        "prefill": f"prefill {arguments.prompt}",
        "convert": f"convert {arguments.source}",
    }
    for i in range(arguments.rounds):
        for beside in arguments.beside:
            for work in arguments.work:
                for key in programs.keys if i % 2 else programs.keys[::-1]:
                    one = programs.server(key) if work == "server" else programs.worker(key)
                    if beside == "second":
                        other = programs.worker(key, "second")
                        both = run([one, other], commands[work])
                        for name, result, its in (("one", *both), ("other", *both[::-1])):
                            runs[key, work, f"second: {name}"].add(result, overlap(result, its))
                        continue
                    with busy_processes(0 if beside == "quiet" else int(beside)):
                        [result] = run([one], commands[work])
                    runs[key, work, beside].add(result, result.spans)
    return runs


def overlap(result: Result, other: Result) -> list[Span]:
    """The spans while the other program ran too; all, if there are none."""
    first, last = other.spans[0][0], other.spans[-1][1]
    return [one for one in result.spans if one[0] >= first and one[1] <= last] or result.spans


def shares(n_threads: int, beside: str) -> tuple[float, float]:
    """CPUs that the fair share gives, by thread and by session."""
    if beside == "quiet":
        return (fair_share(CPUS, n_threads, 0),) * 2
    if beside.startswith("second"):
        return fair_share(CPUS, n_threads, n_threads), session_share(CPUS, n_threads, [n_threads])
    return fair_share(CPUS, n_threads, int(beside)), session_share(CPUS, n_threads, [1] * int(beside))


def report(runs: dict[tuple[Key, str, str], Runs], arguments: argparse.Namespace) -> None:
    print(
        f"{'work':8} {'build':8} {'threads':7} {'beside':14} {'ms':>7} {'quartiles':>15} {'max':>7}"
        f" {'/quiet':>6} {'/thread':>7} {'/session':>8} {'CPUs':>5} {'wait':>5} {'CPU ms':>7} {'/quiet':>6}"
    )
    for (key, work, beside), its in sorted(runs.items(), key=lambda item: (item[0][1], item[0][0])):
        quiet = runs.get((key, work, "quiet"))
        ms = its.milliseconds
        median = statistics.median(ms)
        low, _, high = statistics.quantiles(ms, n=4) if len(ms) > 1 else (median,) * 3
        line = (
            f"{work:8} {key[0]:8} {key[1]:7} {beside:14} {median:7.1f} {low:7.1f} {high:7.1f} {max(ms):7.1f}"
        )
        ratios = f"{'':23}"
        waste = ""
        if quiet is not None:
            alone = statistics.median(quiet.milliseconds)
            most = fair_share(CPUS, key[1], 0)
            by_thread, by_session = (median / (alone * most / share) for share in shares(key[1], beside))
            ratios = f"{median / alone:6.2f} {by_thread:7.2f} {by_session:8.2f}"
            waste = f"{(its.ran / its.n) / (quiet.ran / quiet.n):6.2f}" if quiet.ran else ""
        got = f"{its.ran / its.wall:5.2f} {its.waited / its.wall:5.2f} {1e3 * its.ran / its.n:7.1f}"
        rate = f"  {1e3 * arguments.prompt / median:.0f} tokens/s" if work == "prefill" else ""
        others = its.others / its.wall
        disturbed = (
            f"  NOT QUIET: others used {others:.2f} CPUs" if beside == "quiet" and others > 0.1 else ""
        )
        print(f"{line} {ratios} {got} {waste}{rate}{disturbed}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of each measurement")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens that prefill reads")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument(
        "--work", nargs="+", choices=["step", "prefill", "convert", "server"], default=["step"]
    )
    parser.add_argument(
        "--beside", nargs="+", choices=["quiet", "1", "2", "3", "second"], default=["quiet", "1"]
    )
    parser.add_argument("--source", help="what --work convert converts to q4_k_m")
    parser.add_argument("--load", type=float, metavar="SECONDS", help="measure steps under a random load")
    parser.add_argument("--seed", type=int, default=0, help="of the random load")
    parser.add_argument("--build", nargs="+", default=[], metavar="NAME=PYTHONPATH")
    parser.add_argument("--json", type=Path, help="write all times to this file")
    arguments = parser.parse_args()
    if "convert" in arguments.work and not arguments.source:
        parser.error("--work convert needs --source, a checkpoint's folder or a GGUF file")
    if "server" in arguments.work and "second" in arguments.beside:
        parser.error("--work server can't be measured beside a second one: leave out --beside second")
    return arguments


def main() -> None:
    arguments = parse()
    figures: dict[str, Any]
    with ExitStack() as stack:
        programs = Programs(arguments, stack)
        if arguments.load:
            workers = {key: programs.worker(key) for key in programs.keys}
            figures, same = measure_under_load(workers, arguments.load, arguments.seed, CPUS)
        else:
            runs, same = measure(arguments, programs), True
            report(runs, arguments)
            figures = {
                " ".join(map(str, [*key, *more])): its.milliseconds for (key, *more), its in runs.items()
            }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures), encoding="utf-8")
    if not same:
        raise SystemExit("texts differ under load")


if __name__ == "__main__":
    main()
