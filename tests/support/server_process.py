"""Run `pydiffusion serve` in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def process(file: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "pydiffusion", "serve", "-m", str(file), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as running:
        try:
            assert running.stderr is not None
            for line in running.stderr:
                if found := re.search(r"serving on (http://\S+)", line):
                    yield running, found[1]
                    break
            else:
                raise AssertionError("the server ended before it was up")
        finally:
            running.kill()
