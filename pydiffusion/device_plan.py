"""Where a model computes: the GPUs of this machine, and what of a model lies on which."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydiffusion.errors import PyDiffusionWarning

from . import _native

__all__ = ["Device", "DeviceShare", "Plan", "devices", "plan"]

#: The graphs and kernels made for GPUs, run on the processor: slow, to prove them.
HOST = "host"
CPU = "cpu"
#: Types of the KV cache.
KV_TYPES = ("auto", "f32", "f16", "q8_0")
#: That memory can be planned for.
MAX_SESSIONS = 65536


@dataclass(frozen=True)
class Device:
    """A GPU that this build can compute on. Sizes in bytes, as they were when it was asked for."""

    name: str
    description: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class DeviceShare:
    """What of a model lies on one of its devices: so many layers, and the bytes that they and the rest take.

    ``weight_bytes``; ``cache_bytes`` and ``step_bytes`` (logits, activations, work areas) of all sessions
    that were planned for.
    """

    device: str
    n_layers: int
    weight_bytes: int
    cache_bytes: int
    step_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.cache_bytes + self.step_bytes


@dataclass(frozen=True)
class Plan:
    """What of a model lies on which device, and the bytes that it takes there.

    ``device``: its name, the names of several with commas in between, or "cpu".
    ``n_gpu_layers``: the last so many of ``n_layer`` layers; 0 for none.
    ``n_cpu_moe``: of these the last so many leave their experts to the processor.
    ``shares``: device by device, in the order of their layers; what is in no layer lies on the last.
    """

    device: str
    n_layer: int
    n_gpu_layers: int
    n_cpu_moe: int
    shares: tuple[DeviceShare, ...]

    @property
    def weight_bytes(self) -> int:
        """Of all devices, as the three that follow."""
        return sum(share.weight_bytes for share in self.shares)

    @property
    def cache_bytes(self) -> int:
        """Of all sessions that were planned for, as ``step_bytes``."""
        return sum(share.cache_bytes for share in self.shares)

    @property
    def step_bytes(self) -> int:
        """Logits, activations, work areas."""
        return sum(share.step_bytes for share in self.shares)

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(share.total_bytes for share in self.shares)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        sums = ("weight_bytes", "cache_bytes", "step_bytes", "total_bytes")
        return asdict(self) | {name: getattr(self, name) for name in sums}


def devices() -> list[Device]:
    """The GPUs that this build finds; none where it was built without CUDA, or there is no driver."""
    return [Device(**info) for info in _native.devices()]


def plan(
    path: str | os.PathLike[str],
    n_ctx: int = 8192,
    n_gpu_layers: int | Literal["auto"] = "auto",
    n_cpu_moe: int | None = None,
    device: str = "auto",
    gpu_memory: int | Sequence[int] | None = None,
    kv_type: str = "auto",
    n_sessions: int = 1,
) -> Plan:
    """What ``DiffusionModel`` would put on which device, given the same arguments; nothing is loaded.

    Raises as ``DiffusionModel``.
    """
    wish = native_wish(n_gpu_layers, n_cpu_moe, device, gpu_memory, n_sessions)
    check_kv_type(kv_type)
    found = _native.plan(os.fspath(path), n_ctx=n_ctx, kv_type=kv_type, **wish)
    return Plan(**{**found, "shares": tuple(DeviceShare(**share) for share in found["shares"])})


def check_kv_type(kv_type: str) -> None:
    """Raise ValueError for what is no type, and warn the caller's caller of one that costs quality."""
    if kv_type not in KV_TYPES:
        raise ValueError(f"kv_type is {kv_type!r}; permitted are {', '.join(map(repr, KV_TYPES))}")
    if kv_type == "q8_0":
        warnings.warn(
            "an 8-bit KV cache (q8_0) hurts Gemma 4: others measured a mean KL divergence of 0.377 for its "
            "26B-A4B and of 0.108 for its 31B; f16, the default for quantized files, is the safe choice",
            PyDiffusionWarning,
            stacklevel=3,
        )


def native_wish(
    n_gpu_layers: int | Literal["auto"],
    n_cpu_moe: int | None,
    device: str,
    gpu_memory: int | Sequence[int] | None,
    n_sessions: int = 1,
) -> dict[str, Any]:
    """The arguments in the native layer's form, checked."""
    automatic = n_gpu_layers == "auto"
    if not automatic:
        _check_count("n_gpu_layers", n_gpu_layers, "'auto' or an integer of at least 0")
    if n_cpu_moe is not None:
        _check_count("n_cpu_moe", n_cpu_moe, "None or an integer of at least 0")
    if isinstance(n_sessions, bool) or not isinstance(n_sessions, int) or not 1 <= n_sessions <= MAX_SESSIONS:
        raise ValueError(f"n_sessions is {n_sessions!r}; permitted is an integer from 1 to {MAX_SESSIONS}")
    names = [CPU] if n_gpu_layers == 0 else _names(device)
    if not names and not automatic:
        raise ValueError(
            f"n_gpu_layers is {n_gpu_layers}; there is no GPU here that this build can compute on: "
            "give 0 or 'auto' (docs/gpu.md)"
        )
    return {
        "device": ",".join(names) or CPU,
        "n_gpu_layers": -1 if automatic else n_gpu_layers,
        "n_cpu_moe": -1 if n_cpu_moe is None else n_cpu_moe,
        "memory_limits": _limits(gpu_memory, device, [] if names == [CPU] else names),
        "n_sessions": n_sessions,
    }


def _names(device: str) -> list[str]:
    """The devices that ``device`` stands for, the one last that shall hold what is in no layer."""
    found = devices()
    if device == "auto":  # the freest has room for more than layers
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
