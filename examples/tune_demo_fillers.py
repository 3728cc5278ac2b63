"""Find the demo's fillers: 23 soft tokens before a picture's cells that leave the text model as without them.

Trained so that the frozen encoder's cache behind a picture is that behind the same sudoku as text; writes the
tensor (23, d) that train_demo_vision.py takes. A few minutes on two cores; needs the extra `reference`.

    python examples/tune_demo_fillers.py build/demo-vision/fillers.pt
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_recipe.data import Examples, make_pool
from demo_recipe.evaluate import load_checkpoint
from demo_recipe.soft_prompt import N_HEAD, Prompts, first_fillers
from demo_recipe.vision import N_CHARACTERS

from pydiffusion.demo import checkpoint_path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    model, tokenizer = load_checkpoint(checkpoint_path())
    model.requires_grad_(False)
    prompts = Prompts(model, tokenizer)
    examples = Examples(tokenizer, make_pool(300, arguments.seed + 1), arguments.seed + 2)
    fillers = torch.nn.Parameter(first_fillers(prompts))
    adam = torch.optim.Adam([fillers], betas=(0.9, 0.98))
    start = time.monotonic()
    for step in range(arguments.steps):
        warmup, falling = min(1.0, (step + 1) / 10), 1 - step / arguments.steps
        adam.param_groups[0]["lr"] = arguments.rate * warmup * falling
        ids = examples.batch(arguments.batch, 0).prefix[:, N_HEAD : N_HEAD + N_CHARACTERS]
        loss = prompts.difference(fillers, prompts.encoder.embed_tokens(ids))
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(
                f"step {step} difference {loss.item():.4f} seconds {time.monotonic() - start:.0f}", flush=True
            )
    torch.save(fillers.detach(), arguments.target)


if __name__ == "__main__":
    main()
