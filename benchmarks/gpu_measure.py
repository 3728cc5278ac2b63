"""Measurements for benchmarks/gpu.py: load, steps, whole outputs, experts on the CPU."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion import Plan, _native, devices, plan
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.device_plan import device_request
from pydiffusion.errors import GenerationCancelled

WARM_STEPS = 3  # build the graph, repeat it, capture it as a CUDA graph
DROPPED_MASS = 1e-4  # the library's default
PEAKED_DROPPED_MASS = 0.5
GATHERED = 900  # most tokens kept per sampled position; above 1,024 self-conditioning is a dense matmul
SAMPLED = 24  # positions to examine the logits of
_SMI = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip
_SETTINGS = ("GGML_CUDA", "CUDA_", "NVIDIA_TF32", "CUBLAS")

Figures = dict[str, Any]


class Skipped(Exception):
    """A measurement does not apply here; the message says why."""


class TimeUp(Exception):
    """The time budget ended during a measurement."""


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def smi(*fields: str) -> list[dict[str, str]]:
    """Query nvidia-smi for each GPU; empty if there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(fields, line.split(", "), strict=False)) for line in done.stdout.splitlines()]


def cpu_name() -> str:
    """Return the CPU's name as reported by the system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(threads: int) -> Figures:
    return {
        "gpus": smi(*_SMI),
        "devices": [
            {"name": one.name, "description": one.description, "total_bytes": one.total_bytes}
            for one in devices()
        ],
        "cpu": cpu_name(),
        "threads": threads,
        "version": _native.version(),
        "python": platform.python_version(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)},
    }


def kept_tokens(
    sorted_logits: np.ndarray, temperature: float, dropped_mass: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of tokens that self-conditioning keeps per row, and entropies in nats.

    The kernels' rule: keep the probabilities above the largest power of ten, at most 1e-4, that drops no more
    than dropped_mass. sorted_logits: (n_rows, n_vocab), descending.
    """
    z = (sorted_logits - sorted_logits[:, :1]) / temperature
    p = np.exp(z)
    sums = np.cumsum(p, axis=1, dtype=np.float64)
    totals = sums[:, -1]
    entropies = np.log(totals) - np.einsum("ij,ij->i", p, z) / totals
    n_kept = np.full(len(p), p.shape[1])
    for threshold in (1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
        for i, row in enumerate(p):
            n = np.searchsorted(-row, -threshold * totals[i], side="right")
            if totals[i] - sums[i, n - 1] <= dropped_mass * totals[i]:
                n_kept[i] = n
    return n_kept, entropies


def temperature_for(sorted_logits: np.ndarray, n_kept: int, dropped_mass: float) -> float:
    """Find the temperature at which rows keep n_kept tokens on average and none keeps more than GATHERED."""
    low, high = 1e-3, 10.0
    for _ in range(14):
        middle = (low * high) ** 0.5
        found = kept_tokens(sorted_logits, middle, dropped_mass)[0]
        if found.mean() <= n_kept and found.max() <= GATHERED:
            low = middle
        else:
            high = middle
    return low


class Bench:
    """One model on its device, with timings measured so far for estimating later measurements.

    left: returns the seconds left in the budget.
    """

    def __init__(self, file: Path, arguments: Any, left: Callable[[], float]) -> None:
        self.file, self.arguments, self.left = file, arguments, left
        self.request = device_request("auto", None, arguments.device, None)
        self.model: Any = None
        self.session: Any = None
        self.single_device = False
        self.planned: Plan
        self.n_ctx = 0
        self.free_before: int | None = None
        self.step_by_prompt: dict[int, float] = {}
        self.step_seconds = 0.1  # estimates until measured
        self.prefill_rate = 2000.0
        self._sorted_logits: np.ndarray | None = None
        self._answer: tuple[list[int], Figures] | None = None

    # Helpers

    def free_bytes(self) -> int | None:
        """Return the free memory of all GPUs in use."""
        named = self.request["device"].split(",")
        free = [one.free_bytes for one in devices() if one.name in named]
        return sum(free) if free else None

    def used_since_start(self) -> int | None:
        free = self.free_bytes()
        return None if free is None or self.free_before is None else self.free_before - free

    def require_time(self, *_: Any) -> None:
        if self.left() <= 0:
            raise TimeUp

    def encode(self, n: int) -> float:
        """Prefill an empty session with n random tokens; return seconds."""
        ids = np.random.default_rng(0).integers(0, self.model.n_vocab, n).astype(np.int32)
        self.session.truncate(0)
        seconds, _ = timed(lambda: self.session.encode(ids, progress=self.require_time))
        return seconds

    def begin(self, tokens: int, steps: int, seed: int = 0, **options: Any) -> None:
        """Begin a generation whose canvases never settle, so every step is a full one."""
        endless = {"steps": steps, "stability_threshold": steps, "confidence_threshold": 0.0}
        given = {**ENTROPY_BOUND_DEFAULTS, **endless, "dropped_mass": DROPPED_MASS, **options}
        self.session.begin(max_tokens=tokens, seed=seed, eos=[], **given)

    def n_timed(self) -> int:
        """Return the number of steps to time: as requested, or fewer if they would take too long."""
        return max(3, min(self.arguments.timed, int(0.05 * self.left() / self.step_seconds)))

    def time_steps(self, n: int, **options: Any) -> Figures:
        """Time n steps of a canvas after the session's tokens, after warm-up steps."""
        self.begin(self.model.canvas_length, n + WARM_STEPS, **options)
        walls, inner, entropies = [], [0.0], []
        for _ in range(n + WARM_STEPS):
            if self.left() <= 0 and len(walls) < WARM_STEPS + 3:
                raise TimeUp
            if self.left() <= 0:
                break
            wall, step = timed(self.session.next_step)
            walls.append(wall)
            inner.append(step.timings["denoise"])
            entropies.append(float(np.median(step.entropy)))
        median = statistics.median(walls[WARM_STEPS:])
        return {
            "step": median,
            "best": min(walls[WARM_STEPS:]),
            "first": walls[0],
            "outside": median - statistics.median(np.diff(inner)[WARM_STEPS:].tolist()),
            "steps": walls,
            "entropy": statistics.median(entropies[WARM_STEPS:]),
        }

    def profile(self) -> Figures:
        """Time the parts of the last step, run one by one."""
        if not self.single_device:
            return {"parts_skipped": "parts can't be timed for a model split across devices"}
        runs = [self.session.profile_step() for _ in range(4 if self.step_seconds < 1 else 2)][1:]
        parts = {
            name: [statistics.median(run[name][0] for run in runs), *runs[0][name][1:]] for name in runs[0]
        }
        return {"parts": parts, "nodes": self.session.step_ops}

    # Measurements

    def rates(self) -> Figures:
        """Measure the machine's copy bandwidth and matmul rates by type."""
        last, threads = self.request["device"].rpartition(",")[2], self.arguments.threads
        figures: Figures = {"device": last, "copy": _native.measure_read_rate(threads, last), "matmul": {}}
        if last == "host":
            return figures | {"matmul_skipped": "no GPU"}
        for name in ("q4_k", "q6_k", "q8_0", "f16", "bf16", "f32"):
            self.require_time()
            figures["matmul"][name] = _native.measure_matrix_rate(threads, name, last)
        return figures

    def load(
        self,
        n_cpu_moe: int | None = None,
        kernels: str = "auto",
        dense_type: str = "auto",
        n_ctx: int | None = None,
        gpu_memory: int | None = None,
    ) -> Figures:
        a = self.arguments
        self.model = self.session = None  # frees the memory of an earlier load
        self.n_ctx = n_ctx or max([*a.prompts, a.answer[0] + a.answer[1], a.peaked_prompt]) + 2 * 256
        placed: Figures = {
            "n_cpu_moe": n_cpu_moe, "device": a.device, "gpu_memory": gpu_memory, "dense_type": dense_type,
        }  # fmt: skip
        self.request = device_request("auto", **placed)
        self.planned = plan(self.file, n_ctx=self.n_ctx, **placed)
        self.free_before = self.free_bytes()
        seconds, self.model = timed(
            lambda: _native.Model(
                str(self.file),
                a.threads,
                n_ctx=self.n_ctx,
                kernels=kernels,
                progress=self.require_time,
                **self.request,
            )
        )
        used_by_model = self.used_since_start()
        self.session = _native.Session(self.model, self.n_ctx)
        d = self.model.description
        on_gpu = d["n_gpu_layers"] == self.model.hparams["n_layer"] and not d["n_cpu_moe"]
        self.single_device = on_gpu and len(d["device_layers"]) == 1
        return {
            "load": seconds,
            "n_bytes": d["n_bytes"],
            "n_weights": d["n_weights"],
            "weight_types": d["weight_types"],
            "kv_type": d["kv_type"],
            "kernels": d["kernels"],
            "dense_type": d["dense_type"],
            "canvas": self.model.canvas_length,
            "n_ctx": self.n_ctx,
            "plan": self.planned.to_dict(),
            "free_before": self.free_before,
            "used_by_model": used_by_model,
            "used_with_session": self.used_since_start(),
        }

    def first_step(self) -> Figures:
        """Load kernels, allocate work buffers, and report the memory in use afterwards."""
        prefill = self.encode(32)
        figures = self.time_steps(1)
        self.step_seconds = figures["step"]
        return {
            "prefill_seconds": prefill,
            "steps": figures["steps"],
            "used": self.used_since_start(),
            "free": self.free_bytes(),
            "cache_bytes": self.session.cache_bytes,
            "planned": self.planned.total_bytes,
        }

    def steps(self, prompt: int) -> Figures:
        prefills = [self.encode(prompt)]
        if prompt <= 4096:  # the first one includes loading kernels
            prefills.append(self.encode(prompt))
        self.prefill_rate = prompt / min(prefills)
        figures = self.time_steps(self.n_timed())
        self.step_seconds = self.step_by_prompt[prompt] = figures["step"]
        return {
            "prompt": prompt, "prefill": self.prefill_rate, "prefills": prefills, **figures, **self.profile(),
            "used": self.used_since_start(), "clocks": smi("clocks.sm", "clocks.mem", "power.draw"),
        }  # fmt: skip

    def sorted_logits(self) -> np.ndarray:
        """Return logits of some positions of a random canvas after the prompt, each row in descending order.

        They are of a second step, whose self-conditioning was peaked already.
        """
        if self._sorted_logits is None:
            self.encode(self.arguments.peaked_prompt)
            rng = np.random.default_rng(1)
            canvas = rng.integers(0, self.model.n_vocab, self.model.canvas_length).astype(np.int32)

            def some(logits: np.ndarray) -> np.ndarray:
                return -np.sort(-logits[:: -(-len(logits) // SAMPLED)], axis=1)

            logits = self.session.denoise(canvas, None)
            temperature = temperature_for(some(logits), 300, PEAKED_DROPPED_MASS)
            self._sorted_logits = some(self.session.denoise(canvas, logits / np.float32(temperature)))
        return self._sorted_logits

    def peaked(self, n_kept: int) -> Figures:
        """Time steps whose self-conditioning keeps few tokens per position, as late steps of a trained model.

        A low temperature does this in ordinary steps of a generation; no logits are uploaded. With a large
        dropped_mass, all tokens with a probability of at least 1e-4 are kept, and the count varies less
        between positions. The time depends only on the counts.
        """
        dropped_mass = PEAKED_DROPPED_MASS
        logits = self.sorted_logits()
        temperature = temperature_for(logits, n_kept, dropped_mass)
        found, entropies = kept_tokens(logits, temperature, dropped_mass)
        if self.session.n_past != self.arguments.peaked_prompt:
            self.encode(self.arguments.peaked_prompt)
        figures = self.time_steps(
            self.n_timed(), t_min=temperature, t_max=temperature, dropped_mass=dropped_mass
        )
        return {
            "prompt": self.arguments.peaked_prompt,
            "asked": n_kept,
            "kept": float(found.mean()),
            "kept_least": int(found.min()),
            "kept_most": int(found.max()),
            "temperature": temperature,
            "entropy_expected": float(np.median(entropies)),
            **figures,
            **self.profile(),
        }

    def _generate(self, prompt: int, tokens: int, seed: int) -> tuple[list[int], Figures]:
        """Generate a whole output: prefill, canvases and their commits."""
        steps = self.arguments.steps
        started = time.perf_counter()
        prefill = self.encode(prompt)
        self.begin(tokens, steps, seed)
        blocks: list[Figures] = []
        walls: list[float] = []
        answer: list[int] = []
        committed = 0.0
        begun = time.perf_counter()
        first_canvas = 0.0
        while True:
            self.require_time()
            wall, step = timed(self.session.next_step)
            if step is None:
                break
            walls.append(wall)
            if not step.canvas_done:
                continue
            now, encoded = time.perf_counter(), step.timings["encode"]
            first_canvas = first_canvas or now - started
            blocks.append({
                "seconds": now - begun, "commit": encoded - committed, "steps": len(walls),
                "first": walls[0], "step": statistics.median(walls[1:] or walls),
            })  # fmt: skip
            answer += step.tokens.tolist()
            committed, begun, walls = encoded, now, []
        total = time.perf_counter() - started
        return answer, {
            "prompt": prompt, "tokens": len(answer), "canvas_steps": steps, "total": total,
            "rate": len(answer) / total, "prefill_seconds": prefill, "first_canvas": first_canvas,
            "blocks": blocks,
        }  # fmt: skip

    def answer(self) -> Figures:
        self._answer = self._generate(*self.arguments.answer, seed=1)
        return {**self._answer[1], "clocks": smi("clocks.sm", "clocks.mem", "power.draw")}

    def determinism(self) -> Figures:
        """Generate the same output again, and one canvas with another seed."""
        if self._answer is None:
            self.answer()
        before = self._answer[0]
        again, figures = self._generate(*self.arguments.answer, seed=1)
        prompt, tokens = self.arguments.answer
        other, _ = self._generate(prompt, min(tokens, self.model.canvas_length), seed=2)
        differing = [i for i, pair in enumerate(zip(before, again, strict=False)) if pair[0] != pair[1]]
        return {
            "same": before == again,
            "first_difference": differing[0] if differing else None,
            "n_differences": len(differing) + abs(len(before) - len(again)),
            "seeds_differ": other != before[: len(other)],
            "rate": figures["rate"],
            "total": figures["total"],
        }

    def ggml_kernels(self, prompt: int) -> Figures:
        """Time steps without kernels of our own."""
        if self.model.description["kernels"] != "cuda":
            raise Skipped("the device has no kernels of ours")
        return self._loaded_again(prompt, kernels="ggml")

    def file_types(self, prompt: int) -> Figures:
        """Time steps with all matrices in the types of the file."""
        if self.model.description["dense_type"] == "file":
            raise Skipped("the device keeps the types of the file")
        return self._loaded_again(prompt, dense_type="file")

    def _loaded_again(self, prompt: int, **options: str) -> Figures:
        before = self.step_by_prompt.get(prompt)
        loaded = self.load(**options)
        prefill = self.encode(prompt)
        figures = self.time_steps(self.n_timed())
        return {
            "prompt": prompt, "load": loaded["load"], "prefill": prefill, **figures, "before": before,
            "used": self.used_since_start(),
        }  # fmt: skip

    def cpu_experts(self, n_layers: int, prompt: int) -> Figures:
        """Load the model again with the experts of some layers on the CPU, and time a few steps."""
        if not self.single_device:
            raise Skipped("the model is already split across devices")
        before = self.step_by_prompt.get(prompt)
        loaded = self.load(n_layers)
        self.encode(prompt)
        figures = self.time_steps(3)
        per_layer = None if before is None else (figures["step"] - before) / n_layers
        return {
            "n_cpu_moe": n_layers, "prompt": prompt, "load": loaded["load"], **figures,
            "all_on_gpu": before, "per_layer": per_layer, "used": self.used_since_start(),
        }  # fmt: skip

    def batch(self, n: int, prompt: int) -> Figures:
        """Denoise the canvases of n sessions in one graph, each after a prompt of its own."""
        if self.model is None or self.model.description["n_cpu_moe"]:
            raise Skipped("not all of the model is on the GPU")
        steps = self.arguments.steps
        rng = np.random.default_rng(2)
        sessions = [_native.Session(self.model, prompt + 2 * self.model.canvas_length) for _ in range(n)]
        for seed, session in enumerate(sessions):
            ids = rng.integers(0, self.model.n_vocab, prompt).astype(np.int32)
            session.encode(ids, progress=self.require_time)
            self.session = session
            self.begin(self.model.canvas_length, steps, seed)
        batch = _native.Batch(self.model)
        walls, n_graphs, tokens = [], 1, 0
        for _ in range(steps):
            self.require_time()
            wall, done = timed(lambda: batch.next_steps(sessions))
            for one in done:
                if isinstance(one, Exception):
                    raise one
                tokens += len(one.tokens) if one.canvas_done else 0
            walls.append(wall)
            n_graphs = max(n_graphs, batch.n_graphs)
        return {
            "n": n, "prompt": prompt, "step": statistics.median(walls[WARM_STEPS:]), "total": sum(walls),
            "canvas_steps": steps, "tokens": tokens, "rate": tokens / sum(walls), "n_graphs": n_graphs,
            "one": self.step_by_prompt.get(prompt),
        }  # fmt: skip

    def memory_limit(self, gib: int, n_ctx: int) -> Figures:
        """Load into a part of the GPU's memory and take a few steps; report plan and memory in use."""
        loaded = self.load(gpu_memory=gib << 30, n_ctx=n_ctx)
        self.encode(32)
        figures = self.time_steps(1)
        plan = self.planned
        return {
            "limit": gib << 30, "n_ctx": n_ctx, "load": loaded["load"], "dense_type": loaded["dense_type"],
            "n_gpu_layers": plan.n_gpu_layers, "n_cpu_moe": plan.n_cpu_moe, "planned": plan.total_bytes,
            "used": self.used_since_start(), **figures,
        }  # fmt: skip


def is_cancelled(error: BaseException) -> bool:
    return isinstance(error, TimeUp | GenerationCancelled)


def cost_of(name: str, bench: Bench, prompts: Sequence[int] = ()) -> float:
    """Estimate a measurement's seconds from earlier ones, or else for the 26B on an H100."""
    a, step = bench.arguments, bench.step_seconds
    timed_steps = (
        bench.n_timed() + WARM_STEPS + (8 if step < 1 else 4)
    ) * step  # the profile takes a few more
    kind, _, given = name.partition(":")
    if kind == "steps":
        prompt = int(given)
        return 1 + (2 if prompt <= 4096 else 1) * prompt / bench.prefill_rate + timed_steps
    canvases = -(-a.answer[1] // 256)
    answer = 1 + a.answer[0] / bench.prefill_rate + (a.steps + 1) * canvases * step
    scale = bench.file.stat().st_size / 17e9 if bench.file.exists() else 1.0
    fixed = {
        "machine": 1.0, "rates": 4.0, "load": 1 + 20 * scale, "first-step": 1 + 4 * scale,
        "peaked": 5 + 2 * step + timed_steps, "answer": answer, "determinism": 1.3 * answer,
        "graphs-off": 8 + 30 * scale + timed_steps,
        "ggml-kernels": 3 + 25 * scale + 2 * timed_steps, "file-types": 3 + 25 * scale + 2 * timed_steps,
        "cpu-experts": 3 + 25 * scale + 8 * (step + 0.3 * scale * a.cpu_experts),
        "batch": 2 + 1.2 * int(given or 1) * (a.peaked_prompt / bench.prefill_rate + (a.steps + 1) * step),
        "memory": 3 + 25 * scale + 4 * (step + 0.3 * scale * 20),
    }  # fmt: skip
    return fixed[kind]
