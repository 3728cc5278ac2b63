"""Speed beside the machine's limits, and memory beside the plan."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pydiffusion import PyDiffusionError, plan
from pydiffusion._util.sizes import format_size
from pydiffusion.device_plan import HOST, devices
from pydiffusion.testing.bench import BenchResult, run_bench

from .report import Result, Section
from .subject import Subject

_N_PROMPT, _N_STEPS = 256, 4
#: A step this many times slower than the machine's limits allow is worth a look.
_SLOW = 4.0
_SMALLEST = 200_000_000  # bytes of weights; in steps of smaller models threads mostly wait for each other
#: Memory that no plan counts: interpreter and libraries on the CPU, the driver's own on a GPU.
_MORE_SHARE, _MORE_BYTES = 0.1, 200_000_000
_BUSY = "is something else running? 'pydiffusion bench' shows the parts of a step (docs/speed.md)"


def check(subject: Subject, section: Section) -> None:
    """Time loading, prefill and steps in a process of their own, so that its memory is only theirs."""
    model = subject.model
    n_prompt = min(_N_PROMPT, model.n_ctx_train - model.canvas_length - 1)
    n_ctx = n_prompt + model.canvas_length + 1
    subject.close_model()
    arguments = {key: value for key, value in subject.runtime.items() if key not in ("n_ctx", "n_threads")}
    arguments = {"n_gpu_layers": "auto", "device": "auto"} | arguments
    used_before = _used_bytes()
    subject.progress("timing", 0.0)
    result = _in_own_process(subject, n_prompt, n_ctx, arguments)
    _show_speed(result, section)
    _compare_memory(subject, result, n_ctx, arguments, used_before, section)


def _used_bytes() -> int:
    return sum(one.total_bytes - one.free_bytes for one in devices())


def _in_own_process(subject: Subject, n_prompt: int, n_ctx: int, arguments: dict[str, Any]) -> BenchResult:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        running = pool.submit(
            run_bench, subject.parts.paths[0], subject.n_threads, n_prompt, _N_STEPS, n_ctx=n_ctx, **arguments
        )
        try:
            return running.result()
        except BrokenProcessPool:
            raise PyDiffusionError(
                "the process that timed the model was killed, most likely for lack of memory: close other"
                " programs, or choose a smaller type of file"
            ) from None


def _show_speed(r: BenchResult, section: Section) -> None:
    section.passed("load", f"{r.load_seconds:.2f} s, {format_size(r.n_bytes / r.load_seconds)}/s")
    section.passed("prefill", f"{r.prefill_tokens_per_second:.0f} tokens/s, {r.n_prompt} tokens")
    seen = (
        f"{1e3 * r.step_seconds:.1f} ms per step of {r.canvas_length} tokens"
        f" (best {1e3 * r.step_seconds_min:.1f}), {r.n_threads} threads, {r.device};"
        f" {r.canvas_tokens_per_second_at_16_steps:.1f} tokens/s at 16 steps per canvas"
    )
    limit = max(r.step_operations / r.matrix_limit, r.n_bytes / r.read_limit)
    expected = (
        f"{1e3 * limit:.1f} ms by the machine's limits ({r.read_limit / 1e9:.0f} GB/s,"
        f" {r.matrix_limit / 1e9:.0f} GFLOP/s of {r.matrix_limit_type} matmul), at most {_SLOW:.0f} times it"
    )
    if r.n_bytes < _SMALLEST or not r.step_operations:
        section.passed("step", seen)
    else:
        section.judge(r.step_seconds <= _SLOW * limit, "step", seen, expected, _BUSY, Result.WARNING)


def _compare_memory(
    subject: Subject,
    r: BenchResult,
    n_ctx: int,
    arguments: dict[str, Any],
    used_before: int,
    section: Section,
) -> None:
    """On GPUs, what the run added to their use; on the CPU, the process's peak against the same plan."""
    on_gpu = r.device != "cpu"
    named = {key: arguments[key] for key in ("n_gpu_layers", "n_cpu_moe", "gpu_memory") if key in arguments}
    planned = plan(
        subject.parts.paths[0],
        n_ctx=n_ctx,
        kv_type=r.kv_type,
        **(named | {"device": r.device} if on_gpu else {"device": HOST}),
    )
    real = r.gpu_bytes - used_before if on_gpu and r.gpu_bytes is not None else r.peak_memory
    what = f"memory on {r.device}" if on_gpu else "memory of the process"
    parts = (planned.weight_bytes, planned.cache_bytes, planned.step_bytes)
    shown = " + ".join(format_size(part) for part in parts)
    if real is None:
        section.skip(what, f"this system does not tell; planned {shown}")
        return
    bound = planned.total_bytes * (1 + _MORE_SHARE) + _MORE_BYTES
    section.judge(
        real <= bound,
        what,
        f"{format_size(real)} with a context of {n_ctx}",
        f"planned {format_size(planned.total_bytes)} (weights, cache, step: {shown}), at most"
        f" {_MORE_SHARE:.0%} and {format_size(_MORE_BYTES)} more for libraries and the driver",
        "the plan is wrong for this machine: report it with this page; --gpu-memory or a shorter --ctx help",
        Result.WARNING,
    )


CHECKS = (check,)
