"""Converted quantized checkpoints against transformers that holds the dequantized weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids, text_tensors
from support.fp4_folders import EXPERT, MATRIX, Stored, make_fp4, write_stored
from support.models import compare
from support.parity import ROUNDING_FACTOR

from pydiffusion import _native
from pydiffusion.convert import convert

pytestmark = pytest.mark.reference

SHAPE, SEED = "small", 31
STYLES = ("fp8", "modelopt", "compressed-tensors", "mxfp4")


def make_fp8(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """FP8 by row, rounded by torch; returns the dequantized weights."""
    import torch

    stored: Stored = {}
    weights = dict(tensors)

    def add(name: str, values: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(values)
        scale = rows.abs().amax(dim=1, keepdim=True) / 448
        codes = (rows / scale).to(torch.float8_e4m3fn)
        stored[name] = ("F8_E4M3", values.shape, codes.view(torch.uint8).numpy().tobytes())
        stored[f"{name}_scale"] = ("F32", tuple(scale.shape), scale.numpy().tobytes())
        return (codes.float() * scale).numpy()

    for name, values in tensors.items():
        if match := EXPERT.fullmatch(name):
            parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
            halves = values.reshape(-1, values.shape[1] // len(parts), values.shape[2])
            names = [f"{match[1]}.{i}.{part}.weight" for i in range(len(values)) for part in parts]
            weights[name] = np.concatenate(
                [add(one, half) for one, half in zip(names, halves, strict=True)]
            ).reshape(values.shape)
        elif MATRIX.fullmatch(name):
            weights[name] = add(name, values)
        else:
            stored[name] = ("F32", values.shape, values.tobytes())
    write_stored(folder / "model.safetensors", stored)
    return weights


@pytest.fixture(scope="module", params=STYLES)
def made(
    request: pytest.FixtureRequest, checkpoint_folder: Callable[..., Path], tmp_path_factory: Any
) -> tuple[str, Path, Any]:
    """(style, folder, the reference with its weights)."""
    from reference.hf_model import load_reference, set_weights

    plain = checkpoint_folder(SHAPE, seed=SEED)
    folder = tmp_path_factory.mktemp("quantized") / request.param
    shutil.copytree(plain, folder)
    tensors = text_tensors(SHAPES[SHAPE], SEED)
    if request.param == "fp8":
        weights = make_fp8(folder, tensors)
    else:
        weights = make_fp4(folder, tensors, request.param)
    model = load_reference(plain)
    set_weights(model, weights)
    return request.param, folder, model


def logits_of(model: Any, given: np.ndarray | None = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The reference's logits of each pass, and what the second is conditioned on: its own unless given."""
    from reference.hf_model import Context

    prompt, canvas, committed = ids()
    context = Context.new(model)
    context.encode(prompt)
    first = context.denoise(canvas)
    conditioning = (first / np.float32(0.5)).astype(np.float32) if given is None else given
    logits = {"first": first, "conditioned": context.denoise(canvas, conditioning)}
    context.encode(committed)
    logits["after a commit"] = context.denoise(canvas)
    return logits, conditioning


def ids() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    s = SHAPES[SHAPE]
    lengths = {"prompt": 38, "canvas": s.canvas, "committed": s.canvas}
    prompt, canvas, committed = (random_ids(SEED, f"q {k}", n, s.vocab) for k, n in lengths.items())
    return prompt, canvas, committed


def ours(path: Path, conditioning: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    prompt, canvas, committed = ids()
    session = _native.Session(_native.Model(str(path), n_threads=1, kv_type="f32", **options), 160)
    session.encode(prompt)
    logits = {
        "first": session.denoise(canvas, None),
        "conditioned": session.denoise(canvas, conditioning),
    }
    session.encode(committed)
    logits["after a commit"] = session.denoise(canvas, None)
    return logits


def test_f32(made: tuple[str, Path, Any], tmp_path: Path, report: Callable[[str], None]) -> None:
    style, folder, model = made
    convert(folder, tmp_path / "m.gguf", "f32")
    wanted, conditioning = logits_of(model)
    for name, logits in ours(tmp_path / "m.gguf", conditioning).items():
        difference = compare(logits, wanted[name])
        report(f"live: {style} checkpoint as F32, {name}: {difference}")
        assert difference.mean <= 1e-3 and difference.max <= 1e-2, (name, difference)
        assert difference.agreement == 1.0, (name, difference)


def middle(a: np.ndarray, b: np.ndarray) -> float:
    """Median over canvas positions of the mean difference: blind to the few where an expert turned."""
    return float(np.median(np.abs(a - b).mean(axis=1)))


def test_kept_blocks(made: tuple[str, Path, Any], tmp_path: Path, report: Callable[[str], None]) -> None:
    """The same weights, so that only the rounding of activations differs: as much as in transformers."""
    from reference.hf_model import rounded_activations

    style, folder, model = made
    if style == "fp8":
        return
    type = "mxfp4" if style == "mxfp4" else "nvfp4"
    convert(folder, tmp_path / "m.gguf", type, tensor_types={"token_embd": "f32"})
    wanted, conditioning = logits_of(model)
    with rounded_activations(model, "q8_0"):
        rounded, _ = logits_of(model, conditioning)
    for name, logits in ours(tmp_path / "m.gguf", conditioning).items():
        typical, allowed = middle(logits, wanted[name]), middle(rounded[name], wanted[name])
        report(f"live: {style} kept as {type}, {name}: middle position {typical:.1e}, rounded {allowed:.1e}")
        assert typical <= ROUNDING_FACTOR * allowed, (name, typical, allowed)
