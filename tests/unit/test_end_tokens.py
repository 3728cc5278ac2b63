"""End-of-generation tokens: llama.cpp's rule (src/llama-vocab.cpp, `special_eog_ids`), in every front end.

Its converter writes one `eos_token_id` and no list, and leaves the end of a turn to the token's text.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.server_fakes import serving

from pydiffusion import DiffusionModel, GenerationOptions, ModelFormatError
from pydiffusion.cli import main
from pydiffusion.convert import convert, edit_metadata, evaluate
from pydiffusion.convert.gguf.header import Value
from pydiffusion.demo import checkpoint_path
from pydiffusion.events import EndEvent
from pydiffusion.tokenizer.end_tokens import find_end_tokens

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
TASK = "sort: d a c"
MESSAGES = [{"role": "user", "content": TASK}]
ANSWER = "a c d"
FILES = ["<turn|>", "<|tool_response>"]
T = "tokenizer.ggml."


def ends(types: dict[str, int], **keys: Any) -> list[int]:
    """End tokens of a vocabulary of these texts and types, whose ids begin with 1."""
    metadata: dict[str, Any] = {
        "general.architecture": "diffusion-gemma",
        T + "tokens": ["a", *types],
        T + "token_type": [NORMAL, *types.values()],
        **{T + name: value for name, value in keys.items()},
    }
    found = find_end_tokens(metadata, 1 + len(types))
    assert GenerationOptions().resolve(metadata, 1 + len(types)).eos == tuple(end.token_id for end in found)
    return [end.token_id for end in found]


@pytest.mark.parametrize(
    "text",
    [
        "<eos>", "<turn|>", "<|tool_response>", "<end_of_turn>", "</s>", "<|im_end|>", "<|end|>",
        "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
        "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
        "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
        "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
    ],
)  # fmt: skip
def test_control_tokens_end_by_their_text(text: str) -> None:
    assert ends({text: CONTROL}) == [1]
    assert ends({text: NORMAL}) == []
    assert ends({text: USER_DEFINED}) == ([1] if text == "<|tool_response>" else []), "see VISIBLE in convert"


@pytest.mark.parametrize(
    "text", ["<pad>", "<bos>", "<|turn>", "<|channel>", "<tool_call|>", "<|think|>", "a<eos>"]
)
def test_other_control_tokens_are_not_end_tokens(text: str) -> None:
    assert ends({text: CONTROL}) == []


@pytest.mark.parametrize("name", ["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_end_tokens_by_metadata_key(name: str) -> None:
    assert ends({"x": NORMAL}, **{f"{name}_token_id": 1}) == [1]


def test_end_tokens_are_the_union_without_duplicates() -> None:
    types = {"<eos>": CONTROL, "<turn|>": CONTROL, "x": NORMAL, "y": NORMAL}
    assert ends(types, eos_token_ids=[3, 1], eos_token_id=1, eot_token_id=4) == [3, 1, 4, 2]
    metadata = {T + "tokens": list(types), T + "token_type": list(types.values()), T + "eos_token_ids": [0]}
    found = find_end_tokens(metadata | {T + "eos_token_id": 0}, 4)
    assert [(end.text, end.reasons) for end in found] == [
        ("<eos>", (f"list {T}eos_token_ids", f"key {T}eos_token_id", "text")),
        ("<turn|>", ("text",)),
    ]


def test_llama_cpps_two_exceptions() -> None:
    """llama.cpp's two exceptions."""
    assert ends({"</s>": CONTROL, "<|tool_response>": USER_DEFINED}) == [2], "Gemma's strikethrough"
    assert ends({"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL}) == [2, 3]
    assert ends({"<|end|>": CONTROL, "<|flush|>": CONTROL, "<|calls|>": CONTROL}) == [2, 3]
    assert ends({"<|end|>": CONTROL, "<|return|>": CONTROL}) == [1, 2]


def test_no_end_tokens_by_text_without_token_types() -> None:
    assert find_end_tokens({T + "tokens": ["<eos>", "<turn|>"]}, 2) == ()


@pytest.mark.parametrize("value", [5, -1, [0, 5], "x", True, 1.5])
@pytest.mark.parametrize("key", ["eos_token_ids", "eot_token_id"])
def test_an_id_outside_the_vocabulary_is_named(key: str, value: Any) -> None:
    with pytest.raises(ModelFormatError, match=rf"{key} holds .*0 to 4"):
        find_end_tokens({T + key: value}, 5)


# On real files without the list: in one the demo model ends its turn as trained, in the other the token with
# which it does is called `<|tool_response>`, and is a control token there.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ends")
    demo = folder / "demo.gguf"
    convert(checkpoint_path(), demo, type="q4_k_m")
    with DiffusionModel(demo, n_threads=1) as model:
        tokens, template = list(model.metadata[T + "tokens"]), model.metadata["tokenizer.chat_template"]
    i, j = (tokens.index(text) for text in FILES)
    tokens[i], tokens[j] = tokens[j], tokens[i]
    respelled = {T + "tokens": tokens, "tokenizer.chat_template": template.replace(*FILES)}
    made = {"list": demo, "<turn|>": folder / "turn.gguf", "<|tool_response>": folder / "tool.gguf"}
    for name, more in (("<turn|>", {}), ("<|tool_response>", respelled)):
        shutil.copy(demo, made[name])
        edit_metadata(made[name], {T + "eos_token_ids": None, **more})
    return made


@pytest.fixture(scope="module", params=FILES)
def file(files: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return files[request.param]


@pytest.fixture(scope="module")
def model(file: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(file, n_ctx=512, n_threads=1) as opened:
        yield opened


def test_generate_stream_and_batch(model: DiffusionModel) -> None:
    prompt = model.chat_prompt(MESSAGES)
    done = model.generate(prompt, seed=1)
    assert (done.text, done.finish_reason, len(done.tokens)) == (ANSWER, "eos", 5)
    *_, end = model.stream(prompt, seed=1)
    assert isinstance(end, EndEvent) and end.reason == "eos"
    ((_, outcome),) = model.generate_batch([prompt], seed=1)
    assert not isinstance(outcome, Exception) and outcome.text == ANSWER


def test_completions_in_openai_shape(model: DiffusionModel) -> None:
    text = model.create_completion(model.chat_prompt(MESSAGES), seed=1, max_tokens=None)
    assert text["choices"][0]["text"] == ANSWER and text["choices"][0]["finish_reason"] == "stop"
    chat = model.create_chat_completion(MESSAGES, seed=1)
    assert chat["choices"][0]["message"]["content"] == ANSWER and chat["usage"]["completion_tokens"] == 5
    chunks = list(model.create_chat_completion(MESSAGES, seed=1, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == ANSWER
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_option_eos_overrides_the_file(model: DiffusionModel) -> None:
    prompt = model.chat_prompt(MESSAGES)
    done = model.generate(prompt, seed=1, eos=(), max_tokens=40)
    assert (done.finish_reason, len(done.tokens)) == ("length", 40)
    a = model.tokenize("a", add_bos=False)
    assert model.generate(prompt, seed=1, eos=a).text == ANSWER.partition("a")[0]


def test_the_command_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["-m", str(file), "--threads", "1", "--ctx", "512", "--seed", "1"]
    assert main(["generate", *where, "-p", TASK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == ANSWER
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps({"messages": MESSAGES}))
    assert main(["batch", *where, str(prompts), "-o", str(answers)]) == 0
    answer = json.loads(answers.read_text())
    assert (answer["text"], answer["finish_reason"], answer["tokens"]) == (ANSWER, "eos", 5)


def test_chat_on_the_command_line(
    files: dict[str, Path], file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(model: Path) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(TASK + "\nsort: f b e\n"))
        assert main(["chat", "-m", str(model), "--threads", "1", "--ctx", "512", "--seed", "1"]) == 0
        return capsys.readouterr().out

    both = answers(file)
    assert both.splitlines()[0] == ANSWER and both == answers(files["list"]), "the first left the second room"


def test_the_server(model: DiffusionModel) -> None:
    chat, text = {"messages": MESSAGES, "seed": 1}, {"prompt": model.chat_prompt(MESSAGES), "seed": 1}
    with serving(model) as (url, _):  # type: ignore[arg-type]
        for path, body in (("chat/completions", chat), ("completions", text | {"max_tokens": 200})):
            whole = httpx.post(f"{url}/v1/{path}", json=body, timeout=60).json()
            choice = whole["choices"][0]
            assert (choice["finish_reason"], whole["usage"]["completion_tokens"]) == ("stop", 5)
            assert choice.get("text", choice.get("message", {}).get("content")) == ANSWER
            streamed = httpx.post(f"{url}/v1/{path}", json=body | {"stream": True}, timeout=60).text
            chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
            choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
            pieces = [
                choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices
            ]
            assert "".join(pieces) == ANSWER
            assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]


def test_evaluating_finds_no_difference(files: dict[str, Path]) -> None:
    report = evaluate(files["<turn|>"], files["list"], [TASK], noise=[0.4], seed=1, n_threads=1)
    assert report.same_answers == 1 and report.steps == report.reference_steps


def test_inspect_prints_them_and_why(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(files["list"])]) == 0
    out = capsys.readouterr().out
    assert f"  1 '<eos>': by list {T}eos_token_ids, by key {T}eos_token_id, by text\n" in out
    assert f"  6 '<turn|>': by list {T}eos_token_ids, by text\n" in out
    assert main(["inspect", str(files["<|tool_response>"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["end_tokens"]
    assert found == [
        {"id": 1, "text": "<eos>", "reasons": [f"key {T}eos_token_id", "text"]},
        {"id": 6, "text": "<|tool_response>", "reasons": ["text"]},
    ]


def test_inspect_shows_a_file_whose_end_token_is_wrong(
    circulating: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.gguf"
    shutil.copyfile(circulating / "small-q4_k_m.gguf", wrong)
    edit_metadata(wrong, {T + "eot_token_id": Value("u32", 999)})
    assert main(["inspect", str(wrong)]) == 0
    assert f"  none: {T}eot_token_id holds 999; " in capsys.readouterr().out
    assert main(["inspect", str(wrong), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["end_tokens"] == [] and "holds 999" in found["end_tokens_error"]


def test_a_circulating_file_ends_its_turn(circulating: Path) -> None:
    with DiffusionModel(circulating / "small-f32.gguf", n_threads=1) as model:
        assert [(end.token_id, end.text) for end in model.tokenizer.end_tokens] == [
            (1, "<eos>"),
            (6, "<turn|>"),
        ]
        assert model.resolve(GenerationOptions()).eos == (1, 6)


def test_an_end_token_outside_the_vocabulary_is_refused_on_opening(circulating: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    shutil.copyfile(circulating / "small-q4_k_m.gguf", wrong)
    edit_metadata(wrong, {T + "eot_token_id": Value("u32", 999)})
    with pytest.raises(ModelFormatError, match="eot_token_id holds 999"):
        DiffusionModel(wrong, n_threads=1)
