"""Threads and processes: concurrent sessions, one session used twice, cancelling, fork, exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pydiffusion import _native
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.errors import GenerationCancelled, PyDiffusionError

OPTIONS = {
    **ENTROPY_BOUND_DEFAULTS,
    "max_tokens": 16,
    "steps": 6,
    "confidence_threshold": 0.0,  # every canvas takes all its steps
    "seed": 0,
    "eos": [],
}
N_CTX = 64
#: Seconds that anything here may take before it counts as hanging.
TIME_LIMIT = 300.0


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> _native.Model:
    return _native.Model(str(gguf_file("tiny", "f32")), n_threads=1)


@pytest.fixture(scope="module")
def pooled_model(gguf_file: Callable[..., Path]) -> _native.Model:
    """As ``model``, but with a thread pool."""
    return _native.Model(str(gguf_file("tiny", "f32")), n_threads=2)


@pytest.fixture(scope="module")
def slow_model(gguf_file: Callable[..., Path]) -> _native.Model:
    """Prefill of a thousand tokens takes long enough to be interrupted."""
    return _native.Model(str(gguf_file("wide", "f32")), n_threads=1)


def prompt(seed: int, n: int = 7, n_vocab: int = 384) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n_vocab, n, dtype=np.int32)


def answer(model: _native.Model, seed: int) -> list[int]:
    """Encode, generate, truncate, generate again, as a conversation does."""
    session = _native.Session(model, N_CTX)
    session.encode(prompt(seed))
    tokens: list[int] = []
    for turn in range(2):
        session.begin(**OPTIONS | {"seed": seed + turn})
        while (step := session.next_step()) is not None:
            tokens += step.tokens.tolist()
        session.truncate(7)
    return tokens


def run_threads(work: list[Callable[[], None]]) -> None:
    """Run the calls concurrently; raises the first error, fails when one hangs."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIME_LIMIT)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("n_threads", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_concurrent_sessions_give_the_same_as_alone(model: _native.Model, n_threads: int) -> None:
    alone = [answer(model, seed) for seed in range(n_threads)]
    together: dict[int, list[int]] = {}
    run_threads([lambda seed=seed: together.update({seed: answer(model, seed)}) for seed in range(n_threads)])
    assert [together[seed] for seed in range(n_threads)] == alone
    assert len({tuple(tokens) for tokens in alone}) > n_threads // 2  # not all the same anyway


def test_models_opened_and_dropped_in_threads(gguf_file: Callable[..., Path]) -> None:
    path = str(gguf_file("tiny", "f32"))
    expected = answer(_native.Model(path, n_threads=1), 3)

    def open_and_use(n_threads: int) -> None:
        for _ in range(2):
            assert answer(_native.Model(path, n_threads=n_threads), 3) == expected

    run_threads([lambda n=n: open_and_use(n) for n in (1, 1, 1, 2)])


def test_concurrent_use_of_one_session_is_refused(slow_model: _native.Model) -> None:
    session, other = (_native.Session(slow_model, 1024) for _ in range(2))
    other.encode(prompt(2))
    other.begin(**OPTIONS)
    started, refused = threading.Event(), []

    def encode() -> None:
        session.encode(prompt(0, 1000), progress=lambda done, total: started.set())

    def intrude() -> None:
        started.wait(TIME_LIMIT)
        calls = [
            lambda: session.encode(prompt(1)),
            lambda: session.truncate(0),
            lambda: session.denoise(prompt(1, slow_model.canvas_length), None),
            lambda: session.begin(**OPTIONS),
            session.next_step,
            lambda: session.step_ops,
            lambda: session.copy_from(other),
            lambda: other.copy_from(session),
        ]
        for call in calls:
            with pytest.raises(PyDiffusionError, match="in use by another thread"):
                call()
            refused.append(call)
        session.cancel()

    with pytest.raises(GenerationCancelled):
        run_threads([encode, intrude])
    assert len(refused) == 8
    assert other.n_past == 7 and other.next_step() is not None  # refused, its generation continues
    # What came before the cancel is in the cache, and the session works on.
    n = session.n_past
    assert 0 < n < 1000
    assert np.array_equal(session.tokens, prompt(0, 1000)[:n])
    session.truncate(0)
    fresh = _native.Session(slow_model, 1024)
    hidden = [each.encode(prompt(0), return_hidden=True) for each in (session, fresh)]
    assert np.array_equal(*hidden)


def test_sessions_that_copy_each_other_do_not_wait_for_each_other(model: _native.Model) -> None:
    a, b = (_native.Session(model, N_CTX) for _ in range(2))
    a.encode(prompt(1))
    b.encode(prompt(2))
    contents = {tuple(a.tokens.tolist()), tuple(b.tokens.tolist())}
    n_copies = []

    def copy(target: _native.Session, source: _native.Session) -> None:
        for _ in range(500):
            try:
                target.copy_from(source)
                n_copies.append(1)
            except PyDiffusionError as error:
                assert "in use by another thread" in str(error)

    run_threads([lambda: copy(a, b), lambda: copy(b, a)])
    assert n_copies and a.tokens.tolist() == b.tokens.tolist() and tuple(a.tokens.tolist()) in contents
    canvas = prompt(3, model.canvas_length)
    assert np.array_equal(a.denoise(canvas, None), b.denoise(canvas, None))


def test_tokens_may_be_read_while_another_thread_computes(model: _native.Model) -> None:
    session, done = _native.Session(model, N_CTX), threading.Event()

    def compute() -> None:
        for _ in range(60):
            session.encode(prompt(0, 40))
            session.truncate(0)
        done.set()

    def read() -> None:
        while True:
            last = done.is_set()  # set before reading, so that at least one read happens
            tokens, n_past = session.tokens, session.n_past
            assert len(tokens) in (0, 40)
            assert 0 <= n_past <= 40
            assert np.array_equal(tokens, prompt(0, 40)[: len(tokens)])
            if last:
                break

    run_threads([compute, read, read])


@pytest.mark.parametrize("at", range(12))
def test_cancel_at_every_step(model: _native.Model, at: int) -> None:
    """Two canvases of six steps and more; cancelled between two steps, the next call raises."""
    session = _native.Session(model, N_CTX)
    session.encode(prompt(5))
    session.begin(**OPTIONS)
    for _ in range(at):
        assert session.next_step() is not None
    session.cancel()
    with pytest.raises(GenerationCancelled):
        session.next_step()
    assert session.next_step() is None  # it has ended, and raises only once
    session.truncate(7)
    session.begin(**OPTIONS)
    first = session.next_step()
    fresh = _native.Session(model, N_CTX)
    fresh.encode(prompt(5))
    fresh.begin(**OPTIONS)
    assert np.array_equal(first.canvas, fresh.next_step().canvas)


def test_cancel_from_another_thread_at_any_moment(model: _native.Model) -> None:
    """Raised by the running call or the next; afterwards the session computes what a fresh one does."""
    expected = answer(model, 9)
    session = _native.Session(model, N_CTX)
    n_cancelled = 0
    for i in range(40):
        timer = threading.Timer(0.0005 * i, session.cancel)
        timer.start()
        try:
            session.truncate(0)
            session.encode(prompt(9))
            session.begin(**OPTIONS | {"seed": 9})
            while session.next_step() is not None:
                pass
        except GenerationCancelled:
            n_cancelled += 1
        timer.join()
        try:  # a cancel that came too late is still to be raised
            session.truncate(0)
        except GenerationCancelled:
            n_cancelled += 1
            session.truncate(0)
    assert n_cancelled == 40
    session.encode(prompt(9))
    session.begin(**OPTIONS | {"seed": 9})
    tokens = []
    while (step := session.next_step()) is not None:
        tokens += step.tokens.tolist()
    assert len(tokens) == OPTIONS["max_tokens"]
    assert tokens == expected[: len(tokens)]


def test_an_exception_in_the_progress_callback_stops_the_prefill(slow_model: _native.Model) -> None:
    session = _native.Session(slow_model, 1024)

    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        session.encode(prompt(0, 1000), progress=stop)
    assert 0 < session.n_past < 1000
    assert len(session.tokens) == session.n_past
    session.truncate(0)
    session.encode(prompt(0))
    assert np.array_equal(session.tokens, prompt(0))


def test_the_interpreter_goes_on_during_a_step(slow_model: _native.Model) -> None:
    """A ticking thread is never blocked for as long as one native call takes."""
    session = _native.Session(slow_model, 1024)
    done, gaps = threading.Event(), []

    def tick() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticker = threading.Thread(target=tick)
    ticker.start()
    longest = 0.0
    try:
        for _ in range(2):
            started = time.perf_counter()
            session.encode(prompt(0, 1000))
            longest = max(longest, time.perf_counter() - started)
            session.truncate(0)
    finally:
        done.set()
        ticker.join()
    # With the interpreter blocked there would be one gap per call, as long as the call.
    assert max(gaps) < max(0.5 * longest, 0.25), (max(gaps), longest)
    assert len(gaps) > 20


EXIT_WHILE_COMPUTING = """
import sys, threading, numpy as np
from pydiffusion import _native
model = _native.Model(sys.argv[1], n_threads=1)
started = threading.Event()
def compute():
    session = _native.Session(model, 1024)
    while True:
        session.encode(np.zeros(1000, np.int32), progress=lambda done, total: started.set())
        session.truncate(0)
for _ in range(3):
    threading.Thread(target=compute, daemon=True).start()
started.wait()
"""


@pytest.mark.parametrize("attempt", range(3))
def test_the_process_may_end_while_daemon_threads_compute(
    gguf_file: Callable[..., Path], attempt: int
) -> None:
    """The interpreter ends threads that ask for its lock then, by unwinding their stacks, also from within
    a callback: that must become neither an abort nor a crash."""
    command = [sys.executable, "-c", EXIT_WHILE_COMPUTING, str(gguf_file("wide", "f32"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    assert (result.returncode, result.stderr) == (0, "")  # no abort, no crash, no report of leaks


EXIT_FROM_A_CALLBACK = """
import os, sys, threading, time, numpy as np
from pydiffusion import _native
model = _native.Model(sys.argv[1], n_threads=1)
started = threading.Event()
def compute():
    session = _native.Session(model, 1024)
    def progress(done, total):
        started.set()
        time.sleep(60)
    session.encode(np.zeros(1000, np.int32), progress=progress)
threading.Thread(target=compute, daemon=True).start()
started.wait()
if os.fork() == 0:
    sys.exit(0)
assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system: NOT CHECKED")
def test_the_process_may_end_while_a_callback_runs(gguf_file: Callable[..., Path]) -> None:
    """Exit does not wait forever for a callback that does not return, nor at all in a forked child."""
    command = [sys.executable, "-W", "ignore", "-c", EXIT_FROM_A_CALLBACK, str(gguf_file("wide", "f32"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    assert (result.returncode, result.stderr) == (0, "")


ATEXIT = """
import atexit, sys, numpy as np
def last():
    session.truncate(0)
    session.encode(np.zeros(30, np.int32))
    print(session.n_past)
atexit.register(last)
from pydiffusion import _native
session = _native.Session(_native.Model(sys.argv[1], n_threads=1), 64)
"""


def test_atexit_functions_may_still_compute(gguf_file: Callable[..., Path]) -> None:
    """In an atexit function that runs after ours."""
    command = [sys.executable, "-c", ATEXIT, str(gguf_file("tiny", "f32"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    assert (result.returncode, result.stdout) == (0, "30\n"), result.stderr


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system: NOT CHECKED")


def in_child(work: Callable[[], None]) -> int:
    """Run it in a forked child; the wait status, or a failure when the child hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads and fork
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + TIME_LIMIT
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


SHARED_CPU = """
import os, sys, time
import numpy as np
from pydiffusion import _native

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # which the pool's threads inherit
canvas = None
for n_threads in (1, 2, 4):
    model = _native.Model(sys.argv[1], n_threads=n_threads)
    session = _native.Session(model, 64)
    session.encode(np.arange(7, dtype=np.int32))
    canvas = np.arange(model.canvas_length, dtype=np.int32)
    session.denoise(canvas, None)  # lays the graph out
    before = time.process_time()
    for _ in range(20):
        session.denoise(canvas, None)
    print(time.process_time() - before)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_threads_that_cannot_run_cost_little(gguf_file: Callable[..., Path]) -> None:
    """Several threads on one CPU: one that spun until another had done its part would spin through its
    time slices, some milliseconds for each of hundreds of nodes; a step takes a few.
    """
    command = [sys.executable, "-c", SHARED_CPU, str(gguf_file("tiny", "f32"))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=True)
    one, *several = map(float, found.stdout.split())
    assert max(several) < 5 * one + 0.1


@forks
def test_a_loaded_model_works_in_a_forked_child(pooled_model: _native.Model) -> None:
    expected = answer(pooled_model, 4)

    def child() -> None:
        assert answer(pooled_model, 4) == expected
        assert in_child(lambda: None) == 0

        def grandchild() -> None:
            assert answer(pooled_model, 4) == expected

        assert in_child(grandchild) == 0

    assert in_child(child) == 0
    assert answer(pooled_model, 4) == expected  # the parent is as it was


@forks
def test_a_child_may_drop_the_model_and_open_another(gguf_file: Callable[..., Path]) -> None:
    path = str(gguf_file("tiny", "f32"))
    holder = [_native.Model(path, n_threads=2)]
    expected = answer(holder[0], 4)

    def child() -> None:
        holder.clear()  # its threads don't exist in the child
        assert answer(_native.Model(path, n_threads=2), 4) == expected

    assert in_child(child) == 0
    assert answer(holder[0], 4) == expected


@forks
def test_a_fork_in_the_middle_of_a_step(pooled_model: _native.Model) -> None:
    """Another thread of the parent is computing: the child has neither its threads nor its lock."""
    expected, stop = answer(pooled_model, 4), threading.Event()

    def compute() -> None:
        while not stop.is_set():
            answer(pooled_model, 8)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for _ in range(5):

            def child() -> None:
                assert answer(pooled_model, 4) == expected

            assert in_child(child) == 0
    finally:
        stop.set()
        thread.join()
