"""Warnings at the line that called this package, also as messages of its logger."""

from __future__ import annotations

import sys
import warnings

from .log import logger

_PACKAGE = __name__.partition(".")[0] + "."


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line outside this package."""
    logger.warning("%s", message)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
