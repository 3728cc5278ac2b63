"""Random adapters of a small model: as objects, and as a PEFT folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pydiffusion.adapters.adapter import Adapter, Factors, Side, Target

from .native_adapters import random_targets

_RANK = 4
_MODULES = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj"}


def random_adapter(model: Path, seed: int, kinds: Iterable[str] = ("attn_q", "ffn_down", "self_cond_up"),
                   side: Side = "both", size: float = 1.0) -> Adapter:  # fmt: skip
    """An adapter in memory. size: of its changes; 1: a tenth of the activations' own."""
    factors = {
        Target(tensor, its): Factors(a.shape, b.shape, 0.5, partial(_pair, a, 2 * size * b))  # type: ignore[arg-type]
        for tensor, its, a, b in random_targets(model, seed, _RANK, kinds, side)
    }
    known = f"{model} {seed} {sorted(kinds)} {side} {size}"
    return Adapter(f"random-{seed}", model, factors, hashlib.sha256(known.encode()).digest())


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return a, b


def write_peft_folder(folder: Path, model: Path, seed: int) -> Path:
    """An adapter of queries and attention outputs, one set for both modes, as NeMo writes it."""
    tensors = {}
    for tensor, _, a, b in random_targets(model, seed, _RANK, _MODULES):
        _, layer, kind = tensor.split(".")
        key = f"base_model.model.model.layers.{layer}.{_MODULES[kind]}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": ["q_proj", "o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
