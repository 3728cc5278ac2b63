"""How many CPUs this process may use."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """Number of CPUs available to this process; taskset or a container may limit them."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1
