"""``pydiffusion inspect``: show a GGUF's metadata and tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pydiffusion._util.sizes import count, format_size

from . import _open
from ._adapter_facts import adapter_counts, adapter_facts, adapter_lines
from ._image_facts import image_facts, image_lines
from ._text import one_line, printable

if TYPE_CHECKING:
    from pydiffusion.adapters.adapter import Adapter
    from pydiffusion.convert.gguf.reader import Parts
    from pydiffusion.tokenizer.end_tokens import EndToken

_TOKENS = "tokenizer.ggml.tokens"
_LONG_ARRAY = 64
_LONG_TEXT = 100


def command(
    file: Annotated[
        Path, typer.Argument(help="Path of the GGUF file; of a split one, any part.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    arrays: Annotated[
        bool, typer.Option("--arrays", help="Show long arrays and texts (token lists, templates) in full.")
    ] = False,
) -> None:
    """Show metadata and tensors of a GGUF file of any architecture."""
    from pydiffusion._util.files import check_is_gguf
    from pydiffusion.convert import open_parts

    file = _open.model_file(file)
    check_is_gguf(file)
    gguf = open_parts(file)
    if as_json:
        print(json.dumps(_as_dict(gguf, tensors, arrays), allow_nan=False))
    else:
        _print(gguf, tensors, arrays)


def _as_dict(gguf: Parts, with_tensors: bool, whole: bool) -> dict[str, Any]:
    summary = {
        "path": gguf.reader.path,
        "version": gguf.reader.version,
        "n_bytes": gguf.reader.n_bytes,
        "alignment": gguf.reader.alignment,
        "data_offset": gguf.reader.data_offset,
        "parts": [str(path) for path in gguf.paths],
        "n_tensors": len(gguf.tensors),
        "n_weights": sum(math.prod(tensor.shape) for tensor in gguf.tensors),
        "types": _types(gguf),
        "metadata": {
            key: _json_value(value, gguf.metadata_types[key], whole) for key, value in gguf.metadata.items()
        },
    }
    if isinstance(gguf.metadata.get(_TOKENS), list):
        found, problem = _end_tokens(gguf)
        summary["end_tokens"] = [
            {"id": end.token_id, "text": end.text, "reasons": list(end.reasons)} for end in found
        ]
        if problem is not None:
            summary["end_tokens_error"] = problem
    images = image_facts(gguf)
    if images:
        summary["images"] = {key: _json_value(value, "", whole) for key, value in images.items()}
    adapter, error = _adapter(gguf)
    if adapter is not None:
        summary["adapter"] = adapter_facts(adapter, with_tensors)
    elif error:
        summary["adapter_error"] = error
    if with_tensors:
        summary["tensors"] = [
            {"name": t.name, "type": t.type, "shape": list(t.shape), "offset": t.offset, "n_bytes": t.n_bytes}
            for t in gguf.tensors
        ]
    return summary


def _end_tokens(gguf: Parts) -> tuple[Sequence[EndToken], str | None]:
    """The end tokens, or the error that prevents finding them."""
    from pydiffusion import ModelFormatError
    from pydiffusion.tokenizer.end_tokens import find_end_tokens

    try:
        return find_end_tokens(gguf.metadata, len(gguf.metadata[_TOKENS])), None
    except ModelFormatError as error:
        return (), str(error)


def _adapter(gguf: Parts) -> tuple[Adapter | None, str]:
    """The adapter that a file is, or the error that prevents reading it; neither for another kind of file."""
    from pydiffusion import AdapterError
    from pydiffusion.adapters.loading import load_adapter

    if gguf.metadata.get("general.type") != "adapter":
        return None, ""
    try:
        return load_adapter(str(gguf.reader.path), None), ""
    except AdapterError as error:
        return None, str(error)


def _types(gguf: Parts) -> dict[str, dict[str, int]]:
    types: dict[str, dict[str, int]] = {}
    for tensor in gguf.tensors:
        entry = types.setdefault(tensor.type, {"n_tensors": 0, "n_bytes": 0})
        entry["n_tensors"] += 1
        entry["n_bytes"] += tensor.n_bytes
    return types


def _json_value(value: Any, type_name: str, whole: bool) -> Any:
    if isinstance(value, list):
        if len(value) > _LONG_ARRAY and not whole:
            return {"type": type_name, "length": len(value)}
        return [_json_value(entry, type_name, whole) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN and infinity
    return value


def _print(gguf: Parts, with_tensors: bool, whole: bool) -> None:
    n_weights = sum(math.prod(tensor.shape) for tensor in gguf.tensors)
    bits = 8 * sum(tensor.n_bytes for tensor in gguf.tensors) / n_weights if n_weights else 0.0
    print(one_line(str(gguf.reader.path)))
    if len(gguf.paths) > 1:
        print(f"the first of {len(gguf.paths)} parts, shown together")
    print(
        f"GGUF version {gguf.reader.version}, {format_size(gguf.reader.n_bytes)},"
        f" {len(gguf.tensors)} tensors, {count(n_weights)} weights, {bits:.2f} bits per weight"
    )
    for name, entry in _types(gguf).items():
        print(f"  {name:8} {entry['n_tensors']:5} tensors {format_size(entry['n_bytes']):>9}")
    print("\nMetadata")
    types = gguf.metadata_types
    for key, value in gguf.metadata.items():
        print(f"  {one_line(key)} ({types[key]}): {_shown(value, whole)}")
    if isinstance(gguf.metadata.get(_TOKENS), list):
        _print_end_tokens(gguf)
    images = image_lines(gguf)
    if images:
        print("\nImages")
        for line in images:
            print(f"  {one_line(line)}")
    adapter, error = _adapter(gguf)
    if adapter is not None:
        print(f"\nAdapter: {adapter_counts(adapter)}")
        for line in adapter_lines(adapter):
            print(f"  {printable(line)}")
    elif error:
        print(f"\nAdapter: {one_line(error)}")
    if with_tensors:
        print("\nTensors (shape slowest first)")
        for tensor in gguf.tensors:
            name, shape = one_line(str(tensor.name)), " x ".join(map(str, tensor.shape))
            print(f"  {name:44} {tensor.type:8} {shape:20} {format_size(tensor.n_bytes):>9}")


def _print_end_tokens(gguf: Parts) -> None:
    found, error = _end_tokens(gguf)
    print("\nTokens that end a text, and how they are known")
    for end in found:
        reasons = ", ".join(f"by {reason}" for reason in end.reasons)
        print(f"  {end.token_id} {one_line(repr(end.text))}: {reasons}")
    if not found:
        print(f"  none: {'the file names none' if error is None else one_line(error)}")


def _shown(value: Any, whole: bool) -> str:
    if isinstance(value, list):
        shown = value if whole or len(value) <= 2 * 8 else value[:8]
        more = "" if len(shown) == len(value) else f", ... ({len(value)})"
        return "[" + ", ".join(_shown(entry, whole) for entry in shown) + more + "]"
    if isinstance(value, str):
        text = one_line(repr(value))
        return (
            text if whole or len(text) <= _LONG_TEXT else f"{text[:_LONG_TEXT]}... ({len(value)} characters)"
        )
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
