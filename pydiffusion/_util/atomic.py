"""Atomic file writes: a target file appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydiffusion.errors import ConversionError

_FLUSH_BYTES = 32 << 20


def resolve_target(target: Path, sources: Iterable[Path], overwrite: bool) -> Path:
    """Resolve symlinks and check that the target may be written; raises ConversionError."""
    with explaining(target, "can't be written"):
        return _resolve_target(target, sources, overwrite)


def _resolve_target(target: Path, sources: Iterable[Path], overwrite: bool) -> Path:
    target = Path(os.path.realpath(target))
    if target.is_dir():
        raise ConversionError(f"{target}: is a folder; give the name of the file to write")
    if not target.parent.is_dir():
        raise ConversionError(f"{target.parent}: no such folder; make it first, or choose another target")
    if target.exists():
        if any(_is_same(target, source) for source in sources):
            raise ConversionError(f"{target}: is one of the files being read; choose another target")
        if not target.is_file():
            raise ConversionError(f"{target}: is not a regular file and can't be replaced")
        if not overwrite:
            raise ConversionError(f"{target}: already exists; remove it or allow overwriting")
    return target


def _is_same(target: Path, source: Path) -> bool:
    try:
        return target.samefile(source)
    except OSError:
        return False


def require_free_space(folder: Path, n_bytes: int) -> None:
    """Raise ConversionError if the file system of ``folder`` has less than ``n_bytes`` free."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return  # some file systems can't report it; the write itself will fail
    if free < n_bytes:
        raise ConversionError(
            f"{folder}: not enough space: the file needs {n_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        )


class NewFile:
    """Temporary file that will replace ``target``; OS errors become ConversionError.

    ``kept``: it has a fixed name, so that a later run can resume from what an earlier one wrote.
    """

    def __init__(self, target: Path, kept: bool = False):
        self.target = target
        self._unflushed = 0
        name = f"{target.name}.part" if kept else f".{target.name}.{secrets.token_hex(4)}.part"
        self.temporary = target.with_name(name)
        with explaining(target, "can't be written"):
            self.file = io.FileIO(self.temporary, "r+" if kept and self.temporary.is_file() else "x+")

    def write(self, data: memoryview | bytes, offset: int | None = None) -> None:
        """Write all of ``data``, at ``offset`` or after the last write: an unbuffered file may take less at a
        time.
        """
        view = memoryview(data).cast("B")
        with explaining(self.target, "writing failed"):
            if offset is not None:
                self.file.seek(offset)
            while len(view):
                count = self.file.write(view)
                if not count:
                    raise OSError(errno.EIO, "nothing was written")
                view = view[count:]
                self._unflushed += count
        if self._unflushed >= _FLUSH_BYTES:
            self._unflushed = 0
            self._forget_pages()  # starts writeback, so that the disk is not idle until the end

    def empty(self, n_bytes: int) -> None:
        """Make it a sparse file of ``n_bytes`` zeros."""
        with explaining(self.target, "writing failed"):
            self.file.truncate(0)
            self.file.truncate(n_bytes)

    def sync(self, forget: bool = True) -> None:
        """Flush to disk and drop the cached pages, if supported: reading it back then reads the disk."""
        with explaining(self.target, "writing failed"):
            os.fsync(self.file.fileno())
        if forget:
            self._forget_pages()

    def _forget_pages(self) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[NewFile]:
    """Write a temporary file beside ``target`` that replaces it when the block ends; removed if the block
    fails.

    SIGTERM and SIGHUP, unless handled elsewhere, remove the temporary file before they end the process.
    """
    with replacing_all([target]) as (new,):
        yield new


@contextlib.contextmanager
def replacing_all(targets: Sequence[Path], kept: bool = False) -> Iterator[list[NewFile]]:
    """As :func:`replacing` for several files of one folder. ``kept``: on failure, keep ``NAME.part``."""
    files: list[NewFile] = []
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_removed_on_signal(files, kept))
            for target in targets:
                files.append(NewFile(target, kept))
                stack.enter_context(files[-1].file)
            yield files
            for new in files:
                new.sync()
            for new in files:
                with explaining(new.target, "can't be put in place"):
                    new.temporary.replace(new.target)
    finally:
        if not kept:
            _remove(files)
    _sync_folder(targets[0].parent)


def _remove(files: Iterable[NewFile]) -> None:
    for new in files:
        with contextlib.suppress(OSError):
            new.temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explaining(path: Path, what: str) -> Iterator[None]:
    """Turn OS errors within the block into a ConversionError about ``path``."""
    try:
        yield
    except OSError as error:
        raise _explained(error, path, what) from error
    except RecursionError as error:
        raise ConversionError(f"{path}: {what}: it is nested too deeply") from error


def _explained(error: OSError, target: Path, what: str) -> ConversionError:
    advice = {
        errno.ENOSPC: "; free some space or choose another folder",
        errno.EDQUOT: "; the quota is used up",
        errno.EFBIG: "; the file system or a limit of this process allows no file of this size",
        errno.EACCES: "; the folder allows no new files",
        errno.EROFS: "; choose a folder that is not read-only",
    }
    return ConversionError(f"{target}: {what}: {error.strerror or error}{advice.get(error.errno or 0, '')}")


@contextlib.contextmanager
def _removed_on_signal(files: Sequence[NewFile], kept: bool) -> Iterator[None]:
    """Remove the files before an unhandled signal ends the process."""

    def remove_and_end(number: int, _: object) -> None:
        _remove(files)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    unhandled = []
    if not kept and threading.current_thread() is threading.main_thread():
        unhandled = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in unhandled:
            signal.signal(number, remove_and_end)
        yield
    finally:
        for number in unhandled:
            signal.signal(number, signal.SIG_DFL)


def _sync_folder(folder: Path) -> None:
    """Make the rename durable, where supported."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
