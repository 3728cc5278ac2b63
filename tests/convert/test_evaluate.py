"""`evaluate`: KL by hand, and coarser quantization measures worse."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pydiffusion.cli import main
from pydiffusion.convert import convert, evaluate, evaluate_family
from pydiffusion.errors import ConversionError
from pydiffusion.quality import evaluation

PROMPTS = ("the river", "a")


def test_kl_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    reference = np.log(np.stack([p, p, [1.0, 1e-9, 1e-9]])).astype(np.float32)
    logits = np.log(np.stack([q, p, [1.0, 1e-9, 1e-9]])).astype(np.float32) + 7
    kl, same = evaluation.compare_logits(reference, logits)
    assert kl[0] == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2), rel=1e-5)
    assert kl[1:] == pytest.approx([0, 0], abs=1e-6)
    assert same.tolist() == [False, True, True]


def test_kl_does_not_depend_on_chunking() -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 37, 50)).astype(np.float32)
    kl, _ = evaluation.compare_logits(a, b)
    p, q = np.exp(a.astype(float)), np.exp(b.astype(float))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert kl == pytest.approx((p * np.log(p / q)).sum(1), rel=1e-6)


def test_a_file_agrees_with_itself(gguf_file: Callable[..., Path]) -> None:
    path = gguf_file("mild")
    report = evaluate(path, path, PROMPTS, max_tokens=8, noise=(0.5,), n_threads=1)
    assert report.mean_kl < 1e-12 and report.top1 == report.same_answers == 1
    assert report.steps == report.reference_steps and report.bits_per_weight == pytest.approx(32)
    assert [(a.noise, a.self_conditioning) for a in report.agreements] == [(0.5, False), (0.5, True)]
    assert all(a.n_positions == 16 for a in report.agreements)


def test_fewer_bits_measure_worse(gguf_file: Callable[..., Path]) -> None:
    reports = [
        evaluate(gguf_file("mild", type), gguf_file("mild"), PROMPTS, max_tokens=8, n_threads=1)
        for type in ("bf16", "q8_0", "q4_k_m", "q2_k")
    ]
    figures = [report.mean_kl for report in reports]
    assert figures == sorted(figures) and figures[0] < 0.02 < figures[-1], figures
    assert reports[0].top1 > reports[-1].top1
    bits = [report.bits_per_weight for report in reports]
    assert bits == sorted(bits, reverse=True)


def test_refusals(gguf_file: Callable[..., Path]) -> None:
    with pytest.raises(ConversionError, match="n_vocab"):
        evaluate(gguf_file("tiny"), gguf_file("mild"), PROMPTS)
    with pytest.raises(ValueError, match="no prompts"):
        evaluate(gguf_file("mild"), gguf_file("mild"), [])
    with pytest.raises(ValueError, match="noise"):
        evaluate(gguf_file("mild"), gguf_file("mild"), PROMPTS, noise=(0.0,))


def test_prompts_may_begin_with_empty_lines(gguf_file: Callable[..., Path]) -> None:
    path, titles = gguf_file("mild"), []
    evaluate(
        path, path, ["\n\na", "\n"], max_tokens=8, noise=(0.5,), n_threads=1,
        progress=lambda state: titles.append(state.tensor),
    )  # fmt: skip
    assert titles == ["a", ""]


def test_the_command(
    gguf_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = [str(gguf_file("mild", "q8_0")), "--reference", str(gguf_file("mild")), "--threads", "1"]
    arguments += ["--prompts", str(tmp_path / "prompts.txt"), "-n", "8", "--noise", "0.5"]
    assert main(["evaluate", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_prompts"] == 2 and found["solved"] is None
    assert main(["evaluate", *arguments]) == 0
    assert f"{found['mean_kl']:.5f}" in capsys.readouterr().out
    assert main(["evaluate", *arguments, "--noise", "2"]) == 2


def test_demo_tasks_are_checked(gguf_file: Callable[..., Path]) -> None:
    tasks = evaluation.demo_prompts(2, 1)
    assert [task for task, _ in tasks[:3]][:2] == ["sudoku", "sudoku"] and len(tasks) > 5
    assert tasks == evaluation.demo_prompts(2, 1), "the same ones every time"
    answer = evaluation._Answer(np.zeros(1), (1,), (), "")
    assert evaluation._solved(tasks, [answer] * len(tasks)) == 0
    right = dataclasses.replace(answer, text=str(sum(map(int, dict(tasks)["add"][5:].split("+")))))
    assert evaluation._solved([("add", dict(tasks)["add"])], [right]) == 1


def test_padding_costs_nothing_in_quality(checkpoint_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The same function: a padded file answers as the unpadded one, up to rounding of sums."""
    for pad in (False, True):
        convert(checkpoint_folder("mild"), tmp_path / f"{pad}.gguf", "f32", pad=pad)
    report = evaluate(tmp_path / "True.gguf", tmp_path / "False.gguf", PROMPTS, max_tokens=8, n_threads=1)
    assert report.mean_kl < 1e-6 and report.top1 == 1


def test_a_family_equals_single_evaluations(
    gguf_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the reference answers once, and whether or not its logits can be kept."""
    files = [gguf_file("mild", "q8_0"), gguf_file("mild", "q2_k")]
    options = {"max_tokens": 8, "noise": (0.5, 1.0), "n_threads": 1}
    alone = [evaluate(path, gguf_file("mild"), PROMPTS, **options) for path in files]
    assert evaluate_family(files, gguf_file("mild"), PROMPTS, **options) == alone
    monkeypatch.setattr(evaluation, "_KEPT_BYTES", 0)
    assert evaluate_family(files, gguf_file("mild"), PROMPTS, **options) == alone
    with pytest.raises(ValueError, match="no files"):
        evaluate_family([], gguf_file("mild"), PROMPTS)


def test_padding_does_not_lower_bits_per_weight(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    f32 = convert(checkpoint_folder("mild"), tmp_path / "f32.gguf", "f32")
    padded = convert(checkpoint_folder("mild"), tmp_path / "p.gguf", "q8_0", pad=True)
    assert padded.n_weights == f32.n_weights
    found = evaluate(padded.target, f32.target, ["a"], max_tokens=8, noise=(1.0,), n_threads=1)
    assert found.bits_per_weight == pytest.approx(padded.bits_per_weight, rel=1e-3)


def test_a_family_as_table_and_picture(
    gguf_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="NOT CHECKED: pictures (matplotlib is not installed)")
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    files = [str(gguf_file("mild", type)) for type in ("q8_0", "q4_k_m")]
    arguments = ["evaluate", *files, "--reference", str(gguf_file("mild")), "--threads", "1", "-n", "8"]
    arguments += ["--prompts", str(tmp_path / "prompts.txt"), "--noise", "0.5"]
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        picture = tmp_path / f"out.{suffix}"
        assert main([*arguments, "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(start)
        rows = capsys.readouterr().out.splitlines()
        assert len(rows) == 5 and Path(files[0]).name in rows[2] and "(reference)" in rows[4]
    drawing = (tmp_path / "out.svg").read_text(encoding="utf-8")
    assert drawing.count("<!-- mild-q8_0 -->") == 1, "matplotlib notes each text that it draws"
    assert main([*arguments, "--plot", str(tmp_path / "out.txt")]) == 2
    assert main([*arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_a_picture_without_matplotlib_is_refused_before_measuring(
    gguf_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(evaluation, "evaluate_family", None)
    path = str(gguf_file("mild"))
    assert main(["evaluate", path, "--reference", path, "--plot", str(tmp_path / "out.png")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
