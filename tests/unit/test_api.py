"""The Python API: options, model, session, events, completions in OpenAI's shape."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydiffusion
from pydiffusion import (
    CanvasEvent,
    ContextOverflowError,
    DiffusionModel,
    DraftEvent,
    EndEvent,
    GenerationCancelled,
    GenerationOptions,
    ModelFormatError,
    PyDiffusionError,
)
from pydiffusion.model import DEFAULT_N_CTX

PROMPT = "the river and the road"
SHORT = {"steps": 4, "max_tokens": 10, "seed": 5, "eos": ()}


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> Iterator[DiffusionModel]:
    with DiffusionModel(gguf_file("small"), n_threads=1) as opened:
        yield opened


# Options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("steps", 0),
        ("steps", 2**31),
        ("t_min", -0.1),
        ("t_max", 0),
        ("t_max", float("nan")),
        ("t_max", "1"),
        ("entropy_bound", -1),
        ("entropy_bound", float("inf")),
        ("stability_threshold", -1),
        ("confidence_threshold", -1e-9),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", [""]),
        ("stop", 3),
        ("stop", [3]),
        ("eos", -1),
        ("eos", "x"),
        ("eos", 1.5),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} .*permitted"):
        GenerationOptions(**{name: value})


def test_temperatures_must_be_in_order(model: DiffusionModel) -> None:
    with pytest.raises(ValueError, match=r"t_min is 0\.9 and t_max is 0\.5"):
        GenerationOptions(t_min=0.9, t_max=0.5)
    with pytest.raises(ValueError, match="t_min"):  # against the file's t_max
        model.generate(PROMPT, t_min=5.0)


def test_an_unknown_option_is_refused(model: DiffusionModel) -> None:
    with pytest.raises(TypeError, match="temprature"):
        GenerationOptions(temprature=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="temprature"):
        model.generate(PROMPT, temprature=1)
    with pytest.raises(TypeError, match="not both"):
        model.generate(PROMPT, GenerationOptions(), steps=3)


def test_defaults_come_from_the_file_then_from_the_reference() -> None:
    file = {"diffusion.eb_max_steps": 16, "diffusion.eb_t_max": 0.9, "tokenizer.ggml.eos_token_id": 1}
    got = GenerationOptions(t_min=0.2).resolve(file, 100)
    assert (got.steps, got.t_min, got.t_max, got.eos) == (16, 0.2, 0.9, (1,))
    assert (got.max_tokens, got.entropy_bound, got.stability_threshold, got.confidence_threshold) == (
        256,
        0.1,
        1,
        0.005,
    )
    assert got.seed is not None and got.stop == ()
    assert GenerationOptions().resolve(file | {"tokenizer.ggml.eos_token_ids": [1, 7]}, 100).eos == (1, 7)
    assert GenerationOptions(eos=()).resolve(file, 100).eos == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("diffusion.eb_max_steps", 0),
        ("diffusion.eb_t_max", float("nan")),
        ("tokenizer.ggml.eos_token_ids", [1, 100]),
    ],
)
def test_an_invalid_default_in_the_file_is_named(key: str, value: Any) -> None:
    with pytest.raises(ModelFormatError, match=key):
        GenerationOptions().resolve({key: value}, 100)


def test_eos_must_be_in_the_vocabulary(model: DiffusionModel) -> None:
    with pytest.raises(ValueError, match="eos holds 99999"):
        model.generate(PROMPT, eos=99999)


# Opening


def test_a_model_says_what_it_is(model: DiffusionModel) -> None:
    assert model.metadata["general.architecture"] == "diffusion-gemma"
    assert (model.n_vocab, model.canvas_length) == (512, 8)
    assert model.hparams["canvas_length"] == 8
    assert model.description["backend"] == "CPU"
    assert model.n_threads == 1
    assert model.n_ctx == min(DEFAULT_N_CTX, model.n_ctx_train)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_ctx": 10**6}, r"n_ctx is 1000000, but this model's context is \d+"),
        ({"n_ctx": 0}, r"n_ctx is 0; permitted is an integer from 9 to \d+"),
        ({"n_gpu_layers": 3}, "n_gpu_layers is 3"),
        ({"n_gpu_layers": -1}, "n_gpu_layers is -1"),
        ({"n_threads": 0}, "n_threads is 0"),
        ({"kv_type": "q4"}, "kv_type is 'q4'"),
    ],
)
def test_wrong_arguments_are_named(model: DiffusionModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionModel(model.path, **arguments)


def test_paths_that_are_not_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        DiffusionModel(tmp_path / "none.gguf")
    with pytest.raises(IsADirectoryError, match="pydiffusion convert"):
        DiffusionModel(tmp_path)
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ModelFormatError):
        DiffusionModel(tmp_path / "text.gguf")


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="NOT CHECKED: threads follow the CPU affinity"
)
def test_threads_are_the_cpus_that_the_process_may_use(model: DiffusionModel) -> None:
    script = "import sys, pydiffusion; print(pydiffusion.DiffusionModel(sys.argv[1]).n_threads)"
    one_cpu = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", script, str(model.path)],
        preexec_fn=lambda: os.sched_setaffinity(0, {one_cpu}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1"


def test_a_closed_model_says_so(gguf_file: Callable[..., Path]) -> None:
    opened = DiffusionModel(gguf_file("tiny"))
    session = opened.new_session()
    opened.close()
    with pytest.raises(PyDiffusionError, match="closed"):
        opened.new_session()
    session.encode([1, 2, 3])  # still holds the weights
    assert session.n_past == 3


# Sessions


def test_a_session_keeps_its_tokens(model: DiffusionModel) -> None:
    session = model.new_session(n_ctx=32)
    session.encode([2, 300, 301])
    session.encode(np.array([302], dtype=np.int64))
    assert session.tokens.tolist() == [2, 300, 301, 302] and session.n_past == 4 and session.n_ctx == 32
    session.truncate(1)
    assert session.tokens.tolist() == [2]
    with pytest.raises(ContextOverflowError):
        session.encode([300] * 32)
    assert session.n_past == 1


@pytest.mark.parametrize(
    ("ids", "error"),
    [([512], ValueError), ([-1], ValueError), ([1.5], TypeError), ([[1]], ValueError), ("ab", TypeError)],
)
def test_wrong_tokens_are_refused(model: DiffusionModel, ids: Any, error: type[Exception]) -> None:
    session = model.new_session(n_ctx=32)
    with pytest.raises(error):
        session.encode(list(ids) if isinstance(ids, str) else ids)
    assert session.n_past == 0


def test_a_step_leaves_the_cache_alone(model: DiffusionModel) -> None:
    session = model.new_session(n_ctx=32)
    session.encode([2, 300, 301])
    canvas = list(range(300, 300 + model.canvas_length))
    first = session.denoise(canvas)
    assert first.shape == (model.canvas_length, model.n_vocab) and first.dtype == np.float32
    second = session.denoise(canvas, self_conditioning=first)
    assert not np.array_equal(first, second)
    assert np.array_equal(session.denoise(canvas), first)
    assert session.n_past == 3
    with pytest.raises(ValueError, match="canvas has 3 tokens"):
        session.denoise([1, 2, 3])
    with pytest.raises(ValueError, match="self_conditioning has the shape"):
        session.denoise(canvas, self_conditioning=first[:, :-1])


def test_prefill_encodes_only_what_differs(model: DiffusionModel) -> None:
    session = model.new_session(n_ctx=64)
    counted: list[tuple[int, int]] = []
    assert session.prefill([2, 300, 301, 302]) == 0
    assert (
        session.prefill([2, 300, 303, 304], progress=lambda done, total: counted.append((done, total))) == 2
    )
    assert session.tokens.tolist() == [2, 300, 303, 304]
    assert counted[-1] == (2, 2)
    assert session.prefill([2, 300]) == 2
    assert session.tokens.tolist() == [2, 300]
    canvas = [300] * model.canvas_length
    fresh = model.new_session(n_ctx=64)
    fresh.encode([2, 300])
    assert np.allclose(session.denoise(canvas), fresh.denoise(canvas), atol=1e-4)


def test_hidden_states_on_request(model: DiffusionModel) -> None:
    hidden = model.new_session(n_ctx=32).encode([2, 300, 301], return_hidden=True)
    assert hidden is not None and hidden.shape == (3, model.hparams["n_embd"])


# Generation


def test_the_events_of_a_generation(model: DiffusionModel) -> None:
    session = model.new_session()
    session.encode(model.tokenize(PROMPT))
    n_prompt = session.n_past
    events = list(session.generate(**SHORT))
    drafts = [event for event in events if isinstance(event, DraftEvent)]
    canvases = [event for event in events if isinstance(event, CanvasEvent)]
    end = events[-1]
    assert isinstance(end, EndEvent) and end.reason == "length" and end.seed == 5
    assert {"prompt", "encode", "denoise", "total"} <= set(end.timings)
    assert [canvas.canvas_index for canvas in canvases] == [0, 1]
    assert [len(canvas.tokens) for canvas in canvases] == [8, 2]
    for canvas in canvases:
        steps = [draft.step for draft in drafts if draft.canvas_index == canvas.canvas_index]
        assert steps == list(range(4, 4 - canvas.steps, -1))
    for draft in drafts:
        assert draft.tokens.shape == draft.entropy.shape == draft.accepted.shape == (8,)
        assert draft.accepted.dtype == bool and draft.accepted.any()
        assert draft.text == model.detokenize(draft.tokens)
    # the last canvas enters the cache only when another begins
    assert session.n_past == n_prompt + 8
    assert session.tokens[n_prompt:].tolist() == canvases[0].tokens.tolist()


def test_a_seed_repeats_a_generation(model: DiffusionModel) -> None:
    first = model.generate(PROMPT, **SHORT)
    again = model.generate(PROMPT, **SHORT)
    other = model.generate(PROMPT, **SHORT | {"seed": 6})
    assert first.text == again.text and first.tokens.tolist() == again.tokens.tolist()
    assert first.tokens.tolist() != other.tokens.tolist()
    unseeded = model.generate(PROMPT, **SHORT | {"seed": None})
    assert (
        model.generate(PROMPT, **SHORT | {"seed": unseeded.seed}).tokens.tolist() == unseeded.tokens.tolist()
    )


def test_a_completion_sums_up_the_events(model: DiffusionModel) -> None:
    events: list[Any] = []
    done = model.generate(PROMPT, GenerationOptions(**SHORT), on_event=events.append)
    canvases = [event for event in events if isinstance(event, CanvasEvent)]
    assert done.text == "".join(canvas.text for canvas in canvases) == model.detokenize(done.tokens)
    assert done.canvas_steps == tuple(canvas.steps for canvas in canvases)
    assert done.steps == sum(done.canvas_steps) == sum(isinstance(event, DraftEvent) for event in events)
    assert done.n_prompt == len(model.tokenize(PROMPT))
    assert done.finish_reason == "length" and len(done.tokens) == 10
    assert done.tokens_per_step == 10 / done.steps


def test_eos_ends_the_text_and_is_left_out(model: DiffusionModel) -> None:
    free = model.generate(PROMPT, **SHORT | {"max_tokens": 8})
    eos = int(free.tokens[3])
    first = free.tokens.tolist().index(eos)
    done = model.generate(PROMPT, **SHORT | {"max_tokens": 8, "eos": [eos]})
    assert done.finish_reason == "eos"
    assert done.tokens.tolist() == free.tokens.tolist()[:first]


def test_a_full_context_ends_the_text(model: DiffusionModel) -> None:
    session = model.new_session(n_ctx=40)
    done = model.generate(PROMPT, session=session, **SHORT | {"max_tokens": 1000})
    assert done.finish_reason == "context"
    assert done.n_prompt + len(done.tokens) <= 40


def test_a_prompt_that_does_not_fit_is_refused(model: DiffusionModel) -> None:
    with pytest.raises(ContextOverflowError):
        model.generate(PROMPT, session=model.new_session(n_ctx=12), **SHORT)
    with pytest.raises(ValueError, match="no tokens"):
        model.generate([], **SHORT)


@pytest.mark.parametrize("n_events", [0, 1, 3, 6])
def test_an_abandoned_generation_leaves_the_session_usable(model: DiffusionModel, n_events: int) -> None:
    session = model.new_session()
    session.encode(model.tokenize(PROMPT))
    events = session.generate(**SHORT)
    for _ in range(n_events):
        next(events)
    events.close()
    session.truncate(len(model.tokenize(PROMPT)))
    assert session.complete(**SHORT).tokens.tolist() == model.generate(PROMPT, **SHORT).tokens.tolist()


def test_cancel_stops_between_steps_and_the_session_goes_on(model: DiffusionModel) -> None:
    session = model.new_session()
    session.encode(model.tokenize(PROMPT))
    n_drafts = 0
    with pytest.raises(GenerationCancelled):
        for event in session.generate(**SHORT | {"steps": 10, "max_tokens": 1000, "confidence_threshold": 0}):
            n_drafts += isinstance(event, DraftEvent)
            if n_drafts == 3:
                session.cancel()
    assert n_drafts == 3
    session.prefill(model.tokenize(PROMPT))
    assert session.complete(**SHORT).tokens.tolist() == model.generate(PROMPT, **SHORT).tokens.tolist()


def test_threads_share_a_model(model: DiffusionModel) -> None:
    expected = [model.generate(PROMPT, **SHORT | {"seed": seed}).tokens.tolist() for seed in range(3)]
    got: dict[int, list[int]] = {}

    def work(seed: int) -> None:
        got[seed] = model.generate(PROMPT, **SHORT | {"seed": seed}).tokens.tolist()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[seed] for seed in range(3)] == expected


def test_a_session_is_for_one_thread_at_a_time(model: DiffusionModel) -> None:
    session = model.new_session()
    session.encode(model.tokenize(PROMPT))
    errors: list[BaseException] = []
    both = threading.Barrier(2)

    def work() -> None:
        both.wait()
        try:
            for _ in session.generate(**SHORT | {"max_tokens": 200, "confidence_threshold": 0}):
                pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors and all(isinstance(error, PyDiffusionError) for error in errors)


# Stop strings: the same text, whatever canvases it comes in


def answer(tokenizer: Any, text: str, stop: list[str], canvas: int) -> tuple[list[str], int, bool]:
    """Feed a text's tokens in canvases; returns the texts given out, the tokens kept, whether it stopped."""
    from pydiffusion.generation.streaming import AnswerStream

    ids = tokenizer.tokenize(text, add_bos=False)
    parts = [ids[i : i + canvas] for i in range(0, len(ids), canvas)]
    stream = AnswerStream(tokenizer, stop)
    texts: list[str] = []
    kept = 0
    for i, part in enumerate(parts):
        got, n_tokens, stopped = stream.feed(part, last=i == len(parts) - 1)
        texts.append(got)
        kept += n_tokens
        if stopped:
            return texts, kept, True
    return texts, kept, False


@pytest.mark.parametrize("canvas", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two END three", ["END"], "one two "),
        ("one two", ["END"], "one two"),
        ("one two EN", ["END"], "one two EN"),
        ("aab", ["ab"], "a"),
        ("x 🙂 y", ["🙂"], "x "),
        ("x 🙂 y", ["y"], "x 🙂 "),
        ("first second", ["second", "st s"], "fir"),
        ("END", ["END"], ""),
    ],
)
def test_stop_strings_cut_at_any_position(
    model: DiffusionModel, text: str, stop: list[str], expected: str, canvas: int
) -> None:
    texts, _, stopped = answer(model.tokenizer, text, stop, canvas)
    assert "".join(texts) == expected
    assert stopped == (expected != text)
    assert all(expected.startswith("".join(texts[:i])) for i in range(len(texts)))


def test_a_stop_string_ends_a_generation(model: DiffusionModel) -> None:
    options = SHORT | {"max_tokens": 24}
    free = model.generate(PROMPT, **options)
    assert len(free.text) > 6
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 2]
    done = model.generate(PROMPT, stop=stop, **options)
    assert done.finish_reason == "stop"
    assert done.text == free.text[: free.text.index(stop)]
    assert len(done.tokens) <= len(free.tokens)
    assert model.detokenize(done.tokens).startswith(done.text)


# OpenAI's shapes


def test_completion_shape(model: DiffusionModel) -> None:
    got = model.create_completion(PROMPT, echo=True, **SHORT)
    plain = model.generate(PROMPT, **SHORT)
    assert (
        got["object"] == "text_completion"
        and got["id"].startswith("cmpl-")
        and isinstance(got["created"], int)
    )
    assert got["choices"] == [
        {"text": PROMPT + plain.text, "index": 0, "logprobs": None, "finish_reason": "length"}
    ]
    assert got["usage"] == {
        "prompt_tokens": plain.n_prompt,
        "completion_tokens": 10,
        "total_tokens": plain.n_prompt + 10,
    }
    assert got["diffusion"]["seed"] == 5 and got["diffusion"]["steps"] == plain.steps


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_stream_says_the_same_as_an_answer(model: DiffusionModel, kind: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    create, given = {
        "text": (model.create_completion, PROMPT),
        "chat": (model.create_chat_completion, messages),
    }[kind]
    whole = create(given, **SHORT)
    chunks = list(create(given, stream=True, model="m", **SHORT))
    assert {chunk["object"] for chunk in chunks} == {
        {"text": "text_completion", "chat": "chat.completion.chunk"}[kind]
    }
    assert len({chunk["id"] for chunk in chunks}) == 1 and chunks[0]["model"] == "m"
    choices = [chunk["choices"][0] for chunk in chunks]
    if kind == "text":
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    else:
        assert choices[0]["delta"]["role"] == "assistant"
        content = "".join(choice["delta"].get("content", "") for choice in choices)
        assert content == whole["choices"][0]["message"]["content"]
        assert whole["choices"][0]["message"]["role"] == "assistant"
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["diffusion"]["steps"] == whole["diffusion"]["steps"]


def test_eos_and_stop_read_as_stop(model: DiffusionModel) -> None:
    free = model.generate(PROMPT, **SHORT)
    got = model.create_completion(PROMPT, **SHORT | {"eos": [int(free.tokens[0])]})
    assert got["choices"][0]["finish_reason"] == "stop" and got["choices"][0]["text"] == ""


@pytest.mark.parametrize("name", ["temprature", "embedding", "max_new_tokens"])
def test_unknown_parameters_are_refused_by_name(model: DiffusionModel, name: str) -> None:
    with pytest.raises(TypeError, match=f"'{name}'"):
        model.create_chat_completion([{"role": "user", "content": "hi"}], **{name: 1})


@pytest.mark.parametrize(
    "given", [{"self": 1}, {"messages": []}, {"tools": []}, {"bos_token": ""}, {"a b": 1}, 5, "x"]
)
def test_reserved_template_variables_are_refused(model: DiffusionModel, given: Any) -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        model.create_chat_completion([{"role": "user", "content": "hi"}], chat_template_kwargs=given)


def test_a_session_given_is_reused(model: DiffusionModel) -> None:
    session = model.new_session()
    first = [{"role": "user", "content": "hi"}]
    model.create_chat_completion(first, session=session, **SHORT)
    n_past = session.n_past
    kept = session.prefill(model.chat_prompt([*first, {"role": "assistant", "content": "x"}]))
    assert 0 < kept <= n_past
    with pytest.raises(ValueError, match="another model"), DiffusionModel(model.path) as other:
        other.generate(PROMPT, session=session, **SHORT)


# The package


def test_all_exported_names_exist() -> None:
    for name in pydiffusion.__all__:
        assert getattr(pydiffusion, name) is not None
    assert set(pydiffusion.__all__) <= set(dir(pydiffusion))
    with pytest.raises(AttributeError, match="nonsense"):
        pydiffusion.nonsense  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, pydiffusion; pydiffusion.PyDiffusionError; pydiffusion.GenerationOptions;"
        "print([m for m in ('numpy', 'tokenizers', 'jinja2', 'pydiffusion._native') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_0_1_0_stay_importable() -> None:
    """Documented modules; the names of the package itself are in ``pydiffusion.__all__``."""
    for module, names in {
        "chat_output": ("Content", "Reasoning", "ToolCall"),
        "sampling": ("accept", "measure", "draws", "temperature"),
        "events": ("CanvasEvent", "DraftEvent", "EndEvent"),
        "demo": ("checkpoint_path", "puzzles"),
        "demo.tasks": ("check",),
        "convert": ("convert", "quantize", "verify", "evaluate", "collect_imatrix", "plot"),
    }.items():
        found = importlib.import_module(f"pydiffusion.{module}")
        assert not [name for name in names if not hasattr(found, name)], module
