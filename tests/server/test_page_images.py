"""Images on the chat page, in a real browser where one is installed."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import chromium
from support.server_fakes import ScriptedModel, script, serving

Image = pytest.importorskip("PIL.Image")

# Between page and server: the model reads images, and a question reaches it as text.
READS_IMAGES = """
window.sent = [];
const real = window.fetch;
window.fetch = async (path, request) => {
  if (path === "v1/models") return new Response(JSON.stringify({data: [{vision: true}]}));
  const body = JSON.parse(await request.body.text());
  sent.push(body);
  const bare = body.messages?.map((m) => ({...m, content: textOf(m.content) || "images only"}));
  return real(path, {...request, body: JSON.stringify({...body, messages: bare})});
};
learn();
"""
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
def url() -> Iterator[str]:
    with serving(ScriptedModel(script), max_body=4_000_000) as (address, _):
        yield address


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    program = chromium.find()
    if program is None:
        pytest.skip("NOT CHECKED: the page in a browser; there is no chromium (set PYDIFFUSION_CHROMIUM)")
    opened = chromium.Browser(program, tmp_path_factory.mktemp("chromium"))
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def browser(opened: chromium.Browser, url: str) -> chromium.Browser:
    """The page, loaded anew."""
    opened.open(url + "/")
    opened.complaints.clear()
    opened.run(TRANSFER)
    opened.wait_for("reads === false")
    return opened


def png(colour: str, size: tuple[int, int] = (8, 6)) -> str:
    return base64.b64encode(encoded(Image.new("RGB", size, colour), "PNG")).decode()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def files(*colours: str) -> str:
    """Arguments of a drop or paste: PNG files called by their colours."""
    return json.dumps([[f"{colour}.png", "image/png", png(colour)] for colour in colours])


def thumbnails(browser: chromium.Browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('#attached img')].map((image) => image.alt)")


def send(browser: chromium.Browser, question: str) -> None:
    n = browser.run("log.querySelectorAll('article.assistant').length")
    browser.run(f"text.value = {question!r}; form.requestSubmit()")
    browser.wait_for(f"log.querySelectorAll('article.assistant').length === {n + 1} && running === null")


def decoded(url: str) -> Image.Image:
    head, _, data = url.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == f"data:{image.get_format_mimetype()}"
    return image


def test_attached_pasted_and_dropped(browser: chromium.Browser, tmp_path: Path) -> None:
    browser.run(READS_IMAGES)
    browser.wait_for("!document.getElementById('attach').hidden")
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
    content = browser.run("sent[0].messages.at(-1).content")
    assert [part["type"] for part in content] == ["image_url"] * 3 + ["text"]
    assert content[-1]["text"] == "What is it?"
    pixels = [decoded(part["image_url"]["url"]).getpixel((7, 5)) for part in content[:3]]
    assert pixels == [(255, 0, 0), (0, 128, 0), (0, 0, 0)]
    shown = "[...log.querySelectorAll('.user img')].map((image) => [image.alt, image.naturalWidth])"
    browser.wait_for(f"({shown}).every(([, width]) => width === 8)")
    assert [alt for alt, _ in browser.run(shown)] == ["red.png", "green.png", "black.png"]
    assert browser.run("document.querySelector('.user').textContent") == "What is it?"
    assert browser.run("log.querySelectorAll('.heat').length") == 1, "the answer can be replayed"

    # the next turn sends the same images once more, so that the server finds them in its cache
    send(browser, "And?")
    assert browser.run("sent[1].messages[0].content") == content
    assert browser.run("sent[1].messages.at(-1).content") == "And?"
    # nothing of it outlives the page
    stored = "[localStorage.length, Object.keys(sessionStorage).join(), document.cookie]"
    assert browser.run(stored) == [0, "", ""]
    assert browser.complaints == []


def test_an_image_alone_and_one_that_is_still_being_read(browser: chromium.Browser) -> None:
    browser.run(READS_IMAGES)
    browser.wait_for("reads")
    browser.run(f"drop({files('red')}); form.requestSubmit()")
    browser.wait_for("sent.length === 1 && running === null")
    assert [part["type"] for part in browser.run("sent[0].messages[0].content")] == ["image_url"]


def test_what_is_refused_is_said(browser: chromium.Browser) -> None:
    notice = "document.getElementById('notice').textContent"
    # by a model without vision: nothing to attach by, and no drop leaves the page
    assert browser.run("document.getElementById('attach').hidden")
    assert browser.run(f"drop({files('red')})")
    browser.wait_for(f"{notice} !== ''")
    assert "can't read images" in browser.run(notice) and "--mmproj" in browser.run(notice)
    assert thumbnails(browser) == []
    # text with a picture of it beside is text
    assert not browser.run(f"paste({files('red')}, 'a table')")

    browser.run(READS_IMAGES)
    browser.wait_for("reads")
    text = base64.b64encode(b"no image").decode()
    browser.run(f"drop([['a.png', 'image/png', '{text}'], ...{files('red')}])")
    browser.wait_for("document.querySelectorAll('#attached img').length === 1")
    assert browser.run(notice) == "a.png is not attached: this browser can't read it as an image."
    # infill
    browser.run("document.getElementById('infill').click(); text.value = 'a <|hole|>'; form.requestSubmit()")
    browser.wait_for(f"{notice}.startsWith('Infill reads text only')")
    assert browser.run("sent.length") == 0 and thumbnails(browser) == ["red.png"]
    # more than the server takes: said before it is sent, and all of it is there for another try
    browser.run("document.getElementById('infill').click()")
    browser.run("attached.put([{name: 'big.png', url: 'data:image/png;base64,' + 'A'.repeat(4e6)}])")
    send(browser, "Too much")
    error = browser.run("document.querySelector('article .error').textContent")
    assert error.startswith("This chat is 4.0 MB with all its images, and the server takes 4.0 MB")
    assert browser.run("sent.length") == 0 and browser.run("messages.length") == 0
    assert browser.run("text.value") == "Too much" and thumbnails(browser) == ["red.png", "big.png"]


def test_a_large_photograph_is_made_smaller(browser: chromium.Browser) -> None:
    """But not below what the server scales it to, in the same grid of patches, rotated as the file says."""
    np = pytest.importorskip("numpy")
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 45, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((3011, 2003), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = rng.integers(-8, 9, smooth.shape, dtype=np.int16)
    photograph = Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    file = encoded(photograph, "JPEG", quality=95, exif=exif.tobytes())
    assert len(file) > 1 << 20
    browser.run(READS_IMAGES)
    browser.wait_for("reads")
    browser.run(f"drop([['photo.jpg', 'image/jpeg', '{base64.b64encode(file).decode()}']])")
    browser.wait_for("attached.items.length === 1")
    sent = decoded(browser.run("attached.items[0].url"))
    upright = photograph.transpose(Image.Transpose.ROTATE_270)
    largest = 1120 * 48 * 48  # pixels that the server makes of any image
    assert sent.size[0] < upright.size[0] and largest <= sent.size[0] * sent.size[1] < 1.1 * largest
    vision = pytest.importorskip("pydiffusion.vision")
    patches, positions = vision.preprocess(upright)
    theirs, their_positions = vision.preprocess(sent)
    assert np.array_equal(positions, their_positions)
    assert np.abs(patches - theirs).mean() < 1.5 / 255, "JPEG at this quality alone: 0.75"
    assert np.abs(patches - theirs).mean() < 2 / 255
