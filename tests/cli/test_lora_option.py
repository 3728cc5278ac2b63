"""--lora on the commands that compute: the same results as from Python."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.adapter_folders import write_random_folder

from pydiffusion import DiffusionModel, convert
from pydiffusion.cli import _foreign, main
from pydiffusion.cli.bench import _other
from pydiffusion.quality.doctor.examination import examine, page_of

pytestmark = pytest.mark.filterwarnings("ignore::pydiffusion.PromptWarning")

GENERATE = ["-p", "the river", "--raw", "-n", "9", "--steps", "2", "-s", "3", "-t", "1", "--json"]


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("small")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_folder(tmp_path_factory.mktemp("adapters") / "rivers", model, 1)


@pytest.fixture(scope="module")
def expected(model: Path, adapter: Path) -> dict[str, list[int]]:
    """Tokens with these adapters: none, one, half of it."""
    with DiffusionModel(model, n_threads=1) as opened:

        def tokens(lora: Any) -> list[int]:
            return opened.generate("the river", max_tokens=9, steps=2, seed=3, lora=lora).tokens.tolist()

        found = {"off": tokens([]), "on": tokens([adapter]), "half": tokens([(adapter, 0.5)])}
    assert len({tuple(each) for each in found.values()}) == 3
    return found  # fmt: skip


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def test_generate(model: Path, adapter: Path, expected: dict[str, list[int]],
                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    for options, which in [
        ([], "off"),
        (["--lora", str(adapter)], "on"),
        ([f"--lora={adapter}:1"], "on"),
        (["--lora", f"{adapter}:0.5"], "half"),
        (["--lora", f"{adapter}:1.25", "--lora", f"{adapter}:-.75"], "half"),
        (["--lora", f"{adapter}:0"], "off"),
        (["--lora-scaled", str(adapter), "0.5"], "half"),
        (["--lora-scaled", f"{adapter}:0.25,{adapter}:0.25"], "half"),
        (["--adapter-path", str(adapter)], "on"),
    ]:
        out, err = run(["generate", "-m", str(model), *GENERATE, *options], capsys)
        assert json.loads(out)["tokens"] == expected[which], options
        assert ("adapter rivers:" in err) == bool(options), err


def test_an_adapter_in_a_model_s_place(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-m", str(adapter), "-p", "x"]) == 1
    said = f"{adapter} is a folder, an adapter (LoRA) for a model: give the model, and --lora {adapter}"
    assert said in " ".join(capsys.readouterr().err.split())


def test_scales_of_other_programs() -> None:
    own = {"--lora": True, "-p": True}
    for given, becomes in [
        ("--lora-scaled a.gguf 0.5 -p hi", "--lora a.gguf:0.5 -p hi"),
        ("--lora-scaled a.gguf -1 -p hi", "--lora a.gguf:-1 -p hi"),
        ("--lora-scaled=a.gguf:2 -p hi", "--lora a.gguf:2 -p hi"),
        ("--lora-scaled a.gguf:2,b.gguf:.5 -p hi", "--lora a.gguf:2 --lora b.gguf:.5 -p hi"),
        ("--lora-scaled a.gguf -p hi", "--lora a.gguf -p hi"),
    ]:
        done = _foreign.translate("generate", given.split(), own)
        assert (done.args, done.refused, done.notes) == (becomes.split(), [], []), given
    assert _foreign.translate("split", ["--lora-scaled", "a", "1"], {}).refused == [
        "--lora-scaled: this command has no --lora"
    ]


def test_chat_and_run(model: Path, adapter: Path, capsys: pytest.CaptureFixture[str],
                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    with DiffusionModel(model, n_threads=1, lora=[adapter]) as opened:
        expected = opened.chat([{"role": "user", "content": "hello"}], max_tokens=9, steps=2, seed=3).text
    options = ["-n", "9", "--steps", "2", "-s", "3", "-t", "1", "--lora", str(adapter)]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    out, _ = run(["chat", "-m", str(model), *options], capsys)
    assert out.strip() == expected.strip()
    out, _ = run(["run", str(model), "hello", *options], capsys)
    assert out.strip() == expected.strip()


def test_a_chat_switches(model: Path, adapter: Path, capsys: pytest.CaptureFixture[str],
                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    with DiffusionModel(model, n_threads=1) as opened:
        lists: list[Any] = [[adapter], [], [(adapter, 0.5), (adapter, 0.25)]]
        message = [{"role": "user", "content": "hello"}]
        texts = [opened.chat(message, max_tokens=9, steps=2, seed=3, lora=lora).text for lora in lists]
    assert len(set(texts)) == 3
    two = f"{adapter}:0.5 '{adapter}:0.25'"
    typed = [
        "hello",
        "/lora",
        "/lora none",
        "/retry",
        "/lora nowhere",
        f"/lora {'x' * 300}",
        f"/lora {two}",
        "/retry",
        "/lora x:nan",
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(typed).encode())))
    options = ["-n", "9", "--steps", "2", "-s", "3", "-t", "1", "--lora", str(adapter)]
    out, err = run(["chat", "-m", str(model), *options], capsys)
    assert [line.strip() for line in out.splitlines()] == [text.strip() for text in texts]
    for said in ("adapters: rivers:1", "adapters: none", "nowhere: there is no such adapter",
                 "adapters: rivers:0.5, rivers:0.25", "the scale of 'x' is nan"):  # fmt: skip
        assert said in err


def test_batch_and_infill(model: Path, adapter: Path, expected: dict[str, list[int]], tmp_path: Path,
                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    lines, answers = tmp_path / "lines.txt", tmp_path / "answers.jsonl"
    lines.write_text("the river\n", encoding="utf-8")
    options = ["-n", "9", "--steps", "2", "-s", "3", "-t", "1", "--lora", f"{adapter}:0.5"]
    run(["batch", str(lines), "--lines", "--raw", "-m", str(model), "-o", str(answers), *options], capsys)
    with DiffusionModel(model, n_threads=1) as opened:
        done = opened.generate("the river", max_tokens=9, steps=2, seed=3, lora=[(adapter, 0.5)])
        assert done.tokens.tolist() == expected["half"]
        assert json.loads(answers.read_text(encoding="utf-8"))["text"] == done.text
        text = "the <|hole:6|> sea"
        holes = opened.infill(text, steps=2, seed=3, lora=[(adapter, 0.5)]).holes
        assert holes != opened.infill(text, steps=2, seed=3).holes
    lines.write_text(text, encoding="utf-8")
    options = ["--steps", "2", "-s", "3", "-t", "1", "--lora", f"{adapter}:0.5", "--json"]
    out, _ = run(["infill", "-m", str(model), str(lines), *options], capsys)
    assert json.loads(out)["holes"] == list(holes)


def test_imatrix(model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the wide river and the sea\n" * 3, encoding="utf-8")
    rest = ["-t", "1", "--lora", str(adapter)]
    run(["imatrix", str(model), str(text), "-o", str(tmp_path / "tuned"), "--max-chunks", "1", *rest], capsys)
    for name, lora in (("same", [adapter]), ("plain", [])):
        convert.collect_imatrix(
            model, text.read_text(), tmp_path / name, max_chunks=1, n_threads=1, datasets=["text.txt"],
            lora=lora,
        )  # fmt: skip
    found = {name: (tmp_path / name).read_bytes() for name in ("tuned", "same", "plain")}
    assert found["tuned"] == found["same"] != found["plain"]


def test_evaluate(model: Path, gguf_file: Callable[..., Path], adapter: Path, tmp_path: Path,
                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Of a file of another type, so that the figures depend on what both compute."""
    quantized, text = gguf_file("small", "q8_0"), tmp_path / "text.txt"
    text.write_text("the wide river and the sea\n", encoding="utf-8")
    given = ["evaluate", str(quantized), "--reference", str(model), "--prompts", str(text), "-t", "1"]
    given += ["-n", "9", "--steps", "1", "--noise", "0.4", "--json"]
    options: dict[str, Any] = {"noise": [0.4], "max_tokens": 9, "steps": 1, "n_threads": 1}
    found = []
    for arguments, lora in ([], []), (["--lora", str(adapter)], [adapter]):
        out, _ = run([*given, *arguments], capsys)
        found.append(json.loads(out)["mean_kl"])
        prompts = [text.read_text(encoding="utf-8").strip()]
        assert found[-1] == convert.evaluate(quantized, model, prompts, **options, lora=lora).mean_kl
    assert 0 < found[0] != found[1] > 0


def test_bench(model: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = ["bench", str(model), "--prompt", "8", "--steps", "2", "-t", "1", "--json"]
    out, _ = run([*bench, "--lora", str(adapter)], capsys)
    assert json.loads(out)["step_seconds"] > 0 and json.loads(out)["adapters"] == ["rivers:1"]
    assert main([*bench, "--lora", f"{adapter}:nan"]) == 2
    runtime = {"threads": 1, "ctx": None, "lora": [str(adapter)]}
    for setting, expected in (("lora=none", []), ("lora=other:2", [("other", 2.0)]),
                              ("threads=2", [(str(adapter), 1.0)])):  # fmt: skip
        assert _other(setting, model, runtime).options["lora"] == expected


def test_doctor_shows_them(model: Path, adapter: Path) -> None:
    runtime = {"n_threads": 1, "lora": [(str(adapter), 0.5)]}
    page = page_of(examine(model, checks=["shapes"], runtime=runtime), model)
    assert re.search(r"adapter rivers.*pass.*scale 0\.5, \d+ matrices \(both\), rank 4", page), page
    assert str(adapter.parent) not in page  # no folders
    runtime["lora"] = [(str(adapter.parent / "none"), 0.5)]
    report = examine(model, checks=["shapes"], runtime=runtime)
    assert report.failed and "there is no such adapter" in page_of(report, model)


def test_several_with_commas_are_repeated_options(
    model: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", "-m", str(model), *GENERATE]
    for several in (f"{adapter}:0.5,{adapter}", f"{adapter},{adapter}:2"):
        assert main([*given, "--lora", several]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "those between the commas: give each by itself (--lora A --lora B)" in said
    for wrong in (",", f"{adapter}:0.5:0.3", f"{adapter},", "x:nan,y"):
        assert main([*given, "--lora", wrong]) == 1
        assert "between the commas" not in capsys.readouterr().err


def test_a_missing_adapter_of_the_demo_is_told_before_its_model_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise FileNotFoundError("the demo's adapter is missing")

    def made(*_: Any) -> Path:
        raise AssertionError("the model is made")

    monkeypatch.setattr("pydiffusion.demo.upright.adapter_path", missing)
    monkeypatch.setattr("pydiffusion.cli.demo._converted", made)
    assert main(["demo", "--lora"]) == 1
    assert "the demo's adapter is missing" in capsys.readouterr().err
