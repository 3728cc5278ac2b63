"""Tune the soft tokens from which the demo's frozen text model solves sudokus, with its own training loss.

Begins with the fillers of tune_demo_fillers.py and the embeddings of the characters; writes aims.pt, to which
the tower's projection is fitted in the end. The `places` in it are tuned along and not used.

    python examples/tune_demo_aims.py --work build/demo-vision --fillers build/demo-vision/fillers.pt
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_recipe.data import Examples, make_pool
from demo_recipe.diffusion import DenoisingLoss
from demo_recipe.evaluate import load_checkpoint
from demo_recipe.rollout import Rollouts, joined
from demo_recipe.soft_prompt import Prompts, SoftPrompt

from pydiffusion.demo import checkpoint_path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for aims.pt")
    parser.add_argument("--steps", type=int, default=200, help="the released aims are those after 10 of 200")
    parser.add_argument("--rate", type=float, default=0.03)
    parser.add_argument("--batch", type=int, default=16, help="half of them rollouts")
    parser.add_argument("--fillers", type=Path, help="tensor of fillers to begin with")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    model, tokenizer = load_checkpoint(checkpoint_path())
    model.requires_grad_(False)
    model.set_experts_implementation("dense_demo")
    model.set_attn_implementation("short_demo")
    prompt = SoftPrompt(Prompts(model, tokenizer))
    if arguments.fillers:
        prompt.fillers.data.copy_(torch.load(arguments.fillers))
    loss_of = DenoisingLoss(model)
    examples = Examples(tokenizer, make_pool(400, arguments.seed + 1), arguments.seed + 2)
    half = arguments.batch // 2
    rollouts = Rollouts(examples, half, 0, tokenizer.get_vocab_size())
    parameters = list(prompt.parameters())
    adam = torch.optim.Adam(parameters, betas=(0.9, 0.98))
    averaged = [parameter.detach().clone() for parameter in parameters]
    losses: list[float] = []
    start = time.monotonic()
    for step in range(arguments.steps):
        adam.param_groups[0]["lr"] = arguments.rate * min(1.0, (step + 1) / 10) * (1 - step / arguments.steps)
        batch = joined(examples.batch(half, 0), rollouts.batch)
        prefix = prompt.prefix(prompt.aims(prompt.labels(batch.prefix)))
        length = torch.full((len(prefix),), prefix.shape[1])
        loss, logits = loss_of(prefix, length, batch.target, batch.is_padding, rollouts.state)
        rollouts.advance(logits)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        for mean, parameter in zip(averaged, parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - min(0.97, step / (step + 5)))
        losses.append(loss.item())
        if step % 10 == 9:
            print(
                time.strftime("%H:%M:%S"),
                f"step {step + 1} loss {sum(losses) / len(losses):.4f} rollout steps "
                f"{rollouts.n_steps.float().mean():.1f} seconds {time.monotonic() - start:.0f}",
                flush=True,
            )
            losses.clear()
            state = dict(zip(("fillers", "kinds", "places"), averaged, strict=True))
            torch.save(state, arguments.work / "aims.pt")


if __name__ == "__main__":
    main()
