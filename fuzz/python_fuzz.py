"""Run a Python fuzz target: ``python fuzz/python_fuzz.py body -n 100000 --seed 1``.

An input depends only on its number and the seed: ``--only 4711`` runs that one again. Inputs run in a child
process, so that a crash is reported with its input's number. Exit code 1 if there are findings.
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


def random_for(seed: int, i: int) -> random.Random:
    """Return the random generator for input ``i``."""
    return random.Random(f"{seed}-{i}")


def run(name: str, numbers: range, seed: int, at: Any, results: Any, limit: int) -> None:
    """Run inputs and count their outcomes; an unexpected exception is printed and counted as a finding."""
    faulthandler.enable()
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="pydiffusion-fuzz-") as folder:
        target = make_target(name, Path(folder))
        for i in numbers:
            at.value = i
            faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
            data = target.make(random_for(seed, i))
            try:
                outcomes[target.one(data)] += 1
            except Exception:
                outcomes["FINDING"] += 1
                print(f"--- input {i}: {data!r:.400}", file=sys.stderr)
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
    parser.add_argument("-n", type=int, default=1000, help="number of inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run only the input with this number")
    parser.add_argument("--findings", type=int, default=20, help="stop after this many findings")
    options = parser.parse_args()
    numbers = range(options.n) if options.only is None else range(options.only, options.only + 1)
    context = multiprocessing.get_context("spawn")
    at, results = context.Value("q", -1, lock=False), context.Queue()
    child = context.Process(
        target=run, args=(options.target, numbers, options.seed, at, results, options.findings)
    )
    started = time.monotonic()
    child.start()
    child.join()
    if child.exitcode != 0:
        where = f"{options.target}: input {at.value} of seed {options.seed}"
        print(f"{where} ended the process (exit code {child.exitcode})")
        return 1
    outcomes = results.get()
    n, seconds = sum(outcomes.values()), time.monotonic() - started
    summary = ", ".join(f"{kind} {count}" for kind, count in sorted(outcomes.items()))
    print(f"{options.target}: {n} inputs of seed {options.seed} in {seconds:.0f} s: {summary}")
    return 1 if outcomes.get("FINDING") or n < len(numbers) else 0


if __name__ == "__main__":
    raise SystemExit(main())
