"""Measure peak memory and speed of converting a checkpoint of at least 800 MB.

    python benchmarks/convert_memory.py [FOLDER] [--types q8_0 q4_k_m] [--threads 2]

FOLDER is a checkpoint from benchmarks/checkpoint.py; by default one of its "plain" shape (438e6 weights) is
created. Converts it in a separate process per type, and reports the peak resident set size above that after
the imports. The resident set includes all pages that the process touches, also mapped pages of source and
target. Exits with 1 if the peak exceeds the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from checkpoint import given_or_created

LIMIT_MB = 400

CHILD = """
import json, pathlib, sys, time
import pydiffusion.convert as c

def status(key):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

before, seen, n_calls = status("VmRSS"), {}, 0
start = time.perf_counter()

def progress(step):
    if step.stage not in seen:
        seen[step.stage] = time.perf_counter() - start

report = c.convert(sys.argv[1], sys.argv[2], sys.argv[3], n_threads=int(sys.argv[4]), progress=progress)
# VmHWM is this process's own peak; ru_maxrss would start with the parent's, inherited through fork.
print(json.dumps({"before": before, "peak": status("VmHWM"), "n_bytes": report.n_bytes, "types": report.types,
    "seconds": report.seconds, "verify_seconds": report.seconds - seen["verify"]}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_k_m"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not Path("/proc/self/status").exists():
        print("this benchmark needs /proc, which this system does not have", file=sys.stderr)
        return 2
    failed = False
    with given_or_created(arguments.folder) as (folder, out):
        n_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        print(f"{n_bytes / 1e6:.0f} MB of source, {arguments.threads} threads; {machine}", flush=True)
        for kind in arguments.types:
            child_args = [str(folder), str(out / "m.gguf"), kind, str(arguments.threads)]
            command = [sys.executable, "-c", CHILD, *child_args]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            above = (result["peak"] - result["before"]) / 1e6
            failed |= above > LIMIT_MB
            print(
                f"{kind}: {above:.0f} MB above the {result['before'] / 1e6:.0f} MB after imports"
                f" ({'over' if above > LIMIT_MB else 'within'} {LIMIT_MB}), "
                f"{result['n_bytes'] / 1e6:.0f} MB written in"
                f" {result['seconds']:.1f} s ({n_bytes / 1e6 / result['seconds']:.0f} MB/s of "
                "source), of which"
                f" {result['verify_seconds']:.1f} s verifying",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
