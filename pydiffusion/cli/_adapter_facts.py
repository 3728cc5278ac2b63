"""Facts about an adapter, as lines and for JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydiffusion._util.sizes import count

if TYPE_CHECKING:
    from pydiffusion.adapters.adapter import Adapter, Factors, Target


def adapter_facts(adapter: Adapter, with_targets: bool) -> dict[str, Any]:
    """For JSON. with_targets: with every matrix."""
    from pydiffusion.adapters.merging import why_not_mergeable

    sides = Counter(target.side for target in adapter.factors)
    facts = {
        "name": adapter.name,
        "path": str(adapter.path),
        "fingerprint": adapter.fingerprint.hex(),
        "n_targets": len(adapter.factors),
        "n_weights": _n_weights(adapter),
        "ranks": _ranks(adapter),
        "sides": {side: sides[side] for side in ("encoder", "decoder", "both") if sides[side]},
        "merge_problem": why_not_mergeable(adapter),
        "metadata": dict(adapter.metadata),
    }
    if with_targets:
        facts["targets"] = [_target(target, factors) for target, factors in adapter.factors.items()]
    return facts


def _target(target: Target, factors: Factors) -> dict[str, Any]:
    return {
        "tensor": target.tensor,
        "side": target.side,
        "shape_a": list(factors.shape_a),
        "shape_b": list(factors.shape_b),
        "scale": factors.scale,
    }


def _n_weights(adapter: Adapter) -> int:
    return sum(math.prod(f.shape_a) + math.prod(f.shape_b) for f in adapter.factors.values())


def _ranks(adapter: Adapter) -> list[int]:
    return sorted({factors.rank for factors in adapter.factors.values()})


def adapter_counts(adapter: Adapter) -> str:
    """``32 matrices, rank 4, 103 k weights``."""
    ranks = _ranks(adapter)
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{len(adapter.factors)} matrices, {rank}, {count(_n_weights(adapter))} weights"


def adapter_lines(adapter: Adapter) -> Iterator[str]:
    """A table of what it changes, and whether that can be merged."""
    from pydiffusion.adapters.merging import why_not_mergeable
    from pydiffusion.convert.checkpoint.tensor_map import split_name

    kinds: Counter[tuple[str, str, int, float]] = Counter(
        (split_name(target.tensor)[0], target.side, factors.rank, factors.scale)
        for target, factors in adapter.factors.items()
    )
    yield f"{'matrix':18} {'mode':8} {'number':>6} {'rank':>5} {'scale':>8}"
    for (kind, side, rank, scale), number in kinds.items():
        yield f"{kind:18} {side:8} {number:6} {rank:5} {scale:8.4g}"
    why_not = why_not_mergeable(adapter)
    yield f"can be merged by convert --lora: {f'no, it {why_not}' if why_not else 'yes'}"
    for note in adapter.metadata.get("notes", ()):
        yield f"note: {note}"


def target_lines(adapter: Adapter) -> Iterator[str]:
    """Every matrix, with the shapes of A and B."""
    for target, factors in adapter.factors.items():
        a, b = (" x ".join(map(str, shape)) for shape in (factors.shape_a, factors.shape_b))
        yield f"{target!s:34} A {a:16} B {b:16} scale {factors.scale:.4g}"
