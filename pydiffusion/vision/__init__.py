"""Images as input: loading, preprocessing, the vision tower, and prompts with images.

Needs Pillow (the extra ``vision``), which is imported on first use. ``preprocess`` works without a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .preprocessing import preprocess as preprocess

__all__ = ["preprocess"]


def __getattr__(name: str) -> Any:
    """``preprocess`` is imported on first use, so that finding a vision file needs no numpy."""
    if name != "preprocess":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .preprocessing import preprocess

    globals()[name] = preprocess
    return preprocess


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
