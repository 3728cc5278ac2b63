"""The benchmark's arithmetic, and the synthetic files that it measures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pydiffusion import _native
from pydiffusion.cli import main
from pydiffusion.convert.quantization.recipes import RECIPES
from pydiffusion.errors import ConversionError
from pydiffusion.testing.bench import PARTS, run_bench
from pydiffusion.testing.bench_report import compare_with_earlier, format_result
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
