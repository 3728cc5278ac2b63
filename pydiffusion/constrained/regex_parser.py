"""Python's regular expression parser, which has no public name."""

from __future__ import annotations

import sys
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    if sys.version_info >= (3, 11):
        from re import _constants as sre  # type: ignore[attr-defined]  # typeshed leaves private modules out
        from re import _parser as sre_parser  # type: ignore[attr-defined]  # likewise
    else:
        import sre_constants as sre
        import sre_parse as sre_parser

__all__ = ["sre", "sre_parser"]
