"""Adapters for tests of what uses them: random ones in files as llama.cpp's converter writes them, with its
`gguf` package, and one that changes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np

from pydiffusion import _native
from pydiffusion.adapters.adapter import Adapter

_TARGETS = ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def blank_adapter(name: str) -> Adapter:
    return Adapter(name, Path("adapters") / name, {}, os.fsencode(name).ljust(32, b"."))


def write_adapter(path: Path, model: Path, seed: int, *, rank: int = 4, strength: float = 1.0) -> Path:
    """A set for both modes, of attention and the dense part of every layer.

    strength: of the changes, as a share of the matrices' own size.
    """
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * rank)
    for tensor in _native.GgufFile(str(model)).tensors:
        parts = str(tensor.name).split(".")
        if parts[0] != "blk" or parts[2] not in _TARGETS or parts[3] != "weight":
            continue
        n_out, n_in = tensor.shape
        a = random.normal(0, n_in**-0.5, (rank, n_in)).astype(np.float32)
        b = random.normal(0, 0.5 * strength * rank**-0.5, (n_out, rank)).astype(np.float32)
        writer.add_tensor(f"{tensor.name}.lora_a", a)
        writer.add_tensor(f"{tensor.name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
