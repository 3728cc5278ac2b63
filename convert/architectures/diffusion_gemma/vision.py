"""The vision tower and projector of a checkpoint as an ``mmproj`` GGUF.

Names and keys are those that llama.cpp's multimodal library has for Gemma 4 (projector type ``gemma4v``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pydiffusion.convert.architectures.architecture import Mmproj
from pydiffusion.convert.architectures.diffusion_gemma.config import TextConfig
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import PREFIX, VISION
from pydiffusion.convert.checkpoint.inventory import Inventory
from pydiffusion.convert.checkpoint.strict_json import Fields, read_json_object
from pydiffusion.convert.checkpoint.tensor_map import Row, Table, Wanted, wanted
from pydiffusion.convert.checkpoint.weights import Weights
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.model_keys import QUANTIZATION_VERSION, f32, u32
from pydiffusion.convert.gguf.tensor_reads import ReadBytes, SourceTensor
from pydiffusion.convert.gguf.tensor_types import fit_to_rows
from pydiffusion.convert.gguf.writer import PlannedTensor
from pydiffusion.errors import ConversionError

_TOWER, _PROJECTOR = VISION
_MAX_LAYERS = 1024
_IMAGE_SIZE = 224  # the library asks for one and does not use it: images keep their aspect ratio

# Dimensions by name: d hidden size, ff feed-forward, h head, p positions, t the text model's hidden size,
# k the weights of a patch.
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
    ("self_attn.q_proj", "attn_q", ("d", "d")),
    ("self_attn.k_proj", "attn_k", ("d", "d")),
    ("self_attn.v_proj", "attn_v", ("d", "d")),
    ("self_attn.o_proj", "attn_out", ("d", "d")),
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


@dataclass(frozen=True)
class _VisionConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    pooling: int
    positions: int
    rms_norm_eps: float
    standardize: bool
    clipped: bool
    text_size: int
    image_mean: list[float]
    image_std: list[float]


def plan_mmproj(
    folder: Path, weights: Weights, text: TextConfig, name: str, type: str, notes: list[str]
) -> Mmproj:
    """Plan the vision part. Norms, clipping bounds, position and patch embeddings are F32, all other matrices
    of ``type``.

    Raises ConversionError if the checkpoint has no vision part, or not Gemma 4's.
    """
    config = _read_config(folder, text, notes)
    return Mmproj(_metadata(name, config), _plan(weights, config, type.upper()))


def _read_config(folder: Path, text: TextConfig, notes: list[str]) -> _VisionConfig:
    values = read_json_object(folder / "config.json", 64 << 20)
    if not isinstance(values.get("vision_config"), dict):
        raise ConversionError(f"{folder / 'config.json'}: has no 'vision_config', so no vision part")
    vision = Fields(values["vision_config"], "config.json: vision_config", notes, null_is_missing=True)
    vision.one_of("model_type", ("gemma4_vision",))
    vision.one_of("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    vision.one_of("attention_bias", (False,), False)
    hidden, heads = vision.integer("hidden_size"), vision.integer("num_attention_heads")
    # The library divides the hidden size by the heads, has as many keys as queries, and a theta of its own.
    vision.accept_if_there("head_dim", (hidden // heads,))
    vision.accept_if_there("num_key_value_heads", (heads,))
    if vision.has("rope_parameters"):
        rope = vision.object("rope_parameters")
        rope.accept_if_there("rope_theta", (100.0, 100))
    if hidden % heads:
        raise ConversionError(f"{vision.where}: {heads} attention heads can't share {hidden} elements")
    mean, std = _read_normalization(folder, notes)
    config = _VisionConfig(
        hidden_size=hidden,
        intermediate_size=vision.integer("intermediate_size"),
        num_layers=vision.integer("num_hidden_layers", maximum=_MAX_LAYERS),
        num_heads=heads,
        patch_size=vision.integer("patch_size"),
        pooling=vision.integer("pooling_kernel_size", 3),
        positions=vision.integer("position_embedding_size"),
        rms_norm_eps=vision.number("rms_norm_eps", 1e-6, minimum=1e-12, maximum=1),
        standardize=vision.boolean("standardize", False),
        clipped=vision.boolean("use_clipped_linears", False),
        text_size=text.hidden_size,
        image_mean=mean,
        image_std=std,
    )
    vision.note_defaults()
    return config


def _read_normalization(folder: Path, notes: list[str]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel; Gemma 4's image processor does not normalize."""
    values: dict = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = read_json_object(folder / name, 64 << 20)
            values |= found
            values |= found["image_processor"] if isinstance(found.get("image_processor"), dict) else {}
    result = []
    for key, default in (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3)):
        given = values.get(key, default)
        is_right = isinstance(given, list) and len(given) == 3 and all(type(x) in (int, float) for x in given)
        if not is_right or not all(math.isfinite(x) for x in given):
            raise ConversionError(f"{folder}: {key!r} should be three numbers, is {given!r:.60}")
        if key not in values:
            notes.append(f"no preprocessor_config.json says {key!r}: {default}, as the reference has it")
        result.append([float(x) for x in given])
    return result[0], result[1]


def _metadata(name: str, config: _VisionConfig) -> dict[str, Value]:
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
        "clip.vision.image_mean": Value("array[f32]", config.image_mean),
        "clip.vision.image_std": Value("array[f32]", config.image_std),
        # The tanh form, as the reference computes; without the key readers take a cruder one.
        "clip.use_gelu": Value("bool", True),
        "general.quantization_version": u32(QUANTIZATION_VERSION),
    }


def _plan(weights: Weights, config: _VisionConfig, type_name: str) -> list[PlannedTensor]:
    """Plan all vision tensors. Raises ConversionError for missing or unexpected tensors and shapes."""
    inventory = Inventory(weights, PREFIX)
    others = {name for name in inventory.stored if not name.startswith(VISION)}
    if len(others) == len(inventory.stored):
        raise ConversionError(f"{inventory.folder}: the checkpoint has no vision tensors")
    tensors = _wanted(config)
    planned = [_planned(tensor, config, type_name) for tensor in inventory.take(tensors)]
    inventory.refuse_others(others | {want.source for want in tensors})
    return planned


def _wanted(config: _VisionConfig) -> list[Wanted]:
    """All tensors, with their shapes in the checkpoint."""
    sizes = {"2": 2, "d": config.hidden_size, "ff": config.intermediate_size, "p": config.positions}
    sizes |= {"h": config.hidden_size // config.num_heads, "k": 3 * config.patch_size**2}
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


def _planned(tensor: SourceTensor, config: _VisionConfig, type_name: str) -> PlannedTensor:
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
