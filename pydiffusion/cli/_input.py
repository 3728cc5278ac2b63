"""Read text from standard input, files and arguments: UTF-8, without a byte order mark."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

import typer

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode(data: bytes, name: str) -> str:
    """The text of these bytes, called ``name`` in errors. Raises PyDiffusionError for UTF-16, ValueError for
    other bytes that are not UTF-8.
    """
    if data.startswith(_UTF16) or (len(data) > 1 and data[:64].count(0) * 5 >= len(data[:64]) * 2):
        from pydiffusion import PyDiffusionError

        raise PyDiffusionError(
            f"{name} is UTF-16, as PowerShell writes and pipes it: save it as UTF-8 (Out-File -Encoding utf8;"
            " for pipes $OutputEncoding = [Text.UTF8Encoding]::new()), or convert it with 'iconv -f UTF-16'"
        )
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not valid UTF-8 at byte {error.start}: convert it, as by 'iconv -f LATIN1 -t UTF-8'"
        ) from None


def read_text(path: Path) -> str:
    """Read a file as text. Raises ValueError with the position if it is not UTF-8."""
    return decode(path.read_bytes(), str(path)).replace("\r\n", "\n")


def read_text_or_stdin(file: Path) -> str:
    """Read a file, or standard input for ``-``, as text. Raises ValueError if it is not UTF-8."""
    if str(file) != "-":
        return decode(file.read_bytes(), str(file))
    if sys.stdin.isatty():
        print("reading the text from the terminal; Ctrl-D ends it", file=sys.stderr, flush=True)
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise ValueError(f"standard input can't be read: {error.strerror or error}") from None
    return decode(data, "standard input")


def read_schema(given: str) -> str:
    """The schema of ``--json-schema``: itself, or of the file or standard input that it names."""
    return given if given.lstrip().startswith("{") else read_text_or_stdin(Path(given))


def check_encodable(text: str, option: str) -> str:
    """The text; a usage error if the shell gave bytes that are no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"{option} is not valid UTF-8 at character {error.start + 1}") from None
    return text
