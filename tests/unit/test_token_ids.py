"""Token ids are checked where they enter the native code, each entry by the same rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydiffusion import DiffusionModel, _native
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.generation.token_ids import token_array


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> DiffusionModel:
    return DiffusionModel(gguf_file("small"), n_threads=1, n_ctx=256)


def int32(*ids: int) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


def begin(session: _native.Session, **options: Any) -> None:
    session.begin(**{**ENTROPY_BOUND_DEFAULTS, "max_tokens": 64, "seed": 0, "eos": [], **options})


def entries(model: DiffusionModel, wrong: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Calls with a wrong token, and its position; nothing else is wrong with them."""
    n = model.canvas_length
    canvas = np.zeros(n, dtype=np.int32)
    canvas[2] = wrong
    idle, guided, finished, saved = (model.new_session().native for _ in range(4))
    saved.encode(int32(5))
    begin(guided, guided=True)
    assert guided.next_step() is not None
    begin(finished, steps=1)
    assert finished.next_step() is not None
    return {
        "encode": (lambda: idle.encode(int32(1, wrong)), 1),
        "denoise": (lambda: idle.denoise(canvas, None), 2),
        "eos": (lambda: begin(idle, eos=[1, 2, wrong]), 2),
        "canvas": (lambda: begin(idle, canvas=int32(1, -2 if wrong < 0 else wrong)), 1),
        "candidates": (lambda: guided.candidates(1, int32(wrong)), 0),
        "impose": (lambda: guided.impose(canvas), 2),
        "amend": (lambda: finished.amend(int32(1, wrong, wrong)), 1),
        "restore": (lambda: idle.restore(int32(wrong), saved.cache_rows()), 0),
    }


@pytest.mark.parametrize("wrong", [None, -1, 2**31 - 1])
def test_every_native_entry_refuses_tokens_outside_the_vocabulary(
    model: DiffusionModel, wrong: int | None
) -> None:
    token = model.n_vocab if wrong is None else wrong
    for name, (call, position) in entries(model, token).items():
        with pytest.raises(ValueError, match=rf"^token -?\d+ at position {position}\b") as caught:
            call()
        assert f"outside the vocabulary, 0 to {model.n_vocab - 1}" in str(caught.value), name


def test_after_a_refusal_all_is_as_before(model: DiffusionModel) -> None:
    session, fresh = model.new_session().native, model.new_session().native
    for each in (session, fresh):
        each.encode(int32(1, 2, 3))
        begin(each, guided=True)
        assert each.next_step() is not None
    n = model.canvas_length
    for call in (
        lambda: session.encode(int32(model.n_vocab)),
        lambda: session.candidates(1, int32(-1)),
        lambda: session.impose(np.full(n, model.n_vocab, np.int32)),
        lambda: begin(session, eos=[model.n_vocab]),
    ):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            call()
    assert session.n_past == 3
    chosen = np.zeros(n, np.int32)
    assert np.array_equal(session.impose(chosen).canvas, fresh.impose(chosen).canvas)


@pytest.mark.parametrize("ids", [[0, 1, 2], (0, 1, 2), np.arange(3, dtype=np.uint8), np.arange(6)[::2] // 2])
def test_integers_of_any_kind_are_tokens(ids: Any) -> None:
    array = token_array(ids, 3)
    assert array.dtype == np.int32 and array.flags.c_contiguous and array.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^token 2 at position 2 is outside the vocabulary, 0 to 1$"):
        token_array(ids, 2)


def test_no_tokens() -> None:
    assert token_array([], 3).dtype == np.int32 and token_array([], 3).shape == (0,)


@pytest.mark.parametrize("wrong", [-1, 2**31, -(2**31) - 1, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)])
def test_integers_are_not_wrapped(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"^token {wrong} at position 1 is outside the vocabulary, 0 to 9$"):
        token_array([3, wrong], 10)
    with pytest.raises(ValueError, match="at position 0 is outside the vocabulary"):
        token_array(np.asarray([2**64 - 1], dtype=np.uint64), 10)


@pytest.mark.parametrize("ids", [[1.0], ["a"], [True], [None], [2**64]])
def test_what_is_no_integer_is_a_type_error(ids: Any) -> None:
    with pytest.raises(TypeError, match="token ids must be integers, not"):
        token_array(ids, 10)


def test_ids_have_one_dimension() -> None:
    for ids in ([[1, 2]], 5):
        with pytest.raises(ValueError, match="token ids must be one-dimensional"):
            token_array(ids, 10)  # type: ignore[arg-type]
