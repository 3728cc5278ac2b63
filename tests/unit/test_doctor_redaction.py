"""The doctor's page says nothing of folders, users, machines and access tokens."""

from __future__ import annotations

import getpass
import platform
from pathlib import Path

import pytest

from pydiffusion.quality.doctor.redaction import redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ann/models/dg.gguf: there is no such file", "dg.gguf: there is no such file"),
        ("'/data/x/y/config.json' is missing", "'config.json' is missing"),
        ("C:\\Users\\Ann Lee\\dg.gguf: truncated", "dg.gguf: truncated"),
        ("at file:///srv/models/a.gguf", "at a.gguf"),
        ("1.5 GB/s, 24/7, and/or, <|turn|>/</body> a/b", "1.5 GB/s, 24/7, and/or, <|turn|>/</body> a/b"),
        ("https://example.org/?q=1", "https://example.org/?q=1"),
        ("token hf_abcdefghijklmnopqrstuvwx refused", "token … refused"),
        ("ghp_0123456789abcdefghij and sk-0123456789abcdefghijk", "… and …"),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_folders_with_spaces(tmp_path: Path) -> None:
    path = tmp_path / "my models" / "dg.gguf"
    assert redact(f"{path}: bad; {path.parent}", [path]) == "dg.gguf: bad; …"


def test_the_environment_s_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "plain-looking-secret")
    monkeypatch.setenv("EDITOR", "plain-looking-editor")
    assert redact("plain-looking-secret, plain-looking-editor") == "…, plain-looking-editor"


def test_names_of_user_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "hildegard")
    monkeypatch.setattr(platform, "node", lambda: "workstation7.example.org")
    assert redact("hildegard at workstation7, hildegards") == "… at …, hildegards"
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    assert redact("root of squares") == "root of squares"
