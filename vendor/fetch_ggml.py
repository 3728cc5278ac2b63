"""Bring the pinned ggml with our patches into ``vendor/ggml`` and prove that it is that one.

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
PATCHES = HERE / "patches"
TARGET = HERE / "ggml"

# Of ggml's folders, those that we build, and the files at the top of src/.
WANTED = re.compile(
    r"[^/]+/vendor/llama\.cpp/ggml/"
    r"(CMakeLists\.txt|cmake/.+|include/.+|src/[^/]+|src/(ggml-cpu|ggml-cuda|ggml-metal)/.+)$"
)
PREFIX = re.compile(r"^[^/]+/vendor/llama\.cpp/ggml/")


class FetchError(Exception):
    """The source can't be had, or is not what the lock file says."""


def read_lock() -> tuple[str, str, str]:
    """The requirement line, and the tree's digests before and after the patches."""
    text = LOCK.read_text(encoding="utf-8")
    requirement = re.search(r"^[a-z].*--hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    digest = re.search(r"^# tree-sha256: (\S+)$", text, re.MULTILINE)
    patched = re.search(r"^# patched-sha256: (\S+)$", text, re.MULTILINE)
    if not requirement or not digest or not patched:
        raise FetchError(
            f"{LOCK}: no requirement line with a sha256, or no tree-sha256 or patched-sha256 line"
        )
    return requirement.group(0), digest.group(1), patched.group(1)


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
    command += [  # of this package alone: else pip would compile what it is built with, CMake among it
        "--no-binary",
        requirement.partition("==")[0],
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


def patched_text(text: str, hunks: list[str], where: str) -> str:
    """The text with the hunks of a unified diff applied; every line must be where the diff says."""
    lines, result, at = text.splitlines(keepends=True), [], 0
    for hunk in hunks:
        head, *body = hunk.splitlines(keepends=True)
        begin = int(re.match(r"-(\d+)", head).group(1)) - 1
        old = [line[1:] for line in body if line[0] in " -"]
        if begin < at or lines[begin : begin + len(old)] != old:
            raise FetchError(f"{where}, line {begin + 1}: the file is not as the patch expects it")
        result += lines[at:begin] + [line[1:] for line in body if line[0] in " +"]
        at = begin + len(old)
    return "".join(result + lines[at:])


def apply_patches(root: Path) -> None:
    """Apply vendor/patches in the order of their names; what stands before a diff is its reason."""
    for patch in sorted(PATCHES.glob("*.patch")):
        for diff in re.split(r"^--- a/", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            names, *hunks = re.split(r"^@@ ", diff, flags=re.MULTILINE)
            target = root / names.splitlines()[0].strip()
            text = patched_text(target.read_text(encoding="utf-8"), hunks, f"{patch.name}: {target}")
            target.write_text(text, encoding="utf-8", newline="\n")


def require_digest(root: Path, expected: str, what: str) -> None:
    found = tree_digest(root)
    if found != expected:
        raise FetchError(f"{TARGET} is not the {what} (digest {found}, pinned {expected}): delete it")


def fetch(requirement: str, digest: str | None) -> tuple[str, str]:
    """Download, check, patch and put in place; returns the digests before and after the patches."""
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".fetch-") as name:
        folder = Path(name)
        unpacked = folder / "ggml"
        unpack(download(requirement, folder), unpacked)
        before = tree_digest(unpacked)
        if digest is not None:
            require_digest(unpacked, digest, "pinned ggml")
        apply_patches(unpacked)
        after = tree_digest(unpacked)
        unpacked.rename(TARGET)
        return before, after


def update(requirement: str) -> None:
    """Fetch anew and write the digests of what came into the lock."""
    if TARGET.exists():
        raise FetchError(f"{TARGET} is there: delete it, so that what is pinned is fetched")
    before, after = fetch(requirement, None)
    text = LOCK.read_text(encoding="utf-8")
    text = re.sub(r"^# tree-sha256: .*$", f"# tree-sha256: {before}", text, flags=re.MULTILINE)
    text = re.sub(r"^# patched-sha256: .*$", f"# patched-sha256: {after}", text, flags=re.MULTILINE)
    LOCK.write_text(text, encoding="utf-8")


def bring(requirement: str, digest: str, patched: str) -> None:
    """Have the pinned ggml with our patches in place."""
    if not TARGET.is_dir():
        fetch(requirement, digest)
    elif tree_digest(TARGET) == digest != patched:
        apply_patches(TARGET)  # a tree from before there were patches
    require_digest(TARGET, patched, "pinned ggml with vendor/patches")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="fetch anew, and write digests to ggml.lock")
    options = parser.parse_args()
    try:
        requirement, digest, patched = read_lock()
        if options.update:
            update(requirement)
        else:
            bring(requirement, digest, patched)
    except (FetchError, OSError, tarfile.TarError) as error:
        print(f"fetch_ggml: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
