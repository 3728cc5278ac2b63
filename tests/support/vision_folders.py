"""The vision part of a small checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support import checkpoint_folders as folders

D, FF, HEADS, LAYERS, PATCH, POSITIONS = 64, 96, 4, 2, 4, 20
TOWER = "model.encoder.vision_tower."
PROJECTION = "model.encoder.embed_vision.embedding_projection.weight"
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MATRICES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")
NORMS += ("post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm")


def vision_config(**changes: object) -> dict[str, object]:
    """``vision_config`` of config.json."""
    config = {
        "model_type": "gemma4_vision",
        "hidden_size": D,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": D // HEADS,
        "patch_size": PATCH,
        "pooling_kernel_size": 3,
        "position_embedding_size": POSITIONS,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
        "standardize": True,
        "use_clipped_linears": True,
    }
    return config | changes


def make_folder(
    path: Path, tensors: dict[str, np.ndarray] | None = None, *, n_shards: int = 1, **changes: object
) -> Path:
    """A checkpoint folder with text and vision; ``tensors``: the vision's; ``changes`` to vision_config."""
    config = folders.model_config() | {"vision_config": vision_config(**changes)}
    weights = folders.weights() | (vision_weights() if tensors is None else tensors)
    return folders.make_folder(path, tensors=weights, config=config, n_shards=n_shards)


def vision_weights() -> dict[str, np.ndarray]:
    """All vision tensors: float32, already rounded to bfloat16."""
    random = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {
        TOWER + "patch_embedder.input_proj.weight": (D, 3 * PATCH**2),
        TOWER + "patch_embedder.position_embedding_table": (2, POSITIONS, D),
        TOWER + "std_bias": (D,),
        TOWER + "std_scale": (D,),
        PROJECTION: (folders.D, D),
    }
    for i_layer in range(LAYERS):
        layer = f"{TOWER}encoder.layers.{i_layer}."
        for name in MATRICES:
            n_out, n_in = {"mlp.down_proj": (D, FF)}.get(name, (FF if "mlp" in name else D, D))
            shapes[f"{layer}{name}.linear.weight"] = (n_out, n_in)
            shapes |= {
                f"{layer}{name}.{end}_{side}": () for end in ("input", "output") for side in ("min", "max")
            }
        for name in NORMS:
            shapes[f"{layer}{name}.weight"] = (D // HEADS if "self_attn" in name else D,)
    drawn = {name: np.asarray(random.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    for name, values in drawn.items():
        if name.endswith(("_min", "_max")):  # bounds that some of the activations exceed
            drawn[name] = (np.abs(values) + np.float32(0.5)) * (1 if name.endswith("_max") else -1)
    return {name: folders.from_bits(np.asarray(values, np.float32)) for name, values in drawn.items()}
