"""The demo model against transformers, run live on held-out prompts: logits and whole runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import assert_own_attention, compare, mean_kl, replay
from support.parity import ROUTER_TIE

from pydiffusion import DiffusionModel, _native, demo
from pydiffusion.convert import convert
from pydiffusion.demo import tasks

pytestmark = [pytest.mark.reference, pytest.mark.slow]

TYPES = ("f32", "bf16", "q8_0", "q4_k_m")
AGREEMENT, MEAN_KL = 0.99, 1e-3


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    try:
        return demo.checkpoint_path()
    except FileNotFoundError as error:
        pytest.skip(f"NOT CHECKED: the demo model against transformers; {error}")


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    for type in TYPES:
        convert(checkpoint, folder / f"{type}.gguf", type)
    return {type: folder / f"{type}.gguf" for type in TYPES}


@pytest.fixture(scope="module")
def prompts(files: dict[str, Path]) -> list[np.ndarray]:
    """Two held-out examples of every task and four held-out puzzles, as the chat template writes them."""
    model, rng = DiffusionModel(files["f32"], n_threads=1), random.Random(0)
    texts = [tasks.generate(task, rng, held_out=True).prompt for task in tasks.TASKS for _ in range(2)]
    texts += [tasks.sudoku_prompt(puzzle) for puzzle, _ in demo.puzzles()[:4]]
    chats = [model.chat_prompt([{"role": "user", "content": text}]) for text in texts]
    return [np.array(ids, dtype=np.int32) for ids in chats]


def options(model: _native.Model, seed: int, **changed: Any) -> Any:
    """The file's own sampler, for one canvas that no eos ends early."""
    from reference.record_generation import Options

    h = model.hparams
    names = ("t_min", "t_max", "entropy_bound", "stability_threshold", "confidence_threshold")
    chosen: dict[str, Any] = {name: h[name] for name in names}
    return Options(**{"max_tokens": model.canvas_length, "steps": 16, "seed": seed, **chosen, **changed})


@pytest.mark.parametrize("type", TYPES)
def test_logits(
    type: str, checkpoint: Path, files: dict[str, Path], prompts: list[np.ndarray], report: Callable
) -> None:
    """Every step that transformers takes from noise to text, seen by both."""
    from reference.dequantized import read_dequantized
    from reference.hf_model import Context, RouterGap, load_reference, set_weights
    from reference.record_generation import record_generation

    reference = load_reference(checkpoint)
    set_weights(reference, read_dequantized(files[type]))
    model = _native.Model(str(files[type]), n_threads=1)
    ours, theirs, tied = [], [], []
    for seed, prompt in enumerate(prompts):
        record = record_generation(reference, prompt, options(model, seed))
        session, context = _native.Session(model, model.n_ctx_train), Context.new(reference)
        session.encode(prompt)
        context.encode(prompt)
        for canvas, conditioning in record.inputs:
            router = RouterGap(reference)
            theirs.append(context.denoise(canvas, conditioning))
            router.close()
            ours.append(session.denoise(canvas, conditioning))
            tied.append(router.smallest < ROUTER_TIE)
        assert_own_attention(model, session, len(model.hparams["sliding"]))
    difference = compare(np.concatenate(ours), np.concatenate(theirs))
    kl = mean_kl(np.concatenate(theirs), np.concatenate(ours))
    report(
        f"demo: {type}, {len(prompts)} prompts, {len(ours)} passes of {model.canvas_length} positions: "
        f"{difference}, mean KL {kl:.1e}"
    )
    assert difference.agreement >= AGREEMENT, difference
    assert kl < MEAN_KL
    if type == "f32":
        assert difference.mean <= 1e-3, difference
        assert sum(tied) <= 0.25 * len(tied), "too many passes hang on ties: this comparison says little"
        worst = [compare(a, b).max for a, b, tie in zip(ours, theirs, tied, strict=True) if not tie]
        report(f"demo: f32, {sum(tied)} passes hang on a tie of experts; elsewhere max {max(worst):.1e}")
        assert max(worst) <= 1e-2


@pytest.mark.parametrize("n_canvases", [1, 2])
def test_replay(
    n_canvases: int, checkpoint: Path, files: dict[str, Path], prompts: list[np.ndarray], report: Callable
) -> None:
    """Whole runs of ``generate`` with our random numbers: same accepted sets, drafts and stops."""
    from reference.hf_model import load_reference, nudged
    from reference.record_generation import hangs_on_rounding, record_generation

    reference = load_reference(checkpoint)
    almost = nudged(reference, 3e-6)
    model = _native.Model(str(files["f32"]), n_threads=1, kv_type="f32")
    n_runs, n_steps, n_left_out = 0, 0, 0
    for seed, prompt in enumerate(prompts[:: 1 if n_canvases == 1 else -1]):
        chosen = options(model, seed, max_tokens=n_canvases * model.canvas_length)
        record = record_generation(reference, prompt, chosen)
        if hangs_on_rounding(record, record_generation(almost, prompt, chosen)):
            n_left_out += 1
            continue
        wanted = record.arrays() | {"prompt_ids": prompt}
        replay(model, wanted | {f"options/{key}": np.array(value) for key, value in asdict(chosen).items()})
        n_runs, n_steps = n_runs + 1, n_steps + len(wanted["step"])
        if n_runs == 4:
            break
    report(
        f"demo replay: {n_runs} runs of {n_canvases} canvases, {n_steps} steps alike; "
        f"{n_left_out} runs left out, as a decision in them hangs on rounding"
    )
    assert n_runs == 4
