"""The distribution's name: `pydiffusion` on the package index is another project."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess

import pytest
from support.paths import REPOSITORY

import pydiffusion

OTHER = "pydiffusion"  # kept apart from the commands, as this file is checked too
# The other project as what to install, first (if on the next line) or elsewhere in a line, or with an extra.
FETCHES_ANOTHER = re.compile(
    rf"""\b(?:pip|pipx|uv)[\d.]*\b[^\n`&|;]*?\b(?:install|download|add)\b
           (?:(?:[\s"',]+-\S+)*[\s"',]+|[^\n`&|;#]*?[ \t"',]){OTHER}(?!-gguf|[-\w/]|\.\w)
       | (?<![\w.]){OTHER}\[[a-z]""",
    re.VERBOSE,
)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (f"pip install {OTHER}", True),
        (f"(`pip install\n'{OTHER}[plot]'`)", True),
        (f'python -m pip install --quiet -U "{OTHER}>=0.1"', True),
        (f"pip3 install numpy {OTHER}.", True),
        (f"uv tool install {OTHER}", True),
        (f'["pip", "install", "{OTHER}"]', True),
        (f"needs '{OTHER}[server]'", True),
        (f"pip install '{OTHER}-gguf[server]'", False),
        (f"pip install . && {OTHER} demo", False),
        (f"pip install '.[server]'\n{OTHER} serve", False),
        (f"pip uninstall {OTHER}", False),
        (f"pip install -e ~/{OTHER}", False),
    ],
)
def test_the_pattern(text: str, wrong: bool) -> None:
    assert bool(FETCHES_ANOTHER.search(text)) == wrong


def test_no_file_tells_to_install_the_other_project() -> None:
    listed = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("NOT CHECKED: commands in the tracked files (this tree is not a git repository)")
    names = [name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()]
    assert {"README.md", "CHANGELOG.md", "docs/server.md", ".ci/run"} <= set(names)
    found = []
    for name in names:
        text = (REPOSITORY / name).read_bytes().decode("utf-8", errors="replace")
        found += [f"{name}: {match.group()!r}" for match in FETCHES_ANOTHER.finditer(text)]
    assert not found


def test_what_is_installed_has_the_name_that_is_built() -> None:
    built = re.search(
        r'^name = "(.+?)"', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert built and built.group(1) == pydiffusion.DISTRIBUTION != OTHER
    assert pydiffusion.__version__ == importlib.metadata.version(built.group(1))
