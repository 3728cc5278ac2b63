"""Find a model's vision tower: the file with the tower and its projector (mmproj) beside it or on the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydiffusion import _native
from pydiffusion._util import hub
from pydiffusion._util.files import check_is_gguf
from pydiffusion.errors import PyDiffusionError

AUTO = "auto"  # look for a vision file
CPU = "cpu"  # the device's name
# For who has a model without a vision file, or with several.
HOW_TO_GIVE_ONE = (
    "give one as mmproj=FILE or --mmproj FILE (pydiffusion convert --mmproj writes one from a checkpoint)"
)


@dataclass(frozen=True)
class Found:
    """A model's vision file. path: the one candidate, or None. why_not: what to tell who needs one."""

    path: Path | None
    why_not: str = ""


def beside(model: Path, n_embd: int | None = None) -> Found:
    """The vision file in a model's folder; of one in the hub's cache, in any folder of its repo.

    A candidate has ``mmproj`` in its name and embeds into n_embd elements, by default as many as the model's
    file says; one that can't be read is one too, so that what is wrong with it is said when it is used.
    """
    place = hub.cached_repo(model)
    folder = model.parent if place is None else place.folder
    files = folder.glob("*.gguf") if place is None else folder.rglob("*.gguf")
    named = sorted(path for path in files if hub.is_mmproj(path.relative_to(folder).as_posix()))
    if named and n_embd is None:
        n_embd = _n_embd(model)
    candidates, others = [], []
    for path in named:
        flaw = _misfit(path, n_embd)
        if flaw:
            others.append(f"{path.name} {flaw}")
        else:
            candidates.append(path)
    if len(candidates) == 1:
        return Found(candidates[0])
    where = "there is none" if not folder.name else f"there is none in {os.fspath(folder)}"
    if candidates:
        where = f"there are several in {os.fspath(folder)}: {_listed([path.name for path in candidates])}"
    elif others:
        where = f"those in {os.fspath(folder)} don't fit: {_listed(others)}"
    return Found(None, f"{model.name} reads images with a vision file (mmproj) only; {where}")


def on_hub(model: Path) -> Path | None:
    """The vision file of the repo that a model in the hub's cache is from, downloaded unless it is cached;
    None for other models, and for a repo without one. Raises PyDiffusionError if the download fails.
    """
    place = hub.cached_repo(model)
    return None if place is None else hub.fetch_mmproj(place)


def planned_for(model: Path, mmproj: str | os.PathLike[str] | None, device: str) -> str:
    """The vision file that a device plan leaves room for, or an empty text. mmproj: as of DiffusionModel.

    A given file in any case, and it must be a GGUF. One beside the model on a GPU only, and unless something
    is wrong with it: text can be read without it.
    """
    if mmproj is None:
        return ""
    if mmproj != AUTO:
        check_is_gguf(Path(mmproj))
        return os.fspath(mmproj)
    found = beside(model).path if device != CPU else None
    if found is None:
        return ""
    try:
        _native.plan(os.fspath(model), device=CPU, mmproj=os.fspath(found))
    except (PyDiffusionError, OSError):
        return ""
    return os.fspath(found)


def _n_embd(model: Path) -> int | None:
    """The length of a model's embeddings; None if the file can't be read or doesn't say it."""
    try:
        metadata = _native.GgufFile.open_all_parts(os.fspath(model)).metadata
    except (PyDiffusionError, OSError):
        return None
    n = metadata.get(f"{metadata.get('general.architecture')}.embedding_length")
    return n if isinstance(n, int) else None


def _misfit(path: Path, n_embd: int | None) -> str:
    """Why a file can't be the vision file of a model, or an empty text."""
    try:
        metadata = _native.GgufFile(os.fspath(path)).metadata
    except (PyDiffusionError, OSError):
        return ""
    if metadata.get("general.architecture") != "clip":
        return "is no vision file"
    size = metadata.get("clip.vision.projection_dim")
    if n_embd is None or size is None or size == n_embd:
        return ""
    return f"is another model's ({size} elements, not {n_embd})"


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 300 else f"{text[:300]}, ..."
