"""Models on the Hugging Face Hub with ``huggingface_hub``: names, download, and what is in the cache.

Its cache, token and offline mode apply (``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydiffusion.errors import PyDiffusionError

from .log import logger

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z")
_ADDRESS = r"(?P<address>(?:hf:/{1,2}|(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/)?)"
_NAME = r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
# OWNER/NAME[@REVISION][:FILE or TYPE], or the address of a repo's page or of a file of it.
_REFERENCE = re.compile(
    rf"{_ADDRESS}{_NAME}"
    r"(?:/(?:blob|resolve|tree)/(?P<at>[^/?:]+)(?:/(?P<path>[^?:]+\.gguf))?(?:\?.*)?"
    r"|(?:@(?P<revision>[\w./-]+))?(?::(?P<file>.+))?)/?"
)
_MMPROJ = re.compile(r"(?:(?:^|/)mmproj.*|mmproj[^/]*)\.gguf\Z", re.IGNORECASE)
_IMATRIX = re.compile(r"imatrix|\.dat\.gguf\Z", re.IGNORECASE)
_CACHE_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_DEFAULT_TYPE = "Q4_K_M"  # as llama.cpp and Ollama choose


@dataclass(frozen=True)
class ModelReference:
    """A model in a repo. file: a name in the repo, a pattern with ``*``, a type such as Q8_0, or empty."""

    repo_id: str
    file: str = ""
    revision: str | None = None


def model_reference(given: str | os.PathLike[str]) -> ModelReference | None:
    """Parse a name as a model on the hub; None for a path: one that exists, has a folder that exists, begins
    with ``.``, ``/`` or ``~``, or ends in ``.gguf`` without a repo before it.
    """
    text = os.fspath(given).replace(os.sep, "/").strip()
    match = _REFERENCE.fullmatch(text)
    if match is None or Path(given).exists():
        return None
    first = match["repo"].partition("/")[0]
    if not match["address"] and (Path(first).exists() or match["repo"].lower().endswith(".gguf")):
        return None
    revision = match["revision"] or match["at"]
    return ModelReference(match["repo"], match["path"] or match["file"] or "", revision)


def fetch_model(
    reference: ModelReference, *, refresh: bool = False, announce: Callable[[str], None] = lambda line: None
) -> Path:
    """Path of a model from the cache, else downloaded; of a split one the first part.

    refresh: ask the hub even if the cache has it. announce: called with a line that says what is downloaded.
    Raises PyDiffusionError with what to do about it.
    """
    hub = _hub(reference.repo_id)
    if not refresh:
        cached = _in_cache(hub, reference)
        if cached is not None:
            return cached
    name = reference.file
    try:
        if not name.endswith(".gguf") or _is_pattern(name):
            name = _choose(_files(hub, reference), reference)
        announce(f"{reference.repo_id}: {name}, from the Hugging Face Hub or its cache")
    except PyDiffusionError:
        raise
    except Exception as error:  # which of many types depends on the version of huggingface_hub
        what = _explain(error, reference.repo_id, reference.file, reference.revision)
        raise PyDiffusionError(f"{what} (nor is there such a file here)") from error
    return fetch(reference.repo_id, name, reference.revision)


def fetch(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """Download a file of a repo to the local cache; of a split model all parts, returning the first.

    filename: name in the repo, or a pattern with ``*`` that matches one model.
    Raises PyDiffusionError with what to do about it.
    """
    hub = _hub(repo_id)
    name = filename
    try:
        if _is_pattern(filename):
            reference = ModelReference(repo_id, filename, revision)
            name = _choose(_files(hub, reference), reference)
        paths = [hub.hf_hub_download(repo_id, part, revision=revision) for part in _parts(name)]
    except PyDiffusionError:
        raise
    except Exception as error:  # which of many types depends on the version of huggingface_hub
        raise PyDiffusionError(_explain(error, repo_id, name, revision)) from error
    return Path(paths[0])


def fetch_folder(reference: ModelReference, patterns: Sequence[str], needed: str) -> Path:
    """The folder with the files at the top of a repo that match a pattern, downloaded if need be; from the
    cache if the hub can't be reached.

    Raises PyDiffusionError with what to do about it, also for a repo without the file ``needed``.
    """
    hub = _hub(reference.repo_id)
    asked = {"revision": reference.revision, "allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}
    try:
        files = _files(hub, reference)
        if needed in files:
            return Path(hub.snapshot_download(reference.repo_id, **asked))
        raise PyDiffusionError(f"{reference.repo_id}: has no {needed}{_what_else(reference.repo_id, files)}")
    except PyDiffusionError:
        raise
    except Exception as error:  # which of many types depends on the version of huggingface_hub
        what = _explain(error, reference.repo_id, "", reference.revision)
        try:
            folder = Path(hub.snapshot_download(reference.repo_id, **asked, local_files_only=True))
        except Exception:  # not there
            folder = Path()
        if not (folder / needed).is_file():
            raise PyDiffusionError(f"{what} (nor is there such a file here)") from error
        return folder


def _what_else(repo_id: str, files: Sequence[str]) -> str:
    """The rest of a sentence about a repo without an adapter at its top."""
    below = sorted(file for file in files if file.endswith("/adapter_config.json"))
    if below:
        return f" at its top, only {', '.join(below)[:300]}: download that folder, and give its path"
    names = sorted(file for file in files if file.endswith(".gguf"))
    if not names:
        return ", nor a GGUF: is it the repo of an adapter?"
    listed = ", ".join(names)
    listed = listed if len(listed) <= 300 else f"{listed[:300]}, ..."
    return f"; of its GGUF files name the adapter ({repo_id}:{names[0]}): {listed}"


@dataclass(frozen=True)
class CachedRepo:
    """A revision of a repo in the cache. folder: where its files are. revision: the commit."""

    repo_id: str
    revision: str
    folder: Path


def cached_repo(path: Path) -> CachedRepo | None:
    """The repo that a file in the cache is from; None for any other file."""
    for folder in path.absolute().parents:
        match = _CACHE_FOLDER.fullmatch(folder.parent.parent.name)
        if folder.parent.name == "snapshots" and match is not None:
            return CachedRepo(f"{match[1]}/{match[2]}", folder.name, folder)
    return None


def is_mmproj(name: str) -> bool:
    """Whether a file's name, with its folders in a repo, is that of a vision tower."""
    return _MMPROJ.search(name) is not None


def fetch_mmproj(repo: CachedRepo) -> Path | None:
    """The vision tower of a repo, from the cache, else downloaded; None if the repo has none.

    Of several that differ in type, one of the types that towers are trained in. Raises PyDiffusionError with
    what to do about it.
    """
    hub = _hub(repo.repo_id)
    try:
        files = _files(hub, ModelReference(repo.repo_id, revision=repo.revision))
        name = _choose_mmproj([file for file in sorted(files) if is_mmproj(file)], repo.repo_id)
    except PyDiffusionError:
        raise
    except Exception as error:  # which of many types depends on the version of huggingface_hub
        raise PyDiffusionError(_explain(error, repo.repo_id, "mmproj", repo.revision)) from error
    if name is None:
        return None
    logger.info("fetching %s: %s", repo.repo_id, name)
    return fetch(repo.repo_id, name, repo.revision)


def _choose_mmproj(names: Sequence[str], repo_id: str) -> str | None:
    if len(names) <= 1:
        return names[0] if names else None
    for type_name in ("bf16", "f16"):
        of_type = [name for name in names if re.search(rf"[-._]{type_name}\.gguf\Z", name.lower())]
        if len(of_type) == 1:
            return of_type[0]
    raise PyDiffusionError(
        f"{repo_id} has several vision towers, download one and give it as mmproj=FILE or --mmproj FILE:"
        f" {', '.join(names)[:300]}"
    )


@dataclass(frozen=True)
class CachedModel:
    """A GGUF file in the cache. name: as ``-m`` takes it. modified: seconds since the epoch."""

    name: str
    path: Path
    n_bytes: int
    modified: float


def cached_models() -> list[CachedModel]:
    """GGUF models in the hub's cache, of any architecture, newest first; of a split one the first part, with
    the bytes of all.
    """
    hub = _hub("the cache")
    try:
        repos = hub.scan_cache_dir().repos
    except Exception:  # CacheNotFound, under several names; nothing has been downloaded yet
        return []
    found: dict[str, CachedModel] = {}
    for repo in repos:
        for revision in sorted(repo.revisions, key=lambda revision: revision.last_modified):
            folder = revision.snapshot_path
            files = {file.file_path.relative_to(folder).as_posix(): file for file in revision.files}
            for name in _models(list(files)):
                parts = [files[part] for part in _parts(name) if part in files]
                found[f"{repo.repo_id}:{name}"] = CachedModel(
                    f"{repo.repo_id}:{name}",
                    files[name].file_path,
                    sum(part.size_on_disk for part in parts),
                    max(part.blob_last_modified for part in parts),
                )
    return sorted(found.values(), key=lambda model: -model.modified)


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise PyDiffusionError(f"{what}: fetching needs a package: pip install huggingface_hub") from None
    return huggingface_hub


def _files(hub: Any, reference: ModelReference) -> list[str]:
    """The names of a repo's files."""
    info = hub.HfApi().model_info(reference.repo_id, revision=reference.revision)
    return [sibling.rfilename for sibling in info.siblings or ()]


def _in_cache(hub: Any, reference: ModelReference) -> Path | None:
    """The model in the cache, whole, or None. Asks nobody."""
    try:
        # Matches nothing, since newer versions raise if a file is missing.
        asked = {"revision": reference.revision, "local_files_only": True, "allow_patterns": ["no file"]}
        folder = Path(hub.snapshot_download(reference.repo_id, **asked))
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf") if path.is_file()]
        name = _choose(files, reference)
    except Exception:  # not there, or not this one: the hub will say
        return None
    whole = all((folder / part).is_file() for part in _parts(name))
    return folder / name if whole else None


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def _models(files: Sequence[str]) -> list[str]:
    """The models among a repo's files, without vision towers and importance matrices; of split ones the first
    parts.
    """
    names = [file for file in sorted(files) if file.endswith(".gguf") and not _IMATRIX.search(file)]
    names = [name for name in names if not is_mmproj(name)]
    return [name for name in names if (part := _PART.search(name)) is None or int(part[1]) == 1]


def _choose(files: Sequence[str], reference: ModelReference) -> str:
    """The one model among a repo's files that the reference means. Raises PyDiffusionError."""
    wanted = reference.file
    models = _models(files)
    if wanted in files:
        return wanted
    if _is_pattern(wanted):
        found = [file for file in models if fnmatchcase(file, wanted)]
    else:
        typed = re.compile(rf"(?:^|[-._/]){re.escape(wanted or _DEFAULT_TYPE)}(?:[-._/]|\Z)", re.IGNORECASE)
        found = [file for file in models if typed.search(file.removesuffix(".gguf"))]
        if not wanted and (len(models) == 1 or not found):
            found = models
    if len(found) == 1:
        return found[0]
    raise PyDiffusionError(_why_not_one(models, found, reference))


def _why_not_one(models: Sequence[str], found: Sequence[str], reference: ModelReference) -> str:
    repo, wanted = reference.repo_id, reference.file
    if not models:
        return (
            f"{repo} has no GGUF model; a checkpoint is converted first: pydiffusion convert {repo} -o M.gguf"
        )
    listed = ", ".join(found or models)
    listed = listed if len(listed) <= 300 else f"{listed[:300]}, ..."
    if found and not wanted:
        return f"{repo} has several models, name one ({repo}:FILE or :TYPE): {listed}"
    what = "several files match" if found else "no file matches"
    return f"{repo}: {what} {wanted!r}; it has {listed}"


def _parts(name: str) -> list[str]:
    part = _PART.search(name)
    if part is None:
        return [name]
    head = name[: part.start()]
    return [f"{head}-{i:05}-of-{part[2]}.gguf" for i in range(1, int(part[2]) + 1)]


# Error class -> explanation.
_MEANINGS = {
    "GatedRepoError": "access to this repo is restricted: accept its terms on its page, then log in"
    " ('hf auth login') or set HF_TOKEN",
    "RevisionNotFoundError": "the repo has no such revision",
    "RepositoryNotFoundError": "there is no such repo, or it is private: check the name, or log in"
    " ('hf auth login', or HF_TOKEN)",
    "RemoteEntryNotFoundError": "the repo has no such file; the pattern '*' lists those it has",
    "EntryNotFoundError": "the repo has no such file; the pattern '*' lists those it has",
    "OfflineModeIsEnabled": "it is not in the cache, and HF_HUB_OFFLINE forbids fetching it",
    "LocalEntryNotFoundError": "it is not in the cache, and the hub can't be reached: check the network, or"
    " HF_ENDPOINT",
    "ConnectError": "the hub can't be reached: check the network, or HF_ENDPOINT",
    "ConnectionError": "the hub can't be reached: check the network, or HF_ENDPOINT",
}


def _explain(error: BaseException, repo_id: str, name: str, revision: str | None) -> str:
    where = f"{repo_id}{'@' + revision if revision else ''}{'/' + name if name else ''}"
    link: BaseException | None = error
    names: list[str] = []
    while link is not None and len(names) < 20:
        names.append(type(link).__name__)
        link = link.__cause__ or link.__context__
    for known, meaning in _MEANINGS.items():
        if known in names:
            return f"{where}: {meaning}"
    text = str(error).strip().splitlines()
    return f"{where}: fetching failed: {text[0] if text else type(error).__name__}"
