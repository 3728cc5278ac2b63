"""The Python fuzz targets (fuzz/targets) on a few inputs each; fuzz/python_fuzz.py runs many."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from support.paths import REPOSITORY

FUZZ = REPOSITORY / "fuzz"
sys.path.insert(0, str(FUZZ))

from targets import TARGETS, make_target  # noqa: E402

#: Inputs per target: a second or two of each.
N_INPUTS = {
    "body": 300, "folder": 25, "imatrix": 150, "model": 150, "session": 150, "template": 80, "tokenizer": 80,
    "quantized": 100, "vision": 200, "adapter": 150,
}  # fmt: skip


def test_every_target_is_tried() -> None:
    assert set(N_INPUTS) == set(TARGETS)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of what a template compiles to
@pytest.mark.parametrize("name", sorted(N_INPUTS))
def test_a_few_inputs(name: str, tmp_path: Path) -> None:
    """Each has an expected outcome; ``one`` raises otherwise."""
    target = make_target(name, tmp_path)
    outcomes: set[str] = set()
    try:
        for i in range(N_INPUTS[name]):
            given = target.make(random.Random(f"test-{i}"))
            try:
                outcomes.add(target.one(given))
            except Exception as error:
                raise AssertionError(f"input {i}: {given!r:.300}") from error
    finally:
        target.close()
    assert len(outcomes) > 1, outcomes  # some get through, some do not


def test_inputs_are_reproducible(tmp_path: Path) -> None:
    target = make_target("imatrix", tmp_path)
    assert target.make(random.Random("0-7")) == target.make(random.Random("0-7"))
