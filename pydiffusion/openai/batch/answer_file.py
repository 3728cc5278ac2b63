"""The file of a batch's answers: a line per answer, appended at once, so that a run can be resumed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from pydiffusion._util import atomic
from pydiffusion.errors import PyDiffusionError

from .answering import error_of, line_of
from .lines import Json, Line


class AnswerFile:
    """A context manager that holds the file open; ``write`` adds an answer.

    A regular file keeps the answers that it has: ``finished`` maps the numbers of these lines to whether they
    failed. Standard output (``-``), pipes and devices are written to only.
    """

    def __init__(
        self, path: Path, lines: Iterable[Line], *, source: Path, retry_errors: bool = False
    ) -> None:
        """lines: those to answer.  source: the file that they are from, ``-`` for standard input.
        retry_errors: drop the answers of lines that failed.

        Raises ValueError for a file that has other lines than answers to these, that is the source or that
        another run writes into, and for a pipe that nobody reads; OSError if it can't be written.
        """
        self.path = path
        self.finished: dict[int, bool] = {}
        self._is_new = str(path) != "-" and not path.exists()
        self._file = _open(path)
        try:
            self.is_regular = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
            _check_is_not(self._file, source)
            if self.is_regular and str(path) != "-":
                self._lock()
                self._resume(lines, retry_errors)
        except BaseException:
            self.close()
            raise

    def write(self, answer: Json) -> None:
        """Write one line, unbuffered: an interruption loses no answer. Raises PyDiffusionError, with the file
        cut back to whole lines, if that fails.
        """
        data = memoryview(_encoded(answer) + b"\n")
        end = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            if self.is_regular:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), end)
            raise PyDiffusionError(
                f"{self.path}: writing failed: {error.strerror}; earlier answers are kept: mend that and run"
                " the same command again"
            ) from error

    def close(self) -> None:
        """Close the file, unless it is standard output."""
        self._file.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        empty = self.is_regular and os.fstat(self._file.fileno()).st_size == 0
        self.close()
        if error is not None and empty and self._is_new:  # leave nothing behind where nothing was answered
            self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        """Keep other runs away from the file until it is closed, where the file system can do that."""
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another run writes into this file: wait for its end") from None
        except OSError:
            pass

    def _resume(self, lines: Iterable[Line], retry_errors: bool) -> None:
        """Read the answers that are there, and remove a truncated last one."""
        number_to_digest = {line.number: line.digest for line in lines}
        n_bytes, raw = 0, b"\n"
        with self.path.open("rb") as file:
            for raw in file:
                read = self._read_answer(raw, number_to_digest)
                if read is not None:
                    number, failed = read
                    self.finished[number] = failed
                    n_bytes += len(raw)
        if os.fstat(self._file.fileno()).st_size > n_bytes:
            os.ftruncate(self._file.fileno(), n_bytes)  # needs no space, of which there may be none
        elif not raw.endswith(b"\n"):
            self._file.write(b"\n")
        if retry_errors and any(self.finished.values()):
            self._drop_failed()

    def _read_answer(self, raw: bytes, number_to_digest: Mapping[int, str]) -> tuple[int, bool] | None:
        """Number of the line that an answer belongs to, and whether it failed; None for a truncated answer.

        Raises ValueError for anything else.
        """
        try:
            answer = json.loads(raw)
            number, digest = line_of(answer)
        except (ValueError, RecursionError):
            if not raw.endswith(b"\n"):
                return None
            raise ValueError(
                f"{self.path} contains a line that is not an answer: give another file with -o"
            ) from None
        if number_to_digest.get(number) != digest:
            raise ValueError(
                f"{self.path} answers other prompts: line {number} has changed since, or --chat, --raw,"
                " --system or --special was given otherwise; give another file with -o"
            )
        return number, error_of(answer) is not None

    def _drop_failed(self) -> None:
        """Rewrite the file without answers of lines that failed."""
        target = Path(os.path.realpath(self.path))  # a link stays one
        with target.open("rb") as file, atomic.replacing(target) as new:
            for raw in file:
                if error_of(json.loads(raw)) is None:
                    new.write(raw)
        self._file.close()
        self._file = _open(target)
        self._lock()
        self.finished = {number: failed for number, failed in self.finished.items() if not failed}


def _encoded(answer: Json) -> bytes:
    try:
        return json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, as of an id
        return json.dumps(answer).encode()


def _open(path: Path) -> IO[bytes]:
    """Open a file to append to, unbuffered, without waiting for a pipe's reader."""
    if str(path) == "-" or _is_stdout(path):
        # The command line puts a null device, open for reading, in the place of a closed one.
        if sys.stdout is None or fcntl.fcntl(1, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise ValueError("standard output is closed: give a file with -o")
        sys.stdout.flush()
        return os.fdopen(os.dup(1), "wb", buffering=0)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give the name of the file to write", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder; make it first", str(path.parent))
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise ValueError(f"{path}: no program reads this pipe or socket: start that one first") from None
        raise
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "wb", buffering=0)


def _is_stdout(path: Path) -> bool:
    """Whether the path is another name of standard output, as /dev/stdout is."""
    try:
        there = path.stat()
        return not stat.S_ISREG(there.st_mode) and os.path.samestat(there, os.fstat(1))
    except OSError:
        return False


def _check_is_not(file: IO[bytes], source: Path) -> None:
    """Raise ValueError if the file is the one that is read."""
    there = os.fstat(file.fileno())
    with contextlib.suppress(OSError):
        read = os.fstat(sys.stdin.fileno()) if str(source) == "-" else source.stat()
        if stat.S_ISREG(there.st_mode) and os.path.samestat(there, read):
            raise ValueError(
                f"{source}: is the file of prompts and of answers at once; give another one with -o"
            )
