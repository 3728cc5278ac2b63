"""Recognise, by its first bytes, a file that is not what its name promises, and say what to do about it."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Literal

Kind = Literal["gguf", "safetensors", "json", "text"]

# Endings of unfinished downloads: of browsers, of hub clients, of aria2 and wget.
UNFINISHED = (".crdownload", ".part", ".partial", ".incomplete", ".download", ".aria2", ".opdownload", ".tmp")
_HEAD = 4096  # bytes that are looked at

_AGAIN = "download it again"
_UNPACK = "unpack it first"
_GGUF = "a GGUF file: run it as it is, or change its types with `pydiffusion quantize IN OUT --type TYPE`"
_SAFETENSORS = "a safetensors file: convert the folder that it is from with `pydiffusion convert FOLDER`"
_GGML = "a GGML file from before GGUF (2023), which is no longer read: look for a GGUF of the model"
_PICKLE = (
    "PyTorch's pickle format, which is not read since it can run code: load it with transformers and save it "
    "with save_pretrained, which writes safetensors"
)
# First bytes, and what such a file is and asks for.
_SIGNATURES = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download the file",
    ),
    (b"\x1f\x8b", f"a gzip archive: {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"a zstd archive: {_UNPACK}"),
    (b"\xfd7zXZ\0", f"an xz archive: {_UNPACK}"),
    (b"BZh", f"a bzip2 archive: {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7z archive: {_UNPACK}"),
    (b"Rar!", f"a RAR archive: {_UNPACK}"),
    (b"PK\3\4", f"a zip archive: {_UNPACK}; a model's .bin, .pt or .pth is {_PICKLE}"),
    (b"\x80\2", _PICKLE),
    (b"\x80\3", _PICKLE),
    (b"\x80\4", _PICKLE),
    (b"\x89HDF", "an HDF5 file (TensorFlow or Keras): save the model as safetensors with transformers"),
    (b"tjgg", _GGML),
    (b"lmgg", _GGML),
    (b"fmgg", _GGML),
    (b"algg", "an adapter (LoRA) from before GGUF (2023), which is no longer read"),
    (b"\xff\xfe", "text in UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16: save it as UTF-8"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")


def recognise(head: bytes, n_bytes: int, wanted: Kind) -> str | None:
    """Recognise a file that is of another kind than ``wanted``: what it is and what to do, as the rest of a
    sentence that begins with "is". None if it may be of that kind, or nothing is known about it.

    ``head``: its first bytes, a few thousand or all; ``n_bytes``: its size.
    """
    if n_bytes == 0:
        return f"empty: {_AGAIN}"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"GGUF"):
        return None if wanted == "gguf" else _GGUF
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= n_bytes - 8:
        return None if wanted == "safetensors" else _SAFETENSORS
    if text.startswith(b"{"):
        return (
            None
            if wanted in ("json", "text")
            else "JSON text: look for the weights beside it, or download them again"
        )
    for first, what in _SIGNATURES:
        if head.startswith(first):
            return what
    if text[:16].lower().startswith(_PAGES):
        return f"a web page saved in place of the file: {_AGAIN}, logged in if its site asks for it"
    if len(head) >= 8 and not head.strip(b"\0"):
        return f"an unfinished download, whose beginning is zeros: {_AGAIN}"
    return _short_answer(text) if wanted != "text" and n_bytes == len(head) and n_bytes < 200 else None


def _short_answer(text: bytes) -> str | None:
    """Servers say "Entry not found" and the like in place of a file."""
    try:
        words = " ".join(text.decode("utf-8").split())
    except UnicodeDecodeError:
        return None
    return f"only the text {words[:80]!r}, a server's answer?: {_AGAIN}" if words.isprintable() else None


def recognise_file(path: Path, wanted: Kind) -> str | None:
    """As :func:`recognise`, of the file at ``path``; None also if it is no regular file or can't be read."""
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return None
        with path.open("rb") as file:
            return recognise(file.read(_HEAD), path.stat().st_size, wanted)
    except OSError:
        return None


def unfinished_download(path: Path) -> Path | None:
    """The file in which a download of ``path`` has not finished, if there is one beside it."""
    for ending in UNFINISHED:
        other = path.with_name(path.name + ending)
        if other.is_file():
            return other
    return None
