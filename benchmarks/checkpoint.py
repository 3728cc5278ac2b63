"""Create random sharded bf16 checkpoints, large enough for benchmarks.

    python benchmarks/checkpoint.py odd FOLDER

plain: 438e6 weights, row lengths that are multiples of 256. odd: 282e6 weights, with the released model's
feed-forward lengths 2112 and 704, which are not multiples of a k-quant's block size. released: 2.4e9 weights,
one sliding and one full layer of the released model's sizes. Matrices preserve the scale of activations,
norms and scales are near 1, and columns have different scales, so that rounding errors stay visible instead
of being amplified chaotically. Results do not carry over to trained weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import wanted_tensors
from pydiffusion.convert.architectures.source import read_config

SHARD_BYTES = 200e6
_CHUNK = 1 << 22  # weights generated at a time


@dataclass(frozen=True)
class Shape:
    n_layers: int
    dense: int
    expert: int
    n_experts: int
    vocab: int
    canvas: int
    d: int = 1024
    n_heads: int = 8
    head_dim: int = 128
    global_head_dim: int = 256
    n_kv_heads: int = 4
    n_global_kv_heads: int = 2
    n_experts_used: int = 4


SHAPES = MappingProxyType(
    {
        "plain": Shape(n_layers=12, dense=1536, expert=256, n_experts=32, vocab=32768, canvas=256),
        "odd": Shape(n_layers=6, dense=2112, expert=704, n_experts=16, vocab=8192, canvas=64),
        "released": Shape(
            n_layers=2, dense=2112, expert=704, n_experts=128, vocab=262_144, canvas=256, d=2816, n_heads=16,
            head_dim=256, global_head_dim=512, n_kv_heads=8, n_global_kv_heads=2, n_experts_used=8,
        ),
    }
)  # fmt: skip


def sliding_layers(n_layers: int) -> list[bool]:
    """Return which layers are sliding: every sixth and the last one are full."""
    return [(i + 1) % 6 != 0 and i + 1 < n_layers for i in range(n_layers)]


def make_checkpoint(folder: Path, shape: Shape) -> tuple[int, int]:
    """Write the checkpoint; return (number of weights, bytes of safetensors)."""
    write_json(folder / "config.json", config(shape))
    write_json(folder / "tokenizer.json", tokenizer(shape.vocab))
    random = np.random.default_rng(0)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    n_weights = filled = 0
    _, text_config = read_config(folder, [])
    for want in wanted_tensors(text_config):
        size = 2 * int(np.prod(want.shape))
        if filled and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][f"model.{want.source}"] = want.shape
        filled += size
        n_weights += size // 2
    weight_map = {}
    for i_shard, shard in enumerate(shards):
        name = f"model-{i_shard + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / name, shard, random)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 2 * n_weights}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return n_weights, sum((folder / name).stat().st_size for name in set(weight_map.values()))


@contextlib.contextmanager
def given_or_created(folder: Path | None) -> Iterator[tuple[Path, Path]]:
    """Yield (``folder`` or a new checkpoint of the "plain" shape, output folder); removes what it created."""
    with tempfile.TemporaryDirectory(dir=folder and folder.parent) as temporary:
        if folder is None:
            folder = Path(temporary) / "random"
            folder.mkdir()
            make_checkpoint(folder, SHAPES["plain"])
        yield folder, Path(temporary)


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], random: np.random.Generator) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            mean, std = distribution(name, shape)
            columns = np.exp(0.4 * random.standard_normal(shape[-1], np.float32))
            columns *= np.float32(std / np.sqrt((columns**2).mean()))
            n_rows = int(np.prod(shape[:-1]))
            step = max(1, _CHUNK // shape[-1])
            for start in range(0, n_rows, step):
                values = random.standard_normal((min(step, n_rows - start), shape[-1]), np.float32)
                values = values * columns + np.float32(mean)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return mean and standard deviation of a tensor's weights."""
    if "embed_tokens" in name:
        return 0.0, 6.4 / shape[-1] ** 0.5  # the largest logits are near the soft cap
    if "router.proj" in name:
        return 0.0, 2.0  # separates the selected experts from the rest by more than rounding
    if len(shape) > 1:
        return 0.0, (3.0 if "self_conditioning.down" in name else 1.0) / shape[-1] ** 0.5
    if "q_norm" in name or "k_norm" in name:
        return 0.3, 0.03  # sharper random attention is chaotic
    return (0.85, 0.1) if "layer_scalar" in name else (1.0, 0.1)


def config(shape: Shape) -> dict[str, Any]:
    sliding = sliding_layers(shape.n_layers)
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": shape.vocab,
        "hidden_size": shape.d,
        "intermediate_size": shape.dense,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "num_global_key_value_heads": shape.n_global_kv_heads,
        "head_dim": shape.head_dim,
        "global_head_dim": shape.global_head_dim,
        "num_experts": shape.n_experts,
        "top_k_experts": shape.n_experts_used,
        "moe_intermediate_size": shape.expert,
        "sliding_window": 1024,
        "max_position_embeddings": 32768,
        "layer_types": ["sliding_attention" if one else "full_attention" for one in sliding],
    }
    return {"model_type": "diffusion_gemma", "canvas_length": shape.canvas, "text_config": text}


def tokenizer(n_tokens: int) -> dict[str, Any]:
    """Return a tokenizer.json with n_tokens tokens, with merges for all that are not bytes."""
    texts = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [chr(0x4E00 + i) for i in range(512)]
    pairs = [(a, b) for a in letters for b in letters][: n_tokens - len(texts) - len(letters)]
    texts += letters + [a + b for a, b in pairs]
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True}
    model |= {"vocab": {text: i for i, text in enumerate(texts)}, "merges": [list(pair) for pair in pairs]}
    added = [{"id": i, "content": text, "special": True} for i, text in enumerate(texts[:5])]
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    return {"added_tokens": added, "normalizer": normalizer, "pre_tokenizer": None, "model": model}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path, help="created if missing")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    n_weights, n_bytes = make_checkpoint(arguments.folder, SHAPES[arguments.shape])
    print(f"{arguments.folder}: {n_weights / 1e6:.0f}e6 weights, {n_bytes / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
