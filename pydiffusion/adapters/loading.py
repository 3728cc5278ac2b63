"""Load an adapter: a folder, a GGUF, or a repo of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydiffusion._util import hub
from pydiffusion.adapters.adapter import Adapter
from pydiffusion.adapters.folder_files import CONFIG, WEIGHTS, explain_without_config
from pydiffusion.adapters.gguf_file import read_adapter_gguf
from pydiffusion.adapters.peft_folder import read_peft_folder
from pydiffusion.adapters.stored import adapter_errors
from pydiffusion.convert.architectures import registry
from pydiffusion.convert.architectures.architecture import Matrices
from pydiffusion.errors import AdapterError, OptionError, PyDiffusionError

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_MAX_SCALE = 1e30
_ARCHITECTURE = "general.architecture"
_MAX_PATH = 4096


def parse_lora(text: str) -> tuple[str, float]:
    """Split ``PATH[:SCALE]`` into the source of an adapter and its scale, 1 if there is none.

    A path that exists as it is keeps its colons, as does one whose last part is no number (``C:\\\\adapter``,
    ``OWNER/NAME:FILE.gguf``). Raises OptionError for no path, or for a scale that is not finite.
    """
    if not text.strip():
        raise OptionError("lora", "lora: the path of an adapter is empty; give PATH or PATH:SCALE")
    head, colon, tail = text.rpartition(":")
    if not colon or exists(text):
        return text, 1.0
    if _NOT_FINITE.fullmatch(tail) or (_NUMBER.fullmatch(tail) and abs(float(tail)) > _MAX_SCALE):
        raise OptionError("lora", f"lora: the scale of {head!r:.200} is {tail:.40}; give a finite number")
    if not _NUMBER.fullmatch(tail):
        return text, 1.0
    if not head.strip():
        raise OptionError("lora", f"lora: {text!r:.200} has a scale but no path; give PATH:SCALE")
    return head, float(tail)


def exists(text: str) -> bool:
    """Whether there is such a path; none is too long or of wrong characters to ask."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def load_adapter(source: str | os.PathLike[str], model: Mapping[str, Any] | None) -> Adapter:
    """Load an adapter and check that it fits the model. All of it is read once.

    source: a folder of PEFT or MLX, an adapter's GGUF, or a repo of the Hugging Face Hub (``OWNER/NAME``,
        ``OWNER/NAME@REVISION``, ``OWNER/NAME:FILE.gguf``).
    model: metadata of the GGUF that it is for, or None for a model of any size.
    Raises AdapterError, naming the file and the tensor or key, and what to do.
    """
    matrices = matrices_of(model)
    path, name = _locate(source)
    _require_there(path)
    with adapter_errors(path):
        if path.is_dir():
            if not (path / CONFIG).is_file():
                raise AdapterError(explain_without_config(path))
            return read_peft_folder(path, matrices, name)
        return read_adapter_gguf(path, matrices, name)


def matrices_of(model: Mapping[str, Any] | None) -> Matrices:
    """The matrices of a model that adapters can change; None: of the first architecture, of any size.

    Raises AdapterError for an architecture whose adapters are not supported.
    """
    name = registry.ARCHITECTURES[0].name if model is None else model.get(_ARCHITECTURE)
    for architecture in registry.ARCHITECTURES:
        if architecture.name == name and architecture.matrices is not None:
            return architecture.matrices(model)
    raise AdapterError(f"adapters of the architecture {name!r:.60} are not supported")


def _locate(source: str | os.PathLike[str]) -> tuple[Path, str]:
    """Where an adapter is on disk, downloaded if need be, and its name."""
    text = os.fspath(source)
    if not text.strip() or "\0" in text:
        what = f"{text!r:.200} is no path" if text.strip() else "the path of an adapter is empty"
        raise AdapterError(f"{what}: give a folder, a GGUF, or OWNER/NAME of the Hugging Face Hub")
    reference = hub.model_reference(text) if len(text) < _MAX_PATH else None
    if reference is None:
        return expanded(text), ""
    try:
        if reference.file:
            return hub.fetch_model(reference), ""
        folder = hub.fetch_folder(reference, [CONFIG, *WEIGHTS, "adapter_model-*.safetensors"], CONFIG)
        return folder, reference.repo_id.partition("/")[2]
    except PyDiffusionError as error:
        raise AdapterError(str(error)) from error


def _no_such(text: str) -> str:
    """The rest of a sentence about a path that doesn't exist: what may have been meant."""
    head, _, tail = text.rpartition(":")
    if _NUMBER.fullmatch(tail) and exists(head):
        return f"there is no such adapter, but {head}: its scale goes beside it, ({head!r}, {tail})"
    if "," in text and all(map(_is_there, text.split(","))):  # as llama.cpp takes several
        return (
            "there is no such adapter, but those between the commas: give each by itself (--lora A --lora B)"
        )
    return "there is no such adapter: give a folder, a GGUF, or OWNER/NAME of the Hugging Face Hub"


def _is_there(text: str) -> bool:
    """Whether there is the path of ``PATH[:SCALE]``."""
    head, _, tail = text.rpartition(":")
    return bool(text.strip()) and (exists(text) or bool(_NUMBER.fullmatch(tail) and head and exists(head)))


def expanded(text: str) -> Path:
    """The path that a text means: ``~`` is the user's folder unless there is a file of that name."""
    path = Path(text)
    if text.startswith("~") and not exists(text):
        with contextlib.suppress(RuntimeError):  # no such user
            return path.expanduser()
    return path


def _require_there(path: Path) -> None:
    text = str(path)
    if not exists(text):
        raise AdapterError(f"{text if len(text) < 500 else text[:500] + '...'}: {_no_such(text)}")
    if not path.is_file() and not path.is_dir():
        raise AdapterError(f"{path}: is neither a folder nor a file: give a folder, or a GGUF")
    if path.name in (CONFIG, *WEIGHTS):
        raise AdapterError(f"{path}: is part of an adapter: give its folder, {path.parent}")
