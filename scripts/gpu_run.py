"""Run tests and benchmarks on a GPU within a time limit, the most valuable ones first.

    scripts/gpu_run.sh check   [--seconds 220]    # correctness: kernels, tests, parity, memory, sanitizer
    scripts/gpu_run.sh bench   [--seconds 400]    # speed: steps, parts of a step, prefill, whole output
    scripts/gpu_run.sh profile [--seconds 180]    # time per kernel of one step, by ncu
    scripts/gpu_run.sh all                        # all three

Links the kit built by scripts/gpu_prepare.sh (--kit, default build/gpu-kit/bundle) and installs it to a
temporary folder; without a kit, uses the installed pydiffusion. Findings are written immediately to
OUT/results.jsonl, one JSON line each, and rendered as OUT/page.md; the output of all programs goes to
OUT/log.txt. --dry-run runs everything on device="host" with a tiny model, without a network or a GPU. Exit
status: 1 if the run failed, 2 if a check failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_findings  # noqa: E402
import prebuilt  # noqa: E402

DEFAULT_SECONDS = {"check": 220.0, "bench": 400.0, "profile": 180.0, "all": 3600.0}
LAST_LINES = 25  # of a failed program's output, kept in its finding
CLOSING = 8.0  # seconds reserved for ending programs and writing the page
MODEL = "26b-a4b-q4_k_m.gguf"  # as benchmarks/gpu.py names it; kept for the next call
FOLDER_BYTES = 18_000_000_000  # that file and the models of the parity check
# Files and folders of the tree that the build reads.
SOURCES = (
    "CMakeLists.txt", "LICENSE", "README.md", "cmake", "convert", "native", "pydiffusion", "pyproject.toml",
    "scripts", "vendor",
)  # fmt: skip
# Packages that the checks import, in addition to the kit's wheels.
NEEDED = (
    "pip", "numpy", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "typer", "rich", "pytest",
    "hypothesis",
)  # fmt: skip
DEVICE_TESTS = ("test_device.py", "test_device_plan.py", "test_dense_type.py", "test_device_adapters.py")
# Tests to run under the sanitizer: sampler, sparse and dense self-conditioning, attention, expert matmuls of
# weights as they are and repacked.
SANITIZED = (
    *(
        f"test_device_kernels.py::test_{name}"
        for name in (
            "measure_equals_the_samplers[12.0-1025-{device}]",
            "measure_equals_the_samplers[0.0-31-{device}]",
            "measure_detects_nonfinite_logits[{device}]",
            "condition_drops_at_most_the_dropped_mass[0.0-{device}]",
            "condition_drops_at_most_the_dropped_mass[0.01-{device}]",
            "attention_kernel[q8_0-256-8-{device}]",
            "expert_matmul[Q4_K-cuda-200-{device}]",
            "expert_matmul[Q4_K-cuda-320-{device}]",
            "expert_matmul[Q6_K-cuda-200-{device}]",
            "expert_matmul[Q6_K-cuda-320-{device}]",
            "expert_matmul[Q8_0-cuda-200-{device}]",
            "expert_matmul[Q8_0-cuda-320-{device}]",
        )
    ),
)
# Under memcheck only: racecheck fails on it with an internal error.
MEMCHECKED = "test_dense_type.py::test_equals_a_file_of_these_types[{device}-q4_k_m]"


class RunError(Exception):
    """The run can't continue; the message says why and what to do."""


class Run:
    """One run: its time limit, its output folder, and the programs that it starts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.time()
        self.out: Path = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.results = self.out / "results.jsonl"
        self.log = self.out / "log.txt"
        # Results of earlier calls:
        self.n_before = len(gpu_findings.read(self.results))
        self.log_before = self.log.stat().st_size if self.log.exists() else 0
        self.device = "host" if options.dry_run else options.device
        self.commit = options.commit or prebuilt.commit_here()
        self.folder = Path(tempfile.mkdtemp(prefix="pydiffusion-gpu-", dir=options.folder))
        self.site = self.folder / "site"
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.site), str(SCRIPTS)]),
            "PYTHONUNBUFFERED": "1",
            gpu_findings.VARIABLE: str(self.results),
        }
        os.environ[gpu_findings.VARIABLE] = str(self.results)

    def left(self) -> float:
        return self.options.seconds - (time.time() - self.started) - CLOSING

    def say(self, text: str) -> None:
        print(f"{time.time() - self.started:5.0f} s  {text}", flush=True)

    @contextmanager
    def program(self, log: Path, command: list[str], **env: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a program in its own process group during the block, with its output appended to the log."""
        process = None
        try:
            with log.open("ab") as file, held_signals():
                file.write(f"\n$ {' '.join(command)}\n".encode())
                file.flush()
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    env={**self.env, **env}, cwd=self.folder, start_new_session=True,
                )  # fmt: skip
            yield process
        finally:  # also on Ctrl-C
            if process is not None:
                end_group(process)

    def step(self, name: str, command: list[str], needs: float, **env: str) -> bool:
        """Run a program until it ends or time is up, and record the outcome as a finding."""
        if self.left() < needs:
            self.say(f"{name}: skipped, it takes about {needs:.0f} s and {self.left():.0f} s are left")
            gpu_findings.add(name, skipped=f"it takes about {needs:.0f} s, and {self.left():.0f} were left")
            return False
        self.say(name)
        began = time.time()
        log_begin = self.log.stat().st_size if self.log.exists() else 0
        code: int | None = None
        with self.program(self.log, command, **env) as process, suppress(subprocess.TimeoutExpired):
            code = process.wait(max(1.0, self.left()))
        seconds = round(time.time() - began, 1)
        if code is None:
            text = f"the time was up after {seconds} s; findings until then are kept"
            gpu_findings.add(name, ok=False, seconds=seconds, text=text)
            self.say(f"{name}: {text}")
            return False
        figures: dict[str, Any] = {"ok": code == 0, "seconds": seconds}
        if code != 0:
            last = text_from(self.log, log_begin).splitlines()[-LAST_LINES:]
            figures |= {"exit": code, "text": "\n".join(last)}
            self.say(f"{name}: exit {code}, see {self.log}")
        gpu_findings.add(name, **figures)
        return code == 0

    # Machine and installation

    def check_machine(self) -> None:
        """Record the machine as a finding; raises RunError if it is not suitable."""
        fields = "name,compute_cap,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
        smi = output_lines("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
        free = shutil.disk_usage(self.options.folder).free
        kept = self.options.folder / MODEL
        needed = FOLDER_BYTES - (kept.stat().st_size if kept.is_file() else 0)
        gpu_findings.add(
            "run", call=self.options.call, GPUs=smi, CPUs=os.cpu_count(), python=platform.python_version(),
            libc=" ".join(platform.libc_ver()), compiler=prebuilt.compiler_here(), commit=self.commit,
            folder=str(self.options.folder), free_bytes=free, device=self.device,
        )  # fmt: skip
        if self.options.dry_run:
            return
        if not smi:
            raise RunError("nvidia-smi finds no GPU: use a machine with an NVIDIA driver, or --dry-run")
        self.require_capability([line.split(", ")[1] for line in smi])
        if free < needed:
            raise RunError(
                f"{self.options.folder} has {free / 1e9:.1f} GB free, but the models need another "
                f"{needed / 1e9:.0f} GB: choose another folder with --folder"
            )

    def require_capability(self, capabilities: list[str]) -> None:
        """Raise RunError if the kit has no code for any of these compute capabilities ("9.0")."""
        if not (self.options.kit / prebuilt.MANIFEST).is_file():
            return
        flags = prebuilt.read_manifest(self.options.kit)["flags"]
        built = re.search(r"CMAKE_CUDA_ARCHITECTURES=([^\s,]+)", flags)
        if built and not any(runs_on(built.group(1), one) for one in capabilities):
            raise RunError(
                f"the GPU has compute capability {' or '.join(capabilities)}, but the kit is built for "
                f"{built.group(1)}: build it again with scripts/gpu_prepare.sh --architectures"
            )

    def install(self) -> None:
        """Build the bindings with the kit and install to ``site``, or check the installed pydiffusion."""
        kit: Path = self.options.kit
        if (kit / prebuilt.MANIFEST).is_file():
            missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
            if missing:
                raise RunError(f"{sys.executable} has no {', '.join(missing)}: install them, or set PYTHON")
            self.build(kit)
        elif importlib.util.find_spec("pydiffusion") is None:
            raise RunError(
                f"neither a kit in {kit} nor an installed pydiffusion: build a kit with "
                "scripts/gpu_prepare.sh, or install pydiffusion with CUDA (docs/gpu.md)"
            )
        code = "import pydiffusion; print(' '.join(one.name for one in pydiffusion.devices()))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode != 0:
            raise RunError(f"importing pydiffusion failed: {(done.stderr.splitlines() or ['?'])[-1]}")
        if self.device not in [*done.stdout.split(), "host"]:
            raise RunError(
                f"pydiffusion has no device {self.device}, only: {done.stdout.strip() or 'no GPU'}. Check "
                "that it is built for CUDA (docs/gpu.md), that the driver supports CUDA 13, and --device"
            )

    def build(self, kit: Path) -> None:
        archives = self.folder / "archives"
        prebuilt.unpack(kit, archives)
        prebuilt.check(archives, prebuilt.compiler_here(), kit)
        tree = self.folder / "tree"  # a copy: CMake and pip write to the source tree
        for name in SOURCES:
            if (ROOT / name).is_dir():
                left_out = shutil.ignore_patterns("__pycache__", *(["ggml"] if name == "vendor" else []))
                shutil.copytree(ROOT / name, tree / name, ignore=left_out)
            else:
                tree.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, tree / name)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
        pip += ["--no-deps", "--upgrade", "--target", str(self.site)]
        wheels = sorted(map(str, (kit / "wheels").glob("*.whl")))
        build = ["--no-build-isolation", f"-Ccmake.define.PYDIFFUSION_PREBUILT={archives}", "-v", str(tree)]
        if not (self.step("install wheels", [*pip, *wheels], 5) and self.step("build", [*pip, *build], 20)):
            why = cmake_error(text_from(self.log, self.log_before))
            raise RunError(why or f"building the bindings failed: see {self.log}")

    def python(self, script: str | Path, *arguments: object) -> list[str]:
        return [sys.executable, str(script), *map(str, arguments)]

    # Commands

    def check(self) -> None:
        write = self.python(ROOT / "benchmarks/gpu.py", "--write-only", *self.model(), *self.types())
        try:
            with self.program(self.out / "write.txt", write):  # in parallel with the tests
                self.step("kernels' tests", self.pytest("test_device_kernels.py"), 10)
                tests = self.pytest(*DEVICE_TESTS)
                self.step("device tests", tests, 15)
                parity = ["--device", self.device, "--folder", self.folder]
                if self.options.dry_run:
                    parity += ["--models", "tiny", "--types", "f32", "q4_k_m"]
                self.step("parity", self.python(SCRIPTS / "gpu_parity.py", *parity), 20)
                self.benchmark("the 26B", 30, "--only", "steps", "--prompts", "128", "--timed", "4")
                self.sanitize()
                if self.device == "CUDA0":  # ggml splits one GPU into two devices
                    tests = self.pytest("test_device.py", "test_device_plan.py", device="CUDA1")
                    self.step("tests of two devices", tests, 15, GGML_CUDA_DEVICES="2")
        finally:
            for part in self.options.folder.glob(".26b-a4b-*.part"):  # left by an aborted writer
                part.unlink(missing_ok=True)

    def pytest(self, *files: str, device: str | None = None) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_findings", "-p", "no:cacheprovider"]
        command += ["-o", "addopts=", "-m", "not slow", "-k", device or self.device]
        if importlib.util.find_spec("xdist") is not None:  # if ggml aborts, only one worker dies
            command += ["-n", str(min(6, os.cpu_count() or 1))]
        return [*command, *(str(ROOT / "tests/gpu" / file) for file in files)]

    def sanitize(self) -> None:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if self.options.dry_run or not Path(tool).exists():
            why = "no GPU in a dry run" if self.options.dry_run else "compute-sanitizer is not installed"
            gpu_findings.add("sanitizer", skipped=why)
            return
        pytest = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
        # Ignore races that racecheck reports in cuBLAS's own kernels.
        others = ["--kernel-name-exclude", "kernel_substring=nvjet"]
        for check, names in (("memcheck", (*SANITIZED, MEMCHECKED)), ("racecheck", SANITIZED)):
            tests = [f"{ROOT}/tests/gpu/{name.format(device=self.device)}" for name in names]
            command = [tool, "--tool", check, *others, "--error-exitcode", "9", *pytest, *tests]
            self.step(f"sanitizer {check}", command, 15)

    def benchmark(self, name: str, needs: float, *more: str) -> bool:
        """Run benchmarks/gpu.py, with more arguments if given."""
        command = self.python(
            ROOT / "benchmarks/gpu.py", *self.model(), *self.types(), "--device", self.device,
            "--results", self.results,
            "--seconds", max(1.0, self.left() - 2.0), "--commit", self.commit, "--no-page", *more,
        )  # fmt: skip
        return self.step(name, command, needs)

    def model(self) -> list[str]:
        """Arguments of benchmarks/*.py for the synthetic model; the 26B's file is kept for later calls."""
        if self.options.dry_run:
            return ["--shape", "tiny", "--folder", str(self.folder)]
        return ["--shape", "26b-a4b", "--folder", str(self.options.folder)]

    def types(self) -> list[str]:
        return [] if self.options.dry_run else ["--types", *self.options.types]

    def bench(self) -> None:
        self.benchmark("bench", 20, *(["--prompts", "16", "--timed", "2"] if self.options.dry_run else []))

    def profile(self) -> None:
        script = ROOT / "benchmarks/gpu_kernels.py"
        run = self.python(script, *self.model(), "--device", self.device)
        ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
        if self.options.dry_run or not Path(ncu).exists():
            gpu_findings.add(
                "profile", skipped="no GPU in a dry run" if self.options.dry_run else "ncu is not installed"
            )
            return
        csv = self.out / "ncu.csv"
        csv.unlink(missing_ok=True)
        command = [ncu, "--clock-control", "none", "--metrics", "gpu__time_duration.sum", "--csv"]
        command += ["--cache-control", "none", "--profile-from-start", "off", "--log-file", str(csv), *run]
        self.step("profile", command, 60, GGML_CUDA_DISABLE_GRAPHS="1")
        if csv.exists():  # on failure it has ncu's error
            results = ["--results", self.results, "--commit", self.commit]
            self.step("kernels", self.python(script, "table", csv, *results), 1)

    def page(self) -> int:
        """Write OUT/page.md from all findings, print a summary, and return the number of new failures."""
        lines = output_lines(sys.executable, str(ROOT / "benchmarks/gpu_page.py"), str(self.results))
        new = self.out / "page.md.new"
        new.write_text("\n".join(lines or ["no page: benchmarks/gpu_page.py failed on results.jsonl"]) + "\n")
        new.replace(self.out / "page.md")
        found = gpu_findings.read(self.results)[self.n_before :]
        failed = [entry for entry in found if entry.get("ok") is False or "error" in entry]
        for entry in failed:
            what = entry.get("test") or entry.get("what") or entry.get("error") or entry.get("text") or ""
            print(f"FAILED {entry['finding']}: {what.splitlines()[0] if what else ''}")
        skipped = [entry for entry in found if "skipped" in entry]
        for entry in skipped:
            print(f"SKIPPED {entry['finding']}: {entry['skipped']}")
        self.say(f"{len(found)} findings, {len(failed)} failed, {len(skipped)} skipped: {self.out}")
        kept = self.options.folder / MODEL
        if kept.is_file():
            print(f"kept for the next call: {kept} ({kept.stat().st_size / 1e9:.1f} GB)")
        return len(failed)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def runs_on(architectures: str, capability: str) -> bool:
    """Return whether code for CMake's architectures ("80-real;90a-real") runs on a GPU."""
    number = int(capability.replace(".", ""))
    for one in architectures.split(";"):
        digits = int("".join(filter(str.isdigit, one)) or 0)
        # "90a-real" runs on 9.0 only, "86-real" on 8.6 and later 8.x, PTX on all later ones. Names without a
        # number ("all") are assumed to run on any GPU.
        specific = "a" in one.partition("-")[0] and digits > 0
        same_major = digits // 10 == number // 10 or "real" not in one
        if digits == number or (not specific and digits < number and (same_major or digits == 0)):
            return True
    return False


@contextmanager
def held_signals() -> Iterator[None]:
    """Delay SIGINT and SIGTERM to the end of the block: ``Popen`` loses its program if one interrupts it."""
    arrived: list[int] = []
    held = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, _: arrived.append(got)) for number in held]
    try:
        yield
    finally:
        for number, handler in zip(held, before, strict=True):
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a program and all processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(2)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def output_lines(*command: str) -> list[str]:
    """Return a command's output; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def cmake_error(text: str) -> str | None:
    """Return CMake's last error in a log as one line, without wrapping and indentation."""
    found = re.findall(r"CMake Error at [^\n]*:\n((?: +[^\n]*\n|\n)+)", text)
    return " ".join(found[-1].split()) if found else None


def text_from(log: Path, begin: int) -> str:
    """Return a log's text from byte ``begin`` on; empty if there is no log."""
    return log.read_bytes()[begin:].decode(errors="replace") if log.exists() else ""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", choices=list(DEFAULT_SECONDS))
    parser.add_argument("--seconds", type=float, help="time limit of the run")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--kit", type=Path, default=ROOT / "build/gpu-kit/bundle")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="for models of up to 17 GB")
    parser.add_argument("--device", default="CUDA0")
    parser.add_argument(
        "--types", nargs="+", default=["q4_k_m"], help="of the 26B's weights, for bench and check"
    )
    parser.add_argument("--commit", help="of the tree, if git is not available")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    options.seconds = options.seconds or DEFAULT_SECONDS[options.call]
    options.kit, options.folder = options.kit.resolve(), options.folder.resolve()
    return options


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run = Run(options)
    except OSError as error:
        print(f"gpu_run: {error}: --out and --folder must be writable folders", file=sys.stderr)
        return 1
    code, n_failed = 0, 0
    try:
        run.check_machine()
        run.install()
        # bench fills the time that is left, profile is short
        for call in ("check", "profile", "bench") if options.call == "all" else (options.call,):
            getattr(run, call)()
    except (RunError, prebuilt.KitError, OSError, subprocess.SubprocessError) as error:
        gpu_findings.add("run ended", ok=False, text=str(error))
        print(f"gpu_run: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        gpu_findings.add("run ended", ok=False, text="interrupted")
        code = 130
    finally:
        n_failed = run.page()
        run.close()
    return code or (2 if n_failed else 0)


if __name__ == "__main__":
    raise SystemExit(main())
