"""Synthetic GGUF files with random but valid blocks, to benchmark full-size models without their weights.

Only a few rows per type and row length are quantized and then repeated through the file, which is written at
disk speed. Routers are fully random, so that tokens spread over the experts; rows of the embedding are mixed
from pieces of rows, so that no two tokens have the same logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np

from pydiffusion import _native
from pydiffusion._util import atomic
from pydiffusion._util.cpus import available_cpus
from pydiffusion.convert.architectures.diffusion_gemma.config import DEFAULT_SAMPLER, DEFAULTS, TextConfig
from pydiffusion.convert.architectures.diffusion_gemma.metadata import model_metadata
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import KINDS, shapes
from pydiffusion.convert.checkpoint.tensor_map import split_name
from pydiffusion.convert.checkpoint.tokenizer_files import IMAGE_TOKENS
from pydiffusion.convert.gguf.header import DEFAULT_ALIGNMENT, Placed, Value, align, pack_header
from pydiffusion.convert.gguf.model_keys import u32
from pydiffusion.convert.gguf.tensor_types import LARGEST_BLOCK
from pydiffusion.convert.quantization.recipes import RECIPES, recipe_name
from pydiffusion.convert.quantization.type_plan import TypePlan, plan_types, with_lengths

_ROWS_MADE = 64
_ROWS_MIXED = 1024  # of the embedding
_PIECE = LARGEST_BLOCK  # weights
_CHUNK = 16 << 20


def _shape(n_layer: int, full_every: int, **sizes: int) -> TextConfig:
    sliding = tuple((i + 1) % full_every != 0 for i in range(n_layer))
    heads_kv = tuple(sizes["heads_kv"] if s else sizes["heads_kv_full"] for s in sliding)
    return TextConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["d"],
        intermediate_size=sizes["dense"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=heads_kv,
        head_dim=sizes["head_dim"],
        global_head_dim=sizes["head_dim_full"],
        sliding=sliding,
        sliding_window=sizes["window"],
        num_experts=sizes["experts"],
        top_k_experts=sizes["used"],
        moe_intermediate_size=sizes["expert"],
        max_position_embeddings=262_144,
        rms_norm_eps=1e-6,
        final_logit_softcapping=30.0,
        rope_theta_sliding=10_000.0,
        rope_theta_full=1_000_000.0,
        n_rotated_pairs=sizes["head_dim_full"] // 8,
        canvas_length=256,
        tied=True,
        token_ids={},
        bidirectional_images=True,
        image_token_ids={key: DEFAULTS[key] for key in IMAGE_TOKENS if DEFAULTS[key] < sizes["vocab"]},
    )


_RELEASED = MappingProxyType(
    {
        "d": 2816, "dense": 2112, "experts": 128, "used": 8, "expert": 704, "vocab": 262_144, "window": 1024,
        "heads": 16, "heads_kv": 8, "heads_kv_full": 2, "head_dim": 256, "head_dim_full": 512,
    }
)  # fmt: skip
#: Shapes by name: the released model; one of 438e6 weights that a laptop denoises in a second; a tiny one.
SHAPES = MappingProxyType(
    {
        "26b-a4b": _shape(30, 6, **_RELEASED),
        "mid": _shape(
            12, 6, d=1024, dense=1536, experts=32, used=4, expert=256, vocab=32_768, window=512,
            heads=8, heads_kv=4, heads_kv_full=1, head_dim=128, head_dim_full=256,
        ),
        "tiny": _shape(
            2, 2, d=256, dense=256, experts=4, used=2, expert=256, vocab=1024, window=32,
            heads=4, heads_kv=2, heads_kv_full=1, head_dim=64, head_dim_full=128,
        ),
        # tiny, with the released model's heads
        "tiny-heads": _shape(
            2, 2, d=256, dense=256, experts=4, used=2, expert=256, vocab=1024, window=32,
            heads=2, heads_kv=1, heads_kv_full=1, head_dim=256, head_dim_full=512,
        ),
        # six of the released model's 30 layers, a fifth of its vocabulary: parts of a step keep their shares
        "26b-a4b-fifth": _shape(6, 6, **{**_RELEASED, "vocab": 52_480}),
    }
)  # fmt: skip
_NORMAL, _CONTROL, _BYTE = 1, 3, 6  # types of tokens


def write_synthetic(
    shape: str, target: Path, type: str = "q4_k_m", progress: Callable[[float], None] | None = None
) -> Path:
    """Write a file of a named shape (see :data:`SHAPES`) and type, with a vocabulary of bytes and numbers.

    progress: called with the fraction written, 0 to 1. Returns ``target``, which is replaced atomically.

    Raises ValueError for an unknown shape or type, ConversionError if it can't be written.
    """
    config = _config(shape, type)
    header, placed = _layout(shape, type)
    total = sum(tensor.n_bytes for tensor in placed)
    target = atomic.resolve_target(target, [], overwrite=True)
    atomic.require_free_space(target.parent, total + len(header))
    made: dict[tuple[str, int], bytes] = {}
    rng = np.random.default_rng(0)
    with atomic.replacing(target) as new:
        new.write(header)
        done = 0
        for tensor in placed:
            _write_tensor(new, tensor, config, made, rng)
            done += tensor.n_bytes
            if progress is not None:
                progress(done / total)
    return target


def synthetic_bytes(shape: str, type: str = "q4_k_m") -> int:
    """Size in bytes of the file that :func:`write_synthetic` would write. Raises ValueError as it does."""
    header, placed = _layout(shape, type)
    return len(header) + align(placed[-1].offset + placed[-1].n_bytes, DEFAULT_ALIGNMENT)


def _config(shape: str, type: str) -> TextConfig:
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; known are {', '.join(SHAPES)}")
    type = recipe_name(type)
    return SHAPES[shape]


def _layout(shape: str, type: str) -> tuple[bytes, list[Placed]]:
    """The file's header, and its tensors with their offsets."""
    config = _config(shape, type)
    plan = plan_types(shapes(config).items(), type, KINDS)
    placed = _place(plan)
    metadata = model_metadata(f"synthetic {shape}", config, DEFAULT_SAMPLER, RECIPES[type].file_type)
    metadata = with_lengths(metadata, plan.lengths) | _tokenizer(config.vocab_size)
    return pack_header(metadata, placed, DEFAULT_ALIGNMENT), placed


def _tokenizer(n_vocab: int) -> dict[str, Value]:
    """Metadata of a byte-level tokenizer."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [_CONTROL] * 4 + [_BYTE] * 256 + [_NORMAL] * (n_vocab - len(tokens))
    tokens += [f"\u2581{i}" for i in range(len(tokens), n_vocab)]
    return {
        "tokenizer.ggml.model": Value("str", "gemma4"),
        "tokenizer.ggml.tokens": Value("array[str]", tokens),
        "tokenizer.ggml.token_type": Value("array[i32]", types),
        "tokenizer.ggml.merges": Value("array[str]", []),
        "tokenizer.ggml.eos_token_id": u32(1),
        "tokenizer.ggml.bos_token_id": u32(2),
        "tokenizer.ggml.unknown_token_id": u32(3),
        "tokenizer.ggml.padding_token_id": u32(0),
        "tokenizer.ggml.add_bos_token": Value("bool", True),
    }


def _place(plan: TypePlan) -> list[Placed]:
    placed, offset = [], 0
    for name, planned in plan.tensors.items():
        type_name, shape = planned.type, planned.shape
        _, n_weights, n_block_bytes = _native.tensor_types()[type_name]
        n_bytes = math.prod(shape) // n_weights * n_block_bytes
        placed.append(Placed(name, type_name, shape, offset, n_bytes))
        offset = align(offset + n_bytes, DEFAULT_ALIGNMENT)
    return placed


def _write_tensor(
    new: atomic.NewFile,
    tensor: Placed,
    config: TextConfig,
    made: dict[tuple[str, int], bytes],
    rng: np.random.Generator,
) -> None:
    if split_name(tensor.name)[0] in KINDS.float32:
        new.write(_float_values(tensor, config, rng).astype("<f4").tobytes())
    elif tensor.name == "token_embd.weight":
        _write_mixed_rows(new, tensor, rng)
    else:
        key = (tensor.type, tensor.shape[-1])
        if key not in made:
            rows = rng.standard_normal((_ROWS_MADE, tensor.shape[-1]), dtype=np.float32) * 0.02
            made[key] = _native.quantize_rows(rows, tensor.type, available_cpus()).tobytes()
        pattern = made[key] * max(1, _CHUNK // len(made[key]))
        for begin in range(0, tensor.n_bytes, len(pattern)):
            new.write(memoryview(pattern)[: tensor.n_bytes - begin])
    new.write(bytes(align(tensor.n_bytes, DEFAULT_ALIGNMENT) - tensor.n_bytes))


def _write_mixed_rows(new: atomic.NewFile, tensor: Placed, rng: np.random.Generator) -> None:
    """Write rows mixed from random pieces: if whole rows were repeated, thousands of tokens would tie at
    every position, and no temperature would give a peaked distribution.
    """
    n_rows, n_columns = tensor.shape
    n_pieces = n_columns // math.gcd(n_columns, _PIECE)
    rows = rng.standard_normal((_ROWS_MIXED, n_columns), dtype=np.float32) * 0.02
    blocks = _native.quantize_rows(rows, tensor.type, available_cpus())
    pieces = blocks.reshape(_ROWS_MIXED * n_pieces, -1)
    step = max(1, _CHUNK // (n_pieces * pieces.shape[1]))
    for begin in range(0, n_rows, step):
        chosen = rng.integers(0, len(pieces), (min(step, n_rows - begin), n_pieces))
        new.write(pieces[chosen].tobytes())


def _float_values(tensor: Placed, config: TextConfig, rng: np.random.Generator) -> np.ndarray:
    if tensor.name == "rope_freqs.weight":
        values = np.full(tensor.shape, 1e30)
        values[: config.n_rotated_pairs] = 1.0
        return values
    if tensor.name.endswith("ffn_gate_inp.weight"):
        return rng.standard_normal(tensor.shape)
    return np.full(tensor.shape, 0.3 if "_q_norm" in tensor.name or "_k_norm" in tensor.name else 1.0)
