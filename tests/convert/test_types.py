"""Every type that can be written: bytes against the gguf package's quantizers, and llama.cpp's mixes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from support import checkpoint_folders as folders
from support.gguf_files import NEED_IMATRIX, fields_of

from pydiffusion import _native
from pydiffusion.convert import TYPES, convert
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import KINDS
from pydiffusion.convert.gguf.tensor_types import BLOCK_SIZES, FALLBACKS, LARGEST_BLOCK, fit_to_rows
from pydiffusion.convert.quantization.recipes import NEEDS_IMATRIX, RECIPES, recipe_name
from pydiffusion.convert.quantization.type_plan import plan_types, tensor_bytes
from pydiffusion.errors import ConversionError

# Types that the gguf package quantizes too, and the recipe that writes them.
REFERENCE = {"Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_1": "q4_1", "Q5_0": "q5_0", "Q5_1": "q5_1", "MXFP4": "mxfp4",
             "TQ1_0": "tq1_0", "TQ2_0": "tq2_0", "BF16": "bf16", "F16": "f16"}  # fmt: skip
# Q4_K_M and the like go without the underscore that our names and gguf's have in common.
OTHERS = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}


@pytest.mark.parametrize("type_name", REFERENCE)
def test_bytes_equal_the_gguf_packages(folder: Path, tmp_path: Path, type_name: str) -> None:
    convert(folder, tmp_path / "m.gguf", REFERENCE[type_name], pad=False)
    sources = {folders.gguf_name(name): values for name, values in folders.weights().items()}
    compared = 0
    for tensor in GGUFReader(tmp_path / "m.gguf").tensors:
        if tensor.tensor_type.name == type_name and tensor.name in sources:
            expected = quants.quantize(sources[tensor.name], GGMLQuantizationType[type_name])
            assert tensor.data.tobytes() == expected.tobytes(), tensor.name
            compared += 1
    assert compared >= 8


def test_q8_0_rounds_as_the_gguf_package_does() -> None:
    """Our own loop: halves, their neighbours, zeros, the smallest and large values."""
    halves = np.arange(-127, 127.5, 0.5, dtype=np.float32)
    near = np.concatenate(
        [halves, np.nextafter(halves, np.float32(1e9)), np.nextafter(halves, np.float32(-1e9))]
    )
    blocks = np.zeros((len(near), 32), np.float32)
    blocks[:, 0], blocks[:, 1:] = 127, near[:, None]  # a scale of 1
    random = np.random.default_rng(0)
    wild = random.standard_normal((4096, 32)) * 10.0 ** random.integers(-35, 6, (4096, 1))
    for rows in (blocks, wild.astype(np.float32), np.zeros((2, 32), np.float32)):
        expected = quants.quantize(rows, GGMLQuantizationType.Q8_0)
        assert _native.quantize_rows(rows, "Q8_0", 1, None).tobytes() == expected.tobytes()


@pytest.mark.parametrize("type", ["q2_k", "q3_k_l", "q4_k_m", "q5_k_m", "q6_k"])
def test_k_quants_equal_ggmls_quantizer(folder: Path, tmp_path: Path, type: str) -> None:
    """ggml_quantize_chunk on whole matrices: chunks and threads change no byte, so no error grows."""
    convert(folder, tmp_path / "m.gguf", type, pad=False, n_threads=2)
    sources = {folders.gguf_name(name): values for name, values in folders.weights().items()}
    compared = set()
    for tensor in GGUFReader(tmp_path / "m.gguf").tensors:
        name = tensor.tensor_type.name
        if name.endswith("_K") and tensor.name in sources:
            rows = sources[tensor.name].reshape(-1, sources[tensor.name].shape[-1])
            assert tensor.data.tobytes() == _native.quantize_rows(rows, name, 1, None).tobytes(), tensor.name
            compared.add(name)
    assert type[:4].upper() in compared, compared


def test_every_type_that_ggml_can_write_has_a_recipe() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    writable = set()
    for name in _native.tensor_types():
        try:
            _native.quantize_rows(rows, name, 1, np.ones(256, np.float32))
            writable.add(name)
        except ValueError:
            continue
    # Types of one and two bits without a zero, for models trained with them: we have no recipe.
    assert set(BLOCK_SIZES) == writable - {"Q1_0", "Q2_0"}
    used = {recipe.default for recipe in RECIPES.values()}
    used |= {rule.type for recipe in RECIPES.values() for rule in recipe.rules}
    assert used == set(BLOCK_SIZES)


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    known = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in BLOCK_SIZES}
    assert {name: size[0] for name, size in known.items()} == dict(BLOCK_SIZES)
    assert {name: tensor_bytes(name, (3, 512)) for name in known} == {
        name: 3 * 512 // block * n_bytes for name, (block, n_bytes) in known.items()
    }
    assert LARGEST_BLOCK == gguf.constants.QK_K


def test_imatrix_needs_equal_ggmls() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    for name in NEEDS_IMATRIX - {"IQ3_XXS", "IQ2_S", "IQ1_M"}:  # ggml would do those without, badly
        with pytest.raises(ValueError, match="importance"):
            _native.quantize_rows(rows, name, 1)


@pytest.mark.parametrize("type", TYPES)
def test_file_types_are_those_of_the_gguf_package(type: str) -> None:
    name = OTHERS.get(type, "MOSTLY_" + type.upper())
    assert RECIPES[type].file_type == gguf.LlamaFileType[name].value


@pytest.mark.parametrize("type", NEED_IMATRIX)
def test_types_that_need_an_imatrix_refuse_without(folder: Path, tmp_path: Path, type: str) -> None:
    with pytest.raises(ConversionError, match=r"(q2_k_s|\w+\.weight .*) needs an imatrix"):
        convert(folder, tmp_path / "m.gguf", type)
    assert not list(tmp_path.iterdir())


def test_fallback_chains_end_in_f16_and_never_lose_bits() -> None:
    sizes = _native.tensor_types()

    def bits(name: str) -> float:
        return 8 * sizes[name][2] / sizes[name][1]

    for name, block in BLOCK_SIZES.items():
        assert fit_to_rows(name, 512) == name
        assert fit_to_rows(name, 100) == ("F16" if block > 1 else name)
        instead = fit_to_rows(name, 704)
        assert 704 % BLOCK_SIZES[instead] == 0
        if name != "NVFP4":
            assert bits(instead) >= bits(name)
    assert fit_to_rows("NVFP4", 96) == "MXFP4"
    assert set(FALLBACKS) == {name for name, block in BLOCK_SIZES.items() if block > 1}


def layer_tensors(n_layers: int) -> list[tuple[str, tuple[int, ...]]]:
    tensors = [("token_embd.weight", (1024, 256)), ("output_norm.weight", (256,))]
    for i in range(n_layers):
        tensors += [(f"blk.{i}.{kind}.weight", (256, 256)) for kind in ("attn_q", "attn_v", "attn_output")]
        tensors += [(f"blk.{i}.{kind}.weight", (512, 256)) for kind in ("ffn_gate", "ffn_up")]
        tensors += [(f"blk.{i}.ffn_down.weight", (256, 512)), (f"blk.{i}.ffn_gate_inp.weight", (4, 256))]
        tensors += [(f"blk.{i}.ffn_gate_up_exps.weight", (4, 512, 256))]
        tensors += [(f"blk.{i}.ffn_down_exps.weight", (4, 256, 256))]
    return tensors


@pytest.mark.parametrize(
    ("type", "expected"),
    [
        # By layer, of 32: 4 is the first eighth, 2 the first sixteenth.
        ("q4_k_s", {"attn_v": "QQQQ....", "ffn_down": "QQQQ....", "Q": "Q5_K", ".": "Q4_K"}),
        ("q3_k_m", {"attn_v": "QQ......", "ffn_down": "QQ......", "Q": "Q5_K", ".": "Q4_K"}),
        ("q3_k_l", {"attn_v": "QQQQQQQQ", "attn_output": "QQQQQQQQ", "Q": "Q5_K"}),
        ("q2_k", {"attn_v": "QQQQQQQQ", "attn_q": "........", "Q": "Q3_K", ".": "Q2_K"}),
        ("q5_k_m", {"attn_v": "QQQQ..Q..Q", "ffn_down_exps": "QQQQ..Q..Q", "Q": "Q6_K", ".": "Q5_K"}),
        ("iq4_xs", {"ffn_down": "QQQQ....", "attn_v": "........", "Q": "Q5_K", ".": "IQ4_XS"}),
        ("q2_k_s", {"attn_v": "........", "ffn_down_exps": "QQQQ....", "Q": "Q4_K", ".": "Q2_K"}),
        (
            "iq3_xs",
            {
                "attn_q": "QQQQQQQQ",
                "attn_v": "........",
                "attn_output": "........",
                "ffn_down": "........",
                "ffn_up": "....QQQQQQQQQQQQQQQQQQQQQQQQ....",
                "ffn_gate_up_exps": "....QQQQQQQQQQQQQQQQQQQQQQQQ....",
                "Q": "IQ3_XXS",
                ".": "IQ3_S",
            },
        ),
        ("mxfp4", {"ffn_down": "........", "ffn_down_exps": "QQQQQQQQ", "Q": "MXFP4", ".": "Q8_0"}),
    ],
)
def test_mixes_by_layer(type: str, expected: dict[str, str]) -> None:
    names = {letter: name for letter, name in expected.items() if len(letter) == 1}
    planned = plan_types(layer_tensors(32), type, KINDS).tensors
    for kind, layers in expected.items():
        if kind in names:
            continue
        found = [planned[f"blk.{i}.{kind}.weight"].type for i in range(len(layers))]
        assert found == [names[letter] for letter in layers], kind
    assert planned["blk.0.ffn_gate_inp.weight"].type == planned["output_norm.weight"].type == "F32"


def test_some_mixes_differ_with_an_imatrix() -> None:
    down = "blk.0.ffn_down.weight"
    for type, without, with_one in (("q4_0", "Q4_0", "Q4_1"), ("iq4_nl", "Q5_K", "IQ4_NL")):
        assert plan_types(layer_tensors(32), type, KINDS).tensors[down].type == without
        assert plan_types(layer_tensors(32), type, KINDS, has_imatrix=True).tensors[down].type == with_one


def test_overrides(folder: Path, tmp_path: Path) -> None:
    overrides = {r"attn_(q|k)\.weight": "q8_0", r"attn_": "q6_k", r"^token_embd": "f16"}
    convert(folder, tmp_path / "m.gguf", "q4_k_m", tensor_types=overrides)
    reader = GGUFReader(tmp_path / "m.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    for i in range(len(folders.SLIDING)):
        assert types[f"blk.{i}.attn_q.weight"] == types[f"blk.{i}.attn_k.weight"] == "Q8_0"
        if folders.SLIDING[i]:
            assert types[f"blk.{i}.attn_v.weight"] == "Q6_K"
        assert types[f"blk.{i}.attn_norm.weight"] == types[f"blk.{i}.attn_q_norm.weight"] == "F32"
    assert types["token_embd.weight"] == "F16"
    assert types["blk.0.ffn_gate.weight"] == "Q4_K"
    assert fields_of(reader)["general.file_type"] == ("UINT32", 15)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"attn_qkv": "q8_0"}, ConversionError, "attn_qkv"),
        ({"attn_norm": "q8_0"}, ConversionError, "stay F32"),
        ({"attn_q": "q8_k"}, ValueError, "q8_k"),
        ({"attn_(": "q8_0"}, ValueError, "regular expression"),
        ({"attn_q": "iq2_xs"}, ConversionError, "needs an imatrix"),
    ],
)
def test_overrides_that_are_refused(
    folder: Path, tmp_path: Path, overrides: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        convert(folder, tmp_path / "m.gguf", "q4_k_m", tensor_types=overrides)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("Q4_K_M", "q4_k_m"),
        ("IQ3_XS", "iq3_xs"),
        ("q4-k-m", "q4_k_m"),
        ("Q4_K", "q4_k_m"),
        ("q5_k", "q5_k_m"),
        ("Q3_K", "q3_k_m"),
        ("MXFP4_MOE", "mxfp4"),
        ("FP16", "f16"),
        ("BF16", "bf16"),
    ],
)
def test_types_by_other_names(given: str, meant: str) -> None:
    """llama-quantize's aliases, and the spelling of file names on the hub."""
    assert recipe_name(given) == meant


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("UD-Q4_K_XL", "q4_k_m"),
        ("Q2_K_L", "q2_k"),
        ("UD-IQ2_XXS", "iq2_xxs"),
        ("Q8_K_XL", "q8_0"),
        ("q4km", "q4_k_m"),
        ("int", None),
        ("", None),
    ],
)
def test_unknown_types_name_the_nearest(given: str, nearest: str | None) -> None:
    with pytest.raises(ValueError, match="permitted are f32, f16") as caught:
        recipe_name(given)
    assert (f"the nearest is {nearest})" in str(caught.value)) == (nearest is not None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("type", TYPES)
def test_every_type_is_taken_in_capitals(type: str) -> None:
    assert recipe_name(type.upper()) == recipe_name(type.replace("_", "-")) == type


def test_capitals_give_the_same_file(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "a.gguf", "Q4_K", tensor_types={"attn_v": "Q8_0"})
    convert(folder, tmp_path / "b.gguf", "q4_k_m", tensor_types={"attn_v": "q8_0"})
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
