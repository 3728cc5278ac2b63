"""The chat template of a checkpoint folder, from whichever of its files has one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydiffusion.chat.template_source import (
    OUTDATED,
    REPLACE_IT,
    TEMPLATE_KEY,
    check_template,
    find_template,
    is_outdated,
    read_template,
)
from pydiffusion.convert.checkpoint.strict_json import read_json_object
from pydiffusion.convert.gguf.header import Value
from pydiffusion.errors import ConversionError, PyDiffusionError

# The first that has one counts. Tokenizers of transformers read the first two; image models had the last.
TEMPLATE, TOKENIZER_CONFIG, LEGACY = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
#: Folder of further templates, which are chosen by name.
ADDITIONAL = "additional_chat_templates"


def read_chat_template(folder: Path, notes: list[str]) -> str | None:
    """The template of a folder, not compiled; None without one.

    Notes tell which others are left out. Raises ConversionError for a file that is not what it should be.
    """
    found = list(_templates(folder, notes))
    if len(found) > 1 and found[0][1] != found[-1][1]:
        notes.append(f"{found[-1][0]}: left out, its chat template differs from that of {found[0][0]}")
    others = sorted(path.name for path in (folder / ADDITIONAL).glob("*.jinja"))
    if others:
        notes.append(f"{ADDITIONAL}: left out, one chat template is kept: {', '.join(others)}")
    return found[0][1] if found else None


def settle_chat_template(
    folder: Path, metadata: dict[str, Value], given: str | os.PathLike[str] | None, notes: list[str]
) -> None:
    """Put the given template, a file or a built-in one's name, into the metadata, or else check the folder's.

    Notes tell if there is none, or an outdated one. Raises ConversionError, with file and line, for one that
    can't be read or does not compile.
    """
    if given is not None:
        metadata[TEMPLATE_KEY] = given_template(given)
    elif TEMPLATE_KEY in metadata:
        where = next((name for name, _ in _templates(folder, [])), TEMPLATE)
        with _as_conversion_error():
            check_template(metadata[TEMPLATE_KEY].value, str(folder / where))
    else:
        notes.append("no chat template: the file supports completion only; --chat-template gives one")
    note_if_outdated(metadata, notes)


def given_template(given: str | os.PathLike[str]) -> Value:
    """The template in a file, or a built-in one by its name. Raises ConversionError."""
    with _as_conversion_error():
        return Value("str", find_template(given))


@contextlib.contextmanager
def _as_conversion_error() -> Iterator[None]:
    try:
        yield
    except PyDiffusionError as error:
        raise ConversionError(str(error)) from error


def note_if_outdated(metadata: Mapping[str, Value], notes: list[str]) -> None:
    """Add a note if the metadata's template is one that Google has mended."""
    template = metadata.get(TEMPLATE_KEY)
    if template is not None and isinstance(template.value, str) and is_outdated(template.value):
        notes.append(f"the chat template is {OUTDATED}; {REPLACE_IT}")


def _templates(folder: Path, notes: list[str]) -> Iterator[tuple[str, str]]:
    """(file, template): first the one to use, then that of the legacy file if it is another file."""
    if (folder / TEMPLATE).exists():
        with _as_conversion_error():
            template = read_template(folder / TEMPLATE)
        yield TEMPLATE, template
        names = [LEGACY]
    else:
        names = [TOKENIZER_CONFIG, LEGACY]
    for name in names:
        value = read_json_object(folder / name).get("chat_template") if (folder / name).exists() else None
        source = _default(value, name, notes)
        if source is not None:
            yield name, source


def _default(value: Any, where: str, notes: list[str]) -> str | None:
    """A template, or of several, by name or as a list of names and templates, the one named default."""
    if isinstance(value, list):
        value = {one["name"]: one.get("template") for one in value if _is_named(one)}
    if isinstance(value, dict):
        others = sorted(str(name) for name in value if name != "default")
        if others:
            notes.append(f"{where}: left out, only the template named default is kept: {', '.join(others)}")
        value = value.get("default")
    if value is None or isinstance(value, str):
        return value
    raise ConversionError(f"{where}: 'chat_template' should be a string, is {value!r:.60}")


def _is_named(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str)
