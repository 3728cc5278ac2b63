"""Estimate file sizes and memory per type from the config alone, and choose types that fit a GPU."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydiffusion import _native
from pydiffusion._util.sizes import format_size
from pydiffusion.convert.architectures.architecture import ModelShape
from pydiffusion.convert.architectures.source import read_shape
from pydiffusion.convert.checkpoint.tensor_map import split_name
from pydiffusion.convert.gguf.header import DEFAULT_ALIGNMENT
from pydiffusion.convert.gguf.split import plan_parts
from pydiffusion.convert.quantization import recipes, type_plan
from pydiffusion.errors import ConversionError

# Recipes that :func:`fit` chooses from, best first: among those with about the same bits, the better and, on
# common hardware, faster one. Types that need an imatrix count only with one.
FIT_ORDER = (
    "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_l", "q3_k_m", "iq3_m",
    "q3_k_s", "iq3_xs", "iq3_xxs", "q2_k", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s",
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
    """GPU memory in bytes: weights, KV cache, estimated buffers of a step, and what to keep free besides."""

    weights: int
    cache: int
    buffers: int
    reserve: int

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
    type = recipes.recipe_name(type)
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


def estimate_memory(shape: ModelShape, plan: SizePlan, n_ctx: int = 4096) -> Memory:
    """Estimate the memory of the planned file on one GPU with a session of ``n_ctx`` tokens, as the runtime's
    device planner does: from the file's header. The KV cache is of type "auto".
    """
    lengths = {
        part.key: (0, tensor.shape[-1])
        for part in type_plan.FEED_FORWARDS
        for tensor in plan.tensors
        if split_name(tensor.name)[0] in part.down
    }
    metadata = type_plan.with_lengths(shape.metadata, lengths)
    tensors = [(tensor.name, tensor.type, tensor.shape, tensor.n_bytes) for tensor in plan.tensors]
    (whole,) = plan_parts(Path(), metadata, tensors, DEFAULT_ALIGNMENT)
    use = _native.memory_use(whole.header, n_ctx)
    return Memory(use["weight_bytes"], use["cache_bytes"], use["step_bytes"], use["reserved_bytes"])


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
        needs = recipes.RECIPES[type].needs_imatrix or any(
            tensor.type in recipes.NEEDS_IMATRIX for tensor in candidate.tensors
        )
        if needs and not has_imatrix:
            continue
        smallest = estimate_memory(shape, candidate, n_ctx).total
        if smallest <= n_bytes:
            best = candidate
            break
    if best is None:
        raise ConversionError(
            f"{folder}: nothing fits {format_size(n_bytes)} with a context of {n_ctx}: the smallest type "
            f"takes {format_size(smallest)}{'' if has_imatrix else ' (an imatrix allows smaller ones)'}"
        )
    best = _upgrade(shape, best, given, pad, has_imatrix, n_bytes, n_ctx)
    return best, estimate_memory(shape, best, n_ctx)


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
            fits = estimate_memory(shape, candidate, n_ctx).total <= n_bytes
            if fits and candidate.n_bytes > best.n_bytes:
                best, overrides = candidate, attempt
                break
    return best
