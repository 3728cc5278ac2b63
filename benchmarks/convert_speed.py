"""Compare the speed of a conversion with its bounds: copying the bytes, and the bare quantization kernel.

    python benchmarks/convert_speed.py [FOLDER] [--types q8_0 q4_k_m] [--threads 2 | --cpu] [--rounds 2]

Writing: from the call until the file is flushed and the first of its hundreds of chunks is verified,
including opening the folder with its tokenizer, reading, converting, digests and writing. Verifying, which
reads source and file again, is reported separately; "with verification" is the whole conversion. Copy: the
checkpoint's bytes to the same disk, flushed. Kernel: quantizing float32 rows in memory, for each type as many
weights as the file has (without those that are only copied or converted to floats), with as many threads. All
alternate for --rounds; the best of each counts. FOLDER is a checkpoint from benchmarks/checkpoint.py; by
default one of its "plain" shape is created. --cpu measures CPU time on one thread, which depends less on
other load.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from checkpoint import given_or_created

from pydiffusion import _native
from pydiffusion.convert import ConversionProgress, convert, plan_sizes

EXACT = ("F32", "F16", "BF16")


clock = time.perf_counter


def seconds(work: Callable[[], object]) -> float:
    started = clock()
    work()
    return clock() - started


def copy(sources: list[Path], target: Path) -> None:
    """Copy all bytes to one file, with a buffer as large as a conversion's chunk."""
    with target.open("wb", buffering=0) as out:
        for path in sources:
            with path.open("rb", buffering=0) as file:
                while data := file.read(8 << 20):
                    out.write(data)
        os.fsync(out.fileno())
    target.unlink()


def kernel_seconds(folder: Path, type: str, n_threads: int, n_rows: int = 4096) -> float:
    """Time quantizing rows in memory, as many weights of each type as the file has."""
    weights: Counter[tuple[str, int]] = Counter()
    for tensor in plan_sizes(folder, type).tensors:
        if tensor.type not in EXACT:
            weights[tensor.type, tensor.shape[-1]] += tensor.n_weights
    random, total = np.random.default_rng(0), 0.0
    for (name, n_per_row), number in weights.items():
        rows = random.standard_normal((n_rows, n_per_row), np.float32)
        _native.quantize_rows(rows[:64], name, n_threads, None)
        took = min(seconds(lambda r=rows, n=name: _native.quantize_rows(r, n, n_threads, None)) for _ in "ab")
        total += took * number / rows.size
    return total


def convert_seconds(folder: Path, type: str, n_threads: int, target: Path) -> tuple[float, float]:
    """Return a conversion's (writing, verifying) seconds, split when the first chunk is verified."""
    began: dict[str, float] = {}

    def progress(state: ConversionProgress) -> None:
        began.setdefault(state.stage, clock())

    started = clock()
    convert(folder, target, type, n_threads=n_threads, progress=progress)
    return began["verify"] - started, clock() - began["verify"]


def measure(folder: Path, type: str, n_threads: int, n_rounds: int, out: Path) -> None:
    sources = sorted(folder.glob("*.safetensors"))
    n_bytes = sum(path.stat().st_size for path in sources)
    for path in sources:  # into the page cache for all measurements
        path.read_bytes()
    rounds = []
    for _ in range(n_rounds):
        copying = seconds(lambda: copy(sources, out / "copy"))
        kernel = kernel_seconds(folder, type, n_threads)
        rounds.append((copying, kernel, *convert_seconds(folder, type, n_threads, out / "m.gguf")))
    copying, kernel, writing, verifying = map(min, zip(*rounds, strict=True))
    n_weights = sum(tensor.n_weights for tensor in plan_sizes(folder, type).tensors)
    print(
        f"{type}: {n_weights / 1e6:.0f}e6 weights, {n_bytes / 1e6:.0f} MB of source,"
        f" {writing:.1f} s writing and {verifying:.1f} s verifying; copy {copying:.1f} s,"
        f" kernel {kernel:.1f} s:"
        f" writing runs at {copying / writing:.0%} of the copy's and {kernel / writing:.0%} of the kernel's"
        f" rate, {kernel / (writing + verifying):.0%} with verification",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_k_m"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="CPU time, one thread")
    arguments = parser.parse_args()
    if arguments.cpu:
        global clock
        clock, arguments.threads = time.process_time, 1
    with given_or_created(arguments.folder) as (folder, out):
        for type in arguments.types:
            measure(folder, type, arguments.threads, arguments.rounds, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
