"""`generate --grammar` and `--grammar-file`, as llama.cpp's programs have them."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from pydiffusion.cli import main

GRAMMAR = 'root ::= ("yes" | "no") "!"{1,3}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    target = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(checkpoint_path(), target, "q8_0")
    return str(target)


def test_generate_by_grammar(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "answer.gbnf"
    file.write_text("# yes or no\n" + GRAMMAR, encoding="utf-8")
    arguments = ["generate", "-m", model, "-p", "x", "--steps", "2", "--threads", "1", "-n", "16"]
    for given in (["--grammar", GRAMMAR], ["--grammar-file", str(file)]):
        assert main([*arguments, *given]) == 0
        assert re.fullmatch(r"(yes|no)!{1,3}", capfd.readouterr().out.strip())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GRAMMAR.encode())))
    assert main([*arguments, "--grammar-file", "-"]) == 0
    assert re.fullmatch(r"(yes|no)!{1,3}", capfd.readouterr().out.strip())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--grammar", GRAMMAR, "--grammar-file", "x"], "not both"),
        (["--grammar", GRAMMAR, "--regex", "a"], "exclude each other"),
        (["--grammar-file", "nowhere.gbnf"], "nowhere.gbnf"),
        (["--grammar", "root ::= ("], "line 1, column 10"),
        (["--grammar", 'start ::= "a"'], "no rule 'root'"),
    ],
)
def test_grammars_that_are_refused(
    model: str, given: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-m", model, "-p", "x", "--steps", "1", *given]) in (1, 2)
    assert message in " ".join(capfd.readouterr().err.split())
