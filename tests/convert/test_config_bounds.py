"""What ``config.json`` may say: the runtime loads all that the converter accepts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from support import checkpoint_folders as folders
from support.gguf_files import fields_of, read_tensors

from pydiffusion import DiffusionModel
from pydiffusion.convert import convert, estimate_memory, plan_sizes, read_shape
from pydiffusion.errors import ConversionError

Json = dict[str, Any]
FULL = ("text_config", "rope_parameters", "full_attention")
SLIDING = ("text_config", "rope_parameters", "sliding_attention")

# Least and greatest value, as the runtime has them (native/architectures/diffusion_gemma_file.cpp).
INTEGERS: dict[tuple[str, ...], tuple[int, int]] = {
    ("text_config", "vocab_size"): (2, 1 << 24),
    ("text_config", "hidden_size"): (1, 1 << 17),
    ("text_config", "intermediate_size"): (1, 1 << 20),
    ("text_config", "moe_intermediate_size"): (1, 1 << 20),
    ("text_config", "num_attention_heads"): (2, 1024),  # two key-value heads share them
    ("text_config", "num_experts"): (2, 4096),  # two of them are used
    ("text_config", "top_k_experts"): (1, folders.EXPERTS),
    ("text_config", "head_dim"): (2, 1024),
    ("text_config", "sliding_window"): (1, 1 << 24),
    ("text_config", "max_position_embeddings"): (8, (2**31 - 1) // 2),  # at least a canvas
    ("canvas_length",): (1, 1024),  # of 1024 positions
}
NUMBERS: dict[tuple[str, ...], tuple[float, float]] = {
    ("text_config", "rms_norm_eps"): (1e-12, 0.1),
    ("text_config", "final_logit_softcapping"): (1e-3, 1e6),
    (*FULL, "rope_theta"): (1.0, 1e12),
    (*SLIDING, "rope_theta"): (1.0, 1e12),
}
SAMPLER: dict[tuple[str, ...], tuple[float, float]] = {
    ("max_denoising_steps",): (1, 1 << 20),
    ("stability_threshold",): (0, 1 << 20),
    ("confidence_threshold",): (1e-30, 1e9),
    ("sampler_config", "entropy_bound"): (1e-30, 1e9),
    ("t_min",): (0.0, 0.8),  # below t_max
    ("t_max",): (0.6, 100.0),
}


def put(values: Json, path: tuple[str, ...], value: Any) -> Json:
    changed = copy.deepcopy(values)
    *outer, key = path
    holder = changed
    for step in outer:
        holder = holder[step]
    holder[key] = value
    return changed


def accepted(folder: Path, config: Json) -> bool:
    """Whether the converter takes this config; then the runtime must, for a file of it."""
    folders.write_json(folder / "config.json", config)
    try:
        plan = plan_sizes(folder, "f32")
    except ConversionError as error:
        assert "config.json" in str(error) and "\n" not in str(error)
        return False
    estimate_memory(read_shape(folder), plan, 8)  # reads the planned header as the runtime does, or raises
    return True


@pytest.mark.parametrize("path", INTEGERS, ids="/".join)
def test_integers_at_their_bounds(tmp_path: Path, path: tuple[str, ...]) -> None:
    low, high = INTEGERS[path]
    taken = [accepted(tmp_path, put(folders.model_config(), path, n)) for n in (low - 1, low, high)]
    assert taken == [False, True, True]
    step = 2 if path[-1] in ("head_dim", "num_attention_heads") else 1
    assert not accepted(tmp_path, put(folders.model_config(), path, high + step))


@pytest.mark.parametrize("path", NUMBERS, ids="/".join)
def test_numbers_at_their_bounds(tmp_path: Path, path: tuple[str, ...]) -> None:
    low, high = NUMBERS[path]
    below, above = (
        np.nextafter(np.float32(low), np.float32(-1)),
        np.nextafter(np.float32(high), np.float32(1e30)),
    )
    values = [float(below), low, high, float(above), 0, -low, 1e-45, 1e39]
    taken = [accepted(tmp_path, put(folders.model_config(), path, value)) for value in values]
    assert taken == [False, True, True, False, False, False, False, False]


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [path]
    return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]


VALUES = (
    st.sampled_from(
        [0, 1, 2, 3, 4, 6, 7, 8, 16, 64, 128, 512, 1023, 1024, 1025, 4096, 4097, 1 << 16, 1 << 17]
    )
    | st.sampled_from(
        [(1 << 17) + 1, 1 << 20, (1 << 20) + 1, 1 << 24, (1 << 24) + 1, 2**30 - 1, 2**30, 2**31]
    )
    | st.sampled_from(
        [0.0, 1e-45, 1e-30, 1e-12, 1e-6, 1e-3, 0.1, 0.25, 0.5, 1.0, 30.0, 1e6, 1e12, 1e13, 1e39]
    )
    | st.sampled_from([None, True, False, "vision", "all", "default", "proportional"])
)


def test_whatever_is_accepted_loads(tmp_path: Path) -> None:
    configs = {shape: folders.model_config(shape) for shape in ("saved", "google")}
    for config in configs.values():
        config["text_config"] |= {"partial_rotary_factor": None, "final_logit_softcapping": 30.0}
    outcomes: set[bool] = set()

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        config = configs[data.draw(st.sampled_from(sorted(configs)))]
        paths = [path for path in leaves(config) if path[0] in ("text_config", "canvas_length")]
        for _ in range(data.draw(st.integers(1, 3))):
            config = put(config, data.draw(st.sampled_from(paths)), data.draw(VALUES))
        outcomes.add(accepted(tmp_path, config))

    check()
    assert outcomes == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((path, value) for path, bounds in NUMBERS.items() for value in bounds),
        (("text_config", "sliding_window"), 1),
        (("text_config", "sliding_window"), 1 << 24),
        (("text_config", "max_position_embeddings"), (2**31 - 1) // 2),
        (("canvas_length",), 1),
    ],
    ids=str,
)
def test_files_at_the_bounds_load(folder: Path, tmp_path: Path, path: tuple[str, ...], value: float) -> None:
    config = put(json.loads((folder / "config.json").read_text()), path, value)
    DiffusionModel(converted(folder, tmp_path, "config.json", config), n_ctx=64, n_threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("path", SAMPLER, ids="/".join)
def test_sampler_defaults_at_their_bounds_load(folder: Path, tmp_path: Path, path: tuple[str, ...]) -> None:
    plain = folders.generation_config() | {"t_max": 0.9, "t_min": 0.5}
    for value in SAMPLER[path]:
        made = converted(folder, tmp_path, "generation_config.json", put(plain, path, value))
        DiffusionModel(made, n_ctx=64, n_threads=1)
    for value in (-1, 2**31 if isinstance(SAMPLER[path][1], int) else 1.1e9):
        with pytest.raises(ConversionError, match=rf"generation_config\.json.*{path[-1]}"):
            converted(folder, tmp_path, "generation_config.json", put(plain, path, value))


def converted(folder: Path, tmp_path: Path, file: str, value: Json) -> Path:
    """The GGUF of a folder in which one JSON file has this value."""
    edited = tmp_path / "edited"
    edited.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if not (edited / path.name).exists():
            (edited / path.name).symlink_to(path)
    (edited / file).unlink()
    folders.write_json(edited / file, value)
    convert(edited, tmp_path / "m.gguf", "f32")
    return tmp_path / "m.gguf"


def divisors(folder: Path, tmp_path: Path, config: Json) -> list[float]:
    """Of a file's full layers: 1 for a pair that rotates."""
    made = converted(folder, tmp_path, "config.json", config)
    return read_tensors(GGUFReader(made))["rope_freqs.weight"].tolist()


def test_a_factor_beside_the_rope_tables_is_for_those_without(folder: Path, tmp_path: Path) -> None:
    """transformers 5.23 takes it where a table has none: a sliding layer can't have one but 1."""
    config = put(folders.model_config(), ("text_config", "partial_rotary_factor"), 0.5)
    with pytest.raises(ConversionError, match=r"sliding_attention.*partial_rotary_factor.*0\.5"):
        divisors(folder, tmp_path, config)
    config = put(config, (*SLIDING, "partial_rotary_factor"), 1.0)
    assert (
        divisors(folder, tmp_path, config).count(1.0) == folders.GLOBAL_HEAD_DIM // 8
    )  # the table's quarter
    del config["text_config"]["rope_parameters"]["full_attention"]["partial_rotary_factor"]
    assert divisors(folder, tmp_path, config).count(1.0) == folders.GLOBAL_HEAD_DIM // 4
    config["text_config"]["partial_rotary_factor"] = 1.0
    assert divisors(folder, tmp_path, config).count(1.0) == folders.GLOBAL_HEAD_DIM // 2


@pytest.mark.parametrize("factor", [1.0, None])
def test_a_factor_without_rope_tables(folder: Path, tmp_path: Path, factor: float | None) -> None:
    config = put(folders.model_config(), ("text_config", "partial_rotary_factor"), factor)
    del config["text_config"]["rope_parameters"]
    assert divisors(folder, tmp_path, config).count(1.0) == folders.GLOBAL_HEAD_DIM // 8


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("factor", [0.25, 0, "half"])
def test_another_factor_is_refused(folder: Path, tmp_path: Path, tables: bool, factor: object) -> None:
    config = put(folders.model_config(), ("text_config", "partial_rotary_factor"), factor)
    if not tables:
        del config["text_config"]["rope_parameters"]
    with pytest.raises(ConversionError, match="partial_rotary_factor"):
        divisors(folder, tmp_path, config)


def test_values_are_stored_as_they_are(folder: Path, tmp_path: Path) -> None:
    config = put(folders.model_config(), ("text_config", "rms_norm_eps"), 1e-5)
    fields = fields_of(GGUFReader(converted(folder, tmp_path, "config.json", config)))
    assert fields["diffusion-gemma.attention.layer_norm_rms_epsilon"][1] == np.float32(1e-5)
