"""Bring the pinned ggml into ``vendor/ggml`` and prove that it is the pinned one.

Run by CMake at configure time; needs only the standard library and pip. Exit code 1 with one line on stderr
when the source can't be had or is not the pinned one.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCK = HERE / "ggml.lock"
TARGET = HERE / "ggml"

# Of ggml's folders, those that we build, and the files at the top of src/.
WANTED = re.compile(
    r"[^/]+/vendor/llama\.cpp/ggml/"
    r"(CMakeLists\.txt|cmake/.+|include/.+|src/[^/]+|src/(ggml-cpu|ggml-cuda|ggml-metal)/.+)$"
)
PREFIX = re.compile(r"^[^/]+/vendor/llama\.cpp/ggml/")


class FetchError(Exception):
    """The source can't be had, or is not what the lock file says."""


def read_lock() -> tuple[str, str]:
    """The requirement line and the tree's digest."""
    text = LOCK.read_text(encoding="utf-8")
    requirement = re.search(r"^[a-z].*--hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    digest = re.search(r"^# tree-sha256: (\S+)$", text, re.MULTILINE)
    if not requirement or not digest:
        raise FetchError(f"{LOCK}: no requirement line with a sha256, or no tree-sha256 line")
    return requirement.group(0), digest.group(1)


def tree_digest(root: Path) -> str:
    """sha256 over the sorted relative paths and contents of all files below ``root``."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def download(requirement: str, folder: Path) -> Path:
    """Download the source distribution; pip refuses it when the hash differs."""
    lines = folder / "requirements.txt"
    lines.write_text(requirement + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--no-binary",
        ":all:",
        "--require-hashes",
        "--dest",
        str(folder),
        "--requirement",
        str(lines),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if result.returncode != 0 or len(archives) != 1:
        said = (result.stderr or result.stdout).strip() or "pip left no archive"
        raise FetchError(f"could not download {requirement.split()[0]} with pip: {said}")
    return archives[0]


def unpack(archive: Path, target: Path) -> None:
    """Unpack the wanted files of ``archive`` into ``target``; links and odd names are refused."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if not WANTED.match(member.name) or member.isdir():
                continue
            relative = Path(PREFIX.sub("", member.name))
            if not member.isfile() or relative.is_absolute() or ".." in relative.parts:
                raise FetchError(f"{archive.name}: refused to unpack {member.name!r}")
            source = tar.extractfile(member)
            if source is None:
                raise FetchError(f"{archive.name}: {member.name!r} can't be read")
            destination = target / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            with source, destination.open("wb") as out:
                shutil.copyfileobj(source, out)


def fetch(requirement: str) -> None:
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".fetch-") as name:
        folder = Path(name)
        unpacked = folder / "ggml"
        unpack(download(requirement, folder), unpacked)
        unpacked.rename(TARGET)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the digest of the tree into ggml.lock")
    options = parser.parse_args()
    try:
        requirement, expected = read_lock()
        if not TARGET.is_dir():
            fetch(requirement)
        found = tree_digest(TARGET)
        if options.update:
            text = LOCK.read_text(encoding="utf-8")
            LOCK.write_text(text.replace(f"# tree-sha256: {expected}", f"# tree-sha256: {found}"), "utf-8")
        elif found != expected:
            raise FetchError(
                f"{TARGET} is not the pinned ggml (digest {found}, pinned {expected}): delete it"
            )
    except (FetchError, OSError, tarfile.TarError) as error:
        print(f"fetch_ggml: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
