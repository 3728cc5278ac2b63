"""Split files: written, read and merged, checked with the gguf package in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from support.gguf_files import finish, read_tensors

from pydiffusion.cli import main
from pydiffusion.convert import convert, quantize, repack, verify
from pydiffusion.errors import ConversionError, ModelFormatError


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("whole") / "m.gguf"
    convert(folder, target, "q8_0")
    return target


@pytest.fixture
def parts(folder: Path, tmp_path: Path) -> list[Path]:
    return convert(folder, tmp_path / "m.gguf", "q8_0", split_max_size=600_000).files


def test_parts_are_named_numbered_and_small(parts: list[Path], whole: Path, tmp_path: Path) -> None:
    count = len(parts)
    assert count > 3
    assert [part.name for part in parts] == [f"m-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    assert sorted(tmp_path.iterdir()) == parts
    assert [str(p) for p in parts] == [
        gguf.SHARD_NAME_FORMAT.format(str(tmp_path / "m"), i + 1, count) for i in range(count)
    ]
    total = len(GGUFReader(whole).tensors)
    for index, part in enumerate(parts):
        reader = GGUFReader(part)
        assert part.stat().st_size <= 600_000
        values = {key: reader.get_field(key) for key in ("split.no", "split.count", "split.tensors.count")}
        assert [int(field.contents()) for field in values.values()] == [index, count, total]
        kinds = [field.types[0].name for field in values.values()]
        assert kinds == ["UINT16", "UINT16", "INT32"]
        assert (reader.get_field("tokenizer.ggml.tokens") is not None) == (index == 0)


def test_the_parts_hold_the_tensors_of_the_whole(parts: list[Path], whole: Path) -> None:
    found = {name: value for part in parts for name, value in read_tensors(GGUFReader(part)).items()}
    expected = read_tensors(GGUFReader(whole))
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_merging_gives_the_unsplit_file(parts: list[Path], whole: Path, tmp_path: Path) -> None:
    for given in (parts[0], parts[2]):
        repack(given, tmp_path / "merged.gguf")
        assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()


def test_splitting_a_file_gives_the_parts_of_a_conversion(parts: list[Path], whole: Path, tmp_path: Path):
    (tmp_path / "again").mkdir()
    again = repack(whole, tmp_path / "again/m.gguf", split_max_size=600_000).files
    assert [part.read_bytes() for part in again] == [part.read_bytes() for part in parts]
    (tmp_path / "other").mkdir()
    other = repack(again[1], tmp_path / "other/m.gguf", split_max_size=1_000_000).files
    assert 1 < len(other) < len(again)
    repack(other[0], tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()


def test_a_small_file_is_not_split(folder: Path, whole: Path, tmp_path: Path) -> None:
    report = convert(folder, tmp_path / "m.gguf", "q8_0", split_max_size=10**9)
    assert report.files == [tmp_path / "m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == whole.read_bytes()


def test_a_tiny_size_gives_one_part_per_tensor(folder: Path, tmp_path: Path) -> None:
    report = convert(folder, tmp_path / "m.gguf", "q8_0", split_max_size=1)
    assert len(report.files) == report.n_tensors


def test_parts_are_read_by_quantize_verify_and_inspect(
    parts: list[Path], whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(parts[1], tmp_path / "a.gguf", "q4_0")
    quantize(whole, tmp_path / "b.gguf", "q4_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert verify(parts[0], folder).problems == []
    assert verify(tmp_path / "a.gguf", parts[0]).problems == []
    assert main(["inspect", str(parts[1]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parts"] == [str(part) for part in parts]
    assert found["n_tensors"] == len(GGUFReader(whole).tensors)
    assert "split.count" not in found["metadata"]


def test_parts_of_the_gguf_package_are_merged(tmp_path: Path) -> None:
    """Another architecture, written and split by gguf's own writer."""
    random = np.random.default_rng(0)
    tensors = {f"blk.{i}.w": random.standard_normal((4, 64)).astype(np.float32) for i in range(7)}
    tensors["ids"] = np.arange(10, dtype=np.int32)
    writer = GGUFWriter(tmp_path / "x.gguf", arch="other", split_max_tensors=3)
    writer.add_array("x.list", ["a", "b"])
    finish(writer, tensors)
    report = repack(tmp_path / "x-00002-of-00003.gguf", tmp_path / "merged.gguf")
    reader = GGUFReader(report.files[0])
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, tensors[tensor.name])
    assert reader.get_field("general.architecture").contents() == "other"
    assert reader.get_field("x.list").contents() == ["a", "b"]
    assert reader.get_field("split.count") is None


def test_missing_and_foreign_parts_are_refused(parts: list[Path], whole: Path, tmp_path: Path) -> None:
    content = parts[2].read_bytes()
    parts[2].unlink()
    with pytest.raises(ModelFormatError, match=r"00003-of-\d+\.gguf: is missing"):
        quantize(parts[0], tmp_path / "n.gguf", "q4_0")
    parts[2].write_bytes(parts[3].read_bytes())
    with pytest.raises(ModelFormatError, match=r"'split\.no' is 3, expected 2"):
        repack(parts[0], tmp_path / "n.gguf")
    parts[2].write_bytes(whole.read_bytes())
    with pytest.raises(ModelFormatError, match=r"00003-of-.*has no key 'split\.no'"):
        repack(parts[0], tmp_path / "n.gguf")
    parts[2].write_bytes(content)
    parts[0].rename(parts[0].with_name("first.gguf"))
    with pytest.raises(ModelFormatError, match="must end with -00001-of-"):
        repack(parts[0].with_name("first.gguf"), tmp_path / "n.gguf")
    with pytest.raises(ModelFormatError, match=r"open the first one, .*/m-00001-of-"):
        repack(parts[1], tmp_path / "n.gguf")


def test_a_part_can_not_be_the_target_of_its_merge(parts: list[Path]) -> None:
    before = [part.read_bytes() for part in parts]
    with pytest.raises(ConversionError, match="one of the files being read"):
        repack(parts[0], parts[1])
    assert [part.read_bytes() for part in parts] == before


def test_an_interruption_leaves_no_part(folder: Path, tmp_path: Path) -> None:
    def stop(state: object) -> None:
        if state.stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "m.gguf", "q8_0", split_max_size=600_000, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_commands(folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "m.gguf"
    command = ["convert", str(folder), "-o", str(target), "--type", "q8_0"]
    assert main([*command, "--split-max-size", "0.6M"]) == 0
    first = next(tmp_path.glob("m-00001-of-*.gguf"))
    assert f"{first} and " in capsys.readouterr().err
    assert main(["merge", str(first), str(target)]) == 0
    assert target.read_bytes() == whole.read_bytes()
    assert main(["split", str(target), str(tmp_path / "s.gguf"), "--split-max-size", "600kB"]) == 0
    assert len(list(tmp_path.glob("s-*.gguf"))) == len(list(tmp_path.glob("m-*.gguf")))
    assert main(["split", str(target), str(tmp_path / "s.gguf"), "--split-max-size", "x"]) == 2
