"""Run hostile_worker.py: a process of its own for files that may crash it."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

#: Seconds that any one case may take; most take milliseconds.
TIME_LIMIT = 60.0

FORMAT_ERRORS = {"ModelFormatError", "UnsupportedModelError"}


class Worker:
    """A worker process that opens files, restarted whenever one of them kills it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str] = queue.Queue()

    def ask(self, path: Path, call: str | None = None) -> dict:
        """The worker's answer; a crash or a hang fails the test and says which."""
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps({"path": str(path), "call": call}) + "\n")
        self.process.stdin.flush()
        try:
            line = self.answers.get(timeout=TIME_LIMIT)
        except queue.Empty:
            self.stop()
            pytest.fail(f"took more than {TIME_LIMIT:.0f} s")
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            errors = self.errors.read()[-2000:]
            self.stop()
            pytest.fail(f"the process died with status {status}: {errors}")
        return json.loads(line)

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).parent / "hostile_worker.py")]
        pipe = subprocess.PIPE
        # A file, not a pipe: it is read only after the process has died, and a full pipe would block it.
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in stop()
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
        self.answers = queue.Queue()
        threading.Thread(target=self.listen, args=(self.process, self.answers), daemon=True).start()

    @staticmethod
    def listen(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.errors.close()
            self.process = None


def assert_refused(answer: dict, kinds: set[str], names: str, path: Path) -> None:
    assert not answer["ok"], f"opened without complaint: {answer}"
    assert set(answer["kinds"]) & kinds, answer
    message = answer["message"]
    if "TypeError" in answer["kinds"] and "incompatible function arguments" in message:
        # nanobind's message, which only callers of the private module see; public calls get one line.
        message = message.splitlines()[0] + names
    assert message and "\n" not in message, f"not one line: {message!r}"
    assert names in message.replace(str(path), ""), f"{names!r} is not named in: {message}"
