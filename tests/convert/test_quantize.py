"""`quantize`: from GGUF to GGUF."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from support.gguf_files import NEED_IMATRIX, fields_of, finish, read_tensors

from pydiffusion.convert import TYPES, convert, quantize
from pydiffusion.errors import ConversionError, ModelFormatError, PyDiffusionError


@pytest.fixture(scope="module")
def f32_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("f32") / "small.gguf"
    convert(folder, target, "f32")
    return target


@pytest.mark.parametrize("type", [type for type in TYPES if type not in NEED_IMATRIX])
def test_quantizing_an_f32_file_equals_converting_directly(
    folder: Path, f32_path: Path, tmp_path: Path, type: str
) -> None:
    convert(folder, tmp_path / "direct.gguf", type)
    report = quantize(f32_path, tmp_path / "by-f32.gguf", type)
    assert (tmp_path / "by-f32.gguf").read_bytes() == (tmp_path / "direct.gguf").read_bytes()
    assert report.type == type
    assert bool(report.notes) == type.startswith("tq")  # which tell what they are made for


def test_a_circulating_file_is_quantized_as_its_maker_did(circulating: Path, tmp_path: Path) -> None:
    quantize(circulating / "small-f32.gguf", tmp_path / "q.gguf", "q4_k_m", pad=False)
    ours, theirs = GGUFReader(tmp_path / "q.gguf"), GGUFReader(circulating / "small-q4_k_m.gguf")
    found = {t.name: (t.tensor_type, t.data.tobytes()) for t in ours.tensors}
    assert found == {t.name: (t.tensor_type, t.data.tobytes()) for t in theirs.tensors}
    assert fields_of(ours) == fields_of(theirs)


def write_gguf(
    path: Path, tensors: dict[str, np.ndarray], architecture: str = "diffusion-gemma", alignment: int = 32
):
    writer = GGUFWriter(path, arch=architecture)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("test.u8", 200)
    writer.add_int8("test.i8", -3)
    writer.add_int16("test.i16", -300)
    writer.add_uint64("test.u64", 2**40)
    writer.add_float64("test.f64", 0.1)
    writer.add_float32("test.f32", 0.1)
    writer.add_bool("test.bool", True)
    writer.add_string("test.str", "\u2581x")
    writer.add_array("test.floats", [0.5, 0.25])
    writer.add_array("test.flags", [True, False])
    writer.add_uint32("general.file_type", 0)
    finish(writer, tensors)


def random_rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def test_metadata_of_all_types_and_the_alignment_are_kept(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": random_rows(8, 256), "output_norm.weight": random_rows(256)}
    write_gguf(tmp_path / "a.gguf", tensors, alignment=128)
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0")
    before, after = fields_of(GGUFReader(tmp_path / "a.gguf")), fields_of(GGUFReader(tmp_path / "b.gguf"))
    assert after["general.file_type"] == ("UINT32", 7)
    assert after.pop("general.quantization_version") == ("UINT32", 2)
    assert after | {"general.file_type": ("UINT32", 0)} == before
    reader = GGUFReader(tmp_path / "b.gguf")
    assert all(t.data_offset % 128 == 0 for t in reader.tensors)
    assert np.array_equal(read_tensors(reader)["output_norm.weight"], tensors["output_norm.weight"])


def test_separate_experts_are_accepted(tmp_path: Path) -> None:
    tensors = {
        "token_embd.weight": random_rows(8, 256),
        "blk.0.ffn_gate_exps.weight": random_rows(3, 64, 256),
        "blk.0.ffn_up_exps.weight": random_rows(3, 64, 256) * 2,
        "blk.0.ffn_down_exps.weight": random_rows(3, 256, 64),
    }
    write_gguf(tmp_path / "a.gguf", tensors)
    report = quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m")
    reader = GGUFReader(tmp_path / "b.gguf")
    assert {t.name: t.tensor_type.name for t in reader.tensors} == {
        "token_embd.weight": "Q6_K",
        "blk.0.ffn_gate_exps.weight": "Q4_K",
        "blk.0.ffn_up_exps.weight": "Q4_K",
        "blk.0.ffn_down_exps.weight": "Q8_0",  # the only layer is the last eighth: Q6_K, and rows of 64
    }
    assert report.fallbacks == ["blk.0.ffn_down_exps.weight: Q6_K -> Q8_0 (rows of 64)"]
    for name, values in read_tensors(reader).items():
        assert np.linalg.norm(values - tensors[name]) < 0.1 * np.linalg.norm(values), name


def test_requantizing_is_noted_and_equal_types_are_copied(f32_path: Path, tmp_path: Path) -> None:
    quantize(f32_path, tmp_path / "q8.gguf", "q8_0")
    report = quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "q4_k_m")
    assert any("more: quantized a second time, Q8_0 -> Q4_K" in note for note in report.notes)
    assert sum("a second time" in note for note in report.notes) < 6, "one note for each pair of types"
    # Q8_0 by fallback in the recipe: nothing changes, so there is no note and the bytes are the same.
    q8 = {t.name: t for t in GGUFReader(tmp_path / "q8.gguf").tensors}
    q4 = {t.name: t for t in GGUFReader(tmp_path / "q4.gguf").tensors}
    name = "blk.3.ffn_down.weight"
    assert q4[name].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert q4[name].data.tobytes() == q8[name].data.tobytes()
    assert not any(name in note for note in report.notes)


def test_same_type_copies_the_file(f32_path: Path, tmp_path: Path) -> None:
    quantize(f32_path, tmp_path / "q.gguf", "q4_k_m")
    quantize(tmp_path / "q.gguf", tmp_path / "again.gguf", "q4_k_m")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "q.gguf").read_bytes()


def test_refusals(f32_path: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "llama.gguf", {"token_embd.weight": random_rows(8, 256)}, architecture="llama")
    with pytest.raises(ConversionError, match=r"general\.architecture.*'llama'"):
        quantize(tmp_path / "llama.gguf", tmp_path / "b.gguf", "q8_0")
    write_gguf(tmp_path / "odd.gguf", {"blk.0.attn_qkv.weight": random_rows(8, 256)})
    with pytest.raises(ConversionError, match=r"blk\.0\.attn_qkv\.weight"):
        quantize(tmp_path / "odd.gguf", tmp_path / "b.gguf", "q8_0")
    write_gguf(tmp_path / "flat.gguf", {"blk.0.attn_q.weight": random_rows(256)})
    with pytest.raises(ConversionError, match=r"blk\.0\.attn_q\.weight.*matrix"):
        quantize(tmp_path / "flat.gguf", tmp_path / "b.gguf", "q8_0")
    with pytest.raises(ConversionError, match="no such file"):
        quantize(tmp_path / "nothing.gguf", tmp_path / "b.gguf", "q8_0")
    with pytest.raises(ConversionError, match="one of the files being read"):
        quantize(f32_path, f32_path, "q8_0")
    with pytest.raises(ValueError, match="q9_k_m"):
        quantize(f32_path, tmp_path / "b.gguf", "q9_k_m")
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.9, 0.9999])
def test_a_truncated_source_is_refused(f32_path: Path, tmp_path: Path, share: float) -> None:
    data = f32_path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelFormatError):
        quantize(tmp_path / "cut.gguf", tmp_path / "b.gguf", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_a_source_that_shrinks_while_reading_is_an_error(f32_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "s.gguf"
    source.write_bytes(f32_path.read_bytes())

    def shrink(_: object) -> None:
        with source.open("r+b") as file:
            file.truncate(20_000)

    with pytest.raises(PyDiffusionError, match=r"truncated by \d+ bytes; was it changed"):
        quantize(source, tmp_path / "b.gguf", "q8_0", progress=shrink)
    assert [path.name for path in tmp_path.iterdir()] == ["s.gguf"]
