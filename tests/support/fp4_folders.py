"""Checkpoint folders in NVFP4 and MXFP4 with random codes, and the weights that these stand for.

Made from the formats' definitions with numpy, apart from the package's readers: the codes are drawn, so that
nothing depends on how a quantizer rounds.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from support import checkpoint_folders as folders

#: Value of each code of E2M1 (OCP microscaling formats 1.0).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
EXPERT = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
MATRIX = re.compile(r".+\.(mlp|self_attn|self_conditioning)\.(gate|up|down|q|k|v|o)_proj\.weight")
Stored = dict[str, tuple[str, tuple[int, ...], bytes]]


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Values of non-negative codes of E4M3."""
    exponent, mantissa = codes >> 3, (codes & 7).astype(np.float32)
    return np.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * np.exp2(exponent - 7.0)).astype(
        np.float32
    )


def quantized(
    name: str, shape: tuple[int, ...], style: str, random: np.random.Generator
) -> tuple[Stored, np.ndarray, np.ndarray]:
    """A matrix as ``style`` stores it, its weights without their factor, and the factor: (1,)."""
    codes = random.integers(0, 16, shape, dtype=np.uint8)
    packed = ("U8", (shape[0], shape[1] // 2), (codes[:, ::2] | codes[:, 1::2] << 4).tobytes())
    if style == "mxfp4":
        scales = random.integers(118, 123, (shape[0], shape[1] // 32), dtype=np.uint8)
        stored = {f"{name}_packed": packed, f"{name}_scale": ("U8", scales.shape, scales.tobytes())}
        scale = np.exp2(scales.astype(np.float32) - 127)
        return stored, E2M1[codes] * np.repeat(scale, 32, axis=1), np.ones(1, np.float32)
    scales = random.integers(0, 127, (shape[0], shape[1] // 16), dtype=np.uint8)
    values = E2M1[codes] * np.repeat(e4m3(scales), 16, axis=1)
    # So that the weights keep about the size of the model's own.
    factor = np.array([0.9 / np.abs(values).std() / shape[1] ** 0.5], np.float32)
    block = ("F8_E4M3", scales.shape, scales.tobytes())
    unused = ("F32", (), np.float32(0.25).tobytes())
    base = name.removesuffix(".weight")
    if style == "modelopt":
        stored = {name: packed, f"{name}_scale": block, f"{name}_scale_2": ("F32", (), factor.tobytes())}
        return stored | {f"{base}.input_scale": unused}, values, factor
    inverse = (1 / factor).astype(np.float32)
    stored = {f"{name}_packed": packed, f"{name}_scale": block}
    stored |= {f"{name}_global_scale": ("F32", (1,), inverse.tobytes()), f"{base}.input_global_scale": unused}
    return stored, values, (np.float32(1) / inverse).astype(np.float32)


def make_fp4(
    folder: Path, tensors: dict[str, np.ndarray], style: str, *, experts_only: bool = False
) -> dict[str, np.ndarray]:
    """Rewrite a folder's model.safetensors in ``style`` (modelopt, compressed-tensors, mxfp4), experts one by
    one as these programs write them; returns the dequantized weights by their usual names.
    """
    random, stored, weights = np.random.default_rng(5), {}, dict(tensors)
    for name, values in tensors.items():
        if match := EXPERT.fullmatch(name):
            parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
            n_experts, n_rows, n_per_row = values.shape
            found = []
            for expert in range(n_experts):
                for part in parts:
                    shape = (n_rows // len(parts), n_per_row)
                    one = quantized(f"{match[1]}.{expert}.{part}.weight", shape, style, random)
                    stored |= one[0]
                    found.append(one[1] * one[2])
            weights[name] = np.concatenate(found).reshape(values.shape)
        elif MATRIX.fullmatch(name) and not experts_only and values.shape[1] % 32 == 0:
            one = quantized(name, values.shape, style, random)
            stored |= one[0]
            weights[name] = one[1] * one[2]
        else:
            stored[name] = ("F32", values.shape, values.astype(np.float32).tobytes())
    write_stored(folder / "model.safetensors", stored)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = "modelopt" if style == "modelopt" else "compressed-tensors"
    config["quantization_config"] = {"quant_method": method, "format": "nvfp4-pack-quantized"}
    folders.write_json(folder / "config.json", config)
    return weights


def write_stored(path: Path, tensors: Stored) -> None:
    """A safetensors file of bytes."""
    header: dict[str, Any] = {}
    data, offset = [], 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(content)]}
        data.append(content)
        offset += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))
