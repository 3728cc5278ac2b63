"""Measure constrained generation without running the model: building the automaton, and the search per step.

python benchmarks/structure.py MODEL [--canvas N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from pydiffusion import DiffusionModel, GenerationOptions
from pydiffusion.constrained import Guide, automaton_for

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
}
CALL = {"name": "save", "parameters": PERSON}
CASES: dict[str, Any] = {
    "person": {"json_schema": PERSON},
    "call with a person": {"function_calls": {"functions": [CALL]}},
    "text with calls": {"function_calls": {"functions": [CALL], "otherwise": "text", "reasoning": True}},
    "list of persons": {"json_schema": {"type": "array", "items": PERSON, "minItems": 6, "maxItems": 6}},
    "any object": {"json_schema": {"type": "object"}},
    "string of up to 500": {"json_schema": {"type": "string", "maxLength": 500}},
    "date": {"regex": r"\d{4}-\d{2}-\d{2}"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--canvas", type=int, default=256)
    arguments = parser.parse_args()
    tokenizer = DiffusionModel(arguments.model, n_threads=1).tokenizer
    n, n_vocab = arguments.canvas, tokenizer.n_vocab
    for name, options in CASES.items():
        started = time.perf_counter()
        automaton = automaton_for(GenerationOptions(**options), tokenizer, tokenizer.end_ids)
        build_seconds = time.perf_counter() - started
        guide = Guide(automaton, n, 4 * n, [tokenizer.eos_id or 0], n_vocab)
        logits = np.random.default_rng(0).normal(size=(n, n_vocab)).astype(np.float32)
        order = np.argsort(-logits, axis=1)[:, : guide.n_likeliest].astype(np.int32)
        found = order, np.take_along_axis(logits, order, 1), logits[:, guide.extra]
        guide.choose(*found)
        step_seconds = statistics.median(seconds_to_choose(guide, found) for _ in range(5))
        print(
            f"{name}: {automaton.n_states} states built in {build_seconds:.3f} s; "
            f"{step_seconds:.3f} s per step of {n} positions"
        )


def seconds_to_choose(guide: Guide, found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    started = time.perf_counter()
    guide.choose(*found)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
