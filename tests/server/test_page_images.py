"""Images on the chat page, in a real browser where one is installed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import chromium
from support.images import file_bytes
from support.seeing_model import FakeTower, SeeingModel
from support.server_fakes import ScriptedModel, script, serving

from pydiffusion.vision import preprocess

# Files from base64 by name, as a drop or a paste has them.
TRANSFER = """
function transferOf(files) {
  const transfer = new DataTransfer();
  for (const [name, type, text] of files) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    transfer.items.add(new File([bytes], name, {type}));
  }
  return transfer;
}
function paste(files, also) {
  const clipboardData = transferOf(files);
  if (also) clipboardData.setData("text/plain", also);
  const event = new ClipboardEvent("paste", {clipboardData, bubbles: true, cancelable: true});
  text.dispatchEvent(event);
  return event.defaultPrevented;
}
function drop(files) {
  const event = new DragEvent("drop", {dataTransfer: transferOf(files), bubbles: true, cancelable: true});
  log.dispatchEvent(event);
  return event.defaultPrevented;
}
"""


@pytest.fixture(scope="module")
def model() -> SeeingModel:
    return SeeingModel(script, n_ctx=4096)


@pytest.fixture(scope="module")
def url(model: SeeingModel) -> Iterator[str]:
    with serving(model, max_body=4_000_000) as (address, _):
        yield address


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    with chromium.opened(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(opened: chromium.Browser, model: SeeingModel, url: str) -> chromium.Browser:
    """The page, loaded anew."""
    model.vision = FakeTower()  # which has seen no image yet
    return load(opened, url)


def load(browser: chromium.Browser, url: str) -> chromium.Browser:
    browser.open(url + "/")
    browser.complaints.clear()
    browser.run(TRANSFER)
    browser.wait_for("reads !== null")
    return browser


def png(colour: str, size: tuple[int, int] = (8, 6)) -> str:
    return base64.b64encode(file_bytes(Image.new("RGB", size, colour), "PNG")).decode()


def files(*colours: str) -> str:
    """Arguments of a drop or paste: PNG files called by their colours."""
    return json.dumps([[f"{colour}.png", "image/png", png(colour)] for colour in colours])


def thumbnails(browser: chromium.Browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('#attached img')].map((image) => image.alt)")


def send(browser: chromium.Browser, question: str) -> None:
    n = browser.run("log.querySelectorAll('article.assistant').length")
    browser.run(f"text.value = {question!r}; form.requestSubmit()")
    browser.wait_for(f"log.querySelectorAll('article.assistant').length === {n + 1} && running === null")


def test_attached_pasted_and_dropped(browser: chromium.Browser, model: SeeingModel, tmp_path: Path) -> None:
    assert browser.run("!document.getElementById('attach').hidden")
    chosen = tmp_path / "red.png"
    chosen.write_bytes(base64.b64decode(png("red")))
    document = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=document, selector="#files")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(chosen)])
    assert browser.run(f"paste({files('green')})")
    assert browser.run(f"drop({files('blue', 'black')})")
    browser.wait_for("document.querySelectorAll('#attached img').length === 4")
    assert thumbnails(browser) == ["red.png", "green.png", "blue.png", "black.png"]
    # removed again
    browser.run("document.querySelector('[aria-label=\"Remove blue.png\"]').click()")
    assert thumbnails(browser) == ["red.png", "green.png", "black.png"]

    send(browser, "What is it?")
    assert thumbnails(browser) == [] and browser.run("text.value") == ""
    colors = [(255, 0, 0), (0, 128, 0), (0, 0, 0)]
    assert [image.shape for image in model.vision.images] == [(6, 8, 3)] * 3
    assert [tuple(image[5, 7]) for image in model.vision.images] == colors
    assert browser.run("textOf(messages[0].content)") == "What is it?"
    shown = "[...log.querySelectorAll('.user img')].map((image) => [image.alt, image.naturalWidth])"
    browser.wait_for(f"({shown}).every(([, width]) => width === 8)")
    assert [alt for alt, _ in browser.run(shown)] == ["red.png", "green.png", "black.png"]
    assert browser.run("document.querySelector('.user').textContent") == "What is it?"
    assert browser.run("document.querySelector('.answer').textContent") == "Hello, world!"
    assert browser.run("log.querySelectorAll('.heat').length") == 1, "the answer can be replayed"

    # the next turn sends the same images once more, which the server knows
    send(browser, "And?")
    assert browser.run("messages.map((message) => message.content.length)") == [4, 13, 4, 13]
    assert len(model.vision.images) == 3
    # nothing of it outlives the page
    stored = "[localStorage.length, Object.keys(sessionStorage).join(), document.cookie]"
    assert browser.run(stored) == [0, "", ""]
    assert browser.complaints == []

    # Infill answers the question as far as it is text.
    browser.run("document.getElementById('infill').click()")
    send(browser, "It is <|hole:2|>.")
    assert "infill reads text" not in browser.run("log.lastChild.textContent"), "the last question has none"
    browser.run("messages = messages.slice(0, 2)")
    send(browser, "It is <|hole:2|>.")
    assert "infill reads text" in browser.run("log.lastChild.textContent")


def test_an_image_alone_that_is_still_being_read(browser: chromium.Browser, model: SeeingModel) -> None:
    browser.run(f"drop({files('red')}); form.requestSubmit()")
    browser.wait_for("log.querySelectorAll('.answer').length === 1 && running === null")
    assert len(model.vision.images) == 1 and browser.run("textOf(messages[0].content)") == ""


NOTICE = "document.getElementById('notice').textContent"


def test_a_model_without_vision(opened: chromium.Browser) -> None:
    """Nothing to attach by, and no drop leaves the page."""
    with serving(ScriptedModel(script)) as (url, _):
        browser = load(opened, url)
        assert browser.run("document.getElementById('attach').hidden")
        assert browser.run(f"drop({files('red')})")
        browser.wait_for(f"{NOTICE} !== ''")
        assert "can't read images" in browser.run(NOTICE) and "--mmproj" in browser.run(NOTICE)
        assert thumbnails(browser) == []


def test_a_server_with_a_key(opened: chromium.Browser, model: SeeingModel) -> None:
    """It says what its model can do once the page has the key, for which an image asks as a message does."""
    with serving(model, api_key="k") as (url, _):
        opened.open(url + "/")
        opened.run(TRANSFER + "; window.prompt = () => 'k'")
        assert opened.run("reads === null && document.getElementById('attach').hidden")
        opened.run(f"drop({files('red')})")
        opened.wait_for("attached.items.length === 1")
        assert opened.run("reads && !document.getElementById('attach').hidden")
        opened.run("sessionStorage.clear()")


def test_a_key_is_asked_for_only_where_there_is_one(browser: chromium.Browser) -> None:
    """An image may come before the server's first answer, or after the server was away."""
    browser.run("reads = null; key = 'mine'; window.prompt = () => { key = 'asked' }")
    browser.run(f"drop({files('red')})")
    browser.wait_for("attached.items.length === 1")
    assert browser.run("[reads, key]") == [True, "mine"]
    browser.run("reads = null; window.fetch = () => Promise.reject(new Error())")
    browser.run(f"drop({files('red')})")
    browser.wait_for(f"{NOTICE}.endsWith('does not answer.')")
    assert browser.run("[reads, key]") == [None, "mine"]


def test_a_new_chat_drops_images_still_being_read(browser: chromium.Browser) -> None:
    browser.run(f"drop({files('red')}); document.getElementById('clear').click()")
    browser.run(f"drop({files('blue')}); attached.ready")
    assert thumbnails(browser) == ["blue.png"]


def test_what_is_refused_is_said(browser: chromium.Browser, model: SeeingModel) -> None:
    # text with a picture of it beside is text
    assert not browser.run(f"paste({files('red')}, 'a table')")

    text = base64.b64encode(b"no image").decode()
    browser.run(f"drop([['a.png', 'image/png', '{text}'], ...{files('red')}])")
    browser.wait_for("document.querySelectorAll('#attached img').length === 1")
    assert browser.run(NOTICE) == "a.png is not attached: this browser can't read it as an image."
    # infill
    browser.run("document.getElementById('infill').click(); text.value = 'a <|hole|>'; form.requestSubmit()")
    browser.wait_for(f"{NOTICE}.startsWith('Infill reads text only')")
    assert thumbnails(browser) == ["red.png"]
    browser.run("document.getElementById('infill').click()")
    # more than the server takes: said before it is sent
    browser.run("attached.put([{name: 'big.png', url: 'data:image/png;base64,' + 'A'.repeat(4e6)}])")
    error = refused(browser, "Too much", ["red.png", "big.png"])
    assert error.startswith("This chat is 4.0 MB with all its images, and the server takes 4.0 MB")
    # what the server refuses
    browser.run("attached.items[1].url = 'data:image/png;base64,AAAA'")
    error = refused(browser, "What is it?", ["red.png", "big.png"])
    assert error.startswith("messages[0].content[1]") and "image" in error
    assert len(model.vision.images) == 1


def refused(browser: chromium.Browser, question: str, images: list[str]) -> str:
    """What the page says; the question and its images are there for another try."""
    send(browser, question)
    assert browser.run("messages.length") == 0
    assert browser.run("text.value") == question and thumbnails(browser) == images
    return browser.run("log.lastChild.querySelector('.error').textContent")


def test_a_large_photograph_is_made_smaller(browser: chromium.Browser, model: SeeingModel) -> None:
    """But not below what the server scales it to, in the same grid of patches, rotated as the file says."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 45, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((2411, 1603), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = rng.integers(-8, 9, smooth.shape, dtype=np.int16)
    photograph = Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    file = file_bytes(photograph, "JPEG", quality=95, exif=exif.tobytes())
    assert len(file) > 1 << 20
    browser.run(f"drop([['photo.jpg', 'image/jpeg', '{base64.b64encode(file).decode()}']])")
    browser.wait_for("attached.items.length === 1")
    send(browser, "Where is it?")
    (sent,) = model.vision.images
    upright = photograph.transpose(Image.Transpose.ROTATE_270)
    largest = 1120 * 48 * 48  # pixels that the server makes of any image
    assert sent.shape[0] < upright.size[1] and largest <= sent.shape[0] * sent.shape[1] < 1.1 * largest
    patches, positions = preprocess(upright)
    theirs, their_positions = preprocess(sent)
    assert np.array_equal(positions, their_positions)
    assert np.abs(patches - theirs).mean() < 1.5 / 255, "JPEG at this quality alone: 0.75"
