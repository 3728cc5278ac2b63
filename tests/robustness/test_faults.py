"""System faults: out of memory, no threads, a file that shrinks, pipes, kill -9 at any moment."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pydiffusion import DiffusionModel, _native
from pydiffusion.convert import convert, quantize
from pydiffusion.errors import ModelFormatError

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX limits and signals: NOT CHECKED here")
sanitized = pytest.mark.skipif(
    "lib" in os.environ.get("LD_PRELOAD", "") and "san" in os.environ.get("LD_PRELOAD", ""),
    reason="sanitizers need all addresses: limits of memory are NOT CHECKED in this run",
)
#: How many times to kill a conversion; the slow test asks for more.
KILLS = 10


def run(code: str, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


# --- memory ---

LIMITED = """
import os, resource, sys
import numpy as np
from pydiffusion import DiffusionModel, _native
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.errors import InsufficientMemoryError
path, phase, extra, n_threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def limit():
    pages = int(open("/proc/self/statm").read().split()[0])
    n_bytes = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, resource.RLIM_INFINITY))

def generate(session, n):
    session.encode(np.arange(n, dtype=np.int32))
    endless = {"steps": 3, "confidence_threshold": 0.0}
    session.begin(**{**ENTROPY_BOUND_DEFAULTS, **endless}, max_tokens=16, seed=0, eos=[])
    while session.next_step() is not None:
        pass

model = session = None
if phase != "load":
    model = _native.Model(path, n_threads=n_threads)
    session = _native.Session(model, 512)
if phase == "step":
    generate(session, 5)
limit()
outcome = "done"
try:
    model = model or _native.Model(path, n_threads=n_threads)
    session = session or _native.Session(model, 512)
    generate(session, 300)
except (InsufficientMemoryError, MemoryError) as error:
    outcome = type(error).__name__
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
# The process is as good as before: what failed works now.
model = model or _native.Model(path, n_threads=n_threads)
session = _native.Session(model, 512)
generate(session, 300)
print(outcome)
"""


def limits_of_memory(
    path: Path, phase: str, megabytes: list[float], n_threads: int, report: Callable[[str], None]
) -> set[str]:
    outcomes: dict[str, int] = {}
    for extra in megabytes:
        result = run(LIMITED, path, phase, int(extra * 2**20), n_threads)
        where = f"{phase}, {extra} MB more: {result.stderr[-800:]}"
        assert result.returncode == 0, where
        outcome = result.stdout.strip()
        assert outcome in ("done", "InsufficientMemoryError", "MemoryError"), where
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    report(f"address space limited at {phase}, {n_threads} threads: {outcomes}")
    return set(outcomes)


@posix
@sanitized
@pytest.mark.parametrize("phase", ["load", "session", "step"])
def test_memory_limits(gguf_file: Callable[..., Path], phase: str, report: Callable[[str], None]) -> None:
    """Each limit ends in success or in a MemoryError of either kind, and the process works on."""
    path = gguf_file("wide", "f32")
    outcomes = limits_of_memory(path, phase, [0, 6, 1000], 1, report)
    assert "done" in outcomes
    assert outcomes & {"InsufficientMemoryError", "MemoryError"}


WIDE_BATCH = """
import resource, sys
import numpy as np
from pydiffusion import InsufficientMemoryError, _native
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS

model = _native.Model(sys.argv[1], n_threads=1)
sessions = [_native.Session(model, 300) for _ in range(40)]
for i, session in enumerate(sessions):
    session.encode(np.arange(5 + i, dtype=np.int32))

def first_drafts(extra):
    for i, session in enumerate(sessions):
        endless = {"steps": 3, "confidence_threshold": 0.0}
        session.begin(**{**ENTROPY_BOUND_DEFAULTS, **endless}, max_tokens=16, seed=i, eos=[])
    batch = _native.Batch(model)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, resource.RLIM_INFINITY))
    try:
        outcomes = batch.next_steps(sessions)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    drafts = [each.draft.tolist() if isinstance(each, _native.Step) else each for each in outcomes]
    assert all(isinstance(draft, list | InsufficientMemoryError) for draft in drafts), drafts
    return batch.n_graphs, drafts

n_graphs, expected = first_drafts(2**40)
assert n_graphs == 1
in_parts = 0
for megabytes in range(20, 60, 4):
    n_graphs, drafts = first_drafts(megabytes << 20)
    done = [i for i, draft in enumerate(drafts) if isinstance(draft, list)]
    assert all(drafts[i] == expected[i] for i in done)
    in_parts += n_graphs > 1 or 0 < len(done) < len(drafts)
print(in_parts)
"""


@posix
@sanitized
def test_a_batch_is_split_when_memory_is_short(tmp_path: Path, report: Callable[[str], None]) -> None:
    from pydiffusion.testing.synthetic import write_synthetic

    result = run(WIDE_BATCH, write_synthetic("tiny", tmp_path / "tiny.gguf"))
    assert result.returncode == 0, result.stderr[-800:]
    report(f"40 canvases in parts at {result.stdout.strip()} of 10 limits of memory")
    assert int(result.stdout) > 0


@posix
@sanitized
@pytest.mark.slow
@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize("phase", ["load", "session", "step"])
def test_memory_limits_at_any_point(
    gguf_file: Callable[..., Path], phase: str, n_threads: int, report: Callable[[str], None]
) -> None:
    megabytes = [*np.arange(0, 12, 1.0), *np.arange(12, 60, 4.0), 80, 120, 200, 400]
    outcomes = limits_of_memory(gguf_file("wide", "f32"), phase, megabytes, n_threads, report)
    assert "done" in outcomes
    assert outcomes & {"InsufficientMemoryError", "MemoryError"}


THREADS_LIMITED = """
import resource, sys
from pydiffusion import _native
from pydiffusion.errors import InsufficientMemoryError
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_STACK, (2**26, 2**26))
n_bytes = pages * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
try:
    _native.Model(sys.argv[1], n_threads=512)
except InsufficientMemoryError as error:
    assert "n_threads" in str(error), error
    print("refused")
"""


@posix
@sanitized
def test_threads_that_fail_to_start(gguf_file: Callable[..., Path]) -> None:
    """ggml alone would abort the process."""
    result = run(THREADS_LIMITED, gguf_file("tiny", "f32"))
    assert (result.returncode, result.stdout.strip()) == (0, "refused"), result.stderr[-800:]


def test_a_cache_larger_than_any_memory(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    from support.gguf_mutator import U32, read_gguf

    from pydiffusion.errors import InsufficientMemoryError

    file = read_gguf(gguf_file("tiny", "f32"))
    file.set("diffusion-gemma.context_length", U32, 2**30 - 1)
    model = _native.Model(str(file.write(tmp_path / "long.gguf")), n_threads=1)
    with pytest.raises(InsufficientMemoryError, match="choose a smaller n_ctx"):
        _native.Session(model, 2**30 - 1)
    session = _native.Session(model, 64)
    session.encode(np.arange(5, dtype=np.int32))
    assert session.n_past == 5


# --- signals ---


@posix
def test_a_signal_at_any_moment(gguf_file: Callable[..., Path], report: Callable[[str], None]) -> None:
    """A handler's exception comes out of loading, prefill and steps; later generations are unaffected."""

    class Stop(KeyboardInterrupt):
        pass

    def stop(number: int, frame: object) -> None:
        raise Stop

    path = gguf_file("wide", "f32")
    model = DiffusionModel(path, n_threads=1, n_ctx=512)
    session = model.new_session()
    started = time.perf_counter()
    DiffusionModel(path, n_threads=1, n_ctx=512).close()
    expected = model.generate([7] * 60, session=session, max_tokens=48, steps=6, seed=3).tokens.tolist()
    duration = time.perf_counter() - started
    phases: dict[str, int] = {}
    draw, phase = random.Random(5), ""
    before = signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(25):
            signal.setitimer(signal.ITIMER_REAL, max(0.0005, draw.uniform(0, duration)))
            deadline = time.monotonic() + 20  # Python drops what is raised within a destructor
            try:
                while time.monotonic() < deadline:
                    phase = "load"
                    DiffusionModel(path, n_threads=1, n_ctx=512).close()
                    phase = "prefill"
                    session.truncate(0)
                    session.encode([7] * 60)
                    phase = "steps"
                    for _event in session.generate(max_tokens=48, steps=6, seed=3):
                        pass
            except Stop:
                phases[phase] = phases.get(phase, 0) + 1
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    session.truncate(0)
    again = model.generate([7] * 60, session=session, max_tokens=48, steps=6, seed=3).tokens.tolist()
    assert again == expected
    assert sum(phases.values()) >= 20
    report(f"signals: {phases}")


# --- files ---


@posix
def test_a_file_that_shrinks_while_it_is_mapped(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    """Every kind of call raises an error then; the process and other models go on."""
    whole = gguf_file("tiny", "f32").read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    other = _native.Model(str(gguf_file("tiny", "f32")), n_threads=1)
    model = _native.Model(str(path), n_threads=1)
    session = _native.Session(model, 64)
    session.encode(np.arange(5, dtype=np.int32))
    before = session.denoise(np.zeros(4, dtype=np.int32), None)
    os.truncate(path, 4096)
    for call in (
        lambda: session.encode(np.arange(5, dtype=np.int32)),
        lambda: session.denoise(np.zeros(4, dtype=np.int32), None),
    ):
        with pytest.raises(ModelFormatError, match=r"model\.gguf.*truncated while in use"):
            call()
    with pytest.raises(ModelFormatError):
        _native.Model(str(path), n_threads=1)
    fresh = _native.Session(other, 64)
    fresh.encode(np.arange(5, dtype=np.int32))
    assert np.array_equal(fresh.denoise(np.zeros(4, dtype=np.int32), None), before)


@posix
def test_a_replaced_or_removed_file_stays_usable(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    """The mapped file stays until the model is dropped, whatever is at its path."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file("tiny", "f32").read_bytes())
    session = _native.Session(_native.Model(str(path), n_threads=1), 64)
    session.encode(np.arange(5, dtype=np.int32))
    before = session.denoise(np.zeros(4, dtype=np.int32), None)
    (tmp_path / "new").write_bytes(b"something else")
    (tmp_path / "new").replace(path)
    assert np.array_equal(session.denoise(np.zeros(4, dtype=np.int32), None), before)
    path.unlink()
    assert np.array_equal(session.denoise(np.zeros(4, dtype=np.int32), None), before)


@posix
@pytest.mark.parametrize("name", ["pipe", "/dev/null", "/dev/zero", "/proc/self/mem"])
def test_files_that_are_not_regular_are_refused_at_once(tmp_path: Path, name: str) -> None:
    """Opening a pipe that nobody writes to must not wait for a writer."""
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    with pytest.raises(ModelFormatError):
        _native.GgufFile(str(path))


@posix
def test_a_file_name_that_is_not_utf8(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    """It opens, and an error about it names it."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf"))
    path.write_bytes(gguf_file("tiny", "f32").read_bytes())
    tokens = []
    for each in (path, gguf_file("tiny", "f32")):
        with DiffusionModel(each, n_threads=1) as model:
            tokens.append(model.generate("the", max_tokens=2, steps=1, seed=1).tokens.tolist())
    assert tokens[0] == tokens[1]
    path.write_bytes(b"no model")
    with pytest.raises(ModelFormatError, match=re.escape("m\udcff.gguf: ")):
        DiffusionModel(path, n_threads=1)


@posix
def test_open_files_and_mappings_are_closed(gguf_file: Callable[..., Path]) -> None:
    path = str(gguf_file("tiny", "f32"))

    def n_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc: leaks of open files are NOT CHECKED")
    before = n_open()
    for _ in range(20):
        _native.Session(_native.Model(path, n_threads=1), 64).encode(np.arange(5, dtype=np.int32))
        with pytest.raises(ModelFormatError):
            _native.GgufFile(__file__)
    assert n_open() == before


# --- kill -9 ---

# Imports once, then does the work in a fork for each line that it reads; tells the fork's process id, and its
# wait status when it is gone.
FORKS = """
import os, sys
from pydiffusion import DiffusionModel, _native
from pydiffusion.convert import convert, quantize
kind, source, target = sys.argv[1:]
if kind == "save":
    model = DiffusionModel(source, n_threads=1, n_ctx=1024)
    session = model.new_session()
    session.encode([i % 500 for i in range(900)])
    work = lambda: session.save(target)
else:
    work = lambda: {"convert": convert, "quantize": quantize}[kind](source, target, "q8_0")
print("ready", flush=True)
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    print(child, flush=True)
    next(sys.stdin)  # until then nobody else gets its number
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forks:
    """A process that forks; each ``begin`` starts a child that does the work."""

    def __init__(self, kind: str, source: Path, target: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", FORKS, kind, str(source), str(target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "ready\n"

    def _go(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def begin(self) -> int:
        """Start a child; returns its process id."""
        self._go()
        return int(self._process.stdout.readline())

    def status(self) -> int:
        """Wait for the child; returns its wait status."""
        self._go()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        self._process.stdout.close()


def is_the_same(kind: str, found: bytes, expected: bytes) -> bool:
    """Whether the file equals an undisturbed run's; a session's metadata may be in another order."""
    if kind != "save" or found == expected:
        return found == expected

    def parts(data: bytes) -> tuple[object, bytes]:
        end = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:end]), data[end:]

    return found[:1] != b"a" and parts(found) == parts(expected)


def kill_at_random(kind: str, source: Path, target: Path, n: int, seed: int) -> int:
    """Kill the child ``n`` times at random moments; returns how often it had finished already."""
    draw = random.Random(seed)
    kept = {path: path.stat() for path in ([source] if source.is_file() else source.iterdir())}
    old = b"an older file"
    target.write_bytes(old)
    forks = Forks(kind, source, target)
    started = time.perf_counter()
    forks.begin()  # undisturbed, for its duration and its result
    assert forks.status() == 0
    duration = time.perf_counter() - started
    expected = target.read_bytes()
    assert expected != old
    finished = 0
    for trial in range(n):
        target.write_bytes(old)
        child = forks.begin()
        time.sleep(draw.uniform(0.0, 1.1) * duration)
        os.kill(child, signal.SIGKILL)
        status = forks.status()
        assert status in (0, signal.SIGKILL), f"trial {trial}: {status}"
        found = target.read_bytes()
        whole = is_the_same(kind, found, expected)
        assert found == old or whole, f"trial {trial}: the target is neither old nor whole"
        assert whole or status != 0, f"trial {trial}: done, and the target is the old one"
        finished += whole
        for left in target.parent.glob(".*.part"):
            left.unlink()  # a killed process can't remove its temporary file
    forks.close()
    for path, status in kept.items():
        now = path.stat()
        assert (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns), path
    return finished


def source_of(kind: str, checkpoint_folder: Callable[..., Path], gguf_file: Callable[..., Path]) -> Path:
    return checkpoint_folder("wide") if kind == "convert" else gguf_file("wide", "f32")


@posix
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convert", "quantize", "save"])
def test_killed_at_any_moment(
    kind: str,
    checkpoint_folder: Callable[..., Path],
    gguf_file: Callable[..., Path],
    tmp_path: Path,
    report: Callable[[str], None],
) -> None:
    """PYDIFFUSION_KILLS says how often; the target is the old file or the whole new one."""
    n = int(os.environ.get("PYDIFFUSION_KILLS", KILLS))
    source = source_of(kind, checkpoint_folder, gguf_file)
    finished = kill_at_random(kind, source, tmp_path / "m.gguf", n, seed=n)
    report(f"kill -9 of {kind}: {n} times, {finished} of them after the end; nothing lost")


@posix
def test_leftovers_of_a_killed_conversion_do_no_harm(
    checkpoint_folder: Callable[..., Path], gguf_file: Callable[..., Path], tmp_path: Path
) -> None:
    """A temporary file left by kill -9 does not get in the way of later conversions."""
    convert(checkpoint_folder("tiny"), tmp_path / "a.gguf", "q8_0")
    whole = (tmp_path / "a.gguf").read_bytes()
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom pydiffusion.convert import convert\n"
            "convert(sys.argv[1], sys.argv[2], 'q8_0', "
            "progress=lambda step: (print('busy', flush=True), time.sleep(60)))",
            str(checkpoint_folder("tiny")),
            str(tmp_path / "a.gguf"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout.readline() == "busy\n"
        child.kill()
    assert (tmp_path / "a.gguf").read_bytes() == whole
    assert len(list(tmp_path.glob(".*.part"))) == 1
    quantize(gguf_file("tiny", "f32"), tmp_path / "a.gguf", "q8_0")
    convert(checkpoint_folder("tiny"), tmp_path / "a.gguf", "q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == whole


# --- long runs ---

SOAK = """
import gc, sys
from pydiffusion import DiffusionModel
n = int(sys.argv[2])
model = DiffusionModel(sys.argv[1], n_threads=1)

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096

for i in range(n):
    model.generate("the road " * (1 + i % 3), max_tokens=8 + i % 9, steps=1 + i % 4, seed=i)
    if i % 10 == 0:
        events = model.stream("the", max_tokens=8, steps=3)
        next(events)  # left early
        del events
    if i % 10 == 5:
        try:
            model.generate([0] * 100)
        except Exception:
            pass
    if (i + 1) % (n // 10) == 0:
        print(resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc: memory of long runs NOT CHECKED")
def test_memory_stays_flat(gguf_file: Callable[..., Path], report: Callable[[str], None]) -> None:
    """PYDIFFUSION_SOAK says how many generations (400)."""
    n = int(os.environ.get("PYDIFFUSION_SOAK", 400))
    result = run(SOAK, gguf_file("tiny", "f32"), n, timeout=3600)
    assert result.returncode == 0, result.stderr[-800:]
    sizes = [int(line) for line in result.stdout.split()]
    assert len(sizes) == 10
    slope = np.polyfit(np.arange(5, 10), sizes[5:], 1)[0] * 10 / n  # bytes per generation, second half
    report(f"{n} generations: {sizes[0] / 1e6:.1f} MB after a tenth, {sizes[-1] / 1e6:.1f} MB at the end, "
           f"{slope:.0f} bytes per generation in the second half")  # fmt: skip
    assert sizes[-1] - sizes[4] < 2_000_000
