"""Read a GGUF with the ``gguf`` package alone and give its weights under checkpoint names, dequantized.

This is the tests' own map of names, written apart from the converter's, so that a mistake there shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

_TOP = {
    "token_embd.weight": "model.decoder.embed_tokens.weight",
    "output_norm.weight": "model.decoder.norm.weight",
    "self_cond_pre_norm.weight": "model.decoder.self_conditioning.pre_norm.weight",
    "self_cond_gate.weight": "model.decoder.self_conditioning.gate_proj.weight",
    "self_cond_up.weight": "model.decoder.self_conditioning.up_proj.weight",
    "self_cond_down.weight": "model.decoder.self_conditioning.down_proj.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "layer_output_scale.weight": "layer_scalar",
}

_ROWS = 4096


def checkpoint_name(name: str) -> str | None:
    """The checkpoint's name of a GGUF tensor; None for ``rope_freqs`` (config there)."""
    if name == "rope_freqs.weight":
        return None
    if name in _TOP:
        return _TOP[name]
    if match := re.fullmatch(r"blk\.(\d+)\.enc_layer_output_scale\.weight", name):
        return f"model.encoder.language_model.layers.{match[1]}.layer_scalar"
    if match := re.fullmatch(r"blk\.(\d+)\.(.+)", name):
        return f"model.decoder.layers.{match[1]}.{_LAYER[match[2]]}"
    raise KeyError(f"no checkpoint tensor is called {name} in a GGUF")


def read_dequantized(path: Path) -> dict[str, np.ndarray]:
    """Every weight of the file as float32 in the checkpoint's shape, by the checkpoint's name."""
    return dict(dequantized_tensors(path))


def dequantized_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The same one at a time, with memory for one tensor."""
    for tensor in gguf.GGUFReader(path).tensors:
        name = checkpoint_name(tensor.name)
        if name is not None:
            yield name, _dequantized(tensor)


def _dequantized(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Row by row group: the package's function takes three times a result's memory."""
    out = np.empty(tuple(int(n) for n in reversed(tensor.shape)), np.float32)
    rows, data = out.reshape(-1, out.shape[-1]), tensor.data.reshape(-1, tensor.data.shape[-1])
    for begin in range(0, len(rows), _ROWS):
        piece = data[begin : begin + _ROWS]
        rows[begin : begin + _ROWS] = gguf.quants.dequantize(piece, tensor.tensor_type)
    return out


def without_padding(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A weight without the rows and columns that pad feed-forward lengths, which have to be zeros."""
    if name.endswith("gate_up_proj"):  # gate and up of an expert, padded each
        halves = values.reshape(len(values), 2, -1, values.shape[-1])
        cut = halves[:, :, : shape[1] // 2].reshape(shape)
    else:
        cut = values[tuple(slice(n) for n in shape)]
    if np.count_nonzero(cut) != np.count_nonzero(values):
        raise ValueError(f"{name}: {values.shape} is padded to from {shape} by other numbers than zeros")
    return cut


def tensor_types(path: Path) -> dict[str, str]:
    """Type name of every tensor, by its GGUF name."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
