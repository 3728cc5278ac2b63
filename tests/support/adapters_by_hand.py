"""Adapters made in memory, of random numbers, for any matrices of a model; models that apply adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion import DiffusionModel, Session
from pydiffusion.adapters.adapter import Adapter, Factors, Side, Target

#: Kinds of matrices of a layer that an adapter may change, and of the model.
OF_LAYER = (
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_inp",
    "ffn_gate_up_exps", "ffn_down_exps",
)  # fmt: skip
OF_MODEL = ("self_cond_gate", "self_cond_up", "self_cond_down")


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


def random_adapter(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int = 4,
    seed: int = 0,
    side: Side = "both",
    kinds: Iterable[str] = (*OF_LAYER, *OF_MODEL),
    name: str = "by hand",
) -> Adapter:
    """An adapter of all matrices of these kinds. shapes: tensor's name in a GGUF -> shape in C order."""
    wanted = set(kinds)
    factors = {}
    for i, (tensor, shape) in enumerate(sorted(shapes.items())):
        bare = tensor.removesuffix(".weight")
        kind = bare.rpartition(".")[2]
        if bare != tensor and kind in wanted:
            factors[Target(bare, "decoder" if kind in OF_MODEL else side)] = factors_of(
                shape, rank, 1000 * seed + i
            )
    return adapter_of(factors, name)


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
