"""Record what the installed pydiffusion does, and compare two recordings: proof that a move changed nothing.

    python scripts/behaviour.py record before.json
    python scripts/behaviour.py compare before.json after.json

A recording holds digests of GGUF files, tensors and logits, outputs of the commands, HTTP bodies and the
public surface (values), help pages and messages (texts), and the files of the package. ``compare`` reports
differences in all three and fails on values only: texts and the list of files may change on purpose.

Everything is seeded; times, folders and versions are masked. Digests of logits depend on the CPU, so both
recordings have to come from one machine. Only the command line, the public Python API and HTTP are used.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from recording import cli, http, library, surface
from recording.record import Record

SECTIONS = {
    "surface": surface.record,
    "cli": cli.record,
    "library": library.record,
    "http": http.record,
}
_SHOWN = 240  # characters of each side of a difference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run everything and write the recording")
    recording.add_argument("output", type=Path)
    recording.add_argument("--only", choices=SECTIONS, action="append", help="of all sections, only these")
    comparing = commands.add_parser("compare", help="exit code 1 where values differ, 2 between machines")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument(
        "--accept", metavar="PATTERN", action="append", default=[], help="keys of values that may differ"
    )
    arguments = parser.parse_args()
    if arguments.command == "record":
        return record(arguments.output, arguments.only or list(SECTIONS))
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (arguments.old, arguments.new))
    return compare(old, new, arguments.accept)


def record(output: Path, sections: list[str]) -> int:
    found = Record()
    with tempfile.TemporaryDirectory(prefix="pydiffusion-behaviour-") as folder:
        found.folder = Path(folder)
        for name in sections:
            started = time.monotonic()
            SECTIONS[name](found)
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    whole = {
        "machine": _machine(),
        "sections": sections,
        "values": found.values,
        "texts": found.texts,
        "files": surface.package_files(),
    }
    output.write_text(
        json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
    )
    print(f"{output}: {len(found.values)} values, {len(found.texts)} texts", file=sys.stderr)
    return 0


def _machine() -> dict[str, Any]:
    """The platform and versions that digests of floating point numbers depend on besides pydiffusion."""
    info = Path("/proc/cpuinfo")
    flags = ""
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        flags = next((line.partition(":")[2].strip() for line in lines if line.startswith("flags")), "")
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_flags": flags,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "gguf": metadata.version("gguf"),
    }


def compare(old: dict[str, Any], new: dict[str, Any], accepted: list[str]) -> int:
    if old["machine"] != new["machine"]:
        print(f"recorded on different machines: {old['machine']} and {new['machine']}", file=sys.stderr)
        return 2
    sections = [name for name in old["sections"] if name in new["sections"]]
    print(f"compared: {', '.join(sections)}")
    for whole in (old, new):
        for kind in ("values", "texts"):
            kept = {key: each for key, each in whole[kind].items() if key.partition("/")[0] in sections}
            whole[kind] = kept
    files = [(path, None, "") for path in sorted(set(old["files"]) - set(new["files"]))]
    files += [(path, "", None) for path in sorted(set(new["files"]) - set(old["files"]))]
    for path, _, added in files:
        print(f"file {'added' if added is None else 'gone'}: {path}")
    texts = _differences(old["texts"], new["texts"])
    for key, before, after in texts:
        print(f"text {key}:\n  - {_short(before)}\n  + {_short(after)}")
    values = _differences(old["values"], new["values"])
    wrong = [found for found in values if not any(fnmatch.fnmatch(found[0], p) for p in accepted)]
    for key, before, after in wrong:
        print(f"VALUE {key}:\n  - {_short(before)}\n  + {_short(after)}")
    print(
        f"{len(old['values'])} values: {len(wrong)} differ, {len(values) - len(wrong)} differ as accepted; "
        f"{len(old['texts'])} texts: {len(texts)} differ; files: {len(files)} added or gone"
    )
    return 1 if wrong else 0


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = [*old, *(key for key in new if key not in old)]
    missing = "(missing)"
    pairs = [(key, old.get(key, missing), new.get(key, missing)) for key in keys]
    return [(key, before, after) for key, before, after in pairs if before != after]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


if __name__ == "__main__":
    sys.exit(main())
