"""Pack static libraries of native/ and ggml into a kit, and check that they fit where they are linked.

    python scripts/prebuilt.py key --flags="..."             # digest of all inputs of the build
    python scripts/prebuilt.py pack BUILD_TREE KIT --flags="..." [--key KEY]
    python scripts/prebuilt.py unpack KIT DIR
    python scripts/prebuilt.py check DIR --compiler "GNU 13.2.0"

Used by scripts/gpu_prepare.sh (pack), scripts/gpu_run.py (unpack) and cmake/prebuilt.cmake (check). Needs
only the standard library. On an error, prints one line to stderr and exits with 1.
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
# Inputs of the libraries, without the bindings, which are compiled on the target machine.
SOURCES = (
    "native", "vendor/ggml.lock", "vendor/patches",
    "cmake/ggml.cmake", "cmake/native.cmake", "cmake/cuda.cmake", "cmake/sanitizers.cmake",
    "cmake/warnings.cmake",
)  # fmt: skip
NOT_SOURCES = ("native/bindings/", "native/tests/")


class KitError(Exception):
    """A kit can't be built or used; the message says why and what to do."""


def source_files() -> Iterator[Path]:
    for entry in SOURCES:
        path = ROOT / entry
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in found:
            relative = file.relative_to(ROOT).as_posix()
            if not relative.startswith(NOT_SOURCES) and "__pycache__" not in relative:
                yield file


def source_key() -> str:
    """Return the first 16 hex digits of a SHA-256 over the sources' paths and contents."""
    digest = hashlib.sha256()
    for file in source_files():
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def build_key(flags: str) -> str:
    """Return a digest of sources, build flags and compiler."""
    inputs = " ".join([source_key(), flags, compiler_here()])
    return hashlib.sha256(inputs.encode()).hexdigest()[:16]


def compiler_here() -> str:
    """Return the C++ compiler in CMake's form: "GNU 12.2.0"."""
    command = os.environ.get("CXX", "c++")
    try:
        text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise KitError(f"no C++ compiler: {command} does not run ({error}); set CXX") from error
    version = re.search(r"\d+\.\d+\.\d+", text)
    if not version:
        raise KitError(f"can't read the version of {command} from {text.splitlines()[:1]}")
    return f"{'Clang' if 'clang' in text else 'GNU'} {version.group()}"


def commit_here() -> str:
    """Return this tree's commit, with "+" if files differ from it; "unknown" outside of git."""
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
    """Pack the libraries of a CMake build tree, ggml's headers and a manifest into ``kit``.

    key: ``build_key`` from before the build; raises KitError if the sources have changed since.
    """
    if key is not None and key != build_key(flags):
        raise KitError("the sources changed while they were compiled: run gpu_prepare.sh again")
    found = {name: sorted(tree.rglob(f"lib{name}.a")) for name in ARCHIVES}
    missing = [name for name, paths in found.items() if not paths and name != "ggml-cuda"]
    if missing:
        raise KitError(f"{tree} has no lib{missing[0]}.a: build it first")
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
    (kit / MANIFEST).unlink(missing_ok=True)  # marks the kit as incomplete until it is written again
    with tarfile.open(kit / PACKED, "w:xz", preset=2) as packed:
        for name, paths in found.items():
            if paths:
                packed.add(paths[0], f"lib/lib{name}.a")
        for header in sorted((ROOT / "vendor/ggml/include").glob("*.h")):
            packed.add(header, f"include/{header.name}")
    (kit / MANIFEST).write_text(json.dumps(manifest, indent=1))


def unpack(kit: Path, target: Path) -> None:
    """Unpack a kit for cmake/prebuilt.cmake; removes ``target`` on failure."""
    if not (kit / MANIFEST).is_file() or not (kit / PACKED).is_file():
        raise KitError(f"{kit} is not a kit, or an incomplete one: build it with scripts/gpu_prepare.sh")
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
            f"{kit / PACKED} can't be unpacked ({error}): check for free space in {target.parent}, or build "
            "the kit again with scripts/gpu_prepare.sh"
        ) from error


def read_manifest(folder: Path) -> dict[str, str]:
    """Read the manifest of a packed or unpacked kit."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        wanted = ("sources", "flags", "compiler", "libc", "machine", "commit")
        return {name: str(manifest[name]) for name in wanted}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KitError(f"the kit {folder} has no readable {MANIFEST}: {error!r}") from error


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def check(folder: Path, compiler: str, kit: Path | None = None) -> None:
    """Raise KitError unless the libraries fit this tree, compiler and system.

    kit: folder of the packed kit, for error messages.
    """
    manifest = read_manifest(folder)
    kit = kit or folder
    missing = [name for name in ARCHIVES[:-1] if not (folder / f"lib/lib{name}.a").is_file()]
    if missing:
        raise KitError(
            f"{folder}/lib has no lib{missing[0]}.a: build the kit again with scripts/gpu_prepare.sh"
        )
    rebuild = "build the kit again with scripts/gpu_prepare.sh"
    if manifest["sources"] != source_key():
        raise KitError(
            f"the libraries in {kit} are from other sources (commit {manifest['commit']}) than this tree "
            f"(commit {commit_here()}): {rebuild}"
        )
    kit_id, _, kit_version = manifest["compiler"].partition(" ")
    here_id, _, here_version = compiler.partition(" ")
    if here_id != kit_id or _numbers(here_version)[:1] < _numbers(kit_version)[:1]:
        raise KitError(
            f"the libraries in {kit} were compiled by {manifest['compiler']}, and {compiler} can't link "
            f"them: choose another compiler (CXX), or {rebuild}"
        )
    if platform.machine() != manifest["machine"]:
        raise KitError(
            f"the libraries in {kit} are for {manifest['machine']}, not {platform.machine()}: {rebuild}"
        )
    libc = " ".join(platform.libc_ver())
    if _numbers(libc) < _numbers(manifest["libc"]):
        raise KitError(
            f"the libraries in {kit} need {manifest['libc']}, but this system has {libc}: {rebuild}"
        )


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
