"""Read an adapter folder of MLX (mlx-lm, mlx-vlm): ``adapters.safetensors`` and ``adapter_config.json``.

Its model has one stack of layers for both modes, so each pair serves both.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from pydiffusion.adapters.adapter import Adapter, Factors, Target
from pydiffusion.adapters.folder_files import open_tensors
from pydiffusion.adapters.stored import FLOATS, Change, PairRead, Stored, make_adapter, tensor_error
from pydiffusion.convert.architectures.architecture import Matrices
from pydiffusion.convert.checkpoint.strict_json import Fields
from pydiffusion.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.(?:lora_)?(?P<part>[abAB])", re.DOTALL)
_MAX_SCALE = 1e20


def is_mlx(fields: Fields) -> bool:
    """Whether an ``adapter_config.json`` is MLX's, not PEFT's."""
    return "peft_type" not in fields.values and any(
        key in fields.values for key in ("lora_parameters", "fine_tune_type", "rank")
    )


def read_mlx_folder(folder: Path, fields: Fields, matrices: Matrices, name: str) -> Adapter:
    """Read a folder of MLX. Raises AdapterError, naming the file and the tensor or key."""
    kind = fields.string("fine_tune_type", "lora")
    if kind != "lora":
        raise AdapterError(f"{fields.where}: 'fine_tune_type' is {kind!r:.40}; only lora is supported")
    rank, scale, notes = _rank_and_scale(fields)
    pairs: dict[str, dict[str, Stored]] = {}
    for key, tensor in open_tensors(folder).items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dtype not in FLOATS:
            what = "is no lora_a or lora_b" if match is None else f"is stored as {tensor.dtype}"
            raise tensor_error(tensor.path, key, f"{what}: train LoRA alone, and save floats")
        part = match["part"].lower()
        if pairs.setdefault(match["module"], {}).setdefault(part, tensor) is not tensor:
            raise tensor_error(tensor.path, key, "is there twice: save the adapter again")
    changes = [_change(module, pair, rank, scale, matrices) for module, pair in pairs.items()]
    shown = {"format": "MLX", "r": rank, "scale": scale}
    return make_adapter(name, folder, changes, matrices, shown, notes)


def _rank_and_scale(fields: Fields) -> tuple[int, float, list[str]]:
    """Rank, scale and notes. Newer ones say rank and scale, mlx-vlm's older ones rank and alpha."""
    if fields.has("lora_parameters"):
        parameters = fields.object("lora_parameters")
        return (
            parameters.integer("rank", maximum=1 << 16),
            parameters.number("scale", minimum=-_MAX_SCALE, maximum=_MAX_SCALE),
            [],
        )
    rank = fields.integer("rank", maximum=1 << 16)
    note = (
        "its changes are scaled by alpha / rank, as mlx-vlm does now; where an older one trained it, which"
        f" scaled them by alpha, apply it with the scale {rank}"
    )
    alpha = fields.number("alpha", minimum=-_MAX_SCALE, maximum=_MAX_SCALE)
    return rank, alpha / rank, [note] if rank > 1 else []


def _change(module: str, pair: dict[str, Stored], rank: int, scale: float, matrices: Matrices) -> Change:
    found = next(iter(pair.values()))
    for part in "ab":
        if part not in pair:
            raise tensor_error(found.path, found.key, f"has no lora_{part} beside it: save it again")
    a, b = pair["a"], pair["b"]
    path = module.removeprefix("language_model.").removeprefix("model.")
    place = matrices.place(path, shared=True)
    if place is None:
        what = matrices.other(path) or "no matrix of this model"
        raise tensor_error(a.path, a.key, f"changes {what}, which is not supported: train without it")
    matrix = matrices.matrix(place.tensor)
    of_experts = matrix is not None and matrix.of_experts
    wanted = 3 if of_experts else 2
    if len(a.shape) != wanted or len(b.shape) != wanted or 0 in (*a.shape, *b.shape):
        raise tensor_error(
            a.path, a.key, f"is {list(a.shape)}, B {list(b.shape)}; both should have {wanted} dimensions"
        )
    if of_experts:
        shape_a, shape_b, read = a.shape, b.shape, PairRead(a, b)
    else:
        shape_a, shape_b, read = a.shape[::-1], b.shape[::-1], PairRead(a, b, np.transpose, np.transpose)
    if shape_a[-2] != rank:
        raise tensor_error(a.path, a.key, f"is of rank {shape_a[-2]}, but the config says {rank}")
    target = Target(place.tensor, place.side)
    return Change(target, Factors(shape_a, shape_b, scale, read), (a.key, b.key), a.path)
