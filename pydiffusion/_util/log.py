"""The package's logging: logger ``pydiffusion`` and those below it, silent unless asked for."""

from __future__ import annotations

import logging
import os
import sys

LEVEL_VARIABLE = "PYDIFFUSION_LOG_LEVEL"
LEVELS = ("debug", "info", "warning", "error")
logger = logging.getLogger("pydiffusion")
logger.addHandler(logging.NullHandler())  # output is the application's business


def print_as_asked() -> None:
    """Print from the level that PYDIFFUSION_LOG_LEVEL names, or say that it names none."""
    level = os.environ.get(LEVEL_VARIABLE, "").strip().lower()
    if level in LEVELS:
        print_from(level)
    elif level:
        logger.addHandler(_stderr_handler())
        logger.warning("%s is %r; permitted are %s", LEVEL_VARIABLE, level[:50], ", ".join(LEVELS))


def print_from(level: str) -> None:
    """Print messages of at least this level, one of ``LEVELS``, to stderr; a later call changes the level."""
    logger.setLevel(level.upper())
    if not any(type(handler) is _StderrHandler for handler in logger.handlers):
        logger.addHandler(_stderr_handler())


class _StderrHandler(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _stderr_handler() -> logging.Handler:
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
