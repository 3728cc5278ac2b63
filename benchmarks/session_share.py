"""Measure what the scheduler gives to threads that only compute, beside busy login sessions.

    python benchmarks/session_share.py [--seconds 3] [--rounds 2]

Prints the CPUs that one and two such threads get beside 0 to 3 busy processes, each a session of its own, and
the fair share by thread and by session. No program with as many threads gets more, however it waits.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from busy_programs import busy_processes

from pydiffusion.testing.machine_load import fair_share, session_share

_SPIN = """
import sys, time
end = time.perf_counter() + float(sys.argv[1])
while time.perf_counter() < end:
    pass
print(time.process_time())
"""
_SESSION = """
import subprocess, sys
command = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
its = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(int(sys.argv[3]))]
print(sum(float(one.communicate()[0]) for one in its))
"""


def cpus(n_threads: int, seconds: float) -> float:
    """CPUs that so many busy processes of one session get; processes, as Python's threads take turns."""
    command = [sys.executable, "-c", _SESSION, _SPIN, str(seconds), str(n_threads)]
    output = subprocess.run(command, start_new_session=True, capture_output=True, text=True, check=True)
    return float(output.stdout) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    n_cpus = len(os.sched_getaffinity(0))
    for n_busy in range(4):
        for n_threads in (1, 2):
            with busy_processes(n_busy):
                got = [cpus(n_threads, arguments.seconds) for _ in range(arguments.rounds)]
            print(
                f"{n_threads} threads beside {n_busy}: {min(got):.2f} to {max(got):.2f} of {n_cpus} CPUs;"
                f" fair by thread {fair_share(n_cpus, n_threads, n_busy):.2f},"
                f" by session {session_share(n_cpus, n_threads, [1] * n_busy):.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
