"""Google's chat templates, where they are installed, and small ones with their faults."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

_MACRO = "{% macro format_parameters(properties, required, filter_keys=false) %}{% endmacro %}"
# Closes the turn behind every content, and opens one for a question only: what Google's old ones get wrong.
OLD_TEMPLATE = (
    _MACRO + "{% for m in messages %}{% if m.role == 'tool' %}<|tool_response>{{ m.content }}<tool_response|>"
    "{% else %}{% if m.role == 'user' or loop.previtem.role == 'user' %}<|turn>{{ m.role }}\n{% endif %}"
    "{{ m.content }}<turn|>\n{% endif %}{% endfor %}<|turn>model\n"
)
_CLOSING = (
    "{% if loop.nextitem is undefined or m.role == 'user' or loop.nextitem.role == 'user' %}<turn|>\n"
    "{% endif %}{% endif %}"
)
MENDED_TEMPLATE = OLD_TEMPLATE.replace("<turn|>\n{% endif %}", _CLOSING)


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
