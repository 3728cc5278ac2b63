"""Measure what adapters cost: denoising steps with and without them, in turns.

python benchmarks/adapters.py [MODEL] [--shape 26b-a4b-6] [--type q4_k_m] [--rank 16] [--rounds 8] [--parts]

Without MODEL, a synthetic one is created; "26b-a4b-6" is six of the released model's 30 layers. Random
adapters of the given rank: of attention and the dense MLPs in both modes with self-conditioning (what Unsloth
tunes), of the experts too, and two of the first at once. Prints the seconds of a step, and the ratio of each
to the step without adapters in the same round. With fewer layers than the released model has, the ratio at 30
layers follows: a layer's share of the step grows, and the head's shrinks.
--parts: prints where in the step the time goes, without adapters and with them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pydiffusion import _native
from pydiffusion._util.cpus import step_threads
from pydiffusion.testing.synthetic import SHAPES, write_synthetic
from pydiffusion.testing.turns import alternate, begin_steps, ratio

UNSLOTH = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
SELF_CONDITIONING = ("self_cond_gate", "self_cond_up", "self_cond_down")
EXPERTS = ("ffn_gate_up_exps", "ffn_down_exps")
N_LAYERS = 30  # of the released model

Target = tuple[str, str, np.ndarray, np.ndarray]


def random_targets(model: _native.Model, kinds: tuple[str, ...], rank: int) -> Iterator[Target]:
    """A and B of each tensor of those kinds, in each mode in which it is used."""
    rng = np.random.default_rng(0)
    for tensor in model.file.tensors:
        name = tensor.name.removesuffix(".weight")
        if name.rpartition(".")[2] not in kinds:
            continue
        *experts, n_out, n_in = tensor.shape
        for side in ("decoder",) if name.startswith("self_cond") else ("encoder", "decoder"):
            a = rng.standard_normal((*experts, rank, n_in), np.float32) / np.float32(n_in**0.5)
            b = rng.standard_normal((*experts, n_out, rank), np.float32) * np.float32(0.01)
            yield name, side, a, b


def sessions(model: _native.Model, rank: int, n_prompt: int) -> dict[str, _native.Session]:
    """A session per list of adapters, each with the same prompt."""
    dense = UNSLOTH + SELF_CONDITIONING
    one = _native.Adapter(model, "attention and dense", random_targets(model, dense, rank))
    two = _native.Adapter(model, "another", random_targets(model, dense, rank))
    every = _native.Adapter(model, "experts too", random_targets(model, dense + EXPERTS, rank))
    for adapter in (one, every):
        print(f"{adapter.name}: {adapter.n_targets} matrices, {adapter.n_bytes / 1e6:.0f} MB")
    ids = np.random.default_rng(0).integers(0, model.n_vocab, n_prompt).astype(np.int32)
    made = {}
    for name, adapters in {
        "none": [],
        "attention and dense": [(one, 1.0)],
        "two of these": [(one, 1.0), (two, 0.5)],
        "experts too": [(every, 1.0)],
    }.items():
        made[name] = _native.Session(model, n_prompt + 2 * model.canvas_length)
        made[name].set_adapters(adapters)
        made[name].encode(ids)
    return made


def outside_layers(session: _native.Session) -> float:
    """Seconds of a step's parts that don't grow with the number of layers."""
    parts = session.profile_step()
    return sum(parts[name][0] for name in parts if name not in ("attention", "dense", "experts"))


def at_30_layers(plain: list[float], adapted: list[float], outside: float, n_layer: int) -> float:
    """The ratio of medians if the step had the released model's number of layers."""
    grow = N_LAYERS / n_layer
    before, after = statistics.median(plain), statistics.median(adapted)
    return (outside + grow * (after - outside)) / (outside + grow * (before - outside))


def print_parts(measured: dict[str, _native.Session]) -> None:
    for name, session in measured.items():
        runs = [session.profile_step() for _ in range(3)]
        parts = {part: statistics.median(run[part][0] for run in runs) for part in runs[0]}
        print(f"{name}: " + ", ".join(f"{part} {1e3 * seconds:.1f} ms" for part, seconds in parts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="26b-a4b-6")
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--threads", type=int, default=step_threads().n)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pydiffusion-adapters-") as folder:
        path = arguments.model or write_synthetic(
            arguments.shape, Path(folder) / f"{arguments.shape}.gguf", arguments.type
        )
        model = _native.Model(str(path), arguments.threads, device=arguments.device)
        measure(model, arguments.rank, arguments.rounds, arguments.prompt, arguments.parts)


def measure(model: _native.Model, rank: int, n_rounds: int, n_prompt: int, parts: bool) -> None:
    measured = sessions(model, rank, n_prompt)
    steps: list[Callable[[], float]] = [
        begin_steps(session, n_rounds + 2, 1) for session in measured.values()
    ]
    for step in steps:
        step()  # the first, which has no self-conditioning
        step()
    seconds = dict(zip(measured, alternate(steps, n_rounds), strict=True))
    n_layer, outside = len(model.hparams["sliding"]), outside_layers(measured["none"])
    for name, elapsed in seconds.items():
        line = f"{name}: step {1e3 * statistics.median(elapsed):.0f} ms"
        if name != "none":
            line += f", ratio {ratio(elapsed, seconds['none'])}"
            if n_layer != N_LAYERS:
                scaled = at_30_layers(seconds["none"], elapsed, outside, n_layer)
                line += f"; {scaled:.3f} at {N_LAYERS} layers"
        print(line)
    if parts:
        print_parts(measured)


if __name__ == "__main__":
    main()
