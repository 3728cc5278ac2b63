"""GGUF metadata from a checkpoint's configuration, with the keys and types of existing files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydiffusion._util.sampler_options import CANVAS_LENGTH_KEY, ENTROPY_BOUND
from pydiffusion.convert.architectures.diffusion_gemma.config import (
    SamplerConfig,
    TextConfig,
    read_sampler_config,
)
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import ARCHITECTURE
from pydiffusion.convert.checkpoint.tokenizer_files import TOKENS_KEY, read_image_tokens, read_tokenizer
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.model_keys import f32, model_keys, u32

# Markers that output parsers need as text, though the checkpoint marks them special.
VISIBLE = frozenset(
    (
        "<|channel>",
        "<channel|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
        '<|"|>',
    )
)
# config.json's names of the tokens that stand for an image -> ours, after the architecture.
IMAGE_KEYS = {
    "image_token_id": "image_token_id",
    "boi_token_id": "image_begin_token_id",
    "eoi_token_id": "image_end_token_id",
}
IMAGE_TOKEN_NAMES = {"image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>"}
_BIDIRECTIONAL = "attention.bidirectional"


def read_metadata(folder: Path, name: str, config: TextConfig, notes: list[str]) -> dict[str, Value]:
    """All keys, from the config, ``generation_config.json`` and the tokenizer's files."""
    sampler = read_sampler_config(folder, config, notes)
    tokenizer = read_tokenizer(
        folder,
        notes,
        vocab_size=config.vocab_size,
        token_ids=config.token_ids,
        token_ids_from="config.json: text_config",
        eos_token_ids=sampler.eos_token_ids,
        visible=VISIBLE,
    )
    token_ids = read_image_tokens(folder, tokenizer[TOKENS_KEY].value, config.image_token_ids, notes)
    config = replace(config, image_token_ids=token_ids)
    return model_metadata(name, config, sampler, 0) | tokenizer


def implied_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Values that the runtime takes for keys about images that a file lacks: the released model's, and the
    tokens that have its names.
    """
    tokens = keys.get(TOKENS_KEY)
    tokens = tokens if isinstance(tokens, list) else []
    ids = {IMAGE_KEYS[key]: tokens.index(name) for key, name in IMAGE_TOKEN_NAMES.items() if name in tokens}
    implied = {_BIDIRECTIONAL: "vision", **ids}
    return {f"{ARCHITECTURE}.{key}": value for key, value in implied.items()}


def model_metadata(name: str, config: TextConfig, sampler: SamplerConfig, file_type: int) -> dict[str, Value]:
    """All keys except the tokenizer's, in file order."""
    own = f"{ARCHITECTURE}."
    keys = {
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
        own + _BIDIRECTIONAL: Value("str", "vision" if config.bidirectional_images else "none"),
        f"{own}attention.shared_kv_layers": u32(0),
        f"{own}embedding_length_per_layer_input": u32(0),
        f"{own}rope.freq_base": f32(config.rope_theta_full),
        f"{own}rope.freq_base_swa": f32(config.rope_theta_sliding),
        f"{own}rope.dimension_count": u32(config.global_head_dim),
        f"{own}rope.dimension_count_swa": u32(config.head_dim),
        f"{own}final_logit_softcapping": f32(config.final_logit_softcapping),
        **{own + IMAGE_KEYS[key]: u32(token_id) for key, token_id in config.image_token_ids.items()},
        CANVAS_LENGTH_KEY: u32(config.canvas_length),
        **{option.key: Value(option.gguf_type, getattr(sampler, option.name)) for option in ENTROPY_BOUND},
    }
    return model_keys(ARCHITECTURE, name, keys, file_type)
