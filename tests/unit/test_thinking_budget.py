"""The thinking budget, and stopping on repetition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.server_fakes import ScriptedModel, ask, metadata, script

from pydiffusion import DiffusionModel, GenerationOptions, Session
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.generation.repetition import loop_start
from pydiffusion.generation.thinking_budget import ThoughtBudget
from pydiffusion.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    data = metadata()
    return Tokenizer(data, len(data["tokenizer.ggml.tokens"]))


def cut(tokenizer: Tokenizer, budget: int, *canvases: str, prompt: str = "") -> list[str | None]:
    """Each canvas as the budget cuts it; None for one that it does not cut."""

    def ids(text: str) -> list[int]:
        return tokenizer.tokenize(text, add_bos=False, parse_special=True)

    limit = ThoughtBudget(tokenizer, budget, ids(prompt))
    found = [limit.cut(ids(canvas)) for canvas in canvases]
    return [each and tokenizer.detokenize(each, keep_control=True) for each in found]


# One token per character; the marker and the channel's name are not counted.
@pytest.mark.parametrize(
    ("budget", "canvases", "expected"),
    [
        (3, ["<|channel>thought\nabc<channel|>answer"], [None]),
        (2, ["<|channel>thought\nabc<channel|>answer"], ["<|channel>thought\nab<channel|>"]),
        (0, ["<|channel>thought\nabc"], ["<|channel>thought\n<channel|>"]),
        (0, ["<|channel>thought\n<channel|>answer"], [None]),
        (4, ["<|channel>thought\nab", "cdef"], [None, "cd<channel|>"]),
        (2, ["<|channel>thought\nab<channel|>x<|channel>thought\nc"],
         ["<|channel>thought\nab<channel|>x<|channel>thought\n<channel|>"]),
        (2, ["<|channel>thought\nab<|tool_call>call:f{}<tool_call|>"], [None]),
        (2, ["<|channel>final\nan answer"], [None]),
        (2, ["no thought at all"], [None]),
        (1, ["<|channel>abc"], ["<|channel>a<channel|>"]),
    ],
)  # fmt: skip
def test_where_thinking_is_cut(
    tokenizer: Tokenizer, budget: int, canvases: list[str], expected: list[str | None]
) -> None:
    assert cut(tokenizer, budget, *canvases) == expected


@pytest.mark.parametrize("prompt", ["<|channel>", "<|channel>thought\n", "x<channel|><|channel>thought\nold"])
def test_thinking_opened_by_the_prompt(tokenizer: Tokenizer, prompt: str) -> None:
    name = "" if "thought" in prompt else "thought\n"
    assert cut(tokenizer, 2, name + "abc", prompt=prompt) == [name + "ab<channel|>"]


def test_thinking_ends_within_its_budget_and_the_answer_follows() -> None:
    model = ScriptedModel(script)
    free = model.create_chat_completion(ask("ponder"))["choices"][0]["message"]
    assert free["content"] == "Ah." and len(free["reasoning_content"]) > 70
    for budget in (0, 1, 30, 60):
        answer = model.create_chat_completion(ask("ponder"), thinking_budget=budget)
        message = answer["choices"][0]["message"]
        thought = message.get("reasoning_content", "")
        assert message["content"] == "So it is."
        assert budget - 1 <= len(thought) <= budget and free["reasoning_content"].startswith(thought)
        assert answer["choices"][0]["finish_reason"] == "stop"
    message = model.create_chat_completion(ask("ponder"), enable_thinking=False)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "So it is."}


def begin(session: Session, **options: int) -> None:
    endless = {"steps": 2, "confidence_threshold": 0.0}
    session.native.begin(
        **{**ENTROPY_BOUND_DEFAULTS, **endless, "max_tokens": 100, "seed": 1, **options}, eos=[]
    )


def canvas_of(session: Session) -> np.ndarray:
    while not (step := session.native.next_step()).canvas_done:
        pass
    return step.tokens


def test_an_amended_canvas_is_what_the_next_one_follows(gguf_file: Callable[..., Path]) -> None:
    model = DiffusionModel(gguf_file("small", "f32"), n_ctx=256, n_threads=1)
    prompt = model.tokenize("one two")
    session = model.new_session()
    session.encode(prompt)
    begin(session)
    first = canvas_of(session)
    assert session.native.amend(first[:3]) == ""
    canvas_of(session)
    assert session.tokens.tolist() == [*prompt, *first[:3]]
    n = model.canvas_length
    assert session.native.amend(first[: n - 1]) == "" and session.native.amend(first) == ""
    for wrong, message in (
        (np.zeros(n + 1, np.int32), "to replace a canvas"),
        (first[:2] * 0 - 1, "token -1"),
    ):
        with pytest.raises(ValueError, match=message):
            session.native.amend(wrong)
        begin(session)  # an error ends a generation
        canvas_of(session)

    begin(session, max_tokens=3)  # also where the canvas was the last
    assert len(canvas_of(session)) == 3 and session.native.next_step() is None
    assert session.native.amend(first[:2]) == ""
    assert session.native.next_step() is not None
    with pytest.raises(ValueError, match="no finished canvas"):
        session.native.amend(first[:2])
    begin(session, max_tokens=3)
    canvas_of(session)
    assert session.native.amend(first[:3]) == "length" and session.native.next_step() is None


# Repetition


def loop(head: str, block: str, passes: int) -> int | None:
    return loop_start(np.frombuffer((head + block * passes).encode(), np.uint8))


@pytest.mark.parametrize(
    ("head", "block", "passes", "kept"),
    [
        ("", "a", 128, 1),
        ("and so: ", "la ", 60, 7 + 3),
        ("x", "a longer sentence, said too often. ", 4, 36),
        ("", "z" * 99 + "y", 4, 100),
    ],
)
def test_repetition_is_detected(head: str, block: str, passes: int, kept: int) -> None:
    assert loop(head, block, passes) == kept


def test_ordinary_lists_are_not_repetition() -> None:
    texts = [
        "\n".join(f"{i}. item number {i}" for i in range(200)),
        "| a | b |\n| --- | --- |\n" + "\n".join(f"| {i} | {i * i} |" for i in range(100)),
        "-" * 100 + "\ntitle\n" + "=" * 80,
        "ha " * 40,
        "a longer sentence. " * 3,
        "".join(f"x[{i}] = 0\n" for i in range(100)),
    ]
    for text in texts:
        ids = np.frombuffer(text.encode(), np.uint8)
        assert all(loop_start(ids[:n]) is None for n in range(0, len(ids) + 1, 16)), text


def test_stop_on_repetition() -> None:
    model = ScriptedModel(script, n_ctx=4096)
    endless = model.generate("again", max_tokens=1000)
    assert endless.finish_reason == "length" and len(endless.tokens) == 1000
    caught = model.generate("again", max_tokens=1000, stop_on_repetition=True)
    assert caught.finish_reason == "repetition" and endless.text.startswith(caught.text)
    assert len(caught.tokens) < 128 + 64
    answer = model.create_chat_completion(ask("again"), stop_on_repetition=True, max_tokens=1000)
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_refusals(tokenizer: Tokenizer) -> None:
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="thinking_budget"):
            GenerationOptions(thinking_budget=wrong)
    with pytest.raises(ValueError, match="stop_on_repetition"):
        GenerationOptions(stop_on_repetition=3)
    for other in ({"regex": "a"}, {"canvas": [1]}):
        with pytest.raises(ValueError, match="thinking_budget can't be combined"):
            GenerationOptions(thinking_budget=3, **other)
    data = metadata()
    data["tokenizer.ggml.tokens"] = [t.replace("channel", "chanel") for t in data["tokenizer.ggml.tokens"]]
    plain = Tokenizer(data, tokenizer.n_vocab)
    with pytest.raises(ValueError, match="has none"):
        ThoughtBudget(plain, 3, [])
