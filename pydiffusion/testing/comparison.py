"""Two files, or two settings of one, measured in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion import _native
from pydiffusion._util.sampler_options import CANVAS_LENGTH_KEY, REFERENCE_CANVAS_LENGTH
from pydiffusion.model import DiffusionModel

from .machine_load import LoadMeter, MachineLoad
from .turns import Ratio, alternate, begin_steps, ratio, seconds_of


@dataclass(frozen=True)
class Setup:
    """A model file and how to run it.

    name: for the report. n_ctx: context of a session, None for as much as the run needs. options: other
    arguments of ``DiffusionModel``.
    """

    name: str
    path: Path
    n_threads: int
    n_ctx: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self, n_prompt: int, n_canvases: int, n_sessions: int) -> DiffusionModel:
        """Open the model for sessions of a prompt with so many tokens and canvases after it."""
        metadata = _native.GgufFile(str(self.path)).metadata
        most = metadata.get(f"{metadata.get('general.architecture')}.context_length", 1 << 30)
        needed = n_prompt + n_canvases * metadata.get(CANVAS_LENGTH_KEY, REFERENCE_CANVAS_LENGTH) + 1
        return DiffusionModel(
            self.path,
            n_ctx=self.n_ctx or min(needed, most),
            n_threads=self.n_threads,
            n_sessions=n_sessions,
            **self.options,
        )


@dataclass(frozen=True)
class Comparison:
    """Medians of the first and the second setup in seconds, and how many times as fast the first one is."""

    names: tuple[str, str]
    n_threads: tuple[int, int]
    n_prompt: int
    step_seconds: tuple[float, float]
    step_speedup: Ratio
    prefill_seconds: tuple[float, float]
    prefill_speedup: Ratio
    load: MachineLoad

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for JSON."""
        return asdict(self)


def compare_in_turns(first: Setup, second: Setup, n_prompt: int, n_rounds: int, seed: int = 0) -> Comparison:
    """Prefill and denoising steps of two setups, in turns (A B B A), after random tokens.

    Both are in memory at the same time. Each round reads a prompt and runs a step with self-conditioning.
    Raises as ``DiffusionModel``; ValueError for fewer than 1 token or round.
    """
    if n_prompt < 1 or n_rounds < 1:
        raise ValueError(f"n_prompt is {n_prompt} and n_rounds {n_rounds}; permitted are at least 1")
    with ExitStack() as stack:
        models = [
            stack.enter_context(setup.open(n_prompt, n_canvases=1, n_sessions=2)) for setup in (first, second)
        ]
        works = [_works(model, n_prompt, n_rounds, seed) for model in models]
        meter = LoadMeter()
        prefill = alternate([reading for reading, _ in works], n_rounds, meter.sample)
        steps = alternate([denoising for _, denoising in works], n_rounds, meter.sample)
        load = meter.result()
    return Comparison(
        names=(first.name, second.name),
        n_threads=(first.n_threads, second.n_threads),
        n_prompt=n_prompt,
        step_seconds=(statistics.median(steps[0]), statistics.median(steps[1])),
        step_speedup=ratio(steps[1], steps[0]),
        prefill_seconds=(statistics.median(prefill[0]), statistics.median(prefill[1])),
        prefill_speedup=ratio(prefill[1], prefill[0]),
        load=load,
    )


def _works(
    model: DiffusionModel, n_prompt: int, n_rounds: int, seed: int
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Functions that read the prompt, and that run a step, and return their seconds; warm."""
    ids = np.random.default_rng(seed).integers(0, model.n_vocab, n_prompt).astype(np.int32)
    reading, denoising = model.new_session().native, model.new_session().native

    def prefill() -> float:
        reading.truncate(0)
        return seconds_of(lambda: reading.encode(ids))

    prefill()
    denoising.encode(ids)
    step = begin_steps(denoising, n_rounds + 2, seed)
    step(), step()
    return prefill, step
