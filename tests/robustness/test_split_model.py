"""Split models opened by their first part: equal to the merged file, or an error that says what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.gguf_mutator import ARRAY, BOOL, I32, STRING, U16, U32, U64, Array, RawGguf, read_gguf
from support.hostile_process import FORMAT_ERRORS, Worker, assert_refused

from pydiffusion import DiffusionModel, GenerationOptions, ModelFormatError, _native
from pydiffusion.convert import repack
from pydiffusion.errors import ConversionError

COUNT = 3


@pytest.fixture(scope="module")
def good(gguf_file: Callable[..., Path]) -> RawGguf:
    return read_gguf(gguf_file("tiny", "f32"))


def split(good: RawGguf, *, tensors_in_first: bool = True) -> list[RawGguf]:
    """Three parts as llama.cpp's tool writes them; with ``tensors_in_first`` false the first has none."""
    parts = [good.copy(), RawGguf(), RawGguf()]
    third = len(good.tensors) // 3
    cuts = (0, third, 2 * third, None) if tensors_in_first else (0, 0, third, None)
    for index, part in enumerate(parts):
        part.tensors = good.copy().tensors[cuts[index] : cuts[index + 1]]
        part.set("split.no", U16, index)
        part.set("split.count", U16, COUNT)
        part.set("split.tensors.count", I32, len(good.tensors))
    return parts


def write(parts: list[RawGguf | bytes], folder: Path) -> list[Path]:
    paths = [folder / f"m-{index + 1:05}-of-{COUNT:05}.gguf" for index in range(len(parts))]
    for part, path in zip(parts, paths, strict=True):
        path.write_bytes(part if isinstance(part, bytes) else part.to_bytes())
    return paths


def logits(path: Path) -> list[np.ndarray]:
    session = _native.Session(_native.Model(str(path), n_threads=1), 48)
    hidden = session.encode(np.array([2, 3, 4, 5], dtype=np.int32), return_hidden=True)
    first = session.denoise(np.arange(4, dtype=np.int32), None)
    return [hidden, first, session.denoise(np.arange(4, dtype=np.int32), first)]


@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_k_m"])
def test_logits_are_those_of_the_merged_file(type: str, gguf_file: Callable, tmp_path: Path) -> None:
    whole = gguf_file("small", type)
    parts = repack(whole, tmp_path / "m.gguf", split_max_size=500_000).files
    assert len(parts) > 2
    models = [DiffusionModel(path, n_threads=1, n_ctx=256) for path in (whole, parts[0])]
    found = []
    for model in models:
        session = model.new_session()
        session.encode(np.arange(5, 45, dtype=np.int32))
        canvas = np.arange(model.canvas_length, dtype=np.int32)
        first = session.denoise(canvas)
        events = list(session.generate(GenerationOptions(max_tokens=20, steps=4, seed=3)))
        found.append([first, session.denoise(canvas, first), session.tokens, np.array(len(events))])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert models[0].metadata == models[1].metadata
    n_weight_bytes = sum(models[0].description["weight_types"].values())
    assert sum(models[1].description["weight_types"].values()) == n_weight_bytes
    assert models[1].description["n_bytes"] == sum(path.stat().st_size for path in parts)


@pytest.mark.parametrize("tensors_in_first", [True, False])
def test_tensors_may_be_in_any_part(tensors_in_first: bool, good: RawGguf, tmp_path: Path) -> None:
    paths = write(split(good, tensors_in_first=tensors_in_first), tmp_path)
    for ours, theirs in zip(logits(paths[0]), logits(good.write(tmp_path / "whole.gguf")), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_parts_with_different_alignments(good: RawGguf, tmp_path: Path) -> None:
    """8 is too little for ggml's kernels: tensors of that part are copied, those of the others are not."""
    parts = split(good)
    parts[1].alignment = 8
    parts[1].set("general.alignment", U32, 8)
    paths = write(parts, tmp_path)
    assert _native.GgufFile(str(paths[1])).data_offset % 32, "or this would show nothing"
    for ours, theirs in zip(logits(paths[0]), logits(good.write(tmp_path / "whole.gguf")), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_merged_view_equals_the_unsplit_file(good: RawGguf, tmp_path: Path) -> None:
    paths = write(split(good), tmp_path)
    whole = _native.GgufFile.open_all_parts(str(paths[0]))
    assert whole.paths == [str(path) for path in paths]
    assert [tensor.name for tensor in whole.tensors] == [tensor.name.decode() for tensor in good.tensors]
    assert [tensor.part for tensor in whole.tensors] == sorted(tensor.part for tensor in whole.tensors)
    assert list(whole.metadata) == [pair.key.decode() for pair in good.pairs]
    for tensor in whole.tensors:
        assert good.tensor(tensor.name).data.startswith(whole.tensor_bytes(tensor.name).tobytes())
    alone = _native.GgufFile(str(paths[1]))
    assert alone.paths == [str(paths[1])] and alone.metadata["split.no"] == 1


def put(index: int, key: str, type: int, value: object) -> Callable[[list[RawGguf]], object]:
    return lambda parts: parts[index].set(key, type, value)


def replace(index: int, make: Callable[[RawGguf], bytes]) -> Callable[[list[RawGguf]], None]:
    def change(parts: list) -> None:
        parts[index] = make(parts[index])

    return change


#: What is done to the parts, what the message must name, and which part is opened.
BROKEN: dict[str, tuple[Callable[[list[RawGguf]], object], str, int]] = {
    "second given": (lambda p: None, "is part 2 of 3 of a split file; open the first one, ", 1),
    "last given": (lambda p: None, "/m-00001-of-00003.gguf", 2),
    "last missing": (lambda p: p.pop(), "m-00003-of-00003.gguf: is missing", 0),
    "two missing": (lambda p: (p.pop(), p.pop()), "m-00002-of-00003.gguf: is missing", 0),
    "numbers swapped": (put(1, "split.no", U16, 2), "00002-of-00003.gguf: key 'split.no' is 2, expected", 0),
    "first twice": (lambda p: p.__setitem__(1, p[0].copy()), "key 'split.no' is 0, expected 1", 0),
    "first says it is second": (put(0, "split.no", U16, 1), "must end with -00002-of-00003.gguf", 0),
    "first has no number": (lambda p: p[0].drop("split.no"), "has no key 'split.no'", 0),
    "first is past the count": (put(0, "split.no", U16, 3), "'split.no' must be an integer from 0 to 2", 0),
    "number of text": (put(0, "split.no", STRING, "0"), "split.no", 0),
    "number below zero": (put(1, "split.no", I32, -1), "split.no", 0),
    "number of 2^64 - 1": (put(1, "split.no", U64, 2**64 - 1), "split.no", 0),
    "number true": (put(0, "split.no", BOOL, True), "split.no", 0),
    "number in a list": (put(1, "split.no", ARRAY, Array(U32, [1])), "split.no", 0),
    "second has no number": (lambda p: p[1].drop("split.no"), "has no key 'split.no'", 0),
    "count of text": (put(0, "split.count", STRING, "3"), "split.count", 0),
    "count of 65536": (put(0, "split.count", U32, 65536), "split.count", 0),
    "count of 65535": (put(0, "split.count", U16, 65535), "must end with -00001-of-65535.gguf", 0),
    "count of two": (put(0, "split.count", U16, 2), "must end with -00001-of-00002.gguf", 0),
    "count differs": (put(2, "split.count", U16, 4), "key 'split.count' is 4, expected 3", 0),
    "tensors not counted": (lambda p: p[0].drop("split.tensors.count"), "split.tensors.count", 0),
    "fewer tensors": (lambda p: p[1].tensors.pop(), "'split.tensors.count' is ", 0),
    "tensor count differs": (put(1, "split.tensors.count", I32, 7), "'split.tensors.count' is 7", 0),
    "tensor count below zero": (put(0, "split.tensors.count", I32, -5), "split.tensors.count", 0),
    "tensor twice": (
        lambda p: p[2].tensors.append(p[0].tensors[0]),
        "00003-of-00003.gguf: has tensor 'token_embd.weight', which is already in ",
        0,
    ),
    "other architecture in a part": (
        put(1, "general.architecture", STRING, "llama"),
        "00002-of-00003.gguf: key 'general.architecture' differs",
        0,
    ),
    "part cut": (replace(2, lambda f: f.to_bytes()[:-4096]), "00003-of-00003.gguf: tensor ", 0),
    "part cut in its header": (replace(1, lambda f: f.to_bytes()[:100]), "00002-of-00003.gguf: ", 0),
    "part empty": (replace(1, lambda f: b""), "00002-of-00003.gguf: ", 0),
    "part of zeros": (replace(1, lambda f: b"\0" * 4096), "00002-of-00003.gguf: ", 0),
    "offset past the end of the part": (
        lambda p: setattr(p[1].tensors[0], "offset", 1 << 20),
        "00002-of-00003.gguf: tensor ",
        0,
    ),
    "overlap in a part": (lambda p: setattr(p[1].tensors[1], "offset", 0), "overlap", 0),
    "tensor of another model": (
        lambda p: setattr(p[1].tensors[0], "name", b"blk.9.attn_q.weight"),
        "",
        0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_parts(name: str, worker: Worker, good: RawGguf, tmp_path: Path) -> None:
    change, names, given = BROKEN[name]
    parts: list = split(good)
    change(parts)
    paths = write(parts, tmp_path)
    answer = worker.ask(paths[given])
    assert_refused(answer, FORMAT_ERRORS, names, paths[given].with_name("no-path-is-left-out"))
    answer = worker.ask(paths[given], "use in python")
    assert_refused(answer, FORMAT_ERRORS, names, paths[given].with_name("no-path-is-left-out"))


def test_renamed_parts_are_refused(worker: Worker, good: RawGguf, tmp_path: Path) -> None:
    paths = write(split(good), tmp_path)
    for name in ("m.gguf", "m-1-of-3.gguf", "x", "-00001-of-00004.gguf"):
        renamed = paths[0].rename(tmp_path / name)
        assert_refused(worker.ask(renamed), FORMAT_ERRORS, "must end with -00001-of-00003.gguf", tmp_path)
        renamed.rename(paths[0])
    assert worker.ask(paths[0])["ok"]
    paths[1].unlink()
    paths[1].mkdir()
    assert_refused(worker.ask(paths[0]), FORMAT_ERRORS, "00002-of-00003.gguf: is not a", tmp_path)
    paths[1].rmdir()
    paths[1].symlink_to(tmp_path / "gone")
    assert_refused(worker.ask(paths[0]), FORMAT_ERRORS, "00002-of-00003.gguf: is missing", tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="NOT CHECKED: shortened files; the system forbids it")
def test_a_part_that_is_shortened_while_in_use(good: RawGguf, tmp_path: Path) -> None:
    paths = write(split(good), tmp_path)
    session = _native.Session(_native.Model(str(paths[0]), n_threads=1), 48)
    os.truncate(paths[2], 4096)
    with pytest.raises(ModelFormatError, match=r"00003-of-00003\.gguf: was truncated"):
        session.encode(np.arange(5, dtype=np.int32))


def test_sessions_work_with_split_and_merged_files(good: RawGguf, tmp_path: Path) -> None:
    """A session saved with the split model loads with the merged one; saving never overwrites a part."""
    first = write(split(good), tmp_path)[0]
    whole = DiffusionModel(good.write(tmp_path / "whole.gguf"), n_threads=1, n_ctx=48)
    parts = DiffusionModel(first, n_threads=1, n_ctx=48)
    session = parts.new_session()
    session.encode([2, 3, 4])
    session.save(tmp_path / "session")
    assert whole.load_session(tmp_path / "session").tokens.tolist() == [2, 3, 4]
    for path in (first, first.with_name("m-00002-of-00003.gguf")):
        with pytest.raises(ConversionError, match="one of the files being read"):
            session.save(path)
