"""docs/server.md describes every field. That its examples run: tests/cli/test_docs_run.py."""

from __future__ import annotations

from itertools import chain

from support.paths import REPOSITORY

from pydiffusion.openai.fields import EQUIVALENTS, IGNORED, UNSUPPORTED
from pydiffusion.openai.requests import ENDPOINTS

PAGE = (REPOSITORY / "docs" / "server.md").read_text(encoding="utf-8")


def test_every_field_is_described() -> None:
    for field in (*chain(*ENDPOINTS.values()), *IGNORED, *UNSUPPORTED, *EQUIVALENTS):
        assert f"`{field}`" in PAGE, field
