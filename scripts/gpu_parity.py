"""Compare a device's logits and text with the CPU's, and with its own without CUDA graphs or fusion.

    python scripts/gpu_parity.py [--device CUDA0] [--folder /dev/shm] [--models demo mid] [--types f32 ...]

Each configuration (the CPU, the device twice, without CUDA graphs, without fusion) runs in its own process,
since ggml reads its switches once. Findings go to stdout and to the file named by PYDIFFUSION_FINDINGS.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_findings
import numpy as np

from pydiffusion import DiffusionModel, GenerationOptions, _native, convert, demo
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.demo import tasks
from pydiffusion.testing.synthetic import write_synthetic

#: Bounds on the mean absolute difference between a device's logits and the CPU's, relative to their standard
#: deviation. Both quantize activations to 8 bits, but in blocks of different sizes; differences on an H200
#: are at most a third of these. With float32 weights only the order of sums differs.
BOUND = {"f32": 1e-3, "bf16": 0.03, "f16": 0.03, "q8_0": 0.06, "q4_k_m": 0.3}
#: Required agreement of the argmax, over positions where it leads by LEAD mean differences: random weights
#: give flat logits.
AGREEMENT, LEAD = 0.97, 8
N_REPEATS = 4  # ggml captures a CUDA graph after a few repetitions
N_PUZZLES = 8

CONFIGURATIONS: dict[str, dict[str, str]] = {
    "device": {},
    "again": {},
    "no CUDA graphs": {"GGML_CUDA_DISABLE_GRAPHS": "1"},
    "no fusion": {"GGML_CUDA_DISABLE_FUSION": "1"},
}


def compute(path: str, device: str, out: str, with_puzzles: bool) -> None:
    """Write logits at several points of a session, and generated tokens, to one .npz."""
    model = _native.Model(path, min(8, os.cpu_count() or 1), device=device, n_ctx=2048)
    session = _native.Session(model, 2048)
    rng = np.random.default_rng(7)
    n = min(model.n_vocab, 1 << 16)
    ids = rng.integers(4, n, 700).astype(np.int32)  # longer than either model's sliding window
    canvas = rng.integers(4, n, model.canvas_length).astype(np.int32)
    results: dict[str, Any] = {}
    session.encode(ids[:300])
    results["first"] = session.denoise(canvas, None)
    repeats = [session.denoise(canvas, results["first"]) for _ in range(N_REPEATS)]
    results["conditioned"] = repeats[-1]
    results["repeats_equal"] = np.array([all(np.array_equal(repeats[0], one) for one in repeats[1:])])
    session.encode(ids[300:])
    results["long"] = session.denoise(canvas[::-1].copy(), None)
    session.truncate(0)
    session.encode(ids[:50])
    session.begin(
        **{**ENTROPY_BOUND_DEFAULTS, "steps": 6, "stability_threshold": 6, "confidence_threshold": 0.0},
        max_tokens=2 * model.canvas_length, seed=3, eos=[], dropped_mass=1e-4,
    )  # fmt: skip
    text: list[int] = []
    while (step := session.next_step()) is not None:
        text.extend(step.tokens)
    results["text"] = np.array(text, dtype=np.int32)
    if with_puzzles:
        results["solved"] = np.array([solved_puzzles(path, device)])
    np.savez(out, **results)


def solved_puzzles(path: str, device: str) -> int:
    model = DiffusionModel(path, n_ctx=512, device=device)
    n = 0
    for seed, (puzzle, solution) in enumerate(demo.puzzles()[:N_PUZZLES]):
        prompt = model.chat_prompt([{"role": "user", "content": tasks.sudoku_prompt(puzzle)}])
        reply = model.generate(prompt, GenerationOptions(max_tokens=48, seed=seed))
        n += reply.text.replace("\n", "") == solution
    return n


def difference(a: np.ndarray, b: np.ndarray, bound: float) -> dict[str, Any]:
    """Compare logits (n, n_vocab): mean and largest difference, argmax agreement (all, decided positions).

    bound: on the mean difference, relative to the standard deviation of ``b``.
    """
    gap = np.abs(a.astype(np.float64) - b)
    deviation = float(b.std())
    equal = a.argmax(-1) == b.argmax(-1)
    second, first = np.partition(b, -2, axis=-1)[:, -2:].T
    decided = first - second > LEAD * gap.mean()
    of_decided = float(equal[decided].mean()) if decided.any() else 1.0
    return {
        "ok": bool(gap.mean() <= bound * deviation and of_decided >= AGREEMENT),
        "mean": float(gap.mean()),
        "deviation": deviation,
        "max": float(gap.max()),
        "equal": float(equal.mean()),
        "decided": int(decided.sum()),
        "equal_of_decided": of_decided,
    }


def run_configurations(
    path: Path, device: str, folder: Path, with_puzzles: bool
) -> dict[str, dict[str, np.ndarray]]:
    """Return the results of all configurations, run in parallel; one that fails is a finding and left out."""
    running = {}
    for name, switches in {"CPU": {}, **CONFIGURATIONS}.items():
        out = folder / f"{path.stem}-{name.replace(' ', '-')}.npz"
        given = json.dumps([str(path), "cpu" if name == "CPU" else device, str(out), with_puzzles])
        command = [sys.executable, __file__, "--compute", given]
        running[name] = (
            out,
            subprocess.Popen(
                command, env={**os.environ, **switches}, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
            ),
        )
    results = {}
    for name, (out, process) in running.items():
        _, output = process.communicate()
        sys.stderr.write(output)
        if process.returncode == 0:
            with np.load(out) as arrays:
                results[name] = dict(arrays)
        else:
            report("parity", file=path.name, way=name, ok=False, exit=process.returncode, text=output[-2000:])
        out.unlink(missing_ok=True)
    return results


def report(finding: str, **figures: Any) -> None:
    print(json.dumps(gpu_findings.add(finding, **figures), default=str), flush=True)


def compare(path: Path, type_name: str, results: dict[str, dict[str, np.ndarray]]) -> None:
    logits = ("first", "conditioned", "long")
    common = {"file": path.name}
    device = results.get("device")
    if device is None:
        return
    if "CPU" in results:
        for key in logits:
            found = difference(device[key], results["CPU"][key], BOUND[type_name])
            report("parity", **common, what=f"{key}: device against CPU", **found)
        same = np.array_equal(device["text"], results["CPU"]["text"])
        report("parity", **common, what="text: device against CPU", equal=same)  # may differ by rounding
        if "solved" in device:
            solved, of_cpu = int(device["solved"][0]), int(results["CPU"]["solved"][0])
            report(
                "parity",
                **common,
                what="puzzles solved",
                ok=solved >= of_cpu - 1,
                solved=solved,
                CPU=of_cpu,
                of=N_PUZZLES,
            )
    report("parity", **common, what="equal bits, step after step", ok=bool(device["repeats_equal"][0]))
    for name in ("again", "no CUDA graphs"):
        if name in results:
            equal = {key: np.array_equal(device[key], results[name][key]) for key in (*logits, "text")}
            report("parity", **common, what=f"equal bits: {name}", ok=all(equal.values()), **equal)
    if "no fusion" in results:
        found = difference(device["conditioned"], results["no fusion"]["conditioned"], BOUND[type_name])
        report("parity", **common, what="fusion on against off", **found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="CUDA0")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--models", nargs="+", default=["demo", "mid"], choices=["demo", "mid", "tiny"])
    parser.add_argument("--types", nargs="+", default=["f32", "q4_k_m", "q8_0"], choices=list(BOUND))
    parser.add_argument("--compute", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compute:
        compute(*options.compute)
        return
    for model in options.models:
        for type_name in options.types:
            path = options.folder / f"parity-{model}-{type_name}.gguf"
            if model == "demo":
                convert.convert(demo.checkpoint_path(), path, type=type_name, overwrite=True)
            else:
                write_synthetic(model, path, type_name)
            compare(
                path, type_name, run_configurations(path, options.device, options.folder, model == "demo")
            )
            path.unlink()


if __name__ == "__main__":
    main()
