"""Profile the kernels of one denoising step with ncu and print a table of them.

ncu --clock-control none --metrics gpu__time_duration.sum --csv --profile-from-start off \\
    --log-file ncu.csv python benchmarks/gpu_kernels.py [--folder DIR ...] [--kept 300]
python benchmarks/gpu_kernels.py table ncu.csv [--results results.jsonl] [--grids]

The first command runs steps, one of them recorded by ncu, without CUDA graphs, inside of which ncu can't
separate kernels. The second sums the times by kernel and adds a finding "step-kernels" to the results.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

METRIC = "gpu__time_duration.sum"
WARM_STEPS = 3
_LONGEST = 90  # characters of a kernel's name
_TO_US = {
    "ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "µs": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6,
    "second": 1e6,
}  # fmt: skip
#: ggml's types by number, as in template arguments.
_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 9: "q8_1", 10: "q2_k",
    11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 20: "iq4_nl", 23: "iq4_xs", 30: "bf16", 39: "mxfp4",
}  # fmt: skip


# The step


def profiler() -> tuple[Callable[[], None], Callable[[], None]]:
    """Find the functions that start and stop ncu's recording.

    Tries the CUDA runtime loaded by the extension, then others, then the driver; all reach the same driver.
    Raises RuntimeError naming what was tried.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    loaded = dict.fromkeys(line.split()[-1] for line in lines if "libcudart" in line)
    names = [
        (name, "cudaProfiler") for name in (*loaded, "libcudart.so.13", "libcudart.so.12", "libcudart.so")
    ]
    tried = []
    for name, prefix in [*names, ("libcuda.so.1", "cuProfiler")]:
        try:
            library = ctypes.CDLL(name)
            start, stop = getattr(library, prefix + "Start"), getattr(library, prefix + "Stop")
        except (OSError, AttributeError) as error:
            tried.append(f"{name} ({error})")
            continue
        return checked(start, name), checked(stop, name)
    raise RuntimeError(f"no CUDA library with profiler start and stop: tried {'; '.join(tried)}")


def checked(call: Any, name: str) -> Callable[[], None]:
    def run() -> None:
        status = call()
        if status:
            raise RuntimeError(f"{name}: {call.__name__} returned {status} (35, 100: no driver or no GPU)")

    return run


def run(argv: Sequence[str]) -> int:
    """Warm up, then record one step."""
    os.environ["GGML_CUDA_DISABLE_GRAPHS"] = "1"  # before ggml reads it
    import gpu  # imports the extension, so after setting the variable
    from gpu_measure import PEAKED_DROPPED_MASS, Bench, temperature_for

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu.add_model_arguments(parser)
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument(
        "--kept", type=int, help="peaked logits: tokens kept per position (default: flat logits)"
    )
    parser.add_argument("--seconds", type=float, default=300.0)
    arguments = parser.parse_args(argv)
    ends = time.time() + arguments.seconds
    left = lambda: ends - time.time()  # noqa: E731
    arguments.prompts, arguments.peaked_prompt, arguments.answer = (
        [arguments.prompt],
        arguments.prompt,
        (0, 0),
    )
    file = arguments.model or gpu.synthetic_file(arguments.shape, arguments.type, arguments.folder, left)
    bench = Bench(file, arguments, left)
    bench.load()
    if gpu.devices():
        start, stop = profiler()
    else:
        gpu.say("no GPU: the step runs, but nothing records it")
        start = stop = lambda: None
    options = {}
    if arguments.kept:
        temperature = temperature_for(bench.sorted_logits(), arguments.kept, PEAKED_DROPPED_MASS)
        options = {"t_min": temperature, "t_max": temperature, "dropped_mass": PEAKED_DROPPED_MASS}
    bench.encode(arguments.prompt)
    bench.begin(bench.model.canvas_length, WARM_STEPS + 2, **options)
    for _ in range(WARM_STEPS):
        bench.session.next_step()
    start()
    began = time.perf_counter()
    bench.session.next_step()
    seconds = time.perf_counter() - began
    stop()
    gpu.say(f"profiled one step after {arguments.prompt} tokens, {seconds:.2f} s with the profiler")
    return 0


# The table


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of ncu's table, without messages and the program's output."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    begins = [
        i
        for i, line in enumerate(lines)
        if line.lstrip("\ufeff").startswith('"ID"') and "Kernel Name" in line
    ]
    if not begins:
        said = "\n".join(line for line in lines if line.startswith("==")) or "\n".join(lines[-5:])
        raise ValueError(f'{path}: no ncu table found (a line that begins with "ID"); the file says:\n{said}')
    head = next(csv.reader([lines[begins[0]].lstrip("\ufeff")]))
    rows = csv.reader(line for line in lines[begins[0] + 1 :] if line.startswith('"'))
    return [dict(zip(head, row, strict=True)) for row in rows if len(row) == len(head) and row[0] != "ID"]


def durations(rows: Sequence[dict[str, str]], path: Path) -> list[tuple[str, str, float]]:
    """Return (kernel name, grid, microseconds) of each launch, from ncu's long or wide table."""
    found = []
    if rows and "Metric Name" in rows[0]:
        for row in rows:
            if row["Metric Name"] in (METRIC, "Duration"):
                us = number(row["Metric Value"]) * _TO_US[row["Metric Unit"]]
                found.append((row["Kernel Name"], row.get("Grid Size", ""), us))
    elif rows and METRIC in rows[0]:
        unit = next((row[METRIC] for row in rows if not row["ID"]), "ns")  # the first row has the units
        for row in rows:
            if row["ID"]:
                us = number(row[METRIC]) * _TO_US[unit]
                found.append((row["Kernel Name"], row.get("Grid Size", ""), us))
    if not found:
        raise ValueError(f"{path}: no launch has the metric {METRIC}: pass --metrics {METRIC} to ncu")
    return found


def number(text: str) -> float:
    return float(text.replace(",", ""))


def short_name(name: str) -> str:
    """Shorten a kernel's name: no return type and parameters, shorter template arguments."""
    name = name.strip().removeprefix("void ")
    depth = 0
    for i, c in enumerate(name):
        depth += {"<": 1, ">": -1}.get(c, 0)
        if c == "(" and depth == 0 and not name.startswith("(anonymous", i) and i > 0:
            name = name[:i]
            break
    name = name.replace("(anonymous namespace)::", "").replace("pydiffusion::", "")
    name = re.sub(r"\(ggml_type\)(\d+)", lambda m: _TYPES.get(int(m[1]), m[1]), name)
    name = re.sub(r"\((?:unsigned )?(?:int|bool|long|char|short)\)", "", name)
    name = re.sub(r"&\((\w+)\([^()]*\)\)", r"\1", name).replace("&", "")
    name = re.sub(r",\s+", ",", name)
    if len(name) > _LONGEST:
        half = (_LONGEST - 3) // 2
        name = f"{name[:half]}...{name[-half:]}"
    return name


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Map full names to short ones; equal short names get a number."""
    short: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name in dict.fromkeys(names):
        one = short_name(name)
        counts[one] = counts.get(one, 0) + 1
        short[name] = one if counts[one] == 1 else f"{one} #{counts[one]}"
    return short


def by_kernel(launches: Sequence[tuple[str, str, float]], grids: bool = False) -> list[list[Any]]:
    """Return [name, launches, microseconds] of each kernel, the longest time first."""
    short = short_names(name for name, _, _ in launches)
    sums: dict[str, list[Any]] = {}
    for name, grid, us in launches:
        key = f"{short[name]} {grid}" if grids else short[name]
        row = sums.setdefault(key, [key, 0, 0.0])
        row[1] += 1
        row[2] += us
    return sorted(sums.values(), key=lambda row: -row[2])


def table(argv: Sequence[str]) -> int:
    """Print the table and add it to the results."""
    parser = argparse.ArgumentParser(prog="gpu_kernels.py table")
    parser.add_argument("csv", type=Path)
    parser.add_argument("--results", type=Path, help="add a finding to this file")
    parser.add_argument("--grids", action="store_true", help="one row per kernel and grid size")
    parser.add_argument("--variant", default="", help="label for the finding")
    parser.add_argument("--commit", default=None)
    arguments = parser.parse_args(argv)
    results = None
    if arguments.results:
        import gpu

        common = {"commit": arguments.commit or gpu.commit()}
        if arguments.variant:
            common["variant"] = arguments.variant
        results = gpu.Results(arguments.results, common)
    try:
        launches = durations(read_csv(arguments.csv), arguments.csv)
    except (OSError, ValueError, KeyError) as error:
        print(error, file=sys.stderr)
        if results:
            results.add("step-kernels", error=str(error))
        return 1
    rows = by_kernel(launches, arguments.grids)
    total = sum(us for _, _, us in rows)
    print(f"{'launches':>8} {'us':>10} {'each':>9} {'share':>6}  kernel")
    for name, n, us in rows:
        print(f"{n:8} {us:10.1f} {us / n:9.2f} {us / total:6.1%}  {name}")
    print(f"{len(launches):8} {total:10.1f} {total / len(launches):9.2f} {1:6.1%}  sum")
    if results:
        results.add("step-kernels", source=arguments.csv.name, launches=len(launches), us=total, kernels=rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    return table(args[1:]) if args[:1] == ["table"] else run(args)


if __name__ == "__main__":
    sys.exit(main())
