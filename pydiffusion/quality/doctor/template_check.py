"""The chat template: conversations through it, and the same through the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydiffusion import PyDiffusionError
from pydiffusion.chat.template import ChatTemplate
from pydiffusion.chat.template_source import OUTDATED, REPLACE_IT, TEMPLATE_KEY, is_outdated
from pydiffusion.convert.checkpoint.chat_templates import TEMPLATE, read_chat_template
from pydiffusion.tokenizer import Tokenizer

from .report import Result, Section
from .subject import Subject

_TOOL = {
    "type": "function",
    "function": {
        "name": "weather_report",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
    },
}
_QUESTION = {"role": "user", "content": "How is the weather in Oslo?"}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather_report", "arguments": {"city": "Oslo"}},
        }
    ],
}
_RESULT = {"role": "tool", "tool_call_id": "call_1", "name": "weather_report", "content": "Snowy, -3 degrees"}
#: By name: messages, variables, and texts that the prompt must have.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], tuple[str, ...]]] = {
    "a question": ([_QUESTION], {}, ("How is the weather in Oslo?",)),
    "system": (
        [{"role": "system", "content": "Answer in Norwegian."}, _QUESTION],
        {},
        ("Answer in Norwegian.", "Oslo?"),
    ),
    "several turns": (
        [_QUESTION, {"role": "assistant", "content": "It snows."}, {"role": "user", "content": "And Rome?"}],
        {},
        ("Oslo?", "It snows.", "And Rome?"),
    ),
    "thinking": ([_QUESTION], {"enable_thinking": True}, ("Oslo?",)),
    "tools": ([_QUESTION], {"tools": [_TOOL]}, ("weather_report", "Tells the weather.", "Its name")),
    "a tool call and its result": (
        [_QUESTION, _CALL, _RESULT],
        {"tools": [_TOOL]},
        ("weather_report", "Snowy, -3 degrees"),
    ),
}
#: Without these a model works, but not for agents.
_FOR_AGENTS = ("tools", "a tool call and its result")


def check(subject: Subject, section: Section) -> None:
    """Check the file's chat template."""
    source = subject.metadata.get(TEMPLATE_KEY)
    if not isinstance(source, str):
        section.fail(
            "chat template",
            "none",
            TEMPLATE_KEY,
            "chat and the server need one: convert the checkpoint again, with its chat_template.jinja",
        )
        return
    try:
        template = ChatTemplate(source)
    except PyDiffusionError as error:
        section.fail("compiles", str(error), "it compiles", "the template was edited: take the checkpoint's")
        return
    section.passed("compiles", f"{len(source)} characters")
    section.judge(
        not is_outdated(source),
        "turns at tool calls",
        OUTDATED if is_outdated(source) else "not Google's of before 2026-07-09, nor made from it",
        "not Google's of before 2026-07-09, nor made from it",
        REPLACE_IT,
        Result.WARNING,
    )
    tokenizer = subject.tokenizer
    prompts = {name: _check_one(name, template, tokenizer, section) for name in CONVERSATIONS}
    section.judge(
        prompts["thinking"] != prompts["a question"],
        "enable_thinking",
        "changes the prompt" if prompts["thinking"] != prompts["a question"] else "has no effect",
        "changes the prompt",
        "reasoning can't be switched on with this template",
        Result.WARNING,
    )
    _compare(subject.reference, source, prompts, tokenizer, section)


def _variables(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {name: "" if i is None else tokenizer.token_text(i) for name, i in ids.items()}


def _check_one(name: str, template: ChatTemplate, tokenizer: Tokenizer, section: Section) -> str | None:
    """Render one conversation; None if that fails."""
    messages, variables, texts = CONVERSATIONS[name]
    wrong = Result.WARNING if name in _FOR_AGENTS else Result.FAILED
    expected = f"a prompt with {', '.join(map(repr, texts))}"
    try:
        prompt = template.render(messages, **_variables(tokenizer), **variables)
    except (PyDiffusionError, ValueError) as error:
        section.judge(False, name, str(error), expected, "the template does not support this", wrong)
        return None
    missing = [text for text in texts if text not in prompt]
    ids = tokenizer.tokenize(prompt, add_bos=False, parse_special=True)
    flaw = None if tokenizer.bos_id is None or ids[:2].count(tokenizer.bos_id) == 1 else "not one bos"
    seen = f"{len(ids)} tokens, ends with {prompt[-24:]!r}"
    if missing:
        seen += f"; lacks {', '.join(map(repr, missing))}"
    if flaw:
        seen += f"; begins with {prompt[:24]!r}, {flaw}"
    section.judge(
        not missing and flaw is None,
        name,
        seen,
        expected,
        "the template leaves this out: compare it with the checkpoint's",
        wrong if flaw is None else Result.FAILED,
    )
    return prompt


def _compare(
    reference: Path | None,
    source: str,
    prompts: dict[str, str | None],
    tokenizer: Tokenizer,
    section: Section,
) -> None:
    """Compare with the reference's template, as text and as transformers renders it."""
    if reference is None:
        section.skip("the reference's template", "no --reference", "give the checkpoint's folder")
        return
    wanted = read_chat_template(reference, [])
    if wanted is None:
        section.skip("the reference's template", f"the reference has no {TEMPLATE}", "download it, too")
        return
    section.judge(
        wanted == source,
        "the reference's template",
        "equal" if wanted == source else _first_difference(source, wanted),
        "equal",
        "the file has another template: convert again, or keep it if it was changed on purpose",
    )
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        section.skip("prompts of transformers", str(error), "pip install transformers")
        return
    differing = []
    for name, (messages, variables, _) in CONVERSATIONS.items():
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages],
                chat_template=wanted,
                add_generation_prompt=True,
                **_variables(tokenizer),
                **variables,
            )
            text = rendered[0]
        except Exception as error:  # templates raise what they like
            text = None
            differing += [f"{name} (transformers: {error})"] if prompts[name] is not None else []
        if text is not None and prompts[name] != text:
            differing.append(f"{name} ({_first_difference(prompts[name] or '', text)})")
    section.judge(
        not differing,
        "prompts of transformers",
        "; ".join(differing) if differing else f"equal in all {len(CONVERSATIONS)} conversations",
        f"equal in all {len(CONVERSATIONS)} conversations",
        "if the templates are equal, this is a fault of pydiffusion: report it with this page",
    )


def _first_difference(ours: str, theirs: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    at = min(len(ours), len(theirs)) if at is None else at
    return f"differs at character {at}: {ours[at : at + 24]!r}, not {theirs[at : at + 24]!r}"


CHECKS = (check,)
