"""Train the demo model: a small DiffusionGemmaForBlockDiffusion of transformers, on sudokus and text tasks.

Takes about two hours on two CPU cores. Needs the `reference` extra (torch, transformers). An interrupted run
continues from the checkpoint in the work folder; --export writes the released folder from it.

    python examples/train_demo.py --work build/demo --steps 6000
    python examples/train_demo.py --work build/demo --export pydiffusion/demo/checkpoint
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# Waiting threads should spin briefly and then sleep: with other load, long spinning makes steps ten times
# slower; without, never spinning makes them a third slower.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_recipe.data import Batch, Examples, make_pool
from demo_recipe.diffusion import DenoisingLoss
from demo_recipe.evaluate import sudoku_score, text_scores
from demo_recipe.model import build_model, export, release_scalars
from demo_recipe.optimizer import Muon
from demo_recipe.rollout import Rollouts, joined
from demo_recipe.tokenizer import build_tokenizer


@dataclass
class Recipe:
    """Hyperparameters of a run; every field is a command-line option."""

    seed: int = 0
    steps: int = 7900
    n_sudoku: int = 56
    n_text: int = 12
    n_long: int = 16
    n_running: int = 36
    long_every: int = 12
    pool: int = 8000
    muon_rate: float = 2.5e-3
    adam_rate: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    ema: float = 0.998
    evaluate_every: float = 12.0
    n_evaluate: int = 65
    save_every: float = 4.0
    threads: int = 0
    compile: bool = True


class Trainer:
    """Model, averaged weights, optimizers and progress of a training run."""

    def __init__(self, recipe: Recipe, work: Path) -> None:
        self.recipe = recipe
        self.work = work
        torch.manual_seed(recipe.seed)
        self.tokenizer = build_tokenizer()
        self.model = build_model(self.tokenizer)
        release_scalars(self.model)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False)
        self.averaged.set_attn_implementation("eager")
        self.denoising_loss = DenoisingLoss(self.model)
        self.fixed_shape_loss = self.denoising_loss
        if recipe.compile:
            self.fixed_shape_loss = torch.compile(self.denoising_loss, dynamic=False)
        self.step = 0
        self.seconds = 0.0
        self._split_parameters()

    def _split_parameters(self) -> None:
        named = {name: p for name, p in self.model.named_parameters() if "vision" not in name}
        matrices = [
            p for name, p in named.items() if p.ndim >= 2 and "embed" not in name and "router" not in name
        ]
        chosen = {id(p) for p in matrices}
        rest = [p for p in named.values() if id(p) not in chosen]
        self.parameters = list(named.values())
        self.muon = Muon(matrices, momentum=0.95, weight_decay=self.recipe.weight_decay)
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    @property
    def progress(self) -> float:
        """Fraction of the planned steps done, 0 to 1; drives the schedule."""
        return min(1.0, self.step / self.recipe.steps)

    def rate(self) -> float:
        """Return the factor of all learning rates: warm-up, plateau, then cosine decay to 0.01."""
        warmup = min(1.0, (self.step + 1) / self.recipe.warmup_steps)
        falling = max(0.0, (self.progress - 0.2) / 0.8)
        return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * falling)))

    def train_step(
        self, batch: Batch, long_batch: Batch | None, rollouts: Rollouts | None
    ) -> tuple[float, float]:
        """Run one step of both optimizers; return the loss and the gradient norm."""
        if rollouts is None:
            loss, _ = self.fixed_shape_loss(*asdict_tensors(batch))
        else:
            batch = joined(batch, rollouts.batch)
            loss, logits = self.fixed_shape_loss(*asdict_tensors(batch), rollouts.state)
            rollouts.advance(logits)
        loss.backward()
        if long_batch is not None:
            (0.5 * self.denoising_loss(*asdict_tensors(long_batch))[0]).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = self.rate()
        self.muon.step(rate * self.recipe.muon_rate)
        for group in self.adam.param_groups:
            group["lr"] = rate * self.recipe.adam_rate
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None
        self.step += 1
        self._average()
        return loss.item(), norm.item()

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.recipe.ema, self.step / (self.step + 10))
        mine = [p for name, p in self.averaged.named_parameters() if "vision" not in name]
        torch._foreach_lerp_(mine, self.parameters, 1 - decay)

    def save(self, name: str = "last.pt") -> None:
        """Write everything needed to continue the run, replacing the old file atomically."""
        self.work.mkdir(parents=True, exist_ok=True)
        temporary = self.work / (name + ".part")
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, temporary)
        temporary.replace(self.work / name)

    def load(self, path: Path) -> None:
        """Continue from a file written by `save`."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.seconds = state["step"], state["seconds"]


def asdict_tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    """Return the tensors of a batch in the order of the loss's arguments."""
    return batch.prefix, batch.prefix_length, batch.target, batch.is_padding


def train(trainer: Trainer) -> None:
    """Train for the planned number of steps, with periodic saves and evaluations."""
    recipe = trainer.recipe
    examples = Examples(
        trainer.tokenizer, make_pool(recipe.pool, recipe.seed + 1), recipe.seed + 2 + 1000 * trainer.step
    )
    # One in six rollouts is text.
    n_running_text = recipe.n_running // 6
    n_running_sudoku = recipe.n_running - n_running_text
    rollouts = None
    if recipe.n_running:
        vocab_size = trainer.tokenizer.get_vocab_size()
        rollouts = Rollouts(examples, n_running_sudoku, n_running_text, vocab_size)
    next_evaluation = trainer.seconds + 60 * recipe.evaluate_every
    next_save = trainer.seconds + 60 * recipe.save_every
    losses: list[float] = []
    while trainer.progress < 1:
        start = time.monotonic()
        long_batch = examples.long_batch(recipe.n_long) if trainer.step % recipe.long_every == 0 else None
        batch = examples.batch(recipe.n_sudoku - n_running_sudoku, recipe.n_text - n_running_text)
        loss, norm = trainer.train_step(batch, long_batch, rollouts)
        # Don't count compilation in the first step.
        trainer.seconds += min(time.monotonic() - start, 20.0)
        losses.append(loss)
        if trainer.step % 50 == 0:
            mean = sum(losses) / len(losses)
            log(
                f"step {trainer.step} min {trainer.seconds / 60:.1f} loss {mean:.4f} norm {norm:.2f} "
                f"rate {trainer.rate():.3f} s/step {time.monotonic() - start:.2f}"
            )
            losses.clear()
        if trainer.seconds >= next_save:
            next_save += 60 * recipe.save_every
            trainer.save()
        if trainer.seconds >= next_evaluation or trainer.progress >= 1:
            next_evaluation += 60 * recipe.evaluate_every
            trainer.save()
            report(trainer)


def report(trainer: Trainer) -> None:
    """Log the averaged weights' scores on held-out puzzles and text."""
    rng = random.Random(7)
    score = sudoku_score(trainer.averaged, trainer.tokenizer, rng, trainer.recipe.n_evaluate)
    texts = text_scores(trainer.averaged, trainer.tokenizer, rng, 10)
    log(
        f"evaluation at step {trainer.step}: sudoku {score} | "
        + " ".join(f"{k} {v.share:.2f}" for k, v in texts.items())
    )


def log(line: str) -> None:
    """Print a line with the time of day, unbuffered."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument(
        "--export", type=Path, help="don't train; write the released folder from the last checkpoint"
    )
    parser.add_argument(
        "--checkpoint", default="last.pt", help="file in the work folder to continue from or export"
    )
    for name, default in asdict(Recipe()).items():
        option = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(option, default=default, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    recipe = Recipe(**{name: getattr(arguments, name) for name in asdict(Recipe())})
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    trainer = Trainer(recipe, arguments.work)
    checkpoint = arguments.work / arguments.checkpoint
    if checkpoint.is_file():
        trainer.load(checkpoint)
        log(f"continuing from {checkpoint.name}: step {trainer.step}, {trainer.seconds / 60:.1f} minutes")
    if arguments.export:
        export(trainer.averaged, trainer.tokenizer, arguments.export)
        log(f"wrote {arguments.export}")
        return
    log(f"recipe {asdict(recipe)}")
    n_weights = sum(parameter.numel() for parameter in trainer.parameters)
    log(f"{n_weights} weights, vocabulary {trainer.tokenizer.get_vocab_size()}")
    train(trainer)


if __name__ == "__main__":
    main()
