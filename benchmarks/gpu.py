"""Benchmark a model on a GPU within a time budget and print the results as Markdown.

python benchmarks/gpu.py [--types q4_k_m ...] [--seconds 400] [--results results.jsonl] [--folder DIR ...]
python benchmarks/gpu.py --write-only            # only write the synthetic file for later runs
python benchmarks/gpu.py page results.jsonl      # only print the page

One process loads the model once (synthetic: the 26B's shape with random weights; or --model FILE) and runs
these measurements, the most valuable first: machine, rates, load, first-step, steps:128 to steps:32768,
peaked:50 to peaked:900, answer, determinism, batch:4, batch:8, file-types, ggml-kernels, graphs-off,
cpu-experts, memory:24 to memory:8 (loaded into so many GiB of the GPU). Each finding is written to the
results immediately, as a JSON line. Measurements that would exceed the time left are skipped, failures don't
end the run, and --resume continues an interrupted run without the measurement that ended its process. Exit
status: 0, even if time ran out; 3 if failures ended the run. --shape tiny --device host runs without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gpu_page
from gpu_measure import Bench, Figures, Skipped, cost_of, is_cancelled, machine

from pydiffusion import devices
from pydiffusion._util.atomic import require_free_space
from pydiffusion._util.cpus import step_threads
from pydiffusion.errors import ConversionError
from pydiffusion.testing.synthetic import SHAPES, synthetic_bytes, write_synthetic

try:
    import fcntl
except ImportError:  # Windows: no locking
    fcntl = None  # type: ignore[assignment]

MAX_FAILURES = 3  # consecutive: after a fault, every call on the CUDA context fails
GRACE = 20.0  # seconds for a cancelled measurement to return
ALWAYS = (
    "machine",
    "load",
    "first-step",
)  # needed by later measurements, so repeated with --resume and --only


# Findings


class Results:
    """File of findings; every line is on disk when add() returns."""

    def __init__(self, path: Path, common: Figures) -> None:
        self.path, self.common = path, common
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")  # end a line truncated by a crash

    def add(self, finding: str, **figures: Any) -> None:
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps({"when": when, "finding": finding, **self.common, **figures}, default=float)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The synthetic file


@contextlib.contextmanager
def locked(path: Path, left: Callable[[], float]) -> Iterator[None]:
    """Hold the lock of a file's writer; the system releases it if the holder dies."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        waited = False
        while fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    say(f"waiting for another process that writes {path}")
                waited = True
                if left() <= 0:
                    raise TimeoutError(f"{path}: another process was still writing it") from None
                time.sleep(0.1)
        yield


def synthetic_file(shape: str, type_name: str, folders: Sequence[Path], left: Callable[[], float]) -> Path:
    """Return the synthetic file from the first folder that has it, or write it to the first with space."""
    n_bytes = synthetic_bytes(shape, type_name)
    refused = []
    for folder in folders:
        path = folder / f"{shape}-{type_name}.gguf"
        if not folder.is_dir():
            refused.append(f"{folder}: no such folder")
            continue
        with locked(path, left):
            if path.is_file() and path.stat().st_size == n_bytes:
                return path
            try:
                require_free_space(folder, n_bytes)
            except ConversionError as error:
                refused.append(str(error))
                continue
            say(f"writing {path} ({n_bytes / 1e9:.1f} GB)")
            started = time.monotonic()
            write_synthetic(shape, path, type_name)
            say(f"written in {time.monotonic() - started:.1f} s")
            return path
    raise ConversionError(
        f"no room for the {n_bytes / 1e9:.1f} GB of {shape}-{type_name}.gguf: {'; '.join(refused)}. Free "
        "some space, or choose other folders: --folder DIR ..."
    )


# The run


class Run:
    """Runs the measurements in order within the time budget."""

    def __init__(self, arguments: argparse.Namespace, results: Results) -> None:
        self.arguments, self.results = arguments, results
        self.ends = arguments.started + arguments.seconds
        self.finished = gpu_page.finished(gpu_page.read(results.path)) if arguments.resume else set()
        self.current = ""
        self.n_failures = 0  # consecutive
        self.left_out: list[str] = []
        self.bench: Bench | None = None
        self.over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def left(self) -> float:
        return self.ends - time.time()

    def _watch(self) -> None:
        """When the time is up, cancel the current measurement; after a grace period, end the process."""
        if self.over.wait(max(0.0, self.left())):
            return
        session = self.bench.session if self.bench else None
        if session is not None and self.current:
            session.cancel()
        if self.over.wait(GRACE):
            return
        self.results.add(self.current, error=f"did not end {GRACE:.0f} s after the time was up")
        say(f"{self.current} did not end {GRACE:.0f} s after the time was up; the process ends")
        os._exit(1)

    def measure(self, name: str, call: Callable[[], Figures], cost: float) -> bool:
        """Run a measurement and add its finding; return whether it succeeded."""
        a = self.arguments
        if a.only and name not in ALWAYS and not any(name == o or name.startswith(o + ":") for o in a.only):
            return False
        key = (name, self.results.common.get("type"), a.variant)
        if key in self.finished and name not in ALWAYS:
            return False
        if self.n_failures >= MAX_FAILURES:
            self.results.add(name, skipped=f"{MAX_FAILURES} measurements before it failed")
            return False
        if cost > self.left():
            self.results.add(
                name, skipped=f"the time was up: {self.left():.0f} s left, about {cost:.0f} needed"
            )
            self.left_out.append(name)
            return False
        say(f"[{time.time() - a.started:5.1f} s] {name}, about {cost:.0f} s")
        self.results.add(name, begun=True)
        self.current = name
        started = time.monotonic()
        try:
            figures = call()
        except Skipped as reason:
            self.results.add(name, skipped=str(reason))
            return False
        except Exception as error:
            return self._failed(name, error)
        finally:
            self.current = ""
        self.n_failures = 0
        self.results.add(name, took=time.monotonic() - started, **figures)
        return True

    def _failed(self, name: str, error: Exception) -> bool:
        if is_cancelled(error) and self.left() <= 0:
            self.results.add(name, skipped="the time was up while it ran")
            self.left_out.append(name)
            return False
        traceback.print_exc()
        text = "".join(traceback.format_exception(error))
        self.n_failures += 1
        self.results.add(
            name, error=f"{type(error).__name__}: {error}", in_a_row=self.n_failures, traceback=text
        )
        if self.n_failures == MAX_FAILURES:
            say(
                f"{MAX_FAILURES} consecutive measurements failed, the last with {error}. After a GPU fault "
                "no call works in this process, so the rest is skipped; use --resume to continue"
            )
        return False

    def measure_type(self, type_name: str) -> None:
        """Run all measurements of one file."""
        a = self.arguments
        self.results.common["type"] = type_name
        try:
            file = a.model or synthetic_file(a.shape, type_name, a.folder, self.left)
        except (ConversionError, TimeoutError) as error:
            self.results.add("load", error=str(error))
            say(str(error))
            self.left_out.append(f"all of {type_name}")
            return
        bench = self.bench = Bench(file, a, self.left)
        self.measure("rates", bench.rates, cost_of("rates", bench))
        if not (
            self.measure("load", bench.load, cost_of("load", bench))
            and self.measure("first-step", bench.first_step, cost_of("first-step", bench))
        ):
            self.left_out.append("all that needs the model")
            return
        for name, call in self.with_model(bench, type_name):
            self.measure(name, call, cost_of(name, bench))
        self.bench = None

    def with_model(self, bench: Bench, type_name: str) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """Yield the measurements of a loaded model, the most valuable first."""
        a = self.arguments
        for prompt in a.prompts:
            yield f"steps:{prompt}", lambda prompt=prompt: bench.steps(prompt)
        for n_kept in a.kept:
            yield f"peaked:{n_kept}", lambda n_kept=n_kept: bench.peaked(n_kept)
        yield "answer", bench.answer
        yield "determinism", bench.determinism
        for n in a.batches:
            yield f"batch:{n}", lambda n=n: bench.batch(n, a.peaked_prompt)
        yield "file-types", lambda: bench.file_types(a.peaked_prompt)
        yield "ggml-kernels", lambda: bench.ggml_kernels(a.peaked_prompt)
        yield "graphs-off", lambda: self.graphs_off(type_name)
        if a.cpu_experts:
            yield "cpu-experts", lambda: bench.cpu_experts(a.cpu_experts, a.peaked_prompt)
        for gib in a.memory_limits:
            yield f"memory:{gib}", lambda gib=gib: bench.memory_limit(gib, a.memory_context)

    def graphs_off(self, type_name: str) -> Figures:
        """Time steps in another process without CUDA graphs: ggml reads the switch once per process."""
        a, bench = self.arguments, self.bench
        if not devices():
            raise Skipped("no GPU")
        if "GGML_CUDA_DISABLE_GRAPHS" in os.environ:
            raise Skipped("GGML_CUDA_DISABLE_GRAPHS is set: the whole run is without CUDA graphs")
        bench.model = bench.session = None  # frees its memory; the next measurement loads it again
        given = ["--model", str(bench.file)] if a.model else ["--types", type_name, "--shape", a.shape]
        command = [
            sys.executable, __file__, *given, "--variant", "graphs-off", "--only", f"steps:{a.peaked_prompt}",
            "--prompts", str(a.peaked_prompt), "--answer", ":".join(map(str, a.answer)), "--no-page",
            "--seconds", str(a.seconds), "--started", str(a.started), "--timed", str(a.timed),
            "--device", a.device, "--threads", str(a.threads), "--results", str(a.results),
            "--commit", a.commit, "--folder", *map(str, a.folder),
        ]  # fmt: skip
        environment = {**os.environ, "GGML_CUDA_DISABLE_GRAPHS": "1"}
        done = subprocess.run(
            command, env=environment, check=False, timeout=max(1.0, self.left()) + GRACE / 2
        )
        if done.returncode:
            raise RuntimeError(f"the process without CUDA graphs exited with {done.returncode}")
        return {"see": f"steps:{a.peaked_prompt} of the variant graphs-off"}

    def run(self) -> int:
        """Run everything; return the exit status, 3 if failures ended the run."""
        a = self.arguments
        try:
            self.measure("machine", lambda: machine(a.threads), 1.0)
            for type_name in ["given"] if a.model else a.types:
                self.measure_type(type_name)
        finally:
            self.over.set()
        if self.left_out:
            say(f"left out: {', '.join(self.left_out)} (--resume continues from here)")
        return 3 if self.n_failures >= MAX_FAILURES else 0


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def pair(text: str) -> tuple[int, int]:
    prompt, _, tokens = text.partition(":")
    return int(prompt), int(tokens)


def default_folder() -> Path:
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for file and device, shared with gpu_kernels.py."""
    parser.add_argument("--shape", choices=SHAPES, default="26b-a4b", help="shape of the synthetic file")
    parser.add_argument("--model", type=Path, help="use this file instead of a synthetic one")
    parser.add_argument(
        "--folder", type=Path, nargs="+", default=[default_folder()],
        help="folders for the synthetic file: the first that has it or has space (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, CUDA0, CUDA0,CUDA1, host")
    parser.add_argument("--threads", type=int, default=step_threads().n)
    parser.add_argument("--results", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--commit", default=None, help="commit to name on the page (default: git's HEAD)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--types", nargs="+", default=["q4_k_m"])
    parser.add_argument("--write-only", action="store_true", help="write the synthetic files and exit")
    parser.add_argument("--seconds", type=float, default=400.0, help="time budget, counted from --started")
    parser.add_argument("--started", type=float, default=None, help="epoch seconds (default: now)")
    parser.add_argument("--only", nargs="+", default=[], help="names of measurements, with or without :N")
    parser.add_argument("--variant", default="", help="label for all findings, naming this build or run")
    parser.add_argument(
        "--resume", action="store_true", help="skip measurements that the results already have"
    )
    parser.add_argument("--prompts", nargs="+", type=int, default=[128, 1024, 4096, 32_768])
    parser.add_argument("--timed", type=int, default=20, help="steps to time after each prompt")
    parser.add_argument(
        "--kept",
        nargs="*",
        type=int,
        default=[50, 300, 900],
        help="tokens kept per position, for peaked logits",
    )
    parser.add_argument("--peaked-prompt", type=int, default=1024)
    parser.add_argument("--answer", type=pair, default=(1024, 1024), metavar="PROMPT:TOKENS")
    parser.add_argument("--steps", type=int, default=16, help="steps per canvas in the measurement answer")
    parser.add_argument("--cpu-experts", type=int, default=2, help="layers with experts on the CPU")
    parser.add_argument("--batches", nargs="*", type=int, default=[4, 8], help="sessions in one graph")
    parser.add_argument(
        "--memory-limits", nargs="*", type=int, default=[24, 16, 12, 8], help="GiB of the GPU to load into"
    )
    parser.add_argument("--memory-context", type=int, default=8192, help="context for --memory-limits")
    parser.add_argument("--page", type=Path, help="write the page to this file instead of printing it")
    parser.add_argument("--no-page", action="store_true")
    arguments = parser.parse_args(argv)
    arguments.started = arguments.started or time.time()
    arguments.commit = arguments.commit or commit()
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["page"]:
        return gpu_page.main(args[1:])
    arguments = parse(args)
    if arguments.write_only:
        ends = arguments.started + arguments.seconds
        try:
            for type_name in arguments.types:
                print(
                    synthetic_file(arguments.shape, type_name, arguments.folder, lambda: ends - time.time())
                )
        except (ConversionError, TimeoutError) as error:
            say(str(error))
            return 1
        return 0
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.enable()  # ggml aborts on a fault: print a traceback
    common: Figures = {"commit": arguments.commit, "shape": None if arguments.model else arguments.shape}
    if arguments.variant:
        common["variant"] = arguments.variant
    results = Results(arguments.results, common)
    status = Run(arguments, results).run()
    if arguments.page or not arguments.no_page:
        text = gpu_page.page(gpu_page.read(arguments.results))
        if arguments.page:
            arguments.page.write_text(text, encoding="utf-8")
        else:
            print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
