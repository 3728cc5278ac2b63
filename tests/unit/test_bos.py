"""The bos token of prompts: who adds it, and the warnings when it is missing or doubled."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.server_fakes import ScriptedModel, ask, metadata, script, serving

from pydiffusion import DiffusionModel, ModelFormatError, PromptWarning
from pydiffusion.cli import main
from pydiffusion.convert import convert, edit_metadata
from pydiffusion.demo import checkpoint_path
from pydiffusion.tokenizer import Tokenizer

KEY = "tokenizer.ggml.add_bos_token"
BOS = 2
QUICK = {"max_tokens": 1, "steps": 1, "seed": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The demo model, with add_bos_token false and true."""
    folder = tmp_path_factory.mktemp("bos")
    made = {False: folder / "without.gguf", True: folder / "with.gguf"}
    convert(checkpoint_path(), made[False], type="q4_k_m")
    shutil.copy(made[False], made[True])
    for asks, path in made.items():
        edit_metadata(path, {KEY: asks})
    return made


@pytest.fixture(scope="module")
def asking(files: dict[bool, Path]) -> Iterator[DiffusionModel]:
    with DiffusionModel(files[True], n_ctx=256, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def not_asking(files: dict[bool, Path]) -> Iterator[DiffusionModel]:
    with DiffusionModel(files[False], n_ctx=256, n_threads=1) as model:
        yield model


@pytest.fixture
def nothing_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        yield


def test_the_file_is_obeyed_and_a_bos_in_the_text_gets_no_second_one(
    asking: DiffusionModel, not_asking: DiffusionModel
) -> None:
    plain = asking.tokenize("ab", add_bos=False)
    assert asking.tokenize("ab") == [BOS, *plain] and not_asking.tokenize("ab") == plain
    for model in (asking, not_asking):
        assert model.tokenize("<bos>ab", parse_special=True) == [BOS, *plain]
        assert model.tokenize("<bos>ab", parse_special=True, add_bos=True) == [BOS, BOS, *plain], "as asked"
        assert model.tokenize("<bos>ab", add_bos=False)[0] != BOS, "characters"
    assert asking.tokenize("<bos>", parse_special=True) == [BOS]


Use = Callable[[DiffusionModel, list[int]], object]
USES: dict[str, Use] = {
    "generate": lambda model, ids: model.generate(ids, **QUICK),
    "stream": lambda model, ids: list(model.stream(ids, **QUICK)),
    "batch": lambda model, ids: list(model.generate_batch([ids], **QUICK)),
    "completion": lambda model, ids: model.create_completion(ids, **QUICK),
    "session": lambda model, ids: model.new_session().prefill(ids),
}


@pytest.mark.parametrize("use", USES)
def test_a_missing_or_second_bos_is_warned_of_where_the_caller_is(asking: DiffusionModel, use: str) -> None:
    plain = asking.tokenize("ab", add_bos=False)
    for prompt, message in (
        (plain, "does not begin with the bos token '<bos>'"),
        ([BOS, BOS, *plain], "twice"),
    ):
        with pytest.warns(PromptWarning, match=message) as told:
            USES[use](asking, prompt)
        assert len(told) == 1 and Path(told[0].filename) == Path(__file__)


@pytest.mark.parametrize("use", USES)
@pytest.mark.usefixtures("nothing_said")
def test_one_bos_gives_no_warning(asking: DiffusionModel, use: str) -> None:
    USES[use](asking, asking.tokenize("ab"))


@pytest.mark.usefixtures("nothing_said")
def test_chats_have_one_bos_whatever_the_file_says(
    asking: DiffusionModel, not_asking: DiffusionModel
) -> None:
    for model in (asking, not_asking):
        assert model.chat_prompt(ask("hi")).count(BOS) == 1
        model.create_chat_completion(ask("hi"), **QUICK)
        model.infill("a<|hole:2|>", instruction="b", steps=1)


def test_texts_and_holes_warn_where_the_file_adds_no_bos(not_asking: DiffusionModel) -> None:
    with pytest.warns(PromptWarning, match="does not begin"):
        not_asking.generate("ab", **QUICK)
    with pytest.warns(PromptWarning, match="does not begin"):
        not_asking.infill("ab<|hole:2|>", steps=1)


@pytest.mark.usefixtures("nothing_said")
def test_a_model_without_a_bos_needs_none(files: dict[bool, Path], tmp_path: Path) -> None:
    file = tmp_path / "none.gguf"
    shutil.copy(files[False], file)
    edit_metadata(file, {"tokenizer.ggml.bos_token_id": None})
    with DiffusionModel(file, n_ctx=256, n_threads=1) as model:
        model.generate("ab", **QUICK)


@pytest.mark.usefixtures("nothing_said")
def test_later_text_of_a_session_needs_no_bos(asking: DiffusionModel) -> None:
    session = asking.new_session()
    session.prefill(asking.tokenize("ab"))
    session.encode(asking.tokenize("cd", add_bos=False))
    session.complete(**QUICK)


def test_the_command_line_says_it_once(
    files: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(command: str, asks: bool, *more: str) -> list[str]:
        options = ["--threads", "1", "--ctx", "128", "-n", "1", "--steps", "1"]
        assert main([command, "-m", str(files[asks]), *more, *options]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "bos" in line]

    (line,) = said("generate", False, "--raw", "-p", "ab")
    assert line.startswith("pydiffusion: warning: the prompt does not begin with the bos token '<bos>' (2)")
    (line,) = said("generate", True, "--raw", "--special", "-p", "<bos><bos>ab")
    assert "twice" in line
    assert said("generate", True, "--raw", "-p", "ab") == []
    assert said("generate", True, "--raw", "--special", "-p", "<bos>ab") == []
    assert said("generate", False, "--raw", "--special", "-p", "<bos>ab") == []
    assert said("generate", False, "-p", "ab") == []
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(3)))
    assert len(said("batch", False, "--raw", str(prompts), "-o", str(tmp_path / "a.jsonl"))) == 1
    assert said("batch", True, "--raw", str(prompts), "-o", str(tmp_path / "b.jsonl")) == []


@pytest.mark.parametrize("value", ["false", [False], 1.0])
def test_a_flag_that_is_not_boolean_is_refused(value: Any) -> None:
    with pytest.raises(ModelFormatError, match="add_bos_token is"):
        Tokenizer({**metadata(), "tokenizer.ggml.add_bos_token": value})


def test_other_warnings_are_shown_as_python_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydiffusion import cli

    def warns(*_: object, **__: object) -> None:
        warnings.warn("of another kind", RuntimeWarning, stacklevel=1)

    monkeypatch.setattr(cli, "_program", lambda: warns)
    assert main(["devices"]) == 0
    assert "RuntimeWarning: of another kind" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_said")
def test_the_server_logs_it_once(caplog: pytest.LogCaptureFixture) -> None:
    model = ScriptedModel(script)
    plain = model.tokenize("ab", add_bos=False)

    def post(path: str, **body: object) -> None:
        assert httpx.post(f"{url}/v1/{path}", json=body, timeout=60).status_code == 200

    with caplog.at_level(logging.WARNING, "pydiffusion.server"), serving(model) as (url, _):
        post("chat/completions", messages=ask("Hi"))
        post("completions", prompt="ab")
        post("completions", prompt=[BOS, *plain])
        assert caplog.records == []
        for _ in range(2):
            post("completions", prompt=[plain, plain])
            post("completions", prompt=[BOS, BOS, *plain])
    assert [record.name for record in caplog.records] == ["pydiffusion.server"] * 2
    assert "does not begin" in caplog.messages[0] and "twice" in caplog.messages[1]
