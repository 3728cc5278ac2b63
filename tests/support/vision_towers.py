"""Random vision towers: as transformers' model and as a mmproj file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion.convert import convert_mmproj
from support import checkpoint_folders as folders
from support.vision_folders import PROJECTION, TOWER, vision_config


@dataclass(frozen=True)
class Tower:
    """Shape of a random tower. ``changes``: of the configuration in ``vision_folders``."""

    width: int
    heads: int
    pooling: int = 3
    grid: tuple[int, int] = (6, 3)  # columns and rows of the picture's patches
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        own = {
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.width // self.heads,
            "pooling_kernel_size": self.pooling,
        }
        return vision_config(**(own | self.changes))


def random_tower(tower: Tower, seed: int = 0, text_size: int = folders.D) -> Any:
    """``(tower, projector)`` of transformers, float32, every weight, norm, scale, bound and table random."""
    import torch
    from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
        DiffusionGemmaMultimodalEmbedder,
    )
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    config = Gemma4VisionConfig(**tower.config)
    model = Gemma4VisionModel(config).float().eval()
    projector = DiffusionGemmaMultimodalEmbedder(config, DiffusionGemmaTextConfig(hidden_size=text_size))
    random = torch.Generator().manual_seed(seed)
    named = [*model.named_parameters(), *model.named_buffers(), *projector.named_parameters()]
    with torch.no_grad():
        for name, value in named:
            if "inv_freq" in name:
                continue
            drawn = torch.randn(value.shape, generator=random)
            if value.ndim >= 2 and "table" not in name:
                drawn /= value.shape[-1] ** 0.5
            elif "norm" in name:
                drawn = 1 + 0.3 * drawn
            elif name.endswith(("_min", "_max")):  # that some of the activations exceed
                drawn = (drawn.abs() + 0.5) * (1 if name.endswith("_max") else -1)
            value.copy_(drawn)
    return model, projector.float().eval()


def write_tower(path: Path, reference: Any, tower: Tower, type: str = "f32") -> Path:
    """The mmproj file of :func:`random_tower`, by our converter, and its folder beside it."""
    model, projector = reference
    weights = {TOWER + name: value.numpy() for name, value in model.state_dict().items()}
    weights[PROJECTION] = projector.state_dict()["embedding_projection.weight"].numpy()
    config = folders.model_config() | {"vision_config": tower.config}
    folder = folders.make_folder(
        path.with_suffix(""), tensors=folders.weights() | weights, config=config, dtype="F32"
    )
    convert_mmproj(folder, path, type)
    return path


def picture(tower: Tower, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Patches float32 (n, 3 * patch**2) of 0 to 1, and their positions int32 (n, 2), by rows."""
    columns, rows = tower.grid
    random = np.random.default_rng(seed)
    patches = random.random((columns * rows, 3 * tower.config["patch_size"] ** 2), np.float32)
    positions = [(x, y) for y in range(rows) for x in range(columns)]
    return patches, np.array(positions, np.int32)


def reference_features(reference: Any, patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Features of a picture by transformers, float32 (n_soft_tokens, text size)."""
    import torch

    model, projector = reference
    pixels, places = torch.from_numpy(patches)[None], torch.from_numpy(positions.astype(np.int64))[None]
    with torch.no_grad():
        if model.config.pooling_kernel_size > 1:
            return projector(model(pixels, places).last_hidden_state).numpy()
        # Without pooling its forward takes the mask of padding for that of soft tokens, and returns none.
        padding = torch.zeros(places.shape[:2], dtype=torch.bool)
        hidden = model.encoder(model.patch_embedder(pixels, places, padding), ~padding, places)
        hidden, _ = model.pooler(hidden.last_hidden_state, places, padding, len(patches))
        if model.config.standardize:
            hidden = (hidden - model.std_bias) * model.std_scale
        return projector(hidden[0]).numpy()
