"""Adapter folders that PEFT itself saved, against what PEFT computes of them, and back."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydiffusion import AdapterError, _native
from pydiffusion.adapters.adapter import Adapter
from pydiffusion.adapters.gguf_file import write_adapter_gguf
from pydiffusion.adapters.loading import load_adapter, matrices_of
from pydiffusion.adapters.peft_writing import write_peft_folder

pytestmark = pytest.mark.reference

TEXT = r"model\.(decoder|encoder\.language_model)\."
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "attention and dense": {"target_modules": rf"{TEXT}.*\.(q|k|v|o|gate|up|down)_proj"},
    "one mode": {"target_modules": r"model\.decoder\.layers\.\d+\.mlp\.(gate|up|down)_proj", "r": 3},
    "router": {"target_modules": rf"{TEXT}layers\.\d+\.router\.proj", "use_rslora": True, "lora_alpha": 5},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "gate and up of experts": {"target_modules": [], "target_parameters": EXPERTS[:1], "r": 2},
    "down of experts": {"target_modules": [], "target_parameters": EXPERTS[1:]},
    "a matrix as a parameter": {
        "target_modules": [],
        "target_parameters": ["router.proj.weight"],
        "rank_pattern": {r"layers\.1\.router\.proj\.weight": 6},
    },
    "patterns": {
        "target_modules": rf"{TEXT}.*self_attn\.(q|k|v|o)_proj",
        "target_parameters": EXPERTS,
        "rank_pattern": {"q_proj": 7, r"decoder\.layers\.1\.self_attn\.[ko]_proj": 2, "experts.down_proj": 5},
        "alpha_pattern": {r".*language_model.*\.k_proj": 1, "experts.gate_up_proj": 30, "q_proj": 3.5},
    },
}


@pytest.fixture(scope="module")
def keys(gguf_file: Callable[..., Path]) -> Mapping[str, Any]:
    return _native.GgufFile(str(gguf_file("tiny"))).metadata


@functools.cache
def _loaded(checkpoint: Path) -> Any:
    from reference.hf_model import load_reference

    return load_reference(checkpoint)


def model_of(checkpoint: Path) -> Any:
    """A model of transformers to put adapters on."""
    return copy.deepcopy(_loaded(checkpoint))


def saved(
    checkpoint: Path, folder: Path, dtype: str = "float32", **config: Any
) -> dict[tuple[str, str], np.ndarray]:
    """Save a random adapter with PEFT; returns what it adds to each matrix, by PEFT's own reckoning."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(model_of(checkpoint), LoraConfig(**{"r": 4, "lora_alpha": 8} | config))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_" in name and "tower" not in name and "embed_vision" not in name:
                values.copy_(torch.randn_like(values).bfloat16())
    model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return deltas(model)


def deltas(model: Any) -> dict[tuple[str, str], np.ndarray]:
    """What a PEFT model adds to each matrix: (GGUF's name, mode) -> float32."""
    from support.peft_adapters import tensor_and_side

    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {}):
            own = re.sub(r"^base_model\.model\.|\.base_layer", "", name)
            if getattr(module, "parameter_name", "weight") != "weight":
                own = f"{own}.{module.parameter_name}"
            delta = module.get_delta_weight("default").detach().float().numpy()
            if delta.any():
                found[tensor_and_side(own)] = delta
    return found


def assert_same(adapter: Adapter, expected: Mapping[tuple[str, str], np.ndarray]) -> None:
    found = {(target.tensor, target.side): factors.delta() for target, factors in adapter.factors.items()}
    assert found.keys() == expected.keys()
    for key, delta in expected.items():
        np.testing.assert_allclose(found[key], delta, rtol=1e-5, atol=1e-5, err_msg=str(key))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_peft(
    name: str, checkpoint_folder: Callable[..., Path], keys: Mapping[str, Any], tmp_path: Path
) -> None:
    expected = saved(checkpoint_folder("tiny"), tmp_path / "a", **CONFIGS[name])
    adapter = load_adapter(tmp_path / "a", keys)
    assert_same(adapter, expected)
    assert not adapter.metadata["notes"]
    write_adapter_gguf(adapter, tmp_path / "a.gguf", matrices_of(keys))
    assert_same(load_adapter(tmp_path / "a.gguf", keys), expected)
    assert_same(load_adapter(tmp_path / "a", None), expected)  # without a model


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_what_is_written(
    name: str, checkpoint_folder: Callable[..., Path], keys: Mapping[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    expected = saved(checkpoint_folder("tiny"), tmp_path / "a", **CONFIGS[name])
    write_peft_folder(load_adapter(tmp_path / "a", keys), tmp_path / "b", matrices_of(None))
    model = PeftModel.from_pretrained(model_of(checkpoint_folder("tiny")), tmp_path / "b")
    found = deltas(model)
    assert found.keys() == expected.keys()
    for key, delta in expected.items():
        np.testing.assert_allclose(found[key], delta, rtol=1e-5, atol=1e-5, err_msg=str(key))


def test_all_linear_leaves_out_what_was_not_trained(
    checkpoint_folder: Callable[..., Path], keys: Mapping[str, Any], tmp_path: Path
) -> None:
    """``all-linear`` puts pairs on the projector of images, whose B stays zero."""
    checkpoint = checkpoint_folder("tiny")
    config = {"target_modules": "all-linear", "exclude_modules": r".*vision_tower.*"}
    expected = saved(checkpoint, tmp_path / "a", **config)
    adapter = load_adapter(tmp_path / "a", keys)
    assert_same(adapter, expected)
    (note,) = adapter.metadata["notes"]
    assert "projector of images" in note and "left out" in note


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves(
    dtype: str, checkpoint_folder: Callable[..., Path], keys: Mapping[str, Any], tmp_path: Path
) -> None:
    config = CONFIGS["attention and dense"]
    expected = saved(checkpoint_folder("tiny"), tmp_path / "whole", **config)
    saved(checkpoint_folder("tiny"), tmp_path / "half", dtype, **config)
    adapter = load_adapter(tmp_path / "half", keys)
    if dtype == "bfloat16":  # which the values were drawn in
        assert_same(adapter, expected)
        assert adapter.fingerprint == load_adapter(tmp_path / "whole", keys).fingerprint
    else:
        for target, factors in adapter.factors.items():
            np.testing.assert_allclose(
                factors.delta(), expected[target.tensor, target.side], rtol=1e-2, atol=1e-2
            )


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "'use_dora'"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' is 'pissa'"),
        ({"modules_to_save": ["norm"]}, "'modules_to_save'"),
        ({"lora_bias": True}, "'lora_bias'"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_what_peft_has_beside_lora(
    config: dict[str, Any],
    what: str,
    checkpoint_folder: Callable[..., Path],
    keys: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    base = {"target_modules": r"model\.decoder\.layers\.0\.self_attn\.q_proj"}
    saved_without_deltas(checkpoint_folder("tiny"), tmp_path / "a", **base | config)
    with pytest.raises(AdapterError) as error:
        load_adapter(tmp_path / "a", keys)
    assert what in str(error.value)


def saved_without_deltas(checkpoint: Path, folder: Path, **config: Any) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model_of(checkpoint), LoraConfig(**config)).save_pretrained(folder)
