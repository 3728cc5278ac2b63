"""Results of the benchmark as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .autoregressive import QUOTED_STEPS, Autoregressive
from .bench import BenchResult
from .comparison import Comparison
from .image_bench import ImageBench
from .machine_load import MachineLoad

#: Operations of a step that are matmuls; attention is mostly matmul.
_MATMULS = (
    "matmul", "expert_matmul", "soft_embedding", "attend", "attend_tiles", "MUL_MAT", "MUL_MAT_ID",
)  # fmt: skip


def format_result(result: BenchResult) -> str:
    """Format the results as text."""
    r = result
    lines = [
        f"{r.model}: {r.n_weights / 1e6:.0f}e6 weights, {r.n_bytes / 1e9:.2f} GB, cache {r.kv_type}",
        f"ggml {r.ggml} on {r.n_threads} threads of {r.machine} ({r.cpu})",
        f"roofline: reading {r.read_limit / 1e9:.1f} GB/s, "
        f"{r.matrix_limit_type} matmul {r.matrix_limit / 1e9:.0f} GFLOP/s",
        f"load {r.load_seconds:.2f} s, prefill of {r.n_prompt}: {r.prefill_tokens_per_second:.0f} tokens/s",
        f"step {1e3 * r.step_seconds:.0f} ms (best {1e3 * r.step_seconds_min:.0f}, "
        f"first {1e3 * r.first_step_seconds:.0f}), {r.step_operations / 1e9:.0f} GFLOP; "
        f"at 16 steps per canvas of {r.canvas_length}: {r.canvas_tokens_per_second_at_16_steps:.1f} tokens/s",
    ]
    if r.adapters:
        lines.insert(1, f"adapters {', '.join(r.adapters)}")
    lines += _load_lines(r)
    if r.device != "cpu":
        used = "" if r.gpu_bytes is None else f", {r.gpu_bytes / 1e9:.2f} GB of it in use"
        lines.insert(2, f"{r.n_gpu_layers} layers on {r.device}, experts of {r.n_cpu_moe} on the CPU{used}")
    if r.peak_memory is not None:
        lines.append(f"peak memory {r.peak_memory / 1e9:.2f} GB")
    lines.append(f"{'part':20}{'ms':>9}{'GFLOP/s':>10}{'of limit':>9}{'GB/s':>8}{'of limit':>9}")
    for name, part in r.parts.items():
        lines.append(
            f"{name:20}{1e3 * part.seconds:9.1f}{part.operations_per_second / 1e9:10.1f}"
            f"{part.operations_per_second / r.matrix_limit:9.0%}{part.bytes_per_second / 1e9:8.2f}"
            f"{part.bytes_per_second / r.read_limit:9.0%}"
        )
    if r.operation_seconds and r.device == "cpu":
        total = sum(r.operation_seconds.values())
        matmuls = sum(r.operation_seconds.get(name, 0.0) for name in _MATMULS)
        pack = r.operation_seconds.get("pack", 0.0)
        lines.append(
            f"by operation: matmuls and attention {matmuls / total:.1%}, packing activations, with norms"
            f" and GELU {pack / total:.1%}, all else {(total - matmuls - pack) / total:.1%}"
        )
        each = (f"{name} {1e3 * seconds:.1f}" for name, seconds in r.operation_seconds.items())
        lines.append(f"ms: {', '.join(each)}")
    return "\n".join(lines)


def format_images(bench: ImageBench) -> str:
    """Format the figures of a vision tower as text."""
    b = bench
    return (
        f"{b.vision_file}: {b.n_weights / 1e6:.0f}e6 weights, {b.n_bytes / 1e9:.2f} GB,"
        f" load {b.load_seconds:.2f} s\n"
        f"image of {b.n_patches} patches, {b.n_soft_tokens} tokens: {b.seconds:.3f} s"
        f" (best {b.seconds_min:.3f}, first {b.first_seconds:.3f}),"
        f" preprocessing {1e3 * b.preparation_seconds:.0f} ms"
    )


def _load_lines(r: BenchResult) -> list[str]:
    """Whether the machine was quiet during the steps, and what the threads got."""
    lines = [format_load(r.load)]
    if r.device != "cpu":
        return lines
    waited = "" if r.load.waited is None else f" and waited for {r.load.waited:.2f} more"
    lines.append(
        f"{r.n_threads} threads ran on {r.load.ran:.2f} of {r.load.n_cpus} CPUs{waited}:"
        f" {1e3 * r.step_cpu_seconds:.0f} ms of CPU time per step"
    )
    shares = r.load.fair_shares(r.n_threads)
    if shares is not None and not r.load.quiet:
        fair = f"fair share beside the others: {shares[0]:.2f} CPUs"
        if r.load.by_session:
            fair += f", or {shares[1]:.2f} if each is a login session, as Linux shares by session here"
        lines.append(fair)
    return lines


def format_load(load: MachineLoad) -> str:
    """A line that says whether the machine was quiet, and if not, why."""
    if load.quiet is None:
        return "machine: not known whether it was quiet"
    return "machine: quiet" if load.quiet else f"machine: NOT QUIET: {'; '.join(load.disturbances)}"


def format_autoregressive(a: Autoregressive, read_limit: float) -> str:
    """Tokens per second of both. read_limit: bytes per second that the machine reads from memory."""
    quoted, measured = a.diffusion_tokens_per_second(QUOTED_STEPS), a.diffusion_tokens_per_second(a.steps)
    prompt = "a question" if a.asked else "random tokens"
    limit = read_limit / a.bytes_per_token
    return "\n".join(
        [
            f"autoregressive, the same weights: {a.tokens_per_second:.1f} tokens/s,"
            f" {1e3 * a.token_seconds:.1f} ms per token; reading the weights of a token at the roofline would"
            f" allow {limit:.1f}",
            f"diffusion at {QUOTED_STEPS} steps per canvas: {quoted:.1f} tokens/s, a speedup of {a.speedup}",
            f"diffusion at {a.steps} steps per canvas, as after {prompt} with the file's options:"
            f" {measured:.1f} tokens/s, a speedup of {measured / a.tokens_per_second:.2f}",
            f"(one sequence after {a.n_prompt} tokens; all {a.canvas_length} tokens of a canvas are useful; a"
            f" canvas takes its steps and {1e3 * a.commit_seconds:.0f} ms to commit)",
            format_load(a.load),
        ]
    )


def format_comparison(c: Comparison) -> str:
    """Both setups, and how many times as fast the first one is."""
    lines = [f"{c.names[0]} against {c.names[1]}, in turns (above 1: the first is faster)"]
    for what, seconds, speedup in (
        (f"prefill of {c.n_prompt}", c.prefill_seconds, c.prefill_speedup),
        ("step", c.step_seconds, c.step_speedup),
    ):
        lines.append(f"{what}: {1e3 * seconds[0]:.1f} ms against {1e3 * seconds[1]:.1f}: {speedup}")
    return "\n".join([*lines, format_load(c.load)])


def compare_with_earlier(result: BenchResult, before: Mapping[str, Any]) -> str:
    """Speedups over an earlier result (its ``to_dict``); above 1 means faster now."""
    ratios = {
        "load": before["load_seconds"] / result.load_seconds,
        "prefill": result.prefill_tokens_per_second / before["prefill_tokens_per_second"],
        "step": before["step_seconds"] / result.step_seconds,
    }
    for name, part in result.parts.items():
        if name in before["parts"]:
            ratios[f"step, {name}"] = before["parts"][name]["seconds"] / part.seconds
    lines = [
        f"against {before['model']} (above 1: faster now)",
        "measured at another time, not in turns: what the machine did besides counts as a difference",
    ]
    return "\n".join(lines + [f"{name:28}{ratio:6.2f}" for name, ratio in ratios.items()])
