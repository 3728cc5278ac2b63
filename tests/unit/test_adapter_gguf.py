"""GGUF files of adapters: llama.cpp's, ours with a set per mode, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from support import adapter_folders as folders
from support.adapter_folders import EXPERTS, FF, MODEL, PEFT, XF, D, Tensors, pair, peft_config
from support.gguf_files import finish, read_tensors

from pydiffusion import AdapterError
from pydiffusion.adapters.adapter import Adapter, Target
from pydiffusion.adapters.gguf_file import write_adapter_gguf
from pydiffusion.adapters.loading import load_adapter, matrices_of

Q = "blk.0.attn_q"


def q_tensors(prefix: str = "", seed: int = 0) -> Tensors:
    return {
        f"{prefix}{Q}.weight.lora_a": folders.random(seed, 4, D),
        f"{prefix}{Q}.weight.lora_b": folders.random(seed + 1, 32, 4),
    }


def load(path: Path, tensors: Tensors, keys: Mapping[str, Any] | None = None) -> Adapter:
    return load_adapter(folders.write_gguf(path / "a.gguf", tensors, keys), MODEL)


def test_one_of_llama_cpp(tmp_path: Path) -> None:
    """A (r, n_in), B (n_out, r), experts before; alpha / r; for both modes."""
    tensors = q_tensors() | {
        "blk.1.ffn_gate_exps.weight.lora_a": folders.random(3, EXPERTS, 2, D),
        "blk.1.ffn_gate_exps.weight.lora_b": folders.random(4, EXPERTS, XF, 2),
        "self_cond_up.weight.lora_a": folders.random(5, 4, D),
        "self_cond_up.weight.lora_b": folders.random(6, FF, 4),
    }
    adapter = load(tmp_path, tensors, {"general.name": "a name"})
    assert adapter.name == "a name"
    assert [str(target) for target in adapter.factors] == [
        "self_cond_up (decoder)",
        "blk.0.attn_q",
        "blk.1.ffn_gate_exps",
    ]
    a, b = (tensors[f"{Q}.weight.lora_{part}"] for part in "ab")
    assert np.array_equal(adapter.factors[Target(Q, "both")].delta(), 2 * b @ a)
    exps = adapter.factors[Target("blk.1.ffn_gate_exps", "both")]
    a, b = (tensors[f"blk.1.ffn_gate_exps.weight.lora_{part}"] for part in "ab")
    assert exps.scale == 4
    np.testing.assert_allclose(exps.delta(), 4 * np.einsum("eor,eri->eoi", b, a), rtol=1e-6)


@pytest.mark.parametrize(
    ("prefixes", "sides"),
    [
        (("enc.", "dec."), ["decoder", "encoder"]),
        (("enc.", ""), ["decoder", "encoder"]),
        (("enc.",), ["encoder"]),
        (("dec.",), ["decoder"]),
        (("",), ["both"]),
    ],
)
def test_modes(prefixes: tuple[str, ...], sides: list[str], tmp_path: Path) -> None:
    tensors: Tensors = {}
    for prefix in prefixes:
        tensors |= q_tensors(prefix, ("enc.", "dec.", "").index(prefix))
    assert [target.side for target in load(tmp_path, tensors).factors] == sides


def test_modes_that_are_the_same_are_one_set(tmp_path: Path) -> None:
    both = load(tmp_path, q_tensors())
    assert load(tmp_path, q_tensors("enc.") | q_tensors("dec.")).fingerprint == both.fingerprint
    other = load(tmp_path, q_tensors("enc.") | q_tensors("dec.", 1))
    assert len(other.factors) == 2 and other.fingerprint != both.fingerprint


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_alpha_nothing_is_scaled(alpha: float | None, tmp_path: Path) -> None:
    adapter = load(tmp_path, q_tensors(), {"adapter.lora.alpha": alpha})
    assert adapter.factors[Target(Q, "both")].scale == 1
    assert "adapter.lora.alpha" in adapter.metadata["notes"][0]


def test_quantized_factors(tmp_path: Path) -> None:
    """llama.cpp's converter also writes Q8_0."""
    tensors = {f"{Q}.weight.lora_a": folders.random(0, 4, D), f"{Q}.weight.lora_b": folders.random(1, 32, 32)}
    tensors[f"{Q}.weight.lora_a"] = folders.random(0, 32, D)
    writer = GGUFWriter(tmp_path / "a.gguf", "diffusion-gemma")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 32.0)
    expected = []
    for name, values in tensors.items():
        packed = quants.quantize(values, GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
        expected.append(quants.dequantize(packed, GGMLQuantizationType.Q8_0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    delta = load_adapter(tmp_path / "a.gguf", MODEL).factors[Target(Q, "both")].delta()
    np.testing.assert_allclose(delta, expected[1] @ expected[0], rtol=1e-5, atol=1e-4)


def test_factors_of_other_types(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "diffusion-gemma")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    tensors = q_tensors()
    for name, values in tensors.items():
        writer.add_tensor(name, values.astype(np.int32))
    finish(writer, {})
    with pytest.raises(AdapterError, match=r"attn_q\.weight\.lora_a': is stored as (i|I)32"):
        load_adapter(tmp_path / "a.gguf", MODEL)


def written(tmp_path: Path, type: str = "auto", **config: Any) -> tuple[Adapter, GGUFReader, Adapter]:
    """An adapter of PEFT, the GGUF written from it as gguf reads it, and as we do."""
    folder = folders.write_folder(tmp_path / "a", config=peft_config(**config))
    adapter = load_adapter(folder, MODEL)
    write_adapter_gguf(adapter, tmp_path / "a.gguf", matrices_of(MODEL), type=type)
    return adapter, GGUFReader(tmp_path / "a.gguf"), load_adapter(tmp_path / "a.gguf", MODEL)


@pytest.mark.parametrize("type", ["auto", "f32", "bf16", "f16"])
def test_what_is_written(type: str, tmp_path: Path) -> None:
    adapter, reader, again = written(tmp_path, type)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert keys["general.type"] == "adapter" and keys["adapter.type"] == "lora"
    assert keys["general.architecture"] == "diffusion-gemma" and keys["adapter.lora.alpha"] == 8
    name = {"auto": "BF16"}.get(type, type.upper())
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {name}
    values = read_tensors(reader)
    for target, factors in adapter.factors.items():
        prefix = {"encoder": "enc.", "decoder": "dec.", "both": ""}[target.side]
        a, b = (values[f"{prefix}{target.tensor}.weight.lora_{part}"] for part in "ab")
        np.testing.assert_allclose(2 * np.matmul(b, a), factors.delta(), rtol=1e-6)
    assert again.fingerprint == adapter.fingerprint and again.name == adapter.name


def test_a_matrix_is_read_once_for_all_its_pieces(tmp_path: Path) -> None:
    """Once to choose the types, once to write, once to compare with what was written."""
    adapter = load(tmp_path, q_tensors())
    (factors,) = adapter.factors.values()
    reads: list[int] = []

    def read() -> tuple[np.ndarray, np.ndarray]:
        reads.append(1)
        return factors.read()

    counted = replace(adapter, factors={target: replace(factors, read=read) for target in adapter.factors})
    write_adapter_gguf(counted, tmp_path / "b.gguf", matrices_of(None))
    assert load_adapter(tmp_path / "b.gguf", MODEL) == adapter
    assert len(reads) <= 3


def test_scales_that_differ_go_into_b(tmp_path: Path) -> None:
    """A GGUF has one alpha: another scale than alpha / r of a matrix is in its B."""
    adapter, reader, again = written(
        tmp_path, use_rslora=True, alpha_pattern={"v_proj": 3, "experts.down_proj": 0}
    )
    assert reader.fields["adapter.lora.alpha"].contents() == 16  # 8 / sqrt(4) = 16 / 4
    assert again.factors.keys() == adapter.factors.keys()
    for target, factors in adapter.factors.items():
        np.testing.assert_allclose(again.factors[target].delta(), factors.delta(), rtol=1e-6)
    assert adapter.factors[Target("blk.0.attn_v", "decoder")].scale == 1.5


def test_exact_types(tmp_path: Path) -> None:
    """Each tensor in the smallest type that holds its values exactly."""
    tensors = pair(f"{PEFT}layers.0.self_attn.q_proj", 32, D)
    tensors |= pair(f"{PEFT}layers.1.self_attn.q_proj", 64, D)
    names = list(tensors)
    tensors[names[0]][0, 0] = 1 + 2**-10  # of eleven bits: F16
    tensors[names[1]][0, 0] = 1 + 2**-23
    tensors[names[2]][0, 0] = 2.0**100  # BF16
    tensors[names[3]][0, 0] = math.pi * 1e-30  # B * scale would overflow F16: F32
    folder = folders.write_folder(tmp_path / "a", tensors)
    adapter = load_adapter(folder, MODEL)
    write_adapter_gguf(adapter, tmp_path / "a.gguf", matrices_of(None))
    types = [tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "a.gguf").tensors]
    assert types == ["F16", "F32", "BF16", "F32"]
    assert load_adapter(tmp_path / "a.gguf", MODEL).fingerprint == adapter.fingerprint


@pytest.mark.parametrize(
    ("tensors", "keys", "parts"),
    [
        ({}, {"general.type": "model"}, ("'general.type'", "-m")),
        ({}, {"general.type": None}, ("'general.type'", "missing")),
        ({}, {"adapter.type": "control_vector"}, ("'adapter.type'", "control_vector")),
        ({}, {"adapter.type": None}, ("'adapter.type'", "missing")),
        ({}, {"general.architecture": "llama"}, ("'general.architecture'", "llama")),
        ({}, {"adapter.lora.alpha": math.nan}, ("'adapter.lora.alpha'",)),
        ({}, {"adapter.lora.alpha": math.inf}, ("'adapter.lora.alpha'",)),
        ({}, {"adapter.lora.alpha": "8"}, ("'adapter.lora.alpha'", "number")),
        ({}, {"adapter.alora.invocation_tokens": "5"}, ("alora.invocation_tokens",)),
        ({"blk.0.attn_k.weight.lora_a": (4, D)}, {}, ("attn_k.weight.lora_a", "no lora_b")),
        ({"blk.0.attn_k.weight": (4, D)}, {}, ("attn_k.weight", "no lora_a")),
        (
            {"blk.0.attn_k.weight.lora_a": (4, D), "blk.0.attn_k.weight.lora_b": (16, 5)},
            {},
            ("attn_k.weight.lora_a", "ranks differ"),
        ),
        (
            {"blk.0.attn_k.weight.lora_a": (4, D), "blk.0.attn_k.weight.lora_b": (17, 4)},
            {},
            ("attn_k.weight.lora_a", "17 x 64", "16 x 64"),
        ),
        (
            {"blk.0.attn_k.weight.lora_a": (4, 4, D), "blk.0.attn_k.weight.lora_b": (16, 4)},
            {},
            ("attn_k.weight.lora_a", "dimensions"),
        ),
        (
            {"blk.1.attn_v.weight.lora_a": (4, D), "blk.1.attn_v.weight.lora_b": (32, 4)},
            {},
            ("blk.1.attn_v.weight.lora_a", "no v_proj"),
        ),
        (
            {"enc.self_cond_up.weight.lora_a": (4, D), "enc.self_cond_up.weight.lora_b": (FF, 4)},
            {},
            ("enc.self_cond_up.weight.lora_a", "not used in the encoder"),
        ),
        (
            {"token_embd.weight.lora_a": (4, D), "token_embd.weight.lora_b": (384, 4)},
            {},
            ("token_embd.weight.lora_a", "no such matrix"),
        ),
        (
            {"blk.0.attn_k.weight.lora_a": (65537, D), "blk.0.attn_k.weight.lora_b": (16, 65537)},
            {},
            ("attn_k.weight.lora_a", "rank 65537"),
        ),
        (
            {f"enc.{Q}.weight.lora_a": (4, D), f"enc.{Q}.weight.lora_b": (32, 4)}
            | {f"dec.{Q}.weight.lora_a": (4, D), f"dec.{Q}.weight.lora_b": (32, 4)},
            {},
            (f"{Q}.weight.lora_a", "both modes"),
        ),
    ],
)
def test_refused(
    tensors: dict[str, tuple[int, ...]], keys: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    arrays = q_tensors() | {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    path = folders.write_gguf(tmp_path / "a.gguf", arrays, keys)
    with pytest.raises(AdapterError) as error:
        load_adapter(path, MODEL)
    assert all(part in str(error.value) for part in (str(path), *parts)), error.value
    assert "\n" not in str(error.value)


def test_untrained_ones_are_left_out(tmp_path: Path) -> None:
    more = {
        "output.weight.lora_a": np.ones((4, D), np.float32),
        "output.weight.lora_b": np.zeros((384, 4), np.float32),
    }
    adapter = load(tmp_path, q_tensors() | more)
    assert adapter.metadata["notes"] == ("output was not trained, and is left out",)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for data in (b"", b"GGUF", b"GGUF" + bytes(60), b"algg" + bytes(60)):
        path.write_bytes(data)
        with pytest.raises(AdapterError, match=r"a\.gguf"):
            load_adapter(path, MODEL)


def test_writing_refused(tmp_path: Path) -> None:
    adapter = load(tmp_path, q_tensors())
    for target, what in (
        (tmp_path / "a.gguf", "one of the files being read"),
        (tmp_path / "none/b.gguf", "no such folder"),
    ):
        with pytest.raises(AdapterError, match=what):
            write_adapter_gguf(adapter, target, matrices_of(MODEL))
    (tmp_path / "b.gguf").touch()
    with pytest.raises(AdapterError, match="already exists"):
        write_adapter_gguf(adapter, tmp_path / "b.gguf", matrices_of(MODEL), overwrite=False)
    with pytest.raises(ValueError, match="'q8_0'"):
        write_adapter_gguf(adapter, tmp_path / "b.gguf", matrices_of(MODEL), type="q8_0")
