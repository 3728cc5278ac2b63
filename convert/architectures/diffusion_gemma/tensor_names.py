"""Tensor map: names in a checkpoint, names in a GGUF, and shapes."""

from __future__ import annotations

from pydiffusion.convert.architectures.diffusion_gemma.config import TextConfig
from pydiffusion.convert.checkpoint.tensor_map import Table, TensorKinds, Wanted, shapes_of, wanted

ARCHITECTURE = "diffusion-gemma"
# A bare DiffusionGemmaModel is saved without the prefix that the full model has.
PREFIX = "model."
DECODER = "decoder."
ENCODER = "encoder.language_model."
VISION = ("encoder.vision_tower.", "encoder.embed_vision.")
LM_HEAD = "lm_head.weight"
EMBEDDING = "decoder.embed_tokens.weight"

# Dimensions by name: d hidden size, v vocabulary, ff dense width, q and kv the widths of a layer's queries
# and keys, h its head size, e experts, xf an expert's width, 2xf gate and up of an expert in one.
GLOBAL: Table = (
    ("decoder.embed_tokens.weight", "token_embd.weight", ("v", "d")),
    ("decoder.self_conditioning.pre_norm.weight", "self_cond_pre_norm.weight", ("d",)),
    ("decoder.self_conditioning.gate_proj.weight", "self_cond_gate.weight", ("ff", "d")),
    ("decoder.self_conditioning.up_proj.weight", "self_cond_up.weight", ("ff", "d")),
    ("decoder.self_conditioning.down_proj.weight", "self_cond_down.weight", ("d", "ff")),
)
LAYER: Table = (
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
# Beside a matrix may be the scale of its matmuls' results, one number or one per expert, and that of its
# activations: llama.cpp writes both for NVFP4. ffn_down_exps.scale is the router's and takes in the experts'.
_WITH_SCALES_OF_MODEL = ("token_embd", "output", "self_cond_gate", "self_cond_up", "self_cond_down")
_WITH_SCALES_OF_LAYER = (
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
    "ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
)  # fmt: skip
_SCALES_OF_MODEL = tuple(f"{kind}.{of}" for kind in _WITH_SCALES_OF_MODEL for of in ("scale", "input_scale"))
_SCALES_OF_LAYER = tuple(f"{kind}.{of}" for kind in _WITH_SCALES_OF_LAYER for of in ("scale", "input_scale"))
# Those without a row here: the decoder's final norm, which comes last in a file; the output head of an untied
# model; the encoder's scalar, whose name in a checkpoint is the encoder's; gate and up of experts in two
# matrices, which other converters write.
KINDS = TensorKinds.from_tables(
    ARCHITECTURE,
    GLOBAL,
    LAYER,
    more_of_model=("output_norm", "output", "rope_freqs", *_SCALES_OF_MODEL),
    more_of_layer=("enc_layer_output_scale", "ffn_gate_exps", "ffn_up_exps", *_SCALES_OF_LAYER),
    more_float32=(
        "ffn_gate_inp",
        "enc_layer_output_scale",
        "output_norm",
        "rope_freqs",
        *_SCALES_OF_MODEL,
        *_SCALES_OF_LAYER,
    ),
)


def wanted_tensors(config: TextConfig) -> list[Wanted]:
    """All tensors of the text model, in GGUF order."""
    sizes = {"1": 1, "d": config.hidden_size, "v": config.vocab_size, "ff": config.intermediate_size}
    sizes |= {
        "e": config.num_experts,
        "xf": config.moe_intermediate_size,
        "2xf": 2 * config.moe_intermediate_size,
    }
    tensors = wanted(GLOBAL, sizes)
    for i_layer, sliding in enumerate(config.sliding):
        head_dim = config.head_dim if sliding else config.global_head_dim
        sizes |= {"h": head_dim, "q": config.num_attention_heads * head_dim}
        sizes |= {"kv": config.num_key_value_heads[i_layer] * head_dim}
        # Full layers use K as V.
        table = [row for row in LAYER if sliding or row[1] != "attn_v.weight"]
        tensors += wanted(table, sizes, f"{DECODER}layers.{i_layer}.", f"blk.{i_layer}.")
        encoder_scalar = f"{ENCODER}layers.{i_layer}.layer_scalar"
        tensors.append(Wanted(encoder_scalar, f"blk.{i_layer}.enc_layer_output_scale.weight", (1,)))
    tensors.append(Wanted("decoder.norm.weight", "output_norm.weight", (config.hidden_size,)))
    return tensors


def rope_divisors_shape(config: TextConfig) -> tuple[int, ...]:
    """Shape of ``rope_freqs.weight``, which no checkpoint has: one per pair of a full layer's head."""
    return (config.global_head_dim // 2,)


def shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a GGUF."""
    return shapes_of(wanted_tensors(config)) | {"rope_freqs.weight": rope_divisors_shape(config)}


def encoder_twin(source: str) -> str | None:
    """The encoder's name for a weight shared with the decoder; None if it is not shared."""
    if not source.startswith(DECODER) or source.endswith(".layer_scalar") or ".self_conditioning." in source:
        return None
    return ENCODER + source.removeprefix(DECODER)
