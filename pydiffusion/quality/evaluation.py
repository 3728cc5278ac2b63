"""``evaluate``: quality loss by quantization, as KL divergence over denoising against a reference file.

For each prompt the reference generates an answer; its first canvas is the clean text. Noise replaces each of
its tokens by a random one with probability t, and both models denoise the same canvas after the same prompt,
first without self-conditioning, then conditioned on the reference's logits. So every number compares two
distributions for the same
input: errors don't accumulate over steps, and both early steps (t near 1) and late ones (small t) are
    covered.
Accumulated errors show in whole generations with equal seeds: steps and solved tasks.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pydiffusion import ConversionError, _native
from pydiffusion.convert.gguf.report import ConversionProgress

if TYPE_CHECKING:
    from pydiffusion.options import Lora

NOISE = (0.1, 0.4, 0.7, 1.0)
MAX_TOKENS = 144  # enough for every task of the demo model
_ROWS = 16  # positions processed at a time: a vocabulary of 262144 in float64 is 2 MB for each
_KEPT_BYTES = 256 << 20  # of the reference's logits, if several files are evaluated
_TASK_SEED = 20261101


@dataclass(frozen=True)
class Agreement:
    """Agreement over positions: KL(reference || file) in nats, and top-1 agreement."""

    noise: float
    self_conditioning: bool
    n_positions: int
    mean_kl: float
    kl_99: float
    top1: float


@dataclass(frozen=True)
class EvaluationReport:
    """Result of an evaluation. ``mean_kl`` etc. are over all of ``agreements``; steps are means per canvas.

    ``solved`` and ``reference_solved``: fraction of the demo model's tasks, None for other prompts.
    ``same_answers``: fraction of prompts whose answers are equal with equal seeds.
    """

    file: Path
    reference: Path
    n_prompts: int
    bits_per_weight: float
    mean_kl: float
    kl_99: float
    top1: float
    steps: float
    reference_steps: float
    same_answers: float
    solved: float | None
    reference_solved: float | None
    agreements: list[Agreement] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields, paths as strings: ready for ``json.dumps``."""
        return dataclasses.asdict(self) | {"file": str(self.file), "reference": str(self.reference)}


@dataclass(frozen=True)
class _Answer:
    canvas: np.ndarray  # the final first canvas
    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


def evaluate(
    file: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    prompts: Sequence[str] | None = None,
    *,
    noise: Sequence[float] = NOISE,
    max_tokens: int = MAX_TOKENS,
    steps: int | None = None,
    seed: int = 0,
    n_threads: int | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    lora: Lora = (),
    progress: Callable[[ConversionProgress], None] | None = None,
) -> EvaluationReport:
    """Compare a file with a reference file of the same model, preferably f32 or bf16.

    Args:
        prompts: user messages (plain text if the file has no chat template); None uses held-out tasks of the
            demo model and checks the answers.
        noise: probabilities with which tokens are replaced, each in (0, 1].
        max_tokens: maximum tokens per answer.
        steps: maximum steps per canvas of an answer; None uses the files' default.
        chat_template: a file, or the name of a built-in template, to use instead of the files'.
        lora: adapters to apply to both, as of ``DiffusionModel``.

    Raises:
        ConversionError: the files differ in vocabulary or canvas length.
        ValueError: no prompts, a noise level out of range.
        Other PyDiffusionErrors: a file can't be loaded, a prompt does not fit its context.
    """
    reports = evaluate_family(
        [file], reference, prompts, noise=noise, max_tokens=max_tokens, steps=steps, seed=seed,
        n_threads=n_threads, chat_template=chat_template, lora=lora, progress=progress,
    )  # fmt: skip
    return reports[0]


def evaluate_family(
    files: Sequence[str | os.PathLike[str]],
    reference: str | os.PathLike[str],
    prompts: Sequence[str] | None = None,
    *,
    noise: Sequence[float] = NOISE,
    max_tokens: int = MAX_TOKENS,
    steps: int | None = None,
    seed: int = 0,
    n_threads: int | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    lora: Lora = (),
    progress: Callable[[ConversionProgress], None] | None = None,
) -> list[EvaluationReport]:
    """As :func:`evaluate` for several files; the reference answers each prompt once for all of them.

    Args and Raises: as ``evaluate``; ValueError too for no files.
    """
    from pydiffusion import DiffusionModel  # slow to import, and not needed for conversions

    tasks = None if prompts is not None else demo_prompts()
    texts = [prompt for _, prompt in tasks] if tasks is not None else list(prompts or ())
    if not texts:
        raise ValueError("there are no prompts to evaluate on")
    if not files:
        raise ValueError("there are no files to evaluate")
    if not noise or not all(0 < t <= 1 for t in noise):
        raise ValueError(f"noise is {tuple(noise)}; levels are probabilities above 0, up to 1")
    reports: list[EvaluationReport] = []
    total = len(files) * len(texts)
    arguments: dict[str, Any] = {"n_threads": n_threads, "chat_template": chat_template, "lora": lora}
    with DiffusionModel(reference, **arguments) as ours:
        known = _Reference(ours, len(texts) if len(files) > 1 else 0)
        for path in files:
            with DiffusionModel(path, **arguments) as theirs:
                _require_same_tokens(ours, theirs)
                run = _Run(known, theirs, tuple(noise), {"max_tokens": max_tokens, "steps": steps}, seed)
                for index, text in enumerate(texts):
                    run.add(index, text)
                    if progress is not None:
                        done = len(reports) * len(texts) + index + 1
                        title = text.strip().partition("\n")[0][:40]
                        progress(ConversionProgress("evaluate", title, done, total))
                # A padded file has additional zero weights, which don't count.
                n_weights = min(model.description["n_weights"] for model in (ours, theirs))
                bits = 8 * sum(theirs.description["weight_types"].values()) / n_weights
            reports.append(run.report(Path(path), Path(reference), tasks, bits))
    return reports


def demo_prompts(n_puzzles: int = 12, n_each: int = 4) -> list[tuple[str, str]]:
    """Held-out examples of the demo model's tasks as (task, prompt)."""
    from pydiffusion.demo import puzzles, tasks

    examples = [("sudoku", tasks.sudoku_prompt(puzzle)) for puzzle, _ in puzzles()[:n_puzzles]]
    rng = random.Random(_TASK_SEED)
    for task in tasks.TASKS:
        if task != "sudoku":
            examples += [(task, tasks.generate(task, rng, held_out=True).prompt) for _ in range(n_each)]
    return examples


def _require_same_tokens(reference: Any, model: Any) -> None:
    for what in ("n_vocab", "canvas_length"):
        if getattr(reference, what) != getattr(model, what):
            raise ConversionError(
                f"{model.path}: {what} is {getattr(model, what)}, that of {reference.path} is "
                f"{getattr(reference, what)}: these are different models"
            )
    key = "tokenizer.ggml.tokens"
    if reference.metadata.get(key) != model.metadata.get(key):
        raise ConversionError(f"{model.path}: its tokens differ from those of {reference.path}")


def compare_logits(reference: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row of (n, n_vocab): KL(softmax(reference) || softmax(logits)) in nats, and whether the argmaxes
    agree.
    """
    kl = np.empty(len(reference))
    for start in range(0, len(reference), _ROWS):
        rows = slice(start, start + _ROWS)
        p, q = _log_softmax(reference[rows]), _log_softmax(logits[rows])
        kl[rows] = (np.exp(p) * (p - q)).sum(axis=1)
    return np.maximum(kl, 0), reference.argmax(axis=1) == logits.argmax(axis=1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


class _Reference:
    """The reference model, with a bounded cache of its answers and logits."""

    def __init__(self, model: Any, n_kept: int):
        self.model, self._n_kept = model, n_kept
        self._answers: dict[int, _Answer] = {}
        self._logits: dict[tuple[int, int, bool], np.ndarray] = {}
        self._room = _KEPT_BYTES

    def answer(self, index: int, generate: Callable[[], _Answer]) -> _Answer:
        """Answer to a prompt."""
        if index not in self._answers:
            self._answers[index] = generate()
        return self._answers[index]

    def logits(self, key: tuple[int, int, bool], denoise: Callable[[], np.ndarray]) -> np.ndarray:
        """Logits for a prompt at a noise level, without or with conditioning."""
        if key in self._logits:
            return self._logits[key]
        found = denoise()
        if self._n_kept and found.nbytes <= self._room:
            self._room -= found.nbytes
            self._logits[key] = found
        return found


class _Run:
    """Evaluates one file against the reference, accumulating results."""

    def __init__(
        self, reference: _Reference, model: Any, noise: tuple[float, ...], options: dict[str, Any], seed: int
    ):
        self.reference, self.model = reference, model
        self.noise, self.options, self.seed = noise, options, seed
        self.figures: dict[tuple[float, bool], list[tuple[np.ndarray, np.ndarray]]] = {
            (t, conditioned): [] for t in noise for conditioned in (False, True)
        }
        self.answers: tuple[list[_Answer], list[_Answer]] = ([], [])

    def _session(self, model: Any, text: str) -> tuple[Any, int]:
        """A session with the prompt encoded, and the prompt's tokens."""
        ids = _prompt_ids(model, text)
        # Context for the answer in whole canvases, plus one to denoise.
        n_ctx = len(ids) + self.options["max_tokens"] + 2 * model.canvas_length
        session = model.new_session(min(n_ctx, model.n_ctx))
        session.encode(ids)
        return session, len(ids)

    def add(self, index: int, text: str) -> None:
        """Evaluate a prompt: generate with both, then compare on noised copies of the reference's canvas."""
        known = self.reference
        (reference, n_prompt), (model, _) = (self._session(m, text) for m in (known.model, self.model))
        answer = known.answer(index, lambda: _generate(reference, self.options, self.seed + index))
        self.answers[0].append(answer)
        self.answers[1].append(_generate(model, self.options, self.seed + index))
        for session in (reference, model):
            session.truncate(n_prompt)
        clean = answer.canvas
        for level, t in enumerate(self.noise):
            u, tokens = _native.random_draws(self.seed + index, level, 0, len(clean), known.model.n_vocab)
            canvas = np.where(u < t, tokens, clean).astype(np.int32)
            first = known.logits((index, level, False), partial(reference.denoise, canvas))
            self.figures[t, False].append(compare_logits(first, model.denoise(canvas)))
            conditioning = first / np.float32(0.4 + 0.4 * t)  # of a step at about this noise
            again = known.logits((index, level, True), partial(reference.denoise, canvas, conditioning))
            self.figures[t, True].append(compare_logits(again, model.denoise(canvas, conditioning)))

    def report(
        self, file: Path, reference: Path, tasks: list[tuple[str, str]] | None, bits_per_weight: float
    ) -> EvaluationReport:
        agreements = []
        for (t, conditioned), figures in self.figures.items():
            kl, same = (np.concatenate(part) for part in zip(*figures, strict=True))
            agreements.append(
                Agreement(t, conditioned, len(kl), kl.mean(), np.quantile(kl, 0.99), same.mean())
            )
        pairs = [pair for figures in self.figures.values() for pair in figures]
        kl, same = (np.concatenate(part) for part in zip(*pairs, strict=True))
        steps = [np.mean([n for answer in answers for n in answer.steps]) for answers in self.answers]
        equal = [a.tokens == b.tokens for a, b in zip(*self.answers, strict=True)]
        solved = [_solved(tasks, answers) for answers in self.answers]
        return EvaluationReport(
            file=file,
            reference=reference,
            n_prompts=len(equal),
            bits_per_weight=bits_per_weight,
            mean_kl=float(kl.mean()),
            kl_99=float(np.quantile(kl, 0.99)),
            top1=float(same.mean()),
            steps=float(steps[1]),
            reference_steps=float(steps[0]),
            same_answers=float(np.mean(equal)),
            solved=solved[1],
            reference_solved=solved[0],
            agreements=[_as_floats(agreement) for agreement in agreements],
        )


def _as_floats(agreement: Agreement) -> Agreement:
    values: dict[str, Any] = {name: float(getattr(agreement, name)) for name in ("mean_kl", "kl_99", "top1")}
    return dataclasses.replace(agreement, **values)


def _prompt_ids(model: Any, text: str) -> list[int]:
    if model.has_chat_template:
        return model.chat_prompt([{"role": "user", "content": text}])
    return model.tokenize(text)


def _generate(session: Any, options: dict[str, Any], seed: int) -> _Answer:
    from pydiffusion import CanvasEvent, DraftEvent

    canvas, text = None, ""
    steps: list[int] = []
    tokens: list[int] = []
    for event in session.generate(**options, seed=seed):
        if isinstance(event, DraftEvent) and not steps:
            canvas = event.tokens
        elif isinstance(event, CanvasEvent):
            steps.append(event.steps)
            tokens += event.tokens.tolist()
            text += event.text
    return _Answer(np.array(canvas), tuple(steps), tuple(tokens), text)


def _solved(tasks: list[tuple[str, str]] | None, answers: list[_Answer]) -> float | None:
    if tasks is None:
        return None
    from pydiffusion.demo.tasks import check

    right = [check(task, prompt, answer.text) for (task, prompt), answer in zip(tasks, answers, strict=True)]
    return sum(right) / len(right)
