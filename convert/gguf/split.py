"""Layout of a GGUF file, or of the parts of a split one.

Parts are named and numbered as in llama.cpp: ``NAME-00001-of-00003.gguf``, with the whole metadata in the
first part and the keys ``split.no``, ``split.count`` and ``split.tensors.count`` in each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydiffusion.convert.gguf.header import Placed, Value, align, pack_header
from pydiffusion.errors import ConversionError

SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
_MAX_PARTS = 65535  # the keys are u16
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_INFO_BYTES = 8 + 4 + 4 * 8 + 4 + 8  # maximum size of a tensor info, without its name


@dataclass(frozen=True)
class Part:
    """A file to write: header bytes and tensors; ``first`` is the index of its first tensor."""

    path: Path
    metadata: Mapping[str, Value]
    header: bytes
    tensors: tuple[Placed, ...]
    first: int
    n_bytes: int


def plan_parts(
    target: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]],
    alignment: int,
    max_size: int | None = None,
) -> list[Part]:
    """Plan one part, or several of at most ``max_size`` bytes, unless a single tensor is larger.

    ``tensors``: (name, type, shape, bytes). Raises ConversionError for too many parts, and as
    ``pack_header``.
    """
    groups = _groups(metadata, tensors, alignment, max_size)
    if len(groups) > _MAX_PARTS:
        raise ConversionError(f"{target}: {len(groups)} parts are too many; choose a larger size for them")
    parts, first = [], 0
    for index, group in enumerate(groups):
        path, keys = target, dict(metadata) if index == 0 else {}
        if len(groups) > 1:
            path = part_path(target, index, len(groups))
            keys[SPLIT_NO] = Value("u16", index)
            keys[SPLIT_COUNT] = Value("u16", len(groups))
            keys[SPLIT_TENSORS] = Value("i32", len(tensors))
            if index and "general.alignment" in metadata:  # readers need it in each part
                keys["general.alignment"] = metadata["general.alignment"]
        placed, offset = [], 0
        for name, type_name, shape, size in group:
            placed.append(Placed(name, type_name, shape, offset, size))
            offset = align(offset + size, alignment)
        header = pack_header(keys, placed, alignment)
        parts.append(Part(path, keys, header, tuple(placed), first, len(header) + offset))
        first += len(group)
    return parts


_Tensor = tuple[str, str, tuple[int, ...], int]


def _groups(
    metadata: Mapping[str, Value], tensors: Sequence[_Tensor], alignment: int, max_size: int | None
) -> list[list[_Tensor]]:
    if max_size is None:
        return [list(tensors)]
    groups: list[list[_Tensor]] = [[]]
    base = len(pack_header(metadata, [], 1)) + 256  # plus the split keys
    filled = base
    for tensor in tensors:
        size = align(tensor[3], alignment) + _INFO_BYTES + len(tensor[0].encode("utf-8", "surrogateescape"))
        if groups[-1] and filled + size + alignment > max_size:
            groups.append([])
            filled = 256
        groups[-1].append(tensor)
        filled += size
    return groups


def part_path(target: Path, index: int, count: int) -> Path:
    """Path of a part; ``target``'s suffix ``.gguf`` and part number, if any, are stripped."""
    if target.is_dir() or not target.name:
        raise ConversionError(f"{target}: is a folder; give the name of the file to write, NAME.gguf")
    match = _NAME.fullmatch(target.name)
    stem = match[1] if match else target.name.removesuffix(".gguf")
    return target.with_name(f"{stem}-{index + 1:05d}-of-{count:05d}.gguf")


def check_split_size(size: int | None) -> None:
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"split_max_size is {size!r}; give a number of bytes, or None for one file")
