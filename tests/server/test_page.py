"""The web page: what is served, and a chat in a real browser where one is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support import chromium
from support.adapters_by_hand import blank_adapter
from support.server_fakes import ScriptedModel, script, serving

PATHS = ("/", "/page.css", "/page.js", "/heatmap.js", "/images.js")


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    return ScriptedModel(script)


@pytest.fixture(scope="module")
def url(model: ScriptedModel) -> Iterator[str]:
    with serving(model) as (address, _):
        yield address


def test_the_page_loads_nothing_from_other_hosts(url: str) -> None:
    for path in PATHS:
        response = httpx.get(url + path)
        assert (
            response.status_code == 200
            and "default-src 'none'" in response.headers["content-security-policy"]
        )
        assert not re.search(r"https?://|//[a-z]+\.", response.text), path
    assert "text/html" in httpx.get(url + "/").headers["content-type"]


def test_the_page_needs_no_key_but_the_api_does(model: ScriptedModel) -> None:
    with serving(model, api_key="k") as (url, _):
        assert [httpx.get(url + path).status_code for path in PATHS] == [200] * len(PATHS)
        assert httpx.post(url + "/v1/chat/completions", json={}).status_code == 401


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[chromium.Browser]:
    with chromium.opened(tmp_path) as opened:
        yield opened


def say(browser: chromium.Browser, message: str) -> None:
    browser.run(f"text.value = {message!r}; form.requestSubmit()")


def test_a_chat_in_the_browser(browser: chromium.Browser, model: ScriptedModel, url: str) -> None:
    model.step_seconds = 0.05
    browser.open(url + "/")
    browser.wait_for("document.getElementById('model').textContent === 'scripted'")
    browser.run(
        "window.seen = []; new MutationObserver(() => {"
        " seen.push(document.querySelectorAll('.canvas .settled').length);"
        "}).observe(log, {subtree: true, childList: true, attributes: true})"
    )
    say(browser, "think")
    browser.wait_for(
        "running === null && document.querySelector('.answer')?.textContent === 'It is so. Über!'"
    )
    assert browser.run("document.querySelector('.thought').textContent") == "Hm, yes."
    settled = browser.run("seen")
    assert len(set(settled)) >= 3, "the canvas came into focus step by step"
    assert browser.run("document.querySelector('.canvas').hidden")
    assert browser.run(
        "[...document.querySelectorAll('.canvas span')].every(s => Number(s.style.opacity) > 0)"
    )
    # replay: the first frame again, then the answer
    assert browser.run("document.querySelector('.figures input').max") == "12"
    replay = (
        "{{ const slider = document.querySelector('.figures input'); slider.value = {};"
        " slider.dispatchEvent(new Event('input')) }}"
    )
    browser.run(replay.format(0))
    assert browser.run(
        "document.querySelector('.answer').hidden && !document.querySelector('.canvas').hidden"
    )
    assert browser.run("document.querySelectorAll('.canvas .settled').length") == 21
    browser.run(replay.format(12))
    assert browser.run(
        "!document.querySelector('.answer').hidden && document.querySelector('.canvas').hidden"
    )
    # the heat map: a row for each step, a column for each position; a click shows the step
    browser.run("document.querySelector('details.entropy').open = true")
    assert browser.run("[document.querySelector('.heat').width, document.querySelector('.heat').height]") == [
        64, 12,
    ]  # fmt: skip
    assert "64 positions over 12 steps" in browser.run(
        "document.querySelector('.heat').getAttribute('aria-label')"
    )
    colours = browser.run(
        "(() => { const context = document.querySelector('.heat').getContext('2d');"
        " const row = context.getImageData(0, 0, 64, 1).data;"
        " return [row[0], row[4 * 63]]; })()"
    )
    assert colours[0] < 60 < 150 < colours[1], "sure is dark, unsure is bright"
    browser.run(
        "{ const map = document.querySelector('.heat'), box = map.getBoundingClientRect();"
        " map.dispatchEvent(new MouseEvent('click', {clientY: box.top + 0.5})) }"
    )
    assert browser.run("document.querySelector('.figures input').value") == "0"
    assert browser.run("document.querySelector('.answer').hidden")
    browser.run(replay.format(12))
    # a second turn, stopped
    say(browser, "long")
    browser.wait_for(
        "document.querySelectorAll('article.assistant .answer')[1].textContent.includes('canvas 1')"
    )
    browser.run("document.getElementById('stop').click()")
    browser.wait_for("running === null")
    assert browser.run("document.querySelector('.error').textContent") == "Stopped."
    assert browser.run("messages.length") == 4
    assert browser.complaints == []
    assert {address.partition("/v1")[0].rstrip("/") for address in browser.requests} <= {
        *(url + path.rstrip("/") for path in PATHS), url + "/health", "data:,",
    }  # fmt: skip


def test_an_adapter_is_chosen_in_the_browser(browser: chromium.Browser) -> None:
    model = ScriptedModel(script)
    model.set_lora([(blank_adapter("sums"), 1.0), (blank_adapter("poems"), 0.5)])
    with serving(model, n_parallel=1, n_sessions=1) as (url, _):
        browser.open(url + "/")
        browser.wait_for("!document.getElementById('adapter').hidden")
        names = browser.run("[...document.getElementById('adapter').options].map((each) => each.text)")
        assert names == ["The server's adapters", "No adapter", "sums", "poems"]
        for i, lora in enumerate([[("sums", 1.0), ("poems", 0.5)], [], [("sums", 1.0)], [("poems", 0.5)]]):
            browser.run(f"document.getElementById('adapter').selectedIndex = {i}")
            say(browser, "Hi")
            answers = "document.querySelectorAll('article.assistant .answer')"
            browser.wait_for(f"running === null && {answers}[{i}]?.textContent === 'Hello, world!'")
            assert model.lora_of_answers[i] == lora
        assert browser.complaints == []


def test_text_is_never_markup(browser: chromium.Browser, url: str) -> None:
    with serving(ScriptedModel(lambda prompt, i: ["<img src=x onerror=alert(1)>"])) as (other, _):
        browser.open(other + "/")
        say(browser, "<b>bold</b>")
        browser.wait_for("running === null && document.querySelector('.answer')?.textContent.length > 5")
        assert browser.run("log.querySelectorAll('img, b').length") == 0
        assert browser.run("document.querySelector('.user').textContent") == "<b>bold</b>"


def test_infill_in_the_browser(browser: chromium.Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    from pydiffusion import DiffusionModel
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    target = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(checkpoint_path(), target, "q8_0")
    with serving(DiffusionModel(target, n_threads=1, n_ctx=512)) as (url, _):
        browser.open(url + "/")
        assert browser.run("document.getElementById('infill-tools').hidden")
        browser.run("document.getElementById('infill').click(); text.value = 'red  blue'")
        browser.run("text.setSelectionRange(4, 4); document.getElementById('hole').click()")
        assert browser.run("text.value") == "red <|hole|> blue"
        browser.run("document.getElementById('hole-tokens').value = 3; form.requestSubmit()")
        browser.wait_for("running === null && document.querySelector('mark') !== null")
        hole = browser.run("document.querySelector('mark').textContent")
        assert browser.run("document.querySelector('.answer').textContent") == f"red {hole} blue"
        assert browser.run("document.querySelector('.heat').height") >= 1
        assert browser.run("text.value") == "red <|hole|> blue", "the draft stays for another try"
        browser.run("text.value = 'no hole'; form.requestSubmit()")
        browser.wait_for("running === null && document.querySelector('.error') !== null")
        assert "has no hole" in browser.run("document.querySelector('.error').textContent")
        assert [line for line in browser.complaints if "400" not in line] == []
