"""Quantized tensors as other programs stored them, against the values that these programs read from them, and
codes against torch. tests/reference/make_quantized_goldens.py recorded the former.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.quantized_goldens import Case, load_cases

from pydiffusion.convert.checkpoint.quantized.codes import BYTE_FLOATS
from pydiffusion.convert.checkpoint.quantized.reader import open_weights
from pydiffusion.convert.checkpoint.quantized.settings import read_quantization
from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint
from pydiffusion.convert.checkpoint.strict_json import Fields
from pydiffusion.convert.checkpoint.weights import Weights

CASES = {case[0]: case for case in load_cases()}
#: One multiplication of float32 defines most values, and MLX on a CPU rounds once more to add its bias: these
#: are exact. compressed-tensors divides NVFP4's scales by the global one; multiplying by its inverse, as
#: here, rounds once more, so the two differ by two units in the last place.
DIVIDED = "ct-nvfp4"


@contextmanager
def opened(folder: Path, case: Case) -> Iterator[Weights]:
    """The weights of a case, in a checkpoint folder of its own."""
    _, data, config, _ = case
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = read_quantization(folder, Fields(config, "config.json", []), [])
    with Checkpoint(folder) as checkpoint:
        yield open_weights(checkpoint, settings, [])


@pytest.mark.parametrize("name", CASES)
def test_values(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    with opened(tmp_path, case) as weights:
        assert set(weights.by_name) == set(case[3])
        for tensor, expected in case[3].items():
            weight = weights.by_name[tensor]
            assert (weight.dtype, weight.shape) == ("F32", expected.shape)
            read = weight.read(0, expected.nbytes).view(np.float32).reshape(expected.shape)
            assert np.allclose(read, expected, rtol=3e-7 if name.startswith(DIVIDED) else 0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_any_range(tmp_path: Path, name: str) -> None:
    """A range of elements, in the middle of rows, words and groups, is that of the whole tensor."""
    case = CASES[name]
    random = np.random.default_rng(0)
    with opened(tmp_path, case) as weights:
        for tensor, expected in case[3].items():
            read = weights.by_name[tensor].read
            whole = read(0, expected.nbytes)
            ends = np.sort(random.integers(0, expected.size + 1, (12, 2)), axis=1)
            for start, end in [*ends.tolist(), (expected.size - 1, expected.size)]:
                part = read(4 * start, 4 * (end - start))
                assert part.tobytes() == whole[4 * start : 4 * end].tobytes(), (start, end)


def test_every_format_is_recorded() -> None:
    """Of each program what the reader claims to read."""
    wanted = ["ct-float", "ct-int", "ct-pack-quantized:4", "ct-pack-quantized:3-zeros", "old-ct:3"]
    wanted += ["old-ct:4-g_idx", "ct-nvfp4", "ct-mxfp4", "ct-mxfp8", "modelopt:nvfp4", "modelopt:fp8"]
    wanted += ["fp8:2d", "fp8:3d", "mxfp4:blocks", "awq", "mlx:modules", "mlx:stack", "mlx:nvfp4"]
    wanted += [f"gptq:{bits}" for bits in (2, 3, 4, 8)] + [f"gptq_v2:{bits}" for bits in (2, 3, 4, 8)]
    wanted += [f"mlx:{bits}" for bits in (1, 2, 3, 4, 5, 6, 8)]
    assert [start for start in wanted if not any(name.startswith(start) for name in CASES)] == []


@pytest.mark.reference
@pytest.mark.parametrize("dtype", BYTE_FLOATS)
def test_codes_of_a_byte(dtype: str) -> None:
    """Every code, those of NaN and infinity included."""
    torch = pytest.importorskip("torch")
    of_torch = {
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
    }[dtype]
    expected = torch.arange(256, dtype=torch.uint8).view(of_torch).float().numpy()
    assert np.array_equal(BYTE_FLOATS[dtype], expected, equal_nan=True)
    assert np.array_equal(np.signbit(BYTE_FLOATS[dtype]), np.signbit(expected))
