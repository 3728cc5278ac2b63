"""The vision tower and projector of a checkpoint as an ``mmproj`` GGUF.

Names and keys are those that llama.cpp's multimodal library has for Gemma 4 (projector type ``gemma4v``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pydiffusion.convert.architectures.architecture import Mmproj
from pydiffusion.convert.architectures.diffusion_gemma.config import TextConfig
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import PREFIX, VISION
from pydiffusion.convert.architectures.diffusion_gemma.vision_config import VisionConfig, read_vision_config
from pydiffusion.convert.checkpoint.image_processor import MAX_SOFT_TOKENS, read_image_processor
from pydiffusion.convert.checkpoint.inventory import Inventory
from pydiffusion.convert.checkpoint.tensor_map import Row, Table, Wanted, wanted
from pydiffusion.convert.checkpoint.weights import Weights
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.model_keys import QUANTIZATION_VERSION, f32, u32
from pydiffusion.convert.gguf.tensor_reads import ReadBytes, SourceTensor
from pydiffusion.convert.gguf.tensor_types import fit_to_rows
from pydiffusion.convert.gguf.writer import PlannedTensor
from pydiffusion.errors import ConversionError

_TOWER, _PROJECTOR = VISION
#: Soft tokens of an image at most; a key of our own.
MAX_SOFT_TOKENS_KEY = "clip.vision.max_soft_tokens"
_MAX_PATCHES, _MAX_PIXELS = 1 << 17, 1 << 26  # of an image: native/vision/vision_hparams.h
_IMAGE_SIZE = 224  # the library asks for one and does not use it: images keep their aspect ratio

# Dimensions by name: d hidden size, ff feed-forward, h head, n all heads, p positions, k the weights of a
# patch, t the text model's hidden size.
_GLOBAL: Table = (
    (f"{_TOWER}patch_embedder.input_proj.weight", "v.patch_embd.weight", ("d", "k")),
    (f"{_TOWER}patch_embedder.position_embedding_table", "v.position_embd.weight", ("2", "p", "d")),
)
_STANDARDIZE: Table = (
    (f"{_TOWER}std_bias", "v.std_bias", ("d",)),
    (f"{_TOWER}std_scale", "v.std_scale", ("d",)),
)
_PROJECTION: Row = (f"{_PROJECTOR}embedding_projection.weight", "mm.input_projection.weight", ("t", "d"))
_LAYER: Table = (
    ("input_layernorm.weight", "ln1.weight", ("d",)),
    ("self_attn.q_proj", "attn_q", ("n", "d")),
    ("self_attn.k_proj", "attn_k", ("n", "d")),
    ("self_attn.v_proj", "attn_v", ("n", "d")),
    ("self_attn.o_proj", "attn_out", ("d", "n")),
    ("self_attn.q_norm.weight", "attn_q_norm.weight", ("h",)),
    ("self_attn.k_norm.weight", "attn_k_norm.weight", ("h",)),
    ("post_attention_layernorm.weight", "attn_post_norm.weight", ("d",)),
    ("pre_feedforward_layernorm.weight", "ln2.weight", ("d",)),
    ("mlp.gate_proj", "ffn_gate", ("ff", "d")),
    ("mlp.up_proj", "ffn_up", ("ff", "d")),
    ("mlp.down_proj", "ffn_down", ("d", "ff")),
    ("post_feedforward_layernorm.weight", "ffn_post_norm.weight", ("d",)),
)
_CLIPS = ("input_min", "input_max", "output_min", "output_max")


def plan_mmproj(
    folder: Path, weights: Weights, text: TextConfig, name: str, type: str, notes: list[str]
) -> Mmproj:
    """Plan the vision part. Norms, clipping bounds, position and patch embeddings are F32, all other matrices
    of ``type``.

    Raises ConversionError if the checkpoint has no vision part, or not Gemma 4's.
    """
    config = read_vision_config(folder, text.hidden_size, notes)
    max_soft_tokens = read_image_processor(folder, config.patch_size, config.pooling, notes)
    _check_sizes(config, max_soft_tokens)
    metadata = _metadata(name, config, max_soft_tokens)
    return Mmproj(metadata, _plan(weights, config, type.upper()), {MAX_SOFT_TOKENS_KEY: MAX_SOFT_TOKENS})


def _check_sizes(config: VisionConfig, max_soft_tokens: int) -> None:
    """Refuse sizes of images that the runtime refuses of a file."""
    n_patches = max_soft_tokens * config.pooling**2
    if n_patches > _MAX_PATCHES or n_patches * config.patch_size**2 > _MAX_PIXELS:
        raise ConversionError(
            f"config.json: vision_config: 'pooling_kernel_size' = {config.pooling} and 'patch_size' = "
            f"{config.patch_size} are too large for images of {max_soft_tokens} soft tokens"
        )


def _metadata(name: str, config: VisionConfig, max_soft_tokens: int) -> dict[str, Value]:
    return {
        "general.architecture": Value("str", "clip"),
        "general.type": Value("str", "mmproj"),
        "general.name": Value("str", name),
        "general.file_type": u32(0),
        "clip.has_vision_encoder": Value("bool", True),
        "clip.vision.projector_type": Value("str", "gemma4v"),
        "clip.vision.projection_dim": u32(config.text_size),
        "clip.vision.image_size": u32(_IMAGE_SIZE),
        "clip.vision.patch_size": u32(config.patch_size),
        "clip.vision.embedding_length": u32(config.hidden_size),
        "clip.vision.feed_forward_length": u32(config.intermediate_size),
        "clip.vision.block_count": u32(config.num_layers),
        "clip.vision.attention.head_count": u32(config.num_heads),
        "clip.vision.attention.layer_norm_epsilon": f32(config.rms_norm_eps),
        "clip.vision.projector.scale_factor": u32(config.pooling),
        MAX_SOFT_TOKENS_KEY: u32(max_soft_tokens),
        # Pixels from 0 to 1; the tower maps them to -1 to 1.
        "clip.vision.image_mean": Value("array[f32]", [0.0] * 3),
        "clip.vision.image_std": Value("array[f32]", [1.0] * 3),
        # The tanh form, as the reference computes; without the key readers take a cruder one.
        "clip.use_gelu": Value("bool", True),
        "general.quantization_version": u32(QUANTIZATION_VERSION),
    }


def _plan(weights: Weights, config: VisionConfig, type_name: str) -> list[PlannedTensor]:
    """Plan all vision tensors. Raises ConversionError for missing or unexpected tensors and shapes."""
    inventory = Inventory(weights, PREFIX)
    others = {name for name in inventory.stored if not name.startswith(VISION)}
    if len(others) == len(inventory.stored):
        raise ConversionError(f"{inventory.folder}: the checkpoint has no vision tensors")
    tensors = _wanted(config)
    planned = [_planned(tensor, config, type_name) for tensor in inventory.take(tensors)]
    inventory.refuse_others(others | {want.source for want in tensors})
    return planned


def _wanted(config: VisionConfig) -> list[Wanted]:
    """All tensors, with their shapes in the checkpoint."""
    sizes = {"2": 2, "d": config.hidden_size, "ff": config.intermediate_size, "p": config.positions}
    sizes |= {"h": config.head_dim, "n": config.num_heads * config.head_dim, "k": 3 * config.patch_size**2}
    sizes |= {"t": config.text_size}
    tensors = wanted(_GLOBAL, sizes)
    table = _layer_table(config.clipped)
    for i_layer in range(config.num_layers):
        tensors += wanted(table, sizes, f"{_TOWER}encoder.layers.{i_layer}.", f"v.blk.{i_layer}.")
    if config.standardize:
        tensors += wanted(_STANDARDIZE, sizes)
    return tensors + wanted([_PROJECTION], sizes)


def _layer_table(clipped: bool) -> Table:
    """The tensors of a layer: matrices are within a module that may clip, each with its bounds."""
    table: list[Row] = []
    for source, name, dimensions in _LAYER:
        if len(dimensions) == 1:
            table.append((source, name, dimensions))
            continue
        table.append((f"{source}.linear.weight", f"{name}.weight", dimensions))
        if clipped:
            table += [(f"{source}.{clip}", f"{name}.{clip}", ()) for clip in _CLIPS]
    return table


def _planned(tensor: SourceTensor, config: VisionConfig, type_name: str) -> PlannedTensor:
    read, shape = tensor.read, tensor.shape
    target_type, is_bound = "F32", tensor.name.endswith(_CLIPS)
    if tensor.name == "v.patch_embd.weight":
        size = config.patch_size
        read, shape = _channels_first(tensor, size), (config.hidden_size, 3, size, size)
    elif len(shape) == 2:
        target_type = fit_to_rows(type_name, shape[-1])
    shape = shape or (1,)
    # Clipping bounds may be infinite.
    return PlannedTensor(tensor.name, shape, tensor.type, target_type, read, shape, keeps_nonfinite=is_bound)


def _channels_first(tensor: SourceTensor, patch: int) -> ReadBytes:
    """Transpose the patch embedding to a convolution kernel, (d, 3, patch, patch): the checkpoint interleaves
    the channels of a pixel.
    """
    item = 4 if tensor.type == "F32" else 2  # bytes

    def read_permuted(start: int, n_bytes: int) -> np.ndarray:
        size = 3 * patch * patch * item  # of an output channel, within which the order changes
        first, end = start // size, -(-(start + n_bytes) // size)
        data = tensor.read(first * size, (end - first) * size).reshape(-1, patch, patch, 3, item)
        flat = np.ascontiguousarray(data.transpose(0, 3, 1, 2, 4)).reshape(-1)
        return flat[start - first * size : start - first * size + n_bytes]

    return read_permuted
