"""Options that `pydiffusion serve` refuses before it looks for a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from pydiffusion.cli import main


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--log-level", "loud"], "permitted are debug, info, warning, error"),
        (["--cors", "localhost:3000"], "SCHEME://HOST"),
        (["--cors", "http://x/page"], "has no path"),
        (["--allowed-host", "http://x"], "is not a host name"),
        (["--api-key", ""], "API key is empty"),
        (["--api-key", "one two"], "white space"),
        (["--api-key", "x", "--api-key-file", "keys"], "not both"),
    ],
)
def test_options_that_no_server_can_have(
    options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no-such-model.gguf"
    assert main(["serve", "-m", str(missing), "--port", "0", *options]) == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert text in printed and "no-such-model" not in printed


def test_keys_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several = tmp_path / "keys"
    several.write_text("one\ntwo\n", encoding="utf-8")
    monkeypatch.setenv("PYDIFFUSION_API_KEY_FILE", str(several))
    serve = ["serve", "-m", str(tmp_path / "no-such-model.gguf"), "--port", "0"]
    assert main(serve) == 2
    assert "give one key" in capsys.readouterr().err
    monkeypatch.setenv("PYDIFFUSION_API_KEY", "one")
    assert main(serve) == 2
    assert "not both" in capsys.readouterr().err
    monkeypatch.delenv("PYDIFFUSION_API_KEY")
    monkeypatch.setenv("PYDIFFUSION_API_KEY_FILE", str(tmp_path / "missing"))
    assert main(serve) == 1
    assert f"{tmp_path / 'missing'}: No such file" in capsys.readouterr().err
