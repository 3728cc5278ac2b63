"""Adapters made in memory, of random numbers, for any matrices of a model; models that apply adapters."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from pydiffusion import DiffusionModel, Session
from pydiffusion.adapters.adapter import Adapter, Factors, Side, Target

#: Kinds of matrices that an adapter may change.
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
DENSE = ("ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
ROUTER = ("ffn_gate_inp",)
SELF_CONDITIONING = ("self_cond_gate", "self_cond_up", "self_cond_down")
EVERYTHING = (*ATTENTION, *DENSE, *EXPERTS, *ROUTER, *SELF_CONDITIONING)

#: (tensor, side, a, b), as the native adapter takes them.
NativeTarget = tuple[str, str, np.ndarray, np.ndarray]


def factors_of(
    shape: tuple[int, ...], rank: int, seed: int, *, scale: float = 0.5, share: float = 0.3
) -> Factors:
    """Factors of a matrix of this shape (C order) whose change is ``share`` of a random matrix's size."""
    random = np.random.default_rng(seed)
    n_out, n_in = shape[-2:]
    a = random.standard_normal((*shape[:-2], rank, n_in)).astype(np.float32)
    b = random.standard_normal((*shape[:-2], n_out, rank)).astype(np.float32)
    b *= np.float32(share / scale / (rank * n_in) ** 0.5)
    return given(a, b, scale)


def given(a: np.ndarray, b: np.ndarray, scale: float = 1.0) -> Factors:
    """Factors of these arrays."""
    return Factors(a.shape, b.shape, scale, lambda: (a, b))


def adapter_of(factors: Mapping[Target, Factors], name: str = "by hand", path: Path | None = None) -> Adapter:
    """An adapter of these factors."""
    digest = hashlib.sha256(name.encode())
    for target, one in factors.items():
        digest.update(f"{target}{one.scale}".encode())
        for array in one.read():
            digest.update(array.tobytes())
    return Adapter(name, Path(name) if path is None else path, dict(factors), digest.digest())


def blank_adapter(name: str) -> Adapter:
    """One that changes nothing: for tests of what chooses adapters."""
    return Adapter(name, Path("adapters") / name, {}, os.fsencode(name).ljust(32, b"."))


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's matrices that can be adapted, by name without ".weight", in C order."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        name = tensor.name.removesuffix(".weight")
        if name != tensor.name and name.split(".")[-1] in EVERYTHING:
            found[name] = tuple(int(n) for n in reversed(tensor.shape))
    return found


def random_adapter(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int = 4,
    seed: int = 0,
    side: Side = "both",
    kinds: Iterable[str] = EVERYTHING,
    share: float = 0.3,
    name: str = "by hand",
) -> Adapter:
    """An adapter of all matrices of these kinds.

    shapes: tensor's name in a GGUF, with ".weight" or without -> shape in C order; all of a file's, so that a
        matrix's values depend on the seed alone. share: of its changes, see ``factors_of``.
    """
    wanted = set(kinds)
    factors = {}
    for i, (tensor, shape) in enumerate(sorted(shapes.items())):
        bare = tensor.removesuffix(".weight")
        kind = bare.rpartition(".")[2]
        if kind not in wanted or (side == "encoder" and kind in SELF_CONDITIONING):
            continue
        target = Target(bare, "decoder" if kind in SELF_CONDITIONING else side)
        factors[target] = factors_of(shape, rank, 1000 * seed + i, share=share)
    return adapter_of(factors, name)


def random_targets(
    path: Path,
    seed: int,
    rank: int = 4,
    kinds: Iterable[str] = EVERYTHING,
    side: Side = "both",
    share: float = 0.2,
) -> Iterator[NativeTarget]:
    """Changes of a file's matrices of these kinds."""
    made = random_adapter(shapes_of(path), rank=rank, seed=seed, side=side, kinds=kinds, share=share)
    yield from made.scaled()


def merge(path: Path, changes: Iterable[tuple[Iterable[NativeTarget], float]], target: Path) -> Path:
    """A copy of an F32 file with the changes added to its matrices, whichever side they are of."""
    shutil.copyfile(path, target)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(target, "r+").tensors}
    for targets, scale in changes:
        for name, _, a, b in targets:
            delta = scale * np.matmul(b.astype(np.float64), a.astype(np.float64))
            data = tensors[f"{name}.weight"]
            data[...] = (data + delta.reshape(data.shape)).astype(np.float32)
    return target


#: A prompt longer than the window of the shape "small", and options of a short generation.
IDS = np.random.default_rng(7).integers(3, 200, 40).astype(np.int32)
SHORT: dict[str, Any] = {"max_tokens": 16, "steps": 3, "seed": 5, "eos": ()}


def opened(path: Path, **arguments: Any) -> DiffusionModel:
    """Cache float32 and one thread, so that equal means equal to the bit."""
    return DiffusionModel(path, n_ctx=256, n_threads=1, kv_type="f32", mmproj=None, **arguments)


def logits(session: Session) -> np.ndarray:
    """Of a canvas of 0, 1, 2 ... after what the session has: (canvas length, n_vocab)."""
    return session.denoise(np.arange(session.model.canvas_length, dtype=np.int32))


def fresh_logits(model: DiffusionModel, lora: Any = None) -> np.ndarray:
    """Of a new session that has read ``IDS``."""
    session = model.new_session(lora=lora)
    session.encode(IDS)
    return logits(session)
