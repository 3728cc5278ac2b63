"""Checks of paths given by callers."""

from __future__ import annotations

import re
from pathlib import Path

from pydiffusion.errors import ModelFormatError

from .file_kinds import recognise_file, unfinished_download

# OWNER/NAME, as Ollama and others take it, with an address before it or a type behind it.
_REPO = re.compile(r"(?:https?:/+)?(?:(?:huggingface|hf)\.co/)?[\w.-]+/[\w.-]+(?<!\.gguf)(?::[\w.-]+)?")
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


def check_is_file(path: Path) -> None:
    """Raise IsADirectoryError or FileNotFoundError unless the path is a file."""
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder; a model is a GGUF file: make one with 'pydiffusion convert'"
        )
    if not path.exists():
        partial = unfinished_download(path)
        more = f", but {partial.name} beside it: finish the download" if partial else ""
        if not more and _REPO.fullmatch(str(path)):
            more = (
                "; a checkpoint on the Hugging Face Hub is to be converted (pydiffusion convert OWNER/NAME), "
                "a GGUF downloaded (hf download OWNER/NAME FILE.gguf)"
            )
        raise FileNotFoundError(f"{path}: there is no such file{more}")


def check_is_gguf(path: Path) -> None:
    """As :func:`check_is_file`; also raise ModelFormatError if the file, or another part of the same split
    file, is recognised as of another kind: a Git LFS pointer, a web page, an archive.
    """
    check_is_file(path)
    match = _PART.fullmatch(path.name)
    others = path.parent.glob(f"*-of-{match[2]}.gguf") if match else ()
    for part in (path, *sorted(other for other in others if match and other.name.startswith(match[1]))):
        found = recognise_file(part, "gguf")
        if found is not None:
            raise ModelFormatError(f"{part}: not a GGUF file; it is {found}")
