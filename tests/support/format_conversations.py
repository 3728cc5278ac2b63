"""Conversations that show every branch of the chat format of Gemma 4 and DiffusionGemma.

Unlike those of ``chat_conversations``, they are already in the form that templates expect, so that any
renderer may be given them.
"""

from __future__ import annotations

import random
from typing import Any

from .chat_conversations import (
    NESTED,
    OSLO,
    THOUGHT,
    Message,
    call,
    calls,
    model,
    parts,
    result,
    system,
    tool,
    user,
)

Case = tuple[list[Message], dict[str, Any]]


def function(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    fields = {"name": name, "description": f"Does {name}.", **more}
    return {
        "type": "function",
        "function": fields if parameters is None else {**fields, "parameters": parameters},
    }


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


#: By what is unusual in them, for a schema.
SCHEMAS: dict[str, Any] = {
    "none": None,
    "empty": {},
    "no properties": {"type": "object", "properties": {}},
    "no type": {"properties": {"a": {"type": "string"}}, "required": ["a"]},
    "enum": schema(a={"type": "string", "enum": ["x", "y"]}, b={"type": "integer", "enum": [1, 2]}),
    "nullable": schema(a={"type": "string", "nullable": True, "description": "An a."}),
    "several types": schema(a={"type": ["string", "null"]}),
    "no type of a property": schema(a={"description": "Any."}, b={}),
    "items": schema(a={"type": "array", "items": {"type": "string", "enum": ["x"], "minLength": 2}}),
    "items of several types": schema(a={"type": "array", "items": {"type": ["integer", "null"]}}),
    "items that are objects": schema(
        a={
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"b": {"type": "number"}},
                "required": ["b"],
                "x": None,
            },
        }
    ),
    "no items": schema(a={"type": "array"}, b={"type": "array", "items": {}}),
    "object": schema(a={"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}),
    "object without properties": schema(
        a={"type": "object", "additionalProperties": False, "b": {"type": "string", "description": "A b."}}
    ),
    "upper and lower case": schema(B={"type": "STRING"}, a={"type": "Number"}),
}
TOOL_CASES: dict[str, Case] = {
    f"schema: {name}": ([user()], {"tools": [function("f", parameters)]})
    for name, parameters in SCHEMAS.items()
}
MARKS = {"enable_thinking": True}
RESPONSE = {"description": "The weather.", "type": "object"}
ROUNDS = [user(), calls(OSLO, content="First."), result("wet"), calls({}, content="Then."), result("dry")]
THOUGHTFUL = calls(OSLO, reasoning="Look it up.")
EXAMPLES: dict[str, Case] = {
    **TOOL_CASES,
    "no conversation": ([system("Be brief.")], {}),
    "a declared response": (
        [user()],
        {"tools": [function("f", response=RESPONSE), function("g", response={"type": "string"})]},
    ),
    "thinking": ([user()], MARKS),
    "thinking, system and tools": ([system(" Be brief. "), user()], {**MARKS, "tools": [tool()]}),
    "thinking after a result": ([user(), calls(OSLO), result("wet")], MARKS),
    "thinking, a call without its result": ([user(), calls(OSLO)], MARKS),
    "thoughts of the last turn": ([user(), model("Wet.", reasoning="Hm."), user(), THOUGHTFUL], {}),
    "thoughts of earlier turns": ([user(), THOUGHTFUL, result("wet"), model("So."), user()], {}),
    "thoughts that are kept": (
        [user(), THOUGHTFUL, result("wet"), model("So.", reasoning="Hm."), user()],
        {"preserve_thinking": True},
    ),
    "a thought in the content": ([user(), model(f"So {THOUGHT} it is. {THOUGHT}"), user()], {}),
    "thoughts in parts": ([user(), model(parts(f"{THOUGHT} wet ", " dry ")), user()], {}),
    "content beside calls": (ROUNDS[:3], {}),
    "rounds": (ROUNDS, {}),
    "rounds, answered": ([*ROUNDS, model("So."), user("Thanks.")], {}),
    "two answers": ([user(), model("A"), model("B"), user()], {}),
    "calls that nobody answers": ([user(), calls(OSLO), user("Well?")], {}),
    "calls that the model goes on after": ([user(), calls(OSLO), model("Hm."), user()], {}),
    "several calls": ([user(), calls(OSLO, NESTED), result("wet"), result("dry", 2)], {}),
    "results in another order": ([user(), calls(OSLO, NESTED), result("dry", 2), result("wet")], {}),
    "results of nobody": ([user(), result("wet", name="f"), user()], {}),
    "a name of its own": ([user(), calls(OSLO), result("wet", 9, name="other"), result("dry", 8)], {}),
    "results in parts": ([user(), calls(OSLO), result(parts("wet, ", "dry"))], {}),
    "Google's results": (
        [
            user(),
            model(
                "It rains.",
                tool_calls=[call(OSLO)],
                tool_responses=[{"name": "weather", "response": NESTED}, {"response": "wet"}],
            ),
        ],
        {},
    ),
    "no generation prompt": ([user(), model("A")], {"add_generation_prompt": False}),
    "system in parts": ([system(parts("Be ", " brief.")), user()], {}),
    "system later on": ([user(), system("Be brief."), user()], {}),
    "user in parts": ([user(parts(" a ", " b "))], {}),
}


def random_case(seed: int) -> Case:
    """A conversation of up to nine messages in any order, with any of the variables."""
    draw = random.Random(seed)
    contents = ["", " a ", "Wet.", f"{THOUGHT} b", parts(" a ", f"{THOUGHT}b"), []]
    results = ["wet", "", parts("a ", "b")]
    messages: list[Message] = []
    for _ in range(draw.randint(1, 9)):
        kind = draw.choice(
            ["user", "user", "assistant", "assistant", "calls", "calls", "tool", "tool", "other"]
        )
        if kind == "tool":
            messages.append(result(draw.choice(results), draw.randint(1, 3), **_maybe(draw, name="f")))
        elif kind == "calls":
            said = calls(
                *draw.choices([OSLO, NESTED, {}], k=draw.randint(1, 2)), content=draw.choice(contents)
            )
            native = [{"name": "f", "response": draw.choice([NESTED, "x", 1.5, None, True, [1, "a"]])}]
            messages.append(said | _maybe(draw, reasoning="Hm.") | _maybe(draw, 0.2, tool_responses=native))
        elif kind == "other":
            messages.append({"role": draw.choice(["system", "model"]), "content": draw.choice(contents)})
        else:
            more = _maybe(draw, reasoning_content="Hm.") if kind == "assistant" else {}
            messages.append({"role": kind, "content": draw.choice(contents), **more})
    tools = draw.sample([function("f", each) for each in SCHEMAS.values()], draw.randint(0, 3))
    variables: dict[str, Any] = {"tools": tools} if tools else {}
    for name in ("enable_thinking", "preserve_thinking", "add_generation_prompt"):
        variables |= _maybe(draw, **{name: draw.random() < 0.5})
    return messages, variables


def _maybe(draw: random.Random, share: float = 0.4, /, **fields: Any) -> dict[str, Any]:
    return fields if draw.random() < share else {}
