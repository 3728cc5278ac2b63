"""Resolved options: what a caller leaves open comes from the file or from the reference, once.

An error about a refused value names its option.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffusion import GenerationOptions, OptionError, ResolvedOptions
from pydiffusion.constrained.schema_parts import SchemaError

N_VOCAB = 100
CANVAS = 32
FILE: dict[str, Any] = {
    "diffusion.canvas_length": CANVAS,
    "diffusion.eb_max_steps": 16,
    "tokenizer.ggml.eos_token_id": 1,
}
MAY_BE_NONE = {"json_schema", "regex", "grammar", "function_calls", "thinking_budget", "lora"}

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


def test_without_a_file_every_option_but_the_limits_has_a_value() -> None:
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


def test_end_tokens_that_are_known_are_not_looked_up_again() -> None:
    assert GenerationOptions().resolve(FILE, N_VOCAB).eos == (1,)
    assert GenerationOptions().resolve(FILE, N_VOCAB, [5, 6]).eos == (5, 6)
    assert GenerationOptions(eos=()).resolve(FILE, N_VOCAB, [5, 6]).eos == ()


def test_every_unset_seed_is_drawn() -> None:
    assert len({GenerationOptions().resolve(FILE, N_VOCAB).seed for _ in range(20)}) > 15


# Refused values

below_one = st.integers(max_value=0)
not_finite = st.sampled_from([math.nan, math.inf, -math.inf])
negative = st.floats(max_value=-1e-300, allow_infinity=False)
not_a_number = st.one_of(st.sampled_from(["1", "", b"1"]), st.booleans(), st.lists(st.integers()))
not_an_integer = st.one_of(not_a_number, st.floats())
refused_number = st.one_of(negative, not_finite, not_a_number)
not_a_flag = st.one_of(st.integers(), st.text(), st.floats(allow_nan=False))
bad_token = st.one_of(st.integers(max_value=-2), st.integers(2**31), st.text(), st.booleans())
# Values of each option that are refused, whatever the others are.
REFUSED: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.one_of(below_one, st.integers(2**31), not_an_integer),
    "steps": st.one_of(below_one, st.integers(2**31), not_an_integer),
    "t_min": refused_number,
    "t_max": st.one_of(refused_number, st.just(0)),
    "entropy_bound": refused_number,
    "stability_threshold": st.one_of(st.integers(max_value=-1), not_an_integer),
    "confidence_threshold": refused_number,
    "dropped_mass": st.one_of(refused_number, st.floats(1, allow_infinity=False)),
    "canvas_length": st.one_of(below_one, st.integers(CANVAS + 1), not_an_integer),
    "seed": st.one_of(st.integers(max_value=-1), st.integers(2**64), not_an_integer),
    "stop": st.one_of(st.just(""), st.just([""]), st.integers(), st.lists(st.integers(), min_size=1)),
    "eos": st.one_of(st.integers(max_value=-1), st.integers(N_VOCAB), st.lists(bad_token, min_size=1)),
    "canvas": st.one_of(st.integers(), st.text(), st.lists(bad_token, min_size=1), st.just([N_VOCAB])),
    "hold": st.one_of(st.integers(), st.just("x"), st.just([1.5]), st.just([True])),
    "json_schema": st.one_of(st.integers(2), st.just("{"), st.just([]), st.just({"a": object()})),
    "regex": st.one_of(st.just(""), st.integers(), st.binary()),
    "grammar": st.one_of(st.just(""), st.integers(), st.binary()),
    "function_calls": st.one_of(st.integers(), st.just("{"), st.just({}), st.just({"functions": [{}]})),
    "thinking_budget": st.one_of(st.integers(max_value=-1), not_an_integer),
    "stop_on_repetition": not_a_flag,
    "trim_after_eos": not_a_flag,
    "lora": st.one_of(
        st.text(),
        st.integers(),
        st.binary(),
        st.just([""]),
        st.just([1]),
        st.just([("a", 1.0, 2)]),
        st.lists(st.tuples(st.just("a"), st.one_of(not_finite, not_a_number, st.just(1e39))), min_size=1),
    ),
}


def test_there_are_refused_values_of_every_option() -> None:
    assert set(REFUSED) == {field.name for field in fields(GenerationOptions)}


@pytest.mark.parametrize("name", REFUSED)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_a_refused_value_names_its_option(name: str, data: st.DataObject) -> None:
    value = data.draw(REFUSED[name])
    with pytest.raises(OptionError, match=name) as caught:
        GenerationOptions(**{name: value}).resolve(FILE, N_VOCAB)
    assert caught.value.param == name and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"t_min": 0.9, "t_max": 0.5}, "t_min"),
        ({"t_min": 5.0}, "t_min"),  # above the t_max of the file or of the reference
        ({"t_max": 0.1}, "t_max"),
        ({"canvas": [1, -1], "hold": [True, True]}, "hold"),
        ({"canvas": [1], "thinking_budget": 1}, "thinking_budget"),
        ({"json_schema": {}, "regex": "a"}, "json_schema"),
        ({"json_schema": {}, "grammar": 'root ::= "a"'}, "json_schema"),
        ({"regex": "a", "grammar": 'root ::= "a"'}, "regex"),
        ({"grammar": 'root ::= "a"', "stop": "b"}, "stop"),
        ({"regex": "a", "stop": "b"}, "stop"),
        ({"json_schema": {}, "stop_on_repetition": True}, "stop_on_repetition"),
    ],
)
def test_options_that_contradict_each_other_name_one(options: dict[str, Any], param: str) -> None:
    with pytest.raises(OptionError) as caught:
        GenerationOptions(**options).resolve(FILE, N_VOCAB)
    assert caught.value.param == param


@pytest.mark.parametrize("kind", [OptionError, SchemaError])
def test_an_option_error_is_a_value_error_with_its_message_and_survives_pickling(
    kind: type[OptionError],
) -> None:
    made = kind("steps", "steps is 0")
    for error in (made, pickle.loads(pickle.dumps(made))):
        assert type(error) is kind and isinstance(error, ValueError)
        assert (error.param, error.args, str(error)) == ("steps", ("steps is 0",), "steps is 0")
        assert repr(error) == f"{kind.__name__}('steps is 0')"
