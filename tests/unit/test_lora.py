"""Adapters in Python: of a model, of a session, of one call; switching, refusals. See test_lora_files.py."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.adapters_by_hand import (
    IDS,
    SHORT,
    fresh_logits,
    logits,
    merge,
    opened,
    random_adapter,
    shapes_of,
)

from pydiffusion import (
    AdapterError,
    CanvasEvent,
    DiffusionModel,
    EndEvent,
    GenerationOptions,
    ModelFormatError,
    OptionError,
    PyDiffusionError,
)
from pydiffusion.adapters.adapter import Adapter, Factors, Target

pytestmark = pytest.mark.filterwarnings("ignore::pydiffusion.PromptWarning")

FEW = ("attn_q", "ffn_down", "self_cond_up")


@pytest.fixture(scope="module")
def path(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("small", "f32", seed=0, dtype="f32")


@pytest.fixture(scope="module")
def one(path: Path) -> Adapter:
    return random_adapter(shapes_of(path), seed=1, kinds=FEW, name="random-1")


@pytest.fixture(scope="module")
def two(path: Path) -> Adapter:
    kinds = ("attn_v", "attn_output", "ffn_gate_up_exps", "ffn_gate_inp")
    return random_adapter(shapes_of(path), seed=2, kinds=kinds, side="encoder", name="random-2")


@pytest.fixture(scope="module")
def shared(path: Path) -> DiffusionModel:
    return opened(path)


@pytest.fixture
def model(shared: DiffusionModel) -> Iterator[DiffusionModel]:
    shared.set_lora([])
    yield shared
    shared.set_lora([])


@pytest.fixture(scope="module")
def plain(path: Path) -> np.ndarray:
    """Of a model that never had an adapter."""
    return fresh_logits(opened(path))


# Of a model


def test_applied_is_merged(path: Path, one: Adapter, model: DiffusionModel, plain: np.ndarray,
                           tmp_path: Path) -> None:  # fmt: skip
    merged = merge(path, [(one.scaled(), 0.75)], tmp_path / "merged.gguf")
    expected = fresh_logits(opened(merged))
    model.set_lora([(one, 0.75)])
    assert model.lora == ((one, 0.75),)
    found = fresh_logits(model)
    assert np.abs(expected - plain).mean() > 0.05
    assert np.abs(found - expected).mean() < 1e-4


def test_given_at_opening_or_set_later_is_the_same(
    path: Path, model: DiffusionModel, one: Adapter, two: Adapter
) -> None:
    lora = [(one, 0.5), two]
    model.set_lora(lora)
    with opened(path, lora=None) as none:
        assert none.lora == ()
    with opened(path, lora=lora) as other:
        assert other.lora == model.lora == ((one, 0.5), (two, 1.0))
        np.testing.assert_array_equal(fresh_logits(other), fresh_logits(model))
        assert other.new_session().lora_key == model.new_session().lora_key == model.lora_key(lora) != b""


def test_off_is_never_loaded(model: DiffusionModel, one: Adapter, two: Adapter, plain: np.ndarray) -> None:
    model.set_lora([one, (two, -1.5)])
    assert not np.array_equal(fresh_logits(model), plain)
    for off in ([], (), [(one, 0), (two, 0.0)]):
        model.set_lora(off)
        session = model.new_session()
        assert session.native.adapters == [] and session.lora_key == b"" and len(model.lora) == len(off)
        np.testing.assert_array_equal(fresh_logits(model), plain)


def test_order_and_scale_are_in_the_key_and_scale_zero_is_not(
    model: DiffusionModel, one: Adapter, two: Adapter
) -> None:
    keys = [model.lora_key(lora) for lora in ([one], [two], [(one, 2)], [one, two], [two, one], [])]
    assert len(set(keys)) == len(keys)
    assert model.lora_key([one, (two, 0)]) == model.lora_key([(one, 1.0)]) == keys[0]
    assert model.lora_key() == b""


def test_a_refused_one_leaves_the_earlier_ones(
    path: Path, model: DiffusionModel, one: Adapter, tmp_path: Path
) -> None:
    model.set_lora([one])
    session = model.new_session(lora=[(one, 0.5)])
    expected, own = fresh_logits(model), session.lora
    wide = Factors((4, 7), (7, 4), 1.0, lambda: (np.zeros((4, 7), np.float32), np.zeros((7, 4), np.float32)))
    misfit = Adapter("misfit", tmp_path / "misfit", {Target("blk.0.attn_q", "both"): wide}, b"m" * 32)
    for lora, error, message in [
        ([one, tmp_path / "nowhere"], AdapterError, "nowhere: there is no such adapter"),
        ([misfit], AdapterError, r"misfit: .*blk\.0\.attn_q"),
        ([(one, float("nan"))], OptionError, "lora has the scale nan"),
        ([f"{tmp_path}:0.5"], AdapterError, r"its scale goes beside it, \('.*', 0.5\)"),
        ([(one, "2")], OptionError, "lora has the scale '2'"),
        (["a\0b"], AdapterError, "is no path"),
        ([""], OptionError, "lora holds ''"),
        ([None], OptionError, "lora holds None"),
        ("folder", OptionError, r"lora is 'folder'; permitted is a list.*; an empty list takes all off"),
        (one, OptionError, "permitted is a list"),
    ]:
        for refusing in (model.set_lora, session.set_lora, lambda lora: session.encode(IDS, lora=lora),
                         lambda lora: model.new_session(lora=lora), model.lora_key,
                         lambda lora: opened(path, lora=lora),
                         lambda lora: model.generate(IDS, lora=lora, **SHORT)):  # fmt: skip
            with pytest.raises(error, match=message):
                refusing(lora)
    assert model.lora == ((one, 1.0),) and session.lora == own == ((one, 0.5),) and session.n_past == 0
    np.testing.assert_array_equal(fresh_logits(model), expected)


# Sessions


def test_an_open_session_encodes_its_tokens_anew(
    model: DiffusionModel, one: Adapter, two: Adapter, plain: np.ndarray
) -> None:
    session = model.new_session()
    session.encode(IDS)
    np.testing.assert_array_equal(logits(session), plain)
    model.set_lora([one])
    assert session.lora == ((one, 1.0),) and session.n_encoded == len(IDS)  # not before it is needed
    np.testing.assert_array_equal(logits(session), fresh_logits(model))
    assert session.n_encoded == 2 * len(IDS)
    model.set_lora([two])
    model.set_lora([(one, 1)])
    logits(session)
    assert session.n_encoded == 2 * len(IDS)  # the cache is still of these
    model.set_lora([])
    np.testing.assert_array_equal(logits(session), plain)


def test_a_session_with_its_own_does_not_follow_the_model(
    model: DiffusionModel, one: Adapter, two: Adapter, plain: np.ndarray
) -> None:
    session, off = model.new_session(lora=[one]), model.new_session(lora=[])
    session.encode(IDS)
    off.encode(IDS)
    model.set_lora([two])
    assert session.lora == ((one, 1.0),) and off.lora == ()
    np.testing.assert_array_equal(logits(off), plain)
    np.testing.assert_array_equal(logits(session), fresh_logits(model, [one]))
    session.set_lora(None)
    assert session.lora == ((two, 1.0),)
    np.testing.assert_array_equal(logits(session), fresh_logits(model))
    session.set_lora([])
    np.testing.assert_array_equal(logits(session), plain)


def test_forks_and_copies(model: DiffusionModel, one: Adapter, two: Adapter, plain: np.ndarray) -> None:
    session = model.new_session(lora=[one])
    session.encode(IDS)
    fork = session.fork()
    assert fork.lora == session.lora and fork.lora_key == session.lora_key and fork.n_encoded == 0
    np.testing.assert_array_equal(logits(fork), logits(session))
    assert fork.n_encoded == 0
    other = model.new_session()
    other.copy(session)
    assert other.lora == () and other.lora_key == session.lora_key  # of the tokens that it has
    np.testing.assert_array_equal(logits(other), plain)
    assert other.n_encoded == len(IDS) and other.lora_key == b""


def test_a_session_file_is_for_its_adapters(
    path: Path, model: DiffusionModel, one: Adapter, two: Adapter, tmp_path: Path
) -> None:
    session = model.new_session(lora=[(one, 0.5), (two, 0)])
    session.encode(IDS)
    session.save(tmp_path / "tuned")
    loaded = model.load_session(tmp_path / "tuned", lora=[(one, 0.5)])
    np.testing.assert_array_equal(logits(loaded), logits(session))
    assert loaded.n_encoded == 0
    there = r"saved with other adapters \(random-1:0.5; here {}\): load it with"
    for lora, here in ((None, "none"), ([(one, 0.25)], "random-1:0.25"), ([two], "random-2:1")):
        with pytest.raises(ModelFormatError, match=there.format(here)):
            model.load_session(tmp_path / "tuned", lora=lora)
    session.set_lora([])
    session.save(tmp_path / "still")  # as its tokens are encoded, not as they will be
    assert model.load_session(tmp_path / "still", lora=[(one, 0.5)]).n_past == len(IDS)
    logits(session)
    session.save(tmp_path / "plain")
    np.testing.assert_array_equal(logits(model.load_session(tmp_path / "plain")), fresh_logits(model))
    model.set_lora([one])
    with pytest.raises(ModelFormatError, match=r"saved with other adapters \(none; here random-1:1\)"):
        model.load_session(tmp_path / "plain")


def test_saving_within_a_generation(
    model: DiffusionModel, one: Adapter, two: Adapter, tmp_path: Path
) -> None:
    """It goes on as if nothing were saved, and the file has the cache as the generation made it."""
    expected = model.generate(IDS, lora=[one], **SHORT).tokens.tolist()
    session = model.new_session()
    session.prefill(IDS, lora=[one])
    events = []
    for event in session.generate(lora=[one], **SHORT):
        model.set_lora([two])
        session.save(tmp_path / f"{len(events)}")
        events.append(event)
    assert isinstance(events[-1], EndEvent) and session.n_encoded == len(IDS) + model.canvas_length
    canvas = [event for event in events if isinstance(event, CanvasEvent)]
    assert [token for event in canvas for token in event.tokens.tolist()] == expected
    loaded = model.load_session(tmp_path / "0", lora=[one])
    assert loaded.complete(lora=[one], **SHORT).tokens.tolist() == expected


def test_a_generation_that_something_else_ended(model: DiffusionModel, one: Adapter) -> None:
    session = model.new_session()
    session.prefill(IDS)
    with pytest.raises(PyDiffusionError, match="used for something else during the generation"):
        for _ in session.generate(**SHORT):
            session.prefill(IDS, lora=[one])


def test_a_closed_model_s_sessions_keep_their_adapters(path: Path, one: Adapter) -> None:
    model = opened(path, lora=[one])
    session, own = model.new_session(), model.new_session(lora=[(one, 0.5)])
    session.encode(IDS)
    expected = logits(session)
    model.close()
    np.testing.assert_array_equal(logits(session), expected)
    own.encode(IDS)
    with pytest.raises(PyDiffusionError, match="closed"):
        model.set_lora([one])
    own.set_lora(None)
    with pytest.raises(PyDiffusionError, match="the model is closed: its adapters can't be applied"):
        logits(own)


def test_a_model_that_nobody_has_is_freed_at_once(path: Path, one: Adapter) -> None:
    model = opened(path, lora=[one])
    session = model.new_session(lora=[(one, 2)])
    seen = weakref.ref(model)
    gc.disable()
    try:
        del model, session
        assert seen() is None
    finally:
        gc.enable()


# One call


@pytest.fixture(scope="module")
def tuned(path: Path, one: Adapter) -> DiffusionModel:
    return opened(path, lora=[one])


def test_a_call_has_its_own(model: DiffusionModel, tuned: DiffusionModel, one: Adapter) -> None:
    session = model.new_session()
    expected, without = tuned.generate(IDS, **SHORT), model.generate(IDS, **SHORT)
    assert expected.tokens.tolist() != without.tokens.tolist()
    for _ in range(2):
        done = model.generate(IDS, session=session, lora=[one], **SHORT)
        assert done.tokens.tolist() == expected.tokens.tolist()
    n_encoded = session.n_encoded
    model.generate(IDS, session=session, lora=(one,), **SHORT)
    assert session.n_encoded - n_encoded == model.canvas_length  # the prompt is cached; a canvas is committed
    assert session.lora == () and model.lora == ()
    assert model.generate(IDS, session=session, **SHORT).tokens.tolist() == without.tokens.tolist()
    assert tuned.generate(IDS, lora=[], **SHORT).tokens.tolist() == without.tokens.tolist()


def test_what_is_cached_with_other_adapters_is_not_reused(model: DiffusionModel, one: Adapter) -> None:
    session = model.new_session()
    assert session.prefill(IDS) == 0 and session.prefill(IDS) == len(IDS)
    assert session.prefill(IDS, lora=[one]) == 0 and session.prefill(IDS, lora=[one]) == len(IDS)
    assert session.lora_key == model.lora_key([one]) and session.n_encoded == 2 * len(IDS)
    np.testing.assert_array_equal(logits(session), fresh_logits(model))  # the session's own
    assert session.lora_key == b""


def test_everything_that_generates_takes_them(
    model: DiffusionModel, tuned: DiffusionModel, one: Adapter
) -> None:
    text, body = "the <|hole:5|> sea", {"max_tokens": 12, "steps": 2, "seed": 3}
    options = GenerationOptions(steps=2, seed=3, lora=[one])
    ours = model.infill(text, options)
    assert ours.completion.tokens.tolist() == tuned.infill(text, steps=2, seed=3).completion.tokens.tolist()
    assert ours.text != model.infill(text, steps=2, seed=3).text
    edited = [m.edit("the wide sea", [(4, 8)], steps=2, seed=3, **more).text  # type: ignore[arg-type]
              for m, more in ((model, {"lora": [one]}), (tuned, {}))]  # fmt: skip
    assert edited[0] == edited[1]
    responses = [
        create(m, more) for m, more in ((model, {"lora": [(one, 1.0)]}), (tuned, {}))
        for create in (lambda m, more: m.create_completion("the sea", **body, **more),)
    ]  # fmt: skip
    assert responses[0]["choices"] == responses[1]["choices"]
    streamed = [list(m.stream(IDS, GenerationOptions(**SHORT, lora=lora)))
                for m, lora in ((model, [one]), (tuned, None))]  # fmt: skip
    assert [e.tokens.tolist() for e in streamed[0][:-1]] == [e.tokens.tolist() for e in streamed[1][:-1]]


def test_a_batch_of_different_adapters(model: DiffusionModel, one: Adapter, two: Adapter) -> None:
    each = [[one], None, [(two, 2.0)], [one, (two, -1)], [(one, 0)]]
    options = [GenerationOptions(**SHORT, lora=lora) for lora in each]
    alone = [model.generate(IDS, one_of).tokens.tolist() for one_of in options]
    found = dict(model.generate_batch([IDS] * len(each), options, n_parallel=3))
    assert [found[i].tokens.tolist() for i in range(len(each))] == alone  # type: ignore[union-attr]
    assert len({tuple(tokens) for tokens in alone}) == 4  # none and scale 0 are the same


def test_an_unusable_adapter_fails_its_own_request_only(model: DiffusionModel, tmp_path: Path) -> None:
    options = [GenerationOptions(**SHORT), GenerationOptions(**SHORT, lora=[tmp_path / "none"])]
    found = dict(model.generate_batch([IDS, IDS], options))
    assert isinstance(found[1], AdapterError)
    assert found[0].tokens.tolist() == model.generate(IDS, **SHORT).tokens.tolist()  # type: ignore[union-attr]


def test_a_generation_keeps_the_adapters_that_it_began_with(
    model: DiffusionModel, one: Adapter, two: Adapter
) -> None:
    options = GenerationOptions(**SHORT)
    model.set_lora([one])
    expected = [event.tokens.tolist() for event in model.stream(IDS, options) if hasattr(event, "tokens")]
    session = model.new_session()
    found = []
    for event in model.stream(IDS, options, session=session):
        model.set_lora([two])
        session.set_lora([(two, 3)])
        found += [event.tokens.tolist()] if hasattr(event, "tokens") else []
    assert found == expected and len(found) > 3


def test_adapters_are_set_while_others_generate(model: DiffusionModel, one: Adapter, two: Adapter) -> None:
    """A call has one list of those that were set, from its first step to its last."""
    lists: list[list[Adapter]] = [[one], [two], []]
    texts = [model.generate(IDS, lora=lora, **SHORT).tokens.tolist() for lora in lists]
    assert len(set(map(tuple, texts))) == 3
    stop = threading.Event()

    def switch() -> None:
        while not stop.is_set():
            for lora in lists:
                model.set_lora(lora)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        session = model.new_session()
        for _ in range(4):
            assert model.generate(IDS, session=session, **SHORT).tokens.tolist() in texts
            own = model.generate(IDS, session=session, lora=[one], **SHORT)
            assert own.tokens.tolist() == texts[0]
    finally:
        stop.set()
        thread.join()


def test_adapters_as_values(path: Path, one: Adapter, two: Adapter) -> None:
    same = replace(one, name="another name")
    assert one == same and hash(one) == hash(same) and one != two and one != "random-1"
    assert repr(one).startswith("Adapter('random-1', ") and len(repr(one)) < 80
    options = GenerationOptions(lora=[one, ("folder", 2)])
    assert options.lora == ((one, 1.0), ("folder", 2.0))
    assert hash(options) == hash(GenerationOptions(lora=[(same, 1), ("folder", 2.0)]))
    assert pickle.loads(pickle.dumps(GenerationOptions(lora=["folder"]))).lora == (("folder", 1.0),)


def test_the_async_methods_and_choices_take_them(
    model: DiffusionModel, tuned: DiffusionModel, one: Adapter
) -> None:
    done = asyncio.run(model.agenerate(IDS, lora=[one], **SHORT))
    assert done.tokens.tolist() == tuned.generate(IDS, **SHORT).tokens.tolist()
    messages, body = (
        [{"role": "user", "content": "the sea"}],
        {"max_tokens": 9, "steps": 2, "seed": 3, "n": 2},
    )
    ours = model.create_chat_completion(messages, **body, lora=[one], session=model.new_session())
    assert ours["choices"] == tuned.create_chat_completion(messages, **body)["choices"]
    assert ours["choices"] != model.create_chat_completion(messages, **body)["choices"]
    each = [GenerationOptions(max_tokens=9, steps=2, seed=3, lora=lora) for lora in ([one], None)]
    found = dict(model.chat_batch([messages] * 2, each))
    for i, which in enumerate((tuned, model)):
        assert found[i].text == which.chat(messages, max_tokens=9, steps=2, seed=3).text  # type: ignore[union-attr]


def test_on_a_device(path: Path, model: DiffusionModel, one: Adapter, plain: np.ndarray) -> None:
    with opened(path, device="host", n_gpu_layers=99) as never:
        expected = fresh_logits(never)
    with opened(path, device="host", n_gpu_layers=99, lora=[one]) as host:
        off_by = np.abs(fresh_logits(host) - fresh_logits(model, [one])).mean()
        assert off_by < 2 * np.abs(expected - plain).mean() < 0.005  # as the devices differ without
        session = host.new_session()
        session.encode(IDS)
        host.set_lora([])
        np.testing.assert_array_equal(logits(session), expected)
