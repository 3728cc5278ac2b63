"""Find the one set of safetensors files of a checkpoint folder, or explain why there is none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydiffusion._util.file_kinds import UNFINISHED, unfinished_download
from pydiffusion.convert.checkpoint.strict_json import read_json_object
from pydiffusion.errors import ConversionError

_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5,6})-of-(\d{5,6})\.safetensors")
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_DEPTH, _MAX_LISTED = 3, 10_000  # of the search for a checkpoint below a folder

_ORIGINAL = "convert from the original checkpoint"
_RESAVE = "load it with transformers and save it with save_pretrained, which writes safetensors"
# Weights of other kinds, by the endings of their names, and what to do with them.
_OTHER_WEIGHTS = (
    ((".gguf",), "GGUF", "a GGUF is run as it is, or gets other types by `pydiffusion quantize IN OUT`"),
    ((".bin", ".pt", ".pth", ".ckpt"), "a pickle of PyTorch, not read since it can run code", _RESAVE),
    ((".h5", ".msgpack", ".keras"), "TensorFlow's or Flax's format", _RESAVE),
    ((".distcp",), "PyTorch's distributed format", "consolidate it, and save it with save_pretrained"),
    ((".npz",), "numpy's format (of MLX)", _ORIGINAL),
    ((".onnx", ".onnx_data"), "ONNX", _ORIGINAL),
    ((".tflite", ".task", ".litertlm", ".mlpackage"), "a format for phones", _ORIGINAL),
)  # fmt: skip


@dataclass(frozen=True)
class WeightFiles:
    """A set of safetensors files. ``index``: the file that lists them; ``shard_of``: its tensor name -> file
    name, empty without an index.
    """

    paths: tuple[Path, ...]
    index: Path | None
    shard_of: dict[str, str]


def find_weights(folder: Path) -> WeightFiles:
    """Find the one set of weights in a folder: those that an index lists, shards without one, or a file.

    Raises ConversionError, naming the files: for two sets, a missing shard, or none.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if _ADAPTER_WEIGHTS in names:
        raise ConversionError(_explain_adapter_here(folder, names))
    indexes = [name for name in names if name.endswith(_INDEX)]
    if len(indexes) > 1:
        raise ConversionError(_two_sets(folder, indexes[0], indexes[1]))
    shard_of = _read_index(folder / indexes[0]) if indexes else {}
    sets = _sets([name for name in names if name.endswith(".safetensors")])
    if indexes:
        listed = sorted(set(shard_of.values()))
        strange = [name for some in sets for name in some if name not in listed]
        if strange and not set(listed) & set(names):
            raise ConversionError(
                f"{folder / indexes[0]}: nothing that it lists is there ({listed[0]}), but {strange[0]} is: "
                "remove the index if it is stale, or download what it lists"
            )
        if strange:
            raise ConversionError(_two_sets(folder, indexes[0], strange[0]))
        _require_present(folder, listed, f"{indexes[0]} lists it")
        return WeightFiles(tuple(folder / name for name in listed), folder / indexes[0], shard_of)
    if not sets:
        raise ConversionError(explain_without_weights(folder))
    if len(sets) > 1:
        raise ConversionError(_two_sets(folder, sets[0][0], sets[1][0]))
    _require_present(folder, _whole_set(sets[0]), f"{sets[0][0]} is of the same set")
    return WeightFiles(tuple(folder / name for name in sets[0]), None, {})


def _read_index(path: Path) -> dict[str, str]:
    """``weight_map`` of an index: tensor name -> name of a file in its folder."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{path.name}: the required object 'weight_map' is missing or empty")
    for name, shard in weight_map.items():
        is_name = isinstance(shard, str) and shard.isprintable() and Path(shard).name == shard
        if not is_name or not shard.endswith(".safetensors"):
            raise ConversionError(
                f"{path.name}: tensor {name!r} is stored in {shard!r:.80}, which is not a file of this folder"
            )
    return weight_map


def _sets(names: list[str]) -> list[list[str]]:
    """Group file names: the shards of each set together, every other file a set of its own."""
    sets: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        sets.setdefault((match[1], match[3]) if match else (name,), []).append(name)
    return list(sets.values())


def _whole_set(shards: list[str]) -> list[str]:
    """Names of all shards of the set that these belong to, numbered from 1, or from 0 if that one exists."""
    match = _SHARD.fullmatch(shards[0])
    if match is None:
        return shards
    n_shards, width = int(match[3]), len(match[2])
    first = 0 if int(match[2]) == 0 else 1
    if n_shards > _MAX_LISTED:
        return [f"{match[1]}-{first:0{width}d}-of-{match[3]}.safetensors"]
    return [f"{match[1]}-{i:0{width}d}-of-{match[3]}.safetensors" for i in range(first, first + n_shards)]


def _require_present(folder: Path, names: list[str], why: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    partial = unfinished_download(folder / missing[0])
    there = f"only {partial.name} is there, an unfinished download" if partial else why
    raise ConversionError(f"{folder / missing[0]}{more}: is missing; {there}: download it")


def _two_sets(folder: Path, one: str, other: str) -> str:
    return (
        f"{folder}: has two sets of weights, {one} and {other}: keep the one that you want, and move the "
        "other to another folder"
    )


def explain_without_config(folder: Path) -> str:
    """Why a folder without ``config.json`` can't be converted, and what to do."""
    if (folder / _ADAPTER_CONFIG).exists() or (folder / _ADAPTER_WEIGHTS).exists():
        return _explain_adapter(folder)
    below = next(_checkpoints_below(folder), None)
    if below is not None:
        return f"{folder}: has no config.json; {below.relative_to(folder)} in it has: give {below}"
    other = other_weights(path.name for path in folder.iterdir())
    more = f"; {other}" if other else ": give a checkpoint folder as save_pretrained writes it"
    return f"{folder}: has no config.json{more}"


def explain_without_weights(folder: Path) -> str:
    """Why a folder without safetensors files has no weights to convert, and what to do."""
    if (folder / _ADAPTER_CONFIG).exists():
        return _explain_adapter(folder)
    unfinished = [path.name for path in sorted(folder.iterdir()) if path.name.endswith(UNFINISHED)]
    if unfinished:
        return f"{folder}: has no weights yet, but {unfinished[0]}, an unfinished download: finish it"
    other = other_weights(path.name for path in folder.iterdir())
    more = f"; {other}" if other else ": download the weights too (model.safetensors, or its shards)"
    return f"{folder}: has no safetensors file{more}"


def _explain_adapter(folder: Path) -> str:
    return (
        f"{folder}: holds an adapter (LoRA), not a model: give it to the model that it is for, with --lora "
        f"{folder}, or merge it into that one's checkpoint: pydiffusion convert CHECKPOINT --lora {folder}"
    )


def _explain_adapter_here(folder: Path, names: list[str]) -> str:
    """Of a folder with an adapter's weights; beside those of a model, transformers would apply them."""
    others = [name for name in names if name.endswith(".safetensors") and name != _ADAPTER_WEIGHTS]
    if not others:
        return _explain_adapter(folder)
    return (
        f"{folder / _ADAPTER_WEIGHTS}: is an adapter (LoRA) beside the model's {others[0]}: move it and "
        f"{_ADAPTER_CONFIG} to a folder of their own; --lora FOLDER then merges it into the model"
    )


def other_weights(names: Iterable[str]) -> str:
    """Name a file of weights in another format, and say what to do with it; empty if there is none."""
    for name in sorted(names):
        for endings, format_name, advice in _OTHER_WEIGHTS:
            if name.endswith(endings):
                return f"{name} is {format_name}: {advice}"
    return ""


def _checkpoints_below(folder: Path) -> Iterator[Path]:
    """Folders below, such as snapshots/REVISION of a hub cache, that have a ``config.json`` and weights."""
    level = [folder]
    for _ in range(_MAX_DEPTH):
        below = [path for parent in level for path in sorted(parent.iterdir()) if path.is_dir()]
        level = below[:_MAX_LISTED]
        for path in level:
            if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
                yield path


def unread_weights(folder: Path) -> list[str]:
    """Names of files beside the safetensors that hold weights in PyTorch's pickle format."""
    pickles = (path.name for path in sorted(folder.iterdir()) if path.suffix == ".bin")
    return [name for name in pickles if name.startswith("pytorch_model")]
