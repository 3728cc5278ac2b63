"""A model with adapters merged into it, against the model with the adapters beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids, write_checkpoint
from support.adapters_by_hand import random_adapter
from support.gguf_mutator import read_gguf
from support.models import compare
from support.scaled_weights import split_experts

from pydiffusion import _native
from pydiffusion.adapters.adapter import Adapter
from pydiffusion.convert import convert, open_parts, quantize

ODD = dataclasses.replace(SHAPES["small"], dense=704, expert=480)  # padded to 768 and 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("odd") / "odd", ODD)


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    convert(folder, path, "f32", pad=False)
    return path


def adapters_of(base: Path) -> list[tuple[Adapter, float]]:
    """One of every matrix, and one of a few of them with another rank."""
    shapes = {str(tensor.name): tuple(tensor.shape) for tensor in open_parts(base).tensors}
    few = ["attn_k", "ffn_down", "ffn_gate_up_exps", "self_cond_up"]
    return [(random_adapter(shapes, seed=1), 0.7), (random_adapter(shapes, kinds=few, rank=9, seed=2), -0.4)]


def run(path: Path, adapters: list[tuple[Adapter, float]]) -> dict[str, np.ndarray]:
    """Hidden states of a prompt longer than the window; logits of a step, and of one conditioned on it."""
    model = _native.Model(str(path), n_threads=1, kv_type="f32")
    session = _native.Session(model, 128)
    session.set_adapters([(_native.Adapter(model, a.name, a.scaled()), scale) for a, scale in adapters])
    hidden = session.encode(random_ids(1, "prompt", 40, 512), return_hidden=True)
    canvas = random_ids(1, "canvas", 8, 512)
    logits = session.denoise(canvas, None)
    return {
        "hidden": hidden,
        "logits": logits,
        "logits_sc": session.denoise(canvas, logits / np.float32(0.7)),
    }


def assert_equal(
    plain: Path, merged: Path, adapters: list[tuple[Adapter, float]], name: str, report: Callable[[str], None]
) -> None:
    before, ours, theirs = run(plain, []), run(merged, []), run(plain, adapters)
    for output, values in theirs.items():
        difference = compare(ours[output], values)
        report(f"merged against applied, {name}, {output}: {difference}")
        assert difference.mean < 2e-5 and difference.max < 2e-4, output
        assert difference.agreement == 1 or output == "hidden"
        assert compare(before[output], values).mean > 1000 * difference.mean, "the adapters change a lot"


@pytest.mark.parametrize("pad", [False, True])
def test_merged_is_applied(
    folder: Path, base: Path, tmp_path: Path, pad: bool, report: Callable[[str], None]
) -> None:
    """Float32, every matrix that can be adapted, two adapters at once: equal but for the order of sums."""
    adapters = adapters_of(base)
    convert(folder, tmp_path / "plain.gguf", "f32", pad=pad)
    convert(folder, tmp_path / "merged.gguf", "f32", pad=pad, lora=adapters)
    name = "padded" if pad else "as it is"
    assert_equal(tmp_path / "plain.gguf", tmp_path / "merged.gguf", adapters, name, report)


def test_where_gate_and_up_of_experts_are_apart(
    base: Path, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """As other converters write them; the adapters are of both together."""
    raw = read_gguf(base)
    split_experts(raw)
    plain = raw.write(tmp_path / "plain.gguf")
    quantize(plain, tmp_path / "merged.gguf", "f32", lora=adapters_of(base))
    assert_equal(plain, tmp_path / "merged.gguf", adapters_of(base), "experts apart", report)
