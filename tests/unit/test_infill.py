"""Infilling and edits: the surrounding text stays, and the demo model fills sudokus."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pydiffusion import ContextOverflowError, DiffusionModel, DraftEvent
from pydiffusion.demo import checkpoint_path, puzzles, sudoku
from pydiffusion.demo.tasks import sudoku_prompt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    from pydiffusion.convert import convert

    target = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(checkpoint_path(), target, "q8_0")
    return DiffusionModel(target, n_threads=1, n_ctx=512)


TEXT = "def f(x):\n    <|hole|>\n    return <|hole:2|> + y"


def test_the_text_around_the_holes_is_kept(model: DiffusionModel) -> None:
    filled = model.infill(TEXT, seed=1, steps=4, hole_tokens=5)
    first, second = filled.holes
    assert filled.text == TEXT.replace("<|hole|>", first).replace("<|hole:2|>", second)
    assert len(model.tokenize(first, add_bos=False)) <= 5
    assert model.infill(TEXT, seed=1, steps=4, hole_tokens=5).text == filled.text


def test_a_text_that_begins_with_its_hole_follows_a_bos(model: DiffusionModel) -> None:
    """This file has a bos and add_bos_token false."""
    assert not model.tokenizer.add_bos and model.tokenizer.bos_id is not None
    assert model.infill("<|hole:3|> xyz", seed=1, steps=3).text.endswith(" xyz")


def test_an_instruction_puts_all_of_the_text_on_the_canvas(model: DiffusionModel) -> None:
    seen: list[DraftEvent] = []
    head = model.tokenize("abc ", add_bos=False)
    filled = model.infill(
        "abc <|hole:3|> xyz", instruction="copy: abc", seed=1, steps=3,
        on_event=lambda event: seen.append(event) if isinstance(event, DraftEvent) else None,
    )  # fmt: skip
    assert filled.text.startswith("abc ") and filled.text.endswith(" xyz")
    assert len(seen) > 1
    for draft in seen:
        assert draft.tokens[: len(head)].tolist() == head


def test_a_hole_ends_at_a_control_token_and_may_be_empty(model: DiffusionModel) -> None:
    from pydiffusion.generation.infill import Hole, Layout

    a, b = (model.tokenize(letter, add_bos=False) for letter in "ab")
    layout = Layout("head ", [[*a], Hole(3), [*b], Hole(2)])
    eos = model.tokenizer.eos_id
    assert eos is not None
    text, holes = layout.read([*a, *b, eos, *a, *b, eos, *a], model.tokenizer)
    assert (text, holes) == ("head abb", ("b", ""))


def test_texts_longer_than_a_canvas(model: DiffusionModel) -> None:
    text = "one <|hole:4|>" + " and so on" * 12 + " <|hole:4|> end"
    filled = model.infill(text, seed=2, steps=2)
    assert len(filled.completion.canvas_steps) > 1
    for hole in filled.holes:
        text = text.replace("<|hole:4|>", hole, 1)
    assert filled.text == text


def test_edits_begin_with_the_existing_text(model: DiffusionModel) -> None:
    text = "red green blue"
    seen: list[DraftEvent] = []
    edited = model.edit(text, [(4, 9)], more_tokens=0, seed=1, steps=3, on_event=lambda e: seen.append(e))
    assert edited.text == "red " + edited.holes[0] + " blue"
    # A single step from the given canvas: the same as denoising it by hand.
    session = model.new_session()
    session.encode(model.tokenize("red "))
    inside = model.tokenize("green", add_bos=False)
    behind = model.tokenize(" blue", add_bos=False)
    canvas = inside + behind
    canvas += [model.tokenizer.eos_id or 0] * (model.canvas_length - len(canvas))
    draft = session.denoise(canvas).argmax(axis=1)
    (first, *_) = [event for event in seen if isinstance(event, DraftEvent)]
    assert first.tokens[: len(inside)].tolist() == draft[: len(inside)].tolist()


@pytest.mark.parametrize("n_puzzles", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_sudokus_keep_their_givens_and_agree_with_them(
    model: DiffusionModel, n_puzzles: int, report: Callable[[str], None]
) -> None:
    """Held givens against the model's own copying of them: solved puzzles and steps."""
    solved = {"held": 0, "free": 0}
    steps = {"held": 0, "free": 0}
    for seed, (puzzle, _) in enumerate(puzzles()[:n_puzzles]):
        rows = sudoku.as_rows(puzzle)
        prompt = sudoku_prompt(puzzle)
        drafts: list[DraftEvent] = []
        filled = model.infill(
            rows.replace(".", "<|hole:1|>"), instruction=prompt, seed=seed,
            on_event=lambda event, drafts=drafts: (
                drafts.append(event) if isinstance(event, DraftEvent) else None
            ),
        )  # fmt: skip
        cells = [model.tokenize(cell, add_bos=False) for cell in rows]  # one token each
        givens = [(i, token) for i, (token,) in enumerate(cells) if rows[i] != "."]
        for draft in drafts:  # held tokens have no entropy, unlike those that the model copies itself
            assert all((draft.tokens[i], draft.entropy[i]) == (token, 0) for i, token in givens)
        assert drafts
        assert len(filled.holes) == rows.count(".") and all(len(hole) <= 1 for hole in filled.holes)
        holes = iter(filled.holes)
        assert filled.text == "".join(next(holes) if cell == "." else cell for cell in rows)
        free = model.new_session()
        free.encode(model.chat_prompt([{"role": "user", "content": prompt}]))
        done = free.complete(seed=seed, max_tokens=model.canvas_length)
        for name, text, n in (
            ("held", filled.text, filled.completion.steps),
            ("free", done.text, done.steps),
        ):
            grid = text.replace("\n", "")
            solved[name] += len(grid) == 36 and sudoku.solves(puzzle, grid)
            steps[name] += n
    report(
        f"sudokus, {n_puzzles}: givens held {solved['held']} solved in {steps['held'] / n_puzzles:.1f} steps,"
        f" not held {solved['free']} in {steps['free'] / n_puzzles:.1f}"
    )
    assert solved["held"] >= n_puzzles / 2
    assert solved["held"] >= 0.8 * solved["free"] > 0


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("no hole", {}, "has no hole"),
        ("<|hole:0|>", {}, "hole 1 has no tokens"),
        ("<|hole|>", {"hole_tokens": 0}, "hole_tokens is 0"),
        ("a <|hole|>", {"max_tokens": 4}, "max_tokens can't be chosen"),
        ("a <|hole|>", {"json_schema": True}, "json_schema can't be chosen"),
        ("a <|hole|>", {"stop_on_repetition": True}, "stop_on_repetition can't be chosen"),
    ],
)
def test_refusals(model: DiffusionModel, text: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.infill(text, **options)  # type: ignore[arg-type]
    with pytest.raises(ContextOverflowError, match="do not fit"):
        model.infill("a <|hole:600|>")
    with pytest.raises(ValueError, match="overlaps"):
        model.edit("abc", [(0, 2), (1, 3)])
