"""Several files from one read of the source, and nonfinite weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from support import checkpoint_folders as folders
from support.gguf_files import read_tensors

from pydiffusion.convert import Variant, convert, convert_family, quantize
from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint
from pydiffusion.convert.gguf import writer as pipeline
from pydiffusion.errors import ConversionError

TYPES = ("f32", "bf16", "q8_0", "q4_k_m", "iq4_xs", "mxfp4")


@pytest.mark.parametrize("chunk", [4 << 20, 30_000])
def test_a_family_equals_single_conversions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Padded and unpadded ones together: their chunks are of different rows of the same tensor."""
    monkeypatch.setattr(pipeline, "CHUNK_WEIGHTS", chunk)
    variants = [Variant(tmp_path / f"{type}.gguf", type) for type in TYPES]
    variants.append(Variant(tmp_path / "padded.gguf", "q4_k_m", pad=True))
    variants.append(Variant(tmp_path / "over.gguf", "q4_0", tensor_types=[("attn_", "q8_0")]))
    reports = convert_family(folder, variants)
    for variant, report in zip(variants, reports, strict=True):
        options = {"pad": variant.pad, "tensor_types": variant.tensor_types}
        alone = convert(folder, tmp_path / "alone.gguf", variant.type, **options)
        assert Path(variant.target).read_bytes() == (tmp_path / "alone.gguf").read_bytes()
        assert (report.n_bytes, report.bits_per_weight) == (alone.n_bytes, alone.bits_per_weight)
        assert report.notes == alone.notes


def test_the_source_is_read_once_to_write_and_once_to_verify(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_WEIGHTS", 30_000)
    read, bytes_of = Checkpoint.read, Counter()

    def counted(checkpoint: Checkpoint, tensor: object, start: int, n_bytes: int) -> np.ndarray:
        bytes_of[tensor.name] += n_bytes
        return read(checkpoint, tensor, start, n_bytes)

    monkeypatch.setattr(Checkpoint, "read", counted)
    variants = [Variant(tmp_path / f"{type}.gguf", type) for type in TYPES]
    variants.append(Variant(tmp_path / "padded.gguf", "q4_k_m", pad=True))
    convert_family(folder, variants)
    with Checkpoint(folder) as checkpoint:
        assert bytes_of == {name: 2 * tensor.n_bytes for name, tensor in checkpoint.tensors.items()}


def test_a_family_of_a_gguf(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "f32.gguf", "f32")
    convert_family(
        tmp_path / "f32.gguf", [Variant(tmp_path / "a.gguf", "q8_0"), Variant(tmp_path / "b.gguf")]
    )
    quantize(tmp_path / "f32.gguf", tmp_path / "c.gguf", "q4_k_m")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_one_failure_stops_the_whole_family(folder: Path, tmp_path: Path) -> None:
    variants = [Variant(tmp_path / "a.gguf", "q8_0"), Variant(tmp_path / "b.gguf", "iq2_xs")]
    with pytest.raises(ConversionError, match="needs an imatrix"):
        convert_family(folder, variants)
    with pytest.raises(ValueError, match="target of its own"):
        convert_family(folder, [variants[0], variants[0]])
    with pytest.raises(ValueError, match="at least one"):
        convert_family(folder, [])

    def stop(state: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_family(folder, [variants[0], Variant(tmp_path / "c.gguf")], progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_kept_when_allowed(tmp_path: Path) -> None:
    weights = folders.weights()
    matrix, norm = (
        "model.decoder.layers.0.mlp.up_proj.weight",
        "model.decoder.layers.1.input_layernorm.weight",
    )
    weights[matrix][3, 5], weights[matrix][7, 7], weights[norm][2] = np.nan, -np.inf, np.inf
    made = folders.make_folder(tmp_path / "made", tensors=weights)
    with pytest.raises(ConversionError, match=r"blk\.0\.ffn_up\.weight: .*--allow-nonfinite"):
        convert(made, tmp_path / "m.gguf", "q8_0")
    report = convert(made, tmp_path / "m.gguf", "q8_0", allow_nonfinite=True)
    reader = GGUFReader(tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "BF16" and kinds["blk.1.ffn_up.weight"] == "Q8_0"
    found = read_tensors(reader)
    np.testing.assert_array_equal(found["blk.0.ffn_up.weight"], weights[matrix])
    np.testing.assert_array_equal(found["blk.1.attn_norm.weight"], weights[norm])
    assert sum("holds NaN or infinite weights" in note for note in report.notes) == 2
    sound = folders.make_folder(tmp_path / "sound")
    assert convert(sound, tmp_path / "a.gguf", "q8_0", allow_nonfinite=True).types == (
        convert(sound, tmp_path / "b.gguf", "q8_0").types
    )
