"""``pydiffusion devices``: list threads and GPUs, and plan a model's layers over them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pydiffusion._util.sizes import format_size

from . import _open, _options


@_options.takes(runtime=_options.PLACEMENT)
def command(
    model: Annotated[
        Path | None,
        typer.Option("-m", "--model", help="Plan for this model: a path, or OWNER/NAME[:FILE or TYPE]."),
    ] = None,
    *,
    runtime: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """List the number of threads and the GPUs; with -m, plan a model's layers over them. Loads nothing."""
    from pydiffusion import devices, plan
    from pydiffusion._util.cpus import step_threads

    found, threads = devices(), step_threads()
    planned = None
    if model is not None:
        arguments = _open.runtime_arguments(runtime)
        del arguments["n_threads"], arguments["kernels"]  # irrelevant for a plan
        planned = plan(_open.model_file(model), **arguments)
    if as_json:
        listed = [asdict(device) for device in found]
        cpu = {"n_threads": threads.n, "reason": threads.reason}
        print(json.dumps({"cpu": cpu, "devices": listed, "plan": planned and planned.to_dict()}))
        return
    print(f"cpu: {threads.n} thread{'s' if threads.n > 1 else ''} by default: {threads.reason}")
    for device in found:
        free, total = format_size(device.free_bytes), format_size(device.total_bytes)
        print(f"{device.name}: {device.description}, {free} of {total} free")
    if not found:
        print("no GPU that this build supports; docs/gpu.md says how to build for one")
    if planned is None:
        return
    if not planned.n_gpu_layers:
        print(f"cpu: all {planned.n_layer} layers")
        return
    print(
        f"{planned.device}: {planned.n_gpu_layers} of {planned.n_layer} layers, of which the experts of "
        f"{planned.n_cpu_moe} stay on the CPU"
        f"{'; matrices other than experts as BF16' if planned.dense_type == 'bf16' else ''}"
    )
    for share in planned.shares:
        parts = {"weights": share.weight_bytes, "cache": share.cache_bytes, "step": share.step_bytes}
        where = "" if len(planned.shares) == 1 else f"{share.device}, {share.n_layers} layers: "
        print(where + ", ".join(f"{name} {format_size(n)}" for name, n in parts.items()), end="; ")
        print(f"together {format_size(share.total_bytes)}")
