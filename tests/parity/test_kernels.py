"""Matmul kernels in whole models: which ones run, and that they agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.kernels import ALL_KERNELS, OWN_KERNELS, needs

from pydiffusion import DiffusionModel, GenerationOptions, _native
from pydiffusion.cli import main
from pydiffusion.convert import quantize


def run(path: Path, name: str, kernels: str, n_prompt: int) -> tuple[np.ndarray, dict[str, int]]:
    """Logits without and with self-conditioning after a prompt, and the operations of the last step."""
    shape = SHAPES[name]
    model = _native.Model(str(path), 2, kv_type="f16", kernels=kernels)
    assert model.description["kernels"] == kernels
    session = _native.Session(model, 200)
    session.encode(random_ids(0, "kernels", n_prompt, shape.vocab))
    canvas = random_ids(0, "kernelscanvas", shape.canvas, shape.vocab)
    first = session.denoise(canvas, None)
    return np.concatenate([first, session.denoise(canvas, first)]), session.step_ops


@pytest.mark.parametrize("kernels", OWN_KERNELS)
@pytest.mark.parametrize("type", ["q8_0", "q4_k_m", "bf16"])
def test_kernels_are_as_accurate_as_ggml(
    kernels: str, type: str, gguf_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Against the same weights in float32. All kernels round activations, to bfloat16 or to 8-bit blocks. The
    median over positions: where two experts score nearly the same, any rounding may choose the other.
    """
    path = gguf_file("mild", type, seed=0, dtype="f32")
    exact_path = tmp_path / "exact.gguf"
    quantize(path, exact_path, "f32")
    exact, _ = run(exact_path, "mild", "ggml", 90)
    of_ggml, ops = run(path, "mild", "ggml", 90)
    assert not {"matmul", "expert_matmul", "pack", "attend_tiles"} & set(ops)
    found, ops = run(path, "mild", kernels, 90)
    n_layer = len(SHAPES["mild"].layers)
    assert ops["expert_matmul"] == 2 * n_layer
    assert ops["matmul"] > 5 * n_layer and "MUL_MAT_ID" not in ops
    assert ops["MUL_MAT"] == n_layer  # the routers, in float32
    assert ("attend_tiles" in ops) == (kernels == "amx")
    error, error_of_ggml = (np.median(np.abs(x - exact).mean(axis=1)) for x in (found, of_ggml))
    assert error < 1.2 * error_of_ggml, (error, error_of_ggml)
    assert error < 0.04 * exact.std(), (error, exact.std())


@needs("amx")
@pytest.mark.parametrize("n_prompt", [5, 60, 150])
def test_tile_attention(n_prompt: int, gguf_file: Callable[..., Path]) -> None:
    """Both multiply float32 weights alike, so that only attention differs; within windows and beyond. A
    float16 cache in place of a float32 one makes mean differences of 4e-3 to 2.5e-2 here.
    """
    path = gguf_file("wide", "f32", seed=0, dtype="f32")
    expected, ops = run(path, "wide", "ggml", n_prompt)
    assert ops["attend"] == len(SHAPES["wide"].layers)
    found, ops = run(path, "wide", "amx", n_prompt)
    assert ops["attend_tiles"] == len(SHAPES["wide"].layers) and "matmul" not in ops
    assert np.abs(found - expected).mean() < 3e-3


@pytest.mark.parametrize("kernels", ALL_KERNELS)
def test_text_does_not_depend_on_threads_or_batching(kernels: str, gguf_file: Callable[..., Path]) -> None:
    path = gguf_file("wide", "q4_k_m", seed=0, dtype="f32")
    prompt = [int(i) for i in random_ids(0, "company", 20, SHAPES["wide"].vocab)]
    options = GenerationOptions(max_tokens=30, steps=4, seed=3)
    texts = []
    for n_threads in (1, 2):
        with DiffusionModel(path, n_threads=n_threads, kernels=kernels) as model:
            texts.append(list(model.generate(prompt, options).tokens))
            with_others = dict(model.generate_batch([prompt, [5, 6, 7]], options))
            texts.append(list(with_others[0].tokens))
    assert all(text == texts[0] for text in texts), texts


def test_unknown_kernels_are_refused(
    gguf_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = gguf_file("tiny", "f32")
    with pytest.raises(ValueError, match="there are no kernels 'fast'"):
        DiffusionModel(path, kernels="fast")
    assert main(["bench", "-m", str(path), "--kernels", "fast"]) == 2
    assert "this CPU has ggml" in capsys.readouterr().err
