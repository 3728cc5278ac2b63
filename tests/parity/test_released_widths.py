"""The comparison at the released model's widths, which takes minutes, on a narrow model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.scripts import load_script

pytestmark = [pytest.mark.reference, pytest.mark.slow]


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def test_a_narrow_model(tmp_path: Path) -> None:
    """All types and setups keep the bounds; damage is noticed, here and where there is none."""
    script = load_script("tests/parity/released_widths.py")
    shape = script.checkpoint.Shape(
        n_layers=2, dense=2112, expert=704, n_experts=8, vocab=1024, canvas=32, d=256, n_heads=4, head_dim=64,
        global_head_dim=128, n_kv_heads=2, n_global_kv_heads=1, n_experts_used=2,
    )  # fmt: skip
    assert script.compare_all(shape, tmp_path, run) == []
    assert not list(tmp_path.glob("*.gguf"))


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("tests/parity/released_widths.py")
    monkeypatch.setattr(script, "MEMORY", 0)
    monkeypatch.setattr(script, "DISK", 0)
    assert script.shortage(tmp_path) == ""
    monkeypatch.setattr(script, "MEMORY", 1e15)
    assert "1000000 GB of memory are needed" in script.shortage(tmp_path)
    monkeypatch.setattr(script, "DISK", 1e15)
    assert "1000000 GB of disk are needed" in script.shortage(tmp_path)
