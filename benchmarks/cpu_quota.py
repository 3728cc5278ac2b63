"""Time denoising steps within CPU quotas, as containers have them.

    mkdir /sys/fs/cgroup/bench     # version 1: /sys/fs/cgroup/cpu/bench
    python benchmarks/cpu_quota.py MODEL.gguf /sys/fs/cgroup/bench [--quotas 1 1.25 1.5 1.75] [--threads 1 2]

Needs a cgroup whose files this process may write, which it enters. Each round times steps for every quota
and number of threads. Steps have dense self-conditioning, after a prompt of 128 tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from beside_busy import stepper

from pydiffusion import DiffusionModel

PERIOD = 100_000  # microseconds, the default of Linux


def limit(cgroup: Path, quota: float | None) -> None:
    """Limit the cgroup to so many CPUs; None for no limit."""
    if (cgroup / "cpu.max").exists():
        (cgroup / "cpu.max").write_text(f"{'max' if quota is None else round(quota * PERIOD)} {PERIOD}")
    else:
        (cgroup / "cpu.cfs_period_us").write_text(str(PERIOD))
        (cgroup / "cpu.cfs_quota_us").write_text("-1" if quota is None else str(round(quota * PERIOD)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("cgroup", type=Path)
    parser.add_argument("--quotas", type=float, nargs="+", default=[1.0, 1.25, 1.5, 1.75])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    limit(arguments.cgroup, None)
    (arguments.cgroup / "cgroup.procs").write_text(str(os.getpid()))
    steppers = {n: stepper(DiffusionModel(arguments.model, n_threads=n)) for n in arguments.threads}
    quotas = [None, *arguments.quotas]
    times: dict[tuple[float | None, int], list[float]] = {(q, n): [] for q in quotas for n in steppers}
    for _ in range(arguments.rounds):
        for (quota, n), found in times.items():
            limit(arguments.cgroup, quota)
            steppers[n]()
            found += [steppers[n]() for _ in range(arguments.steps)]
            limit(arguments.cgroup, None)
    for (quota, n), found in times.items():
        mean, median, slowest = (1e3 * f(found) for f in (statistics.mean, statistics.median, max))
        what = f"quota {quota or 'none'}, {n} threads"
        print(f"{what}: mean {mean:.0f}, median {median:.0f}, max {slowest:.0f} ms")


if __name__ == "__main__":
    main()
