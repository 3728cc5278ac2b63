"""Small random DiffusionGemma checkpoints, the same on every machine, made without torch.

Every weight comes from numpy's raw Philox words through integer arithmetic, so that the folder written here
is bit for bit the one that the goldens were recorded from (``digest`` tells when that stops being true).
Nothing keeps its default: every norm weight, scale and scalar is random, because ones and zeros hide bugs.

Run as a script to get a folder to play with:
    cd tests && python -m reference.random_checkpoint small /tmp/folder
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reference.toy_tokenizer import CHAT_TEMPLATE, tokenizer_config, tokenizer_json


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint; ``layers`` is one letter per layer: s(liding) or f(ull)."""

    d: int
    layers: str
    n_head: int
    n_head_kv: int
    head_dim: int
    n_head_kv_full: int
    head_dim_full: int
    dense: int
    expert: int
    n_expert: int
    n_expert_used: int
    window: int
    canvas: int
    vocab: int
    context: int = 1024
    gain: float = 1.5  # of what a layer adds; beyond 1 the tied head no longer just repeats the canvas


#: Sizes that bite: rows that are no multiple of 256 (dense, expert), grouped queries with another group on
#: full layers, a window shorter and longer than the canvas, and more than one run of sliding layers.
SHAPES: dict[str, Shape] = {
    "tiny": Shape(64, "sf", 2, 1, 16, 1, 32, 96, 32, 4, 2, 6, 4, 384, context=64),
    "small": Shape(256, "ssf", 4, 2, 64, 1, 128, 320, 64, 6, 2, 16, 8, 512),
    "wide": Shape(256, "ssfssf", 4, 4, 64, 2, 128, 512, 256, 4, 3, 12, 16, 512),
    # The sizes of the files in circulation, and as calm as they are.
    "mild": Shape(256, "sssf", 2, 1, 64, 1, 128, 320, 64, 6, 2, 16, 8, 512, gain=1.0),
}


def words(seed: int, name: str, n: int) -> np.ndarray:
    """``n`` raw 64-bit words of a stream that belongs to ``name`` alone, so that order does not matter."""
    key = np.array([seed, zlib.crc32(name.encode())], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(n)


def bell(seed: int, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> np.ndarray:
    """Float32 of bell-shaped density: four 16-bit uniforms added up, which no library version can change."""
    raw = words(seed, name, int(np.prod(shape)))
    total = sum((raw >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)).astype(np.int64) - 2 * 65535
    # Four uniforms of width 2^16 have a variance of 4 * 2^32 / 12.
    unit = total.astype(np.float64) / (65536 / 3**0.5)
    return (mean + std * unit).astype(np.float32).reshape(shape)


def uniform(seed: int, name: str, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """Float32 uniform values in [low, high)."""
    unit = (words(seed, name, int(np.prod(shape))) >> np.uint64(40)).astype(np.float64) / 2**24
    return (low + (high - low) * unit).astype(np.float32).reshape(shape)


def random_ids(seed: int, name: str, n: int, n_vocab: int) -> np.ndarray:
    """``n`` int32 token ids of the whole vocabulary."""
    return ((words(seed, name, n) >> np.uint64(32)) * np.uint64(n_vocab) >> np.uint64(32)).astype(np.int32)


def text_tensors(s: Shape, seed: int) -> dict[str, np.ndarray]:
    """The backbone under its checkpoint names, float32."""
    out: dict[str, np.ndarray] = {}

    def matrix(name: str, *shape: int, gain: float = 1.0) -> None:
        out[name] = bell(seed, name, shape, gain / shape[-1] ** 0.5)

    def norm(name: str, n: int, mean: float = 1.0) -> None:
        out[name] = bell(seed, name, (n,), 0.3 * mean, mean)

    # Embeddings of std 0.4 give logits of up to about 25, under the soft cap of 30.
    out["model.decoder.embed_tokens.weight"] = bell(seed, "embed", (s.vocab, s.d), 6.4 / s.d**0.5)
    norm("model.decoder.norm.weight", s.d)
    for i, kind in enumerate(s.layers):
        p = f"model.decoder.layers.{i}."
        head_dim, n_kv = (s.head_dim, s.n_head_kv) if kind == "s" else (s.head_dim_full, s.n_head_kv_full)
        matrix(p + "self_attn.q_proj.weight", s.n_head * head_dim, s.d)
        matrix(p + "self_attn.k_proj.weight", n_kv * head_dim, s.d)
        if kind == "s":
            matrix(p + "self_attn.v_proj.weight", n_kv * head_dim, s.d)
        matrix(p + "self_attn.o_proj.weight", s.d, s.n_head * head_dim)
        # Near 0.3 the attention scores stay of order one: a sharper random attention is chaotic.
        norm(p + "self_attn.q_norm.weight", head_dim, 0.3)
        norm(p + "self_attn.k_norm.weight", head_dim, 0.3)
        matrix(p + "mlp.gate_proj.weight", s.dense, s.d)
        matrix(p + "mlp.up_proj.weight", s.dense, s.d)
        matrix(p + "mlp.down_proj.weight", s.d, s.dense)
        norm(p + "input_layernorm.weight", s.d)
        norm(p + "post_attention_layernorm.weight", s.d, s.gain)
        norm(p + "post_feedforward_layernorm.weight", s.d, s.gain)
        for which in ("pre_feedforward_layernorm", "pre_feedforward_layernorm_2"):
            norm(p + which + ".weight", s.d)
        for which in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
            norm(p + which + ".weight", s.d)
        # A router of std 2 keeps the chosen experts apart from the rest by more than rounding.
        out[p + "router.proj.weight"] = bell(seed, p + "router", (s.n_expert, s.d), 2.0)
        norm(p + "router.scale", s.d)
        norm(p + "router.per_expert_scale", s.n_expert)
        matrix(p + "experts.gate_up_proj", s.n_expert, 2 * s.expert, s.d)
        matrix(p + "experts.down_proj", s.n_expert, s.d, s.expert)
        out[p + "layer_scalar"] = uniform(seed, p + "scalar", (1,), 0.6, 1.1)
        encoder = f"model.encoder.language_model.layers.{i}.layer_scalar"
        out[encoder] = uniform(seed, encoder, (1,), 0.6, 1.1)
    p = "model.decoder.self_conditioning."
    norm(p + "pre_norm.weight", s.d)
    matrix(p + "gate_proj.weight", s.dense, s.d)
    matrix(p + "up_proj.weight", s.dense, s.d)
    # Loud enough beside an embedding of rms 6.4 to be missed when it is left out; much louder, and a chain of
    # steps that condition each other multiplies every rounding.
    matrix(p + "down_proj.weight", s.d, s.dense, gain=3.0)
    return out


def vision_tensors(s: Shape, seed: int) -> dict[str, np.ndarray]:
    """A vision tower of toy size: the class insists on one, and a converter must pass it by."""
    tower = "model.encoder.vision_tower."
    layer = tower + "encoder.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.encoder.embed_vision.embedding_projection.weight": (s.d, 16),
        tower + "patch_embedder.input_proj.weight": (16, 768),
        tower + "patch_embedder.position_embedding_table": (2, 16, 16),
    }
    for which in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes[f"{layer}{which}_layernorm.weight"] = (16,)
    for which in ("gate", "up", "down"):
        shapes[f"{layer}mlp.{which}_proj.linear.weight"] = (16, 16)
    for which in "qkvo":
        shapes[f"{layer}self_attn.{which}_proj.linear.weight"] = (16, 16)
    for which in "qk":
        shapes[f"{layer}self_attn.{which}_norm.weight"] = (8,)
    return {name: bell(seed, name, shape, 0.1, 0.5) for name, shape in shapes.items()}


def text_config(s: Shape, style: str) -> dict[str, object]:
    """``text_config`` as ``save_pretrained`` of 5.23 writes it ("saved") or as Google does ("google")."""
    config: dict[str, object] = {
        "model_type": "diffusion_gemma_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "head_dim": s.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": s.d,
        "initializer_range": 0.02,
        "intermediate_size": s.dense,
        "layer_types": ["sliding_attention" if kind == "s" else "full_attention" for kind in s.layers],
        "max_position_embeddings": s.context,
        "moe_intermediate_size": s.expert,
        "num_attention_heads": s.n_head,
        "num_experts": s.n_expert,
        "num_hidden_layers": len(s.layers),
        "num_key_value_heads": s.n_head_kv,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "sliding_window": s.window,
        "tie_word_embeddings": True,
        "top_k_experts": s.n_expert_used,
        "use_bidirectional_attention": None,
        "vocab_size": s.vocab,
    }
    if style == "google":
        config |= {
            "global_head_dim": s.head_dim_full,
            "num_global_key_value_heads": s.n_head_kv_full,
            "final_logit_softcapping": 30.0,
        }
    elif style == "saved":
        override = {"head_dim": s.head_dim_full, "num_key_value_heads": s.n_head_kv_full}
        config["per_layer_config"] = {str(i): override for i, kind in enumerate(s.layers) if kind == "f"}
    else:
        raise ValueError(f"config style {style!r}: expected 'saved' or 'google'")
    return config


def config_json(s: Shape, style: str, dtype: str) -> dict[str, object]:
    """The whole ``config.json``."""
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "boi_token_id": 255999,
        "eoi_token_id": 258882,
        "image_token_id": 258880,
        "canvas_length": s.canvas,
        "dtype": {"f32": "float32", "bf16": "bfloat16"}[dtype],
        "initializer_range": 0.02,
        "model_type": "diffusion_gemma",
        "text_config": text_config(s, style),
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
        "vision_config": {
            "model_type": "gemma4_vision",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": 8,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 2,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "position_embedding_size": 16,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
            "standardize": False,
            "use_clipped_linears": False,
        },
    }


GENERATION_CONFIG: dict[str, object] = {
    "bos_token_id": 2,
    "eos_token_id": [1, 6],
    "pad_token_id": 0,
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "transformers_version": "5.23.0",
}


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 (nearest, ties to even), as uint16 bit patterns."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Write float32 tensors as F32 or BF16. By hand: safetensors' numpy side has no bfloat16."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        blob = (to_bf16(tensors[name]) if dtype == "bf16" else tensors[name]).tobytes()
        span = [offset, offset + len(blob)]
        header[name] = {"dtype": dtype.upper(), "shape": list(tensors[name].shape), "data_offsets": span}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.writelines(blobs)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(
    folder: Path,
    shape: str | Shape,
    *,
    seed: int = 0,
    dtype: str = "f32",
    style: str = "saved",
    shards: int = 1,
) -> Path:
    """Write a Hugging Face folder of a shape, or of ``SHAPES[shape]``, and return it.

    ``dtype`` is "f32" or "bf16", ``style`` the form of config.json ("saved" or "google"), ``shards`` the
    number of safetensors files.
    """
    s = SHAPES[shape] if isinstance(shape, str) else shape
    folder.mkdir(parents=True, exist_ok=True)
    tensors = text_tensors(s, seed) | vision_tensors(s, seed)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
    else:
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = names[i::shards]
            write_safetensors(folder / file, {name: tensors[name] for name in part}, dtype)
            weight_map |= dict.fromkeys(part, file)
        total = sum(t.size for t in tensors.values()) * (2 if dtype == "bf16" else 4)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config_json(s, style, dtype))
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    write_json(folder / "tokenizer.json", tokenizer_json(s.vocab))
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def digest(shape: str, seed: int = 0) -> str:
    """SHA-256 of the text weights: equal digests mean equal checkpoints."""
    h = hashlib.sha256()
    for name, tensor in sorted(text_tensors(SHAPES[shape], seed).items()):
        h.update(name.encode() + b"\0" + tensor.astype("<f4").tobytes())
    return h.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--style", choices=("saved", "google"), default="saved")
    parser.add_argument("--shards", type=int, default=1)
    args = parser.parse_args()
    write_checkpoint(
        args.folder, args.shape, seed=args.seed, dtype=args.dtype, style=args.style, shards=args.shards
    )
    print(args.folder)


if __name__ == "__main__":
    main()
