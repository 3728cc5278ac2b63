"""Measure constrained generation: building the automaton, the search per step, and with the model a step in
all.

python benchmarks/structure.py MODEL [--canvas N]

All times are CPU time of one thread, so that other processes change them little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
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
# JSON as most grammars of llama.cpp's users have it: 4 levels of nesting are compiled.
JSON_GRAMMAR = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt/] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,3})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
LIST_GRAMMAR = r"""
root ::= ("- " [^\r\n]+ "\n")+
"""
CALL = {"name": "save", "parameters": PERSON}
CASES: dict[str, Any] = {
    "person": {"json_schema": PERSON},
    "call with a person": {"function_calls": {"functions": [CALL]}},
    "text with calls": {"function_calls": {"functions": [CALL], "otherwise": "text", "reasoning": True}},
    "list of persons": {"json_schema": {"type": "array", "items": PERSON, "minItems": 6, "maxItems": 6}},
    "any object": {"json_schema": {"type": "object"}},
    "string of up to 500": {"json_schema": {"type": "string", "maxLength": 500}},
    "string of up to 10000": {"json_schema": {"type": "string", "maxLength": 10_000}},
    "URI": {"json_schema": {"type": "string", "format": "uri", "maxLength": 2083}},
    "multiple of 0.25": {"json_schema": {"type": "number", "multipleOf": 0.25, "minimum": 0}},
    "set of 4 values": {"json_schema": {"items": {"enum": [1, 2, 3, 4]}, "uniqueItems": True}},
    "grammar of a list": {"grammar": LIST_GRAMMAR},
    "grammar of JSON": {"grammar": JSON_GRAMMAR},
    "date": {"regex": r"\d{4}-\d{2}-\d{2}"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--canvas", type=int, default=256)
    arguments = parser.parse_args()
    model = DiffusionModel(arguments.model, n_threads=1)
    tokenizer = model.tokenizer
    n, n_vocab = arguments.canvas, tokenizer.n_vocab
    for name, options in CASES.items():
        started = time.process_time()
        automaton = automaton_for(GenerationOptions(**options), tokenizer, tokenizer.end_ids)
        build_seconds = time.process_time() - started
        guide = Guide(automaton, n, 4 * n, [tokenizer.eos_id or 0], n_vocab)
        logits = np.random.default_rng(0).normal(size=(n, n_vocab)).astype(np.float32)
        order = np.argsort(-logits, axis=1)[:, : guide.n_likeliest].astype(np.int32)
        found = order, np.take_along_axis(logits, order, 1), logits[:, guide.extra]
        guide.choose(*found)
        step_seconds = statistics.median(seconds_to_choose(guide, found) for _ in range(5))
        print(
            f"{name}: {automaton.n_states} states built in {1000 * build_seconds:.0f} ms; "
            f"{1000 * step_seconds:.1f} ms per step of {n} positions; "
            f"{1000 * seconds_per_step(model, **options):.1f} ms in all per step of {model.canvas_length}"
        )
    print(f"without a constraint: {1000 * seconds_per_step(model):.1f} ms per step of {model.canvas_length}")


def seconds_to_choose(guide: Guide, found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    started = time.process_time()
    guide.choose(*found)
    return time.process_time() - started


def seconds_per_step(model: DiffusionModel, **options: Any) -> float:
    """A denoising step with the model, in a chat of one canvas."""
    messages = [{"role": "user", "content": "json: Ada, 34"}]
    shared = {"max_tokens": model.canvas_length, "seed": 1, "steps": 12, "stability_threshold": 0}
    run = partial(model.create_chat_completion, messages, **shared, **options)
    run()  # transitions of tokens are found on first use
    started = time.process_time()
    answer = run()
    return (time.process_time() - started) / answer["diffusion"]["steps"]


if __name__ == "__main__":
    main()
