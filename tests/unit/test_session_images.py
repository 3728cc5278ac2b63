"""Sessions with images: prefixes, truncating, copies, files, batches. The tower is a stand-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_vision import give_vision, noise
from support.image_prompts import BEGIN, END, IMAGE

from pydiffusion import ContextOverflowError, DiffusionModel, Session, UnsupportedModelError
from pydiffusion.generation.image_prompt import session_keys
from pydiffusion.server.pool import SessionPool
from pydiffusion.vision.prompt import Prompt, as_prompt
from pydiffusion.vision.tower import VisionTower

pytestmark = pytest.mark.filterwarnings("ignore::pydiffusion.PromptWarning")


@pytest.fixture(scope="module")
def path(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("small", "f32", seed=0, dtype="f32")


@pytest.fixture(scope="module")
def plain_model(path: Path) -> DiffusionModel:
    return DiffusionModel(path, n_ctx=1024, n_threads=1, kv_type="f32", mmproj=None)


@pytest.fixture
def model(plain_model: DiffusionModel) -> Iterator[DiffusionModel]:
    """Window 16, canvas 8; cache float32, so that equal means equal to the bit."""
    yield plain_model
    plain_model._vision.tower = None


@pytest.fixture
def tower(model: DiffusionModel) -> VisionTower:
    return give_vision(model)


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(13, 512, n).tolist()


def state(session: Session) -> tuple[list[int], list[tuple[int, int, bytes]], list[bytes], bytes]:
    """Tokens, images, cache and the logits of a canvas: equal for equal content."""
    rows = [array.tobytes() for layer in session.native.cache_rows() for array in layer]
    canvas = np.arange(13, 13 + session.model.canvas_length, dtype=np.int32)
    return session.tokens.tolist(), session.native.images, rows, session.denoise(canvas).tobytes()


def encoded(model: DiffusionModel, prompt: Any) -> Session:
    session = model.new_session()
    session.encode(prompt)
    return session


def with_little_room(model: DiffusionModel) -> Session:
    """A session as of a model without a tower: it soon has to encode again to go back."""
    tower, model._vision.tower = model._vision.tower, None
    session = model.new_session()
    model._vision.tower = tower
    return session


def n_soft(tower: VisionTower, image: Any) -> int:
    return tower.prepare(image).n_soft_tokens


def test_an_image_stands_for_its_tokens(model: DiffusionModel, tower: VisionTower) -> None:
    image = noise(0)
    n, before, after = n_soft(tower, image), text(5), text(7, 1)
    assert n == 24
    session = encoded(model, [*before, image, *after])
    assert session.tokens.tolist() == [*before, BEGIN, *[IMAGE] * n, END, *after]
    prepared = tower.prepare(image)
    assert session.native.images == [(6, n, prepared.key)]
    np.testing.assert_array_equal(session.native.image_features(0), tower.features(prepared))
    by_hand = model.new_session()
    features = tower.features(prepared)
    by_hand.native.encode(session.tokens, images=[(6, features, prepared.key)])
    assert state(by_hand) == state(session)
    others = encoded(model, [*before, noise(1), *after])
    assert others.tokens.tolist() == session.tokens.tolist() and state(others) != state(session)


def test_a_second_question_encodes_no_image(model: DiffusionModel, tower: VisionTower) -> None:
    image, intro = noise(0), text(9)
    session = model.new_session()
    session.prefill([*intro, image, *text(6, 1)])
    assert tower.n_encoded == 1
    n_encoded = session.n_encoded
    n_cached = session.prefill([*intro, image, *text(5, 2)])
    assert n_cached >= len(intro) + 26 and session.n_encoded - n_encoded == len(session.tokens) - n_cached
    other = model.new_session()
    other.prefill([*intro, image, *text(5, 2)])
    assert tower.n_encoded == 1
    assert state(other) == state(session)


@pytest.mark.parametrize("n_before", [0, 3, 90])
def test_another_image_is_encoded_from_its_beginning(
    n_before: int, model: DiffusionModel, tower: VisionTower
) -> None:
    before, after = text(n_before), text(60, 1)
    session = encoded(model, [*before, noise(0), *after])
    wanted = [*before, noise(1), *after]
    assert session.prefill(wanted) == n_before + 1  # the begin token is the same
    assert state(session) == state(encoded(model, wanted))


def test_images_of_another_size_and_text_in_their_places(model: DiffusionModel, tower: VisionTower) -> None:
    wide, tall = noise(0, 20, 20), noise(0, 12, 36)
    assert n_soft(tower, wide) != 24
    session = encoded(model, [*text(4), wide, *text(4, 1)])
    assert session.prefill([*text(4), noise(2), *text(4, 1)]) == 5
    assert session.prefill([*text(4), *text(3, 2)]) == 4
    assert session.prefill([*text(4), tall, wide]) == 4
    assert state(session) == state(encoded(model, [*text(4), tall, wide]))


def test_keep_by_the_sessions_own_tokens(model: DiffusionModel, tower: VisionTower) -> None:
    prompt = [*text(4), noise(0), *text(5, 1), noise(1), *text(6, 2)]
    session = encoded(model, prompt)
    before, n_past = state(session), session.n_past
    assert session.keep(session.tokens) == n_past and state(session) == before
    n_encoded = session.n_encoded
    assert session.prefill([*session.tokens.tolist(), 20, 21]) == n_past
    assert session.n_encoded == n_encoded + 2
    second = session.native.images[1][0]
    assert session.keep(session.tokens[: second + 3]) == second  # within the image
    assert [begin for begin, _, _ in session.native.images] == [5]
    assert session.prefill(prompt) == second
    assert state(session) == before


def test_truncating_into_an_image_changes_nothing(model: DiffusionModel, tower: VisionTower) -> None:
    session = encoded(model, [*text(4), noise(0), *text(60, 1)])
    before = state(session)
    for n in range(6, 29):
        with pytest.raises(ValueError, match="at 5 to 28: truncate to 5, before it, or to 29, after it"):
            session.truncate(n)
    assert state(session) == before
    for n in (29, 5, 3):
        session.truncate(n)
        whole = [*text(4), noise(0)]
        expected = {29: whole, 5: [*text(4), BEGIN], 3: text(4)[:3]}[n]
        fresh = encoded(model, expected)
        fresh.truncate(n)
        assert state(session) == state(fresh)


def test_truncating_behind_the_window_uses_the_sessions_features(
    model: DiffusionModel, tower: VisionTower
) -> None:
    """The tower is closed by then."""
    start = [*text(4), noise(0), *text(3, 1), noise(1), *text(9, 2)]
    expected = state(encoded(model, start))
    session = with_little_room(model)
    session.encode(start)
    n_start = session.n_past
    for seed in range(3):
        session.encode(text(300, 10 + seed))
    tower.close()
    n_encoded = session.n_encoded
    session.truncate(n_start)
    assert session.n_encoded == n_encoded + n_start
    assert state(session) == expected


def test_forks_copies_and_files_keep_images(
    model: DiffusionModel, tower: VisionTower, tmp_path: Path
) -> None:
    start = [*text(4), noise(0), *text(3, 1), noise(1), *text(9, 2)]
    expected = state(encoded(model, start))
    session = encoded(model, start)
    n_start = session.n_past
    session.encode(text(700, 3))
    file = tmp_path / "session.safetensors"
    session.save(file)
    copy = with_little_room(model)
    copy.encode([noise(3), *text(5)])
    copy.copy(session)
    fork, loaded = session.fork(), model.load_session(file)
    model._vision.tower = None
    loaded_without_tower = model.load_session(file)
    for other in (fork, copy, loaded, loaded_without_tower):
        assert state(other) == state(session)
        for i in range(2):
            features = other.native.image_features(i)
            np.testing.assert_array_equal(features, session.native.image_features(i))
        other.truncate(n_start)
        assert state(other) == expected
    assert copy.n_encoded == 31 + n_start and loaded_without_tower.n_encoded == n_start


def test_files_without_images_are_of_the_older_format(
    model: DiffusionModel, tower: VisionTower, tmp_path: Path
) -> None:
    """Versions that know no images read the one, and refuse the other."""
    file = tmp_path / "session.safetensors"
    encoded(model, text(9)).save(file)
    assert b"pydiffusion-session-2" in file.read_bytes()
    encoded(model, [*text(9), noise(0)]).save(file)
    assert b"pydiffusion-session-3" in file.read_bytes() and b"session-2" not in file.read_bytes()


def test_image_tokens_without_an_image(model: DiffusionModel) -> None:
    ids = [*text(4), BEGIN, IMAGE, IMAGE, END, *text(4, 1)]
    plain = encoded(model, ids)  # without a tower: tokens like others
    assert plain.native.images == [] and plain.keep(ids) == len(ids)
    tower = give_vision(model)
    session = encoded(model, [*text(4), noise(0)])
    before = state(session)
    for call in (session.encode, session.prefill):
        with pytest.raises(ValueError, match="token 5 of the prompt is the image token"):
            call(ids)
    with pytest.raises(ValueError, match="image token"):
        model.generate(ids)
    assert state(session) == before and tower.n_encoded == 1


def test_a_model_without_vision_says_what_to_do(model: DiffusionModel) -> None:
    session = encoded(model, text(4))
    for call in (session.encode, session.prefill, session.keep, model.generate):
        with pytest.raises(UnsupportedModelError, match="mmproj"):
            call([*text(4), noise(0)])
    assert session.n_past == 4


def test_what_does_not_fit_runs_no_tower(model: DiffusionModel, tower: VisionTower) -> None:
    session = encoded(model, text(1000))
    with pytest.raises(ContextOverflowError, match="29 tokens after 1000"):
        session.encode([noise(0), 20, 21, 22])
    assert session.n_past == 1000 and tower.n_encoded == 0


def test_interrupted_encoding_keeps_tokens_and_images_in_step(
    model: DiffusionModel, tower: VisionTower
) -> None:
    prompt = [*text(450), noise(0), *text(30, 1), noise(1), *text(100, 2), noise(2), *text(9, 3)]
    session = model.new_session()

    def interrupt(done: int, total: int) -> None:
        raise InterruptedError

    n_chunks = 0
    while session.n_past < len(as_prompt(prompt, model.native.image_tokens, tower.prepare)):
        n_chunks += 1
        with pytest.raises(InterruptedError):
            session.prefill(prompt, progress=interrupt)
        ends = [begin + n for begin, n, _ in session.native.images]
        assert (session.tokens == IMAGE).sum() == 24 * len(ends) and max(ends, default=0) <= session.n_past
    assert n_chunks == 2
    assert state(session) == state(encoded(model, prompt))


def test_a_batch_gives_what_each_prompt_gives_alone(model: DiffusionModel, tower: VisionTower) -> None:
    """Prompts come in parts of 512 tokens there, none of which cuts an image."""
    prompts: list[Any] = [
        [*text(6), noise(0), *text(5, 1)],
        text(20),
        [*text(500), noise(1), *text(9, 1), noise(2), *text(30, 2)],
        as_prompt([noise(0), *text(5, 1)], model.native.image_tokens, tower.prepare),
    ]
    options = {"max_tokens": 16, "steps": 4, "seed": 3, "eos": []}
    alone = [model.generate(prompt, **options).tokens.tolist() for prompt in prompts]
    found = dict(model.generate_batch(prompts, n_parallel=3, **options))
    assert [found[i].tokens.tolist() for i in range(4)] == alone
    assert tower.n_encoded == 3


def test_the_pool_knows_images_apart(model: DiffusionModel, tower: VisionTower) -> None:
    pool = SessionPool(model, 2)
    prompts = [[*text(4), noise(seed), *text(4, 1)] for seed in range(2)]
    read: list[Prompt] = [as_prompt(p, model.native.image_tokens, tower.prepare) for p in prompts]
    sessions = [pool.take(prompt) for prompt in read]
    for session, prompt in zip(sessions, read, strict=True):
        session.prefill(prompt)
        pool.give_back(session)
    for i in (1, 0, 1):
        session = pool.take(read[i])
        assert session is sessions[i]
        np.testing.assert_array_equal(session_keys(session), read[i].keys)
        pool.give_back(session)


def test_images_the_native_session_refuses(model: DiffusionModel) -> None:
    session = model.new_session()
    ids = np.array([13, BEGIN, IMAGE, IMAGE, END, 14, IMAGE], np.int32)
    features = np.ones((2, 256), np.float32)
    bad = features.copy()
    bad[1, 3] = np.nan
    cases: list[tuple[list[Any], str]] = [
        ([(2, np.ones((2, 255), np.float32), b"")], "needs \\(n, 256\\)"),
        ([(-1, features, b"")], "not within"),
        ([(6, features, b"")], "not within"),
        ([(2**40, features, b"")], "not within"),
        ([(2, features[:0], b"")], "not within"),
        ([(1, features, b"")], "its tokens must be 12"),
        ([(2, features, b""), (3, features[:1], b"")], "not overlap"),
        ([(6, features[:1], b""), (2, features, b"")], "in order"),
        ([(2, bad, b"")], "not finite"),
    ]
    for images, why in cases:
        with pytest.raises(ValueError, match=why):
            session.native.encode(ids, images=images)
    long = np.full(900, IMAGE, np.int32)
    with pytest.raises(ValueError, match="room for images of up to 5"):
        session.native.encode(long, images=[(0, np.ones((900, 256), np.float32), b"")])
    assert session.n_past == 0 and session.native.images == []
    with pytest.raises(ValueError, match="the session has 0 images"):
        session.native.image_features(0)
