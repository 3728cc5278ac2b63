"""The benchmark's arithmetic, and the synthetic files that it measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydiffusion import DiffusionModel, _native
from pydiffusion._util.cpus import available_cpus
from pydiffusion.cli import main
from pydiffusion.convert.quantization.recipes import RECIPES
from pydiffusion.errors import ConversionError
from pydiffusion.testing import comparison
from pydiffusion.testing.autoregressive import bytes_per_token
from pydiffusion.testing.bench import PARTS, run_bench
from pydiffusion.testing.bench_report import compare_with_earlier, format_result
from pydiffusion.testing.comparison import Setup
from pydiffusion.testing.synthetic import SHAPES, write_synthetic


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic("tiny", tmp_path_factory.mktemp("synthetic") / "tiny.gguf")


def test_the_released_shape_has_the_released_size() -> None:
    config = SHAPES["26b-a4b"]
    experts = len(config.sliding) * config.num_experts * 3 * config.moe_intermediate_size * config.hidden_size
    assert 25e9 > experts > 22e9  # of 25.2e9 in all
    assert config.sliding.count(False) == 5 and not config.sliding[-1]


@pytest.mark.parametrize("type", ["bf16", "q8_0", "q4_k_m"])
def test_a_synthetic_file_is_valid_and_finite(type: str, tmp_path: Path) -> None:
    path = write_synthetic("tiny", tmp_path / "tiny.gguf", type)
    model = _native.Model(str(path), 1)
    assert model.file.metadata["general.file_type"] == RECIPES[type].file_type
    session = _native.Session(model, 300)
    session.encode(np.arange(20, dtype=np.int32))
    logits = session.denoise(np.arange(256, dtype=np.int32), None)
    assert np.isfinite(logits).all() and logits.std() > 0.1


def test_a_synthetic_file_takes_text(tiny: Path) -> None:
    from pydiffusion import DiffusionModel

    with DiffusionModel(tiny, n_threads=1, n_ctx=300) as model:
        assert model.detokenize(model.tokenize("Grüße")) == "Grüße"
        assert model.generate("Hi", max_tokens=4, steps=1, seed=0).n_prompt == 3  # bos and two bytes


def test_operations_are_counted(tiny: Path) -> None:
    """Against the sum of 2 m n k over the shape's matmuls."""
    result = run_bench(tiny, n_threads=1, n_prompt=40, n_steps=2)
    assert list(result.parts) == list(PARTS)
    c = SHAPES["tiny"]
    n, d = c.canvas_length, c.hidden_size
    assert {"attend_tiles", "attend"} & set(result.operation_seconds)
    assert {"cap_and_measure", "join_branches"} <= set(result.operation_seconds)
    assert "by operation: matmuls and attention" in format_result(result)
    operations = {name: part.seconds * part.operations_per_second for name, part in result.parts.items()}
    mlp = 2 * 3 * n * d * c.intermediate_size
    assert operations["head"] == pytest.approx(2 * n * d * c.vocab_size)
    assert operations["self-conditioning"] == pytest.approx(2 * n * d * c.vocab_size + mlp)
    assert operations["dense"] == pytest.approx(2 * mlp)
    router = 2 * n * d * c.num_experts
    experts = 2 * 3 * n * d * c.moe_intermediate_size * c.top_k_experts
    assert operations["experts"] == pytest.approx(2 * (router + experts))
    q, q_full = 4 * 64, 4 * 128
    projections = 2 * n * d * (2 * q + 2 * 2 * 64) + 2 * n * d * (2 * q_full + 128)
    attention = (
        4 * n * (q * (31 + n) + q_full * (40 + n))
    )  # the window shows 31 tokens, the full layer all 40
    assert operations["attention"] == pytest.approx(projections + attention)


def test_json_and_compare(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "-m", str(tiny), "--prompt", "16", "--steps", "2", "--threads", "1"]
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["step_seconds"] > 0 and set(figures["parts"]) == set(PARTS)
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(figures))
    assert main([*arguments, "--compare", str(earlier)]) == 0
    assert "above 1: faster now" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="NOT CHECKED: what others use; only Linux says it")
def test_a_busy_process_shows(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On each CPU one of another login session, which takes half of it or more."""
    arguments = ["bench", "-m", str(tiny), "--prompt", "8", "--steps", "24", "--threads", "1", "--json"]
    with ExitStack() as stack:
        for _ in range(available_cpus()):
            code = f"import os\nprint(flush=True)\nwhile os.getppid() == {os.getpid()}: pass"
            command = [sys.executable, "-c", code]
            busy = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
            stack.callback(lambda busy=busy: (busy.kill(), busy.communicate()))
            assert busy.stdout is not None and busy.stdout.readline()
        assert main(arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    load = figures["load"]
    assert load["quiet"] is False
    assert load["others"] >= 0.4 * load["n_cpus"] and load["runnable"] >= 0.5 * load["n_cpus"]
    assert f"others used {load['others']:.2f} of {load['n_cpus']} CPUs" in load["disturbances"]
    assert 0 < load["fair_share_by_session"] <= load["fair_share_by_thread"] < 1
    assert figures["step_cpu_seconds"] * 23 == pytest.approx(load["ran"] * load["seconds"])


def test_settings_in_turns(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two threads, or another cache type, of the same file; another file."""
    arguments = ["bench", "-m", str(tiny), "--prompt", "8", "--steps", "6", "--threads", "1"]
    assert main([*arguments, "--json", "--compare", "threads=2,cache-type=f32"]) == 0
    figures = json.loads(capsys.readouterr().out)
    found = figures["comparison"]
    assert found["names"] == ["tiny.gguf", "threads=2,cache-type=f32"] and found["n_threads"] == [1, 2]
    assert found["step_speedup"]["n_pairs"] == found["prefill_speedup"]["n_pairs"] == 6
    low, high = found["step_speedup"]["interval"]
    assert 0 < low <= found["step_speedup"]["median"] <= high
    other = write_synthetic("tiny", tmp_path / "other.gguf", "q8_0")
    assert main([*arguments, "--compare", str(other)]) == 0
    out = capsys.readouterr().out
    assert "tiny.gguf against other.gguf, in turns" in out and "not in turns" not in out


def test_settings_reach_the_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def compare_in_turns(first: Setup, second: Setup, n_prompt: int, n_rounds: int) -> Any:
        with first.open(n_prompt, 1, 1) as one, second.open(n_prompt, 1, 1) as other:
            opened.extend((model.n_threads, model.description["kv_type"]) for model in (one, other))
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "compare_in_turns", compare_in_turns)
    arguments = ["bench", "-m", str(tiny), "--prompt", "8", "--steps", "2", "--cache-type", "f32"]
    main([*arguments, "--threads", "1", "--compare", f"threads=2,model={tiny},cache-type=f16"])
    assert opened == [(1, "f32"), (2, "f16")]


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("thread=1", "no setting 'thread'; settings are model, ctx, threads"),
        ("threads=1,kernels", "'kernels' is not NAME=VALUE"),
        ("threads=two", "threads is 'two'; permitted is an integer"),
        ("kernels=fast", "--kernels is fast"),
        ("no-such-file", "neither a file nor settings"),
    ],
)
def test_wrong_settings(tiny: Path, against: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "-m", str(tiny), "--compare", against]) == 2
    assert message in capsys.readouterr().err


def test_autoregressive(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rates by their definitions, from the seconds that were measured."""
    arguments = ["bench", "-m", str(tiny), "--prompt", "16", "--steps", "6", "--threads", "1"]
    assert main([*arguments, "--json", "--autoregressive"]) == 0
    found = json.loads(capsys.readouterr().out)["autoregressive"]
    assert found["tokens_per_second"] == pytest.approx(1 / found["token_seconds"])
    assert found["steps"] == 48 and found["asked"] is False  # random weights never converge
    for name, steps in (("16", 16), ("measured", 48)):
        canvas = steps * found["step_seconds"] + found["commit_seconds"]
        rate = found[f"diffusion_tokens_per_second_at_{name}_steps"]
        assert rate == pytest.approx(found["canvas_length"] / canvas)
    ratio = found["diffusion_tokens_per_second_at_16_steps"] / found["tokens_per_second"]
    assert found["speedup"]["median"] == pytest.approx(ratio, rel=0.5)


def test_bytes_of_a_token(tmp_path: Path) -> None:
    """All BF16 matrices but self-conditioning's, and of the experts those that a token uses."""
    c = SHAPES["tiny"]
    with DiffusionModel(write_synthetic("tiny", tmp_path / "tiny.gguf", "bf16"), n_threads=1) as model:
        found = bytes_per_token(model)
    d, q, q_full = c.hidden_size, 4 * 64, 4 * 128
    attention = 2 * d * q + 2 * d * 2 * 64 + 2 * d * q_full + d * 128  # a full layer's K serves as V
    dense, expert = 3 * d * c.intermediate_size, 3 * d * c.moe_intermediate_size
    n_layers = len(c.sliding)
    weights = c.vocab_size * d + attention + n_layers * (dense + expert * c.top_k_experts)
    assert found == pytest.approx(2 * weights, rel=0.02)  # norms and routers are small, and F32


def test_a_result_compared_with_itself_is_one(tiny: Path) -> None:
    result = run_bench(tiny, n_threads=1, n_prompt=8, n_steps=2)
    ratios = [
        float(line.split()[-1]) for line in compare_with_earlier(result, result.to_dict()).splitlines()[2:]
    ]
    assert ratios == [1.0] * len(ratios) and len(ratios) == 3 + len(PARTS)
    assert result.model in format_result(result)


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert main(["bench", "--synthetic", "huge"]) == 2
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    assert main(["bench", "--synthetic", "tiny", "--compare", str(broken)]) == 2
    assert "not the result of an earlier" in capsys.readouterr().err
    with pytest.raises(ValueError, match="known are 26b-a4b, mid, tiny"):
        write_synthetic("huge", tmp_path / "huge.gguf")
    with pytest.raises(ConversionError, match="no such folder"):
        write_synthetic("tiny", tmp_path / "nowhere" / "tiny.gguf")
