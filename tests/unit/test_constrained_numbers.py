"""Numbers between bounds: the automaton against Python's Decimal and the jsonschema package."""

from __future__ import annotations

import json
import re
from decimal import Context, Decimal, localcontext
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.automata import accepts

from pydiffusion import GenerationOptions
from pydiffusion.constrained import expression_of
from pydiffusion.constrained.byte_dfa import ByteDfa, byte_dfa

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")


def machine_of(**schema: Any) -> ByteDfa:
    return byte_dfa(expression_of(GenerationOptions(json_schema={"type": "number", **schema})))


def is_within(text: str, schema: dict[str, Any]) -> bool:
    """Compare as decimals."""
    value, bounds = Decimal(text), {name: Decimal(json.dumps(bound)) for name, bound in schema.items()}
    return (
        ("minimum" not in bounds or value >= bounds["minimum"])
        and ("maximum" not in bounds or value <= bounds["maximum"])
        and ("exclusiveMinimum" not in bounds or value > bounds["exclusiveMinimum"])
        and ("exclusiveMaximum" not in bounds or value < bounds["exclusiveMaximum"])
    )


def n_digits(text: str) -> int:
    """Without a sign, and without the 0 of 0.1."""
    return len(re.sub(r"^-?0?|\.", "", text))


def some_texts(machine: ByteDfa, seed: int, n: int) -> list[str]:
    """Random texts that the automaton accepts."""
    table, accepting = machine.table, machine.accepting
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        state, text = 0, ""
        while True:
            steps = np.flatnonzero(table[state] != len(accepting))
            if accepting[state] and (not len(steps) or rng.random() < 0.15):
                break
            byte = int(rng.choice(steps))
            state, text = table[state, byte], text + chr(byte)
        texts.append(text)
    return texts


BOUND = st.one_of(
    st.integers(-2000, 2000),
    st.builds(lambda digits, places: digits / 10**places, st.integers(-9999, 9999), st.integers(0, 5)),
    st.floats(-1e16, 1e16),
    st.builds(lambda digit, power: float(f"{digit}e{power}"), st.integers(-9, 9), st.integers(-18, 14)),
    st.integers(-(10**16), 10**16),
)
LOW, HIGH = st.sampled_from(["minimum", "exclusiveMinimum"]), st.sampled_from(["maximum", "exclusiveMaximum"])


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, Any]:
    low, high = sorted([draw(BOUND), draw(BOUND)])
    given = {draw(LOW): low, draw(HIGH): high}
    return draw(st.sampled_from([given, given, {next(iter(given)): low}, {list(given)[1]: high}]))


@st.composite
def written(draw: st.DrawFn, schema: dict[str, Any]) -> str:
    """A number, often near a bound, at times with trailing zeros."""
    if draw(st.booleans()):
        digits = draw(st.integers(0, 10 ** draw(st.integers(1, 8))))
        text = f"{Decimal(digits) / 10 ** draw(st.integers(0, 8)):f}"
    else:
        bound = abs(Decimal(json.dumps(draw(st.sampled_from(sorted(schema.values()))))))
        places = draw(st.integers(0, 15))
        step = draw(st.integers(-2, 2)) * Decimal(1).scaleb(-places)
        with localcontext(Context(prec=60)):
            text = f"{abs(round(bound, places) + step):f}"
    if draw(st.booleans()):
        text += ("" if "." in text else ".") + "0" * draw(st.integers(1, 3))
    return draw(st.sampled_from(["", "-"])) + text


@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data(), schema=schemas())
def test_numbers_within_bounds_and_no_others(data: st.DataObject, schema: dict[str, Any]) -> None:
    """Accepts all numbers of up to 15 digits, and -0 only where negative numbers are permitted."""
    texts = [data.draw(written(schema)) for _ in range(8)]
    texts = [text for text in texts if n_digits(text) <= 15]
    assume(texts)
    lows = [schema[name] for name in ("minimum", "exclusiveMinimum") if name in schema]
    permits_minus = not lows or lows[0] < 0
    try:
        machine = machine_of(**schema)
    except ValueError as error:
        assert "satisf" in str(error) or "15 digits" in str(error)
        assert not any(is_within(text, schema) for text in texts if permits_minus or text[0] != "-")
        return
    for text in texts:
        assert NUMBER.fullmatch(text)
        expected = is_within(text, schema) and (permits_minus or text[0] != "-")
        assert accepts(machine, text) == expected, (text, schema)


@settings(max_examples=100, deadline=None, derandomize=True)
@example({"exclusiveMinimum": 0})
@example({"exclusiveMaximum": 1e9})
@example({"minimum": 0.1, "exclusiveMaximum": 0.30000000000000004})
@given(schemas())
def test_generated_numbers_are_within_bounds(schema: dict[str, Any]) -> None:
    """Also for a validator that reads numbers as floats, as jsonschema does."""
    try:
        machine = machine_of(**schema)
    except ValueError as error:
        assert "satisf" in str(error) or "15 digits" in str(error)
        return
    validator = jsonschema.Draft202012Validator({"type": "number", **schema})
    for text in some_texts(machine, 0, 20):
        assert NUMBER.fullmatch(text) and n_digits(text) <= 15
        assert is_within(text, schema), (text, schema)
        validator.validate(json.loads(text))


def test_every_number_of_a_small_range() -> None:
    """All that could be written with two decimals, one by one."""
    schema = {"exclusiveMinimum": -0.25, "maximum": 1.3}
    machine = machine_of(**schema)
    for hundredths in range(-400, 401):
        for text in {f"{hundredths / 100:.2f}", f"{hundredths / 100:g}", f"{hundredths / 100:.5f}"}:
            assert accepts(machine, text) == (-25 < hundredths <= 130), text
    for text in ("", "-", ".5", "1.", "00.5", "01", "+1", "1e0", "--1", "0.5.5", " 1", "1,2", "-.1", "NaN"):
        assert not accepts(machine, text), text


@pytest.mark.parametrize(
    ("schema", "permitted", "forbidden"),
    [
        ({"minimum": 0.1, "maximum": 0.9}, "0.1 0.10 0.5 0.9 0.900 0.123456789012345", "0 1 0.09 0.91 -0.5"),
        ({"minimum": 0, "maximum": 0.5}, "0 0.0 0.3 0.50", "0.51 1 -0"),
        ({"minimum": 1e-3, "maximum": 1e3}, "0.001 1000 1000.0 999.999", "0 0.0009 1000.1 1001"),
        ({"minimum": -0.75, "maximum": -0.5}, "-0.75 -0.5 -0.6", "-0.76 -0.4 0.6 -1"),
        ({"minimum": -0.5, "maximum": 0.5}, "-0 -0.5 0 0.5 -0.0", "-0.51 1"),
        ({"exclusiveMinimum": 0}, "0.000000000000001 1 7.5 999999999999999", "0 0.0 -1 -0"),
        ({"minimum": 1, "exclusiveMinimum": 0.5}, "1 2", "0.7"),
        ({"minimum": 0.5, "exclusiveMinimum": 0.5, "maximum": 0.6}, "0.51 0.6", "0.5 0.50"),
        ({"maximum": 1e300}, "999999999999999 -5", "1000000000000000 1e300"),
    ],
)  # fmt: skip
def test_bounds_by_hand(schema: dict[str, Any], permitted: str, forbidden: str) -> None:
    machine = machine_of(**schema)
    assert [text for text in permitted.split() if not accepts(machine, text)] == []
    assert [text for text in forbidden.split() if accepts(machine, text)] == []


def test_integers_between_fractions() -> None:
    machine = machine_of(type="integer", minimum=0.5, maximum=3.5)
    assert [n for n in range(-5, 10) if accepts(machine, str(n))] == [1, 2, 3]
    machine = machine_of(type="integer", exclusiveMinimum=-2.5, exclusiveMaximum=1e0)
    assert [n for n in range(-5, 10) if accepts(machine, str(n))] == [-2, -1, 0]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"minimum": 0.5, "maximum": 0.4}, "nothing satisfies"),
        ({"minimum": 0.5, "exclusiveMaximum": 0.5}, "nothing satisfies"),
        ({"minimum": -0.4, "maximum": -0.5}, "nothing satisfies"),
        ({"exclusiveMinimum": 0, "maximum": 0}, "nothing satisfies"),
        ({"minimum": 1e20, "maximum": 1e21}, "15 digits"),
        ({"minimum": 1e-20, "maximum": 1e-19}, "15 digits"),
        ({"type": "integer", "minimum": 1e20}, "15 digits"),
        ({"type": "integer", "minimum": 0.1, "maximum": 0.9}, "nothing satisfies"),
        ({"maximum": float("inf")}, "'maximum' must be a finite number"),
        ({"type": "integer", "exclusiveMinimum": float("nan")}, "'exclusiveMinimum' must be a finite number"),
        ({"exclusiveMinimum": True}, "'exclusiveMinimum' must be a finite number"),
    ],
)  # fmt: skip
def test_bounds_that_are_refused(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        machine_of(**schema)


@pytest.mark.parametrize(
    ("schema", "at_most"),
    [({"minimum": 0.1, "maximum": 0.9}, 40), ({"exclusiveMinimum": 0}, 70),
     ({"minimum": -180, "maximum": 180}, 50), ({"minimum": -12345.6789, "maximum": 98765.4321}, 80)],
)  # fmt: skip
def test_the_automaton_stays_small(schema: dict[str, Any], at_most: int) -> None:
    """A step's search takes time by the number of states; a number without bounds has 37."""
    assert len(machine_of(**schema).accepting) <= at_most
