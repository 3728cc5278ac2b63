"""Write an adapter as a folder that PEFT loads onto transformers' own class."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion._util.atomic import explaining, replacing
from pydiffusion.adapters.adapter import Adapter, Factors, Side, Target
from pydiffusion.adapters.folder_files import CONFIG, WEIGHTS
from pydiffusion.adapters.gguf_file import smallest_type
from pydiffusion.adapters.stored import adapter_errors
from pydiffusion.convert.architectures.architecture import Matrices
from pydiffusion.errors import AdapterError

_BASE, _MODEL = "base_model.model.", "model."
_PARAMETERS = ("gate_up_proj", "down_proj")
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class _Pair:
    """A pair to write. path: of the module or parameter in the model. module: of the keys."""

    path: str
    module: str
    factors: Factors
    is_parameter: bool

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """A and B, in PEFT's shapes, float32."""
        a, b = self.factors.read()
        if not self.is_parameter:
            return a, b
        n_experts, rank, n_in = a.shape
        return a.reshape(n_experts * rank, n_in), b.transpose(1, 2, 0).reshape(b.shape[1], rank * n_experts)


def write_peft_folder(adapter: Adapter, folder: Path, matrices: Matrices, *, overwrite: bool = True) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``; the folder is made if need be.

    A set for both modes is written twice, once for each, since transformers has one module for each. Values
    are written in the smallest of BF16, F16 and F32 that holds them exactly.
    Raises AdapterError if it can't be written, or has what PEFT has no place for, naming the tensor.
    """
    pairs = list(_pairs(adapter, matrices))
    with adapter_errors(folder), explaining(folder, "can't be written"):
        if folder.exists() and not folder.is_dir():
            raise AdapterError(f"{folder}: is a file; give the name of a folder to write")
        for name in (WEIGHTS[0], CONFIG):
            if (folder / name).exists() and not overwrite:
                raise AdapterError(f"{folder / name}: already exists; remove it or allow overwriting")
        folder.mkdir(exist_ok=True)
        _write_tensors(folder / WEIGHTS[0], pairs)
        with replacing(folder / CONFIG) as file:
            file.write((json.dumps(_config(adapter, pairs), indent=2) + "\n").encode())


def _pairs(adapter: Adapter, matrices: Matrices) -> Iterator[_Pair]:
    targets = {(target.tensor, side) for target in adapter.factors for side in _sides(target, matrices)}
    for target, factors in adapter.factors.items():
        matrix = matrices.matrix(target.tensor)
        for side in _sides(target, matrices):
            path = _MODEL + matrices.module(target.tensor, side)
            if matrix is None or not matrix.of_experts:
                yield _Pair(path, path, factors, False)
                continue
            module, _, parameter = path.rpartition(".")
            if parameter not in _PARAMETERS:
                raise AdapterError(
                    f"{adapter.path}: tensor {target.tensor!r}: PEFT has no place for half of gate_up_proj"
                )
            down = target.tensor.replace("gate_up", "down")
            is_inner = parameter == _PARAMETERS[0] and (down, side) in targets
            yield _Pair(path, f"{module}.base_layer" if is_inner else module, factors, True)


def _sides(target: Target, matrices: Matrices) -> tuple[Side, ...]:
    """The modules of transformers that a target is written for."""
    return ("encoder", "decoder") if target.side == "both" else (target.side,)


def _config(adapter: Adapter, pairs: list[_Pair]) -> Mapping[str, Any]:
    settings = {pair.path: (pair.factors.rank, _alpha(pair.factors)) for pair in pairs}
    rank, alpha = Counter(settings.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.metadata.get("base_model_name_or_path"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: own for path, (own, _) in settings.items() if own != rank},
        "alpha_pattern": {path: own for path, (_, own) in settings.items() if own != alpha},
        "target_modules": [pair.path for pair in pairs if not pair.is_parameter],
        "target_parameters": [pair.path for pair in pairs if pair.is_parameter] or None,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _alpha(factors: Factors) -> float | int:
    alpha = factors.scale * factors.rank
    return int(alpha) if alpha.is_integer() else alpha


def _write_tensors(path: Path, pairs: list[_Pair]) -> None:
    """A safetensors file, a pair in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for pair in pairs:
        for part, values in zip("AB", pair.arrays(), strict=True):
            dtype = smallest_type(values)
            begin, end = end, end + values.size * _BYTES[dtype]
            name = f"{_BASE}{pair.module}.lora_{part}.weight"
            header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    entries = iter(entry for name, entry in header.items() if name != "__metadata__")
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for pair in pairs:
            for values in pair.arrays():
                file.write(_as_bytes(values, next(entries)["dtype"]))


def _as_bytes(values: np.ndarray, dtype: str) -> bytes:
    """float32 in one of the types that hold it exactly, little-endian."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()
