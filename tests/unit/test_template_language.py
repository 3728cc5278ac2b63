"""What chat templates in the wild use of jinja2 does what it does in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.chat_conversations import model, system, tool, user

from pydiffusion import DiffusionModel, PyDiffusionError
from pydiffusion.chat.template import ChatTemplate

MESSAGES = [system('Sé <b> & "brief"'), user("Hi 世界"), model("Yo"), user("x")]
EACH = "{% for m in messages %}"
#: By subject; each is rendered without tools and with one.
CONSTRUCTS: dict[str, list[str]] = {
    "functions": [
        "{{ strftime_now('%Y') }}",
        "{{ strftime_now('%d %b %Y') }}",
        "{% if false %}{{ raise_exception('a ' 'b') }}{% endif %}{{ 'a' 'b' \"c\" }}",
        "{{ dict(a=1, b=2) }}{{ dict({'a': 1}, **{'b': 2}) }}{{ dict.fromkeys(['a']) }}",
        "{{ range(3) | list }}{% for i in range(2, 0, -1) %}{{ i }}{% endfor %}",
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}",
        "{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b",
    ],
    "generation": [
        EACH + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        EACH + "\n  {%- generation -%}\n {{ m.content }}\n {%- endgeneration %}\n{% endfor %}",
        EACH + "{% generation %}{{ loop.index }}{{ loop.last }}{% endgeneration %}{% endfor %}",
        EACH + "{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}",
        "{% set n = namespace(x=1) %}{% generation %}{% set n.x = 2 %}{% endgeneration %}{{ n.x }}",
        "{% macro f() %}{% generation %}x{% endgeneration %}{% endmacro %}{{ f() }}",
    ],
    "loops": [
        EACH + "{{ m.role }}{% break %}{% endfor %}",
        EACH + "{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
        EACH + "{{ loop.revindex0 }}{{ loop.previtem.role if loop.previtem is defined }}"
        "{{ loop.changed(m.role) }}{{ loop.cycle('a', 'b') }}{% endfor %}",
        "{% for m in [] %}a{% else %}b{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{% for m in [[1, [2]]] recursive %}{{ m if m is number else loop(m) }}{% endfor %}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
        "{% for k, v in messages[0] | items %}{{ k }}={{ v }};{% endfor %}",
        "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}{{ messages[-1].role }}",
    ],
    "tojson": [
        "{{ messages | tojson }}{{ 'ü\"' | tojson }}",
        "{{ messages | tojson(indent=4) }}",
        "{{ messages | tojson(True, 2) }}{{ messages | tojson(ensure_ascii=true) }}",
        "{{ tools | tojson(separators=(',', ':')) }}{{ tools | tojson(separators=[',', ':']) }}",
        "{{ tools | tojson(sort_keys=true) }}",
    ],
    "filters": [
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
        "{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}",
        "{{ ['a', 'b'] | reject('equalto', 'a') | join(', ') }}{{ ['a'] | map('upper') | list }}",
        "{{ [{'a': 1}, {}] | map(attribute='a', default=0) | list }}{{ ['string', 'null'] | upper }}",
        "{{ '%s-%d' | format('a', 3) }}{{ '{}-{}'.format(1, 2) }}{{ '%s' % 'x' }}{{ 'a' ~ 1 ~ none }}",
        "{{ 'ab cd' | title }}{{ 'ab' | capitalize }}{{ 'abcdef' | truncate(4) }}{{ 'a\nb' | indent(2) }}",
        "{{ x | default('d') }}{{ '' | default('d', true) }}{{ none | d('z') }}{{ '3' | int }}",
        "{{ [1, 2, 2] | unique | list }}{{ [3, 1] | sort }}{{ [1, 2, 3] | batch(2) | list }}",
        "{% for g, l in messages | groupby('role') %}{{ g }}{{ l | length }}{% endfor %}",
        "{{ '<b>&' }}{{ '<b>' | e }}{{ '<b>' | safe }}{% filter upper %}abc{% endfilter %}",
    ],
    "strings": [
        "{{ '\\n\\nx\\n'.lstrip('\\n') }}|{{ ' a '.strip() }}|{{ 'a</think>b'.split('</think>')[-1] }}",
        "{{ 'a-b-c'.rsplit('-', 1)[0] }}{{ 'aXb'.replace('X', '-') }}{{ 'Hi'.startswith('H') }}",
    ],
    "variables": [
        "{{ bos_token }}{{ eos_token }}|{{ cls_token }}|{{ custom }}|{{ messages[0].nope }}",
        "{{ tools is not none }}{{ tools is defined }}",
        "{% if not x is defined %}{% set x = none %}{% endif %}{{ x is not none }}",
        "{{ documents is defined }}{% if documents is not none %}{{ documents }}{% endif %}",
        "{% set messages = messages[1:] %}{{ messages | length }}",
        "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
        "{% set ns = namespace({'a': 1}, self=2) %}{{ ns.a }}{{ ns.self }}{{ ns.b is defined }}",
        "{% macro f(self, y=2) %}{{ self }}{{ y }}{% endmacro %}{{ f(1) }}{{ f(3, y=4) }}",
        "{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, a=2) }}",
        "{% set x | trim %}  a {{ 1 }} {% endset %}{{ x }}{% with a = 1 %}{{ a }}{% endwith %}",
        "{{ 1 is number }}{{ {} is mapping }}{{ 'a' is iterable }}{{ 1 is integer }}{{ 3 is divisibleby 3 }}",
    ],
    "white space": [
        "a\n   {% if true %}\n  b\n   {% endif %}\n c\n{# x #}\n d\n",
        "a\n\n",
        "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc",
        "{#- c -#} x{% raw %}{{ x }}{% endraw %}",
    ],
    # Refused: by the sandbox, or because jinja2 has no such thing.
    "refused": [
        "{{ messages[0].a.b }}",
        "{% set a = [] %}{% set _ = a.append(1) %}{{ a }}",
        "{{ dict.update(messages[0], {'content': 'x'}) }}{{ messages[0].content }}",
        "{% set ns = namespace(_a=1) %}x",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}x",
        "{% do messages.append(1) %}",
        "{% include 'x' %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ 'a' | nofilter }}",
        "{{- if .System }}{{ .System }}{{ end }}",
    ],
}


def rendered(template: str, tools: list[dict[str, Any]] | None) -> str | None:
    """What we make of it; None if it is refused."""
    try:
        return ChatTemplate(template).render(MESSAGES, bos_token="<bos>", eos_token="<eos>", tools=tools)
    except PyDiffusionError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.reference
@pytest.mark.parametrize("subject", CONSTRUCTS)
def test_it_is_what_transformers_makes(subject: str) -> None:
    from reference.make_chat_goldens import reference_text

    for template in CONSTRUCTS[subject]:
        for tools in (None, [tool()]):
            expected = reference_text(template, MESSAGES, {"tools": tools})
            assert (expected is None) == (subject == "refused"), template
            assert rendered(template, tools) == expected, template


def test_special_tokens_are_variables(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    names = ("bos", "eos", "pad", "unk", "mask", "cls")
    (tmp_path / "t").write_text("{# messages #}" + "".join(f"{{{{ {name}_token }}}}" for name in names))
    with DiffusionModel(gguf_file("tiny"), chat_template=tmp_path / "t") as opened:
        known = opened.tokenizer
        ids = [known.bos_id, known.eos_id, known.pad_id, known.unknown_id, known.mask_id]
        assert opened.chat_prompt(MESSAGES) == [i for i in ids if i is not None] and None not in ids[:4]
        assert opened.chat_prompt(MESSAGES, pad_token="") == [i for i in ids if i not in (None, known.pad_id)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{{ documents is defined }}{{ documents is not none }}", "TrueFalse"),
        ("{% set ns = namespace(self=1) %}{{ ns.self }}", "1"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", None),
        ("{{ dict.update(messages[0], {'content': 'x'}) }}", None),
        ("{{ dict.fromkeys(['a'], 1) }}{{ dict(b=2) }}", "{'a': 1}{'b': 2}"),
    ],
)
def test_without_transformers(template: str, expected: str | None) -> None:
    assert rendered(template, None) == expected
