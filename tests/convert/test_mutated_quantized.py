"""Whole conversions of quantized folders whose tensors have other dtypes and shapes, or are gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import quantized_folders
from support.quantized_folders import STYLES, Stored, n_bytes, quantize, write_folder

from pydiffusion.convert import convert
from pydiffusion.errors import PyDiffusionError

DTYPES = ("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F16", "BF16", "I32", "U32", "F32", "I64")
SIZES = st.sampled_from([0, 1, 2, 3, 8, 31, 64, 127, 256, 320])


def changed(data: st.DataObject, stored: Stored) -> Stored:
    """One to three tensors removed, renamed, or of another dtype or shape."""
    result = dict(stored)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(list(result)))
        dtype, shape, content = result.pop(name)
        action = data.draw(st.sampled_from(["remove", "rename", "dtype", "shape"]))
        if action == "remove":
            continue
        if action == "rename":
            name += data.draw(st.sampled_from(["_scale", "_packed", "_scale_2", "_shape", ".scales", "\n"]))
        elif action == "dtype":
            dtype = data.draw(st.sampled_from(DTYPES))
        else:
            i = data.draw(st.integers(0, len(shape)))
            shape = (*shape[:i], data.draw(SIZES), *shape[i + data.draw(st.integers(0, 1)) :])
        size = n_bytes(dtype, shape)
        result[name] = dtype, shape, (content + bytes(size))[:size]
    return result


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_examples", [8, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["mixed", "mlx", "gptq", "nvfp4-modelopt"])
def test_tensors(tmp_path: Path, name: str, n_examples: int) -> None:
    stored = quantize(STYLES[name], quantized_folders.small_weights()).stored
    target = tmp_path / "out" / "m.gguf"
    target.parent.mkdir()
    outcomes: set[str] = set()

    @settings(max_examples=n_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        folder = write_folder(tmp_path / "q", changed(data, stored), STYLES[name])
        try:
            convert(folder, target, "nvfp4" if name.startswith("nvfp4") else "q8_0")
        except PyDiffusionError as error:
            assert len(str(error)) < 2000 and "\n" not in str(error)
            outcomes.add("refused")
        else:
            target.unlink()
        assert list(target.parent.iterdir()) == []

    check()
    assert "refused" in outcomes
