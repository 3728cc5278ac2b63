"""``model.chat``: an answer as a plain object, of its own, streamed, in a batch and in a session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai.types.chat
import pytest
from support.server_fakes import TOOLS, ScriptedModel, ask, script

import pydiffusion
from pydiffusion import CanvasEvent, ChatCompletion, Completion, DiffusionModel, EndEvent, GenerationOptions
from pydiffusion.events import Content, Reasoning, ToolCall

MODEL = ScriptedModel(script)


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> Iterator[DiffusionModel]:
    with DiffusionModel(gguf_file("small"), n_threads=1) as opened:
        yield opened


def test_an_answer_is_text() -> None:
    done = MODEL.chat(ask("Hi"), seed=7)
    assert isinstance(done, ChatCompletion) and isinstance(done, Completion)
    assert (done.text, done.reasoning, done.tool_calls) == ("Hello, world!", "", ())
    assert (done.finish_reason, done.seed, done.n_cached) == ("eos", 7, 0)
    assert done.n_prompt == len(MODEL.chat_prompt(ask("Hi")))
    assert MODEL.detokenize(done.tokens) == done.text
    assert done.canvas_steps == (3, 3) and done.steps == 6


def test_reasoning_and_calls_are_apart() -> None:
    done = MODEL.chat(ask("How is the weather?"), tools=TOOLS, seed=1)
    assert done.reasoning == "I'll look it up." and done.text == ""
    assert done.tool_calls == (ToolCall("get_weather", {"city": "Oslo", "days": 3}), ToolCall("b", {}))
    thought = MODEL.chat(ask("think"), seed=1)
    assert (thought.reasoning, thought.text) == ("Hm, yes.", "It is so. Über!")
    assert len(thought.tokens) > len(MODEL.tokenize(thought.text, add_bos=False)), "reasoning is counted"


@pytest.mark.parametrize("text", ["Hi", "weather", "think"])
def test_it_says_what_create_chat_completion_says(text: str) -> None:
    done = MODEL.chat(ask(text), tools=TOOLS, seed=1)
    body = MODEL.create_chat_completion(ask(text), tools=TOOLS, seed=1)
    theirs = openai.types.chat.ChatCompletion.model_validate(body).choices[0].message
    assert (theirs.content or "") == done.text
    assert body["usage"]["completion_tokens"] == len(done.tokens)
    ours = openai.types.chat.ChatCompletionMessage.model_validate(done.message)
    assert ours.content == theirs.content and ours.role == "assistant"
    assert done.message.get("reasoning_content", "") == done.reasoning
    assert [call.function for call in ours.tool_calls or ()] == [
        call.function for call in theirs.tool_calls or ()
    ]


def test_its_message_goes_back_with_a_tool_s_result() -> None:
    messages = ask("How is the weather?")
    done = MODEL.chat(messages, tools=TOOLS, seed=1)
    assert done.message is done.message, "or the ids would be others each time"
    calls = done.message["tool_calls"]
    assert len({call["id"] for call in calls}) == 2
    result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "rain"}
    assert MODEL.chat([*messages, done.message, result], seed=1).text == "It rains in Oslo."


def test_a_stop_string_cuts_the_answer_only() -> None:
    done = MODEL.chat(ask("think"), stop="so", seed=1)
    assert (done.text, done.reasoning, done.finish_reason) == ("It is ", "Hm, yes.", "stop")
    assert MODEL.chat(ask("think"), stop="Hm", seed=1).finish_reason == "eos"


def test_without_a_limit_an_answer_runs_to_its_end() -> None:
    assert MODEL.chat(ask("long")).finish_reason in ("context", "length")
    assert len(MODEL.chat(ask("long")).tokens) > 256, "the default of generate"
    assert len(MODEL.chat(ask("long"), max_tokens=20).tokens) == 20
    assert len(MODEL.chat(ask("long"), GenerationOptions(max_tokens=20)).tokens) == 20


def test_thinking_is_off_if_asked() -> None:
    done = MODEL.chat(ask("ponder"), enable_thinking=False, seed=1)
    assert (done.reasoning, done.text) == ("", "So it is.")
    by_kwargs = MODEL.chat(ask("ponder"), chat_template_kwargs={"enable_thinking": False}, seed=1)
    assert by_kwargs.text == done.text
    assert MODEL.chat(ask("ponder"), thinking_budget=5, enable_thinking=False, seed=1).reasoning, "its own"
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        MODEL.chat(ask("Hi"), chat_template_kwargs={"messages": []})


def test_events_of_a_stream() -> None:
    seen: list[Any] = []
    done = MODEL.chat(ask("think"), seed=1, on_event=seen.append)
    streamed = list(MODEL.stream_chat(ask("think"), seed=1))
    assert [type(event) for event in streamed] == [type(event) for event in seen]
    parts = [part for event in streamed if isinstance(event, CanvasEvent) for part in event.parts]
    assert "".join(part.text for part in parts if isinstance(part, Content)) == done.text
    assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == done.reasoning
    assert isinstance(streamed[-1], EndEvent)
    with pytest.raises(TypeError, match="max_token"):  # at the call, not at the first event
        MODEL.stream_chat(ask("think"), max_token=3)


def test_a_batch_gives_the_same() -> None:
    conversations = [ask("Hi"), ask("think"), ["Hi"], ask("weather")]
    outcomes = dict(MODEL.chat_batch(iter(conversations), seed=1, n_parallel=2))
    assert isinstance(outcomes[2], ValueError) and "messages[0]" in str(outcomes[2])
    for i in (0, 1, 3):
        alone = MODEL.chat(conversations[i], seed=1)
        kept = ("text", "reasoning", "tool_calls", "finish_reason", "n_prompt")
        assert all(getattr(outcomes[i], name) == getattr(alone, name) for name in kept)


def test_a_session_reuses_the_conversation(model: DiffusionModel) -> None:
    session = model.new_session()
    options = GenerationOptions(seed=1, steps=3, max_tokens=12)
    messages = ask("sort: d a c")
    first = model.chat(messages, options, session=session)
    messages += [first.message, *ask("reverse: a b")]
    second = model.chat(messages, options, session=session)
    alone = model.chat(messages, options)
    assert second.n_cached > first.n_prompt / 2 and alone.n_cached == 0
    assert second.text == alone.text and second.tokens.tolist() == alone.tokens.tolist()
    assert session.n_encoded < first.n_prompt + second.n_prompt


def test_structured_answers(model: DiffusionModel) -> None:
    done = model.chat(ask("json: bob 7"), json_schema={"type": "integer"}, max_tokens=8, steps=4, seed=1)
    assert int(done.text) is not None and done.reasoning == ""
    (_, batched), = model.chat_batch(
        [ask("json: bob 7")], json_schema={"type": "integer"}, max_tokens=8, steps=4, seed=1
    )  # fmt: skip
    assert batched.text == done.text  # type: ignore[union-attr]


def test_a_call_that_is_required() -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}}}
    given: dict[str, Any] = {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "seed": 1,
        "steps": 2,
        "max_tokens": 64,
    }
    done = MODEL.chat(ask("Hi"), **given)
    assert [call.name for call in done.tool_calls] == ["f"] and set(done.tool_calls[0].arguments) <= {"a"}
    ((_, batched),) = MODEL.chat_batch([ask("Hi")], **given)
    assert batched.tool_calls == done.tool_calls  # type: ignore[union-attr]
    body = MODEL.create_chat_completion(ask("Hi"), **given, n=2)
    assert [choice["message"]["tool_calls"][0]["function"]["name"] for choice in body["choices"]] == ["f"] * 2
    with pytest.raises(ValueError, match="tool_choice"):
        MODEL.chat(ask("Hi"), **given | {"tool_choice": "g"})


def test_it_is_exported() -> None:
    assert pydiffusion.ChatCompletion is ChatCompletion
    names = {field.name for field in dataclasses.fields(ChatCompletion)}
    assert {"text", "reasoning", "tool_calls", "finish_reason", "seed", "n_prompt", "n_cached"} <= names
