"""Type plan: apply a recipe to a model, with the type of each tensor and the padding of feed-forward lengths.

Rows of ``ffn_down`` and ``ffn_down_exps`` have the feed-forward length, 2112 and 704 in the released model,
which is not a multiple of the 256 weights of a k-quant block. There are two solutions:

- *fallback*: another type for those rows, with more bits and several times slower on a CPU;
- *padding*: longer feed-forward parts whose new rows in gate and up, and new columns in down, are zero. The
  output is exactly the same, since act(0) * 0 = 0, and the file is an ordinary one with another
  feed-forward length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from pydiffusion import _native
from pydiffusion.convert.checkpoint.tensor_map import TensorKinds, split_name
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.tensor_types import BLOCK_SIZES, LARGEST_BLOCK, fit_to_rows
from pydiffusion.convert.quantization.recipes import LAYERS, NEEDS_IMATRIX, RECIPES, Recipe
from pydiffusion.errors import ConversionError

Shapes = Mapping[str, tuple[int, ...]]
# Name patterns and their types; the first match counts.
Overrides = Sequence[tuple[str, str]]

# Maximum size of padding relative to the fallback: below it, the k-quants' speed is worth the bytes.
MAX_PADDING_COST = 1.06
_HEAD_KINDS = ("token_embd", "output")


@dataclass(frozen=True)
class FeedForward:
    """Tensors that share a feed-forward length, and its metadata key (after the architecture)."""

    key: str
    gate_up: tuple[str, ...]
    down: tuple[str, ...]


# The self-conditioning MLP has the dense length and is padded with it.
FEED_FORWARDS = (
    FeedForward(
        "feed_forward_length",
        ("ffn_gate", "ffn_up", "self_cond_gate", "self_cond_up"),
        ("ffn_down", "self_cond_down"),
    ),
    FeedForward(
        "expert_feed_forward_length",
        ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps"),
        ("ffn_down_exps",),
    ),
)
FUSED_KIND = "ffn_gate_up_exps"  # gate's rows, then up's, in one matrix per expert


@dataclass(frozen=True)
class PlannedType:
    """Target type and shape of a tensor; ``shape`` differs from the source's if it is padded."""

    type: str
    shape: tuple[int, ...]


@dataclass
class TypePlan:
    """Plan of all tensors, in source order; ``lengths``: key -> (old, new) feed-forward length."""

    tensors: dict[str, PlannedType] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    lengths: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan_types(
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    recipe_name: str,
    kinds: TensorKinds,
    *,
    pad: bool | None = None,
    overrides: Overrides = (),
    kept: Iterable[str] = (),
    has_imatrix: bool = False,
) -> TypePlan:
    """Apply a recipe.

    Args:
        tensors: names of GGUF tensors and their shapes (C order).
        recipe_name: one of :data:`~pydiffusion.convert.TYPES`.
        kinds: those of the tensors' architecture.
        pad: True pads every feed-forward length to a multiple of 256, False none, None those for which the
            file gets smaller or hardly larger than with fallbacks.
        overrides: regular expressions, searched in the name, and the types of matching tensors.
        kept: tensors that the source has in the recipe's own type, which stay as they are unless overridden.
        has_imatrix: some recipes depend on it.

    Raises:
        ConversionError: an override matches no quantizable tensor; a tensor name of another architecture.
        ValueError: an override's type or expression is invalid.
    """
    shapes = dict(tensors)
    recipe = RECIPES[recipe_name]
    wanted = _wanted_types(shapes, recipe, kinds, has_imatrix)
    wanted.update(dict.fromkeys(kept, recipe_name.upper()))
    _override(wanted, overrides, kinds)
    plan = TypePlan(notes=[f"{recipe_name} is {recipe.note}"] if recipe.note else [])
    padded = dict(shapes)
    for part in FEED_FORWARDS:
        _pad(plan, part, shapes, padded, wanted, pad)
    for name, shape in padded.items():
        type_name = _fit(name, wanted[name], shape[-1])
        if type_name != wanted[name]:
            plan.fallbacks.append(f"{name}: {wanted[name]} -> {type_name} (rows of {shape[-1]})")
        plan.tensors[name] = PlannedType(type_name, shape)
    return plan


def check_overrides(overrides: Overrides) -> None:
    """Raise ValueError for a type that can't be written or an invalid regular expression."""
    for pattern, type_name in overrides:
        if type_name.upper() not in BLOCK_SIZES:
            known = ", ".join(BLOCK_SIZES).lower()
            raise ValueError(f"{type_name!r} is not a writable tensor type; known are {known}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from None


def require_imatrix(plan: TypePlan, recipe_name: str, has_imatrix: bool, covered: Iterable[str] = ()) -> None:
    """Raise ConversionError if the recipe needs an imatrix and there is none, or a tensor's type needs an
    entry in it and has none.
    """
    if RECIPES[recipe_name].needs_imatrix and not has_imatrix:
        raise ConversionError(
            f"{recipe_name} needs an imatrix; make one with `pydiffusion imatrix`, or choose another type"
        )
    covered = set(covered)
    missing = [n for n, t in plan.tensors.items() if t.type in NEEDS_IMATRIX and n not in covered]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConversionError(
            f"{missing[0]}{more}: {plan.tensors[missing[0]].type} needs an imatrix that covers it; make one "
            "with `pydiffusion imatrix`, or choose a type of more bits"
        )


def _wanted_types(shapes: Shapes, recipe: Recipe, kinds: TensorKinds, has_imatrix: bool) -> dict[str, str]:
    """Types by the recipe alone.

    For rules by layer, the index is a tensor's rank among those of its kind, as in existing files:
    full-attention layers have no ``attn_v``.
    """
    ranks: dict[str, list[tuple[int, str]]] = {}
    for name in shapes:
        _, layer = split_name(name)
        ranks.setdefault(kinds.kind(name), []).append((-1 if layer is None else layer, name))
    types: dict[str, str] = {}
    for kind, members in ranks.items():
        for index, (_, name) in enumerate(sorted(members)):
            if kind in kinds.float32:
                types[name] = "F32"
            else:
                types[name] = _wanted_type(kind, index, len(members), recipe, has_imatrix)
    return types


def _wanted_type(kind: str, index: int, count: int, recipe: Recipe, has_imatrix: bool) -> str:
    if kind in _HEAD_KINDS:
        return recipe.head
    for rule in recipe.rules:
        applies = rule.imatrix is None or rule.imatrix == has_imatrix
        if applies and kind in rule.kinds and LAYERS[rule.layers](index, count):
            return rule.type
    return recipe.default


def _override(types: dict[str, str], overrides: Overrides, kinds: TensorKinds) -> None:
    check_overrides(overrides)
    matrices = [name for name in types if kinds.kind(name) not in kinds.float32]
    decided: set[str] = set()
    for pattern, type_name in overrides:
        matching = {name for name in matrices if re.search(pattern, name)}
        if not matching:
            raise ConversionError(
                f"the pattern {pattern!r} matches no tensor of this model that has a choice of types (norms, "
                "scales and routers stay F32)"
            )
        types.update(dict.fromkeys(matching - decided, type_name.upper()))
        decided |= matching


def _fit(name: str, wanted: str, n_per_row: int) -> str:
    fitting = fit_to_rows(wanted, n_per_row)
    if fitting != wanted and split_name(name)[0] in _HEAD_KINDS:
        return fit_to_rows("Q8_0", n_per_row)  # the head is most sensitive to few bits
    return fitting


def _pad(
    plan: TypePlan,
    part: FeedForward,
    shapes: Shapes,
    padded: dict[str, tuple[int, ...]],
    wanted: Mapping[str, str],
    pad: bool | None,
) -> None:
    """Update the shapes in ``padded`` if this feed-forward part is padded."""
    kinds = {name: split_name(name)[0] for name in shapes}
    down = [name for name, kind in kinds.items() if kind in part.down and len(shapes[name]) >= 2]
    lengths = {shapes[name][-1] for name in down}
    if pad is False or len(lengths) != 1:
        return
    old = lengths.pop()
    multiple = LARGEST_BLOCK if pad else max(BLOCK_SIZES[wanted[name]] for name in down)
    new = -(-old // multiple) * multiple
    if new == old:
        return
    members = [name for name, kind in kinds.items() if kind in part.gate_up + part.down]
    changed = {name: padded_shape(kinds[name], shapes[name], old, new) for name in members}
    if pad is None:
        after = sum(_n_bytes(name, wanted[name], shape) for name, shape in changed.items())
        before = sum(_n_bytes(name, wanted[name], shapes[name]) for name in changed)
        if after > MAX_PADDING_COST * before:
            return
    padded.update(changed)
    plan.lengths[part.key] = (old, new)
    plan.notes.append(f"{part.key}: {old} padded with zeros to {new}, so that rows fit their types' blocks")


def padded_shape(kind: str, shape: tuple[int, ...], old: int, new: int) -> tuple[int, ...]:
    """Shape of a feed-forward tensor after padding the length from ``old`` to ``new``."""
    if any(kind in part.down for part in FEED_FORWARDS):
        return (*shape[:-1], new)
    n_rows = shape[-2] // old * new  # twice the length if gate and up are fused
    return (*shape[:-2], n_rows, shape[-1])


def _n_bytes(name: str, wanted: str, shape: tuple[int, ...]) -> int:
    return tensor_bytes(_fit(name, wanted, shape[-1]), shape)


_SIZES = MappingProxyType({name: entry[1:] for name, entry in _native.tensor_types().items()})


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type and shape; rows must be a multiple of the block size."""
    block, size = _SIZES[type_name]
    n_weights = 1
    for length in shape:
        n_weights *= length
    return n_weights // block * size


def as_pairs(overrides: Overrides | Mapping[str, str]) -> list[tuple[str, str]]:
    """Validate overrides and return them as a list. Raises as :func:`check_overrides`."""
    pairs = list(overrides.items() if isinstance(overrides, Mapping) else overrides)
    check_overrides(pairs)
    return pairs


def with_lengths(metadata: Mapping[str, Value], lengths: Mapping[str, tuple[int, int]]) -> dict[str, Value]:
    """Set the padded feed-forward lengths in the metadata; a per-layer array stays one."""
    result = dict(metadata)
    architecture = metadata["general.architecture"].value
    for key, (_, new) in lengths.items():
        old = result.get(f"{architecture}.{key}", Value("u32", 0))
        value = [new] * len(old.value) if isinstance(old.value, list) else new
        result[f"{architecture}.{key}"] = Value(old.type, value)
    return result
