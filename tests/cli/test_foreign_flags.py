"""Flags and verbs of llama.cpp, Ollama and vLLM: what becomes of each."""

from __future__ import annotations

import difflib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from pydiffusion import DiffusionModel
from pydiffusion.cli import _foreign, app, main
from pydiffusion.options import at_temperature

OWN = {
    "-m": True, "--model": True, "-p": True, "-n": True, "--max-tokens": True, "-c": True, "--ctx": True,
    "-t": True, "--threads": True, "-s": True, "--seed": True, "--temp": True, "--stop": True, "-f": True,
    "--raw": False, "--json": False, "--steps": True, "--gpu-layers": True, "-ngl": True, "--system": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> str:
    return str(gguf_file("small"))


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ("-m x -p hi", "-m x -p hi"),
        ("--ctx-size 4096 --n-gpu-layers=99", "--ctx 4096 --gpu-layers 99"),
        ("--ctx_size 4096 --n_predict -1", "--ctx 4096 --max-tokens -1"),  # ggml-org/llama.cpp#6191
        ("--max_tokens=5 --num-predict 5", "--max-tokens 5 --max-tokens 5"),
        ("-hf owner/name:Q8_0 -p hi", "--model hf.co/owner/name:Q8_0 -p hi"),
        ("-no-cnv -p hi", "--raw -p hi"),
        ("-r stop -p hi", "--stop stop -p hi"),
        ("-steps 8 -temp 0", "--steps 8 --temp 0"),
        ("-m=model.gguf -n=5", "-m model.gguf -n 5"),
        ("-fa -p hi", "-p hi"),
        ("-fa on -p hi", "-p hi"),
        ("-b 2048 -ub 512 --no-mmap -p hi", "-p hi"),
        ("-p -fa", "-p -fa"),  # a prompt
        ("-p --color --color", "-p --color"),
        ("-- -fa on", "-- -fa on"),
        ("hi - -1 -0.5", "hi - -1 -0.5"),
        ("--nonsense 3", "--nonsense 3"),  # left for the parser, which refuses it
        ("-n8", "-n8"),
    ],
)
def test_what_arguments_become(given: str, becomes: str) -> None:
    done = _foreign.translate("generate", shlex.split(given), OWN)
    assert (done.args, done.refused) == (shlex.split(becomes), [])


def test_the_model_may_be_the_first_argument() -> None:
    own = {"-m": True, "--model": True, "--port": True}
    for given, becomes in [
        ("x.gguf --port 1", "--model x.gguf --port 1"),
        ("--port 1 owner/name", "--port 1 --model owner/name"),
        ("-m x.gguf y.gguf", "-m x.gguf y.gguf"),  # left for the parser, which refuses it
        ("x.gguf y.gguf", "--model x.gguf y.gguf"),
    ]:
        assert _foreign.translate("serve", shlex.split(given), own).args == shlex.split(becomes)
    assert _foreign.translate("inspect", ["--json", "-m", "x.gguf"], {"--json": False}).args == [
        "x.gguf",
        "--json",
    ]


@pytest.mark.parametrize("flag", ["-fa", "-b 5", "--color", "--no-mmap", "--mlock", "--keep 3"])
def test_what_has_no_effect_is_said(flag: str) -> None:
    done = _foreign.translate("generate", [*flag.split(), "-p", "hi"], OWN)
    assert done.args == ["-p", "hi"] and len(done.notes) == 1 and done.notes[0].startswith(flag.split()[0])


def test_all_that_is_refused_is_said_at_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--top-k", "40", "--repeat-penalty=1.1", "-ctk", "q8_0", "-md", "x.gguf", "--ignore-eos"]
    assert main(["generate", "-m", model, "-p", "hi", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "loaded" not in err
    for flag in ("--top-k:", "--repeat-penalty:", "-ctk:", "-md:", "--ignore-eos:"):
        assert flag in err
    assert "--cache-type" in err and "x.gguf" not in err


def test_a_command_line_of_llama_cpp_runs_as_it_is(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours = [
        "generate",
        "-m",
        model,
        "-p",
        "the river",
        "-n",
        "9",
        "--steps",
        "2",
        "--seed",
        "3",
        "--ctx",
        "64",
    ]
    assert main([*ours, "--raw", "--threads", "1", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    theirs = ["llama-completion", "-m", model, "-p", "the river", "--n-predict", "9", "-s", "3", "-c", "64"]
    more = ["-no-cnv", "-t", "1", "-ngl", "0", "-fa", "on", "--color", "-b", "512", "--no-mmap", "--mlock"]
    assert main([*theirs, *more, "--steps", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) | {"timings": 0} == expected | {"timings": 0}
    assert err.count("has no effect") == 5


def test_ollamas_run_answers(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-n", "9", "--steps", "2", "-s", "3", "-t", "1", "-q"]
    assert main(["generate", "-m", model, "-p", "the wide river", *options]) == 0
    expected = capsys.readouterr().out
    assert main(["run", model, "the", "wide river", *options]) == 0  # words are joined
    out, err = capsys.readouterr()
    assert out == expected and err == ""
    assert main(["generate", model, "the wide river", *options]) == 0
    assert capsys.readouterr().out == expected


def test_minus_one_and_temperature(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "-m", model, "-p", "the river", "-n", "9", "--steps", "2", "-t", "-1", "--json"]

    def run(*more: str) -> dict[str, Any]:
        assert main([*command, *more]) == 0
        return json.loads(capsys.readouterr().out)

    assert run("--seed", "-1")["seed"] != run("-s", "-1")["seed"]
    greedy = [run("--temp", "0") for _ in range(2)]
    assert greedy[0]["tokens"] == greedy[1]["tokens"] and greedy[0]["seed"] == greedy[1]["seed"]
    with DiffusionModel(model) as opened:
        meant = at_temperature(0.5, opened.metadata)
    schedule = ["--t-min", str(meant["t_min"]), "--t-max", str(meant["t_max"]), "-s", "5"]
    assert run("--temp", "0.5", "-s", "5")["tokens"] == run(*schedule)["tokens"]
    assert run("--temp", "0", "-s", "7")["seed"] == 7, "what is given counts"
    assert run("--temp", "1", "-s", "7")["tokens"] == run("-s", "7")["tokens"], "1 is the file's schedule"


def test_our_own_options_are_never_rewritten() -> None:
    """What a command has itself reaches it, whatever a table says, with its value."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        options = [p for p in command.params if p.param_type_name == "option"]
        own = {flag: not p.is_flag for p in options for flag in [*p.opts, *p.secondary_opts]}
        for flag, takes_value in own.items():
            given = [flag, *(["value"] if takes_value else [])]
            done = _foreign.translate(name, given, own)
            assert done == _foreign.Translation(given), (name, flag)


def test_the_tables_name_what_there_is() -> None:
    """Targets of rewriting, and options and commands that hints name."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    flags = {
        flag for c in commands.values() for p in c.params if p.param_type_name == "option"
        for flag in [*p.opts, *p.secondary_opts]
    } | {"--help", "--version", "--upgrade"}  # fmt: skip
    meanings = [
        *_foreign._FLAGS.values(),
        *(m for table in _foreign._OF_COMMAND.values() for m in table.values()),
    ]
    for meaning in meanings:
        if isinstance(meaning, _foreign.Ours):
            assert meaning.name in flags | {""}, meaning
        text = meaning.hint if isinstance(meaning, _foreign.Refused) else getattr(meaning, "why", "")
        for word in text.replace(",", " ").replace(":", " ").replace(";", " ").split():
            assert not word.startswith("--") or word in flags, text
    for meaning in _foreign.VERBS.values():
        called = meaning.partition("pydiffusion ")[2].split()
        assert " " in meaning or meaning in commands
        assert not called or called[0] in commands, meaning


@pytest.mark.parametrize(("verb", "words"), sorted(_foreign.VERBS.items()))
def test_verbs_of_other_programs(verb: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    ours = words in commands
    assert main([verb, "--help"]) == (0 if ours else 2)
    out, err = capsys.readouterr()
    assert (f"pydiffusion {words}" in out) if ours else (words[:40] in " ".join(err.split()))


def test_slips_of_our_own_names(capsys: pytest.CaptureFixture[str]) -> None:
    for given, meant in [("generat", "generate"), ("chta", "chat"), ("Serve", "serve"), ("lst", "list")]:
        assert main([given]) == 2
        assert f"did you mean {meant}" in capsys.readouterr().err
    assert main(["generate", "-m", "x", "-p", "y", "--setps", "3"]) == 2
    assert "--steps" in capsys.readouterr().err
    assert difflib.get_close_matches("--setps", ["--steps"]), "or the test above could not fail"


def test_text_piped_in_beside_a_prompt_of_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-n", "9", "--steps", "2", "-s", "3", "-t", "1", "-q"]
    assert main(["run", model, "the wide\nriver", *options]) == 0
    expected = capsys.readouterr().out
    piped = tmp_path / "text"
    piped.write_text("the wide\n")
    with piped.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["run", model, "river", *options]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("llama-cli -m m.gguf -cnx -p x", "No such option: -cnx"),
        ("llama-cli -m m.gguf -no-cnv -p x", "pydiffusion generate --raw"),
        ("llama-cli -m m.gguf -sysf f -p x", "$(cat FILE)"),
        ("llama-server -m m.gguf --ssl-key-file k", "proxy"),
        ("ollama run m", "pydiffusion run"),
    ],
)
def test_hints(arguments: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert hint in capsys.readouterr().err
