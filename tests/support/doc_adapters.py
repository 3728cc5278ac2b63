"""Adapters that pages name: PEFT folders for the demo model, small random changes of attention and MLP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open

from pydiffusion.demo import checkpoint_path
from support.adapter_folders import peft_config, write_folder

_RANK, _ALPHA = 2, 4
_TARGET = re.compile(
    r"model\.decoder\.(layers\.\d+\.(?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj)\.weight"
)
#: What the name of a folder says of the sets in it: a module's name before ``layers.N``, for each set.
ADAPTERS: dict[str, Sequence[str]] = {
    "my-lora": ("decoder.", "encoder.language_model."),
    "shared-lora": ("",),
}


def write(folder: Path, sets: Sequence[str], seed: int = 0) -> None:
    """A folder as PEFT saves it: adapter_config.json and adapter_model.safetensors, F32."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module, (n_out, n_in) in _shapes().items():
        for prefix in sets:
            name = f"base_model.model.model.{prefix}{module}"
            a, b = rng.normal(size=(_RANK, n_in)), rng.normal(size=(n_out, _RANK))
            tensors[f"{name}.lora_A.weight"] = (a / np.sqrt(n_in)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = (b * 0.02).astype(np.float32)
    targets = sorted({module.rsplit(".", 1)[1] for module in _shapes()})
    write_folder(folder, tensors, peft_config(r=_RANK, lora_alpha=_ALPHA, target_modules=targets))


def _shapes() -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the matrices that are adapted, by module."""
    with safe_open(checkpoint_path() / "model.safetensors", "numpy") as stored:
        found = {name: _TARGET.fullmatch(name) for name in stored.keys()}  # noqa: SIM118
        return {m[1]: tuple(stored.get_slice(name).get_shape()) for name, m in found.items() if m}
