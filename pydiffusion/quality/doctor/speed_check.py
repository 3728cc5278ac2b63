"""Speed beside the machine's limits, and memory beside the plan."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pydiffusion import PyDiffusionError, plan
from pydiffusion._util.sizes import format_size
from pydiffusion.device_plan import HOST
from pydiffusion.testing.bench import BenchResult, run_bench

from .memory_use import memory_of_a_run
from .report import Result, Section
from .subject import Subject

_N_PROMPT, _N_STEPS = 256, 4
#: A step this many times slower than the machine's limits allow is worth a look.
_SLOW = 4.0
_SMALLEST = 200_000_000  # bytes of weights; in steps of smaller models threads mostly wait for each other
#: Memory that no plan counts: interpreter and libraries on the CPU, the driver's own on a GPU.
_MORE_SHARE, _MORE_BYTES = 0.1, 200_000_000
_BUSY = "is something else running? 'pydiffusion bench' shows the parts of a step (docs/speed.md)"

Outcome = TypeVar("Outcome")


def _check_speed(subject: Subject, section: Section) -> None:
    """Time loading, prefill and steps."""
    n_prompt, n_ctx = _sizes(subject)
    subject.progress("timing", 0.0)
    arguments = _device_arguments(subject)
    r: BenchResult = _in_a_new_process(
        run_bench, subject.parts.paths[0], subject.n_threads, n_prompt, _N_STEPS, n_ctx=n_ctx, **arguments
    )
    section.passed("load", f"{r.load_seconds:.2f} s, {format_size(r.n_bytes / r.load_seconds)}/s")
    section.passed("prefill", f"{r.prefill_tokens_per_second:.0f} tokens/s, {r.n_prompt} tokens")
    seen = (
        f"{1e3 * r.step_seconds:.1f} ms per step of {r.canvas_length} tokens"
        f" (best {1e3 * r.step_seconds_min:.1f}), {r.n_threads} threads, {r.device};"
        f" {r.canvas_tokens_per_second_at_16_steps:.1f} tokens/s at 16 steps per canvas"
    )
    if r.n_bytes < _SMALLEST or not r.step_operations:
        section.passed("step", seen)
        return
    limit = max(r.step_operations / r.matrix_limit, r.n_bytes / r.read_limit)
    expected = (
        f"{1e3 * limit:.1f} ms by the machine's limits ({r.read_limit / 1e9:.0f} GB/s,"
        f" {r.matrix_limit / 1e9:.0f} GFLOP/s of {r.matrix_limit_type} matmul), at most {_SLOW:.0f} times it"
    )
    section.judge(r.step_seconds <= _SLOW * limit, "step", seen, expected, _BUSY, Result.WARNING)


def _check_memory(subject: Subject, section: Section) -> None:
    """Compare the memory of a run with the device plan; on the CPU with that of a device for all of it."""
    n_prompt, n_ctx = _sizes(subject)
    path, arguments = subject.parts.paths[0], _device_arguments(subject)
    subject.progress("measuring memory", 0.0)
    used = _in_a_new_process(
        memory_of_a_run, path, n_prompt, n_ctx, {**arguments, "n_threads": subject.n_threads}
    )
    asked = {key: value for key, value in arguments.items() if key not in ("kernels", "lora")}
    planned = plan(path, n_ctx=n_ctx, lora_bytes=used.adapters, **asked)
    on_gpu = planned.n_gpu_layers > 0 and planned.device != HOST
    if not on_gpu:
        planned = plan(path, n_ctx=n_ctx, kv_type=arguments.get("kv_type", "auto"), device=HOST)
    what, real = (f"memory on {planned.device}", used.gpu) if on_gpu else ("memory", used.process)
    parts = {"weights": planned.weight_bytes, "cache": planned.cache_bytes, "step": planned.step_bytes}
    if used.adapters:
        parts["adapters"] = used.adapters
    total = sum(parts.values())
    shown = f"{', '.join(parts)}: {' + '.join(map(format_size, parts.values()))}"
    if real is None:
        section.skip(what, f"this system does not tell; planned {format_size(total)} ({shown})")
        return
    section.judge(
        real <= total * (1 + _MORE_SHARE) + _MORE_BYTES,
        what,
        f"{format_size(real)} with a context of {n_ctx}",
        f"planned {format_size(total)} ({shown}), and at most {_MORE_SHARE:.0%} and"
        f" {format_size(_MORE_BYTES)} for {'the driver' if on_gpu else 'interpreter and libraries'}",
        "the plan is wrong for this machine: report it with this page; --gpu-memory or a shorter --ctx help",
        Result.WARNING,
    )


def _sizes(subject: Subject) -> tuple[int, int]:
    """Tokens of the prompt and of the context. Frees the model, whose memory the measured runs need."""
    model = subject.model
    n_prompt = min(_N_PROMPT, model.n_ctx_train - model.canvas_length - 1)
    n_canvas = model.canvas_length
    subject.close_model()
    return n_prompt, n_prompt + n_canvas + 1


def _device_arguments(subject: Subject) -> dict[str, Any]:
    given = {key: value for key, value in subject.runtime.items() if key not in ("n_ctx", "n_threads")}
    return {"n_gpu_layers": "auto", "device": "auto"} | given


def _in_a_new_process(function: Callable[..., Outcome], *arguments: Any, **keywords: Any) -> Outcome:
    """In this one, memory is not only the model's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments, **keywords).result()
        except BrokenProcessPool:
            raise PyDiffusionError(
                "the process that ran the model was killed, most likely for lack of memory: close other"
                " programs, or choose a smaller type of file"
            ) from None


CHECKS = (_check_speed, _check_memory)
