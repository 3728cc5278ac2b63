"""Python fuzz targets. Each has ``make(random) -> input``, ``one(input) -> outcome`` and ``close()``; ``one``
raises on a finding.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

#: Name -> (module, class).
TARGETS = {
    "model": ("files", "ModelTarget"),
    "tokenizer": ("files", "TokenizerTarget"),
    "imatrix": ("files", "ImatrixTarget"),
    "session": ("files", "SessionTarget"),
    "template": ("template", "Target"),
    "folder": ("folder", "Target"),
    "quantized": ("quantized", "Target"),
    "body": ("body", "Target"),
    "vision": ("vision", "Target"),
    "adapter": ("adapter", "Target"),
}

_TESTS = Path(__file__).resolve().parent.parent.parent / "tests"
if str(_TESTS) not in sys.path:
    sys.path.insert(0, str(_TESTS))


def make_target(name: str, folder: Path) -> Any:
    """Create a target by name; its files go to ``folder``."""
    module, kind = TARGETS[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(folder)
