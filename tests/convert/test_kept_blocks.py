"""NVFP4 and MXFP4 checkpoints to files of the same type: codes copied, factors in tensors of their own."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from support import checkpoint_folders as folders
from support import fp4_folders
from support.fp4_folders import EXPERT, MATRIX, make_fp4

from pydiffusion.convert import Variant, convert, convert_family, quantize, verify
from pydiffusion.errors import ConversionError

STYLES = {"modelopt": "nvfp4", "compressed-tensors": "nvfp4", "mxfp4": "mxfp4"}


@pytest.fixture(scope="module", params=STYLES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict]:
    """(style, folder, dequantized weights by name)."""
    folder = folders.make_folder(tmp_path_factory.mktemp("fp4") / request.param)
    return request.param, folder, make_fp4(folder, folders.weights(), request.param)


def read(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """(type, values) of each tensor, by the ``gguf`` package alone."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]),
        )
        for tensor in GGUFReader(path).tensors
    }


def with_factors(found: dict[str, tuple[str, np.ndarray]], name: str) -> np.ndarray:
    """A tensor's weights times its factors; gate and up of experts joined."""
    if name not in found:
        parts = [with_factors(found, name.replace("gate_up", part)) for part in ("gate", "up")]
        return np.concatenate(parts, axis=1)
    values = found[name][1]
    factors = found.get(name.replace(".weight", ".scale"))
    if factors is None or "ffn_down_exps" in name or "ffn_gate_inp" in name:
        return values
    return values * factors[1].reshape(-1, *(1,) * (values.ndim - 1))


def test_the_blocks_are_those_of_the_checkpoint(made: tuple[str, Path, dict], tmp_path: Path) -> None:
    style, folder, weights = made
    type = STYLES[style]
    report = convert(folder, tmp_path / "m.gguf", type)
    found = read(tmp_path / "m.gguf")
    kept = {name for name, (kind, _) in found.items() if kind == type.upper()}
    quantized = {name for name in weights if MATRIX.fullmatch(name) or EXPERT.fullmatch(name)}
    apart = (
        len(folders.SLIDING) if type == "nvfp4" else 0
    )  # gate and up of experts, with factors of their own
    assert len(kept) == len(quantized) + apart and report.fallbacks == []
    assert sum(f"those in {type.upper()} keep their codes" in note for note in report.notes) == 1
    for name in quantized:
        own, wanted = folders.gguf_name(name), weights[name]
        got = with_factors(found, own)
        if "experts.down_proj" in name:  # what an expert gives is multiplied by the router's scale as well
            wanted = (
                wanted * weights[name.replace("experts.down_proj", "router.per_expert_scale")][:, None, None]
            )
            got = got * found[own.replace("weight", "scale")][1][:, None, None]
        np.testing.assert_allclose(got, wanted, rtol=3e-7, atol=0, err_msg=own)
    assert verify(tmp_path / "m.gguf", folder).problems == []


def test_other_types_get_the_dequantized_weights(made: tuple[str, Path, dict], tmp_path: Path) -> None:
    style, folder, weights = made
    report = convert(folder, tmp_path / "m.gguf", "f32")
    assert (
        sum("is quantized" in note and f"--type {STYLES[style]} keeps" in note for note in report.notes) == 1
    )
    found = read(tmp_path / "m.gguf")
    assert not any(name.endswith("attn_q.scale") for name in found)
    for name, wanted in weights.items():
        np.testing.assert_allclose(found[folders.gguf_name(name)][1], wanted, rtol=3e-7, atol=0, err_msg=name)
    assert verify(tmp_path / "m.gguf", folder).problems == []


def test_a_kept_file_can_be_quantized_again(made: tuple[str, Path, dict], tmp_path: Path) -> None:
    style, folder, _ = made
    convert(folder, tmp_path / "kept.gguf", STYLES[style])
    quantize(tmp_path / "kept.gguf", tmp_path / "same.gguf", STYLES[style])
    kept, same = read(tmp_path / "kept.gguf"), read(tmp_path / "same.gguf")
    assert {name: kind for name, (kind, _) in kept.items()} == {
        name: kind for name, (kind, _) in same.items()
    }
    quantize(tmp_path / "kept.gguf", tmp_path / "wide.gguf", "f32")
    quantize(tmp_path / "kept.gguf", tmp_path / "other.gguf", "q8_0")
    assert verify(tmp_path / "other.gguf", folder).problems == []
    wide = read(tmp_path / "wide.gguf")
    assert {kind for kind, _ in wide.values()} == {"F32"}
    for name, (_, values) in kept.items():  # the factors stay beside
        np.testing.assert_array_equal(wide[name][1], values, err_msg=name)


def test_against_the_unquantized_weights(made: tuple[str, Path, dict], tmp_path: Path) -> None:
    """As from a checkpoint whose original is at hand: the file alone has factors, and gate and up apart."""
    style, folder, weights = made
    plain = folders.make_folder(tmp_path / "plain", tensors=weights, dtype="F32")
    path = tmp_path / "m.gguf"
    convert(folder, path, STYLES[style])
    assert verify(path, plain).problems == []
    damaged = ["blk.1.attn_k.scale", "blk.2.ffn_up_exps.scale", "blk.0.ffn_down_exps.scale"]
    if style == "mxfp4":
        damaged = ["blk.0.ffn_down_exps.scale"]
    for name in damaged:
        tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
        data = bytearray(path.read_bytes())
        values = np.frombuffer(data, np.float32, tensor.n_elements, tensor.data_offset) * 3
        data[tensor.data_offset : tensor.data_offset + values.nbytes] = values.tobytes()
        (tmp_path / "bad.gguf").write_bytes(data)
        matrix = name if style == "mxfp4" else name.replace(".scale", ".weight")
        problems = verify(tmp_path / "bad.gguf", plain).problems
        assert len(problems) == 1 and problems[0].startswith(f"{matrix}: as "), problems


def test_a_family_and_overrides(made: tuple[str, Path, dict], tmp_path: Path) -> None:
    style, folder, _ = made
    type = STYLES[style]
    convert_family(folder, [Variant(tmp_path / "a.gguf", type), Variant(tmp_path / "b.gguf", "q8_0")])
    assert verify(tmp_path / "a.gguf", folder).problems == []
    convert(folder, tmp_path / "kept.gguf", type)
    convert_family(folder, [Variant(tmp_path / "a.gguf", type)])
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "kept.gguf").read_bytes()
    convert(folder, tmp_path / "c.gguf", type, tensor_types={r"attn_q": "q8_0"})
    found = read(tmp_path / "c.gguf")
    assert found["blk.0.attn_q.weight"][0] == "Q8_0" and found["blk.0.attn_k.weight"][0] == type.upper()
    assert verify(tmp_path / "c.gguf", folder).problems == []


def test_a_head_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized as the embedding is, but from other weights: both keep their blocks and factors."""
    monkeypatch.setattr(fp4_folders, "MATRIX", re.compile(r".*(embed_tokens|lm_head)\.weight"))
    folder, tensors = folders.make_folder(tmp_path / "m"), folders.weights()
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"][::-1].copy()
    weights = make_fp4(folder, tensors, "modelopt")
    convert(folder, tmp_path / "m.gguf", "nvfp4")
    found = read(tmp_path / "m.gguf")
    for own, name in (("token_embd", "model.decoder.embed_tokens"), ("output", "lm_head")):
        assert found[f"{own}.weight"][0] == "NVFP4"
        got = with_factors(found, f"{own}.weight")
        np.testing.assert_allclose(got, weights[f"{name}.weight"], rtol=3e-7, atol=0)
    assert verify(tmp_path / "m.gguf", folder).problems == []


@pytest.mark.parametrize("code", [0x7F, 0x80, 0xB8])
def test_scales_that_ggml_reads_otherwise(code: int, tmp_path: Path) -> None:
    """NaN and negative scales of E4M3: ggml takes the first for 0 and drops the sign of the others."""
    folder = folders.make_folder(tmp_path / "m")
    make_fp4(folder, folders.weights(), "modelopt")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
    match = re.search(r'mlp\.up_proj\.weight_scale": \{[^}]*"data_offsets": \[(\d+), ', header)
    assert match is not None
    data[8 + len(header) + int(match[1]) + 7] = code
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=r"mlp\.up_proj\.weight.*negative scales or NaN"):
        convert(folder, tmp_path / "m.gguf", "nvfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
