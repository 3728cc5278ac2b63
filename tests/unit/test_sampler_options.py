"""The native table of sampler options: the reference implementation's defaults, and those in the docs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pydiffusion import GenerationOptions, _native
from pydiffusion._util.sampler_options import (
    ENTROPY_BOUND,
    ENTROPY_BOUND_DEFAULTS,
    REFERENCE_CANVAS_LENGTH,
    SAMPLER_OPTIONS,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_defaults_are_the_reference_implementations() -> None:
    pytest.importorskip("transformers.models.diffusion_gemma", reason="the reference: NOT CHECKED here")
    from transformers import DiffusionGemmaConfig
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

    reference = DiffusionGemmaGenerationConfig._get_default_generation_params()
    expected = {
        "steps": reference["max_denoising_steps"],
        "entropy_bound": reference["sampler_config"].entropy_bound,
        **{key: reference[key] for key in ("t_min", "t_max", "stability_threshold", "confidence_threshold")},
    }
    assert expected == ENTROPY_BOUND_DEFAULTS
    assert DiffusionGemmaConfig().canvas_length == REFERENCE_CANVAS_LENGTH
    assert GenerationOptions().resolve({}, 1).max_tokens == reference["max_new_tokens"]


def test_options_left_unset_get_the_tables_defaults() -> None:
    resolved = GenerationOptions().resolve({}, 1)
    assert {name: getattr(resolved, name) for name in ENTROPY_BOUND_DEFAULTS} == ENTROPY_BOUND_DEFAULTS


def test_types_and_ranges() -> None:
    assert set(SAMPLER_OPTIONS) >= {"entropy-bound"}
    for options in SAMPLER_OPTIONS.values():
        for option in options:
            kind = int if option.integer else float
            assert all(type(value) is kind for value in (option.default, option.low, option.high))
            assert option.low <= option.default <= option.high
            assert option.gguf_type == ("u32" if option.integer else "f32")


def test_the_documented_defaults() -> None:
    """The rows of api.md: names, keys (of several, the first in full) and defaults."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "api.md").read_text(encoding="utf-8").splitlines()
        if "`diffusion." in line and line.startswith("|")
    ]
    documented = {}
    for names, keys, defaults, *_ in rows:
        for name, key, default in zip(
            re.findall(r"`(\w+)`", names), re.findall(r"`([\w.]+)`", keys), defaults.split(", "), strict=True
        ):
            documented[name] = (key if "." in key else f"diffusion.{key}", float(default))
    assert documented == {option.name: (option.key, option.default) for option in ENTROPY_BOUND}


def test_the_docstring_of_the_options() -> None:
    """Defaults are in brackets at the end of a sentence: (48), (0.4, 0.8)."""
    documented = {}
    entries = re.findall(r"^ {4}((?:\w+, )*\w+): (.*(?:\n {8}.*)*)", GenerationOptions.__doc__ or "", re.M)
    for names, text in entries:
        if numbers := re.search(r"\(([\d.]+(?:, [\d.]+)*)\)", text):
            values = map(float, numbers[1].split(", "))
            documented.update(zip(names.split(", "), values, strict=True))
    assert documented == ENTROPY_BOUND_DEFAULTS


def test_the_sampler_is_the_architectures() -> None:
    """Another architecture's keys are not obeyed, and the entropy bound is for what is not known."""
    both = {"diffusion.eb_max_steps": 5, "diffusion.max_steps": 7}
    ours = {"general.architecture": "diffusion-gemma", **both}
    assert GenerationOptions().resolve(ours, 1).steps == 5
    assert GenerationOptions().resolve({"general.architecture": "masked-toy", **both}, 1).steps == (
        7 if _native.testing.toy_architecture else 5
    )
    assert GenerationOptions().resolve(both, 1).steps == 5


def test_the_native_loop_takes_the_samplers_options_only(gguf_file: Callable[..., Path]) -> None:
    session = _native.Session(_native.Model(str(gguf_file("tiny")), 1), 64)
    session.encode(np.arange(2, 9, dtype=np.int32))
    given = {**ENTROPY_BOUND_DEFAULTS, "max_tokens": 4, "seed": 0, "eos": []}
    with pytest.raises(ValueError, match="'entropy-bound' has no option 'top_k'"):
        session.begin(**given, top_k=3)
    with pytest.raises(ValueError, match="option t_max is missing"):
        session.begin(**{name: value for name, value in given.items() if name != "t_max"})
    with pytest.raises(TypeError, match="steps must be an integer"):
        session.begin(**{**given, "steps": 2.5})
    session.begin(**given)
    assert session.next_step().step == ENTROPY_BOUND_DEFAULTS["steps"]
