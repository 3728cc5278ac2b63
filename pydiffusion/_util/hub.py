"""Download model files from the Hugging Face Hub with ``huggingface_hub``.

Its cache, token and offline mode apply (``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``).
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from pydiffusion.errors import PyDiffusionError

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z")


def fetch(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """Download a file of a repo to the local cache; of a split model all parts, returning the first.

    filename: name in the repo, or a pattern with ``*`` that matches one model.
    Raises PyDiffusionError with what to do about it.
    """
    try:
        import huggingface_hub as hub
    except ImportError:
        raise PyDiffusionError(f"{repo_id}: fetching needs a package: pip install huggingface_hub") from None
    name = filename
    try:
        if any(character in filename for character in "*?["):
            name = _matching(hub.HfApi().list_repo_files(repo_id, revision=revision), repo_id, filename)
        paths = [hub.hf_hub_download(repo_id, part, revision=revision) for part in _parts(name)]
    except PyDiffusionError:
        raise
    except Exception as error:  # which of many types depends on the version of huggingface_hub
        raise PyDiffusionError(_explain(error, repo_id, name, revision)) from error
    return Path(paths[0])


def _matching(files: list[str], repo_id: str, pattern: str) -> str:
    models = [file for file in sorted(files) if file.endswith(".gguf")]
    found = [file for file in models if fnmatchcase(file, pattern)]
    first_parts = [file for file in found if (part := _PART.search(file)) is None or int(part[1]) == 1]
    if len(first_parts) == 1:
        return first_parts[0]
    what = "several files match" if first_parts else "no file matches"
    has = ", ".join(first_parts or models)[:300] or "no GGUF"
    raise PyDiffusionError(f"{repo_id}: {what} {pattern!r}; it has {has}")


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
    where = f"{repo_id}{'@' + revision if revision else ''}/{name}"
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
