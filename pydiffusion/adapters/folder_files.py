"""Which files of a folder hold an adapter, and their tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from pydiffusion._util.file_kinds import unfinished_download
from pydiffusion.adapters.stored import Stored, stamp
from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint
from pydiffusion.convert.checkpoint.weight_files import WeightFiles
from pydiffusion.errors import AdapterError

CONFIG = "adapter_config.json"
#: Of PEFT, and of MLX.
WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")
_SHARD = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.safetensors")
_PICKLE = re.compile(r".*\.(?:bin|pt|pth|ckpt)")
_MAX_SHARDS = 1000
_RESAVE = (
    "a pickle of PyTorch, not read since it can run code: load it with PEFT and save it with "
    "save_pretrained, which writes adapter_model.safetensors"
)


def open_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's adapter by name. Raises AdapterError; ConversionError for a broken file."""
    found = WeightFiles(tuple(folder / name for name in _weights(folder)), None, {})
    with Checkpoint(folder, found) as checkpoint:
        stamps = {path: stamp(path) for path in checkpoint.files}
        return {
            name: Stored(
                name,
                tensor.file,
                tensor.offset,
                tensor.n_bytes,
                tensor.dtype,
                tensor.shape,
                stamps[tensor.file],
            )
            for name, tensor in checkpoint.tensors.items()
        }


def _weights(folder: Path) -> Sequence[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    whole = [name for name in WEIGHTS if name in names]
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if len(whole) > 1 or (whole and shards):
        raise AdapterError(
            f"{folder}: has two adapters, {whole[0]} and {(whole[1:] + shards)[0]}: keep the one you want"
        )
    return whole or _whole_set(folder, shards) or _without_weights(folder, names)


def _whole_set(folder: Path, shards: Sequence[str]) -> list[str]:
    """The shards, all of one set. Raises AdapterError for a missing one."""
    counts = {match[2] for match in map(_SHARD.fullmatch, shards) if match}
    if not counts:
        return []
    count = int(min(counts))
    wanted = [f"adapter_model-{i:05}-of-{min(counts)}.safetensors" for i in range(1, count + 1)][:_MAX_SHARDS]
    missing = [name for name in wanted if name not in shards]
    if len(counts) > 1 or missing or len(wanted) != len(shards):
        what = f"{missing[0]} is missing" if missing else "there are shards of two sets"
        raise AdapterError(f"{folder}: {what}: download the adapter again")
    return wanted


def _without_weights(folder: Path, names: Sequence[str]) -> Sequence[str]:
    pickles = [name for name in names if _PICKLE.fullmatch(name) and name.startswith("adapter")]
    if pickles:
        raise AdapterError(f"{folder / pickles[0]}: is {_RESAVE}")
    unfinished = unfinished_download(folder / WEIGHTS[0])
    if unfinished is not None:
        raise AdapterError(f"{folder}: only {unfinished.name} is there, an unfinished download: finish it")
    raise AdapterError(f"{folder}: has {CONFIG} but no {WEIGHTS[0]}: download the weights too")


def explain_without_config(folder: Path) -> str:
    """Why a folder without ``adapter_config.json`` is no adapter, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    found = (path for pattern in (f"*/{CONFIG}", f"*/*/{CONFIG}") for path in folder.glob(pattern))
    below = sorted(path.parent.relative_to(folder).as_posix() for path in islice(found, 100))
    if below:
        return f"{folder}: has no {CONFIG}, but {', '.join(below)[:200]} in it has: give {folder / below[0]}"
    if any(name in WEIGHTS for name in names):
        return f"{folder}: has no {CONFIG}, which says the scale of its weights: download or save it too"
    if {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"} & set(names):
        return f"{folder}: is an Orbax checkpoint of JAX: save the adapter in PEFT's format"
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"{folder}: is a folder with {', '.join(gguf)[:200]}: give the file"
    if "config.json" in names:
        return (
            f"{folder}: is a checkpoint, not an adapter (no {CONFIG}): convert it with `pydiffusion convert`"
        )
    return f"{folder}: has no {CONFIG}: an adapter is a folder as PEFT's save_pretrained writes it, or a GGUF"
