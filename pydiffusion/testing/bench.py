"""Benchmark: loading, prefill, a denoising step and its parts, next to the machine's roofline.

Diffusion speeds are quoted per canvas, per committed token or per useful token, so the time of a step and the
steps per canvas are reported separately: useful tokens per second follow from them.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pydiffusion import _native
from pydiffusion.adapters.applied import AdapterStore
from pydiffusion.device_plan import check_kv_type, device_request, devices
from pydiffusion.generation.native_model import new_adapter

from .machine_load import LoadMeter, MachineLoad
from .turns import begin_steps, seconds_of

if TYPE_CHECKING:
    from pydiffusion.options import Lora

#: Parts of a step in the order in which they run.
PARTS = ("self-conditioning", "embedding", "attention", "dense", "experts", "head", "sampler")

_CPU_ONLY = {"n_gpu_layers": 0, "n_cpu_moe": None, "device": "auto", "gpu_memory": None}


@dataclass(frozen=True)
class PartFigures:
    """One part of a step: median seconds, operations per second, bytes per second."""

    seconds: float
    operations_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class BenchResult:
    """Results of one run; times in seconds (medians), rates per second, sizes in bytes.

    step_cpu_seconds: CPU time of all threads, per step. load: the machine during the steps.
    """

    model: str
    machine: str
    ggml: str
    cpu: str
    n_threads: int
    device: str
    n_gpu_layers: int
    n_cpu_moe: int
    gpu_bytes: int | None
    kv_type: str
    n_weights: int
    n_bytes: int
    canvas_length: int
    n_prompt: int
    load_seconds: float
    prefill_tokens_per_second: float
    step_seconds: float
    step_seconds_min: float
    first_step_seconds: float
    step_cpu_seconds: float
    load: MachineLoad
    step_operations: float
    peak_memory: int | None
    read_limit: float
    matrix_limit: float
    matrix_limit_type: str
    parts: dict[str, PartFigures] = field(default_factory=dict)
    operation_seconds: dict[str, float] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()  # NAME:SCALE of each

    @property
    def canvas_tokens_per_second_at_16_steps(self) -> float:
        """Canvas tokens per second at 16 steps per canvas, as others quote it."""
        return self.canvas_length / (16 * self.step_seconds)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for JSON; with what follows from the machine's load."""
        shares = self.load.fair_shares(self.n_threads)
        load = {
            "quiet": self.load.quiet,
            "disturbances": self.load.disturbances,
            "fair_share_by_thread": shares and shares[0],
            "fair_share_by_session": shares and shares[1],
        }
        fields = asdict(self)
        return {**fields, "load": fields["load"] | load}


def run_bench(
    path: Path,
    n_threads: int,
    n_prompt: int = 512,
    n_steps: int = 8,
    kv_type: str = "auto",
    seed: int = 0,
    n_ctx: int | None = None,
    kernels: str = "auto",
    lora: Lora = (),
    **device_options: Any,
) -> BenchResult:
    """Benchmark a model file on random tokens.

    Raises as ``DiffusionModel``, and ValueError for sizes below 1.

    n_ctx: context of the session; None uses as much as the run needs. lora, kernels and device_options
    (``n_gpu_layers``, ``n_cpu_moe``, ``device``, ``gpu_memory``): as for ``DiffusionModel``, but on the CPU
    unless given. A step that is split over several devices is only timed as a whole.

    The canvas never converges (random tokens, adaptive stop off), so each of the ``n_steps`` steps is a full
    one with self-conditioning; the first, which has none, is reported separately.
    """
    if n_prompt < 1 or n_steps < 2:
        raise ValueError(f"n_prompt is {n_prompt} and n_steps {n_steps}; permitted are at least 1 and 2")
    check_kv_type(kv_type)
    request = device_request(**{**_CPU_ONLY, **device_options})
    started = time.perf_counter()
    model = _native.Model(
        str(path), n_threads, kv_type=kv_type, n_ctx=n_ctx or n_prompt + 257, kernels=kernels, **request
    )
    load_seconds = time.perf_counter() - started
    description = model.description
    device = description["backend"] if description["n_gpu_layers"] else "cpu"
    session = _native.Session(model, n_ctx or min(model.n_ctx_train, n_prompt + model.canvas_length + 1))
    adapters = AdapterStore(model.file.metadata, partial(new_adapter, model)).set_of(lora)
    session.set_adapters(adapters.native)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, model.n_vocab, n_prompt).astype(np.int32)
    prefill_seconds = seconds_of(lambda: session.encode(ids))
    first_step, steps, load = _time_steps(session, n_steps, seed)
    in_one_place = (
        description["n_gpu_layers"] in (0, len(model.hparams["sliding"]))
        and not description["n_cpu_moe"]
        and len(description["device_layers"]) < 2
    )
    parts = _profile(session) if in_one_place else {}
    main_type = max(description["weight_types"], key=description["weight_types"].get)
    last_device = device.rpartition(",")[2]
    operations = sum(figures.seconds * figures.operations_per_second for figures in parts.values())
    return BenchResult(
        model=path.name,
        machine=platform.machine(),
        ggml=_native.version()["ggml"],
        cpu=_native.version()["cpu"],
        n_threads=n_threads,
        device=device,
        n_gpu_layers=description["n_gpu_layers"],
        n_cpu_moe=description["n_cpu_moe"],
        gpu_bytes=_used_bytes(device),
        kv_type=description["kv_type"],
        n_weights=description["n_weights"],
        n_bytes=description["n_bytes"],
        canvas_length=model.canvas_length,
        n_prompt=n_prompt,
        load_seconds=load_seconds,
        prefill_tokens_per_second=n_prompt / prefill_seconds,
        step_seconds=statistics.median(steps),
        step_seconds_min=min(steps),
        first_step_seconds=first_step,
        step_cpu_seconds=load.ran * load.seconds / len(steps),
        load=load,
        step_operations=operations,
        peak_memory=_peak_memory(),
        read_limit=_native.measure_read_rate(n_threads, last_device),
        matrix_limit=_native.measure_matrix_rate(n_threads, main_type, last_device, kernels),
        matrix_limit_type=main_type,
        parts=parts,
        operation_seconds=_profile_operations(session) if in_one_place else {},
        adapters=tuple(f"{adapter.name}:{scale:g}" for adapter, scale in adapters.given),
    )


def _time_steps(session: _native.Session, n_steps: int, seed: int) -> tuple[float, list[float], MachineLoad]:
    """Seconds of the first step and of each other one, and the machine during these."""
    step = begin_steps(session, n_steps, seed)
    first, meter, seconds = step(), LoadMeter(), []
    for _ in range(n_steps - 1):
        seconds.append(step())
        meter.sample()
    return first, seconds, meter.result()


def _profile(session: _native.Session, n_runs: int = 3) -> dict[str, PartFigures]:
    runs = [session.profile_step() for _ in range(n_runs)]
    parts = {}
    for name in sorted(runs[0], key=lambda part: PARTS.index(part) if part in PARTS else len(PARTS)):
        seconds = statistics.median(run[name][0] for run in runs)
        _, operations, n_bytes = runs[0][name]
        parts[name] = PartFigures(seconds, operations / seconds, n_bytes / seconds)
    return parts


def _profile_operations(session: _native.Session, n_runs: int = 3) -> dict[str, float]:
    """Median seconds by operation of the graph, slowest first. Operations run one at a time, which takes a
    little longer than the step.
    """
    runs = [session.profile_step(by_operation=True) for _ in range(n_runs)]
    seconds = {name: statistics.median(run[name][0] for run in runs) for name in runs[0]}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _used_bytes(device: str) -> int | None:
    """Bytes in use on the named GPUs, by all processes."""
    used = [one.total_bytes - one.free_bytes for one in devices() if one.name in device.split(",")]
    return sum(used) if used else None


def _peak_memory() -> int | None:
    if os.name != "posix":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
