"""How busy the machine is: what others use, what this program gets, and what would be fair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


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


def thread_times(pid: int | str = "self") -> ThreadTimes | None:
    """Sums over the threads that a process has now; None where Linux's schedstat is missing."""
    ran = waited = 0
    try:
        for path in (_PROC / str(pid) / "task").iterdir():
            fields = (path / "schedstat").read_text().split()
            ran, waited = ran + int(fields[0]), waited + int(fields[1])
    except (OSError, ValueError, IndexError):
        return None
    return ThreadTimes(ran / 1e9, waited / 1e9)
