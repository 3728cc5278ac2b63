"""Session files: tokens, images and KV cache as safetensors, tied to a model by a fingerprint.

A file contains ``tokens`` (n,) int32 and, per layer, ``k.N`` and ``v.N`` (n_rows, row_bytes) uint8 in the
cache's type; per image ``image.N`` (n_soft_tokens, d) float32, its features. Its metadata holds the format
name, the cache type, the model's fingerprint and, if there are images, ``images``: JSON, of each the position
of its first soft token and its key in hexadecimal digits. With adapters, ``lora`` is ``Session.lora_key`` in
hexadecimal digits and ``lora_names`` JSON, name and scale of each.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pydiffusion._util import atomic
from pydiffusion.errors import ModelFormatError, PyDiffusionError

if TYPE_CHECKING:
    from pydiffusion import _native
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session

FORMAT = "pydiffusion-session-2"
#: With images, so that versions which know of none refuse the file.
FORMAT_WITH_IMAGES = "pydiffusion-session-3"
#: With adapters, and perhaps images, for the same reason.
FORMAT_WITH_LORA = "pydiffusion-session-4"
_FORMATS = (FORMAT, FORMAT_WITH_IMAGES, FORMAT_WITH_LORA)
_SAMPLE = 64


def fingerprint(file: _native.GgufFile) -> str:
    """Fingerprint of a model: a digest of the tensors' names, types, shapes and first bytes."""
    digest = hashlib.sha256()
    for tensor in file.tensors:
        digest.update(f"{tensor.name} {tensor.type} {tensor.shape}\0".encode("utf-8", "surrogateescape"))
        digest.update(file.tensor_bytes(tensor.name)[:_SAMPLE].tobytes())
    return digest.hexdigest()


def save(session: Session, path: Path) -> None:
    """Write a session's tokens, images and cache atomically, the cache as it is: a generation goes on.

    Raises PyDiffusionError if it can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {"tokens": session.tokens}
    for i_layer, (k, v) in enumerate(session.native.cache_rows()):
        arrays |= {f"k.{i_layer}": k, f"v.{i_layer}": v}
    images = session.native.images
    for i in range(len(images)):
        arrays[f"image.{i}"] = session.native.image_features(i)
    metadata = _metadata(session.model)
    if images:
        metadata["format"] = FORMAT_WITH_IMAGES
        metadata["images"] = json.dumps([[begin, key.hex()] for begin, _, key in images])
    if session.lora_key:
        metadata |= {"format": FORMAT_WITH_LORA, **_lora_metadata(session)}
    target = atomic.resolve_target(path, map(Path, session.model.native.file.paths), overwrite=True)
    with atomic.replacing(target) as new:
        try:
            save_file(arrays, new.temporary, metadata=metadata)
        except SafetensorError as error:
            raise PyDiffusionError(f"{path}: the session can't be saved: {error}") from error


def load(session: Session, path: Path) -> None:
    """Fill a new session from a file.

    Raises FileNotFoundError; ModelFormatError for a file that is not a session of this model and cache type,
    or of other adapters than the session's, naming both; ContextOverflowError if the session's context is too
    short.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    n_layer = session.model.hparams["n_layer"]
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check(path, session.model, metadata)
            _check_lora(path, session, metadata)
            tokens = _array(file, "tokens", "I32", 1)
            rows = [
                (_array(file, f"k.{i}", "U8", 2), _array(file, f"v.{i}", "U8", 2)) for i in range(n_layer)
            ]
            images = [
                (begin, _array(file, f"image.{i}", "F32", 2), key)
                for i, (begin, key) in enumerate(_images(metadata))
            ]
        session.native.restore(tokens, rows, images)
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelFormatError(f"{path}: not a usable session file: {reason}") from error


def _images(metadata: dict[str, str]) -> list[tuple[int, bytes]]:
    """Position and key of each image. Raises ValueError for anything else in their place."""
    if metadata["format"] == FORMAT or (metadata["format"] == FORMAT_WITH_LORA and "images" not in metadata):
        return []
    try:
        found = json.loads(metadata.get("images", ""))
        images = [(begin, bytes.fromhex(key)) for begin, key in found]
    except (ValueError, TypeError, RecursionError):
        raise ValueError("its list of images is damaged") from None
    if not images or not all(type(begin) is int and 0 <= begin < 1 << 31 for begin, _ in images):
        raise ValueError("its list of images is damaged")
    return images


def _array(file: Any, name: str, dtype: str, n_dims: int) -> np.ndarray:
    """Read an array after checking its dtype (numpy lacks some that safetensors has) and its dimensions."""
    found = file.get_slice(name)
    if found.get_dtype() != dtype:
        raise ValueError(f"{name} is of type {found.get_dtype()}, not {dtype}")
    if len(found.get_shape()) != n_dims:
        raise ValueError(f"{name} has the shape {found.get_shape()}; it must have {n_dims} dimensions")
    return file.get_tensor(name)


def _metadata(model: DiffusionModel) -> dict[str, str]:
    return {
        "format": FORMAT,
        "kv_type": model.description["kv_type"],
        "model": fingerprint(model.native.file),
    }


def _check(path: Path, model: DiffusionModel, found: dict[str, str]) -> None:
    what = {"format": "is not a session file of this version", "kv_type": "was saved with another cache type",
            "model": "was saved with another model"}  # fmt: skip
    for key, value in _metadata(model).items():
        if key == "format" and found.get(key) in _FORMATS:
            continue
        if found.get(key) != value:
            raise ModelFormatError(f"{path}: {what[key]} ({key} is {found.get(key)!r:.80}, here {value!r})")


def _lora_metadata(session: Session) -> dict[str, str]:
    applied = session.adapters.applied
    names = [[adapter.name, scale] for adapter, scale in applied.given if scale]
    return {"lora": applied.key.hex(), "lora_names": json.dumps(names)}


def _check_lora(path: Path, session: Session, found: dict[str, str]) -> None:
    """Raise ModelFormatError unless the file's cache is encoded with the session's adapters."""
    if found.get("lora", "") == session.lora_key.hex():
        return
    own = json.loads(_lora_metadata(session)["lora_names"])
    try:
        saved = json.loads(found.get("lora_names", "[]"))
        there = _named(saved)
    except (ValueError, TypeError, RecursionError):
        there = "others, whose names are damaged"
    raise ModelFormatError(
        f"{path}: was saved with other adapters ({there}; here {_named(own)}): load it with"
        " load_session(path, lora=[...]) of the same adapters and scales, or encode its tokens anew"
    )


def _named(adapters: list[Any]) -> str:
    """Names and scales: ``sudoku:0.5``."""
    return ", ".join(f"{name!s:.80}:{float(scale):g}" for name, scale in adapters) or "none"
