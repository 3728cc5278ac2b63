"""Prompts and messages as users of other libraries give them: right, or refused by what to call instead."""

from __future__ import annotations

import enum
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai.types.chat
import pydantic
import pytest
from support.server_fakes import CALL, ScriptedModel, ask, script
from tokenizers import Tokenizer, models

from pydiffusion import GenerationOptions
from pydiffusion.chat.messages import normalize_messages

MODEL = ScriptedModel(script)
IDS = MODEL.tokenize("Hello")
OPENAI_CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}

Encoding = Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).encode("a")
GENERATE = {
    "generate": lambda prompt: MODEL.generate(prompt, seed=1),
    "stream": lambda prompt: list(MODEL.stream(prompt, seed=1)),
    "generate_batch": lambda prompt: next(_raised(MODEL.generate_batch([prompt], seed=1))),
    "create_completion": lambda prompt: MODEL.create_completion(prompt, seed=1),
}


def _raised(outcomes: Any) -> Any:
    for _, outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
        yield outcome


@pytest.mark.parametrize("name", GENERATE)
@pytest.mark.parametrize(
    ("prompt", "error", "instead"),
    [
        (None, TypeError, "give a text or token ids"),
        (ask("Hi"), TypeError, r"model\.chat\(messages\)"),
        (ask("Hi")[0], TypeError, r"model\.chat\(\[message\]\)"),
        (b"Hello", TypeError, "decode it"),
        (Path("prompt.txt"), TypeError, "Path.read_text"),
        ({"prompt": "Hello"}, TypeError, "give its 'prompt'"),  # vLLM's kinds of prompts
        ({"prompt_token_ids": IDS}, TypeError, "give its 'prompt_token_ids'"),
        ({"input_ids": IDS}, TypeError, "give its 'input_ids'"),
        (Encoding, TypeError, "give its ids"),
        (SimpleNamespace(input_ids=[IDS]), TypeError, "give its 'input_ids'"),
        (7, TypeError, "token ids in a list"),
        (np.int64(7), TypeError, "token ids in a list"),
        (np.array(7), TypeError, "token ids in a list"),
        ({7, 8}, TypeError, "a set has no order"),
        (["Hello", "you"], TypeError, r"model\.generate_batch\(prompts\)"),
        ([IDS], ValueError, r"one-dimensional.*model\.generate_batch"),
        ([IDS, IDS[:1]], ValueError, r"one-dimensional.*model\.generate_batch"),
        (np.array([IDS]), ValueError, r"one-dimensional.*model\.generate_batch"),
        ([7.0, 8.5], TypeError, "must be integers.*7.0"),
        ([True, False], TypeError, "must be integers.*True"),
        ([7, None], TypeError, "must be integers.*None"),
        ([7, 2**70], TypeError, "must be integers"),
        ([7, 10**6], ValueError, "1000000"),
        ([], ValueError, "no tokens"),
        ((), ValueError, "no tokens"),
    ],
)
def test_what_is_no_prompt_is_refused_with_what_to_give(
    name: str, prompt: Any, error: type[Exception], instead: str
) -> None:
    with pytest.raises(error, match=instead):
        GENERATE[name](prompt)


@pytest.mark.parametrize("name", ["generate", "generate_batch", "create_completion"])
@pytest.mark.parametrize(
    "prompt",
    [
        IDS, tuple(IDS), np.array(IDS), np.array(IDS, dtype=np.uint16), [np.int32(i) for i in IDS],
        iter(IDS), "Hello",
    ],
    ids=["list", "tuple", "array", "uint16", "numpy ints", "iterator", "text"],
)  # fmt: skip
def test_token_ids_of_any_kind_are_right(name: str, prompt: Any) -> None:
    if name != "generate" and hasattr(prompt, "__next__"):
        prompt = iter(IDS)  # the first test has used it up
    done = GENERATE[name](prompt)
    n_prompt = done["usage"]["prompt_tokens"] if isinstance(done, dict) else done.n_prompt
    assert n_prompt == len(IDS)


@pytest.mark.slow  # importing torch takes seconds
def test_tensors() -> None:
    torch = pytest.importorskip("torch", reason="NOT CHECKED: prompts that are tensors")
    assert MODEL.generate(torch.tensor(IDS), seed=1).n_prompt == len(IDS)
    assert MODEL.generate(list(torch.tensor(IDS)), seed=1).n_prompt == len(IDS)
    with pytest.raises(ValueError, match="give one row of it"):  # as `return_tensors="pt"` gives them
        MODEL.generate(torch.tensor([IDS]), seed=1)


@pytest.mark.parametrize(
    ("prompts", "error", "instead"),
    [
        ("Hello", TypeError, r"not str: give a list, or call model\.generate for a single one"),
        (b"Hello", TypeError, "not bytes: give a list"),
        (None, TypeError, "not NoneType: give a list"),
        ({"a": "Hello"}, TypeError, "not dict: give a list"),
        (7, TypeError, "not int: give a list"),
    ],
)
def test_one_prompt_is_no_batch(prompts: Any, error: type[Exception], instead: str) -> None:
    with pytest.raises(error, match=instead):
        MODEL.generate_batch(prompts)
    with pytest.raises(error, match=instead.replace("generate", "chat")):
        MODEL.chat_batch(prompts)


def test_a_prompt_that_is_none_fails_alone() -> None:
    """Data with a gap in it: the other prompts are answered."""
    outcomes = dict(MODEL.generate_batch(["Hello", None, ask("Hi"), "you"], seed=1))
    assert outcomes[0].text == outcomes[3].text == "Hello, world!"
    assert isinstance(outcomes[1], TypeError) and "NoneType" in str(outcomes[1])
    assert isinstance(outcomes[2], TypeError) and "model.chat" in str(outcomes[2])


def test_fewer_options_than_prompts_are_refused() -> None:
    """No prompt is left out in silence."""
    options = [GenerationOptions(seed=1)]
    with pytest.raises(ValueError, match="there are 2 prompts, but options for 1"):
        MODEL.generate_batch(["Hello", "you"], options)
    with pytest.raises(ValueError, match="options for 1 prompts, but more prompts"):
        list(MODEL.generate_batch(iter(["Hello", "you"]), iter(options)))
    endless = itertools.repeat(options[0])
    assert len(list(MODEL.generate_batch(["Hello", "you"], endless))) == 2


@pytest.mark.parametrize("text", [None, ask("Hi"), b"a <|hole|>", IDS, ["a <|hole|>"]])
def test_only_text_is_filled(text: Any) -> None:
    with pytest.raises(TypeError, match=r"^text (is of type|must be str)"):
        MODEL.infill(text)
    with pytest.raises(TypeError, match=r"^text (is of type|must be str)"):
        MODEL.edit(text, [(0, 1)])


def test_something_else_for_a_session() -> None:
    with pytest.raises(TypeError, match=r"session must be one of model\.new_session"):
        MODEL.generate("Hello", session="mine")  # type: ignore[arg-type]


# Messages


class Role(str, enum.Enum):
    USER = "user"


class Message(pydantic.BaseModel):
    role: Role
    content: str


@pytest.mark.parametrize(
    "messages",
    [
        [Message(role=Role.USER, content="Hi")],
        [{"role": Role.USER, "content": "Hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        [{"role": "user", "content": np.str_("Hi")}],
        tuple(ask("Hi")),
        (message for message in ask("Hi")),
    ],
)
def test_messages_of_any_kind_are_right(messages: Any) -> None:
    assert MODEL.chat_prompt(messages) == MODEL.chat_prompt(ask("Hi"))


def test_what_openai_s_client_returns_is_a_message() -> None:
    fields = {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]}
    message = openai.types.chat.ChatCompletionMessage.model_validate(fields)
    assert normalize_messages([message]) == normalize_messages([fields])
    # A message by hand, the calls as the client gives them: they must not be lost.
    by_hand = {"role": "assistant", "content": None, "tool_calls": message.tool_calls}
    assert normalize_messages([by_hand]) == normalize_messages([fields])
    assert CALL[:16] in MODEL.detokenize(MODEL.chat_prompt([*ask("Hi"), by_hand]), keep_control=True)


def test_numbers_of_numpy_in_a_call_s_arguments() -> None:
    def prompt(number: Any) -> list[int]:
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": [number]}}}
        return MODEL.chat_prompt([*ask("Hi"), {"role": "assistant", "tool_calls": [call]}])

    assert prompt(np.int64(3)) == prompt(3) and prompt(np.float32(0.5)) == prompt(0.5)
    assert prompt(np.bool_(True)) == prompt(True)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", r'list of dicts, such as \[\{"role": "user".*type str'),
        (None, "type NoneType"),
        (ask("Hi")[0], "type dict"),
        ([], "messages is empty"),
        (["Hi"], r"messages\[0\].*'Hi'"),
        ([("user", "Hi")], r"messages\[0\] is a tuple, not a message"),
        ([ask("Hi")], r"messages\[0\] is a list.*model\.chat_batch"),
        ([{"content": "Hi"}], r"messages\[0\] must be a dict with a role"),
        ([{"role": "user", "content": b"Hi"}], r"messages\[0\] holds a bytes"),
        ([{"role": "user", "content": {"Hi"}}], r"messages\[0\] holds a set"),
        ([{"role": "user", "content": 5}], r"messages\[0\] has a content of int"),
        ([{"role": "user", "content": ["Hi"]}], r"content\[0\] is of type 'str'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\]: must have image_url"),
        ([SimpleNamespace(role="user", content="Hi")], r"messages\[0\] must be a dict"),
    ],
)
def test_what_is_no_message_is_refused_by_place(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODEL.chat(messages)


# Options


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_new_tokens", "here it is max_tokens"),
        ("num_predict", "here it is max_tokens"),
        ("temperature", "t_min, t_max"),
        ("num_inference_steps", "here it is steps"),
        ("stop_sequences", "here it is stop"),
        ("stream", "call stream or stream_chat"),
        ("max_token", r"did you mean max_tokens\?"),
        ("nonsense", "the options are max_tokens, steps"),
    ],
)
def test_an_option_of_another_library_is_refused_with_ours(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"^unknown option '{name}'.*{hint}"):
        MODEL.generate("Hello", **{name: 1})
