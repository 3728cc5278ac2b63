"""Load scripts of the repository as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from .paths import REPOSITORY


def load_script(path: str) -> ModuleType:
    """The script at a path below the repository's root, as a module of its file's name."""
    file = REPOSITORY / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
