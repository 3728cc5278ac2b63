"""Metadata of a model file: what every architecture's has."""

from __future__ import annotations

from collections.abc import Mapping

import gguf

from pydiffusion.convert.gguf.header import Value

# Version of ggml's block layouts; written for every type, so that quantizing does not change the set of keys.
QUANTIZATION_VERSION = int(gguf.GGML_QUANT_VERSION)


def u32(value: int) -> Value:
    """An unsigned integer."""
    return Value("u32", value)


def f32(value: float) -> Value:
    """A float."""
    return Value("f32", value)


def model_keys(
    architecture: str, name: str, keys: Mapping[str, Value], file_type: int = 0
) -> dict[str, Value]:
    """All keys of a model but its tokenizer's, in the order of existing files: ``keys`` between the general
    ones.
    """
    return {
        "general.architecture": Value("str", architecture),
        "general.type": Value("str", "model"),
        "general.name": Value("str", name),
        **keys,
        "general.file_type": u32(file_type),
        "general.quantization_version": u32(QUANTIZATION_VERSION),
    }
