"""Fuzz targets for files: whole models, tokenizer arrays, imatrices, saved sessions."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
from reference.random_checkpoint import write_checkpoint
from support.gguf_mutator import RawGguf, read_gguf

from pydiffusion import DiffusionModel, _native
from pydiffusion.convert import convert
from pydiffusion.convert.quantization.imatrix_file import Entry, read_imatrix, write_imatrix
from pydiffusion.errors import PyDiffusionError
from pydiffusion.tokenizer import Tokenizer

from . import gguf, mutation

_TEXTS = ("the road", "é\u2581 \n<bos><|turn>x", "")


def make_model(folder: Path) -> Path:
    """Convert the tiny model to float32, once per folder."""
    path = folder / "tiny.gguf"
    if not path.exists():
        (folder / "checkpoint").mkdir()
        convert(write_checkpoint(folder / "checkpoint", "tiny"), path, "f32")
    return path


def refusal(error: Exception) -> str:
    """Return a typed error's class name; its message must be one line."""
    assert "\n" not in str(error), error
    return type(error).__name__


class ModelTarget:
    """Load a file, then run a chat prompt and a step: done, or a typed error of one line."""

    def __init__(self, folder: Path) -> None:
        self._good = read_gguf(make_model(folder))
        self._path = folder / "input.gguf"
        assert self.one(self._good.to_bytes()) == "done"

    def close(self) -> None:
        pass

    def make(self, draw: random.Random) -> bytes:
        """Create an input: a file's content."""
        file = self._good.copy()
        for _ in range(mutation.n_changes(draw)):
            kind = draw.randrange(10)
            if kind < 5:
                gguf.change_pair(draw, file, lambda key: not key.startswith(b"tokenizer.ggml.m"))
            elif kind < 9:
                gguf.change_tensor(draw, file)
            else:
                gguf.change_frame(draw, file)
        return file.to_bytes()

    def one(self, data: bytes) -> str:
        """Load the model and generate."""
        self._path.write_bytes(data)
        try:
            with DiffusionModel(self._path, n_threads=1, n_ctx=8192) as model:
                if model.canvas_length > 64 or model.hparams["steps"] > 1000:
                    return "long"
                model.n_ctx = min(model.n_ctx, 40 + 2 * model.canvas_length)
                model.chat_prompt([{"role": "user", "content": "the road"}])
                model.generate("the road", max_tokens=2, steps=1)
        except (PyDiffusionError, ValueError, MemoryError) as error:
            return refusal(error)
        return "done"


class TokenizerTarget:
    """Read the tokenizer's keys, then encode and decode text."""

    def __init__(self, folder: Path) -> None:
        file = read_gguf(make_model(folder))
        file.tensors = []
        file.pairs = [pair for pair in file.pairs if pair.key.startswith(b"tokenizer.ggml")]
        self._good = file
        self._path = folder / "tokenizer.gguf"
        assert self.one(file.to_bytes()) == "done"

    def close(self) -> None:
        pass

    def make(self, draw: random.Random) -> bytes:
        """Create an input: a file's content."""
        file = self._good.copy()
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            gguf.change_pair(draw, file, lambda key: True)
        return file.to_bytes()

    def one(self, data: bytes) -> str:
        """Read the file, encode and decode."""
        self._path.write_bytes(data)
        try:
            tokenizer = Tokenizer(_native.GgufFile(str(self._path)).metadata)
            for text in _TEXTS:
                for special in (False, True):
                    ids = tokenizer.tokenize(text, parse_special=special)
                    assert all(0 <= i < tokenizer.n_vocab for i in ids)
                    tokenizer.detokenize(ids, keep_control=special)
            tokenizer.detokenize(range(tokenizer.n_vocab), keep_control=True)
        except PyDiffusionError as error:
            return refusal(error)
        return "done"


class ImatrixTarget:
    """Read an imatrix and get the importance of tensors, which must be finite and positive."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "imatrix.gguf"
        random_ = np.random.default_rng(0)
        self._shapes = {"blk.0.ffn_down.weight": (64, 96), "blk.0.ffn_gate_up_exps.weight": (4, 64, 64)}
        entries = {
            name: Entry(random_.random((shape[0] if len(shape) == 3 else 1, shape[-1]), np.float32),
                        np.full(shape[0] if len(shape) == 3 else 1, 7, np.float32))
            for name, shape in self._shapes.items()
        }  # fmt: skip
        write_imatrix(self._path, entries, ["a text"], 3, 512)
        self._good = read_gguf(self._path)
        self._legacy = _legacy(entries)
        assert self.one(self._good.to_bytes()) == self.one(self._legacy) == "done"

    def close(self) -> None:
        pass

    def make(self, draw: random.Random) -> bytes:
        """Create an input: a file's content, one in four of llama.cpp's older format."""
        if draw.random() < 0.25:
            return mutation.damaged(draw, self._legacy)
        file: RawGguf = self._good.copy()
        for _ in range(mutation.n_changes(draw)):
            if draw.random() < 0.5:
                gguf.change_tensor(draw, file)
            else:
                gguf.change_pair(draw, file, lambda key: True)
        return file.to_bytes()

    def one(self, data: bytes) -> str:
        """Read the file and get the importance of a model's tensors."""
        self._path.write_bytes(data)
        try:
            imatrix = read_imatrix(self._path)
            for name, shape in self._shapes.items():
                weights = imatrix.importance(name, shape, shape[-1] + 32, [])
                if weights is not None:
                    assert weights.shape[-1] == shape[-1] + 32 and np.isfinite(weights).all()
                    assert (weights > 0).all()
        except PyDiffusionError as error:
            return refusal(error)
        return "done"


def _legacy(entries: dict[str, Entry]) -> bytes:
    """The same data in llama.cpp's older format (``.dat``)."""
    parts = [struct.pack("<i", len(entries))]
    for name, entry in entries.items():
        text = name.encode()
        parts.append(struct.pack("<i", len(text)) + text + struct.pack("<ii", 7, entry.in_sum2.size))
        parts.append(entry.in_sum2.tobytes())
    return b"".join(parts) + struct.pack("<ii", 7, 6) + b"a text"


class SessionTarget:
    """Load a saved session and run a step, or get a typed error of one line."""

    def __init__(self, folder: Path) -> None:
        self._model = DiffusionModel(make_model(folder), n_threads=1, n_ctx=64, kv_type="f16")
        session = self._model.new_session()
        session.encode([2, 5, 9, 40, 41, 42, 43, 44, 45])
        self._path = folder / "session.safetensors"
        session.save(self._path)
        self._good = self._path.read_bytes()
        (length,) = struct.unpack("<Q", self._good[:8])
        self._header, self._body = json.loads(self._good[8 : 8 + length]), self._good[8 + length :]
        assert self.one(self._good) == "done"

    def close(self) -> None:
        self._model.close()

    def make(self, draw: random.Random) -> bytes:
        """Create an input: a file's content with the header, the arrays or any bytes changed."""
        kind = draw.randrange(4)
        if kind == 0:
            return mutation.damaged(draw, self._good)
        header, body = json.loads(json.dumps(self._header)), bytearray(self._body)
        if kind == 1:
            header = mutation.mutated(draw, header)
        elif kind == 2:  # another type or shape of the same size
            entry = header[draw.choice([name for name in header if name != "__metadata__"])]
            n = entry["data_offsets"][1] - entry["data_offsets"][0]
            dtype, size = draw.choice((("U8", 1), ("I8", 1), ("F8_E4M3", 1), ("BOOL", 1), ("I16", 2),
            ("BF16", 2),
                                       ("F16", 2), ("I32", 4), ("U32", 4), ("F32", 4), ("I64", 8), ("F64",
                                       8)))  # fmt: skip
            rows = draw.choice((1, 2, 9, entry["shape"][0]))
            entry["dtype"] = dtype
            entry["shape"] = draw.choice(
                ([n // size], [rows, n // size // rows], [n // size, 1], [1, 1, n // size])
            )
        for _ in range(draw.choice((0, 1, 50))):
            at = draw.randrange(len(body) // 2) * 2
            body[at : at + 2] = struct.pack(
                "<H", draw.choice((0x7E00, 0x7C00, 0xFC00, 0x7BFF, draw.getrandbits(16)))
            )
        try:
            text = json.dumps(header).encode()
        except RecursionError:
            text = b"[" * 5000
        return struct.pack("<Q", len(text)) + text + bytes(body)

    def one(self, data: bytes) -> str:
        """Load the session and continue it."""
        self._path.write_bytes(data)
        try:
            session = self._model.load_session(self._path)
        except PyDiffusionError as error:
            return refusal(error)
        assert len(session.tokens) == session.n_past <= session.n_ctx
        try:
            session.denoise([0] * self._model.canvas_length)
            session.encode([3, 4])
        except PyDiffusionError as error:
            assert "not finite" in str(error), error
            return "not finite"
        return "done"
