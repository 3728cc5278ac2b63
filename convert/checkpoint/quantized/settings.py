"""Settings of a checkpoint's quantization, from ``config.json``: what its tensors don't say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydiffusion.convert.checkpoint.strict_json import Fields, read_json_object
from pydiffusion.errors import ConversionError

# Where it can be: keys of config.json (the last is MLX's), and files beside it (ModelOpt's, AutoGPTQ's).
KEYS = ("quantization_config", "compression_config", "quantization")
FILES = ("hf_quant_config.json", "quantize_config.json")
METHODS = ("compressed-tensors", "modelopt", "fp8", "fbgemm_fp8", "mxfp4", "quark", "awq", "gptq", "mlx")
# Methods whose codes are stored in words of packed integers with no tensor that tells one from another.
_INTEGERS = ("awq", "gptq")
_MAX_JSON = 64 << 20


@dataclass(frozen=True)
class Quantization:
    """Settings of a quantized checkpoint.

    Args:
        method: one of :data:`METHODS`, empty if the config does not say.
        where: the file and key, for messages.
        block: (rows, columns) of an FP8 block.
        bits: of packed integers; 0 if not given.
        group_size: of MLX.
        mode: of MLX: affine, mxfp4, mxfp8, nvfp4.
        has_zeros: every matrix of integers has zero points.
        zeros_minus_one: GPTQ's first format stores them less one.
        any_order: every matrix of GPTQ names the group of each column.
        modules: MLX's settings of single modules, by name.
    """

    method: str = ""
    where: str = "config.json"
    block: tuple[int, int] | None = None
    bits: int = 0
    group_size: int = 0
    mode: str = "affine"
    has_zeros: bool = False
    zeros_minus_one: bool = True
    any_order: bool = False
    modules: Mapping[str, Quantization] = field(default_factory=lambda: MappingProxyType({}))


def read_quantization(folder: Path, config: Fields, notes: list[str]) -> Quantization:
    """Read the settings. Raises ConversionError for a method that is not supported."""
    for holder in (config, *([config.object("text_config")] if _has_object(config) else [])):
        holder.asked.update(KEYS)
        for key in KEYS:
            values = holder.values.get(key)
            if values is None:
                continue
            if not isinstance(values, dict):
                raise holder.error(key, "an object")
            return _read(Fields(values, f"{holder.where}: {key}", notes, null_is_missing=True), key)
    for name in FILES:
        if (folder / name).exists():
            values = read_json_object(folder / name, _MAX_JSON)
            # AutoGPTQ's file is one of its own method; ModelOpt's says nothing that the tensors don't.
            values = values if name == FILES[1] else {"quant_method": "modelopt"}
            return _read(Fields({"quant_method": "gptq"} | values, name, notes, null_is_missing=True), name)
    return Quantization()


def _has_object(config: Fields) -> bool:
    return isinstance(config.values.get("text_config"), dict)


def _read(fields: Fields, key: str) -> Quantization:
    values = fields.values
    # MLX names no method, and is the only one that stores its settings under this key.
    method = values.get("quant_method", "mlx" if key == "quantization" or _is_mlx(values) else None)
    if method not in METHODS:
        raise ConversionError(
            f"{fields.where}: 'quant_method' is {method!r:.60}, which is not supported (only "
            f"{', '.join(METHODS)}); convert the unquantized checkpoint instead"
        )
    _refuse_transforms(fields)
    settings = Quantization(method, fields.where, _block(fields))
    if method == "mlx":
        return _read_mlx(fields, settings)
    if method in _INTEGERS:
        return _read_integers(fields, settings)
    return _read_groups(fields, settings)


def _refuse_transforms(fields: Fields) -> None:
    """Refuse steps on top of rounding, which change what the codes stand for; either may be set to none."""
    transform, sparsity = fields.values.get("transform_config"), fields.values.get("sparsity_config")
    rotates = transform.get("config_groups", transform) if isinstance(transform, dict) else transform
    prunes = sparsity.get("format", sparsity) != "dense" if isinstance(sparsity, dict) else sparsity
    for name, applies in (("transform_config", rotates), ("sparsity_config", sparsity and prunes)):
        if applies:
            raise ConversionError(
                f"{fields.where}: {name!r} is set, which is not supported: the weights are stored rotated or "
                "sparse; convert the unquantized checkpoint instead"
            )


def _is_mlx(values: Mapping[str, Any]) -> bool:
    return "quant_method" not in values and {"group_size", "bits"} <= set(values)


def _block(fields: Fields) -> tuple[int, int] | None:
    """(rows, columns) of a block, from the keys of either program."""
    for values in (fields.values, *_group_weights(fields.values)):
        for key in ("weight_block_size", "block_structure"):
            given = values.get(key)
            if given is None:
                continue
            if not (
                isinstance(given, list) and len(given) == 2 and all(type(n) is int and n > 0 for n in given)
            ):
                raise fields.error(key, "two positive integers")
            return given[0], given[1]
    return None


def _group_weights(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = values.get("config_groups")
    found = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    return [weights for weights in found if isinstance(weights, dict)]


def _read_groups(fields: Fields, settings: Quantization) -> Quantization:
    """Read the settings on which all groups of compressed-tensors that have integers agree."""
    where = f"{fields.where}: weights"
    groups = [
        Fields(weights, where, fields.notes, null_is_missing=True)
        for weights in _group_weights(fields.values)
        if weights.get("type") == "int"
    ]
    bits = {group.integer("num_bits", maximum=8) for group in groups}
    symmetric = {group.boolean("symmetric", True) for group in groups}
    return replace(settings, bits=bits.pop() if len(bits) == 1 else 0, has_zeros=symmetric == {False})


def _read_integers(fields: Fields, settings: Quantization) -> Quantization:
    if settings.method == "awq":
        fields.one_of("version", ("gemm", "GEMM"), "gemm")
        fields.one_of("bits", (4,), 4)
        return replace(settings, bits=4, has_zeros=fields.boolean("zero_point", True))
    format_name = fields.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    bits = fields.one_of("bits", (2, 3, 4, 8))
    return replace(
        settings,
        bits=bits,
        has_zeros=True,
        zeros_minus_one=format_name == "gptq",
        any_order=fields.boolean("desc_act", False),
    )


def _read_mlx(fields: Fields, settings: Quantization) -> Quantization:
    own = _mlx_module(fields, settings.where)
    modules = {}
    for name, values in fields.values.items():
        if isinstance(values, dict):
            modules[name] = _mlx_module(
                Fields(values, f"{fields.where}: {name!r:.80}", fields.notes, null_is_missing=True),
                settings.where,
            )
    return Quantization(
        "mlx", settings.where, None, own.bits, own.group_size, own.mode, modules=MappingProxyType(modules)
    )


def _mlx_module(fields: Fields, where: str) -> Quantization:
    mode = fields.one_of("mode", ("affine", "mxfp4", "mxfp8", "nvfp4"), "affine")
    return Quantization(
        "mlx", where, None, fields.integer("bits", 4, maximum=8), fields.integer("group_size", 64), mode
    )
