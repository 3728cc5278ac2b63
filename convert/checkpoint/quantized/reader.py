"""Find the quantized matrices of a checkpoint, and read them as weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from pydiffusion.convert.checkpoint.quantized.floats import byte_codes, fp4, matrix_factors, n_matrices_of
from pydiffusion.convert.checkpoint.quantized.integers import awq, compressed_integers, gptq, mlx_affine
from pydiffusion.convert.checkpoint.quantized.parts import FLOATS, Parts
from pydiffusion.convert.checkpoint.quantized.settings import Quantization
from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint, StoredTensor
from pydiffusion.convert.checkpoint.weights import Weight, Weights, stored_weight
from pydiffusion.errors import ConversionError

_CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8", "U32")
# Tensors beside the codes; they can have the dtype of codes.
_BESIDE = re.compile(
    r"(_scale|_scale_2|_scale_inv|_scales|_zero_point|\.scales|\.biases|\.qzeros|_g_idx|_shape)$"
)
# Scales of activations and of the KV cache, which the runtime does not quantize this way.
_OF_ACTIVATIONS = re.compile(
    r"(\.|_)(input|output|activation|k|v|q)_(global_)?(scale|zero_point)$|\.activation_scale$"
)
# Steps that change what the codes stand for.
_UNSUPPORTED = {
    ".pre_quant_scale": "weights scaled for their inputs (ModelOpt's AWQ)",
    ".svdquant_lora_a": "weights less a matrix of low rank (SVDQuant)",
    ".absmax": "bitsandbytes' types",
    ".quant_map": "bitsandbytes' types",
}


def open_weights(checkpoint: Checkpoint, settings: Quantization, notes: list[str], keep: str = "") -> Weights:
    """All tensors of a checkpoint, quantized ones as float32 that is computed while it is read. ``keep``: a
    ggml type whose blocks the target takes as they are, empty for none.

    Raises ConversionError for codes without scales, and scales that don't fit.
    """
    by_name: dict[str, Weight] = {}
    used: set[str] = set()
    for tensor in checkpoint.tensors.values():
        _refuse_unsupported(tensor)
    for name, tensor in checkpoint.tensors.items():
        logical = _quantized_name(tensor)
        if logical is None:
            continue
        parts = Parts(checkpoint, logical, settings)
        if logical in by_name:
            raise ConversionError(f"{tensor.file}: the weights {logical!r} are stored twice")
        by_name[logical] = _read(parts, tensor)
        used |= {name, *parts.used}
    of_activations = {name for name in checkpoint.tensors if _OF_ACTIVATIONS.search(name)} - used
    if by_name:
        used |= of_activations
        notes.append(_note(by_name, settings.method, keep))
        if of_activations:
            notes.append(f"{len(of_activations)} scales of activations and KV cache are not used")
    for name, tensor in checkpoint.tensors.items():
        if name in used:
            continue
        if name in by_name:
            raise ConversionError(f"{tensor.file}: the weights {name!r} are stored twice")
        by_name[name] = stored_weight(checkpoint, tensor)
    return Weights(checkpoint.files[0].parent, by_name, keep)


def _note(quantized: Mapping[str, Weight], method: str, keep: str) -> str:
    types = {weight.blocks.type for weight in quantized.values() if weight.blocks is not None}
    if keep in types:
        done = f"those in {keep} keep their codes"
    else:
        options = " or ".join(f"--type {name.lower()}" for name in sorted(types))
        done = "a file of more bits is not more exact than they are"
        done += f", and {options} keeps their codes" if options else ""
    return f"the checkpoint is quantized{f' ({method})' if method else ''}: {len(quantized)} matrices; {done}"


def _refuse_unsupported(tensor: StoredTensor) -> None:
    for suffix, what in _UNSUPPORTED.items():
        if tensor.name.endswith(suffix):
            raise ConversionError(
                f"{tensor.file}: tensor {tensor.name!r}: {what} are not supported; convert the unquantized "
                "checkpoint instead"
            )


def _quantized_name(tensor: StoredTensor) -> str | None:
    """The name of the matrix whose codes a tensor has, None if it has none."""
    name = tensor.name
    for suffix in ("_packed", "_blocks"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    if name.endswith(".qweight"):
        return name.removesuffix("qweight") + "weight"
    is_codes = tensor.dtype in _CODES and not _BESIDE.search(name) and not _OF_ACTIVATIONS.search(name)
    return name if is_codes else None


def _read(parts: Parts, codes: StoredTensor) -> Weight:
    if codes.name.endswith(".qweight"):
        return _read_transposed(parts, codes)
    if codes.name.endswith("_packed"):
        return compressed_integers(parts, codes) if codes.dtype == "I32" else _read_fp4(parts, codes)
    if codes.name.endswith("_blocks"):
        return _read_blocks(parts, codes)
    if codes.dtype == "U32":
        return _read_mlx(parts, codes)
    if codes.dtype == "U8":
        return _read_fp4(parts, codes)
    if codes.dtype == "I8":
        zeros = parts.zeros(f"{parts.name}_zero_point", "I8", *FLOATS)
        return byte_codes(parts, codes, parts.need(f"{parts.name}_scale", *FLOATS), zeros)
    return _read_fp8(parts, codes)


def _read_transposed(parts: Parts, codes: StoredTensor) -> Weight:
    readers = {"awq": awq, "gptq": gptq}
    if parts.settings.method not in readers:
        raise parts.error(
            "is stored as AWQ and GPTQ do, and config.json has no 'quantization_config' that says which",
            codes,
        )
    return readers[parts.settings.method](parts)


def _read_fp8(parts: Parts, codes: StoredTensor) -> Weight:
    """FP8 with scales under either name, both of which are multiplied; MXFP8, whose scales are bytes."""
    dtypes = (*FLOATS, "F8_E8M0", "U8")
    scales = parts.find(f"{parts.name}_scale_inv", *dtypes)
    if scales is None:
        scales = parts.need(f"{parts.name}_scale", *dtypes)
    return byte_codes(parts, codes, _as(scales, "U8", "F8_E8M0"))


def _read_fp4(parts: Parts, codes: StoredTensor) -> Weight:
    """compressed-tensors' (``weight_packed``, divided by a global scale), ModelOpt's (multiplied by one),
    and MXFP4, which has none.
    """
    if codes.dtype != "U8":
        raise parts.error(f"its codes are stored as {codes.dtype}, should be U8 or I32", codes)
    scales = _as(parts.need(f"{parts.name}_scale", "F8_E4M3", "F8_E8M0", "U8"), "U8", "F8_E8M0")
    if scales.dtype != "F8_E4M3":
        return fp4(parts, codes, scales)
    divides = codes.name.endswith("_packed")
    factor = parts.need(f"{parts.name}_{'global_scale' if divides else 'scale_2'}", *FLOATS)
    return fp4(parts, codes, scales, matrix_factors(parts, factor, n_matrices_of(codes), inverse=divides))


def _read_blocks(parts: Parts, codes: StoredTensor) -> Weight:
    """MXFP4 in blocks of 16 bytes: codes (..., n_blocks, 16), scales (..., n_blocks)."""
    scales = _as(parts.need(f"{parts.name}_scales", "U8", "F8_E8M0"), "U8", "F8_E8M0")
    if codes.dtype != "U8" or len(codes.shape) < 3 or codes.shape[-1] != 16:
        raise parts.error(
            f"{codes.name!r} is {codes.dtype} {list(codes.shape)}, should be U8 in blocks of 16 bytes", codes
        )
    return fp4(parts, replace(codes, shape=(*codes.shape[:-2], 16 * codes.shape[-2])), scales)


def _read_mlx(parts: Parts, codes: StoredTensor) -> Weight:
    settings = parts.settings.modules.get(parts.module, parts.settings)
    if parts.settings.method != "mlx":
        raise parts.error("is stored as MLX does, and config.json has no 'quantization' that says how", codes)
    if settings.mode == "affine":
        return mlx_affine(parts, codes, settings.bits, settings.group_size)
    scales = parts.need(f"{parts.module}.scales", "U8")
    as_bytes = replace(
        codes, dtype="U8", shape=(*codes.shape[:-1], 4 * codes.shape[-1] if codes.shape else 0)
    )
    if settings.mode == "mxfp8":
        return byte_codes(parts, replace(as_bytes, dtype="F8_E4M3"), replace(scales, dtype="F8_E8M0"))
    return fp4(parts, as_bytes, replace(scales, dtype="F8_E4M3" if settings.mode == "nvfp4" else "F8_E8M0"))


def _as(tensor: StoredTensor, old: str, new: str) -> StoredTensor:
    """The tensor with another dtype of the same size, if it has the old one."""
    return replace(tensor, dtype=new) if tensor.dtype == old else tensor
