"""Record what transformers computes for the random checkpoints. Needs torch and transformers, and a minute.

    cd tests
    python -m reference.make_goldens            # writes tests/reference/goldens/*.npz
    python -m reference.make_goldens --check    # compares with what is there instead

Weights are not written: ``random_checkpoint`` makes them again, the digest in each file says which they are.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import DiffusionGemmaForBlockDiffusion

from reference.hf_model import Context, RouterGap, load_reference, nudged
from reference.random_checkpoint import SHAPES, digest, random_ids, write_checkpoint
from reference.record_generation import Options, Record, hangs_on_rounding, record_generation

GOLDENS = Path(__file__).parent / "goldens"

#: Golden file -> (shape, seed, dtype of the source).
SOURCES = {
    "small-f32": ("small", 0, "f32"),
    "small-bf16": ("small", 1, "bf16"),
    "wide-f32": ("wide", 2, "f32"),
}

#: Below this distance between the two best logits, two correct evaluations may name different winners.
ARGMAX_GAP = 2e-3

#: Where the search for a telling run begins: where it ended last time, so that it is over at once. The seeds
#: are larger than 32 bits, so that both halves of the generator's key count.
FIRST_SEED = {
    ("small", "length"): 2**33 + 5,
    ("small", "eos"): 2**33 + 9,
    ("wide", "length"): 2**33 + 23,
    ("wide", "eos"): 2**33 + 130,
}


def conditioning(logits: np.ndarray) -> np.ndarray:
    """The logits as the sampler hands them to the next step, at a temperature of the schedule's middle."""
    return (logits / np.float32(0.6)).astype(np.float32)


def logits_cases(model: DiffusionGemmaForBlockDiffusion, shape: str, seed: int) -> dict[str, np.ndarray]:
    """Prompts of 7 tokens and of more than two windows, and a second canvas after a commit."""
    s = SHAPES[shape]
    out: dict[str, np.ndarray] = {}
    for case, n_prompt in (("short", 7), ("long", 3 * s.window + 5), ("commit", 20)):
        context, router = Context.new(model), RouterGap(model)
        prompt = random_ids(seed, case + "prompt", n_prompt, s.vocab)
        out[f"{case}/prompt_ids"] = prompt
        hidden = context.encode(prompt)
        canvas = random_ids(seed, case + "canvas", s.canvas, s.vocab)
        if case == "commit":
            committed = context.denoise(canvas).argmax(axis=1).astype(np.int32)
            out["commit/committed_ids"] = committed
            hidden = np.concatenate([hidden, context.encode(committed)])
            canvas = random_ids(seed, case + "canvas1", s.canvas, s.vocab)
        out[f"{case}/canvas_ids"] = canvas
        out[f"{case}/encoder_last_hidden_state"] = hidden
        out[f"{case}/logits"] = context.denoise(canvas)
        out[f"{case}/self_conditioning_logits"] = conditioning(out[f"{case}/logits"])
        out[f"{case}/logits_sc"] = context.denoise(canvas, out[f"{case}/self_conditioning_logits"])
        out[f"{case}/router_gap"] = np.array(router.smallest)
        router.close()
        for name in ("logits", "logits_sc"):
            best = np.sort(out[f"{case}/{name}"], axis=1)
            gap = float((best[:, -1] - best[:, -2]).min())
            if gap < ARGMAX_GAP:
                raise ValueError(f"{shape}, {case}/{name}: two logits {gap:.1e} apart; take another seed")
    return out


def is_telling(record: Record, other: Record, s_canvas: int) -> bool:
    """Whether a run shows every behaviour and hangs on no rounding: ``other`` is that of nudged weights."""
    if hangs_on_rounding(record, other):
        return False
    r = record.arrays()
    last_steps = [r["step"][r["canvas_index"] == i].min() for i in range(r["canvas_index"].max() + 1)]
    n_accepted = r["accepted"].sum(axis=1)
    robust = (
        r["cdf_margin"].min() > 1e-4
        and r["accept_margin"].min() > 1e-3
        and r["argmax_margin"].min() > ARGMAX_GAP
        and r["stop_margin"].min() > 5e-4
    )
    partial = ((n_accepted > 0) & (n_accepted < s_canvas)).sum() >= 6
    return bool(robust and partial and len(last_steps) >= 2 and max(last_steps) > 1)


def replays(model: DiffusionGemmaForBlockDiffusion, shape: str) -> dict[str, np.ndarray]:
    """Runs of ``generate`` over several canvases: ended by length, inside a canvas, and by an eos token."""
    s, almost = SHAPES[shape], nudged(model, 3e-6)
    out: dict[str, np.ndarray] = {}
    runs = {
        "length": {"max_tokens": 3 * s.canvas - 3, "steps": 12, "stability_threshold": 1},
        "eos": {"max_tokens": 8 * s.canvas, "steps": 10, "stability_threshold": 2},
    }
    for name, chosen in runs.items():
        for seed in itertools.count(FIRST_SEED[shape, name]):
            prompt = random_ids(seed & 0xFF, "replay" + name, 2 * s.window + 3, s.vocab)
            options = Options(
                t_min=0.3, t_max=0.8, entropy_bound=1.5, confidence_threshold=0.4, seed=seed, **chosen
            )
            if name == "eos":  # a token of the second canvas becomes an eos id, so that the run ends there
                first = record_generation(model, prompt, replace(options, max_tokens=2 * s.canvas))
                inside = [t for t in first.tokens[s.canvas + 2 :] if t not in first.tokens[: s.canvas]]
                if not inside:
                    continue
                options = replace(options, eos=(1, int(inside[0])))
            record = record_generation(model, prompt, options)
            if is_telling(record, record_generation(almost, prompt, options), s.canvas):
                break
        out[f"{name}/prompt_ids"] = prompt
        out |= {f"{name}/options/{key}": np.array(value) for key, value in asdict(options).items()}
        out |= {f"{name}/{key}": value for key, value in record.arrays().items()}
    return out


def make() -> dict[str, dict[str, np.ndarray]]:
    """All goldens by file name."""
    torch.set_num_threads(1)
    versions = np.array([f"torch {torch.__version__}", f"transformers {transformers.__version__}"])
    out: dict[str, dict[str, np.ndarray]] = {}
    for name, (shape, seed, dtype) in SOURCES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = load_reference(write_checkpoint(Path(folder), shape, seed=seed, dtype=dtype))
        about = {"digest": np.array(digest(shape, seed)), "versions": versions}
        out[f"logits-{name}"] = about | logits_cases(model, shape, seed)
        if dtype == "f32":
            out[f"replay-{name}"] = about | replays(model, shape)
    return out


def check(made: dict[str, dict[str, np.ndarray]]) -> int:
    """Compare with the goldens on disk; floats may differ by how another CPU rounds."""
    worst = 0.0
    for name, arrays in made.items():
        with np.load(GOLDENS / f"{name}.npz") as old:
            if set(old) != set(arrays):
                print(f"{name}: other keys: {sorted(set(old) ^ set(arrays))}", file=sys.stderr)
                return 1
            for key, value in arrays.items():
                if value.dtype.kind == "f":
                    worst = max(worst, float(np.abs(old[key] - value).max(initial=0.0)))
                elif key != "versions" and not np.array_equal(old[key], value):
                    print(f"{name}: {key} differs", file=sys.stderr)
                    return 1
    print(f"largest difference of a float: {worst:.1e}")
    return 0 if worst < 1e-3 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the files there, write nothing")
    args = parser.parse_args()
    made = make()
    if args.check:
        return check(made)
    GOLDENS.mkdir(exist_ok=True)
    for name, arrays in made.items():
        np.savez_compressed(GOLDENS / f"{name}.npz", **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
