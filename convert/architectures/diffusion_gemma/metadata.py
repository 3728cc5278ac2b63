"""GGUF metadata from a checkpoint's configuration, with the keys and types of existing files."""

from __future__ import annotations

import gguf

from pydiffusion._util.sampler_options import CANVAS_LENGTH_KEY, ENTROPY_BOUND
from pydiffusion.convert.architectures.diffusion_gemma.config import SamplerConfig, TextConfig
from pydiffusion.convert.gguf.header import Value

ARCHITECTURE = "diffusion-gemma"
# Version of ggml's block layouts; written for every type, so that quantizing does not change the set of keys.
QUANTIZATION_VERSION = int(gguf.GGML_QUANT_VERSION)


def u32(value: int) -> Value:
    """An unsigned integer."""
    return Value("u32", value)


def f32(value: float) -> Value:
    """A float."""
    return Value("f32", value)


def model_metadata(name: str, config: TextConfig, sampler: SamplerConfig, file_type: int) -> dict[str, Value]:
    """All keys except the tokenizer's, in file order."""
    own = f"{ARCHITECTURE}."
    return {
        "general.architecture": Value("str", ARCHITECTURE),
        "general.type": Value("str", "model"),
        "general.name": Value("str", name),
        f"{own}block_count": u32(len(config.sliding)),
        f"{own}context_length": u32(config.max_position_embeddings),
        f"{own}embedding_length": u32(config.hidden_size),
        f"{own}feed_forward_length": u32(config.intermediate_size),
        f"{own}expert_feed_forward_length": u32(config.moe_intermediate_size),
        f"{own}expert_count": u32(config.num_experts),
        f"{own}expert_used_count": u32(config.top_k_experts),
        f"{own}attention.head_count": u32(config.num_attention_heads),
        f"{own}attention.head_count_kv": Value("array[i32]", list(config.num_key_value_heads)),
        f"{own}attention.key_length": u32(config.global_head_dim),
        f"{own}attention.value_length": u32(config.global_head_dim),
        f"{own}attention.key_length_swa": u32(config.head_dim),
        f"{own}attention.value_length_swa": u32(config.head_dim),
        f"{own}attention.sliding_window": u32(config.sliding_window),
        f"{own}attention.sliding_window_pattern": Value("array[bool]", list(config.sliding)),
        f"{own}attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        f"{own}attention.causal": Value("bool", False),
        f"{own}attention.shared_kv_layers": u32(0),
        f"{own}embedding_length_per_layer_input": u32(0),
        f"{own}rope.freq_base": f32(config.rope_theta_full),
        f"{own}rope.freq_base_swa": f32(config.rope_theta_sliding),
        f"{own}rope.dimension_count": u32(config.global_head_dim),
        f"{own}rope.dimension_count_swa": u32(config.head_dim),
        f"{own}final_logit_softcapping": f32(config.final_logit_softcapping),
        CANVAS_LENGTH_KEY: u32(config.canvas_length),
        **{option.key: Value(option.gguf_type, getattr(sampler, option.name)) for option in ENTROPY_BOUND},
        "general.file_type": u32(file_type),
        "general.quantization_version": u32(QUANTIZATION_VERSION),
    }
