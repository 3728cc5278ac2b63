"""What beside_busy.py starts: workers and servers of several builds, and busy processes beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from pydiffusion.testing.machine_load import LoadMeter, ThreadTimes, thread_times

# Ends when the process that started it has, however that ended: an orphan would disturb all that follows.
_BUSY = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""
Span = tuple[float, float]  # start and end on the clock of time.perf_counter, which processes share


class Program(Protocol):
    """A process that runs commands of busy_worker.py."""

    pid: int

    def send(self, command: str) -> None: ...

    def reply(self) -> Any: ...


class Worker:
    """A model of one build with a number of threads, in a process and a login session of its own."""

    def __init__(self, model: str, n_threads: int, kernels: str, python_path: str) -> None:
        worker = Path(__file__).with_name("busy_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(worker), model, str(n_threads), kernels],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=environment(python_path),
        )  # fmt: skip
        self.pid = self._process.pid
        self.reply()

    def send(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended; what it said is above")
        return None if line == "ready\n" else json.loads(line)

    def ask(self, command: str) -> Any:
        self.send(command)
        return self.reply()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Server:
    """A server; a run is a completion of one canvas and four steps, from the request to its last byte."""

    def __init__(self, url: str, pid: int) -> None:
        self._url, self.pid = url, pid
        self._spans: list[Span] = []

    def send(self, command: str) -> None:
        body = {"prompt": list(range(300, 364)), "max_tokens": 1, "steps": 4, "confidence_threshold": 0.0}
        for _ in range(int(command.split()[1])):
            started = time.perf_counter()
            httpx.post(f"{self._url}/v1/completions", json=body | {"seed": 1}, timeout=600).raise_for_status()
            self._spans.append((started, time.perf_counter()))

    def reply(self) -> list[Span]:
        spans, self._spans = self._spans, []
        return spans


def environment(python_path: str) -> dict[str, str]:
    """This process's, with another PYTHONPATH if one is given."""
    return os.environ | ({"PYTHONPATH": python_path} if python_path else {})


@dataclass(frozen=True)
class Result:
    """Runs of one command. wall, times: of all of them together. others: CPU time of other programs
    meanwhile, the busy processes included.
    """

    spans: list[Span]
    wall: float
    times: ThreadTimes
    others: float


def run(programs: Sequence[Program], command: str) -> list[Result]:
    """Run a command on all programs at once."""
    # A conversion's threads end with it, so only the process knows what they ran.
    read = process_times if command.startswith("convert") else thread_times
    meter, started = LoadMeter(), time.perf_counter()
    before = [read(one.pid) for one in programs]
    for one in programs:
        one.send(command)
    measured = []
    for one, earlier in zip(programs, before, strict=True):
        spans = [(start, end) for start, end in one.reply()]
        wall, now = time.perf_counter() - started, read(one.pid)
        unknown = now is None or earlier is None
        measured.append((spans, wall, ThreadTimes(0.0, 0.0) if unknown else now - earlier))
    load = meter.result()
    others = (load.others or 0.0) * load.seconds - sum(times.ran for _, _, times in measured)
    return [Result(*one, max(0.0, others)) for one in measured]


def process_times(pid: int) -> ThreadTimes:
    """CPU time of a process, threads that have ended included; how long they waited is not known."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return ThreadTimes((int(user) + int(system)) / os.sysconf("SC_CLK_TCK"), float("nan"))


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Run busy loops, each in a process and a login session of its own."""
    processes = [start_busy_process() for _ in range(n)]
    try:
        time.sleep(0.3 if n else 0.0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def start_busy_process() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", _BUSY, str(os.getpid())], start_new_session=True)
