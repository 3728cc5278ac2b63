"""Registry of chat formats and built-in chat templates, by architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .chat_format import PLAIN, ChatFormat
from .gemma import GEMMA

# general.architecture -> format.
ARCHITECTURE_TO_FORMAT: dict[str, ChatFormat] = {
    "diffusion-gemma": GEMMA,
}
# general.architecture, which is the template's name -> its file.
BUILT_IN_TEMPLATES: dict[str, Path] = {
    "diffusion-gemma": Path(__file__).with_name("diffusion_gemma.jinja"),
}


def chat_format_of(metadata: Mapping[str, Any]) -> ChatFormat:
    """The format of a file's architecture, or the plain one."""
    architecture = metadata.get("general.architecture")
    return ARCHITECTURE_TO_FORMAT.get(architecture, PLAIN) if isinstance(architecture, str) else PLAIN
