"""Run one of the Python targets: ``python fuzz/python_fuzz.py body -n 100000 --seed 1``.

Each input is drawn from its own number and the seed: ``--only 4711`` tries that one again. Inputs run in a
child process, so that a crash is told with its input's number. Exit code 1 when there are findings.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from targets import TARGETS, make_target

_HANG_SECONDS = 300


def draw(seed: int, i: int) -> random.Random:
    """The random numbers that make input i of a run."""
    return random.Random(f"{seed}-{i}")


def run(name: str, numbers: range, seed: int, at: Any, results: Any, limit: int) -> None:
    """Try inputs; what each came to is counted, what must not come out is told and counted as a finding."""
    faulthandler.enable()
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="pydiffusion-fuzz-") as folder:
        target = make_target(name, Path(folder))
        for i in numbers:
            at.value = i
            faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
            given = target.make(draw(seed, i))
            try:
                outcomes[target.one(given)] += 1
            except Exception:
                outcomes["FINDING"] += 1
                print(f"--- input {i}: {given!r:.400}", file=sys.stderr)
                traceback.print_exc(limit=-6)
                sys.stderr.flush()
                if outcomes["FINDING"] >= limit:
                    break
        faulthandler.cancel_dump_traceback_later()
        target.close()
    results.put(dict(outcomes))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("-n", type=int, default=1000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input to try again")
    parser.add_argument("--findings", type=int, default=20, help="end after so many")
    given = parser.parse_args()
    numbers = range(given.n) if given.only is None else range(given.only, given.only + 1)
    context = multiprocessing.get_context("spawn")
    at, results = context.Value("q", -1, lock=False), context.Queue()
    child = context.Process(target=run, args=(given.target, numbers, given.seed, at, results, given.findings))
    started = time.monotonic()
    child.start()
    child.join()
    if child.exitcode != 0:
        print(f"{given.target}: input {at.value} of seed {given.seed} ended the process ({child.exitcode})")
        return 1
    outcomes = results.get()
    n, seconds = sum(outcomes.values()), time.monotonic() - started
    told = ", ".join(f"{kind} {count}" for kind, count in sorted(outcomes.items()))
    print(f"{given.target}: {n} inputs of seed {given.seed} in {seconds:.0f} s: {told}")
    return 1 if outcomes.get("FINDING") or n < len(numbers) else 0


if __name__ == "__main__":
    raise SystemExit(main())
