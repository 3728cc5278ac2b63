"""The same weights read token by token: what denoising a canvas at a time is compared with."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pydiffusion import _native
from pydiffusion.events import CanvasEvent
from pydiffusion.model import DiffusionModel

from .comparison import Setup
from .machine_load import LoadMeter, MachineLoad
from .turns import Ratio, alternate, begin_steps, ratio, seconds_of

#: Steps per canvas at which others quote diffusion speeds.
QUOTED_STEPS = 16
QUESTION = "Explain how a sailing boat can move against the wind, and what its keel is for."
_TOKENS_PER_ROUND = 8


@dataclass(frozen=True)
class Autoregressive:
    """Seconds (medians) of one token read causally with the output head on, and of denoising.

    commit_seconds: encoding a finished canvas. steps: denoising steps of the first canvas with the file's
    sampler options, after QUESTION as a chat if ``asked``, else after random tokens. speedup: tokens per
    second of denoising at QUOTED_STEPS over autoregressive ones, in turns. bytes_per_token: weights that a
    token reads. load: the machine meanwhile.
    """

    n_prompt: int
    canvas_length: int
    token_seconds: float
    step_seconds: float
    commit_seconds: float
    steps: int
    asked: bool
    speedup: Ratio
    bytes_per_token: float
    load: MachineLoad

    @property
    def tokens_per_second(self) -> float:
        """Of the autoregressive reading."""
        return 1 / self.token_seconds

    def diffusion_tokens_per_second(self, steps: int) -> float:
        """Tokens per second of canvases that take so many steps, if all of a canvas's tokens are useful."""
        return self.canvas_length / (steps * self.step_seconds + self.commit_seconds)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for JSON; with the tokens per second."""
        return asdict(self) | {
            "tokens_per_second": self.tokens_per_second,
            f"diffusion_tokens_per_second_at_{QUOTED_STEPS}_steps": self.diffusion_tokens_per_second(
                QUOTED_STEPS
            ),
            "diffusion_tokens_per_second_at_measured_steps": self.diffusion_tokens_per_second(self.steps),
        }


def measure_autoregressive(setup: Setup, n_prompt: int, n_rounds: int, seed: int = 0) -> Autoregressive:
    """Measure reading token by token, the most likely next token each time, in turns with denoising steps.

    Both go on after the same random prompt, one sequence each. Raises as ``DiffusionModel``.
    """
    with setup.open(n_prompt, n_canvases=n_rounds + 2, n_sessions=3) as model:
        n = model.canvas_length
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, model.n_vocab, n_prompt).astype(np.int32)
        canvas = rng.integers(0, model.n_vocab, n).astype(np.int32)
        reading, denoising = _Reading(model, ids), model.new_session().native
        denoising.encode(ids)
        step = begin_steps(denoising, n_rounds + 2, seed)
        step(), step(), reading.run()  # warm

        committing = model.new_session().native
        committing.encode(ids)

        def commit() -> float:
            return seconds_of(lambda: committing.encode(canvas))

        commit()
        meter = LoadMeter()
        steps, tokens, commits = alternate((step, reading.run, commit), n_rounds, meter.sample)
        load = meter.result()
        canvases = [QUOTED_STEPS * a + b for a, b in zip(steps, commits, strict=True)]
        n_steps, asked = _measured_steps(model, ids, seed)
        return Autoregressive(
            n_prompt=n_prompt,
            canvas_length=n,
            token_seconds=statistics.median(tokens),
            step_seconds=statistics.median(steps),
            commit_seconds=statistics.median(commits),
            steps=n_steps,
            asked=asked,
            speedup=ratio([n * seconds for seconds in tokens], canvases),
            bytes_per_token=bytes_per_token(model),
            load=load,
        )


class _Reading:
    """A sequence that is read on, token by token."""

    def __init__(self, model: DiffusionModel, ids: np.ndarray) -> None:
        self._session: _native.Session = model.new_session().native
        self._logits = self._session.next_logits(ids)

    def run(self) -> float:
        """Seconds per token."""
        return seconds_of(self._read) / _TOKENS_PER_ROUND

    def _read(self) -> None:
        for _ in range(_TOKENS_PER_ROUND):
            self._logits = self._session.next_logits(np.array([self._logits.argmax()], np.int32))


def _measured_steps(model: DiffusionModel, ids: np.ndarray, seed: int) -> tuple[int, bool]:
    """Steps of a first canvas, and whether it answers QUESTION."""
    asked = model.has_chat_template
    prompt = model.chat_prompt([{"role": "user", "content": QUESTION}]) if asked else ids.tolist()
    session = model.new_session()
    session.encode(prompt)
    events = session.generate(max_tokens=model.canvas_length, seed=seed)
    return next(event.steps for event in events if isinstance(event, CanvasEvent)), asked


def bytes_per_token(model: DiffusionModel) -> float:
    """Bytes of weights that reading one token takes: of the experts those chosen, of the embedding one row,
    unless it is the head too, and no self-conditioning.
    """
    tensors = model.native.file.tensors
    n_experts = max(1, model.hparams.get("n_expert", 1))
    used = model.hparams.get("n_expert_used", 1) / n_experts
    has_head = any(one.name == "output.weight" for one in tensors)
    total = 0.0
    for one in tensors:
        if "_exps." in one.name:
            total += one.n_bytes * used
        elif not (one.name.startswith("self_cond") or (has_head and one.name == "token_embd.weight")):
            total += one.n_bytes
    return total
