"""Lines of a batch: prompts in a short form of ours, or requests in OpenAI's batch form.

Ours is a JSON string, or an object with ``prompt`` or ``messages``, an optional ``id``, and other fields of a
request or of GenerationOptions. OpenAI's is ``{"custom_id", "method", "url", "body"}``.
"""

from __future__ import annotations

import errno
import json
import os
import select
import stat
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

Json = dict[str, Any]
Form = Literal["short", "openai"]

_OPENAI = frozenset(("custom_id", "method", "url", "body"))
# The field with the request in batch forms of other services.
_FOREIGN = {"params": "Anthropic's", "request": "Google's", "modelInput": "Bedrock's"}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Line:
    """A line of a batch.

    number: counted from 1, blank lines included.  digest: of its bytes, tells whether it has changed since it
    was answered.  fields: of its object, without OpenAI's envelope.  error: why it can't be answered.
    """

    number: int
    digest: str
    form: Form
    fields: Json
    id: Any = None
    url: str = ""
    error: str | None = None


def read_input(path: Path) -> bytes:
    """All bytes of a file, a pipe or, for ``-``, standard input.

    Raises ValueError for a named pipe into which nothing writes, which would be waited for in vain, and where
    standard input is closed; OSError.
    """
    if str(path) == "-":
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        return sys.stdin.buffer.read()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give a file of prompts", str(path))
    if path.exists() and stat.S_ISFIFO(path.stat().st_mode):
        return _read_pipe(path)
    return path.read_bytes()


def _read_pipe(path: Path) -> bytes:
    # Without O_NONBLOCK, opening waits until some program opens the other end.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        first = file.read(1)  # None: a writer has it open, nothing is there yet
        if first == b"":
            raise ValueError(f"{path}: no program writes into this pipe: start that one first")
        os.set_blocking(file.fileno(), True)
        select.select([file], [], [])
        return (first or b"") + file.read()


def read_lines(data: bytes, name: str, *, plain: bool = False, salt: str = "") -> list[Line]:
    """The lines of a file's bytes, blank ones left out.

    name: of the file, for errors.  plain: every line is a prompt as it is, not JSON.  salt: enters the digest
    of a line with a ``prompt``: how it is passed to the model, so that an answer to another way of passing it
    counts as one to another prompt.
    Raises ValueError for a file that has no JSON line at all: it is of another kind.
    """
    if data.startswith(_UTF16):
        raise ValueError(f"{name}: is UTF-16; save it as UTF-8")
    data = data.removeprefix(b"\xef\xbb\xbf")
    numbered = [(i, raw.strip()) for i, raw in enumerate(data.splitlines(), 1) if raw.strip()]
    if plain:
        lines = [_plain_line(number, raw, salt) for number, raw in numbered]
    else:
        _check_is_jsonl(data, numbered, name)
        lines = [_json_line(number, raw, salt) for number, raw in numbered]
    # A line that is no object has the form of the others, so that one reader can read all answers.
    known: Form = next((line.form for line in lines if line.error is None), "short")
    return [
        line if line.error is None or line.form == "openai" else replace(line, form=known) for line in lines
    ]


def _plain_line(number: int, raw: bytes, salt: str) -> Line:
    try:
        fields, error = {"prompt": raw.decode()}, None
    except UnicodeDecodeError as wrong:
        fields, error = {}, _not_utf8(wrong)
    return Line(number, _digest(raw, salt), "short", fields, error=error)


def _json_line(number: int, raw: bytes, salt: str) -> Line:
    digest = _digest(raw)
    try:
        given = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return Line(number, digest, "short", {}, error=_not_utf8(error))
    except (ValueError, RecursionError) as error:
        return Line(number, digest, "short", {}, error=f"not valid JSON: {error}")
    if isinstance(given, str):
        given = {"prompt": given}
    if not isinstance(given, dict):
        return Line(number, digest, "short", {}, error="a line must be an object or a string")
    if "body" in given or ("custom_id" in given and not given.keys() & {"prompt", "messages", *_FOREIGN}):
        return _openai_line(number, digest, given)
    given = {name: value for name, value in given.items() if value is not None}  # as of a table's empty cells
    own_id = given.pop("id", None)
    salted = _digest(raw, salt) if isinstance(given.get("prompt"), str) else digest
    return Line(number, salted, "short", given, own_id, error=_wrong(given))


def _openai_line(number: int, digest: str, given: Json) -> Line:
    custom_id, body, url = given.get("custom_id"), given.get("body"), given.get("url")
    unknown = sorted(given.keys() - _OPENAI)
    error = None
    if not isinstance(custom_id, str) or not custom_id:
        error = "custom_id must be a string of at least one character"
    elif not isinstance(body, dict):
        error = "body must be an object, the request"
    elif str(given.get("method")).upper() != "POST":
        error = f"method is {given.get('method')!r}; permitted is POST"[:200]
    elif not isinstance(url, str):
        error = f"url is {url!r}; give the endpoint, as /v1/chat/completions"[:200]
    elif unknown:
        error = f"{unknown[0]!r} is no field of a batch line: the request's fields belong into body"[:200]
    fields = body if isinstance(body, dict) else {}
    return Line(number, digest, "openai", fields, custom_id, url if isinstance(url, str) else "", error)


def _wrong(given: Json) -> str | None:
    """Why a line of the short form can't be answered, or None."""
    for name, what in _FOREIGN.items():
        if isinstance(given.get(name), dict) and "prompt" not in given:
            return (
                f"this is {what} batch form; known are a prompt or messages, and OpenAI's, with url and body"
            )
    if ("prompt" in given) == ("messages" in given):
        there = f"; the line has {', '.join(sorted(given)) or 'neither'}"
        return ("give a prompt or messages" + there)[:200]
    prompt = given.get("prompt", "")
    ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not isinstance(prompt, str) and not ids:
        return "prompt must be a string or an array of token ids"
    if "custom_id" in given:
        return "custom_id is a field of OpenAI's batch form, with url and body; here it is called id"
    for name, plain in (("n", 1), ("stream", False)):
        if given.get(name, plain) != plain:
            return f"{name} is {given[name]!r}; a line gets one whole answer: give {plain!r}"[:200]
    return None


def _check_is_jsonl(data: bytes, numbered: Sequence[tuple[int, bytes]], name: str) -> None:
    """Raise ValueError for a file that is one array or object, or that has no line of JSON."""
    if not numbered:
        return
    whole = _json(data)  # of several values, this stops after the first
    if isinstance(whole, list) or (isinstance(whole, dict) and len(numbered) > 1):
        raise ValueError(
            f"{name}: is one JSON value; write one object per line (jq -c '.[]' makes it of an array)"
        )
    if all(_json(raw) is None for _, raw in numbered):
        number, raw = numbered[0]
        start = raw[:40].decode("utf-8", "replace")
        raise ValueError(
            f"{name}: no line is JSON (line {number}: {start!r}): give one JSON object per line, or --lines"
            " if each line is a prompt"
        )


def _json(data: bytes) -> Any:
    """The value, or None if it is not valid JSON (or null)."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start + 1}"


def _digest(raw: bytes, salt: str = "") -> str:
    return f"{zlib.crc32(raw, zlib.crc32(salt.encode())):08x}"


def repeated_ids(lines: Sequence[Line]) -> dict[str, list[int]]:
    """Ids that several lines have, as JSON, with these lines' numbers."""
    numbers: dict[str, list[int]] = {}
    for line in lines:
        if line.id is not None:
            numbers.setdefault(json.dumps(line.id), []).append(line.number)
    return {own_id: found for own_id, found in numbers.items() if len(found) > 1}
