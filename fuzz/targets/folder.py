"""Fuzz target for checkpoint folders: configs, tokenizer, index, safetensors headers and data."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import checkpoint_folders
from support.vision_folders import PATCH, make_folder

from pydiffusion import DiffusionModel
from pydiffusion.convert import convert, convert_mmproj
from pydiffusion.errors import PyDiffusionError

from .files import refusal
from .mutation import damaged, mutated

_SHARD = "model-00001-of-00002.safetensors"
_TEMPLATE = "chat_template.jinja"
_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "model.safetensors.index.json", "processor_config.json", _SHARD, _TEMPLATE,
)  # fmt: skip

_PROCESSOR = {
    "image_processor": {
        "do_normalize": False, "do_resize": True, "image_mean": [0.0, 0.0, 0.0], "max_soft_tokens": 280,
        "patch_size": PATCH, "pooling_kernel_size": 3, "resample": 3, "rescale_factor": 1 / 255, "size": None,
    },
    "image_seq_length": 280,
}  # fmt: skip

# What is found in place of a file: a Git LFS pointer, a web page, archives, other formats, nothing.
_OTHERS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", b"<!doctype html>", b"PK\3\4",
    b"\x1f\x8b\x08", b"GGUF\3\0\0\0", b"\x80\2}q\0.", b"Entry not found", bytes(4096), b"\xff\xfe{\0}\0", b"",
)  # fmt: skip


class Target:
    """A conversion, of text or of the vision part, succeeds and gives a file that loads, or fails with a
    typed error of one line and leaves no files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = make_folder(folder / "small", n_shards=2)
        checkpoint_folders.write_json(self._folder / "processor_config.json", _PROCESSOR)
        self._output = folder / "output"
        self._output.mkdir()
        self._good = {name: (self._folder / name).read_bytes() for name in _FILES}
        self._changed: str | None = None
        assert self.one((_FILES[0], self._good[_FILES[0]])) == "done"

    def close(self) -> None:
        pass

    def make(self, draw: random.Random) -> tuple[str, bytes]:
        """Create an input: a file's name and content."""
        name = draw.choice(_FILES)
        good = self._good[name]
        if draw.random() < 0.05:
            return name, draw.choice(_OTHERS)
        if name == _SHARD:
            return name, self._shard(draw, good)
        if name == _TEMPLATE or draw.random() < 0.15:
            return name, damaged(draw, good)
        return name, json_bytes(mutated(draw, json.loads(good)))

    def _shard(self, draw: random.Random, good: bytes) -> bytes:
        (length,) = struct.unpack("<Q", good[:8])
        if draw.random() < 0.2:
            return damaged(draw, good[: 8 + length]) + good[8 + length :]
        header = json_bytes(mutated(draw, json.loads(good[8 : 8 + length])))
        claimed = len(header) if draw.random() < 0.9 else draw.choice((0, 1, 2**32, 2**63, 2**64 - 1, length))
        body = good[8 + length :]
        return (
            struct.pack("<Q", claimed)
            + header
            + (body if draw.random() < 0.9 else body[: draw.randrange(len(body))])
        )

    def one(self, given: tuple[str, bytes]) -> str:
        """Convert the folder with one file replaced."""
        name, data = given
        if self._changed not in (None, name):
            (self._folder / self._changed).write_bytes(self._good[self._changed])
        (self._folder / name).write_bytes(data)
        self._changed = name
        text, vision = self._output / "m.gguf", self._output / "v.gguf"
        outcome = _converted(convert, self._folder, text)
        outcome_of_vision = _converted(convert_mmproj, self._folder, vision)
        if outcome == "done":  # whatever is converted, loads
            with DiffusionModel(text, n_threads=1) as model:
                model.tokenize("the bath")
                if outcome_of_vision == "done":
                    model.native.new_vision(vision)
        for path in (text, vision):
            path.unlink(missing_ok=True)
        assert list(self._output.iterdir()) == []
        return outcome if outcome == outcome_of_vision else f"{outcome}, vision {outcome_of_vision}"


def _converted(convert: Callable[..., object], folder: Path, target: Path) -> str:
    try:
        convert(folder, target, "q8_0")
    except PyDiffusionError as error:
        assert len(str(error)) < 2000 and not target.exists()
        return refusal(error)
    return "done"


def json_bytes(value: Any) -> bytes:
    """JSON, or what is refused as nested too deeply."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 100_000
