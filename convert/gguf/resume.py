"""Resume interrupted conversions with a journal.

Next to ``NAME.part``, which has the data, ``NAME.part.journal`` has a line that identifies the conversion,
then a digest of each chunk that is on disk, in order of writing. A chunk is listed only after its data has
been flushed, so the process may be killed, or the power fail, at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydiffusion._util.atomic import NewFile, explaining
from pydiffusion.errors import ConversionError

try:
    import fcntl
except ImportError:  # Windows: concurrent runs are not detected there
    fcntl = None  # type: ignore[assignment]

FORMAT = "pydiffusion journal 1"
SECONDS_BETWEEN_FLUSHES = 5.0
_DIGEST_BYTES = 16


def digest_of(data: memoryview | bytes) -> bytes:
    """Digest of a chunk."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def identity(parts: Iterable[bytes | str], files: Sequence[Path]) -> str:
    """Identity of a conversion: what it writes, and the names, sizes and times of its source files."""
    whole = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    for path in files:
        with contextlib.suppress(OSError):  # optional files
            state = path.stat()
            whole.update(f"{path.name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode("utf-8", "replace"))
    return whole.hexdigest()


class Journal:
    """Journal of one conversion; a context manager that locks it."""

    def __init__(self, target: Path, identity: str):
        """Open and lock. Raises ConversionError if it can't be written or another run holds the lock."""
        self.path = target.with_name(f"{target.name}.part.journal")
        self.note = ""
        self.digests: list[bytes] = []
        self._head = f"{FORMAT} {identity}\n".encode()
        self._pending = bytearray()
        self._flushed = time.monotonic()
        with explaining(self.path, "can't be written"):
            self._file = io.FileIO(self.path, "a+")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(
                f"{self.path}: another run is writing this file; wait for it, or choose another target"
            ) from None
        except OSError:  # the file system has no locks
            pass

    def _read(self) -> None:
        with explaining(self.path, "can't be read"):
            self._file.seek(0)
            data = self._file.readall()
        if not data.startswith(self._head):
            if data:
                self.note = (
                    "a part of another conversion was there (other source, type or options): begun anew"
                )
            return
        for line in data[len(self._head) :].split(b"\n")[:-1]:  # the last one is empty or truncated
            try:
                digest = bytes.fromhex(line.decode("ascii"))
            except ValueError:
                return
            if len(digest) != _DIGEST_BYTES:
                return
            self.digests.append(digest)

    def begin(self, files: Sequence[NewFile], sizes: Sequence[int], n_steps: int) -> None:
        """Resume from the files if the journal matches them; else start over."""
        with explaining(self.path, "can't be read"):
            whole = all(os.fstat(f.file.fileno()).st_size == n for f, n in zip(files, sizes, strict=True))
        if not whole or len(self.digests) > n_steps:
            self.digests.clear()
        if not self.digests:
            for new, size in zip(files, sizes, strict=True):
                new.empty(size)
        elif not self.note:
            self.note = f"resumed: {len(self.digests)} of {n_steps} chunks were there"
        with explaining(self.path, "can't be written"):
            if self.digests:  # drops a truncated line
                self._file.truncate(len(self._head) + len(self.digests) * len(_line(bytes(_DIGEST_BYTES))))
            else:
                self._file.truncate(0)
                self._write(self._head)

    def add(self, digest: bytes, files: Sequence[NewFile]) -> None:
        """Record a chunk written to ``files``; flushes periodically."""
        self._pending += _line(digest)
        if time.monotonic() - self._flushed >= SECONDS_BETWEEN_FLUSHES:
            self.flush(files)

    def flush(self, files: Sequence[NewFile]) -> None:
        """Flush the data, then list all recorded chunks."""
        if not self._pending:
            return
        for new in files:
            new.sync(forget=False)
        with explaining(self.path, "can't be written"):
            self._write(bytes(self._pending))
        self._pending.clear()
        self._flushed = time.monotonic()

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Delete the journal: the conversion is done, or its output is unusable."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _line(digest: bytes) -> bytes:
    return digest.hex().encode() + b"\n"
