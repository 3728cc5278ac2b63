"""Files with a scale beside each matrix, as llama.cpp writes them for NVFP4 checkpoints."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np
from gguf import GGMLQuantizationType, quants

from support.gguf_mutator import RawGguf, Tensor, float_tensor

_DENSE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "self_cond_gate",
          "self_cond_up", "self_cond_down", "output")  # fmt: skip
_EXPERTS = ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
#: Unsigned E4M3 without its NaN: subnormals, then an implicit 1.
_E4M3 = np.array(
    [b / 512 if b < 8 else (1 + b % 8 / 8) * 2.0 ** (b // 8 - 7) for b in range(127)], np.float32
)
#: Largest E2M1 value times the largest E4M3 scale of a block: what makers of NVFP4 files divide by.
_LARGEST_NVFP4 = 6.0 * 448.0


def _kind(tensor: Tensor) -> str:
    return tensor.name.decode().removesuffix(".weight").rsplit(".", 1)[-1]


def _type(tensor: Tensor) -> GGMLQuantizationType:
    return GGMLQuantizationType(tensor.type)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(reversed(tensor.dims))


def values_of(tensor: Tensor) -> np.ndarray:
    """Dequantized by the gguf package: float32 in C order."""
    row = quants.quant_shape_to_byte_shape(_shape(tensor), _type(tensor))
    data = np.frombuffer(tensor.data[: int(np.prod(row))], np.uint8).reshape(row)
    return quants.dequantize(data, _type(tensor)).reshape(_shape(tensor))


def _store(tensor: Tensor, values: np.ndarray, type: GGMLQuantizationType) -> None:
    tensor.data, tensor.type = quants.quantize(values, type).tobytes(), type.value


def _nearest(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the nearest entry of an ascending table."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, values).astype(np.uint8)


def _quantize_nvfp4(values: np.ndarray) -> bytes:
    """Blocks of 64 weights: the E4M3 scales of its four parts of 16, then E2M1 codes, of each part the first
    eight in the low nibbles of eight bytes and the others in the high ones.
    """
    parts = values.reshape(-1, 4, 16)
    scales = _nearest(_E4M3, np.abs(parts).max(axis=-1) / _E2M1[-1])
    step = np.maximum(_E4M3[scales], _E4M3[1])[..., None]
    codes = _nearest(_E2M1, np.abs(parts) / step) | (np.signbit(parts).astype(np.uint8) << 3)
    nibbles = codes[..., :8] | (codes[..., 8:] << 4)
    return np.concatenate([scales, nibbles.reshape(-1, 32)], axis=1).tobytes()


def _matrices(file: RawGguf, kinds: tuple[str, ...]) -> Iterator[tuple[Tensor, str]]:
    """Matrices of these kinds and the names of their scales."""
    for tensor in list(file.tensors):
        if tensor.name.endswith(b".weight") and _kind(tensor) in kinds:
            yield tensor, tensor.name.decode().removesuffix("weight") + "scale"


def split_experts(file: RawGguf) -> None:
    """Store gate and up of experts apart, with their scale if they have one."""
    for fused in [tensor for tensor in file.tensors if _kind(tensor) == "ffn_gate_up_exps"]:
        n_inner, n_rows, n_expert = fused.dims
        row_bytes = quants.quant_shape_to_byte_shape((n_inner,), _type(fused))[-1]
        both = np.frombuffer(fused.data[: n_expert * n_rows * row_bytes], np.uint8)
        both = both.reshape(n_expert, 2, n_rows // 2, row_bytes)
        file.tensors.remove(fused)
        scale_name = fused.name.replace(b"weight", b"scale")
        scale = next((tensor for tensor in file.tensors if tensor.name == scale_name), None)
        if scale is not None:
            file.tensors.remove(scale)
        for i, part in enumerate((b"gate", b"up")):
            name = fused.name.replace(b"gate_up", part)
            dims = [n_inner, n_rows // 2, n_expert]
            file.tensors.append(Tensor(name, dims, fused.type, both[:, i].tobytes()))
            if scale is not None:
                name = scale_name.replace(b"gate_up", part)
                file.tensors.append(Tensor(name, scale.dims, scale.type, scale.data))


def own_output_head(file: RawGguf) -> None:
    """Add an output head equal to the embedding."""
    embedding = file.tensor("token_embd.weight")
    file.tensors.append(Tensor(b"output.weight", list(embedding.dims), embedding.type, embedding.data))


def _scales(file: RawGguf, name: str, n: int, of: Callable[[int], float]) -> np.ndarray:
    """Add a tensor of n scales, or multiply those of the router."""
    values = np.array([of(i) for i in range(n)], np.float32)
    if name.endswith("ffn_down_exps.scale"):
        router = file.tensor(name)
        router.data = (np.frombuffer(router.data[: 4 * n], np.float32) * values).tobytes()
    else:
        file.tensors.append(float_tensor(name, [n], values.tobytes()))
    return values


def scale_by_powers_of_two(file: RawGguf) -> None:
    """Divide every matrix by a power of two of its own and store that as its scale, experts one by one.

    Neither rounds anything (F32, BF16, Q8_0), so the file gives the same logits to the bit.
    """
    for tensor, name in _matrices(file, (*_DENSE, *_EXPERTS, "token_embd")):
        n = tensor.dims[2] if len(tensor.dims) > 2 else 1
        first = zlib.crc32(tensor.name) % 5 + 1
        scales = _scales(file, name, n, lambda i, first=first: 2.0 ** -(first + i % 3))
        _divide(tensor, scales)


def _divide(tensor: Tensor, scales: np.ndarray) -> None:
    """By one power of two for each matrix, in the tensor's own type."""
    row = quants.quant_shape_to_byte_shape(_shape(tensor), _type(tensor))
    n_bytes = int(np.prod(row))
    if _type(tensor) == GGMLQuantizationType.Q8_0:  # blocks of a float16 and 32 bytes
        blocks = np.frombuffer(tensor.data[:n_bytes], np.uint8).reshape(len(scales), -1, 34).copy()
        d = blocks[..., :2].copy().view(np.float16)
        blocks[..., :2] = (d / scales[:, None, None].astype(np.float16)).view(np.uint8)
        tensor.data = blocks.tobytes()
        return
    values = values_of(tensor).reshape(len(scales), -1) / scales[:, None]
    _store(tensor, values.reshape(_shape(tensor)).astype(np.float32), _type(tensor))


def to_nvfp4(file: RawGguf) -> RawGguf:
    """Quantize every matrix but the embedding of an F32 file, as ModelOpt does: a scale per matrix or expert.

    Returns an F32 file of what the weights are now, as the gguf package reads them, times their scales.
    """
    plain = file.copy()
    for tensor, name in _matrices(file, (*_DENSE, *_EXPERTS)):
        values = values_of(tensor)
        matrices = values.reshape(-1, *values.shape[-2:])
        largest = np.abs(matrices).max(axis=(1, 2)) / _LARGEST_NVFP4
        scales = _scales(file, name, len(matrices), lambda i, largest=largest: largest[i])
        scales = scales[:, None, None]
        tensor.data, tensor.type = _quantize_nvfp4(matrices / scales), GGMLQuantizationType.NVFP4.value
        times = (values_of(tensor).reshape(matrices.shape) * scales).reshape(values.shape)
        _store(plain.tensor(tensor.name.decode()), times, GGMLQuantizationType.F32)
    return plain
