"""Checkpoint folders in the formats of quantizers, and the same weights as plain folders.

Codes, scales and zero points are drawn, so that nothing depends on how a quantizer rounds, and are packed by
the formats' definitions with numpy, apart from the package's readers. Scales have few bits, so that results
are exact in any order.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support import checkpoint_folders as folders

EXPERTS = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
MATRICES = re.compile(r".+\.(mlp|self_attn|self_conditioning)\.(gate|up|down|q|k|v|o)_proj\.weight")
ALL_MATRICES = re.compile(rf"{MATRICES.pattern}|.+\.(embed_tokens|router\.proj)\.weight")
# As a checkpoint stores them: name -> (dtype of safetensors, shape, bytes)
Stored = dict[str, tuple[str, tuple[int, ...], bytes]]
Encoder = Callable[[str, tuple[int, ...], np.random.Generator], tuple[Stored, np.ndarray]]
BLOCK = 128


def tensor(dtype: str, values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """A stored tensor; ``values`` have the dtype's size, or are float32 for BF16."""
    data = folders.bfloat16_bits(values) if dtype == "BF16" else values
    return dtype, values.shape, np.ascontiguousarray(data).tobytes()


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Values of codes of E4M3 that are no NaN."""
    sign = np.where(codes & 128, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7) / 8
    small, large = mantissa * 2.0**-6, (1 + mantissa) * np.exp2(exponent - 7.0)
    return (sign * np.where(exponent == 0, small, large)).astype(np.float32)


def e2m1(codes: np.ndarray) -> np.ndarray:
    """Values of codes of E2M1."""
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    size = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * np.exp2(exponent - 1.0))
    return (np.where(codes & 8, -1.0, 1.0) * size).astype(np.float32)


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes one after the other from the lowest bit of a row's words: (..., n) -> (..., n_words) uint32."""
    each = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    stream = each.reshape(*codes.shape[:-1], -1)
    padded = np.zeros((*stream.shape[:-1], -(-stream.shape[-1] // 32) * 32), np.uint8)
    padded[..., : stream.shape[-1]] = stream
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4")


def pairs(codes: np.ndarray) -> np.ndarray:
    """Two codes per byte, the first in the lower half."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def fp8_codes(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    return (random.integers(0, 127, shape) | random.integers(0, 2, shape) << 7).astype(np.uint8)


def small_scales(shape: tuple[int, ...], random: np.random.Generator, divisor: float = 64) -> np.ndarray:
    """Scales of four bits."""
    return (random.integers(8, 16, shape) / 8 / divisor).astype(np.float32)


def fp8_channel(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[Stored, np.ndarray]:
    """llm-compressor's FP8-dynamic: one scale per row."""
    codes, scales = fp8_codes(shape, random), small_scales((shape[0], 1), random)
    stored = {name: tensor("F8_E4M3", codes), f"{name}_scale": tensor("BF16", scales)}
    return stored, e4m3(codes) * scales


def fp8_block(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[Stored, np.ndarray]:
    """The fine-grained FP8 of transformers: one scale per block, the last of which can be partial."""
    grid = tuple(-(-n // BLOCK) for n in shape[-2:])
    codes, scales = fp8_codes(shape, random), small_scales((*shape[:-2], *grid), random)
    spread = np.repeat(np.repeat(scales, BLOCK, axis=-2), BLOCK, axis=-1)
    stored = {name: tensor("F8_E4M3", codes), f"{name}_scale_inv": tensor("F32", scales)}
    return stored, e4m3(codes) * spread[..., : shape[-2], : shape[-1]]


def fp8_tensor(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[Stored, np.ndarray]:
    """ModelOpt's FP8: one scale per matrix."""
    codes, scale = fp8_codes(shape, random), small_scales((), random)
    stored = {name: tensor("F8_E4M3", codes), f"{name}_scale": tensor("F32", scale)}
    stored[f"{name.removesuffix('weight')}input_scale"] = tensor("F32", np.float32(0.5))
    return stored, e4m3(codes) * scale


def int8_channel(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[Stored, np.ndarray]:
    """llm-compressor's INT8: one scale per row."""
    codes, scales = random.integers(-127, 128, shape), small_scales((shape[0], 1), random)
    stored = {name: tensor("I8", codes.astype(np.int8)), f"{name}_scale": tensor("F32", scales)}
    return stored, codes.astype(np.float32) * scales


def int4_packed(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[Stored, np.ndarray]:
    """compressed-tensors' pack-quantized with zero points, which are packed along the rows."""
    groups = (shape[0], shape[1] // 32)
    codes, zeros = random.integers(0, 16, shape), random.integers(0, 16, groups)
    scales = small_scales(groups, random)
    stored = {
        f"{name}_packed": tensor("I32", bit_stream(codes, 4)),
        f"{name}_scale": tensor("BF16", scales),
        f"{name}_zero_point": tensor("I32", bit_stream(zeros.T, 4).T),
        f"{name}_shape": tensor("I64", np.array(shape, np.int64)),
    }
    values = (codes - np.repeat(zeros, 32, axis=1)).astype(np.float32) * np.repeat(scales, 32, axis=1)
    return stored, values


def _nvfp4(shape: tuple[int, ...], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes = random.integers(0, 16, shape)
    scales = random.integers(1, 127, (*shape[:-1], shape[-1] // 16)).astype(np.uint8)
    return pairs(codes), scales, e2m1(codes) * np.repeat(e4m3(scales), 16, axis=-1)


def nvfp4_modelopt(
    name: str, shape: tuple[int, ...], random: np.random.Generator
) -> tuple[Stored, np.ndarray]:
    """ModelOpt's NVFP4: multiplied by a scale per matrix."""
    packed, scales, values = _nvfp4(shape, random)
    stored = {name: tensor("U8", packed), f"{name}_scale": tensor("F8_E4M3", scales)}
    stored[f"{name}_scale_2"] = tensor("F32", np.float32(2**-9))
    stored[f"{name.removesuffix('weight')}input_scale"] = tensor("F32", np.float32(0.5))
    return stored, values * np.float32(2**-9)


def nvfp4_compressed(
    name: str, shape: tuple[int, ...], random: np.random.Generator
) -> tuple[Stored, np.ndarray]:
    """compressed-tensors' NVFP4: divided by a scale per matrix."""
    packed, scales, values = _nvfp4(shape, random)
    stored = {f"{name}_packed": tensor("U8", packed), f"{name}_scale": tensor("F8_E4M3", scales)}
    stored[f"{name}_global_scale"] = tensor("F32", np.full(1, 512, np.float32))
    return stored, values / np.float32(512)


def _mxfp4(shape: tuple[int, ...], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes = random.integers(0, 16, shape)
    scales = random.integers(118, 123, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
    spread = np.repeat(np.exp2(scales - 127.0).astype(np.float32), 32, axis=-1)
    return pairs(codes), scales, e2m1(codes) * spread


def mxfp4_compressed(
    name: str, shape: tuple[int, ...], random: np.random.Generator
) -> tuple[Stored, np.ndarray]:
    """compressed-tensors' MXFP4."""
    packed, scales, values = _mxfp4(shape, random)
    return {f"{name}_packed": tensor("U8", packed), f"{name}_scale": tensor("U8", scales)}, values


def mxfp4_blocks(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[Stored, np.ndarray]:
    """MXFP4 as gpt-oss has it: blocks of 16 bytes."""
    packed, scales, values = _mxfp4(shape, random)
    blocks = packed.reshape(*shape[:-1], -1, 16)
    return {f"{name}_blocks": tensor("U8", blocks), f"{name}_scales": tensor("U8", scales)}, values


def awq(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[Stored, np.ndarray]:
    """AutoAWQ's "gemm": transposed, eight rows per word in an order of their own."""
    n_rows, n_columns = shape
    codes, zeros = (
        random.integers(0, 16, (n_columns, n_rows)),
        random.integers(0, 16, (n_columns // 32, n_rows)),
    )
    scales = small_scales(zeros.shape, random)

    def packed(values: np.ndarray) -> np.ndarray:
        ordered = values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return bit_stream(ordered.reshape(len(values), -1), 4)

    base = name.removesuffix("weight")
    stored = {f"{base}qweight": tensor("I32", packed(codes)), f"{base}qzeros": tensor("I32", packed(zeros))}
    stored[f"{base}scales"] = tensor("F16", scales.astype(np.float16))
    whole = (codes - np.repeat(zeros, 32, axis=0)).astype(np.float32) * np.repeat(scales, 32, axis=0)
    return stored, np.ascontiguousarray(whole.T)


def gptq(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[Stored, np.ndarray]:
    """GPTQ's first format: transposed, zero points less one, columns in groups of any order."""
    n_rows, n_columns = shape
    codes, zeros = (
        random.integers(0, 16, (n_columns, n_rows)),
        random.integers(1, 16, (n_columns // 32, n_rows)),
    )
    scales = small_scales(zeros.shape, random)
    groups = random.permutation(n_columns) // 32
    base = name.removesuffix("weight")
    stored = {
        f"{base}qweight": tensor("I32", bit_stream(codes.T, 4).T),
        f"{base}qzeros": tensor("I32", bit_stream(zeros - 1, 4)),
        f"{base}scales": tensor("F16", scales.astype(np.float16)),
        f"{base}g_idx": tensor("I32", groups.astype(np.int32)),
    }
    whole = (codes - zeros[groups]).astype(np.float32) * scales[groups]
    return stored, np.ascontiguousarray(whole.T)


def mlx_affine(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[Stored, np.ndarray]:
    """MLX's affine mode in 6 bits; the names are a module's."""
    base = name.removesuffix(".weight")
    groups = (*shape[:-1], shape[-1] // 64)
    codes, scales = random.integers(0, 64, shape), small_scales(groups, random, 1024)
    scales *= random.choice(np.array([-1, 1], np.float32), groups)
    biases = small_scales(groups, random, 16)
    stored = {
        f"{base}.weight": tensor("U32", bit_stream(codes, 6)),
        f"{base}.scales": tensor("BF16", scales),
        f"{base}.biases": tensor("BF16", biases),
    }
    spread = [np.repeat(values, 64, axis=-1) for values in (scales, biases)]
    return stored, codes.astype(np.float32) * spread[0] + spread[1]


def mlx_mxfp4(name: str, shape: tuple[int, ...], random: np.random.Generator) -> tuple[Stored, np.ndarray]:
    """MLX's mxfp4 mode."""
    base = name.removesuffix(".weight")
    packed, scales, values = _mxfp4(shape, random)
    return {
        f"{base}.weight": tensor("U32", packed.view("<u4")),
        f"{base}.scales": tensor("U8", scales),
    }, values


@dataclass(frozen=True)
class Style:
    """How a quantizer stores a checkpoint.

    ``encoders``: of its matrices in turn. ``stacked``: experts stay stacked. ``config``: what ``file`` gets,
    config.json if no other.
    """

    encoders: tuple[Encoder, ...]
    config: dict[str, Any]
    stacked: bool = False
    matrices: re.Pattern[str] = MATRICES
    file: str = "config.json"


def _compressed(*encoders: Encoder) -> Style:
    group = {"targets": ["Linear"], "weights": {"block_structure": None}}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return Style(encoders, {"quantization_config": config})


def _modelopt(encoder: Encoder, **more: Any) -> Style:
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    return Style((encoder,), **{"config": config, **more})


_FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
_MLX6 = {"group_size": 64, "bits": 6, "mode": "affine"}
_MLX4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
STYLES = {
    "fp8-channel": _compressed(fp8_channel),
    "fp8-block": Style((fp8_block,), {"quantization_config": _FP8}),
    "fp8-stacked": Style((fp8_block,), {"quantization_config": _FP8}, stacked=True),
    "fp8-tensor": _modelopt(fp8_tensor),
    "int8": _compressed(int8_channel),
    "int4": _compressed(int4_packed),
    "nvfp4-modelopt": _modelopt(nvfp4_modelopt),
    "nvfp4-file": _modelopt(
        nvfp4_modelopt,
        config={"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}},
        file="hf_quant_config.json",
    ),
    "nvfp4-compressed": _compressed(nvfp4_compressed),
    "mxfp4-compressed": _compressed(mxfp4_compressed),
    "mxfp4-blocks": Style((mxfp4_blocks,), {"quantization_config": {"quant_method": "mxfp4"}}, stacked=True),
    "mixed": _compressed(fp8_channel, nvfp4_compressed, int8_channel, int4_packed, mxfp4_compressed),
    "awq": Style((awq,), {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}),
    "gptq": Style((gptq,), {"quantization_config": {"quant_method": "gptq", "bits": 4, "desc_act": True}}),
    "mlx": Style(
        (mlx_affine,), {"quantization": _MLX6, "quantization_config": _MLX6}, True, matrices=ALL_MATRICES
    ),
    "mlx-mxfp4": Style((mlx_mxfp4,), {"quantization": _MLX4}, True),
}


@dataclass
class Quantized:
    """The tensors of a quantized checkpoint, and the float32 values of all by the names of a plain one."""

    stored: Stored = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)


def quantize(style: Style, weights: dict[str, np.ndarray], seed: int = 0) -> Quantized:
    """A checkpoint of these names and shapes; the matrices have other weights."""
    random, result, count = np.random.default_rng(seed), Quantized(), 0
    for name, plain in weights.items():
        experts = EXPERTS.fullmatch(name)
        if not experts and not style.matrices.fullmatch(name):
            result.stored[name] = tensor("BF16", plain)
            result.values[name] = plain
            continue
        encode = style.encoders[count % len(style.encoders)]
        count += 1
        if experts and not style.stacked:
            stored, values = _each_expert(encode, experts[1], experts[2], plain.shape, random)
        else:
            stored, values = encode(name, plain.shape, random)
        result.stored |= stored
        result.values[name] = values
    return result


def _each_expert(
    encode: Encoder, experts: str, parameter: str, shape: tuple[int, ...], random: np.random.Generator
) -> tuple[Stored, np.ndarray]:
    """Experts one by one, gate and up apart."""
    parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
    stored: Stored = {}
    values = []
    for i in range(shape[0]):
        for part in parts:
            one, matrix = encode(f"{experts}.{i}.{part}.weight", (shape[1] // len(parts), shape[2]), random)
            stored |= one
            values.append(matrix)
    return stored, np.concatenate(values).reshape(shape)


def small_weights() -> dict[str, np.ndarray]:
    """The weights of the small checkpoint's first and last layer, one of each kind, as a model of two."""
    return {
        name.replace("layers.3.", "layers.1."): values
        for name, values in folders.weights().items()
        if not re.search(r"layers\.[12]\.", name)
    }


def small_config() -> dict[str, Any]:
    """``config.json`` for :func:`small_weights`."""
    config = folders.model_config("google")
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return config


def write_stored(path: Path, stored: Stored) -> None:
    """A safetensors file."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, data) in stored.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in stored.values()))


def write_folder(
    folder: Path, stored: Stored, style: Style, *, n_shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """A checkpoint folder of stored tensors."""
    config = config or small_config()
    folders.make_folder(folder, tensors={}, config=config)
    is_config = style.file == "config.json"
    folders.write_json(folder / style.file, (config if is_config else {}) | style.config)
    if n_shards == 1:
        write_stored(folder / "model.safetensors", stored)
        return folder
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i_shard in range(n_shards):
        name = f"model-{i_shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = dict(list(stored.items())[i_shard::n_shards])
        write_stored(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    folders.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


def rename_to_encoder(stored: Stored) -> Stored:
    """The encoder's names for what it shares with the decoder, as programs that quantize it store them."""

    def renamed(name: str) -> str:
        own = name.endswith(".layer_scalar") or ".self_conditioning." in name
        return name if own else name.replace("model.decoder.", "model.encoder.language_model.", 1)

    return {renamed(name): value for name, value in stored.items()}


def n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor in a dtype of safetensors."""
    sizes = {"I64": 8, "F64": 8, "I32": 4, "U32": 4, "F32": 4, "BF16": 2, "F16": 2, "I16": 2}
    return math.prod(shape) * sizes.get(dtype, 1)
