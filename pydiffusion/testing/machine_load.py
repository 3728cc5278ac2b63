"""How busy the machine is while something is measured: what others use, what we get, what would be fair.

Linux's ``/proc`` and ``/sys`` say most of it. What is not known elsewhere is None; nothing here raises.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_TICKS_PER_SECOND = 100  # of /proc/stat, on any Linux
# Beyond these a machine is not quiet: CPUs that others use, their runnable threads, the share of time stolen.
# A quiet virtual machine's system uses 0.02 CPUs itself.
_QUIET_OTHERS, _QUIET_RUNNABLE, _QUIET_STOLEN = 0.1, 0.25, 0.01


def fair_share(n_cpus: int, n_threads: int, n_busy: float) -> float:
    """CPUs' worth of time that our threads can expect beside others, if each CPU is shared by thread.

    n_busy: busy single-threaded processes of others; a mean over time may be a fraction. Our threads are on a
    CPU each; the others take the CPUs that are left, then join ours evenly, and on each CPU every thread gets
    the same time. On 2 CPUs, 2 threads beside one busy process get half of one CPU and all of the other: 1.5,
    so that a step of 114 ms alone takes 114 * 2 / 1.5 = 152 ms.

    This is what programs of *one* login session get. Where ``/proc/sys/kernel/sched_autogroup_enabled`` is 1,
    Linux shares CPU time by session first: see ``session_share``, which is then less.
    """
    ours = min(n_threads, n_cpus)
    joining = max(0.0, n_busy - (n_cpus - ours)) / n_cpus
    whole, rest = divmod(joining, 1.0)
    return ours * ((1 - rest) / (1 + whole) + rest / (2 + whole))


def session_share(n_cpus: int, n_threads: int, others: Sequence[float]) -> float:
    """CPUs' worth of time that our threads can expect beside other login sessions, if each counts alike.

    others: number of busy threads of each other session. Every session gets the same, but none more than its
    threads can use; what it leaves is shared among the rest. This is what Linux's autogroups guarantee (each
    ``setsid`` begins a group of its own): one group is not given more because it has more threads. On 2 CPUs,
    2 threads beside k busy sessions get 1, 2/3, 1/2 for k = 1, 2, 3, no more than one thread gets.
    """
    free, wanting = float(n_cpus), sorted([float(n_threads), *others])
    while wanting and wanting[0] <= free / len(wanting) and wanting[0] < n_threads:
        free -= wanting.pop(0)
    return min(float(n_threads), free / len(wanting))


@dataclass(frozen=True)
class ThreadTimes:
    """Seconds that the threads of a process ran on a CPU, and that they waited for one while others ran."""

    ran: float
    waited: float

    def __sub__(self, before: ThreadTimes) -> ThreadTimes:
        return ThreadTimes(self.ran - before.ran, self.waited - before.waited)


def thread_times(pid: int | str = "self", root: Path = _ROOT) -> ThreadTimes | None:
    """Sums over the threads that a process has now; None where Linux's schedstat is missing."""
    ran = waited = 0
    try:
        for path in (root / f"proc/{pid}/task").iterdir():
            fields = (path / "schedstat").read_text().split()
            ran, waited = ran + int(fields[0]), waited + int(fields[1])
    except (OSError, ValueError, IndexError):
        return None
    return ThreadTimes(ran / 1e9, waited / 1e9)


@dataclass(frozen=True)
class MachineLoad:
    """The machine during a measurement; None for what is not known.

    n_cpus: that this process may use. ran: mean number of CPUs that its threads ran on. waited: mean number
    of its threads that waited for a CPU. others: mean number of these CPUs that others used. runnable: mean
    number of others' threads that ran or waited for a CPU, on the whole machine, at the moments sampled.
    stolen: share of the CPUs' time that a hypervisor gave to other machines. throttled: share of the time in
    which the quota of the process's cgroup stopped it. frequency: the lowest frequency limit of a CPU,
    relative to what it can do. by_session: whether Linux shares CPU time by login session (autogroups).
    """

    n_cpus: int
    seconds: float
    ran: float
    waited: float | None = None
    others: float | None = None
    runnable: float | None = None
    stolen: float | None = None
    throttled: float | None = None
    frequency: float | None = None
    by_session: bool | None = None

    @property
    def disturbances(self) -> list[str]:
        """Reasons why the machine was not quiet, for people."""
        found = []
        if self.others is not None and self.others > _QUIET_OTHERS:
            found.append(f"others used {self.others:.2f} of {self.n_cpus} CPUs")
        if self.runnable is not None and self.runnable > _QUIET_RUNNABLE:
            found.append(f"{self.runnable:.1f} of their threads were runnable")
        if self.stolen is not None and self.stolen > _QUIET_STOLEN:
            found.append(f"{self.stolen:.0%} of the time was stolen by the hypervisor")
        if self.throttled:
            found.append(f"the cgroup's quota stopped us {self.throttled:.0%} of the time")
        if self.frequency is not None and self.frequency < 1:
            found.append(f"a CPU is limited to {self.frequency:.0%} of its frequency")
        return found

    @property
    def quiet(self) -> bool | None:
        """Whether nothing disturbed the measurement; None if nobody can tell."""
        return False if self.disturbances else None if self.others is None else True

    @property
    def n_busy(self) -> float | None:
        """Number of others' busy threads: those runnable, but at least as many as the CPUs that they used."""
        known = [number for number in (self.others, self.runnable) if number is not None]
        return max(known) if known else None

    def fair_shares(self, n_threads: int) -> tuple[float, float] | None:
        """CPUs that so many threads can expect beside the others, by thread and by session (``fair_share``,
        ``session_share``, which takes each of the others' threads for a session); None if not known.
        """
        if self.n_busy is None:
            return None
        whole, rest = divmod(self.n_busy, 1.0)
        sessions = [1.0] * int(whole) + ([rest] if rest else [])
        return (
            fair_share(self.n_cpus, n_threads, self.n_busy),
            session_share(self.n_cpus, n_threads, sessions),
        )


class LoadMeter:
    """Measures the machine from ``__init__`` to ``result``. root: where ``proc`` and ``sys`` are."""

    def __init__(self, root: Path = _ROOT) -> None:
        self._root = root
        self._cpus = _affinity()
        self._runnable: list[int] = []
        self._before = self._read()

    def sample(self) -> None:
        """Count the runnable threads of others; for moments at which our own threads rest."""
        for line in _lines(self._root / "proc/stat"):
            if line.startswith("procs_running "):
                ours = max(1, sum(_states(self._root)))  # at least the thread that reads this
                self._runnable.append(max(0, _number(line.split()[1]) - ours))

    def result(self) -> MachineLoad:
        before, now = self._before, self._read()
        seconds = now.when - before.when
        busy, stolen, throttled = (
            None if a is None or b is None else max(0.0, b - a)
            for a, b in (
                (before.busy, now.busy), (before.stolen, now.stolen), (before.throttled, now.throttled),
            )
        )  # fmt: skip
        ran = now.ran - before.ran
        threads = None if before.threads is None or now.threads is None else now.threads - before.threads
        n_cpus = len(self._cpus)
        return MachineLoad(
            n_cpus=n_cpus,
            seconds=seconds,
            ran=ran / seconds,
            waited=None if threads is None else max(0.0, threads.waited) / seconds,
            others=None if busy is None else max(0.0, busy - ran) / seconds,
            runnable=statistics.mean(self._runnable) if self._runnable else None,
            stolen=None if stolen is None else stolen / (n_cpus * seconds),
            throttled=None if throttled is None else throttled / seconds,
            frequency=_frequency_limit(self._root),
            by_session=_autogroups(self._root),
        )

    def _read(self) -> _Counters:
        busy, stolen = _cpu_seconds(self._root, self._cpus)
        return _Counters(
            time.perf_counter(), busy, stolen, time.process_time(), thread_times(root=self._root),
            _throttled_seconds(self._root),
        )  # fmt: skip


@dataclass(frozen=True)
class _Counters:
    """Seconds since some beginning. busy, stolen: of the CPUs; ran: of this process."""

    when: float
    busy: float | None
    stolen: float | None
    ran: float
    threads: ThreadTimes | None
    throttled: float | None


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _cpu_seconds(root: Path, cpus: frozenset[int]) -> tuple[float | None, float | None]:
    """Seconds that these CPUs worked, and that were stolen from them."""
    busy = stolen = 0
    found = False
    for line in _lines(root / "proc/stat"):
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cpus:
            ticks = [_number(field) for field in fields] + [0] * 8
            user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[:8]
            busy += user + nice + system + irq + softirq
            stolen += steal
            found = True
    return (busy / _TICKS_PER_SECOND, stolen / _TICKS_PER_SECOND) if found else (None, None)


def _states(root: Path) -> Iterator[bool]:
    """Of each thread of this process, whether it is runnable."""
    with contextlib.suppress(OSError):
        for task in (root / "proc/self/task").iterdir():
            yield any(line.rpartition(")")[2].split()[:1] == ["R"] for line in _lines(task / "stat"))


def _throttled_seconds(root: Path) -> float | None:
    """Seconds for which the quota of this process's cgroup has stopped it; None without a quota."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controllers and "cpu")
        for folder in (top / path.lstrip("/"), top):  # a container may see its own cgroup as the top
            fields = dict(line.split() for line in _lines(folder / "cpu.stat") if len(line.split()) == 2)
            if "throttled_usec" in fields:
                return _number(fields["throttled_usec"]) / 1e6
            if "throttled_time" in fields:
                return _number(fields["throttled_time"]) / 1e9
    return None


def _frequency_limit(root: Path) -> float | None:
    """The lowest ratio of a CPU's limit to the frequency that it can reach."""
    ratios = []
    for policy in (root / "sys/devices/system/cpu/cpufreq").glob("policy*"):
        limit, can = (
            _number("".join(_lines(policy / name))) for name in ("scaling_max_freq", "cpuinfo_max_freq")
        )
        ratios += [limit / can] if limit and can else []
    return min(ratios, default=None)


def _autogroups(root: Path) -> bool | None:
    text = "".join(_lines(root / "proc/sys/kernel/sched_autogroup_enabled")).strip()
    return text == "1" if text else None


def _lines(path: Path) -> list[str]:
    """The file's lines; none if it can't be read."""
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []


def _number(text: str) -> int:
    """0 for what is not a number."""
    return int(text) if text.strip().isdecimal() else 0
