"""Estimate file sizes and memory per type from the config alone, and choose types that fit a GPU."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydiffusion.convert.architectures.architecture import ModelShape
from pydiffusion.convert.architectures.source import read_shape
from pydiffusion.convert.checkpoint.tensor_map import split_name
from pydiffusion.convert.quantization import recipes, type_plan
from pydiffusion.errors import ConversionError

# Reserved for the driver, the process and the display.
RESERVE = 640 << 20
_ENCODE_CHUNK = 512  # tokens per encoder batch of the runtime
_ATTENTION_TILE = 64  # KV rows per attention tile of the runtime
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

# Recipes that :func:`fit` chooses from, best first: among those with about the same bits, the better and, on
# common hardware, faster one. Types that need an imatrix count only with one.
FIT_ORDER = (
    "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_l", "q3_k_m", "iq3_m",
    "q3_k_s", "iq3_xxs", "q2_k", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s",
)  # fmt: skip
# Upgrades for the remaining bytes, in this order: parts that every token passes, small compared to the
# experts.
UPGRADES = (
    (r"\.attn_(q|k|v|output)\.", ("q8_0", "q6_k", "q5_k")),
    (r"^(token_embd|output)\.", ("q8_0", "q6_k")),
    (r"\.ffn_(gate|up|down)\.|^self_cond_", ("q8_0", "q6_k", "q5_k")),
)


@dataclass(frozen=True)
class TensorSize:
    """A tensor of the planned file; ``n_weights`` excludes padding."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class SizePlan:
    """Sizes of a planned conversion. ``n_bytes`` is the size of the tensors, without the header."""

    type: str
    overrides: tuple[tuple[str, str], ...]
    tensors: list[TensorSize]
    fallbacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def n_weights(self) -> int:
        """Weights without padding."""
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the checkpoint; padding adds bits but no weights."""
        return 8 * self.n_bytes / max(1, self.n_weights)

    def by_kind(self) -> list[tuple[str, str, int, int, int]]:
        """(kind, type, number of tensors, weights, bytes) in the order of the file."""
        groups: dict[tuple[str, str], list[int]] = {}
        for tensor in self.tensors:
            group = groups.setdefault((split_name(tensor.name)[0], tensor.type), [0, 0, 0])
            for i, amount in enumerate((1, tensor.n_weights, tensor.n_bytes)):
                group[i] += amount
        return [(*key, group[0], group[1], group[2]) for key, group in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        """All fields and sums, ready for ``json.dumps``."""
        extra = {name: getattr(self, name) for name in ("n_weights", "n_bytes", "bits_per_weight")}
        return dataclasses.asdict(self) | extra


@dataclass(frozen=True)
class Memory:
    """GPU memory in bytes: weights, KV cache, and an estimate of a step's buffers."""

    weights: int
    cache: int
    buffers: int
    reserve: int = RESERVE

    @property
    def total(self) -> int:
        """Sum of the above."""
        return self.weights + self.cache + self.buffers + self.reserve


def plan_sizes(
    folder: str | os.PathLike[str],
    type: str = "q4_k_m",
    *,
    pad: bool | None = None,
    tensor_types: type_plan.Overrides | Mapping[str, str] = (),
    has_imatrix: bool = False,
) -> SizePlan:
    """Plan the output of :func:`convert`; needs only ``config.json`` of the folder.

    Raises as ``convert`` for config and arguments.
    """
    return _plan(read_shape(folder), type, pad, type_plan.as_pairs(tensor_types), has_imatrix)


def _plan(
    shape: ModelShape, type: str, pad: bool | None, overrides: type_plan.Overrides, has_imatrix: bool
) -> SizePlan:
    if type not in recipes.RECIPES:
        raise ValueError(f"type is {type!r}; known are {', '.join(recipes.TYPES)}")
    types = type_plan.plan_types(
        shape.tensors.items(), type, shape.kinds, pad=pad, overrides=overrides, has_imatrix=has_imatrix
    )
    tensors = [
        TensorSize(
            name, t.type, t.shape, math.prod(shape.tensors[name]), type_plan.tensor_bytes(t.type, t.shape)
        )
        for name, t in types.tensors.items()
    ]
    return SizePlan(type, tuple(overrides), tensors, types.fallbacks, types.notes)


def estimate_memory(shape: ModelShape, weights: int, n_ctx: int = 4096) -> Memory:
    """Estimate the memory of a session of ``n_ctx`` tokens with a 16-bit KV cache.

    Sliding layers keep two windows (at least one and an attention tile) and a batch, full layers the whole
    context. The buffers are approximately those of the larger of a step and a prompt chunk: logits, the
    layers' activations, masks.
    """
    batch = max(_ENCODE_CHUNK, shape.canvas_length)
    cache = 0
    for layer in shape.layers:
        rows = n_ctx
        if layer.window is not None:
            rows = min(n_ctx, layer.window + max(layer.window, _ATTENTION_TILE) + batch)
        cache += 2 * 2 * rows * layer.width
    logits = 4 * shape.canvas_length * shape.vocab_size
    return Memory(weights, cache, logits + 4 * batch * shape.activations + 2 * batch * n_ctx)


def fit(
    folder: str | os.PathLike[str],
    n_bytes: int,
    *,
    n_ctx: int = 4096,
    pad: bool | None = None,
    tensor_types: type_plan.Overrides | Mapping[str, str] = (),
    has_imatrix: bool = False,
) -> tuple[SizePlan, Memory]:
    """Choose the best recipe whose weights, cache and buffers fit ``n_bytes`` of memory.

    Remaining bytes go to attention, embedding and dense MLP (:data:`UPGRADES`), as overrides after those of
    ``tensor_types``. Raises ConversionError if nothing fits.
    """
    shape = read_shape(folder)
    given = type_plan.as_pairs(tensor_types)
    best: SizePlan | None = None
    smallest = 0
    for type in FIT_ORDER:
        candidate = _plan(shape, type, pad, given, has_imatrix)
        needs = any(tensor.type in recipes.NEEDS_IMATRIX for tensor in candidate.tensors)
        if needs and not has_imatrix:
            continue
        smallest = estimate_memory(shape, candidate.n_bytes, n_ctx).total
        if smallest <= n_bytes:
            best = candidate
            break
    if best is None:
        raise ConversionError(
            f"{folder}: nothing fits {n_bytes / 2**30:.1f} GiB with a context of {n_ctx}: the smallest type "
            f"takes {smallest / 2**30:.1f} GiB{'' if has_imatrix else ' (an imatrix allows smaller ones)'}"
        )
    best = _upgrade(shape, best, given, pad, has_imatrix, n_bytes, n_ctx)
    return best, estimate_memory(shape, best.n_bytes, n_ctx)


def _upgrade(
    shape: ModelShape,
    best: SizePlan,
    given: type_plan.Overrides,
    pad: bool | None,
    has_imatrix: bool,
    n_bytes: int,
    n_ctx: int,
) -> SizePlan:
    overrides: list[tuple[str, str]] = list(given)
    for pattern, choices in UPGRADES:
        for choice in choices:
            attempt = [*overrides, (pattern, choice)]
            try:
                candidate = _plan(shape, best.type, pad, attempt, has_imatrix)
            except ConversionError:  # all matching tensors are overridden already
                break
            fits = estimate_memory(shape, candidate.n_bytes, n_ctx).total <= n_bytes
            if fits and candidate.n_bytes > best.n_bytes:
                best, overrides = candidate, attempt
                break
    return best


def parse_size(text: str) -> int:
    """Parse ``16G`` (binary), ``12GiB``, ``900M`` to bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a size; write for example 16G")
    return int(float(match[1]) * _UNITS[match[2].upper()])
