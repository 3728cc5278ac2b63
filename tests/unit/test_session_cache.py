"""A session's cache: truncating without encoding again, forks, and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pydiffusion import ContextOverflowError, DiffusionModel, GenerationCancelled, ModelFormatError, Session


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> DiffusionModel:
    """Window 16, canvas 8; cache float32, so that equal means equal to the bit."""
    path = gguf_file("small", "f32", seed=0, dtype="f32")
    return DiffusionModel(path, n_ctx=1024, n_threads=1, kv_type="f32")


def prompt(model: DiffusionModel, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.n_vocab, n).astype(np.int32)


def logits(session: Session) -> np.ndarray:
    canvas = np.arange(session.model.canvas_length, dtype=np.int32)
    return session.denoise(canvas)


def test_truncating_to_the_prompt_encodes_nothing(model: DiffusionModel) -> None:
    """The sliding layers wrapped many times during the answer; truncating to the prompt encodes nothing."""
    ids = prompt(model, 100)
    session = model.new_session()
    session.encode(ids)
    expected = logits(session)
    for _ in session.generate(max_tokens=900, steps=1, eos=[], seed=0):
        pass
    assert session.n_past > 800
    n_encoded = session.n_encoded
    session.truncate(100)
    assert session.n_encoded == n_encoded and session.n_past == 100
    np.testing.assert_array_equal(logits(session), expected)
    session.truncate(90)  # a little before the prompt's end is fine too
    fresh = model.new_session()
    fresh.encode(ids[:90])
    assert session.n_encoded == n_encoded
    np.testing.assert_array_equal(logits(session), logits(fresh))


def test_truncating_further_encodes_again(model: DiffusionModel) -> None:
    ids = prompt(model, 700)
    session = model.new_session()
    session.encode(ids[:600])
    session.encode(ids[600:])
    session.truncate(20)
    fresh = model.new_session()
    fresh.encode(ids[:20])
    assert session.n_encoded == 720
    np.testing.assert_array_equal(logits(session), logits(fresh))


def test_snapshots_do_not_outlive_their_tokens(model: DiffusionModel) -> None:
    """A snapshot must not outlive the tokens it was taken from."""
    ids, other = prompt(model, 60), prompt(model, 900, seed=1)
    session = model.new_session()
    session.encode(ids)
    for _ in session.generate(max_tokens=800, steps=1, eos=[], seed=1):
        pass
    session.truncate(40)
    session.encode(other)
    session.truncate(60)
    fresh = model.new_session()
    fresh.encode(np.concatenate([ids[:40], other[:20]]))
    np.testing.assert_array_equal(logits(session), logits(fresh))


@pytest.mark.parametrize("n", [0, 5, 15, 16, 300, 1000])
def test_a_fork_is_independent(model: DiffusionModel, n: int) -> None:
    ids = prompt(model, n)
    session = model.new_session()
    session.encode(ids)
    fork = session.fork()
    assert fork.n_encoded == 0 and fork.tokens.tolist() == ids.tolist()
    np.testing.assert_array_equal(logits(fork), logits(session))
    fork.encode(prompt(model, 9, seed=2))
    assert session.n_past == n
    fresh = model.new_session()
    fresh.encode(np.concatenate([ids, prompt(model, 9, seed=2)]))
    np.testing.assert_array_equal(logits(fork), logits(fresh))


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("device", ["cpu", "host"])
def test_a_copy_has_the_bits_of_a_fresh_encode(
    gguf_file: Callable[..., Path], kv_type: str, device: str
) -> None:
    """Between sessions of different n_ctx, whose buffers differ in size; the window has slid."""
    path = gguf_file("wide", "f32", seed=0, dtype="f32")  # heads are whole blocks of q8_0
    model = DiffusionModel(path, n_threads=1, kv_type=kv_type, device=device)
    for n in (7, 300):
        ids, more = prompt(model, n), prompt(model, 40, seed=3)
        source, fresh = model.new_session(512), model.new_session(512)
        for session in (source, fresh):
            session.encode(ids)
        copy = model.new_session(400)
        copy.encode(prompt(model, 200, seed=2))
        copy.copy(source)
        assert copy.tokens.tolist() == ids.tolist()
        assert rows(copy) == rows(fresh)
        np.testing.assert_array_equal(logits(copy), logits(fresh))
        for session in (copy, fresh):
            session.encode(more)
        assert rows(copy) == rows(fresh)
        np.testing.assert_array_equal(logits(copy), logits(fresh))
        assert source.tokens.tolist() == ids.tolist()


def rows(session: Session) -> list[bytes]:
    return [array.tobytes() for layer in session.native.cache_rows() for array in layer]


def test_a_copy_that_does_not_fit_changes_nothing(model: DiffusionModel) -> None:
    source, small = model.new_session(512), model.new_session(64)
    source.encode(prompt(model, 65))
    small.encode(prompt(model, 20, seed=1))
    before = logits(small)
    events = source.generate(max_tokens=64, steps=4, eos=[], seed=0)
    next(events)
    with pytest.raises(ContextOverflowError, match="65 tokens, but this session's context is 64"):
        small.copy(source)
    assert small.n_past == 20
    np.testing.assert_array_equal(logits(small), before)
    assert sum(1 for _ in events) > 4  # the source's generation continues


def test_a_session_can_be_copied_to_itself(model: DiffusionModel) -> None:
    session = model.new_session()
    session.encode(prompt(model, 300))
    before = logits(session)
    events = session.generate(max_tokens=64, steps=4, eos=[], seed=0)
    next(events)
    session.copy(session)
    assert sum(1 for _ in events) > 4  # nothing happened
    session.truncate(300)
    np.testing.assert_array_equal(logits(session), before)


def test_a_copy_of_another_cache_type_is_refused(model: DiffusionModel) -> None:
    half = DiffusionModel(model.path, n_threads=1, kv_type="f16").new_session()
    half.encode(prompt(model, 20))
    session = model.new_session()
    session.encode(prompt(model, 10))
    with pytest.raises(ValueError, match="another model or type"):
        session.copy(half)
    assert session.n_past == 10


def test_a_cancelled_session_can_be_copied(model: DiffusionModel) -> None:
    """The cancellation is the source's: the copy goes on, and the source's next call raises."""
    source, copy = model.new_session(), model.new_session()
    source.encode(prompt(model, 20))
    source.cancel()
    copy.copy(source)
    np.testing.assert_array_equal(copy.tokens, source.tokens)
    logits(copy)
    with pytest.raises(GenerationCancelled):
        logits(source)


def test_a_saved_session_can_be_loaded(model: DiffusionModel, tmp_path: Path) -> None:
    session = model.new_session()
    session.encode(prompt(model, 77))
    path = tmp_path / "session.safetensors"
    session.save(path)
    loaded = model.load_session(path)
    assert loaded.tokens.tolist() == session.tokens.tolist() and loaded.n_encoded == 0
    np.testing.assert_array_equal(logits(loaded), logits(session))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_session_of_another_model_is_refused(
    model: DiffusionModel, gguf_file: Callable[..., Path], tmp_path: Path
) -> None:
    session = model.new_session()
    session.encode(prompt(model, 20))
    path = tmp_path / "session.safetensors"
    session.save(path)
    other = DiffusionModel(gguf_file("small", "f32", seed=1, dtype="f32"), n_threads=1, kv_type="f32")
    with pytest.raises(ModelFormatError, match="another model"):
        other.load_session(path)
    half = DiffusionModel(model.path, n_threads=1, kv_type="f16")
    with pytest.raises(ModelFormatError, match="cache type"):
        half.load_session(path)


def test_broken_session_files_are_refused(model: DiffusionModel, tmp_path: Path) -> None:
    session = model.new_session()
    session.encode(prompt(model, 20))
    path = tmp_path / "session.safetensors"
    session.save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    cases = [b"", whole[:7], whole[:100], whole[: len(whole) // 2], whole + b"x", bytes(len(whole))]
    for _ in range(200):
        broken = bytearray(whole)
        broken[rng.integers(0, header)] ^= 1 << rng.integers(0, 8)
        cases.append(bytes(broken))
    refused = 0
    for case in cases:
        path.write_bytes(case)
        try:
            model.load_session(path)
        except ModelFormatError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 180  # the rest are the header's padding and the order of its keys
    with pytest.raises(FileNotFoundError):
        model.load_session(tmp_path / "missing")


def test_a_session_of_an_older_format_is_refused(model: DiffusionModel, tmp_path: Path) -> None:
    """Its sliding layers held fewer rows: the error names the version, and the file is never misread."""
    session = model.new_session()
    session.encode(prompt(model, 20))
    path = tmp_path / "session.safetensors"
    session.save(path)
    path.write_bytes(path.read_bytes().replace(b"pydiffusion-session-2", b"pydiffusion-session-1"))
    with pytest.raises(ModelFormatError, match="is not a session file of this version"):
        model.load_session(path)


def test_arrays_of_types_that_numpy_lacks_are_refused(model: DiffusionModel, tmp_path: Path) -> None:
    """Found by fuzzing: such a type raised an AttributeError in the safetensors library."""
    session = model.new_session()
    session.encode(prompt(model, 20))
    path = tmp_path / "session.safetensors"
    session.save(path)
    whole = path.read_bytes()
    for dtype in (b'"F8_E4M3"', b'"I8"'):
        _retyped(path, whole, dtype)
        with pytest.raises(ModelFormatError, match="is of type"):
            model.load_session(path)


def _retyped(path: Path, whole: bytes, dtype: bytes) -> None:
    """The file with its first array of bytes called another type."""
    n = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + n].replace(b'"U8"', dtype, 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + n :])
