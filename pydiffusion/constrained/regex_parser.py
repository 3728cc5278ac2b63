"""Python's regular expression parser, which has no public name."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        from re import _constants as sre
        from re import _parser as sre_parser
    except ImportError:  # Python 3.10
        import sre_constants as sre  # type: ignore[no-redef]
        import sre_parse as sre_parser  # type: ignore[no-redef]

__all__ = ["sre", "sre_parser"]
