"""Chat templates: rendered as Hugging Face does, errors with their line, hostile templates stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pydiffusion import DiffusionModel, PyDiffusionError, UnsupportedModelError
from pydiffusion.chat.template import ChatTemplate

HI = [{"role": "user", "content": " hi "}]


def render(source: str, messages: list[dict[str, Any]] = HI, **variables: Any) -> str:
    return ChatTemplate(source).render(messages, **variables)


def test_block_tags_are_trimmed_with_their_line() -> None:
    source = (
        "{% for m in messages %}\n    {% if m %}\n<{{ m.content | trim }}>\n    {% endif %}\n{% endfor %}"
    )
    assert render(source) == "<hi>\n"


def test_the_usual_variables_are_defined() -> None:
    source = (
        "{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}|{{ tools | length }}"
        "|{{ enable_thinking is defined }}|{{ strftime_now('%Y') | length }}"
    )
    assert (
        render(source, bos_token="<bos>", eos_token="<eos>", tools=[{"a": 1}]) == "<bos>|<eos>|True|1|False|4"
    )
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"


def test_tojson_escapes_nothing_for_html() -> None:
    assert render("{{ messages[0] | tojson }}", [{"role": "user", "content": "<é & 'x'>"}]) == (
        '{"role": "user", "content": "<é & \'x\'>"}'
    )
    assert render("{{ [1, 2] | tojson(indent=1) }}") == "[\n 1,\n 2\n]"


def test_loop_variables_and_break() -> None:
    source = (
        "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
        "{% if loop.index == 2 %}{% break %}{% endif %};{% endfor %}"
    )
    assert render(source, HI * 3) == "1TrueFalse3;2FalseFalse3"
    assert render("{% for k, v in messages[0].items() %}{{ k }}{% else %}none{% endfor %}") == "rolecontent"
    assert render("{% for x in missing %}{% else %}none{% endfor %}") == "none"


def test_state_is_kept_in_namespaces() -> None:
    source = "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}"
    assert render(source, HI * 3) == "3"


def test_generation_tags_render_their_body() -> None:
    assert render("a{% generation %}b{% endgeneration %}c") == "abc"


def test_content_in_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "ab"


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


LOOP = (
    "{% for part in m.content %}{% if part.type == 'text' %}[{{ part.text | trim }}]{% endif %}{% endfor %}"
)
KNOWS_PARTS = {
    "a loop": f"{{% for m in messages %}}{LOOP}{{% endfor %}}",
    "a loop, where there are parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
    f"{{% else %}}{LOOP}{{% endif %}}{{% endfor %}}",
    "a loop in a macro": f"{{% macro say(m) %}}{LOOP}{{% endmacro %}}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}",
    "filters": "{% for m in messages %}[{{ m.content | map(attribute='text') | join('][') }}]{% endfor %}",
}
KNOWS_TEXTS = {
    "trimmed": "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
    "joined by +": "{% for m in messages %}{{ '' + m.content + '' }}{% endfor %}",
    "joined by ~": "{% for m in messages %}{{ '' ~ m.content }}{% endfor %}",
    "as JSON": "{% for m in messages %}{{ m.content | tojson | replace('\"', '') }}{% endfor %}",
    "split": "{% for m in messages %}{{ m.content.split('|')[-1] }}{% endfor %}",
    "only the first part": "{% for m in messages %}"
    "{{ m.content if m.content is string else m.content[0].text }}{% endfor %}",
    "loops over other things": "{% for m in messages %}{% for t in tools or [] %}{{ t.content }}{% endfor %}"
    "{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool", "critic"])
@pytest.mark.parametrize("name", KNOWS_PARTS)
def test_content_parts_reach_templates_that_handle_them(name: str, role: str) -> None:
    message = {"role": role, "content": parts("a ", "b")}
    assert render(KNOWS_PARTS[name], [message]).replace(" ", "") == "[a][b]"


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool", "critic"])
@pytest.mark.parametrize("name", KNOWS_TEXTS)
def test_content_parts_are_joined_for_other_templates(name: str, role: str) -> None:
    assert render(KNOWS_TEXTS[name], [{"role": role, "content": parts("a ", "b")}]) == "a b"


def test_a_template_may_handle_parts_of_some_roles_only() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content | trim }}|{% else %}"
        "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": parts("a", "b")}, {"role": "user", "content": parts("c", "d")}]
    assert render(source, messages) == "ab|[c][d]"


def test_a_template_is_asked_once_about_each_role(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(KNOWS_PARTS["a loop"])
    rendered = []
    monkeypatch.setattr(
        template, "_text", lambda names, plain=template._text: rendered.append(names) or plain(names)
    )
    for _ in range(3):
        template.render([{"role": role, "content": parts("a")} for role in ("user", "user", "assistant")])
    assert len(rendered) == 3 + 2
    template.render([{"role": "system", "content": "text"}])
    assert len(rendered) == 3 + 2 + 1


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize("source", ["<{{ messages[0].content }}>", "{{ '<' + messages[0].content + '>' }}"])
@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": []}])
def test_missing_content_is_empty_text(content: dict[str, Any], source: str, role: str) -> None:
    assert render(source, [{"role": role, **content}]) == "<>"


def test_null_is_never_rendered_as_none() -> None:
    source = (
        "{% set m = messages[0] %}<{{ m.name }}{{ m.reasoning_content }}{{ m.refusal }}{{ m.tool_call_id }}>"
        "{% for call in m.tool_calls %}{{ call.id }}{{ call.function.description }}{% endfor %}"
        "{{ m.tool_responses[0].response }}{{ 'tool_calls' in messages[1] }}"
        "{{ tools[0].function.description }}"
    )
    message = {
        "role": "assistant",
        "tool_calls": [{"id": None, "function": {"name": "f", "description": None}}],
        "tool_responses": [{"name": "f", "response": None}],
        **dict.fromkeys(("name", "reasoning_content", "refusal", "tool_call_id")),
    }
    messages = [message, {"role": "assistant", "content": "b", "tool_calls": None}]
    tools = [{"type": "function", "function": {"name": "f", "description": None}}]
    assert render(source, messages, tools=tools) == "<>False"
    cached = [{"type": "text", "text": "a", "cache_control": None}]
    source = "{% for part in messages[0].content %}{{ part.cache_control }}{{ part.text }}{% endfor %}"
    assert render(source, [{"role": "user", "content": cached}]) == "a"


def test_null_in_schemas_and_arguments_is_kept() -> None:
    schema = {"type": "object", "properties": {"x": {"enum": [None, 1], "default": None}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    call = {"function": {"name": "f", "arguments": {"x": None}}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    source = (
        "{{ tools[0].function.parameters | tojson }}"
        "{% for call in messages[0].tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}"
    )
    assert render(source, messages, tools=tools) == json.dumps(schema) + '{"x": null}'


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        ({}, "{}"),
        ({"arguments": None}, "{}"),
        ({"arguments": ""}, "{}"),
        ({"arguments": " \n"}, "{}"),
        ({"arguments": "null"}, "{}"),
        ({"arguments": "{}"}, "{}"),
        ({"arguments": {}}, "{}"),
        ({"arguments": {"a": [1]}}, '{"a": [1]}'),
        ({"arguments": '{"a": [1]}'}, '{"a": [1]}'),
        ({"arguments": "[1]"}, '"[1]"'),  # values that are not objects are left to the template
        ({"arguments": '{"a": '}, '"{\\"a\\": "'),
    ],
)
def test_arguments_of_calls_are_objects(function: dict[str, Any], shown: str) -> None:
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", **function}}]}]
    assert render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", messages) == shown


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_all_names_that_templates_use(name: str) -> None:
    messages = [{"role": "assistant", "content": "b", name: "a"}]
    assert render("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}", messages) == "aa"


def test_the_callers_messages_are_not_modified() -> None:
    messages = [
        {"role": "developer", "content": parts("a"), "name": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
        },
    ]
    before = json.dumps(messages)
    template = ChatTemplate("{{ messages[0].content }}")
    prepared = template.prepare(messages)
    assert json.dumps(messages) == before
    assert template.prepare(prepared) == prepared


@pytest.mark.parametrize("messages", [None, "hi", {"role": "user", "content": "hi"}, 5, []])
def test_messages_that_are_not_a_list_are_refused(messages: Any) -> None:
    with pytest.raises(ValueError, match="messages"):
        render("{{ messages }}", messages)


@pytest.mark.parametrize(
    "messages",
    [
        ["x"],
        [{"content": "x"}],
        [{"role": 1}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": {"type": "text"}}],
        [{"role": "user", "content": ["a"]}],
        [{"role": "user", "content": [{"type": "text", "text": None}]}],
        [{"role": "user", "content": b"a"}],
    ],
)
def test_messages_of_the_wrong_shape_are_refused(messages: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"messages\[0\]"):
        render("{{ messages }}", messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n\n{% for m in %}", "line 3"),
        ("a\n{{ messages[0].nothing.at_all }}", "line 2"),
        (
            "a\n{% for m in messages %}\n{{ raise_exception('roles must alternate') }}{% endfor %}",
            "line 3: roles must",
        ),
        ("{{ 1 / 0 }}", "line 1: division by zero"),
        ("{{ 'a' * 'b' }}", "line 1"),
        ("{% include 'x' %}", "line 1"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ " + "(" * 50000, "compiled|line"),
    ],
)
def test_an_error_names_the_templates_line(source: str, message: str) -> None:
    with pytest.raises(PyDiffusionError, match=message):
        render(source)


TEXT = "{% set n = namespace(s='xx') %}"
LIST = "{% set n = namespace(s=[1]) %}"
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "sums in a loop": "{% set r = range(100000) %}{% for i in r %}{{ r | sum }}{% endfor %}",
    "lists in a loop": "{% for i in range(100000) %}{{ range(100000) | list | length }}{% endfor %}",
    "doubling by ~": TEXT + "{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by +": TEXT + "{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling a list": LIST + "{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling a block": TEXT
    + "{% for i in range(99) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    "repetition": "{{ 'x' * 10**9 }}",
    "repetition folded": "{{ 'x' * 1000000000 }}",
    "a wide centre": "{{ 'x' | center(1000000000) }}",
    "a wide method": "{{ 'x'.ljust(1000000000) }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a wide format filter": "{{ '%1000000000d' | format(1) }}",
    "a wide format method": "{{ '{:1000000000}'.format(1) }}",
    "a starred format": "{{ '%*d' | format(1000000000, 1) }}",
    "a power": "{{ 9**9**9**9 }}",
    "a macro for ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a branching macro": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{%endif%}{% endmacro %}{{ f(60) }}",
    "a loop for ever": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "much output": "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=100000) }}",
    "a wide indent": "{{ ('x\\n' * 100000) | indent(100000) }}",
    "wordwrap": "{{ ('x' * 1000000) | wordwrap(1) }}",
    "replacement": "{{ ('x' * 10000).replace('x', 'y' * 10000) }}",
    "replacement by a filter": "{{ ('x' * 10000) | replace('x', 'y' * 10000) }}",
    "many texts": "{% for i in range(99999) %}{% set x = 'x' * 10000000 %}{% endfor %}",
    "many slices": "{% set s = 'x' * 10000000 %}{% for i in range(99999) %}{% set x = s[1:] %}{% endfor %}",
    "many methods": "{% set s = 'x' * 10000000 %}"
    "{% for i in range(99999) %}{% set x = s.upper() %}{% endfor %}",
    "many lists": "{% set n = namespace(s=[]) %}"
    "{% for i in range(99999) %}{% set n.s = [n.s, [1] * 900000] %}{% endfor %}",
    "a tree as a key": "{% set n = namespace(s=(1,)) %}"
    "{% for i in range(60) %}{% set n.s = (n.s, n.s) %}{% endfor %}{{ {n.s: 1} }}",
    "a tree as an index": "{% set n = namespace(s=(1,)) %}"
    "{% for i in range(60) %}{% set n.s = (n.s, n.s) %}{% endfor %}{{ {}[n.s] }}",
    "join": "{{ ('x' * 10000).join(['y'] * 10000) }}",
    "translation": "{{ ('x' * 10000).translate({120: 'y' * 10000}) }}",
}
#: Lists that contain each other twice, 60 deep: a few bytes, and 2^60 elements once they are looked at.
TREES = (
    "{% set n = namespace(s=[1], t=[1]) %}"
    "{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% set n.t = [n.t, n.t] %}{% endfor %}"
)
HOSTILE |= {
    f"a tree: {use}": TREES + use
    for use in (
        "{{ n.s }}", "{{ n }}", "{{ n.s ~ '' }}", "{{ n.s | tojson }}", "{{ n.s | string }}",
        "{{ n.s | upper }}", "{{ [n.s] | map('string') | list }}", "{{ '%s' % n.s }}",
        "{{ '{}'.format(n.s) }}", "{{ n.s == n.t }}", "{{ [n.s] | select('eq', n.t) | list }}",
        "{{ n.s in [n.t] }}", "{{ [n.s].index(n.t) }}", "{{ raise_exception(n.s) }}",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped(name: str) -> None:
    started = time.process_time()
    with pytest.raises(PyDiffusionError, match=r"chat template(, line 1)?: "):
        render(HOSTILE[name])
    assert time.process_time() - started < 20


def test_a_long_conversation_is_not_hostile() -> None:
    messages = [{"role": "user", "content": "word " * 400}] * 500
    source = (
        "{% for m in messages %}{{ '<|turn>' + m['role'] + (m['content'] | trim) + '<turn|>' }}{% endfor %}"
    )
    assert len(render(source, messages)) > 900_000
    loop = "{% for m in messages %}{% set n.s = n.s + m['content'] %}{% endfor %}"
    source = "{% set n = namespace(s='') %}" + loop + "{{ n.s }}"
    assert len(render(source, messages)) > 900_000


def test_a_prompt_has_one_bos_and_real_control_tokens(gguf_file: Callable[..., Path]) -> None:
    with DiffusionModel(gguf_file("tiny")) as model:
        ids = model.chat_prompt([{"role": "user", "content": "hi"}])
        tokenizer = model.tokenizer
        assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
        assert ids[1] == tokenizer.token_id("<|turn>")
        expected = "<bos><|turn>user\nhi<turn|>\n<|turn>model\n"
        assert model.detokenize(ids, keep_control=True) == expected


def test_a_template_without_bos_gets_the_one_that_the_file_asks_for(
    gguf_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with DiffusionModel(gguf_file("tiny")) as model:
        model.metadata["tokenizer.chat_template"] = "{{ messages[0].content }}"
        assert model.chat_prompt(HI)[0] == model.tokenizer.bos_id


def test_a_file_without_template_says_so(gguf_file: Callable[..., Path]) -> None:
    with DiffusionModel(gguf_file("tiny")) as model:
        del model.metadata["tokenizer.chat_template"]
        with pytest.raises(UnsupportedModelError, match="no chat template"):
            model.create_chat_completion(HI)
