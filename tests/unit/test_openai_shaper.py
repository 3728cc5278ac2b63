"""OpenAI's objects, of the library's functions and of the server, from the same events.

``openai.types`` says what OpenAI's own client accepts.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai.types
import openai.types.chat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.server_fakes import metadata

from pydiffusion import CanvasEvent, DraftEvent, EndEvent, GenerationOptions
from pydiffusion.events import Content, Event, Reasoning, ToolCall
from pydiffusion.openai import responses
from pydiffusion.openai.answers import Answer
from pydiffusion.openai.reports import Prefilled
from pydiffusion.openai.requests import ChatRequest, CompletionRequest
from pydiffusion.tokenizer import Tokenizer

N_PROMPT = 5
TIMINGS = {"prompt": 0.25, "encode": 0.5, "denoise": 1.0, "total": 2.0}
FINISH_REASONS = ("eos", "stop", "length", "context", "repetition")
TOKENIZER = Tokenizer(metadata(), len(metadata()["tokenizer.ggml.tokens"]))
RESOLVED = GenerationOptions(seed=7).resolve({}, 100)

text = st.text("ab é\n", max_size=6)
part = st.one_of(
    st.builds(Content, text.filter(bool)),
    st.builds(Reasoning, text.filter(bool)),
    st.builds(ToolCall, st.just("f"), st.dictionaries(text, st.integers(), max_size=2)),
)


def draft() -> DraftEvent:
    zeros = np.zeros(4, np.int32)
    return DraftEvent(
        step=2, tokens=zeros, entropy=zeros.astype(np.float32), accepted=zeros > 0, canvas_index=0, steps=3,
        _to_text=lambda tokens: "",
    )  # fmt: skip


@st.composite
def runs(draw: st.DrawFn) -> list[Event]:
    """The events of a generation: drafts, canvases with text and parts, an end."""
    canvases = draw(st.lists(st.lists(part, max_size=3), min_size=1, max_size=4))
    events: list[Event] = []
    for i, parts in enumerate(canvases):
        answer = "".join(part.text for part in parts if isinstance(part, Content))
        n_tokens, steps = draw(st.integers(0, 9)), draw(st.integers(1, 9))
        tokens = np.arange(n_tokens, dtype=np.int32)
        events += [draft(), CanvasEvent(tokens, answer, steps, i, tuple(parts))]
    return [*events, EndEvent(draw(st.sampled_from(FINISH_REASONS)), TIMINGS, 7)]


def library(events: list[Event], *, chat: bool, stream: bool) -> Any:
    """Through the public functions, with a model that does nothing but give these events."""
    session = SimpleNamespace(
        n_past=N_PROMPT,
        n_ctx=64,
        prefill=lambda ids, lora: 2,
        generate_chat=lambda options: iter(events),
        generate=lambda options: iter(events),
    )
    model: Any = SimpleNamespace(
        name="m",
        n_ctx_train=64,
        n_vocab=64,
        tokenizer=TOKENIZER,
        tokenize=lambda text: [1] * N_PROMPT,
        chat_prompt=lambda messages, **variables: [1] * N_PROMPT,
        new_session=lambda: session,
        resolve=lambda options: RESOLVED,
    )
    given: dict[str, Any] = {"stream": stream, "top_p": 0.9}
    if chat:
        return responses.create_chat_completion(model, [{"role": "user", "content": "x"}], **given)
    return responses.create_completion(model, "Head ", echo=True, **given)


def answer(*, chat: bool, n: int = 1, include_usage: bool = False) -> Answer:
    common: dict[str, Any] = {
        "stream": False, "include_usage": include_usage, "drafts": False, "options": [RESOLVED] * n,
        "ignored": ["top_p"],
    }  # fmt: skip
    prompts = [[1] * N_PROMPT] * n
    if chat:
        return Answer(ChatRequest(**common, messages=[]), "m", TOKENIZER, prompts)
    return Answer(CompletionRequest(**common, prompts=["Head "]), "m", TOKENIZER, prompts, ["Head "] * n)


def server(events: list[Event], *, chat: bool, stream: bool) -> Any:
    response = answer(chat=chat)
    reports = [Prefilled(2), *events]
    if stream:
        return [chunk for report in reports for chunk in response.chunks(0, report)]
    for report in reports:
        response.take(0, report)
    return response.whole()


def as_the_library_s(body: dict[str, Any]) -> dict[str, Any]:
    """A body of the server without what only the server says."""
    body = dict(body)
    assert body.pop("system_fingerprint") is None
    if "usage" in body:
        body["usage"] = {k: v for k, v in body["usage"].items() if not k.endswith("_details")}
    for choice in body["choices"]:
        if "message" in choice:
            assert choice["message"].pop("refusal") is None
    if "diffusion" in body:
        figures = body["diffusion"]
        assert figures.pop("type") == "summary" and figures.pop("finish_reasons")
        (canvas_steps,), (seed,) = figures["canvas_steps"], figures["seeds"]
        body["diffusion"] = figures | {"canvas_steps": canvas_steps, "seed": seed}
    return body


def without_ids(body: dict[str, Any]) -> dict[str, Any]:
    """Ids are random; a call's are in its choice."""
    body = {name: value for name, value in body.items() if name not in ("id", "created")}
    for choice in body["choices"]:
        for call in (choice.get("message") or choice.get("delta") or {}).get("tool_calls", ()):
            assert call.pop("id").startswith("call_")
    return body


@pytest.mark.parametrize("chat", [False, True])
@settings(deadline=None, derandomize=True, max_examples=60)
@given(events=runs())
def test_library_and_server_send_the_same_objects(chat: bool, events: list[Event]) -> None:
    of_library = without_ids(library(events, chat=chat, stream=False))
    of_server = without_ids(server(events, chat=chat, stream=False))
    assert as_the_library_s(of_server) == of_library
    chunks_of_library = list(map(without_ids, library(events, chat=chat, stream=True)))
    chunks_of_server = [c for c in server(events, chat=chat, stream=True) if c["choices"]]  # without drafts
    assert [as_the_library_s(without_ids(chunk)) for chunk in chunks_of_server] == chunks_of_library


@settings(deadline=None, derandomize=True, max_examples=60)
@given(events=runs())
def test_a_stream_adds_up_to_the_response_as_openai_s_types_read_both(events: list[Event]) -> None:
    for make in (library, server):
        whole = openai.types.chat.ChatCompletion.model_validate(make(events, chat=True, stream=False))
        chunks = [
            openai.types.chat.ChatCompletionChunk.model_validate(chunk)
            for chunk in make(events, chat=True, stream=True)
            if chunk["choices"]
        ]
        choice = whole.choices[0]
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            == (choice.message.content or "")
            or choice.message.tool_calls
        )
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert [call.index for call in calls] == list(range(len(choice.message.tool_calls or [])))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].choices[0].finish_reason == choice.finish_reason
        assert len({chunk.id for chunk in chunks}) == 1

        done = openai.types.Completion.model_validate(make(events, chat=False, stream=False))
        bodies = [chunk for chunk in make(events, chat=False, stream=True) if chunk["choices"]]
        pieces = [body["choices"][0] for body in bodies]
        assert "".join(piece["text"] for piece in pieces) == done.choices[0].text
        assert pieces[0]["text"] == "Head " and all(piece["text"] for piece in pieces[:-1])
        assert pieces[-1]["finish_reason"] == done.choices[0].finish_reason
        assert done.usage is not None
        n_tokens = sum(len(event.tokens) for event in events if isinstance(event, CanvasEvent))
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (N_PROMPT, n_tokens)
        assert done.usage.total_tokens == N_PROMPT + n_tokens


def test_a_tool_call_ends_a_message_that_would_have_stopped() -> None:
    call = CanvasEvent(np.arange(3), "", 2, 0, (ToolCall("f", {"a": 1}),))
    for reason, expected in (("eos", "tool_calls"), ("length", "length")):
        body = library([call, EndEvent(reason, TIMINGS, 7)], chat=True, stream=False)
        (choice,) = body["choices"]
        assert choice["finish_reason"] == expected and choice["message"]["content"] is None
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}


def test_choices_of_one_prompt_count_it_once_and_the_last_to_end_ends_the_stream() -> None:
    response = answer(chat=False, n=2, include_usage=True)
    thought = CanvasEvent(np.arange(3), "a", 2, 0)
    assert all(chunk["usage"] is None for i in (0, 1) for chunk in response.chunks(i, Prefilled(4)))

    def summaries() -> Iterator[bool]:
        for i, event in ((1, thought), (1, EndEvent("eos", TIMINGS, 8)), (0, EndEvent("length", TIMINGS, 7))):
            yield from ("diffusion" in chunk for chunk in response.chunks(i, event))

    assert list(summaries()) == [False, False, True]
    last = response.usage_chunk()
    assert last is not None and last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (N_PROMPT, 3)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_reasoning_is_counted_in_the_server_s_usage() -> None:
    canvas = CanvasEvent(np.arange(9), "b", 2, 0, (Reasoning("aaa"), Content("b")))
    body = server([canvas, EndEvent("eos", TIMINGS, 7)], chat=True, stream=False)
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
