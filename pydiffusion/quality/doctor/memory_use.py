"""Memory of a run. In a module of its own, as the process that measures it imports it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydiffusion import DiffusionModel
from pydiffusion.device_plan import devices


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. process: most that was resident at a time, None where the system does not tell; gpu: taken on
    all GPUs; adapters: what is loaded for them, of the above.
    """

    process: int | None
    gpu: int
    adapters: int = 0


def memory_of_a_run(path: Path, n_prompt: int, n_ctx: int, arguments: dict[str, Any]) -> MemoryUse:
    """Load a model, encode a prompt and run two steps. Call it in a new process. Raises as DiffusionModel."""
    used = _used_on_gpus()
    with DiffusionModel(path, n_ctx=n_ctx, mmproj=None, **arguments) as model:
        session = model.new_session()
        session.encode([token % model.n_vocab for token in range(n_prompt)])
        session.complete(max_tokens=model.canvas_length, steps=2, seed=0)
        adapters = sum(adapter.n_bytes for adapter, _ in model.adapters.current.native)
        return MemoryUse(_most_resident(), _used_on_gpus() - used, adapters)


def _used_on_gpus() -> int:
    return sum(one.total_bytes - one.free_bytes for one in devices())


def _most_resident() -> int | None:
    """By the kernel's count for this program; that of getrusage includes the program that started it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        return None
