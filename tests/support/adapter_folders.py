"""Adapters as PEFT, NeMo and MLX write them, and GGUFs, made with numpy alone; random ones for a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from pydiffusion import AdapterError
from pydiffusion.adapters.loading import load_adapter
from support.adapters_by_hand import random_targets
from support.checkpoint_folders import write_json, write_safetensors
from support.gguf_files import finish

D, FF, XF, EXPERTS, HEADS, HEAD, FULL_HEAD = 64, 96, 32, 4, 2, 16, 32
#: Metadata of the model that they are for: a sliding layer and a full one.
MODEL: dict[str, Any] = {
    "general.architecture": "diffusion-gemma",
    "diffusion-gemma.block_count": 2,
    "diffusion-gemma.embedding_length": D,
    "diffusion-gemma.feed_forward_length": FF,
    "diffusion-gemma.expert_feed_forward_length": XF,
    "diffusion-gemma.expert_count": EXPERTS,
    "diffusion-gemma.attention.head_count": HEADS,
    "diffusion-gemma.attention.head_count_kv": [1, 1],
    "diffusion-gemma.attention.key_length": FULL_HEAD,
    "diffusion-gemma.attention.key_length_swa": HEAD,
    "diffusion-gemma.attention.sliding_window_pattern": [True, False],
}
PEFT = "base_model.model.model."
#: Module of layer 0 -> (n_out, n_in).
SIZES = {
    "self_attn.q_proj": (HEADS * HEAD, D),
    "self_attn.k_proj": (HEAD, D),
    "self_attn.v_proj": (HEAD, D),
    "self_attn.o_proj": (D, HEADS * HEAD),
    "mlp.gate_proj": (FF, D),
    "mlp.up_proj": (FF, D),
    "mlp.down_proj": (D, FF),
    "router.proj": (EXPERTS, D),
}
SELF_CONDITIONING = {"gate_proj": (FF, D), "up_proj": (FF, D), "down_proj": (D, FF)}

Tensors = dict[str, np.ndarray]


def random(seed: int, *shape: int) -> np.ndarray:
    """Float32 whose values BF16 holds."""
    return np.random.default_rng(seed).integers(-64, 64, shape).astype(np.float32) / 16


def pair(module: str, n_out: int, n_in: int, rank: int = 4, seed: int = 0) -> Tensors:
    """A pair as PEFT names it; ``module`` with all that is before it."""
    return {
        f"{module}.lora_A.weight": random(seed, rank, n_in),
        f"{module}.lora_B.weight": random(seed + 1, n_out, rank),
    }


def experts(module: str, rank: int = 4, seed: int = 0) -> Tensors:
    """Both of PEFT's pairs on a layer's experts."""
    return {
        f"{module}.base_layer.lora_A.weight": random(seed + 1, rank * EXPERTS, D),
        f"{module}.base_layer.lora_B.weight": random(seed + 2, 2 * XF, rank * EXPERTS),
        f"{module}.lora_A.weight": random(seed + 3, rank * EXPERTS, XF),
        f"{module}.lora_B.weight": random(seed + 4, D, rank * EXPERTS),
    }


def peft_tensors(rank: int = 4) -> Tensors:
    """All that can be adapted of layer 0 in both modes, and self-conditioning."""
    tensors: Tensors = {}
    for seed, side in enumerate(("decoder.", "encoder.language_model.")):
        for module, size in SIZES.items():
            tensors |= pair(f"{PEFT}{side}layers.0.{module}", *size, rank, seed)
        tensors |= experts(f"{PEFT}{side}layers.0.experts", rank, seed)
    for module, size in SELF_CONDITIONING.items():
        tensors |= pair(f"{PEFT}decoder.self_conditioning.{module}", *size, rank)
    return tensors


def mlx_tensors(prefix: str = "model.decoder.") -> Tensors:
    """As MLX saves it: A (n_in, r) and B (r, n_out); of experts (n_expert, r, n_in), (n_expert, n_out, r)."""
    a, b = random(5, D, 4), random(6, 4, 32)
    down_a, down_b = random(7, EXPERTS, 4, XF), random(8, EXPERTS, D, 4)
    return {
        f"{prefix}layers.0.self_attn.q_proj.lora_a": a,
        f"{prefix}layers.0.self_attn.q_proj.lora_b": b,
        f"{prefix}layers.0.experts.down_proj.lora_a": down_a,
        f"{prefix}layers.0.experts.down_proj.lora_b": down_b,
    }


def peft_config(**changes: Any) -> dict[str, Any]:
    """The keys that PEFT 0.21 writes. None stays, as PEFT writes it."""
    config: dict[str, Any] = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": "google/diffusiongemma-26B-A4B-it", "bias": "none", "corda_config": None,
        "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
        "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8,
        "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
        "peft_type": "LORA", "peft_version": "0.21.0", "qalora_group_size": 16, "r": 4, "rank_pattern": {},
        "revision": None, "target_modules": ["q_proj"], "target_parameters": None, "task_type": None,
        "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False,
        "use_rslora": False, "velora_config": None,
    }  # fmt: skip
    return config | changes


def write_folder(
    folder: Path,
    tensors: Tensors | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: str = "F32",
    name: str = "adapter_model.safetensors",
) -> Path:
    """A folder; without ``config`` with PEFT's."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = peft_tensors() if tensors is None else tensors
    write_safetensors(folder / name, tensors, dict.fromkeys(tensors, dtype))
    write_json(folder / "adapter_config.json", dict(peft_config() if config is None else config))
    return folder


def write_gguf(path: Path, tensors: Tensors, keys: Mapping[str, Any] | None = None) -> Path:
    """A GGUF as llama.cpp's converter writes it; ``keys`` change its metadata, None leaves one out."""
    values: dict[str, Any] = {
        "general.architecture": "diffusion-gemma",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    } | dict(keys or {})
    writer = GGUFWriter(path, values.pop("general.architecture"))
    for key, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        if value is not None:
            add(key, value)
    finish(writer, tensors)
    return path


def write_random_folder(folder: Path, model: Path, seed: int, rank: int = 4) -> Path:
    """An adapter of queries and attention outputs, one set for both modes, as NeMo writes it."""
    modules = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj"}
    tensors = {}
    for tensor, _, a, b in random_targets(model, seed, rank, modules):
        _, layer, kind = tensor.split(".")
        key = f"{PEFT}layers.{layer}.{modules[kind]}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    config = peft_config(r=rank, lora_alpha=rank, target_modules=["q_proj", "o_proj"])
    return write_folder(folder, tensors, config)


def write_random_gguf(path: Path, model: Path, seed: int, *, rank: int = 4, share: float = 1.0) -> Path:
    """A set for both modes, of attention and the dense part of every layer.

    share: of the changes, as of ``adapters_by_hand.factors_of``.
    """
    kinds = ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors = {}
    for tensor, _, a, b in random_targets(model, seed, rank, kinds, share=share):
        tensors |= {f"{tensor}.weight.lora_a": a, f"{tensor}.weight.lora_b": b}
    return write_gguf(path, tensors, {"adapter.lora.alpha": float(rank)})


def refused(folder: Path, *parts: str) -> str:
    """The words of the refusal, one line that has these parts."""
    with pytest.raises(AdapterError) as error:
        load_adapter(folder, MODEL)
    text = str(error.value)
    assert "\n" not in text
    for part in (str(folder), *parts):
        assert part in text, text
    return text
