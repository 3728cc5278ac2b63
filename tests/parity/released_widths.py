"""Compare logits with transformers at the released model's widths.

    python tests/parity/released_widths.py [--folder DIR]

Two layers, one sliding and one full, with random weights and every other size as released: 128 experts, top 8,
262,144 tokens, a window of 1024, a canvas of 256 (2.4e9 weights). A file of each type is written, compared and
removed, against transformers in float32 with the file's own weights, dequantized by the package `gguf`. Each
step runs in a process of its own, so that the weights are in memory once at a time. Needs the extra
`reference`. docs/parity.md says what is required, and has the figures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference.dequantized import dequantized_tensors, without_padding
from reference.random_checkpoint import config_json, random_ids, write_json
from reference.random_checkpoint import SHAPES as SMALL_SHAPES
from support.models import Difference, assert_own_attention
from support.parity import MAX_BOUND, MEAN_BOUND
from support.scripts import load_script

from pydiffusion import _native
from pydiffusion._util.cpus import available_cpus
from pydiffusion.convert import convert

checkpoint = load_script("benchmarks/checkpoint.py")

N_CTX = 2048
#: Tokens of each prompt: within the sliding window of 1024, and beyond it.
PROMPTS = MappingProxyType({"short": 40, "long": 1300})


class Encoding(Protocol):
    """A session of ours, or the reference's cache."""

    def encode(self, ids: np.ndarray) -> object: ...

    def denoise(self, canvas: np.ndarray, self_conditioning: np.ndarray | None) -> np.ndarray: ...


def passes(
    shape: Any, new: Callable[[], Encoding], prompts: tuple[str, ...] = tuple(PROMPTS)
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and logits of the decoder passes that are compared."""
    canvas = random_ids(0, "canvas", shape.canvas, shape.vocab)
    for prompt in prompts:
        context = new()
        context.encode(random_ids(0, prompt, PROMPTS[prompt], shape.vocab))
        yield prompt, context.denoise(canvas, None)
        yield f"{prompt}, conditioned", context.denoise(canvas, conditioning(shape))
        if prompt == "long":
            context.encode(random_ids(0, "committed", shape.canvas, shape.vocab))
            yield f"{prompt}, after a commit, conditioned", context.denoise(canvas, conditioning(shape))


def conditioning(shape: Any) -> np.ndarray:
    """Logits to condition on, (canvas, vocab) float32: from nearly uniform distributions to a single token."""
    random = np.random.default_rng(0)
    scales = np.geomspace(0.3, 12, shape.canvas, dtype=np.float32)[:, None]
    return random.standard_normal((shape.canvas, shape.vocab), np.float32) * scales


@dataclass(frozen=True)
class Compared:
    """Two passes' logits: the difference over all, and in the canvas position of the middle."""

    difference: Difference
    middle: float

    def __str__(self) -> str:
        return f"{self.difference}, middle position {self.middle:.2e}"


def compare_rows(ours: np.ndarray, theirs: np.ndarray) -> Compared:
    """As ``support.models.compare``, with memory for one position."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert ours.dtype == theirs.dtype == np.float32
    gaps = [np.abs(a.astype(np.float64) - b) for a, b in zip(ours, theirs, strict=True)]
    means = [float(gap.mean()) for gap in gaps]
    agreement = float((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).mean())
    worst = float(np.max([gap.max() for gap in gaps]))
    return Compared(Difference(float(np.mean(means)), worst, agreement), float(np.median(means)))


@dataclass(frozen=True)
class Reference:
    """What transformers gives of each pass: the smallest gap between a chosen expert and the first left out,
    and how far rounded activations move its logits.
    """

    gaps: dict[str, float]
    rounded: dict[str, Compared]


def run_reference(shape: Any, folder: Path, file: Path | None, type: str, out: Path) -> Reference:
    """Compute the passes in transformers and save their logits in ``out``.

    ``file`` has the weights, if not the checkpoint; ``type``, unless "f32", says how activations are rounded
    a second time round.
    """
    from reference.hf_model import Context, RouterGap, load_reference, rounded_activations, set_weights

    model = load_reference(folder)
    if file is not None:
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        for name, values in dequantized_tensors(file):
            set_weights(model, {name: without_padding(name, values, shapes[name])})
    gaps, rounded = {}, {}
    router = RouterGap(model)
    for name, logits in passes(shape, lambda: Context.new(model)):
        np.save(out / f"{name}.npy", logits)
        gaps[name], router.smallest = router.smallest, float("inf")
    router.close()
    if type != "f32":
        with rounded_activations(model, type, padded=type == "q4_k_m"):
            for name, logits in passes(shape, lambda: Context.new(model)):
                rounded[name] = compare_rows(logits, np.load(out / f"{name}.npy", mmap_mode="r"))
    return Reference(gaps, rounded)


@dataclass(frozen=True)
class Setup:
    """How the runtime opens a file."""

    kernels: str = "auto"
    kv_type: str = "f32"
    device: str = "cpu"
    n_gpu_layers: int = -1
    n_cpu_moe: int = 0


def run_ours(
    shape: Any, file: Path, setup: Setup, wanted: Path, prompts: tuple[str, ...] = tuple(PROMPTS)
) -> dict[str, Compared]:
    """Compute the passes here and compare them with the reference's."""
    model = _native.Model(
        str(file), available_cpus(), n_ctx=N_CTX, device=setup.device, kernels=setup.kernels, kv_type=setup.kv_type,
        n_gpu_layers=setup.n_gpu_layers, n_cpu_moe=setup.n_cpu_moe,
    )  # fmt: skip
    print(model.description)
    sessions: list[_native.Session] = []

    def new() -> _native.Session:
        sessions[:] = [_native.Session(model, N_CTX)]
        return sessions[0]

    found = {}
    for name, logits in passes(shape, new, prompts):
        found[name] = compare_rows(logits, np.load(wanted / f"{name}.npy", mmap_mode="r"))
        print(dict(sessions[0].step_ops))
    return found
