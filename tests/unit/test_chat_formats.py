"""Chat formats: chosen by the architecture's name; a second one, with other models' markers, on all paths."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from support.server_fakes import Script, ScriptedModel, ask, metadata

from pydiffusion.chat.formats import registry
from pydiffusion.chat.formats.chat_format import PLAIN, Call, ChatFormat
from pydiffusion.chat.formats.gemma import GEMMA
from pydiffusion.chat.output_parser import Content, Part, Reasoning, ToolCall
from pydiffusion.constrained import Automaton
from pydiffusion.generation.streaming import ChatStream
from pydiffusion.generation.thinking_budget import ThoughtBudget, can_think
from pydiffusion.openai.drafts import pieces
from pydiffusion.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6


def parse_call(text: str) -> Call | None:
    try:
        call = json.loads(text)
        return call["name"], call["arguments"]
    except (ValueError, KeyError, TypeError):
        return None


TOY = ChatFormat(
    reasoning=("<think>", "</think>"),
    call=("<tool_call>", "</tool_call>"),
    parse_call=parse_call,
    ends=("<|im_end|>",),
    visible_ends=("<|wait|>",),
    other_markers=("<|im_start|>",),
)
VISIBLE = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|wait|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}"
)


def toy_metadata(architecture: str = "toy") -> dict[str, Any]:
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>"]
    letters = ["\u2581", *(chr(i) for i in range(33, 127))]
    tokens = [*control, *VISIBLE, *(f"<0x{i:02X}>" for i in range(256)), *letters]
    types = [CONTROL] * len(control) + [USER_DEFINED] * len(VISIBLE) + [BYTE] * 256 + [NORMAL] * len(letters)
    changed = {
        "general.architecture": architecture,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.chat_template": TEMPLATE,
    }
    return metadata() | changed


def toy_model(script: Script, architecture: str = "toy") -> ScriptedModel:
    model = ScriptedModel(script)
    model.metadata = toy_metadata(architecture)
    model.tokenizer = Tokenizer(model.metadata)
    model.n_vocab = model.tokenizer.n_vocab
    return model


@pytest.fixture(autouse=True)
def toy_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ARCHITECTURE_TO_FORMAT, "toy", TOY)


def stream_of(tokenizer: Tokenizer, text: str, size: int = 3, **options: Any) -> tuple[list[Part], str]:
    """The parts of a text that arrives in portions of ``size`` tokens, and the answer's text."""
    stream = ChatStream(tokenizer, (), **options)
    ids = tokenizer.tokenize(text, add_bos=False, parse_special=True)
    parts: list[Part] = []
    answer = ""
    for start in range(0, len(ids), size):
        answer += stream.feed(ids[start : start + size], last=start + size >= len(ids))[0]
        parts += stream.parts
    return parts, answer


def joined(parts: list[Part], kind: type) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))


# The choice


def test_the_architecture_chooses_the_format() -> None:
    assert Tokenizer(metadata()).chat_format is GEMMA
    assert Tokenizer(toy_metadata()).chat_format is TOY
    for other in ("llama", "", 3, ["toy"], None):
        assert Tokenizer(metadata() | {"general.architecture": other}).chat_format is PLAIN


def test_the_markers_are_those_of_all_fields() -> None:
    assert set(TOY.markers) == {*VISIBLE, "<|im_start|>", "<|im_end|>"}
    assert PLAIN.markers == () and PLAIN.marker_pattern.search("<think>") is None
    assert "<think>" not in GEMMA.markers and "<|think|>" in GEMMA.markers


# The second format


CALL = '<tool_call>{"name": "look", "arguments": {"x": [1, "</think>"]}}</tool_call>'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_reasoning_answer_and_calls_of_another_format(size: int) -> None:
    tokenizer = Tokenizer(toy_metadata())
    text = "<think>\nHm, <|channel>.\n</think>\nSee: " + CALL + '<tool_call>{"name": 1<|im_end|>'
    parts, answer = stream_of(tokenizer, text, size)
    assert joined(parts, Reasoning) == "Hm, <|channel>."
    assert [part for part in parts if isinstance(part, ToolCall)] == [
        ToolCall("look", {"x": [1, "</think>"]})
    ]
    assert answer == joined(parts, Content) == 'See: {"name": 1', "what can't be parsed is text"


def test_reasoning_that_the_prompt_opens() -> None:
    model = toy_model(lambda prompt, _: [f"{prompt.endswith('<think>' + chr(10))}</think>so ", "it is"])
    for enabled, expected in ((True, ("True", "so it is")), (False, (None, "Falseso it is"))):
        message = model.create_chat_completion(
            ask("why"), chat_template_kwargs={"enable_thinking": enabled}, thinking_budget=100
        )["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == expected


def test_a_thinking_budget_closes_reasoning_with_the_formats_marker() -> None:
    tokenizer = Tokenizer(toy_metadata())
    assert can_think(tokenizer)
    ids = tokenizer.tokenize("<think>abcdef", add_bos=False)
    cut = ThoughtBudget(tokenizer, 3, []).cut(ids)
    assert cut is not None and tokenizer.detokenize(cut, keep_control=True) == "<think>abc</think>"
    assert ThoughtBudget(tokenizer, 6, []).cut(ids) is None


def test_markers_in_messages_are_text_and_reasoning_sent_back_is_stripped() -> None:
    model = toy_model(lambda *_: [])
    messages = [
        *ask("a<|im_end|>b<tool_call>"),
        {"role": "assistant", "content": "<think>hm</think>c"},
        *ask("d"),
    ]
    ids = model.chat_prompt(messages)
    end, call = map(model.tokenizer.token_id, ("<|im_end|>", "<tool_call>"))
    assert ids.count(end) == 3 and call not in ids, "only the template's own are markers"
    text = model.detokenize(ids, keep_control=True)
    assert "a<|im_end|>b<tool_call>" in text and "hm" not in text and "assistant\nc<|im_end|>" in text


def test_markers_are_neither_shown_in_drafts_nor_part_of_constrained_text() -> None:
    tokenizer = Tokenizer(toy_metadata())
    ids = np.asarray(tokenizer.tokenize("<think>a", add_bos=False))
    assert pieces(ids, tokenizer) == ["", "a"]
    automaton = Automaton("<think>", tokenizer)
    assert len(automaton.moves(int(ids[0]))[0]) == 0, "spelled by characters only"
    assert len(Automaton("<think>", Tokenizer(toy_metadata("llama"))).moves(int(ids[0]))[0]) == 1


def test_a_visible_marker_that_ends_an_answer() -> None:
    tokenizer = Tokenizer(toy_metadata())
    assert {end.text for end in tokenizer.end_tokens} == {"<eos>", "<|im_end|>", "<|wait|>"}
    other = Tokenizer(toy_metadata("llama"))
    assert {end.text for end in other.end_tokens} == {"<eos>", "<|im_end|>"}


# No format


def test_an_unknown_architecture_has_answers_only() -> None:
    tokenizer = Tokenizer(toy_metadata("llama"))
    text = "<think>\nHm.</think> " + CALL
    assert stream_of(tokenizer, text)[1] == text
    assert not can_think(tokenizer)
    with pytest.raises(ValueError, match="thinking_budget needs the markers"):
        ThoughtBudget(tokenizer, 3, [])
    model = toy_model(lambda *_: ["<think>a</think>"], "llama")
    message = model.create_chat_completion(ask("why"), enable_thinking=True)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<think>a</think>"}
