"""Mutate the CUDA kernels' source line by line, and see whether their tests notice.

    cmake --preset test && cmake --build --preset test
    python scripts/mutate_kernels.py [--build build/test] [--header backend/cuda/step_kernels.cuh]
        [--test NAME] [--only PATTERN]

Barriers are removed and masks and bounds changed, one at a time; the test (of native/tests/NAME_test.cpp) is
compiled with the mutated header and run by the emulation. With ``--build build/asan`` also an access out of
bounds is noticed. Prints every mutation with what became of it; exit code 1 if one survived. The C++ tests
themselves mutate barriers, the warps' masks and waits for copies at run time, in seconds; this takes minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# (pattern, replacement) of code; comments are left alone.
MUTATIONS = (
    (r"__sync(?:threads|warp)\(\w*\);", ";"),
    (r"\bkAllLanes\b(?=,)", "(kAllLanes >> 1)"),
    (r"\bkAllLanes\b(?=,)", "(kAllLanes << 1)"),
    (r"\(1u << lane\) - 1\b", "(2u << lane) - 1"),
    (r"\(1u << lane\) - 1\b", "(1u << lane)"),
    (r"__ffs\((\w+)\) - 1", r"31 - __clz(\1)"),
    (r"31 - __clz\((\w+)\)", r"__ffs(\1) - 1"),
    (r"(\b(?:i|c|r|base|lane|warp|threadIdx\.x)) < ", r"\1 <= "),
    (r"(\b(?:i|c|r|lane|begin)) >= ", r"\1 > "),
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A changed line of a source file."""

    line: int
    before: str
    after: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    lines = source.splitlines()
    for number, line in enumerate(lines, 1):
        if "constexpr" in line or "<<<" in line:
            continue
        code = line.split("//")[0]
        for pattern, replacement in MUTATIONS:
            for found in re.finditer(pattern, code):
                after = line[: found.start()] + found.expand(replacement) + line[found.end() :]
                changed = [*lines[: number - 1], after, *lines[number:]]
                yield Mutant(number, line.strip(), after.strip(), "\n".join(changed) + "\n")


class Build:
    """The commands that built a test, for another header."""

    def __init__(self, folder: Path, test: str) -> None:
        self.folder = folder
        commands = json.loads((folder / "compile_commands.json").read_text(encoding="utf-8"))
        source = f"native/tests/{test}_test.cpp"
        self.compile = next(
            shlex.split(c["command"])
            for c in commands
            if c["file"].endswith(source) and "pydiffusion_tests.dir" in c["command"]
        )
        self.object = self.compile[self.compile.index("-o") + 1]
        printed = subprocess.run(
            ["ninja", "-C", str(folder), "-t", "commands", "pydiffusion_tests"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        words = shlex.split(printed.splitlines()[-1].removeprefix(": && ").removesuffix(" && :"))
        # Only this test and what it needs.
        self.link = [w for w in words if not w.endswith("_test.cpp.o")]

    def outcome(self, header: str, mutant: Mutant, seconds: float) -> str:
        """Either "survived", or how the mutant was noticed."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / header).parent.mkdir(parents=True)
            (folder / header).write_text(mutant.source, encoding="utf-8")
            made, program = folder / "test.o", folder / "test"
            command = [self.compile[0], f"-I{folder}", "-w", *self.compile[1:]]
            command = [str(made) if w == self.object else w for w in command]
            if subprocess.run(command, cwd=self.folder, capture_output=True, check=False).returncode:
                return "does not compile"
            link = [str(program) if w.endswith("/pydiffusion_tests") else w for w in self.link]
            subprocess.run([*link[:1], str(made), *link[1:]], cwd=self.folder, check=True)
            try:
                run = subprocess.run(
                    [str(program), "--abort-after=1"], capture_output=True, timeout=seconds, check=False
                )
            except subprocess.TimeoutExpired:
                return "noticed: does not end"
            return f"noticed: exit code {run.returncode}" if run.returncode else "survived"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "test")
    parser.add_argument("--header", default="backend/cuda/step_kernels.cuh")
    parser.add_argument("--test", default="step_kernels")
    parser.add_argument("--only", default="", help="mutants whose changed line matches this pattern")
    parser.add_argument("--seconds", type=float, default=300, help="for each run")
    options = parser.parse_args(arguments)
    build = Build(options.build.resolve(), options.test)
    n_survived = 0
    for mutant in mutants((ROOT / "native" / options.header).read_text(encoding="utf-8")):
        if not re.search(options.only, mutant.after):
            continue
        outcome = build.outcome(options.header, mutant, options.seconds)
        n_survived += outcome == "survived"
        print(
            f"{options.header}:{mutant.line}: {outcome}\n    {mutant.before}\n    {mutant.after}", flush=True
        )
    print(f"{n_survived} survived")
    return 1 if n_survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
