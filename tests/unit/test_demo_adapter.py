"""The demo's adapter: small, PEFT's own format, and that it solves sudokus that the demo model can't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from pydiffusion import DiffusionModel, GenerationOptions
from pydiffusion.convert import convert
from pydiffusion.demo import checkpoint_path, tasks, upright

N_PUZZLES = 14


def test_the_adapter_is_small_and_as_peft_saves_it() -> None:
    folder = upright.adapter_path()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10**6
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 16, 16)
    with safe_open(folder / "adapter_model.safetensors", framework="np") as file:
        names = list(file.keys())
        assert len(names) == 156
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert all(name.startswith("base_model.model.model.decoder.") for name in names), (
        "the encoder is as it was"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    path = tmp_path_factory.mktemp("demo") / "demo-q4_k_m.gguf"
    convert(checkpoint_path(), path, type="q4_k_m")
    return DiffusionModel(path, n_ctx=512)


def solved(model: DiffusionModel, lora: list[Path]) -> tuple[int, float]:
    """Number of puzzles solved, and mean steps."""
    pairs = upright.held_out_puzzles(N_PUZZLES)
    prompts = [
        model.chat_prompt([{"role": "user", "content": tasks.sudoku_prompt(puzzle)}]) for puzzle, _ in pairs
    ]
    done = dict(model.generate_batch(prompts, GenerationOptions(max_tokens=48, seed=1, lora=lora)))
    right = [upright.check(puzzle, done[index].text) for index, (puzzle, _) in enumerate(pairs)]
    return sum(right), sum(one.steps for one in done.values()) / len(done)


def test_it_solves_what_the_model_cannot_in_fewer_steps(model: DiffusionModel) -> None:
    n_before, steps_before = solved(model, [])
    n_after, steps_after = solved(model, [upright.adapter_path()])
    # 500 puzzles: docs/demo-model.md.
    assert n_before <= 2
    assert n_after >= 8
    assert steps_after < steps_before
