"""Remove from a page what is nobody's business: folders, the user's and the machine's name, access tokens."""

from __future__ import annotations

import getpass
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

_HIDDEN = "…"
# An absolute path of at least two names; on Windows with a drive. What is left is its last name.
_POSIX_PATH = re.compile(r"(?<![\w.<>&/])(?:/[^\s/|:;,<>'\"()\[\]]+)+/([^\s/|:;,<>'\"()\[\]]+)")
_WINDOWS_PATH = re.compile(r"\b[A-Za-z]:[\\/](?:[^\\/|:;,'\"]+[\\/])*([^\s\\/|:;,'\"]+)")
# Of Hugging Face, GitHub, OpenAI and the like.
_TOKEN = re.compile(r"\b(?:hf|gh[pousr]|github_pat|sk|api_org)[_-][A-Za-z0-9_-]{16,}")
_ENVIRONMENT = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY")
_SHORTEST_NAME = 4
# Users' names that are words, or say nothing.
_COMMON = frozenset(("root", "user", "admin", "ubuntu", "home", "model", "test", "nobody"))


def redact(text: str, paths: Iterable[Path] = ()) -> str:
    """Remove absolute paths except for their last names, user and host name, and access tokens.

    paths: whose folders are removed even if they have spaces in them.
    """
    secrets = [value for key, value in os.environ.items() if _ENVIRONMENT.search(key) and len(value) >= 8]
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    text = _TOKEN.sub(_HIDDEN, text)
    text = text.replace("file:///", "/")
    folders = {str(folder) for path in paths for folder in (path.parent, path.absolute().parent)}
    folders |= {str(path.resolve().parent) for path in paths} | {str(Path.home()), str(Path.cwd())}
    for folder in sorted(folders - {"/", "."}, key=len, reverse=True):
        text = text.replace(folder + os.sep, "").replace(folder, _HIDDEN)
    text = _WINDOWS_PATH.sub(r"\1", _POSIX_PATH.sub(r"\1", text))
    for name in _names():
        text = re.sub(rf"\b{re.escape(name)}\b", _HIDDEN, text)
    return text


def _names() -> set[str]:
    """Names of the user and of this machine, where they are not ordinary words."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = ""
    found = {user, platform.node(), platform.node().partition(".")[0]}
    return {name for name in found if len(name) >= _SHORTEST_NAME and name.lower() not in _COMMON}
