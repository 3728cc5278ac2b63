"""Tensor map: names in a checkpoint, names in a GGUF, and shapes.

Shapes are in C order, as in numpy and safetensors; a GGUF stores them reversed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydiffusion.convert.architectures.diffusion_gemma.config import TextConfig
from pydiffusion.errors import ConversionError

DECODER = "decoder."
ENCODER = "encoder.language_model."
VISION = ("encoder.vision_tower.", "encoder.embed_vision.")
LM_HEAD = "lm_head.weight"
EMBEDDING = "decoder.embed_tokens.weight"

# Dimensions by name: d hidden size, v vocabulary, ff dense width, q and kv the widths of a layer's queries
# and keys, h its head size, e experts, xf an expert's width, 2xf gate and up of an expert in one.
_GLOBAL = (
    ("decoder.embed_tokens.weight", "token_embd.weight", ("v", "d")),
    ("decoder.self_conditioning.pre_norm.weight", "self_cond_pre_norm.weight", ("d",)),
    ("decoder.self_conditioning.gate_proj.weight", "self_cond_gate.weight", ("ff", "d")),
    ("decoder.self_conditioning.up_proj.weight", "self_cond_up.weight", ("ff", "d")),
    ("decoder.self_conditioning.down_proj.weight", "self_cond_down.weight", ("d", "ff")),
)
_LAYER = (
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
    ("post_feedforward_layernorm_1.weight", "post_ffw_norm_1.weight", ("d",)),
    ("pre_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight", ("d",)),
    ("router.proj.weight", "ffn_gate_inp.weight", ("e", "d")),
    ("router.scale", "ffn_gate_inp.scale", ("d",)),
    ("experts.gate_up_proj", "ffn_gate_up_exps.weight", ("e", "2xf", "d")),
    ("experts.down_proj", "ffn_down_exps.weight", ("e", "d", "xf")),
    ("router.per_expert_scale", "ffn_down_exps.scale", ("e",)),
    ("post_feedforward_layernorm_2.weight", "post_ffw_norm_2.weight", ("d",)),
    ("post_feedforward_layernorm.weight", "post_ffw_norm.weight", ("d",)),
    ("layer_scalar", "layer_output_scale.weight", ("1",)),
)
_SEPARATE_EXPERTS = ("ffn_gate_exps", "ffn_up_exps")

LAYER_KINDS = frozenset(name.removesuffix(".weight") for _, name, _ in _LAYER) | {
    "enc_layer_output_scale",
    *_SEPARATE_EXPERTS,
}
GLOBAL_KINDS = frozenset(name.removesuffix(".weight") for _, name, _ in _GLOBAL) | {
    "output_norm",
    "output",
    "rope_freqs",
}
# Norms, scales, scalars, the router and rope_freqs are stored as F32.
FLOAT32_KINDS = frozenset(
    {name.removesuffix(".weight") for _, name, shape in (*_LAYER, *_GLOBAL) if len(shape) == 1}
    | {"ffn_gate_inp", "enc_layer_output_scale", "output_norm", "rope_freqs"}
)


@dataclass(frozen=True)
class Wanted:
    """A required tensor: its checkpoint name ``source`` and its GGUF name ``name``."""

    source: str
    name: str
    shape: tuple[int, ...]


def wanted_tensors(config: TextConfig) -> list[Wanted]:
    """All tensors of the text model, in GGUF order."""
    sizes = {"1": 1, "d": config.hidden_size, "v": config.vocab_size, "ff": config.intermediate_size}
    sizes |= {
        "e": config.num_experts,
        "xf": config.moe_intermediate_size,
        "2xf": 2 * config.moe_intermediate_size,
    }
    wanted = [Wanted(source, name, tuple(sizes[size] for size in shape)) for source, name, shape in _GLOBAL]
    for i_layer, sliding in enumerate(config.sliding):
        head_dim = config.head_dim if sliding else config.global_head_dim
        sizes |= {"h": head_dim, "q": config.num_attention_heads * head_dim}
        sizes |= {"kv": config.num_key_value_heads[i_layer] * head_dim}
        for source, name, shape in _LAYER:
            if name == "attn_v.weight" and not sliding:
                continue  # full layers use K as V
            full_shape = tuple(sizes[size] for size in shape)
            wanted.append(Wanted(f"{DECODER}layers.{i_layer}.{source}", f"blk.{i_layer}.{name}", full_shape))
        encoder_scalar = f"{ENCODER}layers.{i_layer}.layer_scalar"
        wanted.append(Wanted(encoder_scalar, f"blk.{i_layer}.enc_layer_output_scale.weight", (1,)))
    wanted.append(Wanted("decoder.norm.weight", "output_norm.weight", (config.hidden_size,)))
    return wanted


def encoder_twin(source: str) -> str | None:
    """The encoder's name for a weight shared with the decoder; None if it is not shared."""
    if not source.startswith(DECODER) or source.endswith(".layer_scalar") or ".self_conditioning." in source:
        return None
    return ENCODER + source.removeprefix(DECODER)


def split_name(name: str) -> tuple[str, int | None]:
    """Split a GGUF name: ``blk.3.attn_q.weight`` -> (``attn_q``, 3); ``token_embd.weight`` ->
    (``token_embd``, None).

    Raises ConversionError for a name that does not belong to this architecture.
    """
    match = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,5})\.)?(.+)", name, re.DOTALL)
    if match is None:
        raise ConversionError("a tensor without a name: not a valid GGUF of diffusion-gemma")
    layer = None if match[1] is None else int(match[1])
    kind = match[2].removesuffix(".weight")
    if kind not in (GLOBAL_KINDS if layer is None else LAYER_KINDS):
        raise ConversionError(f"unexpected tensor {name!r}: diffusion-gemma has no tensor of this name")
    return kind, layer
