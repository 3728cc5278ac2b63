"""Small random checkpoints of masked-toy, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import bell
from reference.toy_tokenizer import CHAT_TEMPLATE, tokenizer_config, tokenizer_json

from pydiffusion.convert.architectures import registry
from support.checkpoint_folders import write_json, write_safetensors
from support.toy.architecture import MASKED_TOY

MASK = 4  # the tokenizer's <mask>


#: Sizes that differ from those of :class:`Shape`: a KV head for each query head, for two, one for all.
SHAPES: dict[str, dict[str, int]] = {
    "equal heads": {},
    "grouped heads": {"d": 128, "n_head": 4, "n_head_kv": 2, "head_dim": 64, "ff": 192, "n_layer": 3},
    "one KV head": {"n_head": 4, "n_head_kv": 1},
}


@contextmanager
def registered() -> Iterator[None]:
    """The converter knows masked-toy within the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "ARCHITECTURES", list(registry.ARCHITECTURES))
        registry.register(MASKED_TOY)
        yield


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint."""

    d: int = 64
    n_layer: int = 2
    n_head: int = 2
    n_head_kv: int = 2
    head_dim: int = 32
    ff: int = 96
    vocab: int = 384
    canvas: int = 16
    context: int = 1024
    steps: int = 8


def config_json(shape: Shape) -> dict[str, object]:
    """``config.json``."""
    return {
        "architectures": ["MaskedToyForBlockDiffusion"],
        "model_type": "masked_toy",
        "vocab_size": shape.vocab,
        "hidden_size": shape.d,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head_kv,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ff,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "final_logit_softcapping": 30.0,
        "canvas_length": shape.canvas,
        "mask_token_id": MASK,
        "max_denoising_steps": shape.steps,
    }


def weights(seed: int, shape: Shape) -> dict[str, np.ndarray]:
    """All tensors by name, float32. Norms are random too: ones hide bugs."""
    d, q, kv = shape.d, shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim

    def matrix(name: str, n_rows: int, n_columns: int, gain: float = 1.0) -> None:
        tensors[name] = bell(seed, name, (n_rows, n_columns), gain * n_columns**-0.5)

    def norm(name: str, n: int, mean: float = 1.0) -> None:
        tensors[name] = bell(seed, name, (n,), 0.2, mean)

    tensors: dict[str, np.ndarray] = {}
    tensors["embed_tokens.weight"] = bell(seed, "embed", (shape.vocab, d), 1.0)
    for i_layer in range(shape.n_layer):
        layer = f"layers.{i_layer}."
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            norm(f"{layer}{name}_layernorm.weight", d)
        matrix(layer + "self_attn.q_proj.weight", q, d)
        matrix(layer + "self_attn.k_proj.weight", kv, d)
        matrix(layer + "self_attn.v_proj.weight", kv, d)
        matrix(layer + "self_attn.o_proj.weight", d, q)
        norm(layer + "self_attn.q_norm.weight", shape.head_dim, mean=1.5)  # attention that tells tokens apart
        norm(layer + "self_attn.k_norm.weight", shape.head_dim)
        matrix(layer + "mlp.gate_proj.weight", shape.ff, d)
        matrix(layer + "mlp.up_proj.weight", shape.ff, d)
        matrix(layer + "mlp.down_proj.weight", d, shape.ff)
    norm("self_conditioning.norm.weight", d)
    # Small: step after step, a large one would make of rounding another text.
    matrix("self_conditioning.proj.weight", d, d, gain=0.25)
    norm("norm.weight", d)
    matrix("lm_head.weight", shape.vocab, d, gain=5.0)  # logits that differ, and reach the soft cap's bend
    tensors["lm_head.weight"][MASK] = 0  # as trained models, it predicts no mask
    return tensors


def write_checkpoint(
    folder: Path, seed: int = 0, tensors: dict[str, np.ndarray] | None = None, **shape: int
) -> Path:
    """Write a folder as Hugging Face has it: config, weights (random ones unless given), tokenizer.

    shape: sizes that differ from :class:`Shape`'s.
    """
    sizes = Shape(**shape)
    tensors = weights(seed, sizes) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_json(sizes))
    write_safetensors(folder / "model.safetensors", tensors, dict.fromkeys(tensors, "F32"))
    write_json(folder / "tokenizer.json", tokenizer_json(sizes.vocab))
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder
