"""DiffusionGemma, as the converter's registry lists it."""

from __future__ import annotations

from pydiffusion.convert.architectures.architecture import Architecture, LayerCache, ModelShape
from pydiffusion.convert.architectures.diffusion_gemma import tensor_names
from pydiffusion.convert.architectures.diffusion_gemma.config import TextConfig, read_text_config
from pydiffusion.convert.architectures.diffusion_gemma.inventory import plan_tensors
from pydiffusion.convert.architectures.diffusion_gemma.metadata import read_metadata
from pydiffusion.convert.architectures.diffusion_gemma.vision import plan_mmproj


def model_shape(config: TextConfig) -> ModelShape:
    """The model's size; activations are about those of the experts, the dense MLP and attention."""
    layers = tuple(
        LayerCache(n_kv * config.head_dim, config.sliding_window)
        if sliding
        else LayerCache(n_kv * config.global_head_dim)
        for sliding, n_kv in zip(config.sliding, config.num_key_value_heads, strict=True)
    )
    experts = config.top_k_experts * (3 * config.moe_intermediate_size + 2 * config.hidden_size)
    heads = config.num_attention_heads * max(config.head_dim, config.global_head_dim)
    dense = 3 * config.intermediate_size + 8 * config.hidden_size + 4 * heads
    return ModelShape(
        tensor_names.KINDS,
        tensor_names.shapes(config),
        config.vocab_size,
        config.canvas_length,
        layers,
        experts + dense,
    )


DIFFUSION_GEMMA = Architecture(
    name=tensor_names.ARCHITECTURE,
    model_types=("diffusion_gemma",),
    class_names=("DiffusionGemmaForBlockDiffusion", "DiffusionGemmaModel"),
    kinds=tensor_names.KINDS,
    read_config=read_text_config,
    shape=model_shape,
    metadata=read_metadata,
    tensors=plan_tensors,
    mmproj=plan_mmproj,
)
