"""Checks of paths given by callers."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from pydiffusion.errors import ModelFormatError

from .file_kinds import recognise_file, unfinished_download

# OWNER/NAME, as Ollama and others take it, with an address before it or a type behind it.
_REPO = re.compile(r"(?:https?:/+)?(?:(?:huggingface|hf)\.co/)?[\w.-]+/[\w.-]+(?<!\.gguf)(?::[\w.-]+)?")
_FILE_OF_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[\w.-]+\.gguf)")
_TAGGED = re.compile(r"[\w.-]+:[\w.-]+")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|[^/]*\\")
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


def check_is_file(path: Path) -> None:
    """Raise IsADirectoryError or FileNotFoundError unless the path is a file."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder{_what_is_in(path)}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file{_what_was_meant(path)}")


def _what_is_in(folder: Path) -> str:
    """The rest of the sentence about a folder given as a model."""
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if names:
        return f"; it has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}: give the file"
    if (folder / "adapter_config.json").is_file():
        return (
            f", an adapter (LoRA) for a model: give the model, and --lora {folder} beside it (Python: lora=)"
        )
    empty = ", which an empty name means too" if str(folder) == "." else ""
    return f"{empty}; a model is a GGUF file: make one with 'pydiffusion convert'"


def _what_was_meant(path: Path) -> str:
    """The rest of a sentence about a missing file: what is beside it, or what its name looks like."""
    text = str(path)
    partial = unfinished_download(path)
    if partial is not None:
        return f", but {partial.name} beside it: finish the download"
    bare = text.strip(" \t\r\n\"'")
    if bare != text and Path(bare).exists():
        return f", but there is {bare} without the blanks or quotes around it"
    if text.startswith("~/") and path.expanduser().exists():
        return f", but {path.expanduser()}: ~ is for the shell to expand, or Path.expanduser"
    if os.sep == "/" and _WINDOWS.match(text):
        return "; it is a Windows path, and here / separates folders (/mnt/c/... for C: in WSL)"
    if (file := _FILE_OF_REPO.fullmatch(text)) and not Path(path.parts[0]).exists():
        return f"; of a repo on the Hugging Face Hub it is named {file['repo']}:{file['file']}"
    if _REPO.fullmatch(text) and not Path(path.parts[0]).exists():
        return (
            "; of a repo on the Hugging Face Hub, a GGUF opens with -m OWNER/NAME[:FILE] or"
            " DiffusionModel.from_pretrained, a checkpoint is converted (pydiffusion convert OWNER/NAME)"
        )
    return _near(path)


def _near(path: Path) -> str:
    """As :func:`_what_was_meant`: a file with a similar name, if the folder has one."""
    try:
        names = [other.name for other in path.parent.iterdir() if other.suffix == ".gguf"]
    except OSError:
        return f"; there is no folder {path.parent} either"
    wanted = [path.name, f"{path.name}.gguf"]
    near = [name for name in wanted if name in names] or difflib.get_close_matches(wanted[0], names, 1)
    if near:
        return f"; did you mean {path.with_name(near[0])}?"
    if _TAGGED.fullmatch(str(path)):
        return "; names of Ollama's library are not known here: -m OWNER/NAME:TYPE of the Hugging Face Hub"
    return ""


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
