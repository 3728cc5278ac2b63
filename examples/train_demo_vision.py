"""Train the demo model's vision tower to read sudokus; the text weights stay as they are.

The projected soft tokens learn to be the text model's embeddings of the rows' characters, without running the
text model. Needs the extras `reference` and `vision`, folders with fonts, and in the work folder the fillers
of tune_demo_fillers.py and, to export, the aims of tune_demo_aims.py. An interrupted run continues from the
last checkpoint in it.

    WORK=build/demo-vision
    python examples/tune_demo_fillers.py $WORK/fillers.pt
    python examples/tune_demo_aims.py --work $WORK --fillers $WORK/fillers.pt
    python examples/train_demo_vision.py --work $WORK --fonts FOLDER --minutes 40
    python examples/train_demo_vision.py --work $WORK --fonts FOLDER --export pydiffusion/demo/checkpoint
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_recipe import vision
from demo_recipe.evaluate import load_checkpoint
from demo_recipe.optimizer import Muon

from pydiffusion.demo import checkpoint_path


class Trainer:
    """Tower, averaged weights, optimizers and progress of a run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        torch.manual_seed(arguments.seed)
        text_model, tokenizer = load_checkpoint(checkpoint_path())
        config = copy.deepcopy(text_model.config)
        vision_config = type(config.vision_config)(**vision.VISION_CONFIG)
        self.tower = vision.Tower(vision_config, config.text_config)
        self.tower.initialize()
        targets = vision.character_embeddings(text_model, tokenizer)
        fillers = torch.load(arguments.work / "fillers.pt", weights_only=True)
        self.loss = vision.ReadingLoss(self.tower, targets, fillers)
        self.averaged = copy.deepcopy(self.tower).requires_grad_(False)
        self.compiled = torch.compile(self.loss, dynamic=False) if arguments.compile else self.loss
        named = dict(self.tower.named_parameters())
        self.parameters = list(named.values())
        self.muon = Muon([p for p in self.parameters if p.ndim == 2], momentum=0.95, weight_decay=0.1)
        self.adam = torch.optim.AdamW(
            [p for p in self.parameters if p.ndim != 2], betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.step, self.seconds = 0, 0.0

    def rate(self) -> float:
        """Factor of all learning rates: warm-up, then cosine decay to 0.01 at the end of the minutes."""
        progress = min(1.0, self.seconds / (60 * self.arguments.minutes))
        return min(1.0, (self.step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    def train_step(self, pixels: torch.Tensor, labels: torch.Tensor, cells: torch.Tensor) -> float:
        """One step of both optimizers; returns the loss."""
        loss = self.compiled(pixels, labels, cells, torch.tensor(self.arguments.help))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = self.rate()
        self.muon.step(rate * self.arguments.muon_rate)
        for group in self.adam.param_groups:
            group["lr"] = rate * self.arguments.adam_rate
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None
        self.step += 1
        decay = min(0.99, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), self.parameters, 1 - decay)
        return loss.item()

    def save(self) -> None:
        """Write everything needed to continue the run or to export it."""
        path = self.arguments.work / "last.pt"
        state = {
            "tower": self.tower.state_dict(),
            "averaged": self.averaged.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self) -> None:
        """Continue from the file that `save` wrote, if there is one."""
        path = self.arguments.work / "last.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        self.tower.load_state_dict(state["tower"])
        self.averaged.load_state_dict(state["averaged"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.seconds = state["step"], state["seconds"]
        log(f"continuing at step {self.step}, {self.seconds / 60:.1f} minutes")

    @torch.no_grad()
    def report(self, pictures: torch.Tensor, labels: torch.Tensor) -> None:
        """Log how much the averaged weights read of pictures in training fonts, with random cells."""
        with torch.autocast("cpu", torch.bfloat16):
            features = torch.cat([self.averaged(part) for part in pictures.split(50)]).float()
        read = self.loss.logits(features[:, vision.N_FILLERS :]).argmax(-1)
        right = read == labels
        given = (labels > 0) & (labels < 7)
        off = (features[:, vision.N_FILLERS :] - self.loss.targets[labels]).square().sum(-1).mean()
        log(
            f"validation at step {self.step}: givens {right[given].float().mean():.4f} "
            f"empty {right[labels == 0].float().mean():.4f} pictures {right.all(1).float().mean():.3f} "
            f"distance {off / self.loss.mean_square:.4f}"
        )


def train(trainer: Trainer) -> None:
    """Train until the minutes are over."""
    arguments = trainer.arguments
    fonts, _ = vision.training_fonts(arguments.fonts)
    log(f"{sum(p.numel() for p in trainer.parameters)} weights, {len(fonts)} fonts")
    context = multiprocessing.get_context("spawn")
    first, easy = 100 + trainer.step, trainer.step == 0
    for seed in range(arguments.painters):
        painter = context.Process(
            target=paint,
            args=(arguments.work / "pictures", first + seed, fonts, arguments.shards, easy),
            daemon=True,
        )
        painter.start()
    drawn = vision.render(200, random.Random(7), fonts)
    validation = torch.from_numpy(drawn.images).float() / 255, torch.from_numpy(drawn.labels)
    pool = vision.Pool(arguments.work / "pictures", arguments.seed + 1000 * trainer.step, arguments.capacity)
    pool.refresh()
    losses: list[float] = []
    next_save = trainer.seconds + 120
    while trainer.seconds < 60 * arguments.minutes:
        if trainer.step % 10 == 0:
            pool.refresh()
        start = time.monotonic()
        losses.append(trainer.train_step(*pool.batch(arguments.batch)))
        trainer.seconds += time.monotonic() - start
        if trainer.step % 25 == 0:
            log(
                f"step {trainer.step} min {trainer.seconds / 60:.1f} loss {sum(losses) / len(losses):.4f} "
                f"rate {trainer.rate():.3f} s/step {time.monotonic() - start:.2f} shards {len(pool.seen)}"
            )
            losses.clear()
        if trainer.step % 100 == 0:
            trainer.report(*validation)
        if trainer.seconds >= next_save:
            next_save += 120
            trainer.save()
    trainer.save()
    trainer.report(*validation)


def paint(folder: Path, seed: int, fonts: list[str], n_shards: int, easy: bool) -> None:
    """Draw pictures in a process of its own."""
    os.nice(8)
    vision.write_shards(folder, seed, fonts, n_shards, easy)


def log(line: str) -> None:
    """Print a line with the time of day, unbuffered."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and pictures")
    parser.add_argument("--fonts", nargs="+", default=[], help="folders with font files")
    parser.add_argument(
        "--export", type=Path, help="don't train; put the averaged weights into a checkpoint folder"
    )
    parser.add_argument(
        "--minutes", type=float, default=40, help="time in steps; the learning rate falls to 0.01"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--muon-rate", type=float, default=5e-3)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument(
        "--help-weight", dest="help", type=float, default=0.5, help="weight of losses within the tower"
    )
    parser.add_argument("--painters", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--shards", type=int, default=24, help="shards of 500 pictures per painter")
    parser.add_argument("--capacity", type=int, default=30, help="shards kept in memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", default=True, action=argparse.BooleanOptionalAction)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments)
    trainer.load()
    if arguments.export:
        fonts, _ = vision.training_fonts(arguments.fonts)
        drawn = vision.render(400, random.Random(8), fonts)
        aims = torch.load(arguments.work / "aims.pt", weights_only=True)
        vision.fit_projection(trainer.averaged, aims["kinds"], aims["fillers"], drawn)
        vision.export(trainer.averaged, arguments.export)
        log(f"wrote {arguments.export}")
        return
    train(trainer)


if __name__ == "__main__":
    main()
