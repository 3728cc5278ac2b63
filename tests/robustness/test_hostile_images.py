"""Near-valid image files at random, in a process of their own: decoded or refused, never a crash."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from support.paths import REPOSITORY

TESTS = REPOSITORY / "tests"


@pytest.mark.parametrize(
    ("n_files", "seconds"), [(2_000, 10), pytest.param(50_000, 300, marks=pytest.mark.slow)]
)
def test_near_valid_files(n_files: int, seconds: int, report: Callable[[str], None]) -> None:
    code = f"import sys; sys.path.append({str(TESTS)!r}); from support.image_fuzz import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "18", str(n_files), str(seconds)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds + 120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    decoded, refused, megabytes = map(int, done.stdout.split())
    assert decoded > 50 and refused > 50
    # Four copies of 100 million pixels, the limit, where one is composited on white.
    assert megabytes < 1900
    report(f"hostile images: {decoded} files decoded, {refused} refused, at most {megabytes} MB")
