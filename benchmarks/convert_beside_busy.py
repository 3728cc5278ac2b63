"""Time a conversion on an idle machine and beside busy processes of other login sessions.

python benchmarks/convert_beside_busy.py SOURCE.gguf [--type q4_k_m] [--threads 2 1] [--busy 0 1 2]
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

from beside_busy import busy_process

from pydiffusion.convert import quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy processes")
    arguments = parser.parse_args()
    arguments.source.read_bytes()  # into the page cache
    with tempfile.TemporaryDirectory(prefix="pydiffusion-busy-") as folder:
        for n_busy in arguments.busy:
            for n_threads in arguments.threads:
                with contextlib.ExitStack() as stack:
                    for _ in range(n_busy):
                        stack.enter_context(busy_process())
                    started = time.perf_counter()
                    quantize(arguments.source, Path(folder) / "m.gguf", arguments.type, n_threads=n_threads)
                    seconds = time.perf_counter() - started
                print(f"{n_busy} busy, {n_threads} threads: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
