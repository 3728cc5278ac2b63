"""Images that the command line names."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Part = dict[str, Any]


def image_parts(paths: Sequence[Path] | None) -> list[Part]:
    """Parts of a message, one per file, each with all of the file: what is saved is whole.

    Raises PyDiffusionError, naming the file, for one that is no image or damaged; OSError.
    """
    return [image_part(path) for path in paths or ()]


def image_part(path: Path) -> Part:
    """See ``image_parts``."""
    from pydiffusion.generation.chat_images import read_image

    if path.parts[:1] in (("http:",), ("https:",)) and not path.exists():
        raise ValueError(
            f"{path.parts[0]}//{'/'.join(path.parts[1:])} is not fetched: download the image first"
        )
    kind = mimetypes.guess_type(path.name)[0] or ""
    kind = kind if kind.startswith("image/") else "application/octet-stream"
    data = base64.b64encode(read_image(path)).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def with_images(text: str, images: Sequence[Part]) -> str | list[Part]:
    """The content of a message: its images before its text, as the models were trained."""
    return [*images, {"type": "text", "text": text}] if images else text


def text_of(content: str | Sequence[Part]) -> str:
    """The text of a message's content, and ``[image]`` for each image."""
    if isinstance(content, str):
        return content
    return " ".join(part["text"] if part.get("type") == "text" else "[image]" for part in content)
