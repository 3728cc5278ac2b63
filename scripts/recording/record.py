"""Shared by the sections: the recording, digests, masks, the demo model as GGUF."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import pydiffusion

CHECKPOINT = Path(pydiffusion.__file__).parent / "demo" / "checkpoint"
# Of JSON objects: what people read, a text or a list of texts.
MESSAGE_KEYS = {"message", "error", "notes", "fallbacks", "problems", "problem"}
# Of JSON objects: what differs from run to run.
_VARYING = re.compile(
    r"(?:.*_)?(?:seconds|timings|bytes_per_second|per_second|created|time)$|id$|free_bytes$"
)
_FIGURE = re.compile(r"\d+(?:\.\d+)?(?= ?(?:s|ms|min|tokens/s|[kMGT]?B/s|TFLOP/s|GFLOP/s|ms per step)\b)")


class Record:
    """values: compared strictly.  texts: reported.  folder: for files made on the way."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.texts: dict[str, str] = {}
        self.folder = Path()

    def value(self, key: str, value: Any) -> None:
        assert key not in self.values, f"two values of the key {key}"
        self.values[key] = json.loads(json.dumps(value))  # as it will be read back

    def text(self, key: str, text: str) -> None:
        assert key not in self.texts, f"two texts of the key {key}"
        self.texts[key] = self.mask(text)

    def mask(self, text: str) -> str:
        """The text without folders, versions and figures of time."""
        for hidden, shown in (
            (str(CHECKPOINT), "{checkpoint}"),
            (str(CHECKPOINT.resolve()), "{checkpoint}"),
            (str(self.folder), "{folder}"),
            (metadata.version(pydiffusion.DISTRIBUTION), "{version}"),
        ):
            text = text.replace(hidden, shown)
        return _FIGURE.sub("#", text)

    def json(self, key: str, value: Any) -> None:
        """A JSON value: varying fields masked, messages among the texts."""
        messages: list[str] = []
        self.value(key, self._plain(value, messages))
        if messages:
            self.text(f"{key}/messages", "\n".join(messages))

    def _plain(self, value: Any, messages: list[str]) -> Any:
        if isinstance(value, list):
            return [self._plain(each, messages) for each in value]
        if isinstance(value, str):
            return self.mask(value)
        if not isinstance(value, dict):
            return value
        plain = {}
        for key, each in value.items():
            if key in MESSAGE_KEYS and isinstance(each, str):
                messages.append(each)
                plain[key] = "(a message)" if each else ""
            elif key in MESSAGE_KEYS and isinstance(each, list):
                messages += each
                plain[key] = len(each)
            elif _VARYING.match(key) and not isinstance(each, bool):
                plain[key] = "(varies)"
            else:
                plain[key] = self._plain(each, messages)
        return plain

    def attempt(self, key: str, action: Callable[[], Any]) -> Any:
        """Record what an action raises: the class is a value, the message a text."""
        try:
            result = action()
        except Exception as error:
            self.value(f"{key}/raises", type(error).__name__)
            self.text(f"{key}/raises", str(error))
            return None
        self.value(f"{key}/raises", None)
        return result

    def gguf(self, key: str, path: Path) -> None:
        """Digests of a GGUF file: whole, of its metadata, of each tensor."""
        data = path.read_bytes()
        self.value(f"{key}/sha256", digest(data))
        keys, tensors = read_gguf(data)
        self.value(f"{key}/metadata", {name: digest(raw)[:16] for name, raw in keys.items()})
        self.value(f"{key}/tensors", tensors)


def digest(data: bytes | np.ndarray | str) -> str:
    if isinstance(data, np.ndarray):
        data = f"{data.dtype}{data.shape}".encode() + np.ascontiguousarray(data).tobytes()
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def program(
    *arguments: str, folder: Path, typed: str = "", timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``pydiffusion`` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "pydiffusion", *arguments],
        input=typed,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=folder,
        env=environment(folder),
        check=False,
    )


def environment(folder: Path) -> dict[str, str]:
    """Of programs: nothing in it changes what they print, and what they cache is in a folder of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYDIFFUSION_")}
    return kept | {"COLUMNS": "100", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder)}


def demo_model(record: Record, type: str) -> Path:
    """The demo model as a GGUF of a type, made once."""
    from pydiffusion.convert import convert

    path = record.folder / f"demo-{type}.gguf"
    if not path.exists():
        convert(CHECKPOINT, path, type, n_threads=1)
    return path


# A reader of GGUF of its own: what is recorded must not depend on the code under test.

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_gguf(data: bytes) -> tuple[dict[str, bytes], dict[str, list[Any]]]:
    """Raw values by key, in the file's order, and (shape, type, digest) by tensor.

    A tensor's bytes reach to the next one's, padding included: sizes of types need not be known.
    """
    magic, _, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
    assert magic == b"GGUF", magic
    at, keys, alignment = 24, {}, 32
    for _ in range(n_keys):
        name, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        end = _after(data, at + 4, kind)
        keys[name] = data[at:end]
        if name == "general.alignment":
            (alignment,) = struct.unpack_from("<I", data, at + 4)
        at = end
    found = []
    for _ in range(n_tensors):
        name, at = _string(data, at)
        (n_dims,) = struct.unpack_from("<I", data, at)
        *shape, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, at + 4)
        at += 4 + 8 * n_dims + 12
        found.append((offset, name, shape, kind))
    start = -(-at // alignment) * alignment
    ends = [*[offset for offset, *_ in sorted(found)][1:], len(data) - start]
    tensors = {
        name: [shape, kind, digest(data[start + offset : start + end])[:16]]
        for (offset, name, shape, kind), end in zip(sorted(found), ends, strict=True)
    }
    return keys, tensors


def _string(data: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode(), at + 8 + length


def _after(data: bytes, at: int, kind: int) -> int:
    """Where a value that begins at ``at`` ends."""
    if kind == _STRING:
        return _string(data, at)[1]
    if kind != _ARRAY:
        return at + struct.calcsize(_SCALARS[kind])
    inner, length = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner in _SCALARS:
        return at + length * struct.calcsize(_SCALARS[inner])
    for _ in range(length):
        at = _after(data, at, inner)
    return at
