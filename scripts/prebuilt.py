"""Archives of native/ and ggml, built on one machine and linked on another: key, packing, checking.

    python scripts/prebuilt.py key --flags="..."             # digest of all that the archives are made from
    python scripts/prebuilt.py pack BUILD_TREE KIT --flags="..." [--key KEY]
    python scripts/prebuilt.py unpack KIT DIR
    python scripts/prebuilt.py check DIR --compiler "GNU 13.2.0"

scripts/gpu_prepare.sh packs, scripts/gpu_run.py unpacks, cmake/prebuilt.cmake checks. Needs only the standard
library. Exit code 1 with one line on stderr when something is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHIVES = ("pydiffusion_native", "ggml", "ggml-base", "ggml-cpu", "ggml-cuda")
MANIFEST = "manifest.json"
PACKED = "archives.tar.xz"
# What the archives are made from; the bindings are compiled where they are linked.
SOURCES = (
    "native", "vendor/ggml.lock", "vendor/patches",
    "cmake/ggml.cmake", "cmake/native.cmake", "cmake/cuda.cmake", "cmake/sanitizers.cmake",
    "cmake/warnings.cmake",
)  # fmt: skip
NOT_SOURCES = ("native/bindings/", "native/tests/")


class KitError(Exception):
    """The kit can't be made or used; the text says why and what to do."""


def source_files() -> Iterator[Path]:
    for entry in SOURCES:
        path = ROOT / entry
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in found:
            relative = file.relative_to(ROOT).as_posix()
            if not relative.startswith(NOT_SOURCES) and "__pycache__" not in relative:
                yield file


def source_key() -> str:
    """sha256 over paths and contents of the sources, 16 hex digits."""
    digest = hashlib.sha256()
    for file in source_files():
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def build_key(flags: str) -> str:
    """The same with the flags that they are built with, and the compiler."""
    said = " ".join([source_key(), flags, compiler_here()])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def compiler_here() -> str:
    """As CMake names it: "GNU 12.2.0"."""
    command = os.environ.get("CXX", "c++")
    try:
        text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise KitError(f"no C++ compiler: {command} does not run ({error})") from error
    version = re.search(r"\d+\.\d+\.\d+", text)
    if not version:
        raise KitError(f"can't read the version of {command} from {text.splitlines()[:1]}")
    return f"{'Clang' if 'clang' in text else 'GNU'} {version.group()}"


def commit_here() -> str:
    """The commit of this tree, with "+" where files differ from it; "unknown" outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    if found.returncode:
        return "unknown"
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def pack(tree: Path, kit: Path, flags: str, key: str | None = None) -> None:
    """Put the archives of a CMake build tree, ggml's headers and a manifest into ``kit``.

    key: what ``build_key`` gave before the build; KitError where the sources have changed since.
    """
    if key is not None and key != build_key(flags):
        raise KitError("the sources changed while they were compiled: call gpu_prepare.sh again")
    found = {name: sorted(tree.rglob(f"lib{name}.a")) for name in ARCHIVES}
    missing = [name for name, paths in found.items() if not paths and name != "ggml-cuda"]
    if missing:
        raise KitError(f"{tree} has no lib{missing[0]}.a: was it built?")
    manifest = {
        "sources": source_key(),
        "build": build_key(flags),
        "flags": flags,
        "compiler": compiler_here(),
        "libc": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
        "commit": commit_here(),
    }
    kit.mkdir(parents=True, exist_ok=True)
    (kit / MANIFEST).unlink(missing_ok=True)  # a kit without it is none, should this end half-way
    with tarfile.open(kit / PACKED, "w:xz", preset=2) as packed:
        for name, paths in found.items():
            if paths:
                packed.add(paths[0], f"lib/lib{name}.a")
        for header in sorted((ROOT / "vendor/ggml/include").glob("*.h")):
            packed.add(header, f"include/{header.name}")
    (kit / MANIFEST).write_text(json.dumps(manifest, indent=1))


def unpack(kit: Path, target: Path) -> None:
    """Unpack a kit to where cmake/prebuilt.cmake can link it; nothing is left where that fails."""
    if not (kit / MANIFEST).is_file() or not (kit / PACKED).is_file():
        raise KitError(f"{kit} is no kit, or an unfinished one: make it with scripts/gpu_prepare.sh")
    try:
        with tarfile.open(kit / PACKED, "r:xz") as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(target, filter="data")
            else:
                tar.extractall(target)
        shutil.copyfile(kit / MANIFEST, target / MANIFEST)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        shutil.rmtree(target, ignore_errors=True)
        raise KitError(
            f"{kit / PACKED} can't be unpacked ({error}): is there room in {target.parent}, is it whole? "
            "scripts/gpu_prepare.sh makes it again"
        ) from error


def read_manifest(folder: Path) -> dict[str, str]:
    """What a kit, packed or not, says of itself."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        wanted = ("sources", "flags", "compiler", "libc", "machine", "commit")
        return {name: str(manifest[name]) for name in wanted}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KitError(f"the kit {folder} has no readable {MANIFEST}: {error!r}") from error


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def check(folder: Path, compiler: str, kit: Path | None = None) -> None:
    """Raise KitError unless the archives fit this tree, this compiler and this system.

    kit: where they were unpacked from, to be named instead.
    """
    manifest = read_manifest(folder)
    kit = kit or folder
    missing = [name for name in ARCHIVES[:-1] if not (folder / f"lib/lib{name}.a").is_file()]
    if missing:
        raise KitError(f"{folder}/lib has no lib{missing[0]}.a: make the kit again (scripts/gpu_prepare.sh)")
    again = "make the kit again with scripts/gpu_prepare.sh"
    if manifest["sources"] != source_key():
        raise KitError(
            f"the archives in {kit} are of other sources (commit {manifest['commit']}) than this tree "
            f"(commit {commit_here()}): {again}"
        )
    made_id, _, made_version = manifest["compiler"].partition(" ")
    here_id, _, here_version = compiler.partition(" ")
    if here_id != made_id or _numbers(here_version)[:1] < _numbers(made_version)[:1]:
        raise KitError(
            f"the archives in {kit} were compiled by {manifest['compiler']}, and {compiler} can't link "
            f"them: choose another compiler (CXX), or {again}"
        )
    if platform.machine() != manifest["machine"]:
        raise KitError(
            f"the archives in {kit} are for {manifest['machine']}, not {platform.machine()}: {again}"
        )
    libc = " ".join(platform.libc_ver())
    if _numbers(libc) < _numbers(manifest["libc"]):
        raise KitError(f"the archives in {kit} need {manifest['libc']}, here is {libc}: {again}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("key")
    one.add_argument("--flags", default="")
    one = commands.add_parser("pack")
    one.add_argument("tree", type=Path)
    one.add_argument("kit", type=Path)
    one.add_argument("--flags", default="")
    one.add_argument("--key")
    one = commands.add_parser("unpack")
    one.add_argument("kit", type=Path)
    one.add_argument("target", type=Path)
    one = commands.add_parser("check")
    one.add_argument("folder", type=Path)
    one.add_argument("--compiler", required=True)
    options = parser.parse_args()
    try:
        if options.command == "key":
            print(build_key(options.flags))
        elif options.command == "pack":
            pack(options.tree, options.kit, options.flags, options.key)
        elif options.command == "unpack":
            unpack(options.kit, options.target)
        else:
            check(options.folder, options.compiler)
    except (KitError, OSError, tarfile.TarError) as error:
        print(f"prebuilt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
