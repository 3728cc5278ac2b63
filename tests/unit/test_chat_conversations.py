"""Chat prompts equal those of transformers' `apply_chat_template`, with listed exceptions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.chat_conversations import CONVERSATIONS, EVERY, PUBLIC, Conversation
from support.format_conversations import EXAMPLES, random_case
from support.paths import REFERENCE
from support.public_templates import public_template
from support.server_fakes import ScriptedModel, script, serving

from pydiffusion import DiffusionModel
from pydiffusion.chat.formats.gemma import GEMMA
from pydiffusion.chat.template import ChatTemplate
from pydiffusion.chat.template_source import find_template

OWN = (REFERENCE / "chat_template.jinja").read_text(encoding="utf-8")
GOLDENS: dict[str, list[str | None]] = json.loads((REFERENCE / "goldens/chat.json").read_text("utf-8"))
# What DiffusionGemma's own template makes of them, and of conversations that show its format.
PUBLISHED: dict[str, Any] = json.loads((REFERENCE / "goldens/chat_diffusion_gemma.json").read_text("utf-8"))
BUILT_IN = find_template("diffusion-gemma")
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


@pytest.fixture(scope="module")
def built_in() -> ScriptedModel:
    return model_with(BUILT_IN)


@by_name
def test_the_built_in_template_s_prompts_are_those_of_the_published_one(
    built_in: ScriptedModel, conversation: Conversation
) -> None:
    expected, *same = PUBLISHED["conversations"][conversation.name]
    check(built_in, conversation, "diffusion_gemma", expected, same[0] if same else None)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_built_in_template_follows_the_format(name: str) -> None:
    messages, variables = EXAMPLES[name]
    prompt = ChatTemplate(BUILT_IN).render(messages, bos_token="<bos>", eos_token="<eos>", **variables)
    assert prompt == PUBLISHED["examples"][name]


@pytest.mark.reference
def test_what_the_published_template_makes_is_recorded() -> None:
    from reference.make_chat_goldens import record_published

    assert record_published(public_template("diffusion_gemma")) == PUBLISHED


@pytest.mark.reference
def test_the_built_in_template_equals_the_published_one_in_any_conversation() -> None:
    from reference.make_chat_goldens import reference_text

    published = public_template("diffusion_gemma")
    prompts = set()
    for seed in range(300):
        expected = reference_text(published, *random_case(seed))
        assert expected is not None and reference_text(BUILT_IN, *random_case(seed)) == expected, seed
        prompts.add(expected)
    assert len(prompts) > 280, "the cases are of many kinds"


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
@pytest.mark.filterwarnings("ignore:.*Google's of before")
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
