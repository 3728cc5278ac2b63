"""Fetch the pinned ggml into ``vendor/ggml``, apply our patches and verify the digest.

CMake runs it at configure time; it needs only the standard library and pip. If the source can't be fetched
or is not the pinned one, the exit code is 1 and the last line on stderr says what to do.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCK = HERE / "ggml.lock"
PATCHES = HERE / "patches"
TARGET = HERE / "ggml"

# The folders of ggml that we build, and the files at the top of src/.
WANTED = re.compile(
    r"[^/]+/vendor/llama\.cpp/ggml/"
    r"(CMakeLists\.txt|cmake/.+|include/.+|src/[^/]+|src/(ggml-cpu|ggml-cuda|ggml-metal)/.+)$"
)
PREFIX = re.compile(r"^[^/]+/vendor/llama\.cpp/ggml/")


class FetchError(Exception):
    """The source can't be fetched, or is not the pinned one."""


@dataclass(frozen=True)
class Pin:
    """Contents of ggml.lock."""

    requirement: str  # in pip's format, with the archive's hash
    ggml: str  # version
    megabytes: str  # of the archive
    digest: str  # of the unpacked tree
    patched: str  # of the tree after the patches

    @property
    def package(self) -> str:
        return self.requirement.split()[0]  # NAME==VERSION

    @property
    def archive(self) -> str:
        return self.package.replace("-", "_").replace("==", "-") + ".tar.gz"

    @property
    def sha256(self) -> str:
        return self.requirement.rpartition(":")[2]


def read_lock() -> Pin:
    text = LOCK.read_text(encoding="utf-8")
    requirement = re.search(r"^[a-z].*--hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    if not requirement:
        raise FetchError(f"{LOCK}: no requirement line with a sha256")
    values = []
    for name in ("ggml-version", "archive-mb", "tree-sha256", "patched-sha256"):
        line = re.search(rf"^# {name}: (\S+)$", text, re.MULTILINE)
        if not line:
            raise FetchError(f"{LOCK}: no line '# {name}: ...'")
        values.append(line.group(1))
    return Pin(requirement.group(0), *values)


def tree_digest(root: Path) -> str:
    """sha256 over the sorted relative paths and contents of all files below ``root``."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def find_local_archive(pin: Pin) -> Path | None:
    """The archive that a user put beside this file, if any."""
    path = HERE / pin.archive
    if not path.is_file():
        return None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != pin.sha256:
        raise FetchError(f"{path} has sha256 {found}, pinned is {pin.sha256}: delete it")
    return path


def download(pin: Pin, folder: Path) -> Path:
    """Download the archive from the package index; pip rejects a wrong hash."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{sys.executable} has no pip to fetch {pin.package} with: run python -m ensurepip "
            f"(Debian: apt install python3-pip), or put {pin.archive} into {HERE}"
        )
    what = f"{pin.package} ({pin.megabytes} MB, with ggml {pin.ggml} in it)"
    print(f"fetch_ggml: fetching {what} from the package index with pip", flush=True)
    lines = folder / "requirements.txt"
    lines.write_text(pin.requirement + "\n", encoding="utf-8")
    # --no-binary for this package only: else pip would also compile its build requirements, such as CMake.
    options = ["--no-binary", pin.package.partition("==")[0], "--no-deps", "--require-hashes", "--no-input"]
    options += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(lines)]
    seconds = time_limit()
    try:
        code, output = run([sys.executable, "-m", "pip", "download", *options], seconds, folder)
    except subprocess.TimeoutExpired:
        raise FetchError(
            f"pip did not finish {pin.package} and was stopped after {seconds:g} s: {remedies(pin)}; "
            "PYDIFFUSION_FETCH_TIMEOUT=SECONDS sets another limit"
        ) from None
    archives = list(folder.glob("*.tar.gz"))
    if code == 0 and len(archives) == 1:
        return archives[0]
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got +([0-9a-f]{64})", output)
        raise FetchError(
            f"the download {pin.package} has sha256 {got.group(1) if got else 'unknown'}, pinned is "
            f"{pin.sha256}: a proxy, a mirror or pip's cache serves another file (pip cache purge empties "
            "the cache, PIP_INDEX_URL sets another index)"
        )
    print(output.strip(), file=sys.stderr)
    raise FetchError(f"pip could not download {pin.package}, see above: {remedies(pin)}")


def remedies(pin: Pin) -> str:
    return (
        "check the network and the proxy (HTTPS_PROXY), set another index (PIP_INDEX_URL), or put "
        f"{pin.archive} into {HERE}"
    )


def time_limit() -> float | None:
    """Time limit of pip in seconds; None for no limit."""
    text = os.environ.get("PYDIFFUSION_FETCH_TIMEOUT", "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise FetchError(f"PYDIFFUSION_FETCH_TIMEOUT={text!r}: it takes seconds, or 0 for no limit")
    return seconds or None


def run(command: list[str], seconds: float | None, scratch: Path) -> tuple[int, str]:
    """Exit code and output of ``command``. Kills it and its children on a timeout or interrupt."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(scratch)},  # deleted even if pip can't clean up
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
        raise
    return process.returncode, output


def unpack(archive: Path, target: Path) -> None:
    """Unpack the wanted files of ``archive`` into ``target``; refuse links and paths outside of it."""
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
    """Apply the hunks of a unified diff without fuzz."""
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
    """Apply vendor/patches in order of their names; the text before a diff is ignored."""
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


def fetch(pin: Pin, *, check: bool = True) -> Pin:
    """Download, check, patch and install ggml; returns the pin with the new size and digests."""
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".fetch-") as name:
        folder = Path(name)
        unpacked = folder / "ggml"
        archive = find_local_archive(pin) or download(pin, folder)
        unpack(archive, unpacked)
        before = tree_digest(unpacked)
        if check:
            require_digest(unpacked, pin.digest, "pinned ggml")
        apply_patches(unpacked)
        after = tree_digest(unpacked)
        megabytes = f"{archive.stat().st_size / 1e6:.0f}"
        unpacked.rename(TARGET)
        return replace(pin, megabytes=megabytes, digest=before, patched=after)


def update(pin: Pin) -> None:
    """Fetch ggml and write its size and digests to ggml.lock."""
    if TARGET.exists():
        raise FetchError(f"{TARGET} exists: delete it, so that the pinned version is fetched")
    new = fetch(pin, check=False)
    text = LOCK.read_text(encoding="utf-8")
    for name, value in (
        ("archive-mb", new.megabytes),
        ("tree-sha256", new.digest),
        ("patched-sha256", new.patched),
    ):
        text = re.sub(rf"^# {name}: .*$", f"# {name}: {value}", text, flags=re.MULTILINE)
    LOCK.write_text(text, encoding="utf-8")


def ensure(pin: Pin) -> None:
    """Make sure that ``vendor/ggml`` is the pinned ggml with our patches."""
    if not TARGET.is_dir():
        fetch(pin)
    elif tree_digest(TARGET) == pin.digest != pin.patched:
        apply_patches(TARGET)  # an unpatched tree, from an older checkout
    require_digest(TARGET, pin.patched, "pinned ggml with vendor/patches")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="fetch ggml and write its digests to ggml.lock")
    options = parser.parse_args()
    try:
        if options.update:
            update(read_lock())
        else:
            ensure(read_lock())
    except (FetchError, OSError, tarfile.TarError) as error:
        print(f"fetch_ggml: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch_ggml: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # so that pip and its children are killed too
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, signal.default_int_handler)
    raise SystemExit(main())
