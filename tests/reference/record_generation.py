"""Record a run of transformers' ``generate`` whose random numbers are those of our own sampler.

``torch.multinomial`` and ``torch.randint`` are replaced while ``generate`` runs, so that draw and renoising
come from Philox counters (canvas, step, position) and the draw is an inverse CDF in vocabulary order. Nothing
else of ``generate`` is touched: what it accepts, where it stops and what it commits is its own.
Needs torch and transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from reference.philox import draws, inverse_cdf


@dataclass(frozen=True)
class Options:
    """What a run depends on beside weights and prompt; the names are those of ``Session.begin``."""

    max_tokens: int
    steps: int
    t_min: float
    t_max: float
    entropy_bound: float
    stability_threshold: int
    confidence_threshold: float
    seed: int
    eos: tuple[int, ...] = ()


@dataclass
class Record:
    """One row per denoising step, and how near each of its decisions came to falling the other way."""

    canvas_index: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    draft: list[np.ndarray] = field(default_factory=list)
    canvas: list[np.ndarray] = field(default_factory=list)
    accepted: list[np.ndarray] = field(default_factory=list)
    entropy: list[np.ndarray] = field(default_factory=list)
    stopped: list[bool] = field(default_factory=list)
    cdf_margin: list[float] = field(default_factory=list)
    accept_margin: list[float] = field(default_factory=list)
    argmax_margin: list[float] = field(default_factory=list)
    stop_margin: list[float] = field(default_factory=list)
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    #: What each step saw, for callers in the same process: its canvas and self-conditioning logits, or None.
    inputs: list[tuple[np.ndarray, np.ndarray | None]] = field(default_factory=list)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays of one row per step, to be saved as npz."""
        ints = {"canvas_index", "step"}
        out: dict[str, np.ndarray] = {"tokens": self.tokens}
        for name, rows in vars(self).items():
            if name not in ("tokens", "inputs"):
                out[name] = np.array(rows, dtype=np.int32 if name in ints else None)
        return out


class _Patches:
    """Stands in for the random functions and listens to each step."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion, options: Options) -> None:
        self.model, self.options, self.record = model, options, Record()
        self.canvas_index, self.step = -1, 0
        self.prepare, self.denoise = model._prepare_denoiser_inputs, model._denoising_step
        self.n_vocab = model.config.text_config.vocab_size

    def _draws(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        return draws(self.options.seed, self.canvas_index, self.step, n, self.n_vocab)

    def multinomial(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        assert num_samples == 1
        u, _ = self._draws(len(probabilities))
        sampled, margin = inverse_cdf(probabilities.numpy(), u)
        self.record.cdf_margin.append(margin)
        return torch.from_numpy(sampled.astype(np.int64))[:, None]

    def randint(self, low: int, high: int, size: tuple[int, int], device: object = None) -> torch.Tensor:
        assert (low, high, size[0]) == (0, self.n_vocab, 1)
        return torch.from_numpy(self._draws(size[1])[1].astype(np.int64))[None]

    def prepare_denoiser_inputs(self, **kwargs: object) -> tuple:
        self.canvas_index, self.step = self.canvas_index + 1, 0
        return self.prepare(**kwargs)

    def denoising_step(self, **kwargs: object) -> tuple:
        self.step = kwargs["cur_step"]
        seen, before = kwargs["current_canvas"][0], kwargs["self_conditioning_logits"]
        self.record.inputs.append(
            (seen.numpy().astype(np.int32), None if before is None else before[0].numpy().copy())
        )
        canvas, draft, conditioning, finished = self.denoise(**kwargs)
        entropy = torch.distributions.Categorical(logits=conditioning).entropy()[0].numpy()
        r, bound = self.record, self.options.entropy_bound
        r.canvas_index.append(self.canvas_index)
        r.step.append(self.step)
        r.draft.append(draft[0].numpy().astype(np.int32))
        r.canvas.append(canvas[0].numpy().astype(np.int32))
        r.accepted.append(kwargs["sampler"].accepted_token_mask[0].numpy().copy())
        r.entropy.append(entropy)
        r.stopped.append(bool(finished[0]))
        ascending = np.sort(entropy.astype(np.float64))
        r.accept_margin.append(float(np.abs(np.cumsum(ascending) - ascending - bound).min()))
        best = torch.topk(conditioning[0], 2, dim=-1).values.numpy()
        r.argmax_margin.append(float((best[:, 0] - best[:, 1]).min()))
        r.stop_margin.append(float(abs(entropy.mean() - self.options.confidence_threshold)))
        return canvas, draft, conditioning, finished


@contextmanager
def _patched(patches: _Patches) -> Iterator[None]:
    multinomial, randint = torch.multinomial, torch.randint
    torch.multinomial, torch.randint = patches.multinomial, patches.randint
    patches.model._prepare_denoiser_inputs = patches.prepare_denoiser_inputs
    patches.model._denoising_step = patches.denoising_step
    try:
        yield
    finally:
        torch.multinomial, torch.randint = multinomial, randint
        del patches.model._prepare_denoiser_inputs, patches.model._denoising_step


def hangs_on_rounding(record: Record, other: Record) -> bool:
    """Whether another float32 evaluation may decide something in this run otherwise.

    ``other`` is the same run of slightly ``nudged`` weights: it must decide everything alike, and what
    separates its entropies from the record's must be far from turning an acceptance.
    """
    r, o = record.arrays(), other.arrays()
    exact = ("canvas_index", "step", "draft", "canvas", "accepted", "stopped", "tokens")
    if not all(np.array_equal(r[name], o[name]) for name in exact):
        return True
    moved = np.abs(r["entropy"] - o["entropy"]).max(axis=1)
    if (moved >= 0.2 * r["accept_margin"]).any():
        return True
    least = {"accept_margin": 1e-4, "argmax_margin": 1e-3, "cdf_margin": 1e-5, "stop_margin": 1e-5}
    return any(r[name].min() < margin for name, margin in least.items())


def cut(tokens: np.ndarray, options: Options) -> np.ndarray:
    """What a user gets: up to the first eos, which is left out, and at most ``max_tokens``."""
    ends = np.flatnonzero(np.isin(tokens, options.eos))
    return tokens[: ends[0] if len(ends) else None][: options.max_tokens]


def record_generation(
    model: DiffusionGemmaForBlockDiffusion, prompt_ids: np.ndarray, options: Options
) -> Record:
    """Run ``generate`` on one prompt and write down every step of it."""
    patches = _Patches(model, options)
    with _patched(patches):
        out = model.generate(
            torch.from_numpy(prompt_ids.astype(np.int64))[None],
            max_new_tokens=options.max_tokens,
            max_denoising_steps=options.steps,
            t_min=options.t_min,
            t_max=options.t_max,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=options.entropy_bound),
            stability_threshold=options.stability_threshold,
            confidence_threshold=options.confidence_threshold,
            eos_token_id=list(options.eos) or None,
            pad_token_id=model.config.text_config.pad_token_id,
        )
    new = out.sequences[0, len(prompt_ids) :].numpy().astype(np.int32)
    patches.record.tokens = cut(new, options)
    return patches.record
