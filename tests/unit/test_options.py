"""Resolved options: what a caller leaves open comes from the file or from the reference, once."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffusion import GenerationOptions, ResolvedOptions

N_VOCAB = 100
CANVAS = 32
FILE: dict[str, Any] = {
    "diffusion.canvas_length": CANVAS,
    "diffusion.eb_max_steps": 16,
    "tokenizer.ggml.eos_token_id": 1,
}
MAY_BE_NONE = {"json_schema", "regex", "thinking_budget"}

share = st.floats(0, 1, exclude_max=True)
number = st.floats(0, 1e6)
# Values of each option that are permitted, whatever the others are.
PERMITTED: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 2**31 - 1),
    "steps": st.integers(1, 2**31 - 1),
    "t_min": st.floats(0, 0.4),
    "t_max": st.floats(0.4, 1e6),
    "entropy_bound": number,
    "stability_threshold": st.integers(0, 2**31 - 1),
    "confidence_threshold": number,
    "dropped_mass": share,
    "canvas_length": st.integers(1, CANVAS),
    "seed": st.integers(0, 2**64 - 1),
    "stop": st.one_of(st.text(min_size=1), st.lists(st.text(min_size=1), max_size=3)),
    "eos": st.one_of(st.integers(0, N_VOCAB - 1), st.lists(st.integers(0, N_VOCAB - 1), max_size=3)),
    "canvas": st.lists(st.one_of(st.none(), st.integers(-1, N_VOCAB - 1)), max_size=4),
    "stop_on_repetition": st.booleans(),
    "trim_after_eos": st.booleans(),
}


def test_without_a_file_every_option_but_three_has_a_value() -> None:
    resolved = GenerationOptions().resolve({}, N_VOCAB)
    assert {field.name for field in fields(ResolvedOptions)} == {f.name for f in fields(GenerationOptions)}
    for field in fields(resolved):
        assert (getattr(resolved, field.name) is None) == (field.name in MAY_BE_NONE), field.name
    assert (resolved.steps, resolved.t_max, resolved.canvas_length, resolved.eos) == (48, 0.8, 256, ())


def test_no_field_of_resolved_options_can_be_left_out() -> None:
    given = vars(GenerationOptions().resolve(FILE, N_VOCAB))
    for name in given:
        with pytest.raises(TypeError, match=name):
            ResolvedOptions(**{other: value for other, value in given.items() if other != name})


@settings(deadline=None, derandomize=True)
@given(st.fixed_dictionaries({}, optional=PERMITTED))
def test_what_is_given_stays_and_resolving_again_changes_nothing(given_options: dict[str, Any]) -> None:
    options = GenerationOptions(**given_options)
    resolved = options.resolve(FILE, N_VOCAB)
    for name in given_options:
        assert getattr(resolved, name) == getattr(options, name)
    for name, value in vars(resolved).items():
        assert (value is None) == (name in MAY_BE_NONE)
        if isinstance(value, float):
            assert math.isfinite(value)
    assert isinstance(resolved.stop, tuple) and isinstance(resolved.eos, tuple)
    assert resolved.resolve(FILE, N_VOCAB) == resolved
    assert resolved.resolve({"diffusion.eb_max_steps": 3, "tokenizer.ggml.eos_token_id": 7}, N_VOCAB) == (
        resolved
    )


def test_a_canvas_length_is_at_most_the_file_s() -> None:
    assert GenerationOptions(canvas_length=CANVAS).resolve(FILE, N_VOCAB).canvas_length == CANVAS
    with pytest.raises(ValueError, match=f"canvas_length is 33; this model allows 1 to {CANVAS}"):
        GenerationOptions(canvas_length=CANVAS + 1).resolve(FILE, N_VOCAB)


def test_every_unset_seed_is_drawn() -> None:
    assert len({GenerationOptions().resolve(FILE, N_VOCAB).seed for _ in range(20)}) > 15
