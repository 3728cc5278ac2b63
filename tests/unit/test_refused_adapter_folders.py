"""Adapter folders that are refused, and in which words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import adapter_folders as folders
from support.adapter_folders import FF, MODEL, PEFT, XF, D, Tensors, pair, peft_config, refused

from pydiffusion import AdapterError, InsufficientMemoryError
from pydiffusion.adapters.loading import load_adapter

LAYER = f"{PEFT}decoder.layers.0."

MLX = {
    "fine_tune_type": "lora",
    "num_layers": -1,
    "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0},
}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"fine_tune_type": "dora"}, ("'fine_tune_type'", "dora")),
        ({"fine_tune_type": "full"}, ("'fine_tune_type'", "full")),
        ({"lora_parameters": {"rank": 5, "scale": 1.0}}, ("q_proj.lora_a", "rank 4", "5")),
        ({"lora_parameters": {"rank": 4}}, ("lora_parameters", "'scale'")),
    ],
)
def test_mlx_refused(config: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    folders.write_folder(tmp_path, folders.mlx_tensors(), MLX | config, name="adapters.safetensors")
    refused(tmp_path, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"peft_type": "IA3"}, ("'peft_type'", "IA3")),
        ({"peft_type": None}, ("'peft_type'", "missing")),
        ({"r": None}, ("'r'", "missing")),
        ({"r": 0}, ("'r'",)),
        ({"r": 2.0}, ("'r'", "integer")),
        ({"r": 8}, ("4 rows", "is 8")),
        ({"lora_alpha": None}, ("'lora_alpha'", "missing")),
        ({"lora_alpha": "8"}, ("'lora_alpha'", "number")),
        ({"lora_alpha": 1e300}, ("'lora_alpha'",)),
        ({"use_dora": True}, ("'use_dora'", "DoRA")),
        ({"use_rslora": "yes"}, ("'use_rslora'", "true or false")),
        ({"bias": "all"}, ("'bias'", "all")),
        ({"lora_bias": True}, ("'lora_bias'",)),
        ({"modules_to_save": ["lm_head"]}, ("'modules_to_save'",)),
        ({"trainable_token_indices": [1]}, ("'trainable_token_indices'",)),
        ({"layer_replication": [[0, 1]]}, ("'layer_replication'",)),
        ({"alora_invocation_tokens": [5]}, ("'alora_invocation_tokens'",)),
        ({"fan_in_fan_out": True}, ("'fan_in_fan_out'",)),
        ({"use_bdlora": {"nblocks": 2}}, ("'use_bdlora'",)),
        ({"init_lora_weights": "pissa_niter_4"}, ("'init_lora_weights'", "path_initial_model")),
        ({"init_lora_weights": "olora"}, ("'init_lora_weights'", "path_initial_model")),
        ({"init_lora_weights": "loftq"}, ("'init_lora_weights'", "train without it")),
        ({"init_lora_weights": "new"}, ("'init_lora_weights'", "not known")),
        ({"use_something_new": True}, ("'use_something_new'", "not known")),
        ({"new_config": {"a": 1}}, ("'new_config'", "not known")),
        ({"rank_pattern": {"q_proj": 3}}, ("q_proj.lora_A.weight", "4 rows", "is 3")),
        ({"rank_pattern": {"q_proj": "4"}}, ("'rank_pattern'", "q_proj")),
        ({"rank_pattern": ["q_proj"]}, ("'rank_pattern'", "object")),
        ({"rank_pattern": {"(": 4}}, ("'rank_pattern'", "regular expression")),
        ({"alpha_pattern": {"(a+)+": 4}}, ("'alpha_pattern'", "very long")),
        ({"alpha_pattern": {".*.*.*.*.*x": 4}}, ("'alpha_pattern'", "very long")),
        ({"alpha_pattern": {"(.|.)" * 30: 4}}, ("'alpha_pattern'", "very long")),
        ({"target_parameters": "experts"}, ("'target_parameters'", "list")),
    ],
)
def test_configs_refused(changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    tensors = pair(f"{PEFT}decoder.layers.0.self_attn.q_proj", 32, D)
    folders.write_folder(tmp_path, tensors, peft_config(**changes))
    refused(tmp_path, "adapter_config.json", *parts)


def changed(**tensors: np.ndarray | None) -> Callable[[Tensors], Tensors]:
    """Replace or remove tensors of ``q_proj``: A, B."""

    def change(base: Tensors) -> Tensors:
        names = {part: f"{LAYER}self_attn.q_proj.lora_{part}.weight" for part in "AB"}
        kept = {key: values for key, values in base.items() if key not in [names[part] for part in tensors]}
        return kept | {names[part]: values for part, values in tensors.items() if values is not None}

    return change


def added(key: str, *shape: int, value: float = 1.0) -> Callable[[Tensors], Tensors]:
    return lambda base: base | {key: np.full(shape, value, np.float32)}


def both(module: str, n_out: int, n_in: int) -> Callable[[Tensors], Tensors]:
    return lambda base: base | pair(module, n_out, n_in)


NAN = np.full((4, D), np.nan, np.float32)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (changed(B=None), ("q_proj.lora_A.weight", "no lora_B")),
        (changed(A=None), ("q_proj.lora_B.weight", "no lora_A")),
        (changed(A=NAN), ("q_proj.lora_A.weight", "not finite")),
        (changed(B=np.full((32, 4), np.inf, np.float32)), ("q_proj.lora_B.weight", "not finite")),
        (changed(B=np.full((32, 4), 3e38, np.float32)), ("q_proj.lora_B.weight", "float32")),
        (changed(A=np.ones((4, D + 1), np.float32)), ("q_proj.lora_A.weight", "32 x 65", "32 x 64")),
        (changed(B=np.ones((31, 4), np.float32)), ("q_proj", "31 x 64", "another size")),
        (changed(B=np.ones((32, 3), np.float32)), ("q_proj", "ranks differ")),
        (changed(A=np.ones((D,), np.float32)), ("q_proj.lora_A.weight", "gather the shards")),
        (changed(A=np.ones((0, D), np.float32)), ("q_proj.lora_A.weight", "gather the shards")),
        (changed(A=np.ones((1, 4, D), np.float32)), ("q_proj.lora_A.weight", "[1, 4, 64]")),
        (both(f"{PEFT}decoder.layers.1.self_attn.v_proj", 32, D), ("v_proj", "layer 1", "no v_proj")),
        (both(f"{PEFT}decoder.layers.2.self_attn.q_proj", 32, D), ("layers.2", "2 layers")),
        (both(f"{PEFT}layers.0.self_attn.q_proj", 32, D), ("layers.0.self_attn.q_proj", "both modes")),
        (both(f"{PEFT}encoder.self_conditioning.gate_proj", FF, D), ("self_conditioning",)),
        (both(f"{PEFT}encoder.vision_tower.layers.0.q_proj", 8, 8), ("vision_tower", "the vision tower")),
        (both(f"{PEFT}encoder.embed_vision.embedding_projection", D, 8), ("projector of images",)),
        (both("base_model.model.lm_head", 512, D), ("lm_head", "the output head")),
        (both(f"{LAYER}input_layernorm", D, D), ("input_layernorm", "a norm")),
        (both(f"{PEFT}language_model.layers.0.self_attn.k_proj", 16, D), ("language_model", "Gemma 4")),
        (both(f"{LAYER}mlp.fc1", FF, D), ("mlp.fc1", "no matrix of this model")),
        (both(f"{LAYER}experts.0.gate_proj", XF, D), ("experts.0.gate_proj", "an expert by itself")),
        (both("model.decoder.layers.0.self_attn.q_proj", 32, D), ("q_proj", "same module as")),
        (added(f"{LAYER}self_attn.q_proj.lora_magnitude_vector", 32), ("magnitude", "DoRA")),
        (added(f"{LAYER}self_attn.q_proj.lora_B.bias", 32), ("lora_B.bias", "a trained bias")),
        (added(f"{PEFT}decoder.embed_tokens.lora_embedding_A", 4, 512), ("lora_embedding_A", "embedding")),
        (added(f"{PEFT}decoder.norm.weight", D), ("decoder.norm.weight", "as a whole")),
        (added("base_model.model.lm_head.modules_to_save.weight", 8, D), ("lm_head", "as a whole")),
        (added(f"{PEFT}layers.0.moe.experts.lora_down_A", 4, XF, 4), ("lora_down_A", "NeMo")),
        (added(f"{LAYER}self_attn.q_proj.lora_C.weight", 4), ("lora_C", "no lora_A.weight")),
        (both(f"{LAYER}self_attn.k_proj.lora_A.other.weight", 4, 4), ("other",)),
    ],
)
def test_tensors_refused(
    change: Callable[[Tensors], Tensors], parts: tuple[str, ...], tmp_path: Path
) -> None:
    base = pair(f"{LAYER}self_attn.q_proj", 32, D)
    folders.write_folder(tmp_path, change(base))
    refused(tmp_path, "tensor", *parts)


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "I8", "BOOL"])
def test_other_types(dtype: str, tmp_path: Path) -> None:
    tensors = pair(f"{LAYER}self_attn.q_proj", 32, D)
    folders.write_folder(tmp_path, tensors)
    path = tmp_path / "adapter_model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    size = {"F64": 8}.get(dtype, 1)
    end = 0
    for entry in header.values():
        if "shape" in entry:
            count = int(np.prod(entry["shape"])) * size
            entry |= {"dtype": dtype, "data_offsets": [end, end + count]}
            end += count
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    refused(tmp_path, "q_proj.lora_", dtype)


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    refused(tmp_path, "no adapter_config.json", "save_pretrained")
    (tmp_path / "model.gguf").touch()
    refused(tmp_path, "give the file", "model.gguf")
    (tmp_path / "_METADATA").touch()
    refused(tmp_path, "Orbax")
    (tmp_path / "adapter_model.safetensors").touch()
    refused(tmp_path, "no adapter_config.json", "scale")
    folders.write_folder(tmp_path / "epoch_0_step_399/model")  # as NeMo has it
    refused(tmp_path, "epoch_0_step_399/model", "give")
    folders.write_folder(tmp_path / "checkpoint-500")
    refused(tmp_path, f"give {tmp_path / 'checkpoint-500'}")
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
        refused(tmp_path / "b", "checkpoint" if name == "config.json" else "no adapter_model.safetensors")
    (tmp_path / "b/adapter_model.bin").touch()
    refused(tmp_path / "b", "adapter_model.bin", "pickle", "save_pretrained")
    refused(tmp_path / "b/adapter_config.json", "give its folder")
    refused(tmp_path / "missing", "no such adapter")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"r": 1, "r": 2}', '{"r": NaN}', "version https://git-lfs.github.com/spec/v1"]
)
def test_configs_that_are_no_json(text: str, tmp_path: Path) -> None:
    folders.write_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    refused(tmp_path, "adapter_config.json")


def test_a_file_that_changes_after_loading(tmp_path: Path) -> None:
    adapter = load_adapter(folders.write_folder(tmp_path), MODEL)
    path = tmp_path / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, (1, 1))
    with pytest.raises(AdapterError, match="has changed since"):
        list(adapter.scaled())
    path.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: can't be read"):
        list(adapter.scaled())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", None),
        ("block_count", "2"),
        ("expert_count", -1),
        ("attention.head_count_kv", [1]),
        ("attention.head_count_kv", [1, 1.5]),
        ("attention.sliding_window_pattern", None),
        ("attention.key_length_swa", None),
    ],
)
def test_models_without_what_they_need(key: str, value: Any, tmp_path: Path) -> None:
    folders.write_folder(tmp_path)
    model = MODEL | {f"diffusion-gemma.{key}": value}
    if value is None:
        del model[f"diffusion-gemma.{key}"]
    with pytest.raises(AdapterError, match=f"'diffusion-gemma.{key}'"):
        load_adapter(tmp_path, model)


def test_another_architecture(tmp_path: Path) -> None:
    folders.write_folder(tmp_path)
    with pytest.raises(AdapterError, match="'llama' are not supported"):
        load_adapter(tmp_path, {"general.architecture": "llama"})


def test_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file may claim any size."""
    adapter = load_adapter(folders.write_folder(tmp_path), MODEL)

    def fail(*arguments: object) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr("pydiffusion.adapters.stored.read_exactly", fail)
    with pytest.raises(InsufficientMemoryError, match=r"adapter_model\.safetensors.*lora_A\.weight"):
        list(adapter.scaled())
