"""Findings of a GPU run: one JSON line each, written immediately so that none is lost if the run ends early.

As a pytest plugin (``-p gpu_findings``), writes a finding for each test that did not pass, and the counts.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

VARIABLE = "PYDIFFUSION_FINDINGS"


def add(finding: str, **figures: Any) -> dict[str, Any]:
    """Return a finding, appended to the file named by the environment variable if it is set."""
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entry = {"when": when, "finding": finding, **figures}
    path = os.environ.get(VARIABLE)
    if path:
        # A single write per line: several processes append to the file.
        line = json.dumps(entry, default=str) + "\n"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
    return entry


def read(*paths: Path) -> list[dict[str, Any]]:
    """Return all findings of existing files; skips lines truncated by a crash."""
    entries = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and "finding" in entry:
                entries.append(entry)
    return entries


# pytest hooks. With pytest-xdist, only the controller process writes findings.

_counts: dict[str, int] = {}
_what = ""  # files and -k expression of this run
_worker = False
_MAX_TEXT = 3000  # last characters kept of a failure's text


def pytest_configure(config: Any) -> None:
    global _what, _worker
    _worker = hasattr(config, "workerinput")
    _what = f"{' '.join(Path(one).name for one in config.args)} -k {config.option.keyword}"
    if not _worker:
        add("tests", what=_what, begun=True)


def pytest_runtest_logreport(report: Any) -> None:
    if _worker:
        return
    if report.when == "call" or report.outcome != "passed":
        _counts[f"n_{report.outcome}"] = _counts.get(f"n_{report.outcome}", 0) + 1
    if report.outcome == "failed":
        text = report.longreprtext[-_MAX_TEXT:]
        add("test failed", test=report.nodeid, of=_what, ok=False, text=text)
    elif report.outcome == "skipped":
        add("test skipped", test=report.nodeid, of=_what, skipped=report.longreprtext[-300:])


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    if not _worker:
        add("tests", what=_what, ok=exitstatus == 0, **_counts)
