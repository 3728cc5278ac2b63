"""Spoiled quantized checkpoints: what they are made from, and how they have to be refused."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydiffusion.convert import convert
from pydiffusion.convert.checkpoint.quantized.reader import open_weights
from pydiffusion.convert.checkpoint.quantized.settings import read_quantization
from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint
from pydiffusion.convert.checkpoint.strict_json import Fields
from pydiffusion.errors import ConversionError
from support import quantized_folders
from support.quantized_folders import STYLES, Stored, Style, n_bytes, quantize, write_stored

MATRIX = "model.decoder.layers.0.mlp.gate_proj.weight"
MODULE = MATRIX.removesuffix(".weight")


def read_all(folder: Path, stored: Stored, config: dict[str, Any]) -> str:
    """Open a checkpoint and read all of its weights; returns the error's message, or nothing."""
    write_stored(folder / "model.safetensors", stored)
    try:
        settings = read_quantization(folder, Fields(config, "config.json", []), [])
        with Checkpoint(folder) as checkpoint, warnings.catch_warnings():
            warnings.simplefilter("error")
            for weight in open_weights(checkpoint, settings, []).by_name.values():
                size = n_bytes(weight.dtype, weight.shape)
                assert weight.read(0, size).size == size, weight.name
    except ConversionError as error:
        message = str(error)
        assert "\n" not in message and 30 < len(message) < 1000, message
        assert MODULE in message or "quantization" in message, message
        assert str(folder) in message or "config.json" in message, message
        return message
    return ""


def filled(dtype: str, shape: tuple[int, ...], byte: int = 1) -> tuple[str, tuple[int, ...], bytes]:
    """A stored tensor of equal bytes."""
    return dtype, shape, bytes([byte]) * n_bytes(dtype, shape)


def one_matrix(style: Style, shape: tuple[int, ...]) -> Stored:
    """:data:`MATRIX` alone as a style stores it."""
    return style.encoders[0](MATRIX, shape, np.random.default_rng(0))[0]


@functools.cache
def _stored(style: str) -> Stored:
    return quantize(STYLES[style], quantized_folders.small_weights()).stored


def stored_folder(style: str = "fp8-channel") -> Stored:
    """The tensors of a whole checkpoint, to be changed."""
    return dict(_stored(style))


def refused(folder: Path, message: str) -> None:
    """A conversion fails with this one line, and leaves nothing behind."""
    target = folder.parent / "out" / "m.gguf"
    target.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConversionError, match=message) as caught:
            convert(folder, target, "q8_0")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert list(target.parent.iterdir()) == []
