"""Images as input: loading, preprocessing, the vision tower, and prompts with images.

Needs Pillow (the extra ``vision``), which is imported on first use. ``preprocess`` works without a model.
"""

from __future__ import annotations

from .preprocessing import preprocess as preprocess

__all__ = ["preprocess"]
