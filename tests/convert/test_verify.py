"""`verify`: files that agree with their source pass, changed tensors are named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, quants
from support import checkpoint_folders as folders
from support.gguf_mutator import STRING, U32, read_gguf
from support.vision_folders import TOWER, make_folder, vision_weights

from pydiffusion.cli import main
from pydiffusion.convert import convert, convert_mmproj, verify
from pydiffusion.errors import ConversionError


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("type", ["f32", "bf16", "q8_0", "q4_k_m"])
def test_converted_files_verify(folder: Path, tmp_path: Path, type: str, pad: bool) -> None:
    convert(folder, tmp_path / "m.gguf", type, pad=pad)
    report = verify(tmp_path / "m.gguf", folder)
    assert report.problems == []
    assert len(report.tensors) == len(GGUFReader(tmp_path / "m.gguf").tensors)
    assert verify(tmp_path / "m.gguf").problems == []


def test_errors_are_those_of_the_gguf_packages_weights(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "m.gguf", "q4_0", pad=True)  # padding counts for nothing
    weights = {folders.gguf_name(name): values for name, values in folders.weights().items()}
    reader = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    checks = {check.name: check for check in verify(tmp_path / "m.gguf", folder).tensors}
    for name in ("blk.0.attn_q.weight", "blk.2.ffn_down.weight", "token_embd.weight", "output_norm.weight"):
        expected = weights[name].astype(np.float64)
        found = quants.dequantize(reader[name].data, reader[name].tensor_type).astype(np.float64)
        found = found.reshape(*expected.shape[:-1], -1)[..., : expected.shape[-1]]
        error = np.sqrt(((found - expected) ** 2).mean())
        cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
        check = checks[name]
        assert check.rmse == pytest.approx(error, rel=1e-6)
        assert check.cosine == pytest.approx(cosine, rel=1e-9)
        assert check.relative_error == pytest.approx(error / np.sqrt((expected**2).mean()), rel=1e-6)
        assert check.n_weights == expected.size


def damage(path: Path, tensor: str, data: bytes) -> None:
    offset = next(int(t.data_offset) for t in GGUFReader(path).tensors if t.name == tensor)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_changed_weights_are_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    convert(folder, path, "q8_0")
    damage(path, "blk.1.ffn_up.weight", b"\x00\x55" * 2000)
    assert [p.split(":")[0] for p in verify(path, folder).problems] == ["blk.1.ffn_up.weight"]
    assert verify(path).problems == [], "without the source these are just other weights"
    damage(path, "output_norm.weight", struct.pack("<f", float("nan")))
    assert verify(path).problems == ["output_norm.weight: holds NaN or infinite weights"]


def test_padding_that_is_not_zero_is_found(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    convert(folder, path, "f32", pad=True)
    name = "self_cond_up.weight"
    damage(path, name, folders.weights()["model.decoder.self_conditioning.up_proj.weight"].tobytes() + b"\1")
    assert [p.split(":")[0] for p in verify(path, folder).problems] == [name]


def test_a_different_source_is_detected(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    config = folders.model_config()
    config["text_config"]["sliding_window"] = 32
    other = folders.make_folder(tmp_path / "small", config=config, tensors=folders.weights(1))
    convert(folder, path, "q4_k_m")
    problems = verify(path, other).problems
    assert any("sliding_window' is 16, the source has 32" in problem for problem in problems)
    assert sum("does not agree with the source" in problem for problem in problems) > 50


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    convert(folder, path, "q8_0")
    assert main(["verify", str(path), "--against", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    damage(path, "blk.1.ffn_up.weight", b"\x00\x55" * 2000)
    assert main(["verify", str(path), "--against", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith("blk.1.ffn_up.weight"), "the worst first"
    assert "1 problems" in err
    with pytest.raises(ConversionError, match="no such file; give a GGUF"):
        verify(tmp_path / "nothing.gguf")
    with pytest.raises(ConversionError, match="no such file; give a GGUF"):
        verify(path, against=tmp_path / "nothing.gguf")


@pytest.mark.parametrize("type", ["bf16", "f32", "q8_0"])
def test_vision_files_verify(type: str, tmp_path: Path) -> None:
    weights = vision_weights()
    weights[f"{TOWER}encoder.layers.0.mlp.up_proj.input_max"] = np.array(np.inf, np.float32)
    made, path = make_folder(tmp_path / "made", weights), tmp_path / "v.gguf"
    convert_mmproj(made, path, type)
    assert verify(path, made).problems == verify(path).problems == []
    damage(path, "v.blk.0.ffn_up.input_max", struct.pack("<f", 3.0))
    damage(path, "v.blk.1.ffn_up.weight", b"\x00\x55" * 2000)
    named = [problem.split(":")[0] for problem in verify(path, made).problems]
    assert named == ["v.blk.0.ffn_up.input_max", "v.blk.1.ffn_up.weight"]


def test_the_keys_of_vision_files_are_compared(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "made")
    convert_mmproj(made, tmp_path / "v.gguf")
    file = read_gguf(tmp_path / "v.gguf")
    file.drop("clip.vision.max_soft_tokens")  # other writers' files, which stand for 280, the checkpoint's
    assert verify(file.write(tmp_path / "w.gguf"), made).problems == []
    file.set("clip.vision.max_soft_tokens", U32, 140)
    file.set("clip.vision.projector.scale_factor", U32, 2)
    problems = verify(file.write(tmp_path / "w.gguf"), made).problems
    assert [problem.split("'")[1] for problem in problems] == [
        "clip.vision.projector.scale_factor",
        "clip.vision.max_soft_tokens",
    ]


def test_files_from_before_the_keys_of_images_verify(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "m.gguf", "f32")
    file = read_gguf(tmp_path / "m.gguf")
    file.drop("diffusion-gemma.attention.bidirectional")
    assert verify(file.write(tmp_path / "old.gguf"), folder).problems == []
    file.set("diffusion-gemma.attention.bidirectional", STRING, "none")
    assert len(verify(file.write(tmp_path / "other.gguf"), folder).problems) == 1
