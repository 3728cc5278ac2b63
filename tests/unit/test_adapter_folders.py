"""Adapter folders of PEFT, NeMo and MLX: what they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import adapter_folders as folders
from support.adapter_folders import EXPERTS, FF, MODEL, PEFT, XF, D, pair, peft_config, refused

from pydiffusion import AdapterError
from pydiffusion.adapters.adapter import Adapter, Factors, Target
from pydiffusion.adapters.loading import load_adapter, matrices_of
from pydiffusion.adapters.peft_writing import write_peft_folder

Q = "blk.0.attn_q"


def load(folder: Path, *arguments: Any, **options: Any) -> Adapter:
    return load_adapter(folders.write_folder(folder, *arguments, **options), MODEL)


def factors(adapter: Adapter, tensor: str, side: Any) -> Factors:
    return adapter.factors[Target(tensor, side)]


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
    (note,) = adapter.metadata["notes"]
    assert "scaled by alpha / rank" in note and note.endswith("apply it with the scale 4")


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
    # Where it names neither, the sizes tell; those of gate_up, taken as swapped, could be of both here.
    assert load(tmp_path / "neither", down).fingerprint == load(tmp_path / "down_proj", down).fingerprint
    folders.write_folder(tmp_path / "unclear", down, peft_config(peft_version=None))
    refused(tmp_path / "unclear", "experts.lora_A.weight", "target_parameters")
    folders.write_folder(tmp_path / "wrong", down, peft_config(target_parameters=["experts.gate_up_proj"]))
    refused(tmp_path / "wrong", "experts.lora_A.weight", "another size")


def test_what_was_not_trained_is_left_out(tmp_path: Path) -> None:
    tensors = pair(f"{LAYER}self_attn.q_proj", 32, D)
    tower = pair(f"{PEFT}encoder.vision_tower.encoder.layers.0.self_attn.q_proj", 8, 8)
    tower[next(key for key in tower if "lora_B" in key)][:] = -0.0  # weight decay leaves zeros of both signs
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


def test_scaled(tmp_path: Path) -> None:
    adapter = load(tmp_path)
    for tensor, side, a, b in adapter.scaled():
        delta = factors(adapter, tensor, side).delta()
        np.testing.assert_allclose(np.matmul(b, a), delta, rtol=1e-5, atol=1e-5)
        assert a.dtype == b.dtype == np.float32 and a.flags.c_contiguous


def test_a_period_of_layers(tmp_path: Path) -> None:
    """``sliding_window_pattern`` may be a number: each so many'th layer is a full one."""
    model = MODEL | {"diffusion-gemma.attention.sliding_window_pattern": 2}
    folders.write_folder(tmp_path)
    assert load_adapter(tmp_path, model).fingerprint == load_adapter(tmp_path, MODEL).fingerprint
    folders.write_folder(tmp_path, pair(f"{PEFT}decoder.layers.1.self_attn.v_proj", 16, D))
    with pytest.raises(AdapterError, match="no v_proj"):
        load_adapter(tmp_path, model)


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
