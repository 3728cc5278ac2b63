"""Compare the time of encoding an image with transformers on the same CPU, alternating in one process.

    python benchmarks/vision.py [--types bf16 q8_0] [--layers 27] [--threads 2] [--rounds 3]

A random tower of the released shape (27 layers, d 1152, feed-forward 4304, 16 heads of 72; about 550e6 weights) and an
image of 280 soft tokens (60 x 42 patches). transformers runs in bfloat16 with its default attention, in the
order A B A B. With fewer layers both do less of the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # keeps idle torch threads from spinning

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.vision_towers import Tower, picture, random_tower, write_tower

from pydiffusion import _native
from pydiffusion._util.cpus import step_threads
from pydiffusion.convert import convert
from pydiffusion.testing.turns import ratio


def released(n_layers: int) -> Tower:
    """The released tower's shape, with some of its 27 layers."""
    changes = {"intermediate_size": 4304, "num_hidden_layers": n_layers, "patch_size": 16}
    changes |= {"position_embedding_size": 10240, "use_clipped_linears": False}
    return Tower(1152, 16, grid=(60, 42), changes=changes)


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def theirs(reference: tuple[torch.nn.Module, torch.nn.Module], tower: Tower) -> Callable[[], np.ndarray]:
    """Return a function that encodes the picture in bfloat16."""
    model, projector = (part.to(torch.bfloat16) for part in reference)
    patches, positions = (torch.from_numpy(array)[None] for array in picture(tower))

    @torch.no_grad()
    def encode() -> np.ndarray:
        hidden = model(patches, positions.long()).last_hidden_state
        return projector(hidden.to(torch.bfloat16)).float().numpy()

    return encode


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=["bf16"], help="types of our file's matrices")
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--threads", type=int, default=step_threads().n)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", default="auto")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tower = released(options.layers)
    reference = random_tower(tower)
    n_weights = sum(value.numel() for part in reference for value in part.parameters())
    print(
        f"{n_weights / 1e6:.0f}e6 weights, {tower.grid[0] * tower.grid[1]} patches, {options.threads} threads"
    )
    with tempfile.TemporaryDirectory() as folder:
        files = {t: write_tower(Path(folder) / f"{t}.gguf", reference, tower, t) for t in options.types}
        text = Path(folder) / "text.gguf"
        convert(next(iter(files.values())).with_suffix(""), text, "f32")
        model = _native.Model(str(text), n_threads=options.threads, kernels=options.kernels)
        patches, positions = picture(tower)
        encode = theirs(reference, tower)
        exact = encode()
        for type, path in files.items():
            vision = _native.Vision(str(path), model)
            gap = np.abs(vision.encode(patches, positions) - exact).max() / np.ptp(exact)
            rounds = [
                (seconds(lambda: vision.encode(patches, positions)), seconds(encode))
                for _ in range(options.rounds)
            ]
            for i, what in enumerate(("wall", "CPU")):
                own, other = ([r[side][i] for r in rounds] for side in (0, 1))
                speed = ratio(other, own)
                print(
                    f"{type}: {np.median(own):.2f} s ({what}), transformers bf16 {np.median(other):.2f} s: "
                    f"{speed}; largest difference {gap:.1%} of the range"
                )


if __name__ == "__main__":
    main()
