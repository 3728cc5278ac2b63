"""A small stand-in for Ray: the part of its data API that examples/batch_on_ray.py uses, in local processes.

Blocks come back in the order in which they are finished, as Ray's do.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_worker: Any = None


def _start(kind: type, arguments: Sequence[Any]) -> None:
    global _worker
    _worker = kind(*arguments)


def _apply(block: dict[str, list[Any]]) -> dict[str, Any]:
    return _worker(block)


@dataclass(frozen=True)
class ActorPoolStrategy:
    size: int


@dataclass(frozen=True)
class Answers:
    """What ``map_batches`` gives: computed while it is iterated."""

    blocks: Sequence[dict[str, list[Any]]]
    kind: type
    arguments: Sequence[Any]
    n_workers: int

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        context = multiprocessing.get_context("fork")  # the script is a module of this process only
        start = (self.kind, self.arguments)
        with ProcessPoolExecutor(self.n_workers, context, initializer=_start, initargs=start) as pool:
            for done in as_completed([pool.submit(_apply, block) for block in self.blocks]):
                columns = done.result()
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))


@dataclass(frozen=True)
class Dataset:
    rows: Sequence[dict[str, Any]]

    def map_batches(
        self,
        kind: type,
        *,
        fn_constructor_args: Sequence[Any],
        compute: ActorPoolStrategy,
        num_cpus: int,
        batch_size: int,
    ) -> Answers:
        starts = range(0, len(self.rows), batch_size)
        parts = [self.rows[start : start + batch_size] for start in starts]
        blocks = [{name: [row[name] for row in part] for name in part[0]} for part in parts]
        return Answers(blocks, kind, fn_constructor_args, compute.size)


def from_items(rows: Sequence[dict[str, Any]], override_num_blocks: int) -> Dataset:
    return Dataset(rows)


def stand_in() -> ModuleType:
    """The module to put in Ray's place."""
    ray, ray.data = ModuleType("ray"), ModuleType("ray.data")  # type: ignore[attr-defined]
    ray.data.from_items, ray.data.ActorPoolStrategy = from_items, ActorPoolStrategy
    return ray
