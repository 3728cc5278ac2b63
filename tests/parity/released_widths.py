"""Compare logits with transformers at the released model's widths.

    python tests/parity/released_widths.py [--folder DIR]

Two layers, one sliding and one full, with random weights and every other size as released: 128 experts, top
8, 262,144 tokens, a window of 1024, a canvas of 256 (2.4e9 weights). A file of each type is written, compared
and removed, against transformers in float32 with that file's weights, dequantized by the package `gguf`. Each
part runs in a process of its own, so that the weights are in memory once at a time. Needs the extra
`reference`. docs/parity.md says what is required and has the figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import random_checkpoint
from reference.dequantized import dequantized_tensors, without_padding
from support.models import Difference, assert_own_attention
from support.parity import MAX_BOUND, MEAN_BOUND, ROUNDING_FACTOR, ROUTER_TIE
from support.scripts import load_script

from pydiffusion import _native
from pydiffusion._util.cpus import available_cpus
from pydiffusion.convert import convert

checkpoint = load_script("benchmarks/checkpoint.py")

N_CTX = 2048
#: Tokens of the prompts: within the sliding window of 1024, and beyond it.
N_SHORT, N_LONG = 40, 1300
#: Between experts whose scores are nearer (in log), rounding decides where GELU goes through a table of
#: float16 (at 8e-4 it did in one position of 768), as ROUTER_TIE in any float32 evaluation. This share of
#: positions has to be free of it.
HOST_ROUTER_TIE = 3e-3
MIN_SETTLED = 0.75

#: What a run needs: the checkpoint, the float32 file and logits on disk, float32 weights twice in memory.
DISK, MEMORY = 16e9, 14e9

#: Types of the weights of each file; padded, q4_k_m needs no fallbacks.
TYPES = MappingProxyType(
    {"f32": {"F32"}, "bf16": {"F32", "BF16"}, "q8_0": {"F32", "Q8_0"}, "q4_k_m": {"F32", "Q4_K", "Q6_K"}}
)

Passes = dict[str, "Compared"]


class Encoding(Protocol):
    """A session of ours, or the reference's cache."""

    def encode(self, ids: np.ndarray) -> object: ...

    def denoise(self, canvas: np.ndarray, self_conditioning: np.ndarray | None) -> np.ndarray: ...


def passes(shape: Any, new: Callable[[], Encoding]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and logits (canvas, vocab) of the decoder passes that are compared."""

    def ids(name: str, n: int) -> np.ndarray:
        return random_checkpoint.random_ids(0, name, n, shape.vocab)

    canvas = ids("canvas", shape.canvas)
    context = new()
    context.encode(ids("short", N_SHORT))
    yield "short prompt", context.denoise(canvas, None)
    context = new()
    context.encode(ids("long", N_LONG))
    yield "long prompt", context.denoise(canvas, None)
    context.encode(ids("committed", shape.canvas))
    yield "after a commit, conditioned", context.denoise(canvas, conditioning_logits(shape))


def conditioning_logits(shape: Any) -> np.ndarray:
    """Logits to condition on, (canvas, vocab) float32: of nearly uniform to peaked distributions."""
    random = np.random.default_rng(0)
    scales = np.geomspace(0.3, 12, shape.canvas, dtype=np.float32)[:, None]
    return random.standard_normal((shape.canvas, shape.vocab), np.float32) * scales


@dataclass(frozen=True)
class Compared:
    """How far two passes' logits differ in each canvas position: arrays (canvas,)."""

    mean: np.ndarray
    max: np.ndarray
    same_argmax: np.ndarray

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray) -> Compared:
        """Position by position: all logits in float64 would take 2 GB."""
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        assert ours.dtype == theirs.dtype == np.float32
        gaps = (np.abs(a.astype(np.float64) - b) for a, b in zip(ours, theirs, strict=True))
        mean, largest = np.array([(gap.mean(), gap.max()) for gap in gaps]).T
        return cls(mean, largest, ours.argmax(axis=-1) == theirs.argmax(axis=-1))

    def middle(self) -> float:
        """Mean difference in the position of the middle: blind to the few where an expert turned."""
        return float(np.median(self.mean))

    def difference(self, positions: np.ndarray | slice = np.s_[:]) -> Difference:
        """Over all positions, or some."""
        mean, largest = self.mean[positions].mean(), np.max(self.max[positions])
        return Difference(float(mean), float(largest), float(self.same_argmax[positions].mean()))


@dataclass(frozen=True)
class Reference:
    """What transformers gives besides logits: how near each position of a pass is to another choice of
    experts, (canvas,), and how far rounding the activations moves its logits.
    """

    gaps: dict[str, np.ndarray]
    rounded: Passes


def run_reference(shape: Any, folder: Path, weights: Path | None, rounding: str, out: Path) -> Reference:
    """Compute the passes in transformers and save their logits in ``out``.

    weights: the GGUF to take them from; None for the checkpoint's own. rounding: as for weights of which type
    activations are rounded the second time round.
    """
    from reference.hf_model import Context, RouterGap, load_reference, rounded_activations, set_weights

    model = load_reference(folder)
    if weights is not None:
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        for name, values in dequantized_tensors(weights):
            set_weights(model, {name: without_padding(name, values, shapes[name])})
    gaps, rounded = {}, {}
    router = RouterGap(model)
    for name, logits in passes(shape, lambda: Context.new(model)):
        np.save(out / f"{name}.npy", logits)
        gaps[name] = router.of_positions()
    router.close()
    with rounded_activations(model, rounding, padded=rounding == "q4_k_m"):
        for name, logits in passes(shape, lambda: Context.new(model)):
            rounded[name] = Compared.of(logits, np.load(out / f"{name}.npy", mmap_mode="r"))
    return Reference(gaps, rounded)


@dataclass(frozen=True)
class Setup:
    """How the runtime opens a file, as arguments of ``_native.Model``."""

    kernels: str = "auto"
    kv_type: str = "auto"
    device: str = "cpu"
    n_gpu_layers: int = 0
    n_cpu_moe: int = 0

    def __str__(self) -> str:
        if self.device == "cpu":
            return f"CPU, {self.kernels}"
        parts = f"{self.n_gpu_layers} of 2 layers, experts of {self.n_cpu_moe} on the CPU"
        return f"host graph, {self.kernels}, {parts}"


def setups(type: str) -> list[Setup]:
    """ggml's kernels, the best of our own, and the graph of devices: of one type half the layers, with flash
    attention, which on the CPU sums in float16 and would be half of a 16-bit file's difference.
    """
    own = [kernels for kernels in _native.kernels() if kernels != "ggml"]
    found = [Setup("ggml", "f32")]
    if own and type != "f32":
        found.append(Setup(own[-1]))
    if type == "q4_k_m":
        return [*found, Setup("cuda", device="host", n_gpu_layers=1, n_cpu_moe=1)]
    return [*found, Setup("ggml", "f32", "host", n_gpu_layers=2)]


def run_ours(
    shape: Any, file: Path, type: str, setup: Setup, wanted: Path, n_passes: int | None = None
) -> Passes:
    """Compute the passes here, or the first ``n_passes``, and compare them with those saved in ``wanted``."""
    options = {
        name: value for name, value in vars(setup).items() if setup.device != "cpu" or "n_" not in name
    }
    model = _native.Model(str(file), available_cpus(), n_ctx=N_CTX, **options)
    assert_as_requested(model.description, type, setup)
    sessions: list[_native.Session] = []

    def new() -> _native.Session:
        sessions[:] = [_native.Session(model, N_CTX)]
        return sessions[0]

    found = {}
    for name, logits in islice(passes(shape, new), n_passes):
        found[name] = Compared.of(logits, np.load(wanted / f"{name}.npy", mmap_mode="r"))
        if setup.device == "cpu":
            assert_own_attention(model, sessions[0], 2)
        else:
            by_flash = model.description["kv_type"] == "f16"
            assert ("FLASH_ATTN_EXT" in sessions[0].step_ops) == by_flash, sessions[0].step_ops
    return found


def assert_as_requested(description: dict[str, Any], type: str, setup: Setup) -> None:
    """No comparison passes by falling back."""
    assert set(description["weight_types"]) == TYPES[type], description
    assert description["kernels"] == setup.kernels, description
    assert description["backend"] == ("CPU" if setup.device == "cpu" else setup.device), description
    assert description["kv_type"] == ("f32" if "f32" in (type, setup.kv_type) else "f16"), description
    assert description["n_gpu_layers"] == setup.n_gpu_layers, description
    assert description["n_cpu_moe"] == setup.n_cpu_moe, description


def judge(type: str, setup: Setup, found: Passes, reference: Reference) -> list[str]:
    """What keeps the bounds in none of the passes is named; an empty list if nothing."""
    wrong = []
    for name, compared in found.items():
        if type == "f32":
            wrong += [f"{name}: {what}" for what in judge_f32(setup, compared, reference.gaps[name])]
        else:
            allowed = ROUNDING_FACTOR * reference.rounded[name].middle()
            if not compared.middle() <= allowed:
                wrong.append(f"{name}: middle position {compared.middle():.1e}, allowed {allowed:.1e}")
    return wrong


def judge_f32(setup: Setup, compared: Compared, gaps: np.ndarray) -> list[str]:
    """With the bounds for small checkpoints, for the host graph too, whose GELU is a table of float16."""
    slack, tie = (1, ROUTER_TIE) if setup.device == "cpu" else (10, HOST_ROUTER_TIE)
    settled = gaps > tie
    if settled.mean() < MIN_SETTLED:
        return [f"{settled.mean():.0%} of positions don't depend on rounding: this comparison says little"]
    difference = compared.difference(settled)
    kept = difference.mean <= slack * MEAN_BOUND and difference.max <= slack * MAX_BOUND
    return [] if kept and difference.agreement == 1 else [str(difference)]


def run_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a process of its own, which returns all its memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result, peak = pool.submit(_with_peak, function, *arguments).result()
    say(f"{function.__name__}: peak memory {peak / 1e9:.1f} GB, mapped files included")
    return result


def _with_peak(function: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    result = function(*arguments)
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(text: str) -> None:
    print(f"{time.monotonic() - STARTED:5.0f} s  {text}", flush=True)


STARTED = time.monotonic()


def compare_all(shape: Any, folder: Path, run: Callable[..., Any] = run_in_process) -> list[str]:
    """Compare every type in every setup, in ``folder``; returns what does not keep its bound."""
    source, logits = folder / "checkpoint", folder / "logits"
    source.mkdir()
    logits.mkdir()
    write_checkpoint(source, shape)
    reference, wrong = None, []
    for type in TYPES:
        file = folder / f"{type}.gguf"
        convert(source, file, type)
        say(f"{type}: {file.stat().st_size / 1e9:.2f} GB converted")
        if type != "bf16":  # whose weights are the checkpoint's, as f32's are
            weights, rounding = (None, "bf16") if type == "f32" else (file, type)
            reference = run(run_reference, shape, source, weights, rounding, logits)
        for setup in setups(type):
            found = run(run_ours, shape, file, type, setup, logits)
            tell(type, setup, found, reference)
            wrong += [f"{type}, {setup}, {what}" for what in judge(type, setup, found, reference)]
        if type == "f32":
            wrong += notice_damage(shape, file, logits, reference, run)
        file.unlink()
    return wrong


def write_checkpoint(folder: Path, shape: Any) -> None:
    """The benchmarks' random checkpoint, with a vision tower of toy size, which transformers insists on."""
    n_weights, n_bytes = checkpoint.make_checkpoint(folder, shape)
    small = random_checkpoint.config_json(random_checkpoint.SHAPES["tiny"], "saved", "bf16")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    checkpoint.write_json(folder / "config.json", config | {"vision_config": small["vision_config"]})
    say(f"checkpoint of {n_weights / 1e6:.0f}e6 weights, {n_bytes / 1e9:.2f} GB")


def tell(type: str, setup: Setup, found: Passes, reference: Reference) -> None:
    for name, compared in found.items():
        line = f"{type}, {setup}, {name}: {compared.difference()}, middle position {compared.middle():.1e}"
        if type != "f32":
            rounded = reference.rounded[name]
            line += f"; transformers, rounded: mean {rounded.mean.mean():.1e}, middle {rounded.middle():.1e}"
        say(line)


def notice_damage(
    shape: Any, file: Path, logits: Path, reference: Reference, run: Callable[..., Any]
) -> list[str]:
    """Damage a float32 file in one number at a time: the comparison has to notice each."""
    reader, setup, unnoticed = gguf.GGUFReader(file, "r+"), setups("f32")[0], []
    field = reader.get_field("diffusion-gemma.attention.sliding_window")
    assert field is not None
    window = field.parts[field.data[0]]
    (scales,) = (tensor.data for tensor in reader.tensors if tensor.name == "blk.0.ffn_down_exps.scale")
    farthest = np.abs(scales - 1).argmax()
    for name, values, index, damaged, n_passes in (
        ("a window one token shorter", window, 0, window[0] - 1, 2),
        ("the scale of one expert dropped", scales, farthest, 1, 1),
    ):
        kept, values[index] = values[index], damaged
        found = run(run_ours, shape, file, "f32", setup, logits, n_passes)
        values[index] = kept
        tell(name, setup, found, reference)
        if not judge("f32", setup, found, reference):
            unnoticed.append(f"{name}: not noticed")
    return unnoticed


def shortage(folder: Path) -> str:
    """What this machine has too little of, or an empty string."""
    free = shutil.disk_usage(folder).free
    if free < DISK:
        return f"{DISK / 1e9:.0f} GB of disk are needed, {free / 1e9:.1f} are free in {folder} (--folder)"
    memory = Path("/proc/meminfo").read_text(encoding="utf-8")
    available = 1024 * int(memory.partition("MemAvailable:")[2].split()[0])
    if available < MEMORY:
        return f"{MEMORY / 1e9:.0f} GB of memory are needed, {available / 1e9:.1f} are available"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where a folder is made for the files, and removed again")
    folder = parser.parse_args().folder or Path(tempfile.gettempdir())
    if missing := shortage(folder):
        print(f"NOT CHECKED: parity at the released widths; {missing}")
        return 0
    with tempfile.TemporaryDirectory(prefix="pydiffusion-widths-", dir=folder) as temporary:
        wrong = compare_all(checkpoint.SHAPES["released"], Path(temporary))
    for line in wrong:
        say(f"FAILED: {line}")
    say("done" if not wrong else f"{len(wrong)} comparisons failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
