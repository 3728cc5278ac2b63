"""Measure what adapters cost: denoising steps with and without them, in turns.

python benchmarks/adapters.py [MODEL] [--shape 26b-a4b-fifth] [--type q4_k_m] [--rank 16] [--parts]

Without MODEL, a synthetic one is created: a fifth of the released model's layers and of its vocabulary, so
that the parts of a step keep their shares. Random adapters of the given rank: of attention, the dense MLPs
and self-conditioning (what Unsloth tunes), two of these at once, and of the experts too. Prints the seconds
of a step and its CPU seconds (of all threads), and their ratios to those of the step without adapters in the
same round. On a busy machine only CPU seconds say something.
--parts: prints where in the step the time goes, without adapters and with them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
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


def begin(session: _native.Session, n_steps: int) -> Callable[[], tuple[float, float]]:
    """Returns a function that runs a step and returns its seconds and its CPU seconds."""
    step = begin_steps(session, n_steps, 1)

    def timed() -> tuple[float, float]:
        before = time.process_time()
        return step(), time.process_time() - before

    return timed


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
    parser.add_argument("--shape", choices=SHAPES, default="26b-a4b-fifth")
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--threads", type=int, default=step_threads().n)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pydiffusion-adapters-") as folder:
        path = arguments.model or write_synthetic(
            arguments.shape, Path(folder) / f"{arguments.shape}.gguf", arguments.type
        )
        model = _native.Model(
            str(path), arguments.threads, device=arguments.device, kernels=arguments.kernels
        )
        measure(model, arguments.rank, arguments.rounds, arguments.prompt, arguments.parts)


def measure(model: _native.Model, rank: int, n_rounds: int, n_prompt: int, parts: bool) -> None:
    measured = sessions(model, rank, n_prompt)
    steps = [begin(session, n_rounds + 2) for session in measured.values()]
    for step in steps:
        step()  # the first, which has no self-conditioning
        step()
    found = {
        name: [list(values) for values in zip(*times, strict=True)]
        for name, times in zip(measured, alternate(steps, n_rounds), strict=True)
    }
    for name, (seconds, cpu) in found.items():
        step, of_cpu = (1e3 * statistics.median(values) for values in (seconds, cpu))
        line = f"{name}: step {step:.0f} ms, CPU {of_cpu:.0f} ms"
        if name != "none":
            line += f"; ratio {exact(seconds, found['none'][0])}, CPU {exact(cpu, found['none'][1])}"
        print(line, flush=True)
    if parts:
        print_parts(measured)


def exact(numerators: list[float], denominators: list[float]) -> str:
    """The ratio with its smallest and largest of a round."""
    found = ratio(numerators, denominators)
    each = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return f"{found.median:.3f} ({min(each):.3f} to {max(each):.3f})"


if __name__ == "__main__":
    main()
