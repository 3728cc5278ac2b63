"""Device plan: the GPUs of this machine, and which part of a model goes to which device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydiffusion.errors import PyDiffusionWarning

from . import _native
from ._util.files import check_is_gguf
from ._util.warn import warn_caller
from .vision.finding import AUTO, planned_for

__all__ = ["Device", "DeviceShare", "Plan", "devices", "plan"]

#: Runs the GPU graphs and kernels on the CPU: slow, for tests.
HOST = "host"
CPU = "cpu"
#: Default context length of a session.
DEFAULT_N_CTX = 8192
#: Types of the KV cache.
KV_TYPES = ("auto", "f32", "f16", "q8_0")
#: Types of matrices other than experts on a GPU; "file" for the file's own.
DENSE_TYPES = ("auto", "file", "bf16")
#: What stays free of a GPU's memory in any case: so many bytes, or this part of it, whichever is more.
_LEAST_FREE, _FREE_PART = 512 << 20, 20
#: Most sessions that memory can be planned for.
MAX_SESSIONS = 65536


@dataclass(frozen=True)
class Device:
    """A GPU that this build supports. Sizes in bytes, at the time of the call."""

    name: str
    description: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class DeviceShare:
    """One device's share of a model: number of layers and memory.

    ``weight_bytes``; ``cache_bytes`` and ``step_bytes`` (logits, activations, scratch buffers) of all
    sessions planned for.
    """

    device: str
    n_layers: int
    weight_bytes: int
    cache_bytes: int
    step_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the above."""
        return self.weight_bytes + self.cache_bytes + self.step_bytes


@dataclass(frozen=True)
class Plan:
    """Which part of a model goes to which device, and the memory it takes there.

    ``device``: a device's name, several separated by commas, or "cpu".
    ``n_gpu_layers``: how many of the ``n_layer`` layers, counted from the last, are on GPUs; 0 for none.
    ``n_cpu_moe``: how many of these, counted from the last, keep their experts on the CPU.
    ``dense_type``: "bf16" if matrices other than experts are converted to BF16 there, else "file".
    ``shares``: one per device, in layer order; tensors outside layers are on the last.
    """

    device: str
    n_layer: int
    n_gpu_layers: int
    n_cpu_moe: int
    dense_type: str
    shares: tuple[DeviceShare, ...]

    @property
    def weight_bytes(self) -> int:
        """Weights on all devices."""
        return sum(share.weight_bytes for share in self.shares)

    @property
    def cache_bytes(self) -> int:
        """KV caches of all sessions planned for."""
        return sum(share.cache_bytes for share in self.shares)

    @property
    def step_bytes(self) -> int:
        """Logits, activations and scratch buffers of all sessions planned for."""
        return sum(share.step_bytes for share in self.shares)

    @property
    def total_bytes(self) -> int:
        """Sum of the above."""
        return sum(share.total_bytes for share in self.shares)

    def to_dict(self) -> dict[str, Any]:
        """All fields and sums as plain values, for JSON."""
        sums = ("weight_bytes", "cache_bytes", "step_bytes", "total_bytes")
        return asdict(self) | {name: getattr(self, name) for name in sums}


def devices() -> list[Device]:
    """List the GPUs that this build supports; empty when built without CUDA or without a driver."""
    return [Device(**info) for info in _native.devices()]


def plan(
    path: str | os.PathLike[str],
    n_ctx: int = DEFAULT_N_CTX,
    n_gpu_layers: int | Literal["auto"] = "auto",
    n_cpu_moe: int | None = None,
    device: str = "auto",
    gpu_memory: int | Sequence[int] | None = None,
    kv_type: str = "auto",
    n_sessions: int = 1,
    dense_type: str = "auto",
    mmproj: str | os.PathLike[str] | None = AUTO,
    lora_bytes: int = 0,
) -> Plan:
    """Plan which layers ``DiffusionModel`` would put on which device, without loading anything.

    With a vision file (mmproj) the last device has its weights and work memory besides. lora_bytes: to leave
    free on each GPU for adapters, which are not in the plan's sums. Raises as ``DiffusionModel``.
    """
    request = device_request(n_gpu_layers, n_cpu_moe, device, gpu_memory, n_sessions, dense_type)
    check_kv_type(kv_type)
    check_is_gguf(Path(path))
    request["mmproj"] = planned_for(Path(path), mmproj, request["device"])
    request["memory_limits"] = limits_beside(lora_bytes, request)
    found = _native.plan(os.fspath(path), n_ctx=n_ctx, kv_type=kv_type, **request)
    return Plan(**{**found, "shares": tuple(DeviceShare(**share) for share in found["shares"])})


def check_kv_type(kv_type: str) -> None:
    """Raise ValueError for an unknown type; warn the caller of one that costs quality."""
    if kv_type not in KV_TYPES:
        raise ValueError(f"kv_type is {kv_type!r}; permitted are {', '.join(map(repr, KV_TYPES))}")
    if kv_type == "q8_0":
        warn_caller(
            "an 8-bit KV cache (q8_0) hurts Gemma 4: others measured a mean KL divergence of 0.377 for its "
            "26B-A4B and of 0.108 for its 31B; f16, the default for quantized files, is the safe choice",
            PyDiffusionWarning,
        )


def device_request(
    n_gpu_layers: int | Literal["auto"],
    n_cpu_moe: int | None,
    device: str,
    gpu_memory: int | Sequence[int] | None,
    n_sessions: int = 1,
    dense_type: str = "auto",
) -> dict[str, Any]:
    """Requested device placement, checked, as arguments of the native functions; -1 means automatic."""
    automatic = n_gpu_layers == "auto"
    if not automatic:
        _check_count("n_gpu_layers", n_gpu_layers, "'auto' or an integer of at least 0")
    if n_cpu_moe is not None:
        _check_count("n_cpu_moe", n_cpu_moe, "None or an integer of at least 0")
    if isinstance(n_sessions, bool) or not isinstance(n_sessions, int) or not 1 <= n_sessions <= MAX_SESSIONS:
        raise ValueError(f"n_sessions is {n_sessions!r}; permitted is an integer from 1 to {MAX_SESSIONS}")
    if dense_type not in DENSE_TYPES:
        raise ValueError(f"dense_type is {dense_type!r}; permitted are {', '.join(map(repr, DENSE_TYPES))}")
    names = [CPU] if n_gpu_layers == 0 else _names(device)
    if not names and not automatic:
        raise ValueError(
            f"n_gpu_layers is {n_gpu_layers}, but no GPU that this build supports was found: "
            "give 0 or 'auto' (docs/gpu.md)"
        )
    return {
        "device": ",".join(names) or CPU,
        "n_gpu_layers": -1 if automatic else n_gpu_layers,
        "n_cpu_moe": -1 if n_cpu_moe is None else n_cpu_moe,
        "memory_limits": _limits(gpu_memory, device, [] if names == [CPU] else names),
        "n_sessions": n_sessions,
        "dense_type": dense_type,
    }


def limits_beside(n_bytes: int, request: dict[str, Any]) -> list[int]:
    """The memory limits of a request (``device_request``), less what adapters of so many bytes need.

    As if all of them came to each GPU: which layers it gets is not planned yet.
    """
    limits: list[int] = request["memory_limits"]
    if not n_bytes or request["device"] == CPU:
        return limits
    found = {one.name: one for one in devices()}
    names = request["device"].split(",")
    rooms = []
    for name, limit in zip(names, limits or [0] * len(names), strict=True):  # 0: no limit
        if name in found:
            device = found[name]
            free = device.free_bytes - max(_LEAST_FREE, device.total_bytes // _FREE_PART)
            limit = min(limit or free, free)
            rooms.append(max(1, limit - n_bytes))
        else:
            rooms.append(max(1, limit - n_bytes) if limit else 0)
    return rooms


def _names(device: str) -> list[str]:
    """The devices that ``device`` selects; the last one holds the tensors outside layers."""
    found = devices()
    if device == "auto":  # the freest has room for the tensors outside layers
        return [one.name for one in sorted(found, key=lambda one: one.free_bytes)]
    if device == CPU:
        return [CPU]
    names = [name.strip() for name in device.split(",")]
    known = [one.name for one in found]
    for name in names:
        if name != HOST and name not in known:
            raise ValueError(f"{_native.why_no_device(name)}; there are {', '.join([CPU, *known])}")
        if name != HOST and names.count(name) > 1:
            raise ValueError(f"device is {device!r}, which has {name} twice")
    return names


def _limits(gpu_memory: int | Sequence[int] | None, device: str, names: Sequence[str]) -> list[int]:
    permitted = "None, a number of bytes, or one for each of the devices that ``device`` names"
    if gpu_memory is None:
        return []
    if not isinstance(gpu_memory, Sequence) or isinstance(gpu_memory, str):
        _check_count("gpu_memory", gpu_memory, permitted)
        return [gpu_memory] * len(names)
    for limit in gpu_memory:
        _check_count("gpu_memory", limit, permitted)
    if device == "auto" or (names and len(gpu_memory) != len(names)):
        raise ValueError(
            f"gpu_memory has {len(gpu_memory)} limits, and device is {device!r}; permitted is {permitted}"
        )
    return list(gpu_memory) if names else []


def _check_count(name: str, value: Any, permitted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}; permitted is {permitted}")
