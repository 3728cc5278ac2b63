"""Where a model computes: the GPUs of this machine, and what of a model lies on one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from . import _native

__all__ = ["Device", "Plan", "devices", "plan"]

#: The graphs and kernels made for GPUs, run on the processor: slow, to prove them.
HOST = "host"
CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """A GPU that this build can compute on. Sizes in bytes, as they were when it was asked for."""

    name: str
    description: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Plan:
    """What of a model lies on a device, and the bytes that it takes there.

    ``n_gpu_layers``: the last so many of ``n_layer`` layers, with all that is in no layer; 0 for none.
    ``n_cpu_moe``: of these the last so many leave their experts to the processor.
    ``weight_bytes``, ``cache_bytes`` (of one session), ``step_bytes`` (logits, activations, work areas).
    """

    device: str
    n_layer: int
    n_gpu_layers: int
    n_cpu_moe: int
    weight_bytes: int
    cache_bytes: int
    step_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it, for one session."""
        return self.weight_bytes + self.cache_bytes + self.step_bytes


def devices() -> list[Device]:
    """The GPUs that this build finds; none where it was built without CUDA, or there is no driver."""
    return [Device(**info) for info in _native.devices()]


def plan(
    path: str | os.PathLike[str],
    n_ctx: int = 8192,
    n_gpu_layers: int | Literal["auto"] = "auto",
    n_cpu_moe: int | None = None,
    device: str = "auto",
    gpu_memory: int | None = None,
    kv_type: str = "auto",
) -> Plan:
    """What ``DiffusionModel`` would put on a device, given the same arguments; nothing is loaded.

    Raises as ``DiffusionModel``.
    """
    wish = native_wish(n_gpu_layers, n_cpu_moe, device, gpu_memory)
    found = _native.plan(os.fspath(path), n_ctx=n_ctx, kv_type=kv_type, **wish)
    return Plan(device=wish["device"] if found["n_gpu_layers"] else CPU, **found)


def native_wish(
    n_gpu_layers: int | Literal["auto"], n_cpu_moe: int | None, device: str, gpu_memory: int | None
) -> dict[str, Any]:
    """The arguments in the native layer's form, checked."""
    automatic = n_gpu_layers == "auto"
    if not automatic:
        _check_count("n_gpu_layers", n_gpu_layers, "'auto' or an integer of at least 0")
    if n_cpu_moe is not None:
        _check_count("n_cpu_moe", n_cpu_moe, "None or an integer of at least 0")
    if gpu_memory is not None:
        _check_count("gpu_memory", gpu_memory, "None or a number of bytes")
    if n_gpu_layers == 0:
        device = CPU
    elif device == "auto":
        found = max(devices(), key=lambda one: one.free_bytes, default=None)
        if found is None and not automatic:
            raise ValueError(
                f"n_gpu_layers is {n_gpu_layers}; there is no GPU here that this build can compute on: "
                "give 0 or 'auto' (docs/gpu.md)"
            )
        device = found.name if found else CPU
    elif device not in (CPU, HOST) and device not in [one.name for one in devices()]:
        names = ", ".join([CPU, *(one.name for one in devices())])
        raise ValueError(f"there is no device {device!r} to compute on; there are {names}")
    return {
        "device": device,
        "n_gpu_layers": -1 if automatic else n_gpu_layers,
        "n_cpu_moe": -1 if n_cpu_moe is None else n_cpu_moe,
        "memory_limit": gpu_memory or 0,
    }


def _check_count(name: str, value: Any, permitted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}; permitted is {permitted}")
