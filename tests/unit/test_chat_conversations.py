"""Chat prompts equal those of transformers' `apply_chat_template`, with listed exceptions."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.chat_conversations import CONVERSATIONS, EVERY, PUBLIC, Conversation
from support.paths import REFERENCE
from support.server_fakes import ScriptedModel, script, serving

from pydiffusion import DiffusionModel
from pydiffusion.chat.formats.gemma import GEMMA

OWN = (REFERENCE / "chat_template.jinja").read_text(encoding="utf-8")
GOLDENS: dict[str, list[str | None]] = json.loads((REFERENCE / "goldens/chat.json").read_text("utf-8"))
SPECIAL = re.compile("|".join(map(re.escape, [*GEMMA.markers, "<bos>", "<eos>", "<pad>", "<unk>"])))

by_name = pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda one: one.name)


def model_with(template: str) -> ScriptedModel:
    made = ScriptedModel(script)
    made.metadata["tokenizer.chat_template"] = template
    return made


@pytest.fixture(scope="module")
def own() -> ScriptedModel:
    return model_with(OWN)


def check(
    model: ScriptedModel, conversation: Conversation, name: str, expected: str | None, same: str | None
) -> None:
    """expected, same: transformers' prompts for the messages, and for those whose prompt they must equal."""
    prompt = model.chat_prompt(conversation.messages, **conversation.variables)
    text = model.detokenize(prompt, keep_control=True)
    if conversation.differs_in == EVERY or name in conversation.differs_in:
        assert text != expected, "it is listed as a difference, but there is none"
        expected = same
    assert text == expected
    assert "None" not in text
    if not conversation.marked:
        assert prompt == model.tokenize(text, add_bos=False, parse_special=True)
    else:
        assert steering(model, prompt) == steering(model, model.chat_prompt(unmarked(conversation.messages)))
        assert len(SPECIAL.findall(text)) > len(steering(model, prompt)), "and no marker of a message is lost"


def steering(model: ScriptedModel, ids: list[int]) -> list[str]:
    return [text for text in map(model.tokenizer.token_text, ids) if SPECIAL.fullmatch(text)]


def unmarked(value: Any) -> Any:
    """Replace every marker by a letter."""
    if isinstance(value, str):
        return SPECIAL.sub("x", value)
    if isinstance(value, dict):
        return {key: unmarked(entry) for key, entry in value.items()}
    return [unmarked(entry) for entry in value] if isinstance(value, list) else value


def test_there_are_42_conversations_and_each_difference_has_its_reason() -> None:
    assert len(CONVERSATIONS) == len({one.name for one in CONVERSATIONS}) == 42
    for one in CONVERSATIONS:
        assert bool(one.differs_in) == bool(one.why) == (one.same_as is not None)
        assert one.differs_in == EVERY or set(one.differs_in) <= {"tests", *PUBLIC}


@by_name
def test_a_conversation_is_what_transformers_recorded(own: ScriptedModel, conversation: Conversation) -> None:
    expected, *same = GOLDENS[conversation.name]
    check(own, conversation, "tests", expected, same[0] if same else None)


def test_the_server_makes_the_same_of_them() -> None:
    seen: list[str] = []
    model = ScriptedModel(lambda prompt, _: seen.append(prompt) or ["Well."], n_ctx=4096)
    model.metadata["tokenizer.chat_template"] = OWN
    sent = [one for one in CONVERSATIONS if "add_generation_prompt" not in one.variables]
    assert len(sent) >= 41
    with serving(model) as (url, _):
        for one in sent:
            variables = {"chat_template_kwargs": dict(one.variables)}
            if "tools" in one.variables:
                variables["tools"] = variables["chat_template_kwargs"].pop("tools")
            body = {"messages": one.messages, "max_tokens": 16, **variables}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, (one.name, answer.text)
            prompt = model.chat_prompt(one.messages, **one.variables)
            assert seen[-1] == model.detokenize(prompt, keep_control=True), one.name


@pytest.mark.reference
def test_the_goldens_are_what_transformers_makes() -> None:
    from reference.make_chat_goldens import record

    assert record(OWN) == GOLDENS


@pytest.mark.reference
@pytest.mark.parametrize("name", PUBLIC)
def test_google_s_templates_give_what_transformers_makes(name: str) -> None:
    from reference.make_chat_goldens import reference_text

    template = public_template(name)
    model = model_with(template)
    for one in CONVERSATIONS:
        expected = reference_text(template, one.messages, one.variables)
        same = None
        if one.same_as is not None:
            same = reference_text(template, one.same_as, one.same_variables or one.variables)
        check(model, one, name, expected, same)


# Not those that differ from transformers, nor those with thoughts, which its sanitizing leaves in.
ALIKE = [one for one in CONVERSATIONS if not one.why and "thought" not in one.name]


@pytest.mark.reference
@pytest.mark.parametrize("conversation", ALIKE, ids=lambda one: one.name)
def test_its_tokens_are_those_of_transformers_sanitized(
    gguf_file: Callable[..., Path], checkpoint_folder: Callable[..., Path], conversation: Conversation
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder("tiny"))
    options = {"add_generation_prompt": True, **conversation.variables}
    expected = tokenizer.apply_chat_template(
        conversation.messages, chat_template=OWN, sanitize_control_tokens=True, **options
    )
    with DiffusionModel(gguf_file("tiny")) as model:
        model.metadata["tokenizer.chat_template"] = OWN
        assert model.chat_prompt(conversation.messages, **conversation.variables) == expected["input_ids"]


def public_template(name: str) -> str:
    """Google's template, from the package trl (Apache 2.0); not committed here."""
    installed = importlib.util.find_spec("trl")
    default = Path(installed.origin or "").parent / "chat_templates" if installed else ""
    path = Path(os.environ.get("PYDIFFUSION_TEMPLATES", default)) / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(
            f"NOT CHECKED: prompts of Google's template {name} against transformers; there is no {path} "
            "(pip install --no-deps trl==1.16.0, or set PYDIFFUSION_TEMPLATES to a folder)"
        )
    return path.read_text(encoding="utf-8")
