"""Run the command line on a pseudo-terminal."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

try:
    import pty
except ImportError:  # Windows
    pty = None  # type: ignore[assignment]

needs_terminal = pytest.mark.skipif(
    pty is None, reason="NOT CHECKED: drawing on a terminal; no pseudo-terminals"
)


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pydiffusion", *arguments]


def on_terminal(
    arguments: Sequence[str], typed: Sequence[tuple[str, str]] = (), env: dict[str, str] | None = None
) -> tuple[str, int]:
    """Run on a pseudo-terminal; ``typed`` are pairs of what to wait for, after what the last pair waited for,
    and what to type then.

    A Ctrl-C that should end the program is typed again every second, as a person would: Python's prompt
    notices one that comes in the moment before it waits for keys only at the next key. Not once the program
    says that it ends: Python then dies of the next one. An earlier one is typed again if not even what was
    typed before it has come back, which the terminal then drops.
    """
    main_end, terminal = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", **(env or {})}
    environment.pop("NO_COLOR", None)
    if not env or "XDG_STATE_HOME" not in env:
        environment["XDG_STATE_HOME"] = str(Path.cwd() / "state")  # not this user's
    process = subprocess.Popen(
        program(*arguments), stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    seen, todo, deadline = b"", list(typed), time.monotonic() + 100
    n_read, last, n_before, text = 0, time.monotonic(), 0, ""
    while time.monotonic() < deadline:
        if select.select([main_end], [], [], 0.1)[0]:
            try:
                data = os.read(main_end, 65536)
            except OSError:
                break
            if not data:
                break
            seen += data
        if todo and todo[0][0].encode() in seen[n_read:]:
            n_read = seen.index(todo[0][0].encode(), n_read) + len(todo[0][0].encode())
            last, n_before, text = time.monotonic(), len(seen), todo.pop(0)[1]
            os.write(main_end, text.encode("utf-8", "surrogateescape"))
        elif todo and text.endswith("\x03") and len(seen) == n_before and time.monotonic() > last + 5:
            last = time.monotonic()
            os.write(main_end, b"\x03")
        elif typed and not todo and typed[-1][1] == "\x03" and time.monotonic() > last + 1:
            last = time.monotonic()
            if b"interrupted" not in seen[n_read:]:
                os.write(main_end, b"\x03")
    else:
        process.kill()
        raise AssertionError(f"not done in 100 s: {seen.decode('utf-8', 'replace')[-2000:]}")
    os.close(main_end)
    return seen.decode("utf-8", "replace"), process.wait(30)
