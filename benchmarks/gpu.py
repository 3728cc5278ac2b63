"""What a GPU does with a model, as a page of Markdown: steps, whole answers, blocks, memory beside the plan.

python benchmarks/gpu.py [--only limits steps answers memory] [--types q4_k_m q8_0]
    [--prompts 128 1024 ...] [--answers 1024:1024 ...] [--memory 8G 12G 16G] [--shape 26b-a4b | --model FILE]
    [--device auto] [--results gpu.jsonl] [--folder DIR] [--seconds 540]

Files are synthetic (right shape, random weights) unless a model is given, and kept in the folder. Every case
runs in a process of its own, so that one that runs out of memory takes no other along; its figures go to the
results at once. No case begins when the seconds are over, and none that went well is done twice: the same
command goes on where the time was up. The page holds all results that the file has.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion import _native, devices, plan
from pydiffusion.convert.sizes import parse_size
from pydiffusion.model import available_cpus
from pydiffusion.placement import native_wish
from pydiffusion.synthetic import SHAPES, write_synthetic

PARTS = ("limits", "steps", "answers", "memory")
STEPS = 16  # of a canvas, as others quote it
_SMI = ("name", "driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
Case = dict[str, Any]


# One case, in a process of its own


def smi() -> list[str]:
    """What the driver says of each GPU, clocks as they are now; nothing where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def used_bytes() -> int:
    return sum(one.total_bytes - one.free_bytes for one in devices())


def random_ids(model: _native.Model, n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.n_vocab, n).astype(np.int32)


def begin(session: _native.Session, n_tokens: int, n_steps: int) -> None:
    """A generation whose canvases never settle: every step is a full one."""
    session.begin(
        max_tokens=n_tokens, steps=n_steps, t_min=0.4, t_max=0.8, entropy_bound=0.1,
        stability_threshold=n_steps, confidence_threshold=0.0, seed=0, eos=[], dropped_mass=1e-4,
    )  # fmt: skip


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def measure(case: Case) -> dict[str, Any]:
    """The figures of one case."""
    device, threads = case["device"], case["threads"]
    if case["kind"] == "limits":
        last = native_wish("auto", None, device, None)["device"].rpartition(",")[2]
        main_type = case["type"].removesuffix("_m").removesuffix("_s")  # of most of the weights
        return {
            "read": _native.measure_read_rate(threads, last),
            "matrix": _native.measure_matrix_rate(threads, main_type, last),
        }
    limit = case.get("memory")
    before = used_bytes()
    canvas = SHAPES[case["shape"]].canvas_length if case["shape"] else 256
    n_ctx = case["prompt"] + case.get("tokens", 0) + 2 * canvas
    planned = plan(case["file"], n_ctx=n_ctx, device=device, gpu_memory=limit)
    wish = native_wish("auto", None, device, limit)
    load, model = timed(lambda: _native.Model(case["file"], threads, n_ctx=n_ctx, **wish))
    session = _native.Session(model, n_ctx)
    session.encode(random_ids(model, 32))  # kernels are loaded at their first use
    begin(session, model.canvas_length, 2)
    session.next_step()
    session.next_step()
    session.truncate(0)
    figures = {
        "load": load,
        "layers": planned.n_gpu_layers,
        "host_experts": planned.n_cpu_moe,
        "device": planned.device,
        "planned": planned.total_bytes,
        "n_bytes": model.description["n_bytes"],
        "canvas": model.canvas_length,
    }
    figures |= (answer if case["kind"] == "answers" else steps)(model, session, case)
    figures["used"] = used_bytes() - before if devices() else None
    figures["clocks"] = smi()
    return figures


def steps(model: _native.Model, session: _native.Session, case: Case) -> dict[str, Any]:
    ids = random_ids(model, case["prompt"])
    prefill, _ = timed(lambda: session.encode(ids))
    begin(session, model.canvas_length, case["steps"])
    seconds = [timed(session.next_step)[0] for _ in range(case["steps"])]
    parts: dict[str, Any] = {}
    d = model.description
    if not d["n_cpu_moe"] and len(d["device_layers"]) < 2 and d["n_gpu_layers"] == model.hparams["n_layer"]:
        runs = [session.profile_step() for _ in range(3)]
        parts = {
            name: (statistics.median(run[name][0] for run in runs), *runs[0][name][1:]) for name in runs[0]
        }
    return {
        "prefill": case["prompt"] / prefill,
        "first": seconds[0],
        "step": statistics.median(seconds[1:]),
        "best": min(seconds[1:]),
        "parts": parts,
    }


def answer(model: _native.Model, session: _native.Session, case: Case) -> dict[str, Any]:
    """Prompt and tokens of an answer in full, with the canvases' commits in between."""
    ids = random_ids(model, case["prompt"])
    started = time.perf_counter()
    session.encode(ids)
    begin(session, case["tokens"], case["steps"])
    blocks: list[list[float]] = [[]]
    first_canvas = None
    while True:
        taken, step = timed(session.next_step)
        if step is None:
            break
        blocks[-1].append(taken)
        if step.canvas_done:
            first_canvas = first_canvas or time.perf_counter() - started
            blocks.append([])
    total = time.perf_counter() - started
    blocks.pop()
    # A block's first step commits the block before, and has no self-conditioning.
    return {
        "total": total,
        "first_canvas": first_canvas,
        "blocks": [statistics.median(block[1:]) for block in blocks],
        "commits": [block[0] for block in blocks[1:]],
    }


# All of them


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """In the order of what is worth most when the time is up."""
    common = {
        "device": arguments.device, "threads": arguments.threads, "shape": arguments.shape,
        "steps": arguments.steps,
    }  # fmt: skip
    if arguments.model:
        common |= {"shape": None, "model": str(arguments.model)}
    types = ["given"] if arguments.model else arguments.types
    for type_name in types:
        of_type = {**common, "type": type_name}
        if "limits" in arguments.only and type_name != "given":
            yield {"kind": "limits", **of_type}
        if "steps" in arguments.only:
            for prompt in arguments.prompts:
                yield {"kind": "steps", **of_type, "prompt": prompt}
        if "answers" in arguments.only:
            for prompt, tokens in arguments.answers:
                yield {"kind": "answers", **of_type, "prompt": prompt, "tokens": tokens}
        if "memory" in arguments.only:
            for memory in arguments.memory:
                yield {"kind": "steps", **of_type, "prompt": arguments.memory_prompt, "memory": memory}


def run_case(case: Case, file: Path | None, timeout: float) -> dict[str, Any]:
    """Figures of a case, or what went wrong."""
    given = json.dumps({**case, "file": None if file is None else str(file)})
    command = [sys.executable, __file__, "--case", given]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {timeout:.0f} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"error": f"exit {done.returncode}: {lines[-1] if lines else 'nothing said'}"}
    return json.loads(done.stdout.splitlines()[-1])


def file_of(case: Case, folder: Path) -> Path:
    if case["shape"] is None:
        return Path(case["model"])
    path = folder / f"{case['shape']}-{case['type']}.gguf"
    if not path.exists():
        print(f"writing {path}", file=sys.stderr, flush=True)
        write_synthetic(case["shape"], path, case["type"])
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    """The last result of each case."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({json.dumps(entry["case"]): entry for entry in map(json.loads, lines)}.values())


def run_all(arguments: argparse.Namespace, folder: Path) -> None:
    ends = time.monotonic() + arguments.seconds
    known = [entry["case"] for entry in read_results(arguments.results) if "error" not in entry["figures"]]
    for case in cases(arguments):
        if case in known:
            continue
        left = ends - time.monotonic()
        if left <= 0:
            print("the time is up; the same command goes on from here", file=sys.stderr)
            return
        print(f"{case}", file=sys.stderr, flush=True)
        file = None if case["kind"] == "limits" else file_of(case, folder)
        entry = {"case": case, "when": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        entry["figures"] = run_case(case, file, max(60.0, ends - time.monotonic()))
        with arguments.results.open("a") as results:
            results.write(json.dumps(entry) + "\n")


# The page


def section(title: str, head: str, rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(row) + " |" for row in [head.split(", "), ["---"] * len(rows[0]), *rows]]
    return "\n".join([title, "", *lines, ""])


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def gb(n_bytes: int | None) -> str:
    return "?" if n_bytes is None else f"{n_bytes / 1e9:.2f}"


def header(results: list[dict[str, Any]]) -> str:
    """The machine, and at which clocks it computed."""
    version = _native.version()
    found = [f"{one.name} ({one.description}, {one.total_bytes / 1e9:.0f} GB)" for one in devices()]
    dates = sorted({entry["when"][:10] for entry in results})
    lines = [
        f"{', '.join(found) or 'no GPU'}; {version['cpu']}, {platform.machine()}; ggml {version['ggml']}; "
        f"{' to '.join(dict.fromkeys(dates[:1] + dates[-1:]))}",
        "",
    ]
    clocks = dict.fromkeys(line for entry in results for line in entry["figures"].get("clocks", []))
    if clocks:
        lines += [f"While at it ({', '.join(_SMI)}):", "", *(f"- {line}" for line in clocks), ""]
    return "\n".join(lines)


def step_row(case: Case, f: dict[str, Any], read: float | None) -> list[str]:
    """read: bytes per second of the memory. A step touches every expert, so it reads all weights."""
    reading = ms(f["n_bytes"] / read) if read else "?"
    times = [ms(f["step"]), ms(f["best"]), ms(f["first"]), reading]
    return [
        case["type"], f"{case['prompt']}", *times, f"{f['prefill']:.0f}", gb(f["used"]), gb(f["planned"]),
        f"{f['load']:.1f}",
    ]  # fmt: skip


def parts_of(case: Case, f: dict[str, Any]) -> str:
    together = sum(seconds for seconds, _, _ in f["parts"].values())
    rows = [
        [name, ms(seconds), f"{operations / seconds / 1e12:.2f}", f"{n_bytes / seconds / 1e9:.0f}"]
        for name, (seconds, operations, n_bytes) in f["parts"].items()
    ]
    title = (
        f"Parts of a step, {case['type']} behind {case['prompt']} tokens; each is waited for, so together "
        f"{ms(together)} ms:"
    )
    return section(title, "part, ms, TFLOP/s, GB/s", rows)


def answer_row(case: Case, f: dict[str, Any]) -> list[str]:
    blocks, commits = f["blocks"], f["commits"]
    return [
        case["type"], f"{case['prompt']}", f"{case['tokens']}", f"{case['steps']}", f"{f['total']:.3f}",
        f"{f['first_canvas']:.3f}", f"{case['tokens'] / f['total']:.1f}", ms(blocks[0]),
        f"{ms(blocks[-1])} ({len(blocks)})", f"{blocks[-1] / blocks[0]:.3f}",
        *([ms(commits[0]), ms(commits[-1])] if commits else ["", ""]),
    ]  # fmt: skip


def memory_row(case: Case, f: dict[str, Any]) -> list[str]:
    return [
        case["type"], gb(case["memory"]), f"{case['prompt']}", f"{f['layers']}", f"{f['host_experts']}",
        ms(f["step"]), gb(f["used"]), gb(f["planned"]),
    ]  # fmt: skip


def page(results: list[dict[str, Any]]) -> str:
    """All results as Markdown."""
    good = [(entry["case"], entry["figures"]) for entry in results if "error" not in entry["figures"]]
    limits = {case["type"]: figures for case, figures in good if case["kind"] == "limits"}
    stepped = [(case, f) for case, f in good if case["kind"] == "steps"]
    plain = [(case, f) for case, f in stepped if not case.get("memory")]
    text = [
        header(results),
        section(
            "What the device can do:",
            "type, copying in GB/s, product of 256 columns in TFLOP/s",
            [[name, f"{f['read'] / 1e9:.0f}", f"{f['matrix'] / 1e12:.2f}"] for name, f in limits.items()],
        ),
        section(
            "Steps, in ms; reading: all weights once at the rate of a copy; memory in GB:",
            "type, prompt, step, best, first, reading, prefill in tokens/s, in use, planned, load in s",
            [step_row(case, f, limits.get(case["type"], {}).get("read")) for case, f in plain],
        ),
        *(parts_of(case, f) for case, f in plain),
        section(
            "Whole answers, prefill and commits included; steps in ms; a block's first step commits the one "
            "before:",
            "type, in, out, steps of a canvas, s, first canvas in s, tokens/s, step of block 1, of the last, "
            "ratio, first step of block 2, of the last",
            [answer_row(case, f) for case, f in good if case["kind"] == "answers"],
        ),
        section(
            "With less memory, in GB, the experts of some layers on the processor:",
            "type, limit, prompt, layers on GPUs, experts on the processor, step in ms, in use, planned",
            [memory_row(case, f) for case, f in stepped if case.get("memory")],
        ),
        *(f"- {e['case']}: {e['figures']['error']}" for e in results if "error" in e["figures"]),
    ]
    return "\n".join(part for part in text if part)


def pair(text: str) -> tuple[int, int]:
    prompt, _, tokens = text.partition(":")
    return int(prompt), int(tokens)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q8_0"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[128, 1024, 4096, 32_768])
    parser.add_argument("--answers", nargs="+", type=pair, default=[(1024, 1024), (4096, 512), (128, 4096)])
    parser.add_argument("--memory", nargs="+", type=parse_size, default=[n << 30 for n in (8, 12, 16)])
    parser.add_argument("--memory-prompt", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--shape", choices=SHAPES, default="26b-a4b")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--results", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.case:
        print(json.dumps(measure(arguments.case)))
        return
    run_all(arguments, arguments.folder)
    print(page(read_results(arguments.results)))


if __name__ == "__main__":
    main()
