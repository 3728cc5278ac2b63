"""Read and write adapters as GGUF, in llama.cpp's format with names of our own for a mode's own sets.

``blk.3.attn_q.weight.lora_a`` is (r, n_in) in C order, ``.lora_b`` (n_out, r), of experts with a dimension
before; the scale is ``adapter.lora.alpha`` / r. A tensor serves both modes. With ``enc.`` before its name it
is the encoder's alone, with ``dec.`` the decoder's; llama.cpp refuses such a file, since it has one mode.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pydiffusion.adapters.adapter import Adapter, Factors, Side, Target
from pydiffusion.adapters.stored import (
    Change,
    PairRead,
    Stored,
    adapter_errors,
    has_no_effect,
    make_adapter,
    stamp,
    tensor_error,
)
from pydiffusion.convert.architectures.architecture import Matrices
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.reader import Parts, open_parts
from pydiffusion.convert.gguf.writer import Job, PlannedTensor, run
from pydiffusion.errors import AdapterError

ALPHA = "adapter.lora.alpha"
_TYPE, _INVOCATION = "adapter.type", "adapter.alora.invocation_tokens"
_NAME = re.compile(r"(?P<side>enc\.|dec\.)?(?P<tensor>.+)\.weight\.lora_(?P<part>[ab])", re.DOTALL)
_SIDES: dict[str | None, Side] = {None: "both", "enc.": "encoder", "dec.": "decoder"}
_PREFIXES = {side: prefix or "" for prefix, side in _SIDES.items()}
_MAX_ALPHA = 1e30
TYPES = ("auto", "f32", "f16", "bf16")
_READ = ("F32", "F16", "BF16", "Q8_0")  # as llama.cpp's converter writes them


def read_adapter_gguf(path: Path, matrices: Matrices, name: str = "") -> Adapter:
    """Read a GGUF of an adapter.

    matrices: of the model that it is for. name: for people; empty: the file's own, or its path's.
    Raises AdapterError, naming the file and the tensor or key.
    """
    with adapter_errors(path):
        parts = open_parts(path)
        keys = parts.metadata
        notes: list[str] = []
        alpha = _check_keys(path, keys, matrices, notes)
        own = keys.get("general.name")
        name = name or (own if isinstance(own, str) and own.strip() else path.stem)
        changes = list(_changes(parts, alpha, matrices, notes))
        return make_adapter(name, path, changes, matrices, {"format": "GGUF", "lora_alpha": alpha}, notes)


def _check_keys(path: Path, keys: dict[str, Any], matrices: Matrices, notes: list[str]) -> float:
    """Check what kind of GGUF it is; returns its alpha, 0 for scales of 1 as llama.cpp takes it."""

    def error(key: str, what: str) -> AdapterError:
        return AdapterError(f"{path}: key {key!r} {what}")

    if keys.get("general.type") != "adapter":
        kind = keys.get("general.type", "missing")
        raise error("general.type", f"is {kind!r:.40}, not 'adapter': it is a model: give it with -m")
    if keys.get(_TYPE) != "lora":
        raise error(_TYPE, f"is {keys.get(_TYPE, 'missing')!r:.40}; only 'lora' is supported")
    architecture = keys.get("general.architecture")
    if architecture != matrices.architecture:
        raise error(
            "general.architecture",
            f"is {architecture!r:.60}, the model's {matrices.architecture!r}: it is for another model",
        )
    if _INVOCATION in keys:
        raise error(_INVOCATION, "asks for Activated LoRA, which is not supported: train without it")
    alpha = keys.get(ALPHA, 0.0)
    if type(alpha) not in (int, float) or not abs(alpha) <= _MAX_ALPHA:
        raise error(ALPHA, f"is {alpha!r:.40}; it should be a number")
    if alpha == 0:
        notes.append(f"{ALPHA} is {'0' if ALPHA in keys else 'missing'}: its factors are not scaled")
    return float(alpha)


def _changes(parts: Parts, alpha: float, matrices: Matrices, notes: list[str]) -> Iterator[Change]:
    paths = parts.paths
    stamps = [stamp(path) for path in paths]
    pairs: dict[tuple[str, str | None], dict[str, Stored]] = {}
    for info in parts.tensors:
        key, file = str(info.name), paths[info.part]
        match = _NAME.fullmatch(key)
        if match is None:
            raise tensor_error(file, key, "is no lora_a or lora_b of a weight: it is no LoRA of a matrix")
        if info.type.upper() not in _READ:
            raise tensor_error(file, key, f"is stored as {info.type}; supported are {', '.join(_READ)}")
        stored = Stored(key, file, info.offset, info.n_bytes, info.type, tuple(info.shape), stamps[info.part])
        pairs.setdefault((match["tensor"], match["side"]), {})[match["part"]] = stored
    for (tensor, prefix), pair in pairs.items():
        found = next(iter(pair.values()))
        for part in "ab":
            if part not in pair:
                raise tensor_error(found.path, found.key, f"has no lora_{part} beside it: save it again")
        side = _SIDES[prefix]
        if side == "both" and not matrices.is_used(tensor, "encoder"):
            side = "decoder"
        elif side == "both" and (tensor, "enc.") in pairs and (tensor, "dec.") not in pairs:
            side = "decoder"  # as in files that mark the encoder's sets only
        if matrices.matrix(tensor) is None and _is_left_out(tensor, pair, matrices, notes):
            continue
        yield _change(Target(tensor, side), pair["a"], pair["b"], alpha)


def _is_left_out(tensor: str, pair: dict[str, Stored], matrices: Matrices, notes: list[str]) -> bool:
    """Whether a tensor that can't be adapted was not trained; a missing one of the model is refused."""
    if matrices.missing(tensor) or not has_no_effect(pair["a"], pair["b"]):
        return False
    notes.append(f"{tensor} was not trained, and is left out")
    return True


def _change(target: Target, a: Stored, b: Stored, alpha: float) -> Change:
    rank = a.shape[-2] if len(a.shape) > 1 else 0
    scale = alpha / rank if alpha and rank else 1.0
    return Change(target, Factors(a.shape, b.shape, scale, PairRead(a, b)), (a.key, b.key), a.path)


def write_adapter_gguf(
    adapter: Adapter, target: Path, matrices: Matrices, *, type: str = "auto", overwrite: bool = True
) -> None:
    """Write an adapter as GGUF, and read it back. Scales other than the common alpha / r go into B.

    matrices: of its model, of any size (``matrices_of(None)``) or of a known one.
    type: f32, f16, bf16, or auto: for each tensor the smallest of these that holds its values exactly.
    Raises AdapterError if it can't be written, ValueError for another type.
    """
    if type not in TYPES:
        raise ValueError(f"type is {type!r:.40}; permitted are {', '.join(TYPES)}")
    alpha = _common_alpha(adapter)
    metadata = {
        "general.architecture": Value("str", matrices.architecture),
        "general.type": Value("str", "adapter"),
        "general.name": Value("str", adapter.name),
        _TYPE: Value("str", "lora"),
        ALPHA: Value("f32", alpha),
    }
    read = lru_cache(maxsize=1)(_scaled)  # tensors are written, and read back, in pieces
    tensors = [tensor for item in adapter.factors.items() for tensor in _planned(*item, alpha, type, read)]
    job = Job(
        source=adapter.path,
        source_files=[adapter.path],
        target=target,
        type=type,
        metadata=metadata,
        tensors=tensors,
        fallbacks=[],
        notes=[],
        n_threads=1,
        overwrite=overwrite,
        progress=None,
    )
    with adapter_errors(target):
        run(job, time.perf_counter())


def _common_alpha(adapter: Adapter) -> float:
    """The alpha that most factors have, as the float32 that is written; never 0, which means no scale."""
    counts = Counter(float(np.float32(factors.scale * factors.rank)) for factors in adapter.factors.values())
    counts.pop(0.0, None)
    return counts.most_common(1)[0][0] if counts else 1.0


_Read: TypeAlias = "Callable[[Factors, float], tuple[np.ndarray, np.ndarray]]"


def _planned(
    target: Target, factors: Factors, alpha: float, type_name: str, read: _Read
) -> Iterator[PlannedTensor]:
    is_common = float(np.float32(factors.scale * factors.rank)) == alpha
    more = 1.0 if is_common else factors.scale * factors.rank / alpha
    shapes = (factors.shape_a, factors.shape_b)
    pair = read(factors, more)
    for i, (part, shape) in enumerate(zip("ab", shapes, strict=True)):
        name = f"{_PREFIXES[target.side]}{target.tensor}.weight.lora_{part}"
        type_of = smallest_type(pair[i]) if type_name == "auto" else type_name.upper()
        yield PlannedTensor(name, shape, "F32", type_of, partial(_read_bytes, read, factors, more, i), shape)


def _scaled(factors: Factors, more: float) -> tuple[np.ndarray, np.ndarray]:
    a, b = factors.read()
    return a, b if more == 1.0 else b * np.float32(more)


def _read_bytes(read: _Read, factors: Factors, more: float, i: int, start: int, n_bytes: int) -> np.ndarray:
    data = np.ascontiguousarray(read(factors, more)[i], np.float32).reshape(-1).view(np.uint8)
    return data[start : start + n_bytes]


def smallest_type(values: np.ndarray) -> str:
    """The smallest of BF16, F16 and F32 that holds float32 values exactly."""
    if not (values.view(np.uint32) & 0xFFFF).any():
        return "BF16"
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    return "F16" if np.array_equal(halves.astype(np.float32), values) else "F32"
