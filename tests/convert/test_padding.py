"""Feed-forward lengths padded to rows that k-quants fit: the model computes the same function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from reference.random_checkpoint import SHAPES, random_ids, text_tensors, write_checkpoint
from support.gguf_files import fields_of, read_tensors

from pydiffusion import _native
from pydiffusion.convert import convert, quantize
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import KINDS
from pydiffusion.convert.gguf import rows
from pydiffusion.convert.quantization import type_plan as plan
from pydiffusion.errors import ConversionError

# Not multiples of 256, but not far below one; as the released model's 2112 and 704.
DENSE, EXPERT, D, N_EXPERT = 704, 480, 256, 6
DENSE_PADDED, EXPERT_PADDED = 768, 512
OWN = "diffusion-gemma."

ODD = dataclasses.replace(SHAPES["small"], dense=DENSE, expert=EXPERT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("odd") / "odd", ODD)


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``files("q4_k_m", pad=False)``: converted once."""
    made: dict[tuple[str, bool | None], Path] = {}

    def get(type: str, pad: bool | None = None) -> Path:
        if (type, pad) not in made:
            made[type, pad] = tmp_path_factory.mktemp("gguf") / f"{type}.gguf"
            convert(folder, made[type, pad], type, pad=pad)
        return made[type, pad]

    return get


def run(path: Path, self_conditioning: bool = True) -> np.ndarray:
    """The encoder's hidden states of a prompt and the logits of two steps after it, flattened."""
    session = _native.Session(_native.Model(str(path), n_threads=1, kv_type="f32"), 128)
    hidden = session.encode(random_ids(1, "prompt", 40, 512), return_hidden=True)
    canvas = random_ids(1, "canvas", 8, 512)
    logits = session.denoise(canvas, None)
    again = session.denoise(canvas, logits / np.float32(0.7))
    return np.concatenate([hidden.reshape(-1), logits.reshape(-1), again.reshape(-1)])


def test_a_padded_model_is_the_same_function(files: Callable[..., Path]) -> None:
    """Every path: encoder, denoiser, self-conditioning; exact but for the order of the sums."""
    plain, padded = run(files("f32", False)), run(files("f32", True))
    assert np.abs(padded - plain).max() < 1e-3 and np.abs(padded - plain).mean() < 1e-5
    assert np.abs(plain).mean() > 0.5  # not all zeros


def test_where_the_padding_is(files: Callable[..., Path]) -> None:
    reader = GGUFReader(files("f32", True))
    fields, found = fields_of(reader), read_tensors(reader)
    assert fields[OWN + "feed_forward_length"] == ("UINT32", DENSE_PADDED)
    assert fields[OWN + "expert_feed_forward_length"] == ("UINT32", EXPERT_PADDED)
    source = text_tensors(ODD, 0)
    layer = "model.decoder.layers.1."
    for ours, theirs in (("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj")):
        values = found[f"blk.1.{ours}.weight"]
        assert values.shape == (DENSE_PADDED, D) and not values[DENSE:].any()
        assert np.array_equal(values[:DENSE], source[f"{layer}{theirs}.weight"])
    values = found["blk.1.ffn_down.weight"]
    assert values.shape == (D, DENSE_PADDED) and not values[:, DENSE:].any()
    assert np.array_equal(values[:, :DENSE], source[layer + "mlp.down_proj.weight"])
    for ours in ("gate", "up"):
        assert not found[f"self_cond_{ours}.weight"][DENSE:].any()
    assert found["self_cond_down.weight"].shape == (D, DENSE_PADDED)
    # Gate's rows first, then up's, each followed by its own zeros.
    fused = found["blk.1.ffn_gate_up_exps.weight"].reshape(N_EXPERT, 2, EXPERT_PADDED, D)
    expected = source[layer + "experts.gate_up_proj"].reshape(N_EXPERT, 2, EXPERT, D)
    assert np.array_equal(fused[:, :, :EXPERT], expected) and not fused[:, :, EXPERT:].any()
    down = found["blk.1.ffn_down_exps.weight"]
    assert np.array_equal(down[:, :, :EXPERT], source[layer + "experts.down_proj"])
    assert not down[:, :, EXPERT:].any()


@pytest.mark.parametrize("type", ["q6_k", "q4_k_m", "q2_k"])
def test_k_quants_pad_by_default(files: Callable[..., Path], type: str) -> None:
    padded, plain = GGUFReader(files(type)), GGUFReader(files(type, False))
    types = {tensor.name: tensor.tensor_type.name for tensor in padded.tensors}
    assert all("_K" in name or name == "F32" for name in types.values()), types
    assert not any(t.tensor_type.name.endswith("_K") for t in plain.tensors if "ffn_down." in t.name)
    assert fields_of(plain)[OWN + "feed_forward_length"] == ("UINT32", DENSE)
    found = read_tensors(padded)
    for name in ("ffn_gate", "ffn_up"):  # what makes the padding harmless in any type
        assert not found[f"blk.0.{name}.weight"][DENSE:].any()
    fused = found["blk.0.ffn_gate_up_exps.weight"].reshape(N_EXPERT, 2, EXPERT_PADDED, D)
    assert not fused[:, :, EXPERT:].any()
    assert files(type).stat().st_size < 1.06 * files(type, False).stat().st_size


def test_types_that_need_no_padding_get_none(files: Callable[..., Path]) -> None:
    for type in ("f32", "q8_0", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4"):
        fields = fields_of(GGUFReader(files(type)))
        assert fields[OWN + "feed_forward_length"] == ("UINT32", DENSE), type


@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_k_m"])
def test_quantizing_pads_as_converting_does(
    folder: Path, files: Callable[..., Path], tmp_path: Path, type: str
) -> None:
    quantize(files("f32", False), tmp_path / "q.gguf", type, pad=True)
    assert (tmp_path / "q.gguf").read_bytes() == files(type, True).read_bytes()
    # A padded file is an ordinary one: quantizing it again pads nothing more.
    report = quantize(files("f32", True), tmp_path / "again.gguf", type)
    assert (tmp_path / "again.gguf").read_bytes() == files(type, True).read_bytes()
    assert not report.notes


def test_quantized_sources_are_padded_without_loss(files: Callable[..., Path], tmp_path: Path) -> None:
    report = quantize(files("q8_0"), tmp_path / "p.gguf", "q8_0", pad=True)
    assert not any("second time" in note for note in report.notes)
    assert (tmp_path / "p.gguf").read_bytes() == files("q8_0", True).read_bytes()


def test_padding_counts_in_bytes_but_not_in_weights(folder: Path, tmp_path: Path) -> None:
    padded = convert(folder, tmp_path / "a.gguf", "f32", pad=True)
    plain = convert(folder, tmp_path / "b.gguf", "f32")
    assert padded.n_weights == plain.n_weights
    assert plain.bits_per_weight == pytest.approx(32)
    assert padded.bits_per_weight > 33
    assert "feed_forward_length: 704 padded with zeros to 768" in " ".join(padded.notes)


def test_costly_padding_only_on_request(tmp_path: Path) -> None:
    down, up = ("blk.0.ffn_down.weight", (256, 320)), ("blk.0.ffn_up.weight", (320, 256))
    tensors = [down, up, ("blk.0.ffn_gate.weight", (320, 256))]
    assert plan.plan_types(tensors, "q4_k_m", KINDS).lengths == {}
    assert plan.plan_types(tensors, "q4_k_m", KINDS, pad=True).lengths == {"feed_forward_length": (320, 512)}
    # 300 fits no block at all: padding beats F16.
    tensors = [(name, tuple(300 if n == 320 else n for n in shape)) for name, shape in tensors]
    assert plan.plan_types(tensors, "q2_k", KINDS).tensors["blk.0.ffn_down.weight"].shape == (256, 512)


def test_nonzero_padding_is_detected(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rows.convert_rows

    def careless(data: np.ndarray, source: str, target: str, n_per_row: int, name: str, **choices: object):
        values = rows.to_float32(data, source, n_per_row).copy()
        values[~values.any(axis=1)] = 1e-3
        return right(values.view(np.uint8), "F32", target, n_per_row, name, **choices)

    monkeypatch.setattr(rows, "convert_rows", careless)
    with pytest.raises(ConversionError, match=r"self_cond_gate\.weight.*does not agree"):
        convert(folder, tmp_path / "m.gguf", "q4_k_m")
    assert not list(tmp_path.iterdir())
