"""aider, headless, with one message about one file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, URL, run


def aider(*more: str) -> None:
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("CLIENTS_FOLDER")))
    (folder / "add.py").write_text("def add(a, b):\n    return a - b\n")
    command = [sys.executable, "-m", "aider", "--model", f"openai/{MODEL}", "--openai-api-base", URL]
    command += ["--openai-api-key", "none", "--no-git", "--yes-always", "--no-check-update"]
    command += ["--analytics-disable", "--no-show-model-warnings", "--no-show-release-notes"]
    command += [*more, "--message", "Mend add.", "add.py"]
    environment = {**os.environ, "HOME": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, input=""
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    # How aider shows a failed request, which it repeats.
    assert "litellm." not in done.stdout, done.stdout
    assert re.search(r"Tokens: \S+ sent, \d\S* received|hit a token limit", done.stdout), "no answer came"


def one_message() -> None:
    aider()


def without_a_stream() -> None:
    aider("--no-stream", "--edit-format", "diff")


run("aider", [one_message, without_a_stream])
