"""Fuzz target for adapters: folders of PEFT and MLX, GGUF files, with other names, shapes and settings."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from support import adapter_folders as folders
from support.checkpoint_folders import tensor_bytes
from support.gguf_mutator import RawGguf, read_gguf

from pydiffusion import _native
from pydiffusion.adapters.adapter import Adapter
from pydiffusion.adapters.gguf_file import write_adapter_gguf
from pydiffusion.adapters.loading import load_adapter, matrices_of
from pydiffusion.errors import AdapterError, PyDiffusionError
from pydiffusion.generation.native_model import new_adapter

from . import gguf, mutation
from .files import make_model, refusal
from .folder import json_bytes

_DTYPES = ("BOOL", "U8", "F8_E4M3", "F16", "BF16", "I32", "F32", "F64")
_PARTS = (
    "base_model.model.", "model.", "decoder.", "encoder.language_model.", "language_model.", "layers.0.",
    "layers.1.", "layers.2.", "layers.01.", "layers.-1.", "layers.99999999999.", "self_attn.", "mlp.",
    "experts.", "router.", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "gate_up_proj",
    "base_layer.", "self_conditioning.", "lora_A", "lora_B", "lora_a", "lora_b", ".weight", ".bias",
    ".default", "lora_magnitude_vector", "lora_embedding_A", "modules_to_save.", "vision_tower.",
    "embed_tokens.", "lm_head.", "norm.", "enc.", "dec.", "blk.0.", "blk.7.", "attn_q", "ffn_up_exps",
)  # fmt: skip
_SIZES = (0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 63, 64, 65, 96, 128, 300, 2**31, 2**62)
_SETTINGS = (
    {"r": 8}, {"r": 10**400}, {"lora_alpha": 1e30}, {"lora_alpha": -0.0}, {"use_rslora": True},
    {"rank_pattern": {"q_proj": 4, ".*": 2}}, {"rank_pattern": {"(": 1}}, {"alpha_pattern": {"(a|a)*b": 1}},
    {"alpha_pattern": {"[": 1}}, {"alpha_pattern": {".*.*.*": 1}}, {"alpha_pattern": {"": 0}},
    {"target_parameters": ["gate_up_proj", "down_proj"]}, {"target_parameters": ["experts.down_proj"]},
    {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["x"]}, {"init_lora_weights": "pissa"},
    {"lora_parameters": {"rank": 4, "scale": 1e31}}, {"peft_type": "LOHA"}, {"rank": 4, "peft_type": None},
)  # fmt: skip
# After the file's name: refusals that are about a whole file; in all others a tensor's or key's name follows.
_OF_FILES = re.compile(
    r"not valid JSON: |header: not valid JSON: |header: .* bytes|\d+ bytes belong to no tensor|"
    r"(?:not|should contain) a(?:n object| JSON object| safetensors file| GGUF)|"
    r"changes nothing of the model|has GGUF version \d|is a big-endian GGUF|"
    r"has a (?:key|tensor) (?:count|with an empty name)|the (?:name|key|type) of .* runs past"
)
_TENSOR = re.compile(r"""(?:has duplicate )?tensors? (?P<quote>['"`])(?P<name>.*?)(?P=quote)""")
_ESCAPE = re.compile(r"\\(?:x..|u....|U........|.)")
_KEY = re.compile(r"""(?:the required |has duplicate )?(?:keys? )?['"`][^'"`]|contains '""")

_PROMPT = np.arange(2, 22, dtype=np.int32)  # longer than the window
_CANVAS = np.arange(4, dtype=np.int32)

_Stored = dict[str, tuple[str, list[int], bytes]]


class Target:
    """An adapter loads, is finite, is written as a GGUF that gives the same, and a small model computes with
    it; or a typed error of one line names the file, and the tensor or key.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "adapter"
        mlx = folders.mlx_tensors()
        settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}
        peft = folders.peft_tensors()
        shared = folders.pair(f"{folders.PEFT}layers.1.self_attn.q_proj", 64, 64)
        self._folders = [
            (_stored(peft), folders.peft_config(), "adapter_model.safetensors"),
            (_stored(shared), folders.peft_config(), "adapter_model.safetensors"),
            (_stored(mlx), settings, "adapters.safetensors"),
        ]
        path = folder / "good.gguf"
        adapter = load_adapter(folders.write_folder(self._folder, peft), folders.MODEL)
        write_adapter_gguf(adapter, path, matrices_of(folders.MODEL), type="f32")
        self._gguf = read_gguf(path)
        self._output = folder / "written.gguf"
        self._model = _native.Model(str(make_model(folder)), n_threads=1, kv_type="f32")
        assert self._model.file.metadata.items() >= folders.MODEL.items()
        self._session = _native.Session(self._model, 64)
        for stored, config, name in self._folders:
            files = {name: _safetensors(stored), "adapter_config.json": json_bytes(config)}
            assert self.one((files, True)) == "computed"
        assert self.one(({"a.gguf": self._gguf.to_bytes()}, True)) == "computed"

    def close(self) -> None:
        pass

    def make(self, draw: random.Random) -> tuple[dict[str, bytes], bool]:
        """Create an input: files by name, and whether the model is known."""
        known = draw.random() < 0.8
        if draw.random() < 0.4:
            return {"a.gguf": self._make_gguf(draw)}, known
        stored, config, name = draw.choice(self._folders)
        stored, config = dict(stored), dict(config)
        for _ in range(mutation.n_changes(draw)):
            if stored and draw.random() < 0.7:
                _change_tensor(draw, stored)
            elif draw.random() < 0.6:
                config |= draw.choice(_SETTINGS)
            else:
                with contextlib.suppress(RecursionError):  # already nested too deeply to be copied
                    changed = mutation.mutated(draw, config, folders.peft_config())
                    config = changed if isinstance(changed, dict) else {"": changed}
        files = {name: _safetensors(stored), "adapter_config.json": json_bytes(config)}
        if draw.random() < 0.15:
            damaged = draw.choice(list(files))
            files[damaged] = mutation.damaged(draw, files[damaged])
        return files, known

    def _make_gguf(self, draw: random.Random) -> bytes:
        file: RawGguf = self._gguf.copy()
        for _ in range(mutation.n_changes(draw)):
            kind = draw.randrange(8)
            if kind < 2:
                gguf.change_pair(draw, file, lambda key: True)
            elif kind < 5 and file.tensors:
                gguf.change_tensor(draw, file)
            elif kind < 7 and file.tensors:
                tensor = draw.choice(file.tensors)
                tensor.name = _other_name(draw, tensor.name.decode("utf-8", "replace")).encode(
                    "utf-8", "replace"
                )
            elif kind == 7 and draw.random() < 0.3:
                gguf.change_frame(draw, file)
        with contextlib.suppress(struct.error):  # a number that the format can't hold
            return file.to_bytes()
        return b"GGUF"

    def one(self, given: tuple[dict[str, bytes], bool]) -> str:
        """Load the files, read all of them, write them again, compute with them."""
        files, known = given
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        for name, data in files.items():
            (self._folder / name).write_bytes(data)
        path = self._folder / "a.gguf" if "a.gguf" in files else self._folder
        model = folders.MODEL if known else None
        with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
            warnings.simplefilter("error")
            try:
                adapter = load_adapter(path, model)
            except AdapterError as error:
                text = str(error)
                assert len(text) < 1500 and _says_what(text, self._folder, files), text
                return refusal(error)
            n_targets = 0
            for tensor, _, a, b in adapter.scaled():
                assert a.shape[-2] == b.shape[-1] and a.size and b.size, tensor
                assert np.isfinite(a).all() and np.isfinite(b).all(), tensor
                n_targets += 1
            assert n_targets == len(adapter.factors) > 0
            write_adapter_gguf(adapter, self._output, matrices_of(model))
            again = load_adapter(self._output, model)
            assert again.factors.keys() == adapter.factors.keys()
        return self._compute(adapter)

    def _compute(self, adapter: Adapter) -> str:
        """Read a prompt and denoise with the adapter: what comes of it is finite, or refused."""
        try:
            native = new_adapter(self._model, adapter)
        except AdapterError as error:
            assert any(target.tensor in str(error) for target in adapter.factors), error
            return "misfit"
        self._session.set_adapters([(native, 1.0)])
        try:
            self._session.truncate(0)
            self._session.encode(_PROMPT)
            found = self._session.denoise(_CANVAS, None)
            found = self._session.denoise(_CANVAS, found)
            assert np.isfinite(found).all()
        except PyDiffusionError as error:
            assert "adapter" in str(error), error  # whose scale or values are too large
            return refusal(error)
        finally:
            self._session.set_adapters([])
        return "computed"


def _says_what(text: str, folder: Path, files: dict[str, bytes]) -> bool:
    """Whether a refusal names a file of the folder, or it, and what in it is wrong."""
    path, colon, rest = text.partition(": ")
    if not colon or not (path == str(folder) or Path(path).name in files):
        return False
    rest = rest.removeprefix("lora_parameters: ")
    if found := _TENSOR.match(rest):
        parts = re.findall(r"\w+", _ESCAPE.sub(" ", found["name"]))
        longest = max(parts, key=len, default="").encode()
        return any(longest in data for data in files.values())
    return bool(_OF_FILES.match(rest) or _KEY.match(rest))


def _stored(tensors: dict[str, np.ndarray]) -> _Stored:
    return {name: ("F32", list(a.shape), tensor_bytes(a, "F32")) for name, a in tensors.items()}


def _safetensors(stored: _Stored) -> bytes:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, data) in stored.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in stored.values())


def _change_tensor(draw: random.Random, stored: _Stored) -> None:
    name = draw.choice(list(stored))
    dtype, shape, data = stored[name]
    action = draw.randrange(8)
    if action == 0:
        del stored[name]
    elif action in (1, 2):
        stored[_other_name(draw, name)] = stored[name] if draw.random() < 0.4 else stored.pop(name)
    elif action == 3:
        stored[name] = draw.choice(_DTYPES), shape, data
    elif action == 4:
        stored[name] = _of_shape(_other_shape(draw, shape), data)
    elif action == 5:
        other = draw.choice(list(stored))
        stored[name], stored[other] = stored[other], stored[name]
    elif action == 6:
        stored[name] = dtype, shape, _other_values(draw, data)
    else:
        stored[name] = draw.choice(("F16", "BF16")), shape, _other_values(draw, data[: len(data) // 2])


def _of_shape(shape: list[int], data: bytes) -> tuple[str, list[int], bytes]:
    """F32 of a shape; with as much data as it needs, unless it is huge."""
    size = 4 * int(np.prod(shape, dtype=object))
    return "F32", shape, (data * (size // max(1, len(data)) + 1))[:size] if size < 1 << 20 else data


def _other_shape(draw: random.Random, shape: list[int]) -> list[int]:
    shape = list(shape)
    kind = draw.randrange(4)
    if kind == 0 or not shape:
        shape.insert(draw.randrange(len(shape) + 1), draw.choice((1, 2, 4)))
    elif kind == 1:
        shape.reverse()
    elif kind == 2:
        del shape[draw.randrange(len(shape))]
    else:
        shape[draw.randrange(len(shape))] = draw.choice(_SIZES)
    return shape


def _other_values(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 3, 50))):
        at = draw.randrange(max(1, len(changed) // 4)) * 4
        odd = draw.choice((0x7FC00000, 0x7F800000, 0xFF7FFFFF, 0x7F7FFFFF, 1, draw.getrandbits(32)))
        changed[at : at + 4] = struct.pack("<I", odd)[: max(0, len(changed) - at)]
    return bytes(changed) if draw.random() < 0.8 else bytes(len(data))


def _other_name(draw: random.Random, name: str) -> str:
    """A part of the name replaced by another one, added, removed, or damaged."""
    kind = draw.randrange(4)
    if kind == 0:
        return name.replace(draw.choice(name.split(".")), draw.choice(_PARTS).strip("."), 1)
    if kind == 1:
        at = draw.randrange(len(name) + 1)
        return name[:at] + draw.choice(_PARTS) + name[at:]
    if kind == 2:
        return name.replace(draw.choice(_PARTS), draw.choice(_PARTS))
    return mutation.damaged(draw, name.encode()).decode("utf-8", "replace")
