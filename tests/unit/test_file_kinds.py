"""Files that are not what their names say: named, with what to do, wherever one is opened."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import checkpoint_folders as folders

from pydiffusion import DiffusionModel
from pydiffusion._util.file_kinds import UNFINISHED, recognise
from pydiffusion.cli import main
from pydiffusion.convert import convert, edit_metadata, quantize, repack, verify
from pydiffusion.convert.quantization.imatrix_file import read_imatrix
from pydiffusion.device_plan import plan
from pydiffusion.errors import ModelFormatError, PyDiffusionError


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.gguf", data)
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 10499672\n" % 7
PAYLOAD = b"GGUF" + bytes(100)
#: Content, and words of what is said about it.
KINDS: dict[str, tuple[bytes, str]] = {
    "pointer": (POINTER, "git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html><head><title>Log in</title></head></html>" * 9, "web page"),
    "page in capitals": (b"<HTML><BODY>403</BODY></HTML>", "web page"),
    "page after a mark": (b"\xef\xbb\xbf<!doctype html>", "web page"),
    "answer in XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "answer in words": (b"Entry not found", "'Entry not found'"),
    "another answer": (b"Invalid username or password.\n", "'Invalid username or password.'"),
    "empty": (b"", "empty"),
    "zeros": (bytes(65536), "unfinished download"),
    "gzip": (gzip.compress(PAYLOAD), "gzip archive: unpack"),
    "bzip2": (bz2.compress(PAYLOAD), "bzip2 archive: unpack"),
    "xz": (lzma.compress(PAYLOAD), "xz archive: unpack"),
    "zip": (zipped(PAYLOAD), "zip archive: unpack"),
    "pickle": (pickle.dumps({"a": 1}, protocol=2), "save_pretrained"),
    "newer pickle": (pickle.dumps({"a": 1}, protocol=4), "save_pretrained"),
    "GGML": (b"tjgg" + bytes(60), "before GGUF"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
}
WITH_KIND = pytest.mark.parametrize(("data", "words"), KINDS.values(), ids=KINDS)


def one_line(error: pytest.ExceptionInfo[BaseException], path: Path, words: str) -> None:
    message = str(error.value)
    assert "\n" not in message and str(path) in message and words in message, message


READERS: dict[str, Callable[[Path], object]] = {
    "DiffusionModel": lambda path: DiffusionModel(path, n_threads=1),
    "plan": plan,
    "quantize": lambda path: quantize(path, path.with_name("o.gguf"), "q8_0"),
    "repack": lambda path: repack(path, path.with_name("o.gguf")),
    "edit_metadata": lambda path: edit_metadata(path, {"general.url": "x"}),
    "verify": verify,
    "read_imatrix": read_imatrix,
}


def assert_named(read: Callable[[Path], object], path: Path, data: bytes, words: str) -> None:
    path.write_bytes(data)
    with pytest.raises(PyDiffusionError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and words in message, message
    assert list(path.parent.iterdir()) == [path]


@WITH_KIND
def test_in_place_of_a_gguf(tmp_path: Path, data: bytes, words: str) -> None:
    assert_named(READERS["DiffusionModel"], tmp_path / "m.gguf", data, words)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", ["pointer", "empty", "zip"])
def test_wherever_a_gguf_is_opened(tmp_path: Path, read: Callable[[Path], object], kind: str) -> None:
    assert_named(read, tmp_path / "m.gguf", *KINDS[kind])


@WITH_KIND
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_in_place_of_a_file_of_a_checkpoint(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    made = folders.make_folder(tmp_path / "folder")
    (made / name).write_bytes(data)
    with pytest.raises(PyDiffusionError) as caught:
        convert(made, tmp_path / "o.gguf", "bf16")
    one_line(caught, made / name, words)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_in_place_of_a_small_file(tmp_path: Path, name: str) -> None:
    made = folders.make_folder(tmp_path / "folder")
    (made / name).write_bytes(POINTER)
    with pytest.raises(PyDiffusionError) as caught:
        convert(made, tmp_path / "o.gguf", "bf16")
    one_line(caught, made / name, "git lfs pull")


@pytest.mark.parametrize("kind", ["pointer", "page", "empty", "gzip", "UTF-16"])
def test_in_place_of_a_chat_template(tmp_path: Path, kind: str) -> None:
    """These are text too, some of them."""
    made = folders.make_folder(tmp_path / "folder")
    data, words = KINDS[kind]
    (made / "chat_template.jinja").write_bytes(data)
    with pytest.raises(PyDiffusionError) as caught:
        convert(made, tmp_path / "o.gguf", "bf16")
    one_line(caught, made / "chat_template.jinja", words)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00002-of-00002.safetensors"])
def test_in_place_of_a_shard(tmp_path: Path, name: str) -> None:
    made = folders.make_folder(tmp_path / "folder", n_shards=2)
    (made / name).write_bytes(POINTER)
    with pytest.raises(PyDiffusionError) as caught:
        convert(made, tmp_path / "o.gguf", "bf16")
    one_line(caught, made / name, "git lfs pull")


def test_one_model_format_in_place_of_another(tmp_path: Path) -> None:
    made = folders.make_folder(tmp_path / "folder")
    convert(made, tmp_path / "m.gguf", "bf16")
    safetensors, gguf = (made / "model.safetensors").read_bytes(), (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(safetensors)
    with pytest.raises(ModelFormatError, match="safetensors file: convert the folder"):
        DiffusionModel(tmp_path / "x.gguf", n_threads=1)
    (tmp_path / "x.gguf").write_bytes((made / "config.json").read_bytes())
    with pytest.raises(ModelFormatError, match="JSON text"):
        DiffusionModel(tmp_path / "x.gguf", n_threads=1)
    for name in ("model.safetensors", "tokenizer.json"):
        (made / name).write_bytes(gguf)
        with pytest.raises(PyDiffusionError, match="a GGUF file: run it as it is"):
            convert(made, tmp_path / "o.gguf")
        folders.make_folder(made)


def test_a_part_of_a_split_file(tmp_path: Path) -> None:
    made = folders.make_folder(tmp_path / "folder")
    report = convert(made, tmp_path / "m.gguf", "bf16", split_max_size=2_000_000)
    assert len(report.files) > 2
    last = Path(report.files[-1])
    last.write_bytes(POINTER)
    for read in (lambda path: DiffusionModel(path, n_threads=1), plan, READERS["quantize"]):
        with pytest.raises(ModelFormatError) as caught:
            read(Path(report.files[0]))
        one_line(caught, last, "git lfs pull")


def test_commands_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(POINTER)
    for command in ("inspect", "verify", "doctor"):
        assert main([command, str(path)]) == 1
        assert "git lfs pull" in capsys.readouterr().err


@pytest.mark.parametrize("ending", UNFINISHED)
def test_an_unfinished_download_beside(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"m.gguf{ending}").write_bytes(PAYLOAD)
    with pytest.raises(FileNotFoundError, match=f"m.gguf{ending} beside it: finish the download"):
        DiffusionModel(tmp_path / "m.gguf", n_threads=1)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(ModelFormatError, match="regular file"):
        DiffusionModel(tmp_path / "m.gguf", n_threads=1)


def test_what_is_right_is_not_recognised(tmp_path: Path) -> None:
    made = folders.make_folder(tmp_path / "folder")
    for name, kind in (
        ("model.safetensors", "safetensors"),
        ("tokenizer.json", "json"),
        ("chat_template.jinja", "text"),
    ):
        data = (made / name).read_bytes()
        assert recognise(data[:4096], len(data), kind) is None
    assert recognise(b"GGUF\3\0\0\0", 8, "gguf") is None
    assert recognise(folders.TEMPLATE.encode(), len(folders.TEMPLATE), "text") is None
    assert recognise(b"Hello, {{ name }}", 17, "text") is None


def test_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As Windows' editors save it."""
    made = folders.make_folder(tmp_path / "folder")
    convert(made, tmp_path / "a.gguf", "bf16")
    config = made / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    convert(made, tmp_path / "b.gguf", "bf16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
