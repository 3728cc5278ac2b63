"""The demo model: its files, and that its GGUF solves held-out puzzles and text tasks."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from pydiffusion import DiffusionModel, GenerationOptions
from pydiffusion.convert import convert
from pydiffusion.demo import checkpoint_path, puzzles, tasks

VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
TEXT_DIGEST = "0d7fdb479934df70572d8b5d26769bffdf17025890ac203fb498a9ca97f6e0bc"
N_PUZZLES = 60
N_TEXTS = 20
# The text tasks that the shipped weights have learned; not count (docs/demo-model.md).
LEARNED = ("sort", "reverse", "add", "json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    path = tmp_path_factory.mktemp("demo") / "demo-q4_k_m.gguf"
    convert(checkpoint_path(), path, type="q4_k_m")
    return DiffusionModel(path, n_ctx=512)


def answer(model: DiffusionModel, message: str, seed: int, max_tokens: int) -> tuple[str, int]:
    prompt = model.chat_prompt([{"role": "user", "content": message}])
    done = model.generate(prompt, GenerationOptions(max_tokens=max_tokens, seed=seed))
    return done.text, done.steps


def test_the_checkpoint_is_small_and_whole() -> None:
    folder = checkpoint_path()
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12 * 2**20
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 6]
    assert generation["max_denoising_steps"] == 48


def test_the_checkpoint_has_weights_in_bfloat16_and_scalars_that_differ() -> None:
    scalars: dict[str, list[str]] = {"encoder": [], "decoder": []}
    with safe_open(checkpoint_path() / "model.safetensors", framework="np") as file:
        for name in file.keys():  # noqa: SIM118 -- this object can't be iterated
            assert file.get_slice(name).get_dtype() == "BF16", name
            if name.endswith("layer_scalar"):
                scalars[name.split(".")[1]].append(name)
    assert len(scalars["encoder"]) == len(scalars["decoder"]) == 6
    model_scalars = _scalars(checkpoint_path())
    assert all(encoder != decoder for encoder, decoder in model_scalars)


def _tensors(folder: Path) -> dict[str, bytes]:
    """The raw bytes of every tensor: numpy has no bfloat16."""
    blob = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: blob[8 + size + start : 8 + size + end] for name, (start, end) in places.items()}


def _scalars(folder: Path) -> list[tuple[int, int]]:
    """(encoder, decoder) of each layer, as the raw 16 bits."""
    tensors = _tensors(folder)

    def bits(name: str) -> int:
        return int.from_bytes(tensors[name], "little")

    return [
        (
            bits(f"model.encoder.language_model.layers.{layer}.layer_scalar"),
            bits(f"model.decoder.layers.{layer}.layer_scalar"),
        )
        for layer in range(6)
    ]


def test_the_text_weights_never_change() -> None:
    """Goldens and adapters rest on them; the vision tower was trained around them."""
    digest = hashlib.sha256()
    tensors = _tensors(checkpoint_path())
    names = sorted(name for name in tensors if not name.startswith(VISION))
    for name in names:
        digest.update(name.encode() + b"\0" + tensors[name])
    assert (len(names), digest.hexdigest()) == (142, TEXT_DIGEST)


def test_the_vision_weights_take_at_most_two_megabytes() -> None:
    sizes = [len(data) for name, data in _tensors(checkpoint_path()).items() if name.startswith(VISION)]
    assert 0 < sum(sizes) <= 2_000_000


def test_a_sudoku_is_one_token_per_cell() -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    puzzle, _ = puzzles()[0]
    assert tokenizer.encode(puzzle, add_special_tokens=False).tokens == list(puzzle)


@pytest.mark.slow
def test_q4_k_m_solves_held_out_puzzles(model: DiffusionModel) -> None:
    solved, steps = 0, 0
    for index, (puzzle, solution) in enumerate(puzzles()[:N_PUZZLES]):
        prompt = tasks.sudoku_prompt(puzzle)
        text, n_steps = answer(model, prompt, seed=index, max_tokens=48)
        steps += n_steps
        right = text.replace("\n", "") == solution
        assert right == tasks.check("sudoku", prompt, text), "the checker and the known solution disagree"
        solved += right
    print(f"{solved} of {N_PUZZLES} solved, {steps / N_PUZZLES:.1f} steps each")
    assert solved >= 0.9 * N_PUZZLES
    assert steps < 48 * N_PUZZLES, "adaptive stopping never stopped a canvas"


@pytest.mark.slow
@pytest.mark.parametrize("task", LEARNED)
def test_q4_k_m_does_the_learned_text_tasks(model: DiffusionModel, task: str) -> None:
    rng = random.Random(41)
    right = 0
    for index in range(N_TEXTS):
        example = tasks.generate(task, rng, held_out=True)
        text, _ = answer(model, example.prompt, seed=index, max_tokens=144)
        right += tasks.check(task, example.prompt, text)
    print(f"{task}: {right} of {N_TEXTS}")
    assert right >= 0.7 * N_TEXTS


@pytest.mark.slow
def test_a_long_answer_fills_several_canvases(model: DiffusionModel) -> None:
    """The second canvas continues where the first ended, so the committed canvas was encoded."""
    prompt = model.chat_prompt([{"role": "user", "content": "count: 12 to 40"}])
    done = model.generate(prompt, GenerationOptions(max_tokens=144, seed=1))
    assert len(done.canvas_steps) >= 2
    assert done.finish_reason == "eos"
    numbers = [int(word) for word in done.text.split()]
    first_canvas = model.canvas_length // 3
    assert numbers[: first_canvas + 2] == list(range(12, 12 + first_canvas + 2))
