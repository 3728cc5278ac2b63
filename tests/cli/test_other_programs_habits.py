"""Spellings and arguments as of llama.cpp's programs: types in capitals, quantize IN OUT TYPE, -n -1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader

from pydiffusion.cli import main


@pytest.fixture(scope="module")
def source(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("tiny", "f32")


def types(path: Path) -> set[str]:
    return {tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize(
    "arguments", [["Q8_0"], ["q8_0"], ["q8-0"], ["Q8_0", "1"], ["Q8_0", "--threads", "1"]]
)
def test_quantize_in_out_type(source: Path, tmp_path: Path, arguments: list[str]) -> None:
    assert main(["quantize", str(source), str(tmp_path / "o.gguf"), *arguments]) == 0
    assert "Q8_0" in types(tmp_path / "o.gguf")


def test_quantize_in_type(source: Path, tmp_path: Path) -> None:
    """The target may be left out: then it is beside the source."""
    (tmp_path / "m.gguf").symlink_to(source)
    assert main(["quantize", str(tmp_path / "m.gguf"), "Q4_0"]) == 0
    assert "Q4_0" in types(tmp_path / "m-q4_0.gguf")
    assert main(["quantize", str(tmp_path / "m.gguf"), "Q4_1", "1"]) == 0  # with a number of threads
    assert "Q4_1" in types(tmp_path / "m-q4_1.gguf")
    assert main(["quantize", str(tmp_path / "m.gguf"), "--type", "Q5_0"]) == 0
    assert "Q5_0" in types(tmp_path / "m-q5_0.gguf")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["o.gguf", "Q8_0", "--type", "q4_0"], "given twice: Q8_0 and --type q4_0"),
        (["Q8_0", "--type", "q4_0"], "given twice"),
        (["o.gguf", "Q8_0", "2", "--threads", "1"], "given twice: 2 and --threads 1"),
        ([], "give OUT"),
        (["Q8_0", "Q4_0"], "Q4_0 is neither"),
        (["o.gguf", "UD-Q4_K_XL"], "the nearest is q4_k_m"),
        (["o.gguf", "--type", "Q4_K_L"], "the nearest is q4_k_m"),
        (["o.gguf", "Q8_0", "2", "3"], "unexpected"),
    ],
)
def test_wrong_use(
    source: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(source), *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_convert_as_convert_hf_to_gguf(
    checkpoint_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = checkpoint_folder("tiny"), tmp_path / "o.gguf"
    assert main(["convert", str(folder), "--outfile", str(target), "--outtype", "BF16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "bf16"
    assert "BF16" in types(target)
    assert main(["convert", str(folder), "--dry-run", "--type", "IQ3_XS", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "iq3_xs"


def test_tensor_types_in_any_case(source: Path, tmp_path: Path) -> None:
    options = ["Q8_0", "--tensor-type", "attn_v=BF16", "--tensor-type", "ffn_down=f16"]
    assert main(["quantize", str(source), str(tmp_path / "o.gguf"), *options]) == 0
    assert {"Q8_0", "BF16", "F16"} < types(tmp_path / "o.gguf")


@pytest.mark.parametrize("limit", [["-n", "-1"], ["--max-tokens", "-1"], []])
def test_minus_one_is_no_limit(source: Path, limit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "-m", str(source), "-p", "ab", "--raw", "--seed", "1", "--steps", "1"]
    assert main([*command, "--ctx", "32", "--threads", "1", "--json", *limit]) == 0
    found = json.loads(capsys.readouterr().out)
    whole = (32 - found["n_prompt"]) // 4 * 4  # canvases of four tokens
    assert found["finish_reason"] == "eos" or len(found["tokens"]) == whole


def test_minus_one_in_a_batch(source: Path, tmp_path: Path) -> None:
    line = {"prompt": "ab", "seed": 2}
    lines = [line, line | {"max_tokens": -1}, line | {"max_tokens": 4}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--steps", "1", "--ctx", "32", "--threads", "1", "-n", "-1"]
    files = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert main(["batch", "-m", str(source), *files, *options]) == 0
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    tokens = {answer["line"]: answer["tokens"] for answer in answers}
    assert tokens[1] == tokens[2] > tokens[3] == 4


@pytest.mark.parametrize("limit", ["-2", "0"])
def test_other_limits_are_refused(source: Path, limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-m", str(source), "-p", "ab", "-n", limit]) == 2
    assert "max_tokens" in capsys.readouterr().err
