"""Whole folders of quantizers: they convert to what plain folders of the same weights convert to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest
from support import checkpoint_folders as folders
from support import quantized_folders
from support.gguf_files import read_tensors
from support.quantized_folders import STYLES, Quantized, quantize, rename_to_encoder, write_folder
from support.vision_folders import PROJECTION, vision_config, vision_weights

from pydiffusion.convert import ConversionProgress, Variant, convert, convert_family, convert_mmproj, verify
from pydiffusion.convert.gguf import resume as journal
from pydiffusion.convert.gguf import writer
from pydiffusion.errors import ConversionError


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, Quantized]:
    weights = quantized_folders.small_weights()
    return {name: quantize(style, weights) for name, style in STYLES.items()}


def plain_folder(path: Path, values: dict[str, np.ndarray]) -> Path:
    return folders.make_folder(path, tensors=values, dtype="F32", config=quantized_folders.small_config())


def tensor_hashes(path: Path) -> dict[str, str]:
    """Type, shape and bytes of each tensor."""
    return {
        t.name: f"{t.tensor_type.name} {t.shape.tolist()} {hashlib.sha256(t.data.tobytes()).hexdigest()}"
        for t in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("name", STYLES)
def test_weights_are_those_of_the_definition(
    checkpoints: dict[str, Quantized], tmp_path: Path, name: str
) -> None:
    """Bit for bit, from one file and from shards."""
    checkpoint = checkpoints[name]
    n_shards = 3 if name in ("mixed", "mlx", "fp8-block") else 1
    folder = write_folder(tmp_path / "quantized", checkpoint.stored, STYLES[name], n_shards=n_shards)
    result = convert(folder, tmp_path / "m.gguf", "f32")
    assert any("is quantized" in note for note in result.notes)
    tensors = read_tensors(gguf.GGUFReader(tmp_path / "m.gguf"))
    assert len(tensors) == len(checkpoint.values) + 1  # rope_freqs
    for tensor, values in checkpoint.values.items():
        assert np.array_equal(tensors[folders.gguf_name(tensor)].reshape(values.shape), values), tensor


@pytest.mark.parametrize(("name", "type"), [("mixed", "q8_0"), ("fp8-block", "q4_k_m"), ("mlx", "q4_k_m")])
def test_other_types(checkpoints: dict[str, Quantized], tmp_path: Path, name: str, type: str) -> None:
    checkpoint = checkpoints[name]
    convert(write_folder(tmp_path / "q", checkpoint.stored, STYLES[name]), tmp_path / "m.gguf", type)
    convert(plain_folder(tmp_path / "plain", checkpoint.values), tmp_path / "plain.gguf", type)
    assert tensor_hashes(tmp_path / "m.gguf") == tensor_hashes(tmp_path / "plain.gguf")
    assert verify(tmp_path / "m.gguf", tmp_path / "q").problems == []


@pytest.mark.parametrize("name", ["fp8-channel", "gptq", "mlx"])
def test_names_of_the_encoder_alone(checkpoints: dict[str, Quantized], tmp_path: Path, name: str) -> None:
    """Tied weights have either name."""
    stored = rename_to_encoder(checkpoints[name].stored)
    convert(write_folder(tmp_path / "encoder", stored, STYLES[name]), tmp_path / "m.gguf", "f32")
    tensors = read_tensors(gguf.GGUFReader(tmp_path / "m.gguf"))
    for tensor, values in checkpoints[name].values.items():
        assert np.array_equal(tensors[folders.gguf_name(tensor)].reshape(values.shape), values), tensor


def test_both_names(checkpoints: dict[str, Quantized], tmp_path: Path) -> None:
    """Twins that are quantized alike are one; those that differ are refused by name."""
    stored = checkpoints["fp8-channel"].stored
    both = rename_to_encoder(stored) | stored
    convert(write_folder(tmp_path / "both", both, STYLES["fp8-channel"]), tmp_path / "m.gguf", "f32")
    other = quantize(STYLES["fp8-channel"], quantized_folders.small_weights(), seed=1).stored
    differ = write_folder(tmp_path / "differ", rename_to_encoder(other) | stored, STYLES["fp8-channel"])
    with pytest.raises(ConversionError, match="untied encoder weights"):
        convert(differ, tmp_path / "n.gguf", "f32")


def test_family(checkpoints: dict[str, Quantized], tmp_path: Path) -> None:
    """Several files from one reading equal those of the plain weights, and agree with their source."""
    checkpoint = checkpoints["mixed"]
    quantized = write_folder(tmp_path / "q", checkpoint.stored, STYLES["mixed"])
    plain = plain_folder(tmp_path / "plain", checkpoint.values)
    for source in (quantized, plain):
        convert_family(source, [Variant(f"{source}-{type}.gguf", type) for type in ("q8_0", "bf16", "q4_0")])
    for type in ("q8_0", "bf16", "q4_0"):
        found = tmp_path / f"q-{type}.gguf"
        assert tensor_hashes(found) == tensor_hashes(tmp_path / f"plain-{type}.gguf")
        assert verify(found, quantized).problems == []


def test_verify_finds_other_weights(checkpoints: dict[str, Quantized], tmp_path: Path) -> None:
    stored = checkpoints["mlx"].stored
    folder = write_folder(tmp_path / "q", stored, STYLES["mlx"])
    convert(folder, tmp_path / "m.gguf", "q8_0")
    name = "model.decoder.layers.1.mlp.up_proj.scales"
    dtype, shape, data = stored[name]
    write_folder(folder, stored | {name: (dtype, shape, data[::-1])}, STYLES["mlx"])
    problems = verify(tmp_path / "m.gguf", folder).problems
    assert [problem.split(":")[0] for problem in problems] == ["blk.1.ffn_up.weight"]


def test_resume(checkpoints: dict[str, Quantized], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted conversion goes on where it was, to the same file."""
    monkeypatch.setattr(writer, "CHUNK_WEIGHTS", 60_000)
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_FLUSHES", 0.0)
    folder = write_folder(tmp_path / "q", checkpoints["mixed"].stored, STYLES["mixed"])
    convert(folder, tmp_path / "whole.gguf", "q4_k_m")

    def interrupt(state: ConversionProgress) -> None:
        if state.stage == "write" and state.done_bytes > state.total_bytes / 2:
            raise KeyboardInterrupt

    target = tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(folder, target, "q4_k_m", resume=True, progress=interrupt)
    seen: list[ConversionProgress] = []
    convert(folder, target, "q4_k_m", resume=True, progress=seen.append)
    written = [state for state in seen if state.stage == "write"]
    assert written[-1].resumed_bytes > written[-1].total_bytes / 3
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("name", ["mlx", "fp8-channel"])
def test_quantized_vision_projection(tmp_path: Path, name: str) -> None:
    """The vision part of a folder whose projection is quantized, as MLX has it."""
    style = STYLES[name]
    vision = vision_weights()
    shape = vision.pop(PROJECTION).shape
    encoded, values = style.encoders[0](PROJECTION, shape, np.random.default_rng(3))
    stored = {key: quantized_folders.tensor("BF16", value) for key, value in vision.items()}
    stored |= encoded | quantize(style, quantized_folders.small_weights()).stored
    config = quantized_folders.small_config() | {"vision_config": vision_config()}
    folder = write_folder(tmp_path / "q", stored, style, config=config)
    convert_mmproj(folder, tmp_path / "mm.gguf", "f32")
    tensors = read_tensors(gguf.GGUFReader(tmp_path / "mm.gguf"))
    assert np.array_equal(tensors["mm.input_projection.weight"], values)
    convert(folder, tmp_path / "m.gguf", "f32")
