"""How many CPUs this process may use, and how many threads a denoising step gets.

``read_cpus`` reads what the system says; the numbers follow from that by arithmetic alone. Linux says most:
the affinity of the process, quotas of its cgroups, hardware threads of a core, fast and slow cores. What
can't be read counts as not limited, so nothing here raises.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_MAX_CPUS = 1 << 16  # numbers beyond are an error in a file


@dataclass(frozen=True)
class Cpus:
    """The CPUs of a process, as the system describes them.

    numbers: hardware threads that it may run on. n_online: hardware threads of the machine.
    quota: CPU time per time that it may use at most, in CPUs; None for no limit. quota_from: who limits it.
    siblings: for each number, the hardware threads of its core; a missing one is a core by itself.
    performance: the performance cores of a CPU that has two kinds; empty if all are alike, or unknown.
    capacity: speed of each relative to the fastest, 1024, where the system knows it.
    """

    numbers: frozenset[int]
    n_online: int
    quota: float | None = None
    quota_from: str = ""
    siblings: Mapping[int, frozenset[int]] = field(default_factory=dict)
    performance: frozenset[int] = frozenset()
    capacity: Mapping[int, int] = field(default_factory=dict)


class Threads(NamedTuple):
    """A number of threads. reason: for people, as ``8 performance cores, limited to 6 CPUs by a cgroup``."""

    n: int
    reason: str


def available_cpus(cpus: Cpus | None = None) -> int:
    """Number of threads for work in independent pieces, such as quantizing: slow cores and the second
    hardware thread of a core help too.
    """
    cpus = cpus or read_cpus()
    return _within_quota(len(cpus.numbers), cpus.quota)


def step_threads(cpus: Cpus | None = None) -> Threads:
    """Number of threads for denoising steps: one per core, of the fast ones.

    Threads wait for each other's last pieces at the end of each node of a graph. The hardware threads of a
    core share its vector units, so a second one adds little and makes both slower; a slow core's last piece
    makes all others wait.
    """
    cpus = cpus or read_cpus()
    fast = _faster(cpus.numbers & cpus.performance or cpus.numbers, cpus.capacity)
    cores = {cpus.siblings.get(cpu, frozenset((cpu,))) & fast for cpu in fast}
    n = _within_quota(len(cores), cpus.quota)
    kind = "performance core" if fast != cpus.numbers else "core"
    reason = f"{len(cores)} {kind}{'s' if len(cores) > 1 else ''}"
    if len(cpus.numbers) != len(cores):
        reason += f" of {_count(len(cpus.numbers))}"
    if len(cpus.numbers) < cpus.n_online:
        reason += f", affinity to {len(cpus.numbers)} of {_count(cpus.n_online)}"
    if cpus.quota is not None and cpus.quota < len(cores):
        reason += f", limited to {_count(cpus.quota)} by {cpus.quota_from}"
    return Threads(n, reason)


def too_many_threads(n_threads: int, cpus: Cpus | None = None) -> str | None:
    """Warning if ``n_threads`` can't all run at once, or None."""
    cpus = cpus or read_cpus()
    n_cpus = len(cpus.numbers)
    limit = n_cpus if cpus.quota is None else min(n_cpus, cpus.quota)
    if n_threads <= math.ceil(limit):
        return None
    by = f", limited by {cpus.quota_from}" if limit < n_cpus else ""
    return (
        f"{n_threads} threads wait for each other: this process may use {_count(limit)}{by}; the default is "
        f"{step_threads(cpus).n}"
    )


def _count(n: float) -> str:
    return "1 CPU" if n == 1 else f"{n:.3g} CPUs"


def _within_quota(n: int, quota: float | None) -> int:
    """At most ``quota`` threads, to the nearest number, at least 1.

    With one thread more than the quota, all of them stand still for the rest of each period (100 ms) once
    its time is used up. A step of two threads takes 1.31 times as long as with one thread at a quota of 1.0,
    0.95 at 1.25, 0.80 at 1.5 and 0.69 at 1.75 (a mid-size model at Q4_K_M, two cores of a server CPU).
    """
    return n if quota is None else max(1, min(n, math.floor(quota + 0.5)))


def _faster(cpus: frozenset[int], capacity: Mapping[int, int]) -> frozenset[int]:
    """The CPUs that are worth using together, as if n of them were as fast as n times the slowest: cores of
    half the speed are left out unless they more than double the number.
    """
    if not cpus <= capacity.keys():
        return cpus
    slowest = max(
        {capacity[cpu] for cpu in cpus},
        key=lambda speed: (speed * sum(capacity[cpu] >= speed for cpu in cpus), speed),
    )
    return frozenset(cpu for cpu in cpus if capacity[cpu] >= slowest)


def read_cpus() -> Cpus:
    """Read what the system says of this process."""
    n_online = os.cpu_count() or 1
    numbers = frozenset(range(n_online))
    if hasattr(os, "sched_getaffinity"):
        with contextlib.suppress(OSError):
            numbers = frozenset(os.sched_getaffinity(0)) or numbers
    cpus = describe_cpus(numbers, n_online)
    if hasattr(os, "process_cpu_count"):  # Python 3.13, where a person may choose
        chosen = os.process_cpu_count() or n_online
        if chosen < len(numbers) and (cpus.quota is None or chosen < cpus.quota):
            return replace(cpus, quota=float(chosen), quota_from="PYTHON_CPU_COUNT or -X cpu_count")
    return cpus


def describe_cpus(numbers: frozenset[int], n_online: int, root: Path = Path("/")) -> Cpus:
    """Describe CPUs with these numbers as the system's files do. root: where ``proc`` and ``sys`` are."""
    siblings, capacity = {}, {}
    for cpu in numbers:
        folder = root / f"sys/devices/system/cpu/cpu{cpu}"
        group = _cpu_list(_text(folder / "topology/thread_siblings_list"))
        if cpu in group:
            siblings[cpu] = group
        with contextlib.suppress(ValueError):
            capacity[cpu] = int(_text(folder / "cpu_capacity"))
    if sys.platform == "darwin":
        performance = frozenset(range(_apple_performance_cores()))
    else:
        performance = _cpu_list(_text(root / "sys/devices/cpu_core/cpus"))  # Intel's hybrid CPUs only
    quota = min(_quotas(root), default=None)
    quota_from = "" if quota is None else "a cgroup"
    return Cpus(numbers, n_online, quota, quota_from, siblings, performance, capacity)


def _quotas(root: Path) -> Iterator[float]:
    """CPUs that each cgroup of this process and its parents allows, of those with a limit."""
    mounts = _cgroup_mounts(root)
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if not controllers else 1
        if version == 1 and "cpu" not in controllers.split(","):
            continue
        for mount_version, mount_root, mount_point in mounts:
            if mount_version == version:
                top = root / mount_point.lstrip("/")
                for folder in _up_to(top, mount_root, path):
                    yield from _quota(folder, version)


def _cgroup_mounts(root: Path) -> list[tuple[int, str, str]]:
    """(1 or 2, folder of the hierarchy that is mounted, mount point) of those that can limit CPU time."""
    found = []
    for line in _text(root / "proc/self/mountinfo").splitlines():
        where, _, what = line.partition(" - ")
        left, right = where.split(), what.split()
        if len(left) < 5 or len(right) < 3:
            continue
        if right[0] == "cgroup2":
            found.append((2, left[3], left[4]))
        elif right[0] == "cgroup" and "cpu" in right[2].split(","):
            found.append((1, left[3], left[4]))
    return found


def _up_to(top: Path, mount_root: str, path: str) -> Iterator[Path]:
    """The folder of the cgroup ``path``, then its parents up to ``top``, where ``mount_root`` is mounted.

    In a container the path may be outside what is mounted: then only ``top`` is.
    """
    below = PurePosixPath()
    with contextlib.suppress(ValueError):
        below = PurePosixPath(path).relative_to(mount_root)
    if ".." in below.parts:
        below = PurePosixPath()
    yield top / below
    for parent in below.parents:
        yield top / parent


def _quota(folder: Path, version: int) -> Iterator[float]:
    if version == 2:
        words = _text(folder / "cpu.max").split()
    else:
        words = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    with contextlib.suppress(ValueError, OverflowError):  # "max", or no such file
        quota, period = map(int, words)
        if quota > 0 and period > 0:  # -1: no limit
            yield quota / period


def _text(path: Path) -> str:
    """The file's text; empty if it can't be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _cpu_list(text: str) -> frozenset[int]:
    """The numbers of ``0-3,8``; empty for anything else."""
    numbers: set[int] = set()
    with contextlib.suppress(ValueError):
        for part in text.strip().split(","):
            first, _, last = part.partition("-")
            begin, end = int(first), int(last or first)
            if not 0 <= begin <= end < _MAX_CPUS:
                return frozenset()
            numbers.update(range(begin, end + 1))
        return frozenset(numbers)
    return frozenset()


def _apple_performance_cores() -> int:
    """Number of performance cores of Apple silicon; 0 elsewhere."""
    command = ["/usr/sbin/sysctl", "-n", "hw.perflevel0.physicalcpu"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0
