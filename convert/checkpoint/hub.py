"""Download checkpoints from the Hugging Face Hub with ``huggingface_hub``.

Its cache, token and offline mode apply (``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydiffusion.convert.checkpoint.weight_files import other_weights
from pydiffusion.errors import ConversionError

# OWNER/NAME[@REVISION], or the address of its page.
_ADDRESS = r"(?:(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/)?"
_REPO = re.compile(_ADDRESS + r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]+))?/?")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_SMALL = (
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)


@dataclass(frozen=True)
class LocalFolder:
    """A local checkpoint; ``name``: the model's name, empty if it is the folder's."""

    path: Path
    name: str = ""


def find_checkpoint(
    source: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True
) -> LocalFolder:
    """Locate a checkpoint: ``source`` itself if it is a path, else the downloaded or cached repo.

    A repo id is ``OWNER/NAME`` or ``OWNER/NAME@REVISION``, unless it, or its first folder, exists as a path.

    Args:
        revision: branch, tag or commit of a repo; None uses its main branch.
        weights: False downloads the small files only.

    Raises:
        ConversionError: the repo is missing, gated, or can't be reached; the message says what to do.
    """
    repo = repo_id(source)
    if repo is None:
        if revision is not None:
            raise ConversionError(f"{source}: is a path; a revision belongs to a repo id such as OWNER/NAME")
        return LocalFolder(Path(source))
    name, given = repo
    return LocalFolder(_download(name, revision or given, weights), name.partition("/")[2])


def repo_id(source: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """(repo id, revision) if ``source`` is a repo id and not a path, else None."""
    text = os.fspath(source)
    match = _REPO.fullmatch(text) if isinstance(text, str) else None
    if match is None or Path(text).exists() or Path(text).parts[0] in ("..", ".") or _is_local(text):
        return None
    return match[1], match[2]


def _is_local(text: str) -> bool:
    return Path(Path(text).parts[0]).exists()


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConversionError(
            f"{repo}: no such folder, and repo ids need a package: pip install huggingface_hub"
        ) from error
    patterns = [*_SMALL, *(_WEIGHTS if weights else ())]
    try:
        # Folders of a repo contain other formats of the weights.
        path = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )
        is_checkpoint = any((path / name).exists() for name in ("config.json", "adapter_config.json"))
        names = [] if is_checkpoint else huggingface_hub.list_repo_files(repo, revision=revision)
    except Exception as error:  # which of many types depends on the version of huggingface_hub
        raise ConversionError(_explain(error, repo, revision)) from error
    if not is_checkpoint:
        what = other_weights(names) or "it is not a checkpoint's: give another repo"
        raise ConversionError(f"{repo}: has no config.json; {what}")
    return path


def _explain(error: Exception, repo: str, revision: str | None) -> str:
    """Explain an error of ``huggingface_hub``, recognised by class name."""
    names = {type(link).__name__ for link in _chain(error)}
    at = f"{repo}@{revision}" if revision else repo
    if names & {"GatedRepoError", "DisabledRepoError"}:
        return (
            f"{repo}: access to this repo is restricted: accept its terms on its page, then log in "
            "(`hf auth login`) or set HF_TOKEN to a token that may read it"
        )
    if "RevisionNotFoundError" in names:
        return f"{at}: the repo has no such revision; name a branch, tag or commit of it"
    if "RepositoryNotFoundError" in names:
        return (
            f"{repo}: neither a folder here nor a repo that can be seen; check the name, or log in (`hf auth "
            "login`, or HF_TOKEN) if it is private"
        )
    if "OfflineModeIsEnabled" in names:
        return f"{at}: is not (wholly) in the cache, and HF_HUB_OFFLINE forbids fetching it"
    if names & {"ConnectError", "ConnectionError", "TimeoutException", "ConnectTimeout", "ReadTimeout"}:
        return (
            f"{at}: neither a folder here nor (wholly) in the cache, and the hub can't be reached; check the "
            "network, or HF_ENDPOINT"
        )
    text = str(error).strip().splitlines()
    return f"{at}: fetching failed: {text[0] if text else type(error).__name__}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
