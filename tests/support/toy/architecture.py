"""Config and metadata of masked-toy, as the converter's registry takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydiffusion._util.sampler_options import CANVAS_LENGTH_KEY
from pydiffusion.convert.architectures.architecture import Architecture, ModelShape
from pydiffusion.convert.checkpoint.inventory import take_all
from pydiffusion.convert.checkpoint.strict_json import Fields
from pydiffusion.convert.checkpoint.tensor_map import Wanted, shapes_of
from pydiffusion.convert.checkpoint.tokenizer_files import read_tokenizer
from pydiffusion.convert.checkpoint.weights import Weights
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.model_keys import f32, model_keys, u32
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from support.toy.tensor_map import KINDS, wanted_tensors


@dataclass(frozen=True)
class Config:
    """``config.json``, under its own names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    final_logit_softcapping: float
    canvas_length: int
    mask_token_id: int
    max_denoising_steps: int


def read_config(fields: Fields) -> Config:
    """Read and validate ``config.json``."""
    n_heads, vocab_size = fields.integer("num_attention_heads"), fields.integer("vocab_size")
    config = Config(
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=n_heads,
        num_key_value_heads=fields.integer("num_key_value_heads", maximum=n_heads),
        head_dim=fields.integer("head_dim"),
        intermediate_size=fields.integer("intermediate_size"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", minimum=0, maximum=1),
        rope_theta=fields.number("rope_theta", minimum=1),
        final_logit_softcapping=fields.number("final_logit_softcapping", minimum=0),
        canvas_length=fields.integer("canvas_length"),
        mask_token_id=fields.integer("mask_token_id", minimum=0, maximum=vocab_size - 1),
        max_denoising_steps=fields.integer("max_denoising_steps"),
    )
    if n_heads % config.num_key_value_heads:
        raise fields.error("num_key_value_heads", f"a divisor of 'num_attention_heads' = {n_heads}")
    if config.head_dim % 2:
        raise fields.error("head_dim", "even")
    return config


def _model_keys(name: str, config: Config) -> dict[str, Value]:
    own = "masked-toy."
    keys = {
        f"{own}block_count": u32(config.num_hidden_layers),
        f"{own}context_length": u32(config.max_position_embeddings),
        f"{own}embedding_length": u32(config.hidden_size),
        f"{own}feed_forward_length": u32(config.intermediate_size),
        f"{own}attention.head_count": u32(config.num_attention_heads),
        f"{own}attention.head_count_kv": u32(config.num_key_value_heads),
        f"{own}attention.key_length": u32(config.head_dim),
        f"{own}attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        f"{own}rope.freq_base": f32(config.rope_theta),
        f"{own}final_logit_softcapping": f32(config.final_logit_softcapping),
        CANVAS_LENGTH_KEY: u32(config.canvas_length),
        "diffusion.mask_token_id": u32(config.mask_token_id),
        "diffusion.max_steps": u32(config.max_denoising_steps),
    }
    return model_keys("masked-toy", name, keys)


def metadata(folder: Path, name: str, config: Config, notes: list[str]) -> dict[str, Value]:
    """All keys."""
    return _model_keys(name, config) | read_tokenizer(folder, notes, vocab_size=config.vocab_size)


def _wanted(config: Config) -> list[Wanted]:
    heads, kv_heads, head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sizes = {"v": config.vocab_size, "d": config.hidden_size, "ff": config.intermediate_size}
    sizes |= {"h": head, "q": heads * head, "kv": kv_heads * head}
    return wanted_tensors(sizes, config.num_hidden_layers)


def shape(config: Config) -> ModelShape:
    """The model's size."""
    return ModelShape(KINDS, shapes_of(_wanted(config)), _model_keys("", config))


def tensors(weights: Weights, config: Config, notes: list[str]) -> list[SourceTensor]:
    """The tensors of a checkpoint, in GGUF order."""
    return take_all(weights, _wanted(config))


MASKED_TOY = Architecture(
    name="masked-toy",
    model_types=("masked_toy",),
    class_names=("MaskedToyForBlockDiffusion",),
    kinds=KINDS,
    read_config=read_config,
    shape=shape,
    metadata=metadata,
    tensors=tensors,
)
