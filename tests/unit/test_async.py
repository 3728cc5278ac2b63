"""Async methods: the same results, a free event loop, work that stops with its task, no threads left."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.server_fakes import CHAT, TOOLS, ScriptedModel, ask, script

from pydiffusion import (
    ContextOverflowError,
    DiffusionModel,
    DraftEvent,
    EndEvent,
    GenerationCancelled,
    GenerationOptions,
    OptionError,
)
from pydiffusion.constrained import automaton_for
from pydiffusion.generation.session_thread import SessionThread

OPTIONS = {"seed": 5, "max_tokens": 16, "steps": 4, "eos": ()}
# Seconds after which something hangs.
LIMIT = 60.0


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> Iterator[DiffusionModel]:
    with DiffusionModel(gguf_file("small"), n_threads=1) as opened:
        yield opened


@pytest.fixture
def scripted() -> ScriptedModel:
    return ScriptedModel(script)


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "pydiffusion-async":  # the result is there a moment before its thread has ended
            thread.join(LIMIT)
            assert not thread.is_alive()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, LIMIT))


async def collected(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


def plain(result: Any) -> Any:
    """What two runs have in common."""
    if isinstance(result, list):
        return [plain(each) for each in result]
    if isinstance(result, dict):
        for choice in result["choices"]:
            for call in (choice.get("message") or choice.get("delta") or {}).get("tool_calls", ()):
                del call["id"]  # random
        return result["choices"]
    names = ("text", "reason", "reasoning", "tool_calls", "step", "holes", "seed")
    return type(result), [getattr(result, name, None) for name in names]


class Gate:
    """A script whose answers begin when the event loop says so."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = 0
        self.at_once = 0
        self.most = 0
        self._lock = threading.Lock()

    def __call__(self, prompt: str, i_answer: int) -> list[str]:
        with self._lock:
            self.entered += 1
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        assert self.opened.wait(LIMIT), "the event loop is blocked"
        with self._lock:
            self.at_once -= 1
        return ["Hello."]

    async def until(self, n_entered: int) -> None:
        while self.entered < n_entered:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("name", "given", "more"),
    [
        ("generate", "the river", {}),
        ("stream", "the river", {}),
        ("chat", ask("think"), {}),
        ("stream_chat", ask("think"), {}),
        ("create_completion", "the river", {"n": 2}),
        ("create_chat_completion", ask("weather"), {"tools": TOOLS}),
    ],
)
def test_they_give_what_the_others_give(
    scripted: ScriptedModel, name: str, given: Any, more: dict[str, Any]
) -> None:
    for options in ({}, {"stream": True}) if name.startswith("create") else ({},):
        keywords = {"seed": 5, **more, **options}
        here = getattr(scripted, name)(given, **keywords)
        here = list(here) if isinstance(here, Iterator) else here

        async def main() -> Any:
            there = getattr(scripted, "a" + name)(given, **keywords)  # noqa: B023
            there = await there if isinstance(there, Coroutine) else there
            return await collected(there) if isinstance(there, AsyncIterator) else there

        assert plain(run(main())) == plain(here)


def test_infill_and_edit(model: DiffusionModel) -> None:
    async def main() -> list[Any]:
        filled = await model.ainfill("the <|hole:3|> road", seed=5, steps=4)
        return [filled, await model.aedit("the river road", [(4, 9)], seed=5, steps=4)]

    here = [
        model.infill("the <|hole:3|> road", seed=5, steps=4),
        model.edit("the river road", [(4, 9)], seed=5, steps=4),
    ]
    assert plain(run(main())) == plain(here)


def test_the_event_loop_goes_on() -> None:
    gate = Gate()
    model = ScriptedModel(gate)

    async def main() -> str:
        task = asyncio.create_task(model.agenerate("Hello"))
        await gate.until(1)
        assert not task.done()
        gate.opened.set()
        return (await task).text

    assert run(main()) == "Hello."


def test_several_at_once_are_right(model: DiffusionModel) -> None:
    prompts = [f"the river and {'the road ' * i}" for i in range(7)]

    async def main() -> list[Any]:
        calls = (model.agenerate(prompt, **OPTIONS) for prompt in prompts)
        streams = (collected(model.astream(prompt, **OPTIONS)) for prompt in prompts[:2])
        return await asyncio.gather(*calls, *streams)

    here = [model.generate(prompt, **OPTIONS) for prompt in prompts]
    here += [list(model.stream(prompt, **OPTIONS)) for prompt in prompts[:2]]
    assert plain(run(main())) == plain(here)


def test_structured_answers_at_once_are_right(model: DiffusionModel) -> None:
    """They share the automaton of their schema, which is filled in as it is used."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    given = {"json_schema": schema, "max_tokens": 16, "steps": 3}

    async def main() -> list[Any]:
        return await asyncio.gather(*(model.achat(ask("Hi"), seed=i, **given) for i in range(6)))

    assert plain(run(main())) == plain([model.chat(ask("Hi"), seed=i, **given) for i in range(6)])


def test_an_automaton_numbers_its_classes_once_whatever_threads_ask(scripted: ScriptedModel) -> None:
    class Slow(dict[Any, int]):
        def __len__(self) -> int:
            n = super().__len__()
            time.sleep(0.001)  # another thread's turn
            return n

    options = GenerationOptions(regex="[a-z]{3}[0-9 ]x?")
    alone, shared = (automaton_for(options, scripted.tokenizer, frozenset([1])) for _ in range(2))
    shared._kinds, shared._moves_to_kind = {}, Slow()
    ids = range(scripted.n_vocab)
    threads = [
        threading.Thread(target=lambda order=order: [shared.kind(i) for i in order])
        for order in (ids, reversed(ids), sorted(ids, key=lambda i: i * 7 % 11))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    classes = {(alone.kind(i), shared.kind(i)) for i in ids}
    assert len(classes) == len({kind for kind, _ in classes}) == len({kind for _, kind in classes}) > 3


def test_of_many_calls_four_run_and_one_that_waits_can_be_cancelled() -> None:
    gate = Gate()
    model = ScriptedModel(gate)

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(model.agenerate("Hello")) for _ in range(10)]
        await gate.until(4)
        tasks[8].cancel()
        await asyncio.wait([tasks[8]])
        gate.opened.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = run(main())
    assert isinstance(outcomes.pop(8), asyncio.CancelledError)
    assert [done.text for done in outcomes] == ["Hello."] * 9
    assert gate.most == 4 and gate.entered == 9


def test_a_model_serves_one_event_loop_after_the_other_and_two_at_once(scripted: ScriptedModel) -> None:
    async def main() -> list[str]:
        return [done.text for done in await asyncio.gather(*(scripted.achat(ask("Hi")) for _ in range(6)))]

    texts = [run(main()) for _ in range(2)]
    threads = [threading.Thread(target=lambda: texts.append(run(main()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert texts == [["Hello, world!"] * 6] * 4


# Cancelling


@pytest.mark.parametrize("name", ["agenerate", "achat", "acreate_completion", "acreate_chat_completion"])
@pytest.mark.parametrize("own_session", [True, False])
def test_a_cancelled_task_stops_within_a_step(name: str, own_session: bool) -> None:
    begun = threading.Event()
    model = ScriptedModel(lambda *given: (begun.set(), script(*given))[1])  # type: ignore[func-returns-value]
    model.step_seconds = 10 * LIMIT
    session = model.new_session() if own_session else None
    given: Any = "long" if name in ("agenerate", "acreate_completion") else ask("long")

    async def main() -> None:
        task = asyncio.create_task(getattr(model, name)(given, session=session))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    run(main())
    assert model.n_steps == 0
    model.step_seconds = 0.0
    assert model.generate("Hello", session=session).text == "Hello, world!", "model and session go on"


def test_a_timeout_stops_a_real_generation(model: DiffusionModel) -> None:
    session = model.new_session()
    endless = {**OPTIONS, "steps": 10**6, "stability_threshold": 0, "confidence_threshold": 0}

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(model.agenerate("the river", session=session, **endless), 0.05)
        stream = model.astream("the road", session=session, **endless)
        first = await stream.__anext__()
        assert isinstance(first, DraftEvent)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(collected(stream), 0.05)

    run(main())
    assert plain(model.generate("the river", session=session, **OPTIONS)) == plain(
        model.generate("the river", **OPTIONS)
    )


def test_a_cancellation_that_comes_too_late_does_not_stop_the_next_call(scripted: ScriptedModel) -> None:
    session = scripted.new_session()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task: Any = None

        def work(session: Any) -> None:
            loop.call_soon_threadsafe(lambda: task.cancel())
            assert session.native._cancelled.wait(LIMIT)  # and no native call follows that would raise it

        task = asyncio.create_task(SessionThread(scripted, session).call(work))
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert scripted.generate("Hello", session=session).text == "Hello, world!"


def test_a_task_ends_after_its_thread_however_often_it_is_cancelled(scripted: ScriptedModel) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def stubborn(_: Any) -> None:
        begun.set()
        assert go_on.wait(LIMIT)

    async def main() -> None:
        task = asyncio.create_task(SessionThread(scripted, None).call(stubborn))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.001)
            assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_the_users_own_cancel_is_an_error(scripted: ScriptedModel) -> None:
    session = scripted.new_session()

    async def main() -> None:
        stream = scripted.astream("long", session=session)
        await stream.__anext__()
        session.cancel()
        with pytest.raises(GenerationCancelled):
            await stream.__anext__()
        assert await collected(stream) == []

    run(main())


# Streams


def test_a_stream_that_is_left_does_no_more_steps(scripted: ScriptedModel) -> None:
    session = scripted.new_session()

    async def main() -> None:
        async for _ in scripted.astream("long", session=session):
            break
        n_steps = scripted.n_steps
        async for chunk in await scripted.acreate_chat_completion(ask("long"), stream=True):
            if chunk["choices"][0]["delta"].get("content"):
                break
        assert n_steps == 1 and scripted.n_steps < 10
        assert (await scripted.agenerate("Hello", session=session)).text == "Hello, world!"

    run(main())


def test_a_stream_waits_for_its_reader(scripted: ScriptedModel) -> None:
    async def main() -> list[Any]:
        events = []
        async for event in scripted.astream_chat(ask("Hi")):
            await asyncio.sleep(0)
            events.append(event)
            n_drafts = sum(isinstance(each, DraftEvent) for each in events)
            assert scripted.n_steps == n_drafts, "no step is made before its event is asked for"
        return events

    assert isinstance(run(main())[-1], EndEvent)


def test_streams_side_by_side_in_one_task(scripted: ScriptedModel) -> None:
    """More than the calls that run at once: a stream that waits holds up no other."""

    async def main() -> list[str]:
        streams = [scripted.astream_chat(ask("Hi")) for _ in range(12)]
        texts = [""] * len(streams)
        for _ in range(9):
            for i, stream in enumerate(streams):
                texts[i] += getattr(await stream.__anext__(), "text", "")
        return texts

    assert len(set(run(main()))) == 1


# Errors


def test_errors_come_at_the_call_or_with_the_first_await(scripted: ScriptedModel) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        scripted.astream("Hello", max_token=3)
    for call, error in [
        (lambda: scripted.agenerate("Hello", steps=0), OptionError),
        (lambda: scripted.agenerate("Hello " * 2000), ContextOverflowError),
        (lambda: scripted.agenerate(CHAT["messages"]), TypeError),
        (lambda: scripted.achat("Hello"), ValueError),
        (lambda: scripted.acreate_completion("Hello", n=0), OptionError),
        (lambda: scripted.acreate_chat_completion(None, stream=True), ValueError),
        (lambda: collected(scripted.astream([])), ValueError),
    ]:
        with pytest.raises(error):
            run(call())  # type: ignore[no-untyped-call]


PROGRAM = """
import asyncio, sys
from pydiffusion import DiffusionModel

model = DiffusionModel(sys.argv[1], n_threads=1)
ENDLESS = dict(steps=10**6, stability_threshold=0, confidence_threshold=0, eos=())


def started(event=None):
    print("started", flush=True)


async def call():
    asyncio.get_running_loop().call_later(0.1, started)
    await model.agenerate("the river", **ENDLESS)


async def stream():
    async for event in model.astream("the river", **ENDLESS):
        started()


try:
    if sys.argv[2] == "sync":
        model.generate("the river", on_event=started, **ENDLESS)
    else:
        asyncio.run({"call": call, "stream": stream}[sys.argv[2]]())
except KeyboardInterrupt:
    sys.exit(42)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="NOT CHECKED: Ctrl-C (signals)")
@pytest.mark.parametrize("way", ["sync", "call", "stream"])
def test_ctrl_c_is_not_eaten(gguf_file: Callable[..., Path], way: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(gguf_file("tiny")), way], stdout=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout is not None and program.stdout.readline() == "started\n"
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=LIMIT)
        assert program.returncode == 42
    finally:
        program.kill()
        program.wait()
