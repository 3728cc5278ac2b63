"""The demo model, a small DiffusionGemmaForBlockDiffusion of transformers: configuration and export."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

from .tokenizer import IMAGE, save_tokenizer

CANVAS_LENGTH = 48
SLIDING_WINDOW = 64
EOS_IDS = [1, 6]
"""`<eos>`, and `<turn|>`, which ends an answer in a chat."""

LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2


def dense_experts(
    module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute all experts and multiply those not selected by zero: same result as routing tokens.

    With four small experts this doubles the arithmetic but avoids gathering, which dominates on a CPU.
    """
    n_experts, width = module.num_experts, module.intermediate_dim
    weights = torch.zeros(hidden.shape[0], n_experts, dtype=top_k_weights.dtype, device=hidden.device)
    weights = weights.scatter(1, top_k_index, top_k_weights)
    gate_up = torch.nn.functional.linear(hidden, module.gate_up_proj.flatten(0, 1))
    gate, up = gate_up.view(-1, n_experts, 2 * width).chunk(2, dim=-1)
    inner = module.act_fn(gate) * up * weights[..., None].to(gate.dtype)
    down = module.down_proj.permute(1, 0, 2).flatten(1)
    return torch.nn.functional.linear(inner.flatten(1), down).to(hidden.dtype)


def short_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Plain attention for about a hundred tokens, with a group's query heads folded into rows.

    Avoids the fused CPU kernel, whose backward pass takes a third of the training time.
    """
    batch, n_heads, n_queries, width = query.shape
    n_groups = key.shape[1]
    folded = query.reshape(batch * n_groups, n_heads // n_groups * n_queries, width)
    scores = torch.bmm(folded, key.flatten(0, 1).transpose(1, 2)).float() * (
        1.0 if scaling is None else scaling
    )
    if attention_mask is not None:
        scores = scores.view(batch, n_heads, n_queries, -1)
        scores = scores.masked_fill(~attention_mask, -1e30).view(batch * n_groups, -1, scores.shape[-1])
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    output = torch.bmm(weights, value.flatten(0, 1))
    return output.view(batch, n_heads, n_queries, width).transpose(1, 2), None


ALL_EXPERTS_FUNCTIONS.register("dense_demo", dense_experts)
ALL_ATTENTION_FUNCTIONS.register("short_demo", short_attention)


def build_config(vocab_size: int, image_ids: tuple[int, int, int]) -> DiffusionGemmaConfig:
    """Build the configuration; `image_ids` are the ids of <|image>, <image|> and <|image|>."""
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": len(LAYER_TYPES),
        "layer_types": list(LAYER_TYPES),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "global_head_dim": 128,
        "num_global_key_value_heads": 1,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 128,
        "sliding_window": SLIDING_WINDOW,
        "max_position_embeddings": 2048,
        "final_logit_softcapping": 30.0,
        "pad_token_id": 0,
        "eos_token_id": EOS_IDS,
        "bos_token_id": 2,
        "initializer_range": 0.04,
    }
    # The class requires a vision tower; a minimal one, unused and not exported.
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "position_embedding_size": 16,
    }
    boi, eoi, image = image_ids
    return DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        boi_token_id=boi,
        eoi_token_id=eoi,
        image_token_id=image,
        canvas_length=CANVAS_LENGTH,
        initializer_range=0.04,
    )


def build_model(tokenizer: Tokenizer) -> DiffusionGemmaForBlockDiffusion:
    """Build the model with initial weights, set up for training on a CPU."""
    image_ids = tuple(tokenizer.token_to_id(token) for token in IMAGE)
    model = DiffusionGemmaForBlockDiffusion(build_config(tokenizer.get_vocab_size(), image_ids))
    model.set_experts_implementation("dense_demo")
    model.set_attn_implementation("short_demo")
    model.generation_config = build_generation_config()
    return model


def build_generation_config() -> DiffusionGemmaGenerationConfig:
    """Build the generation config with the reference's sampler settings."""
    return DiffusionGemmaGenerationConfig(
        **DiffusionGemmaGenerationConfig._get_default_generation_params(),
        bos_token_id=2,
        eos_token_id=EOS_IDS,
        pad_token_id=0,
    )


def release_scalars(model: DiffusionGemmaForBlockDiffusion) -> None:
    """Make every layer's scalar trainable, with different initial values in encoder and decoder.

    They are buffers in the class and would otherwise stay 1.
    """
    decoder, encoder = model.model.decoder.layers, model.model.encoder.language_model.layers
    for index, (decoding, encoding) in enumerate(zip(decoder, encoder, strict=True)):
        for layer, value in ((decoding, 0.95 - 0.02 * index), (encoding, 0.8 + 0.02 * index)):
            del layer.layer_scalar
            layer.layer_scalar = nn.Parameter(torch.full((1,), value))


def export(model: DiffusionGemmaForBlockDiffusion, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the released checkpoint: bfloat16, without the vision tower, with the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        scalar = name.startswith("model.encoder.language_model.") and name.endswith(".layer_scalar")
        if name.startswith("model.decoder.") or scalar:
            tensors[name] = tensor.detach().to(torch.bfloat16).contiguous()
    temporary = folder / "model.safetensors.part"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
