"""Results, options and errors go from one process to another; model and session say what to do instead."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.server_fakes import TOOLS, ScriptedModel, ask, script

import pydiffusion
from pydiffusion import (
    DiffusionModel,
    DraftEvent,
    GenerationOptions,
    Infill,
    OptionError,
    PyDiffusionError,
    PyDiffusionWarning,
    ResolvedOptions,
)

MODEL = ScriptedModel(script)
WAYS = {
    **{f"protocol {i}": lambda value, i=i: pickle.loads(pickle.dumps(value, i)) for i in (2, 5)},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal field by field."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a) if not field.name.startswith("_")]
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in names)
    return bool(a == b)


def results() -> list[Any]:
    completion = MODEL.generate("Hello", seed=1)
    return [
        completion,
        MODEL.chat(ask("weather"), tools=TOOLS, seed=1),
        Infill("a b", ("b",), completion),
        *MODEL.stream_chat(ask("think"), seed=1),
    ]


@pytest.mark.parametrize("way", WAYS)
def test_results_stay_what_they_are(way: str) -> None:
    for result in results():
        again = WAYS[way](result)
        assert same(again, result), type(result)
        if isinstance(result, DraftEvent):
            assert again.text == result.text != ""


def test_the_message_of_a_chat_keeps_its_ids() -> None:
    done = MODEL.chat(ask("weather"), tools=TOOLS, seed=1)
    message = done.message
    assert pickle.loads(pickle.dumps(done)).message == message


def test_a_pickled_draft_is_small() -> None:
    """It has its text, not the tokenizer, whose vocabulary takes megabytes in real models."""
    draft = next(MODEL.stream("Hello", seed=1))
    assert isinstance(draft, DraftEvent)
    assert len(pickle.dumps(draft)) < 2000 < len(pickle.dumps(MODEL.tokenizer))
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(draft))))
    assert again.text == draft.text
    assert dataclasses.asdict(draft)["step"] == draft.step


@pytest.mark.parametrize("way", WAYS)
def test_options_stay_equal(way: str) -> None:
    options = GenerationOptions(max_tokens=5, stop="x", canvas=[1, None], hold=[True], seed=2**63)
    schema = GenerationOptions(json_schema={"type": "integer"})
    assert WAYS[way](options) == options and WAYS[way](schema) == schema
    resolved = MODEL.resolve(options)
    assert WAYS[way](resolved) == resolved and isinstance(WAYS[way](resolved), ResolvedOptions)


def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as caught:  # any: they are compared
        call()
    return caught.value


@pytest.mark.parametrize("way", WAYS)
def test_errors_keep_their_message_and_attributes(way: str) -> None:
    kinds = [getattr(pydiffusion, name) for name in pydiffusion.__all__]
    plain = [
        kind("what", *(["why"] if kind is OptionError else []))
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, (PyDiffusionError, PyDiffusionWarning, OptionError))
    ]
    assert len(plain) >= 9
    given = [
        raised(lambda: GenerationOptions(steps=0)),
        raised(lambda: MODEL.create_completion("Hello", n=0)),
        raised(lambda: MODEL.generate(None)),  # type: ignore[arg-type]
        raised(lambda: MODEL.generate([10**6])),
        raised(lambda: MODEL.generate("Hello " * 2000)),
    ]
    for error in [*plain, *given]:
        again = WAYS[way](error)
        assert type(again) is type(error) and str(again) == str(error)
        assert vars(again) == vars(error)
    assert [getattr(WAYS[way](error), "param", None) for error in given[:2]] == ["steps", "n"]


def test_a_tokenizer_can_be_pickled() -> None:
    tokenizer = pickle.loads(pickle.dumps(MODEL.tokenizer))
    for text in ("Hello, Ü\n", "<|turn>user", ""):
        for special in (False, True):
            ids = tokenizer.tokenize(text, parse_special=special)
            assert ids == MODEL.tokenizer.tokenize(text, parse_special=special)
            assert tokenizer.detokenize(ids, keep_control=True) == MODEL.detokenize(ids, keep_control=True)
    assert tokenizer.end_ids == MODEL.tokenizer.end_ids and tokenizer.add_bos == MODEL.tokenizer.add_bos
    assert copy.deepcopy(MODEL.tokenizer) is MODEL.tokenizer


@pytest.mark.parametrize("way", WAYS)
def test_model_and_session_say_what_to_do(way: str) -> None:
    with pytest.raises(
        TypeError, match=r"DiffusionModel can't be pickled.*open scripted\.gguf in each process"
    ):
        WAYS[way](MODEL)
    with pytest.raises(TypeError, match=r"Session can't be pickled.*fork.*load_session"):
        WAYS[way](MODEL.new_session())


def answer(path: str, prompt: str) -> list[Any]:
    """In a process of its own: the results, and an error that is raised there."""
    with DiffusionModel(path, n_threads=1) as model:
        if not prompt:
            model.generate("x", steps=0)
        options = GenerationOptions(max_tokens=8, steps=2, seed=3, eos=())
        return [model.generate(prompt, options), *model.stream(prompt, options), options]


def test_between_processes(gguf_file: Callable[..., Path]) -> None:
    path = str(gguf_file("tiny"))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        there = pool.submit(answer, path, "the river").result()
        error = pool.submit(answer, path, "").exception()
    here = answer(path, "the river")
    assert [type(result) for result in there] == [type(result) for result in here]
    assert there[0].text == here[0].text and there[0].tokens.tolist() == here[0].tokens.tolist()
    assert [event.text for event in there[1:-2]] == [event.text for event in here[1:-2]]
    assert there[-1] == here[-1]
    assert isinstance(error, OptionError) and error.param == "steps"
