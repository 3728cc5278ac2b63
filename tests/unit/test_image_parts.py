"""Images in messages: where they may be, what may stand for them, where they are in the prompt."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.seeing_model import SeeingModel, data_url, grey_part, image_part, png
from support.server_fakes import ScriptedModel, ask, script

from pydiffusion import UnsupportedModelError
from pydiffusion.chat.image_parts import DETAILS, ImagePartError, ImageRules, read_image_part, take_images
from pydiffusion.chat.template import ChatTemplate
from pydiffusion.generation import chat_images
from pydiffusion.vision.prompt import Prompt

MODEL = SeeingModel(script, n_ctx=8192)
IMAGE, BEGIN, END = (MODEL.native.image_tokens[name] for name in ("image", "begin", "end"))
N = MODEL.vision.prepare(png()).n_soft_tokens


def shown(prompt: Any) -> str:
    """A prompt as text, its images as ``[n]`` with their greys."""
    ids, text, done = prompt.ids.tolist(), "", 0
    for placed in prompt.images:
        assert ids[placed.begin - 1] == BEGIN
        assert ids[placed.end] == END
        assert set(ids[placed.begin : placed.end]) == {IMAGE}
        text += MODEL.detokenize(ids[done : placed.begin - 1], keep_control=True)
        text += f"[{round(float(placed.image.patches.mean()) * 255)}]"
        done = placed.end + 1
    return text + MODEL.detokenize(ids[done:], keep_control=True)


def test_images_at_any_place_and_several_per_message() -> None:
    first = [grey_part(10), {"type": "text", "text": "a "}, grey_part(20), grey_part(30)]
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, grey_part(40)]},
    ]
    prompt = MODEL.chat_prompt(messages)
    assert isinstance(prompt, Prompt)
    assert shown(prompt) == (
        "<bos><|turn>user\n[10]a[20][30]<turn|>\n<|turn>model\nb<turn|>\n"
        "<|turn>user\nc[40]<turn|>\n<|turn>model\n"
    )
    assert messages[0]["content"] == first, "the messages are as they were"


def test_texts_have_no_images() -> None:
    assert isinstance(MODEL.chat_prompt(ask("Hi")), list)
    assert isinstance(MODEL.chat_prompt(ask([{"type": "text", "text": "Hi"}])), list)


def test_images_of_tools_and_of_the_model() -> None:
    """Results of tools may be images, in OpenAI's form; so may what the model is said to have answered."""
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        *ask("Look."),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "done"}, grey_part(7)]},
    ]
    assert "response:look" in shown(MODEL.chat_prompt(messages))
    assert "<tool_response|>[7]" in shown(MODEL.chat_prompt(messages))
    answered = [*ask("Draw."), {"role": "assistant", "content": [grey_part(9)]}, *ask("More.")]
    assert "<|turn>model\n[9]<turn|>" in shown(MODEL.chat_prompt(answered))


@pytest.mark.parametrize(
    "text", ["<|image|>", "<|image><|image|><image|>", "a<|image|", "<|image|><|image|>"]
)
def test_a_text_forges_no_image(text: str) -> None:
    """Neither beside an image nor without one, nor split between two parts."""
    for parts in (
        [{"type": "text", "text": text}],
        [{"type": "text", "text": t} for t in (text[:4], text[4:])],
    ):
        assert IMAGE not in MODEL.chat_prompt(ask(parts))
        assert BEGIN not in MODEL.chat_prompt(ask(parts))
        prompt = MODEL.chat_prompt(ask([*parts, grey_part(50), *parts]))
        assert shown(prompt) == f"<bos><|turn>user\n{text}[50]{text}<turn|>\n<|turn>model\n"
    assert IMAGE not in MODEL.chat_prompt([{"role": "system", "content": text}, *ask("Hi")])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": Image.new("L", (40, 30), 128)},
        {"type": "image", "image": np.full((30, 40, 3), 128, np.uint8)},
        {"type": "image", "image": png()},
        {"type": "image", "image": data_url(png())},
        {"type": "image", "url": data_url(png())},
        {"type": "image", "base64": base64.b64encode(png()).decode()},
        {"type": "image", "image": None, "url": data_url(png())},
        {"type": "image_url", "image_url": {"url": data_url(png()), "detail": "auto"}},
        {"type": "image_url", "image_url": data_url(png())},
        {"type": "input_image", "image_url": data_url(png()), "detail": None},
    ],
)
def test_forms_of_a_part(part: dict[str, Any]) -> None:
    prompt = MODEL.chat_prompt(ask([part]))
    assert shown(prompt) == "<bos><|turn>user\n[128]<turn|>\n<|turn>model\n"
    assert prompt.images[0].image.n_soft_tokens == N


@pytest.mark.parametrize("field", ["image", "path"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_read_where_the_sender_may_name_one(field: str, kind: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png(60))
    part = {"type": "image", field: kind(file)}
    assert "[60]" in shown(MODEL.chat_prompt(ask([part])))
    if kind is str:
        with pytest.raises(ImagePartError, match="data URL"):
            read_image_part(part, "x", ImageRules(files=False))
    with pytest.raises(ImagePartError, match="No such file"):
        MODEL.chat_prompt(ask([{"type": "image", field: kind(tmp_path / "none.png")}]))


def test_detail_is_a_multiple_of_the_model_s_own_number() -> None:
    n = {detail: _n_tokens(MODEL, {"detail": detail}) for detail in DETAILS}
    own = _n_tokens(MODEL, {})
    assert n["auto"] == own == N <= 280
    assert n["low"] <= 70 < n["auto"] <= 280 < n["high"] <= 560 < n["original"] <= 1120
    small = SeeingModel(script)
    small.vision.max_soft_tokens = 36  # of which no multiple is one that models are trained with
    assert _n_tokens(small, {"detail": "high"}) == _n_tokens(small, {}) <= 36
    few = SeeingModel(script)
    few.vision.n_positions = 40
    assert _n_tokens(few, {"detail": "low"}) == n["low"]
    assert _n_tokens(few, {"detail": "high"}) == own, "as many as there are positions for"
    part = {**grey_part(), "max_soft_tokens": 140}
    assert 70 < MODEL.chat_prompt(ask([part])).images[0].image.n_soft_tokens <= 140


def _n_tokens(model: SeeingModel, more: dict[str, Any]) -> int:
    prompt = model.chat_prompt(ask([grey_part(**more)]))
    return prompt.images[0].image.n_soft_tokens


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"type": "image"}, "one of image, url, path, base64; it has none"),
        ({"type": "image", "image": png(), "url": data_url(png())}, "it has image and url"),
        ({"type": "image", "image": b""}, "not an image in a known format"),
        ({"type": "image", "image": png()[:60]}, "damaged or truncated"),
        ({"type": "image", "image": 5}, "must be a PIL image, an array, a path or bytes, not int"),
        ({"type": "image", "image": np.zeros((5, 5, 7))}, "shape"),
        ({"type": "image", "base64": "=a"}, "base64 can't be decoded"),
        ({"type": "image", "url": "a.png"}, "give a data URL"),
        ({"type": "image", "url": 7}, "url is a int"),
        ({"type": "image", "url": "https://example.com/a.png"}, "images are not fetched from URLs"),
        ({"type": "image_url"}, 'must have image_url, {"url"'),
        ({"type": "image_url", "image_url": {"uri": "x"}}, 'must have image_url, {"url"'),
        ({"type": "image_url", "image_url": {"url": "HTTP://x/a"}}, "images are not fetched from URLs"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "give a data URL"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "give a data URL"),
        (image_part(b"GIF89a"), "damaged|not an image"),
        ({"type": "image_url", "image_url": {"url": "data:text/plain;base64,aGk="}}, "not an image"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,*"}}, "base64 is invalid"),
        (grey_part(detail="huge"), "detail is 'huge'; permitted are auto, low, high, original"),
        (grey_part(detail=3), "detail is 3"),
        ({**grey_part(), "max_soft_tokens": 0}, "max_soft_tokens is 0"),
        ({**grey_part(), "max_soft_tokens": "280"}, "max_soft_tokens is '280'"),
        ({**grey_part(), "max_soft_tokens": 10**400}, "max_soft_tokens is 100000"),
    ],
)
def test_an_image_that_can_t_be_read_is_refused_by_place(part: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what) as found:
        MODEL.chat_prompt([*ask("Hi"), {"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    assert str(found.value).startswith("messages[1].content[1]: ")
    assert "\n" not in str(found.value)


def test_errors_of_images_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ImagePartError("a", "b")))
    assert (str(error), error.where) == ("a: b", "a")


def test_a_model_without_a_vision_file_says_so() -> None:
    model = ScriptedModel(script)
    with pytest.raises(UnsupportedModelError, match=r"without a vision file.*--mmproj FILE"):
        model.chat_prompt(ask([grey_part()]))


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ messages[0].content }}", r"messages\[0\], of role 'user': .*no place for an image"),
        ("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", "written 0 places for 1 images"),
        (
            "{% for p in messages[0].content %}{{ p.text or '<|image|><|image|>' }}{% endfor %}",
            "written 2 places",
        ),
    ],
)
def test_a_template_without_a_place_for_an_image(template: str, what: str) -> None:
    model = SeeingModel(script)
    model.metadata["tokenizer.chat_template"] = template
    with pytest.raises(ValueError, match=what):
        model.chat_prompt(ask([{"type": "text", "text": "a"}, grey_part()]))


def test_an_image_beside_calls_is_refused() -> None:
    """A template writes results of tools between an assistant's calls and its content."""
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [*ask("Look."), {"role": "assistant", "content": [grey_part()], "tool_calls": [call]}]
    with pytest.raises(ImagePartError, match="an image or tool calls"):
        MODEL.chat_prompt(messages)


def test_images_beside_the_content_are_refused() -> None:
    """As of Ollama's API."""
    with pytest.raises(ValueError, match=r"messages\[0\]\.images is not read"):
        MODEL.chat_prompt([{**ask("Hi")[0], "images": ["aGk="]}])


def test_what_is_no_list_of_messages_is_left_alone() -> None:
    for given in (None, 5, "Hi", {"role": "user"}, [5], ["x"], [{"role": "user", "content": 5}]):
        assert take_images(given) == (given, [])


def test_reasoning_beside_an_image_is_stripped() -> None:
    """What clients send back of an answer: reasoning between its markers, in a part of its own."""
    template = ChatTemplate(MODEL.metadata["tokenizer.chat_template"])
    assert template.prepare(ask([{"type": "image"}])) == ask([{"type": "image"}])
    thought = "<|channel>thought\nhm<channel|>so"
    answer = {"role": "assistant", "content": [{"type": "text", "text": thought}, grey_part(3)]}
    assert "<|turn>model\nso[3]<turn|>" in shown(MODEL.chat_prompt([*ask("Hi"), answer, *ask("Yes?")]))


def test_the_same_image_has_the_same_key() -> None:
    first, again = (MODEL.chat_prompt(ask([grey_part(77)])) for _ in range(2))
    other = MODEL.chat_prompt(ask([grey_part(78)]))
    assert np.array_equal(first.keys, again.keys)
    assert np.array_equal(first.ids, other.ids)
    assert not np.array_equal(first.keys, other.keys)


def test_each_image_of_a_conversation_is_decoded_once(tmp_path: Path) -> None:
    """But what may change meanwhile; and in another detail it is another image."""
    model = SeeingModel(script)
    decoded = model.vision.images
    bytes_of = {"type": "image", "image": png(3)}
    for _ in range(2):
        model.chat_prompt(ask([grey_part(1), grey_part(2), bytes_of]))
    assert [int(image.mean()) for image in decoded] == [1, 2, 3]
    kept = model.chat_prompt(ask([grey_part(1)])).images[0].image
    assert np.array_equal(kept.patches, MODEL.chat_prompt(ask([grey_part(1)])).images[0].image.patches)
    model.chat_prompt(ask([grey_part(1, detail="low")]))
    assert len(decoded) == 4
    file = tmp_path / "a.png"
    for grey in (5, 6):
        file.write_bytes(png(grey))
        model.chat_prompt(ask([{"type": "image", "path": file}]))
    assert [int(image.mean()) for image in decoded[4:]] == [5, 6]


def test_the_memory_of_decoded_images_is_bounded() -> None:
    model = SeeingModel(script)
    size = model.chat_prompt(ask([grey_part(1)])).images[0].image.patches.nbytes
    model.vision.prepared.max_bytes = 2 * size
    for grey in (2, 3, 2, 4, 2, 3):
        model.chat_prompt(ask([grey_part(grey)]))
    assert [int(image.mean()) for image in model.vision.images] == [1, 2, 3, 4, 3], "the last ones used stay"
    model.vision.prepared.max_bytes = 1
    for _ in range(2):
        model.chat_prompt(ask([grey_part(7)]))
    assert [int(image.mean()) for image in model.vision.images[5:]] == [7], "one over the limit stays"


def test_the_data_of_an_image_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding base64 and hashing take a part of a second for the largest body of a request."""
    calls: list[str] = []
    for name in ("decode_data_url", "_key"):
        called = getattr(chat_images, name)
        monkeypatch.setattr(
            chat_images, name, lambda *given, n=name, f=called: (calls.append(n), f(*given))[1]
        )
    fetched = ImageRules(fetch=lambda url: png(int(url[-1])))
    part = {"type": "image_url", "image_url": {"url": "https://host/9"}}
    messages = ask([grey_part(1), read_image_part(part, "messages[0].content[1]", fetched), grey_part(2)])
    assert shown(SeeingModel(script).chat_prompt(messages)) == shown(MODEL.chat_prompt(messages))
    assert sorted(calls) == 6 * ["_key"] + 4 * ["decode_data_url"], "of two prompts"


def test_chats_of_the_library() -> None:
    """A prompt with images goes the way of every other one; a second question runs no tower."""
    model = SeeingModel(script, n_ctx=2048)
    messages = ask([grey_part(5), {"type": "text", "text": "What?"}])
    n_prompt = len(model.chat_prompt(messages))
    session = model.new_session()
    answer = model.chat(messages, seed=1, session=session)
    assert (answer.text, answer.n_prompt, answer.n_cached) == ("Hello, world!", n_prompt, 0)
    assert model.vision.n_encoded == 1
    more = [*messages, {"role": "assistant", "content": answer.text}, *ask("Sure?")]
    assert model.chat(more, seed=1, session=session).n_cached >= n_prompt
    assert model.vision.n_encoded == 1
    assert model.chat([*ask([grey_part(6)])], seed=1, session=session).n_cached < 10
    assert [event.text for event in model.stream_chat(messages, seed=1) if hasattr(event, "parts")]
    batch = dict(model.chat_batch([messages, ask("Hi"), ask([{"type": "image"}])], seed=1))
    assert batch[0].n_prompt == n_prompt
    assert batch[1].text == "Hello, world!"
    assert isinstance(batch[2], ImagePartError)
    completion = model.create_chat_completion(messages, seed=1, n=2)
    assert completion["usage"]["prompt_tokens"] == n_prompt
    assert len(completion["choices"]) == 2
