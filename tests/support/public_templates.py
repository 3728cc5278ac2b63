"""Google's chat templates, where they are installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def public_template(name: str) -> str:
    """Google's template, from the package trl (Apache 2.0); not committed here."""
    installed = importlib.util.find_spec("trl")
    default = Path(installed.origin or "").parent / "chat_templates" if installed else ""
    path = Path(os.environ.get("PYDIFFUSION_TEMPLATES", default)) / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(
            f"NOT CHECKED: prompts of Google's template {name} against transformers; there is no {path} "
            "(pip install --no-deps trl==1.16.0, or set PYDIFFUSION_TEMPLATES to a folder)"
        )
    return path.read_text(encoding="utf-8")
