"""Tensor map: names in a checkpoint, names in a GGUF, and shapes."""

from __future__ import annotations

from pydiffusion.convert.checkpoint.tensor_map import Table, TensorKinds, Wanted, wanted

# Dimensions by name: d hidden size, v vocabulary, ff feed-forward, q and kv the widths of queries and keys,
# h head.
_MODEL: Table = (
    ("embed_tokens.weight", "token_embd.weight", ("v", "d")),
    ("self_conditioning.norm.weight", "self_cond_pre_norm.weight", ("d",)),
    ("self_conditioning.proj.weight", "self_cond_proj.weight", ("d", "d")),
    ("norm.weight", "output_norm.weight", ("d",)),
    ("lm_head.weight", "output.weight", ("v", "d")),
)
_LAYER: Table = (
    ("input_layernorm.weight", "attn_norm.weight", ("d",)),
    ("self_attn.q_proj.weight", "attn_q.weight", ("q", "d")),
    ("self_attn.k_proj.weight", "attn_k.weight", ("kv", "d")),
    ("self_attn.v_proj.weight", "attn_v.weight", ("kv", "d")),
    ("self_attn.o_proj.weight", "attn_output.weight", ("d", "q")),
    ("self_attn.q_norm.weight", "attn_q_norm.weight", ("h",)),
    ("self_attn.k_norm.weight", "attn_k_norm.weight", ("h",)),
    ("post_attention_layernorm.weight", "post_attention_norm.weight", ("d",)),
    ("pre_feedforward_layernorm.weight", "ffn_norm.weight", ("d",)),
    ("mlp.gate_proj.weight", "ffn_gate.weight", ("ff", "d")),
    ("mlp.up_proj.weight", "ffn_up.weight", ("ff", "d")),
    ("mlp.down_proj.weight", "ffn_down.weight", ("d", "ff")),
    ("post_feedforward_layernorm.weight", "post_ffw_norm.weight", ("d",)),
)
KINDS = TensorKinds.from_tables("masked-toy", _MODEL, _LAYER)


def wanted_tensors(sizes: dict[str, int], n_layers: int) -> list[Wanted]:
    """All tensors, in GGUF order."""
    tensors = wanted(_MODEL, sizes)
    for i_layer in range(n_layers):
        tensors += wanted(_LAYER, sizes, f"layers.{i_layer}.", f"blk.{i_layer}.")
    return tensors
