"""The demo's adapter: small, PEFT's own format, and that it solves sudokus that the demo model can't."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors import safe_open

from pydiffusion import DiffusionModel, GenerationOptions
from pydiffusion.convert import convert
from pydiffusion.demo import checkpoint_path, tasks, upright

N_PUZZLES = 40
EASY = (6, 13, 20, 27)
"""Held-out puzzles with 18 givens."""


def test_the_adapter_is_small_and_as_peft_saves_it() -> None:
    folder = upright.adapter_path()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10**6
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 16, 16)
    with safe_open(folder / "adapter_model.safetensors", framework="np") as file:
        names = list(file.keys())
        assert len(names) == 156
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    sides = {name.removeprefix("base_model.model.model.").split(".")[0] for name in names}
    assert sides == {"decoder", "encoder"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    path = tmp_path_factory.mktemp("demo") / "demo-q4_k_m.gguf"
    convert(checkpoint_path(), path, type="q4_k_m")
    return DiffusionModel(path, n_ctx=512)


def solved(model: DiffusionModel, indices: Sequence[int], lora: list[Path]) -> tuple[int, float]:
    """Number of these held-out puzzles solved, and mean steps."""
    pairs = upright.held_out_puzzles(max(indices) + 1)
    chats = [[{"role": "user", "content": tasks.sudoku_prompt(pairs[index][0])}] for index in indices]
    options = GenerationOptions(max_tokens=48, seed=1, lora=lora)
    done = dict(model.generate_batch(map(model.chat_prompt, chats), options))
    right = [upright.check(pairs[index][0], done[place].text) for place, index in enumerate(indices)]
    return sum(right), sum(one.steps for one in done.values()) / len(done)


def test_it_solves_what_the_model_cannot_in_fewer_steps(model: DiffusionModel) -> None:
    n_before, steps_before = solved(model, EASY, [])
    n_after, steps_after = solved(model, EASY, [upright.adapter_path()])
    assert n_before <= 1
    assert n_after >= 3
    assert steps_after < steps_before


@pytest.mark.slow
def test_it_solves_most_held_out_puzzles(model: DiffusionModel) -> None:
    """500 puzzles: docs/demo-model.md."""
    n_before, steps_before = solved(model, range(N_PUZZLES), [])
    n_after, steps_after = solved(model, range(N_PUZZLES), [upright.adapter_path()])
    assert n_before <= 0.1 * N_PUZZLES
    assert n_after >= 0.7 * N_PUZZLES
    assert steps_after < steps_before
