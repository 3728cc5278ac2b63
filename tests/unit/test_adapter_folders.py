"""Adapter folders of PEFT, NeMo and MLX: what they change, what is refused and in which words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import adapter_folders as folders
from support.adapter_folders import EXPERTS, FF, MODEL, PEFT, XF, D, Tensors, pair, peft_config

from pydiffusion import AdapterError, InsufficientMemoryError
from pydiffusion.adapters.adapter import Adapter, Factors, Target
from pydiffusion.adapters.loading import load_adapter, matrices_of
from pydiffusion.adapters.peft_writing import write_peft_folder

Q = "blk.0.attn_q"


def load(folder: Path, *arguments: Any, **options: Any) -> Adapter:
    return load_adapter(folders.write_folder(folder, *arguments, **options), MODEL)


def factors(adapter: Adapter, tensor: str, side: Any) -> Factors:
    return adapter.factors[Target(tensor, side)]


def refused(folder: Path, *parts: str) -> str:
    """The words of the refusal, one line that has these parts."""
    with pytest.raises(AdapterError) as error:
        load_adapter(folder, MODEL)
    text = str(error.value)
    assert "\n" not in text
    for part in (str(folder), *parts):
        assert part in text, text
    return text


def test_two_modes(tmp_path: Path) -> None:
    tensors = folders.peft_tensors()
    adapter = load(tmp_path, tensors)
    assert len(adapter.factors) == 2 * (8 + 2) + 3
    for side, path in (("decoder", "decoder"), ("encoder", "encoder.language_model")):
        name = f"{PEFT}{path}.layers.0.self_attn.q_proj"
        delta = factors(adapter, Q, side).delta()
        expected = 2 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        assert np.array_equal(delta, expected)
    assert not np.array_equal(factors(adapter, Q, "decoder").delta(), factors(adapter, Q, "encoder").delta())
    assert Target("self_cond_up", "decoder") in adapter.factors
    assert adapter.metadata["r"] == 4 and adapter.metadata["lora_alpha"] == 8
    assert adapter.name == tmp_path.name and adapter.path == tmp_path


def test_experts(tmp_path: Path) -> None:
    """Rows of A are grouped by expert; the rank's values in B, all experts' beside each other."""
    tensors = folders.experts(f"{PEFT}decoder.layers.1.experts")
    adapter = load(tmp_path, tensors)
    for tensor, inner, n_out, n_in in (
        ("blk.1.ffn_gate_up_exps", ".base_layer", 2 * XF, D),
        ("blk.1.ffn_down_exps", "", D, XF),
    ):
        delta = factors(adapter, tensor, "decoder").delta()
        assert delta.shape == (EXPERTS, n_out, n_in)
        a = tensors[f"{PEFT}decoder.layers.1.experts{inner}.lora_A.weight"]
        b = tensors[f"{PEFT}decoder.layers.1.experts{inner}.lora_B.weight"]
        for expert in range(EXPERTS):
            expected = 2 * b[:, expert::EXPERTS] @ a[4 * expert : 4 * expert + 4]
            np.testing.assert_allclose(delta[expert], expected, rtol=1e-6)


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", None])
def test_experts_of_before(version: str | None, tmp_path: Path) -> None:
    """PEFT before 0.19.1 took experts' matrices as (n_in, n_out): A has the outputs, B the inputs. Without a
    version (NeMo) the shapes tell.
    """
    module = f"{PEFT}decoder.layers.1.experts"
    tensors = {
        f"{module}.base_layer.lora_A.weight": folders.random(1, 4 * EXPERTS, 2 * XF + 2),
        f"{module}.base_layer.lora_B.weight": folders.random(2, D, 4 * EXPERTS),
        f"{module}.lora_A.weight": folders.random(3, 4 * EXPERTS, D),
        f"{module}.lora_B.weight": folders.random(4, XF + 1, 4 * EXPERTS),
    }
    folders.write_folder(tmp_path, tensors, peft_config(peft_version=version))
    model = MODEL | {"diffusion-gemma.expert_feed_forward_length": XF + 1}  # or gate_up would be square
    adapter = load_adapter(tmp_path, model)
    for tensor, inner in (("blk.1.ffn_gate_up_exps", ".base_layer"), ("blk.1.ffn_down_exps", "")):
        a = tensors[f"{module}{inner}.lora_A.weight"].reshape(EXPERTS, 4, -1)
        b = tensors[f"{module}{inner}.lora_B.weight"]
        b = b.reshape(len(b), 4, EXPERTS)
        expected = 2 * np.einsum("ore,eri->eio", b, a)  # as their get_delta_weight has it
        np.testing.assert_allclose(factors(adapter, tensor, "decoder").delta(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "side"),
    [
        ("base_model.model.model.", "both"),  # NeMo
        ("base_model.model.base_model.model.model.decoder.", "decoder"),
        ("base_model.model.decoder.", "decoder"),  # a model without its head
        ("base_model.model.encoder.language_model.", "encoder"),
        ("model.decoder.", "decoder"),
        ("base_model.model._orig_mod.model.decoder._checkpoint_wrapped_module.", "decoder"),
        ("base_model.model.module.model.decoder.", "decoder"),
    ],
)
def test_prefixes(prefix: str, side: Any, tmp_path: Path) -> None:
    tensors = pair(f"{prefix}layers.0.self_attn.q_proj", 32, D)
    assert list(load(tmp_path, tensors).factors) == [Target(Q, side)]


def test_an_adapter_name_in_the_keys(tmp_path: Path) -> None:
    plain = pair(f"{PEFT}decoder.layers.0.self_attn.q_proj", 32, D)
    named = {key.replace(".weight", ".default.weight"): values for key, values in plain.items()}
    assert load(tmp_path / "named", named).fingerprint == load(tmp_path / "plain", plain).fingerprint


def test_nemo_of_one_stack(tmp_path: Path) -> None:
    """NeMo has one stack of layers: where it names that the decoder's, its set is for both modes."""
    tensors = pair(f"{PEFT}decoder.layers.0.self_attn.q_proj", 32, D)
    folders.write_folder(tmp_path, tensors)
    (tmp_path / "automodel_peft_config.json").write_text("{}")
    adapter = load_adapter(tmp_path, MODEL)
    assert list(adapter.factors) == [Target(Q, "both")]
    assert "both modes" in adapter.metadata["notes"][0]
    folders.write_folder(tmp_path)  # with the encoder's
    assert Target(Q, "encoder") in load_adapter(tmp_path, MODEL).factors


def test_nemo_self_conditioning_and_router(tmp_path: Path) -> None:
    tensors = pair(f"{PEFT}self_conditioning.gate_proj", FF, D)
    tensors |= pair(f"{PEFT}layers.1.moe.gate.proj", EXPERTS, D)
    assert set(load(tmp_path, tensors).factors) == {
        Target("self_cond_gate", "decoder"),
        Target("blk.1.ffn_gate_inp", "both"),
    }


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"lora_alpha": 0.5}, 0.125),
        ({"lora_alpha": -4}, -1.0),
        ({"alpha_pattern": {"q_proj": 40}}, 10.0),
        ({"alpha_pattern": {r"layers\.1\..*": 40}}, 2.0),
        ({"alpha_pattern": {r"^model\.decoder\.layers\.(0|1)\.self_attn\.(q|k)_proj": 40}}, 10.0),
        ({"alpha_pattern": {"_proj": 40}}, 2.0),  # a pattern begins at a dot
        ({"r": 9, "rank_pattern": {"q_proj": 4}}, 2.0),
        ({"use_rslora": None, "rank_pattern": None}, 2.0),
    ],
)
def test_scales(changes: dict[str, Any], scale: float, tmp_path: Path) -> None:
    tensors = pair(f"{PEFT}decoder.layers.0.self_attn.q_proj", 32, D)
    adapter = load(tmp_path, tensors, peft_config(**changes))
    assert factors(adapter, Q, "decoder").scale == scale
    assert not adapter.metadata["notes"]


def test_several_alphas_of_a_module_are_noted(tmp_path: Path) -> None:
    tensors = pair(f"{PEFT}decoder.layers.0.self_attn.q_proj", 32, D)
    config = peft_config(alpha_pattern={"layers.0.self_attn.q_proj": 16, "q_proj": 4})
    adapter = load(tmp_path, tensors, config)
    assert factors(adapter, Q, "decoder").scale == 4
    assert "alpha_pattern" in adapter.metadata["notes"][0]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_types(dtype: str, tmp_path: Path) -> None:
    whole = load(tmp_path / "F32")
    assert load(tmp_path / dtype, dtype=dtype).fingerprint == whole.fingerprint


def test_fingerprints_tell_what_is_computed(tmp_path: Path) -> None:
    base = folders.peft_tensors()
    seen = {load(tmp_path / "0", base).fingerprint}
    name = f"{PEFT}decoder.layers.0.self_attn.q_proj"
    for i, (tensors, config) in enumerate(
        [
            (base, peft_config(lora_alpha=9)),
            (base | {f"{name}.lora_A.weight": base[f"{name}.lora_A.weight"] + 1}, None),
            ({key: values for key, values in base.items() if "encoder" not in key}, None),
        ]
    ):
        seen.add(load(tmp_path / str(i + 1), tensors, config).fingerprint)
    assert len(seen) == 4
    moved = dict(reversed(base.items()))  # order in the file is nothing
    assert load(tmp_path / "moved", moved).fingerprint in seen


MLX = {
    "fine_tune_type": "lora",
    "num_layers": -1,
    "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0},
}


@pytest.mark.parametrize("prefix", ["model.decoder.", "model.", "language_model.model.decoder."])
def test_mlx(prefix: str, tmp_path: Path) -> None:
    """One set for both modes, A (n_in, r) and B (r, n_out), a scale that is not divided by the rank."""
    tensors = folders.mlx_tensors(prefix)
    adapter = load(tmp_path, tensors, MLX, name="adapters.safetensors")
    a, b, down_a, down_b = tensors.values()
    assert np.array_equal(factors(adapter, Q, "both").delta(), np.float32(2.5) * (a @ b).T)
    delta = factors(adapter, "blk.0.ffn_down_exps", "both").delta()
    np.testing.assert_allclose(delta, 2.5 * np.einsum("eor,eri->eoi", down_b, down_a), rtol=1e-6)


def test_mlx_of_before(tmp_path: Path) -> None:
    """mlx-vlm's older files: A and B, and an alpha that is divided by the rank."""
    a, b = folders.random(5, D, 4), folders.random(6, 4, 32)
    name = "model.decoder.layers.0.self_attn.q_proj"
    config = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
    adapter = load(tmp_path, {f"{name}.A": a, f"{name}.B": b}, config, name="adapters.safetensors")
    assert np.array_equal(factors(adapter, Q, "both").delta(), 2 * (a @ b).T)


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


@pytest.mark.parametrize(
    ("base", "is_noted"),
    [
        ("google/gemma-4-26B-A4B-it", True),
        ("unsloth/Gemma_3-4b", True),
        ("google/diffusiongemma-26B-A4B-it", False),
        ("/home/me/checkpoint", False),
        (5, False),
        ("", False),
    ],
)
def test_an_adapter_of_another_gemma_is_noted(base: Any, is_noted: bool, tmp_path: Path) -> None:
    adapter = load(tmp_path, config=peft_config(base_model_name_or_path=base))
    assert any("no diffusion model" in note for note in adapter.metadata["notes"]) == is_noted


def test_what_is_not_read_of_a_config_is_noted(tmp_path: Path) -> None:
    adapter = load(tmp_path, config=peft_config(seed_of_somebody=5, nothing=None))
    (note,) = adapter.metadata["notes"]
    assert "'seed_of_somebody' was not read" in note


LAYER = f"{PEFT}decoder.layers.0."


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


def test_experts_that_do_not_say_of_which(tmp_path: Path) -> None:
    """Alone, a pair on experts is of the parameter that target_parameters names."""
    whole = folders.experts(f"{LAYER}experts")
    down = {key: values for key, values in whole.items() if ".base_layer." not in key}
    gate_up = {key.replace(".base_layer", ""): values for key, values in whole.items() if key not in down}
    for name, tensors in (("gate_up_proj", gate_up), ("down_proj", down)):
        config = peft_config(target_parameters=[f"experts.{name}"])
        adapter = load(tmp_path / name, tensors, config)
        assert [target.tensor for target in adapter.factors] == [
            f"blk.0.ffn_{name.removesuffix('_proj')}_exps"
        ]
    folders.write_folder(tmp_path / "neither", down)
    refused(tmp_path / "neither", "experts.lora_A.weight", "target_parameters")
    folders.write_folder(tmp_path / "wrong", down, peft_config(target_parameters=["experts.gate_up_proj"]))
    refused(tmp_path / "wrong", "experts.lora_A.weight", "another size")


def test_what_was_not_trained_is_left_out(tmp_path: Path) -> None:
    tensors = pair(f"{LAYER}self_attn.q_proj", 32, D)
    tower = pair(f"{PEFT}encoder.vision_tower.encoder.layers.0.self_attn.q_proj", 8, 8)
    tower[next(key for key in tower if "lora_B" in key)][:] = 0
    adapter = load(tmp_path / "a", tensors | tower)
    assert list(adapter.factors) == [Target(Q, "decoder")]
    assert adapter.metadata["notes"] == ("1 pairs of the vision tower were not trained, and are left out",)
    folders.write_folder(tmp_path / "b", tower)
    refused(tmp_path / "b", "changes nothing", "vision tower")
    for key in tensors:
        tensors[key] = np.zeros_like(tensors[key])
    assert "was not trained" in load(tmp_path / "c", tensors).metadata["notes"][0]


def test_padded_feed_forward(tmp_path: Path) -> None:
    """An adapter of the checkpoint's width, for a file whose rows are padded."""
    tensors = pair(f"{LAYER}mlp.gate_proj", FF, D) | folders.experts(f"{LAYER}experts")
    folders.write_folder(tmp_path, tensors)
    padded = MODEL | {
        "diffusion-gemma.feed_forward_length": 256,
        "diffusion-gemma.expert_feed_forward_length": 256,
    }
    assert len(load_adapter(tmp_path, padded).factors) == 3
    other = MODEL | {"diffusion-gemma.feed_forward_length": 512}
    with pytest.raises(AdapterError, match=r"mlp\.gate_proj.*another size"):
        load_adapter(tmp_path, other)


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


def test_shards(tmp_path: Path) -> None:
    tensors = folders.peft_tensors()
    whole = load(tmp_path / "whole", tensors)
    keys = list(tensors)
    for i in (1, 2):
        part = {key: tensors[key] for key in keys[i - 1 :: 2]}
        folders.write_folder(tmp_path / "b", part, name=f"adapter_model-0000{i}-of-00002.safetensors")
    assert load_adapter(tmp_path / "b", MODEL).fingerprint == whole.fingerprint
    (tmp_path / "b/adapter_model-00001-of-00002.safetensors").unlink()
    refused(tmp_path / "b", "adapter_model-00001-of-00002.safetensors", "is missing")
    folders.write_folder(tmp_path / "b", tensors)
    refused(tmp_path / "b", "two adapters")


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
    adapter = load(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, (1, 1))
    with pytest.raises(AdapterError, match="has changed since"):
        list(adapter.scaled())
    path.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: can't be read"):
        list(adapter.scaled())


def test_scaled(tmp_path: Path) -> None:
    adapter = load(tmp_path)
    for tensor, side, a, b in adapter.scaled():
        delta = factors(adapter, tensor, side).delta()
        np.testing.assert_allclose(np.matmul(b, a), delta, rtol=1e-5, atol=1e-5)
        assert a.dtype == b.dtype == np.float32 and a.flags.c_contiguous


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


def test_a_period_of_layers(tmp_path: Path) -> None:
    """``sliding_window_pattern`` may be a number: each so many'th layer is a full one."""
    model = MODEL | {"diffusion-gemma.attention.sliding_window_pattern": 2}
    folders.write_folder(tmp_path)
    assert load_adapter(tmp_path, model).fingerprint == load_adapter(tmp_path, MODEL).fingerprint
    folders.write_folder(tmp_path, pair(f"{PEFT}decoder.layers.1.self_attn.v_proj", 16, D))
    with pytest.raises(AdapterError, match="no v_proj"):
        load_adapter(tmp_path, model)


def test_another_architecture(tmp_path: Path) -> None:
    folders.write_folder(tmp_path)
    with pytest.raises(AdapterError, match="'llama' are not supported"):
        load_adapter(tmp_path, {"general.architecture": "llama"})


def test_writing_back(tmp_path: Path) -> None:
    """What is written loads as the same, and a set for both modes as two."""
    adapter = load(tmp_path / "a")
    write_peft_folder(adapter, tmp_path / "b", matrices_of(MODEL))
    again = load_adapter(tmp_path / "b", MODEL)
    assert again.fingerprint == adapter.fingerprint
    both_modes = load(tmp_path / "c", pair(f"{PEFT}layers.0.self_attn.q_proj", 32, D))
    write_peft_folder(both_modes, tmp_path / "d", matrices_of(None))
    written = load_adapter(tmp_path / "d", MODEL)
    keys = json.loads((tmp_path / "d/adapter_config.json").read_text())["target_modules"]
    assert keys == [
        f"model.{side}.layers.0.self_attn.q_proj" for side in ("encoder.language_model", "decoder")
    ]
    assert written.fingerprint == both_modes.fingerprint  # the same in both is one set
    assert list(written.factors) == [Target(Q, "both")]
    with pytest.raises(AdapterError, match="already exists"):
        write_peft_folder(adapter, tmp_path / "b", matrices_of(MODEL), overwrite=False)
    with pytest.raises(AdapterError, match="is a file"):
        write_peft_folder(adapter, tmp_path / "b/adapter_config.json", matrices_of(MODEL))


def test_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file may claim any size."""
    adapter = load(tmp_path)

    def fail(*arguments: object) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr("pydiffusion.adapters.stored.read_exactly", fail)
    with pytest.raises(InsufficientMemoryError, match=r"adapter_model\.safetensors.*lora_A\.weight"):
        list(adapter.scaled())
