"""Files that people brought to other programs, as public reports describe them; each test names its source.

The log of all that were tried is docs/dev/reports.md. All inputs are made here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support import checkpoint_folders as folders
from support.gguf_files import fields_of, finish
from support.gguf_mutator import (
    ARRAY,
    BOOL,
    F64,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Array,
    RawGguf,
    read_gguf,
)

from pydiffusion import DiffusionModel, _native
from pydiffusion.cli import main
from pydiffusion.convert import convert, quantize, repack
from pydiffusion.errors import ConversionError, ModelFormatError, UnsupportedModelError

SHAPE = SHAPES["mild"]
TEXT = "tokenizer.ggml."


@pytest.fixture(scope="module")
def sound(gguf_file: Callable[..., Path]) -> RawGguf:
    return read_gguf(gguf_file("mild"))


def logits(path: Path) -> np.ndarray:
    """Of one step over a canvas, after a prompt."""
    session = _native.Session(_native.Model(str(path), n_threads=1, kv_type="f32"), 64)
    session.encode(random_ids(3, "prompt", 20, SHAPE.vocab))
    return np.asarray(session.denoise(random_ids(3, "canvas", SHAPE.canvas, SHAPE.vocab), None))


def with_integers(raw: RawGguf, scalar: int, item: int) -> None:
    """Write all integers as other writers may: scalars and arrays in other widths, with or without a sign."""
    for pair in raw.pairs:
        if pair.type == U32 and pair.key != b"general.alignment":
            pair.type = scalar
        elif isinstance(pair.value, Array) and pair.value.item_type in (I32, U32):
            pair.value.item_type = item


def without_optional_keys(raw: RawGguf) -> None:
    optional = ("general.name", "general.type", "general.file_type", "general.quantization_version")
    for key in (*optional, TEXT + "scores", TEXT + "eos_token_ids"):
        if any(pair.key == key.encode() for pair in raw.pairs):
            raw.drop(key)


def with_foreign_keys(raw: RawGguf) -> None:
    raw.set("quantize.imatrix.file", STRING, "imatrix.dat")
    raw.set("general.tags", ARRAY, Array(U8, [1, 2]))
    raw.set("their.own", F64, 3.5)
    raw.set("their.flag", BOOL, True)


def reversed_tensors(raw: RawGguf) -> None:
    raw.tensors.reverse()


def widely_aligned(raw: RawGguf) -> None:
    raw.set("general.alignment", U32, 4096)
    raw.alignment = 4096


def of_version_2(raw: RawGguf) -> None:
    raw.version = 2


@pytest.mark.parametrize(
    "edit",
    [
        # huggingface/transformers#37555 (KeyError: 'general.name'), CrispStrobe/CrispEmbed#33: other writers
        without_optional_keys,
        lambda raw: with_integers(raw, I32, I64),
        lambda raw: with_integers(raw, U64, U64),
        lambda raw: with_integers(raw, I64, U32),
        with_foreign_keys,
        reversed_tensors,
        widely_aligned,
        of_version_2,
    ],
    ids=["bare", "i32", "u64", "i64", "foreign-keys", "reversed", "alignment", "version-2"],
)
def test_ggufs_of_other_writers_are_read(
    edit: Callable[[RawGguf], None], sound: RawGguf, gguf_file: Callable[..., Path], tmp_path: Path
) -> None:
    raw = sound.copy()
    edit(raw)
    path = raw.write(tmp_path / "theirs.gguf")
    assert np.array_equal(logits(path), logits(gguf_file("mild")))
    quantize(path, tmp_path / "q.gguf", "f32")
    assert np.array_equal(logits(tmp_path / "q.gguf"), logits(path))


def test_old_and_big_endian_ggufs_are_named(sound: RawGguf, tmp_path: Path) -> None:
    """ggml-org/llama.cpp#3492, #2944: files from before the format of today."""
    old, foreign = sound.copy(), sound.copy()
    old.version, foreign.big_endian = 1, True
    for raw, pattern in ((old, "version 1; supported are 2 and 3"), (foreign, "is a big-endian GGUF file")):
        with pytest.raises(ModelFormatError, match=pattern):
            _native.GgufFile(str(raw.write(tmp_path / "x.gguf")))


def test_a_gguf_of_the_other_pull_request_is_refused_by_its_tensor(sound: RawGguf, tmp_path: Path) -> None:
    """ggml-org/llama.cpp#24427, comment of 2026-06-10: its first files have no encoder scales."""
    raw = sound.copy()
    raw.tensor("self_cond_pre_norm.weight").name = b"self_cond_norm.weight"
    for name in [tensor.name.decode() for tensor in raw.tensors if b"enc_layer_output_scale" in tensor.name]:
        raw.drop_tensor(name)
    with pytest.raises(ModelFormatError, match=r"'self_cond_pre_norm\.weight' is missing"):
        DiffusionModel(raw.write(tmp_path / "x.gguf"), n_threads=1)


OTHERS = {
    # ggml-org/llama.cpp#3953, #9114
    "adapter": (
        "diffusion-gemma",
        "adapter",
        "is a LoRA adapter, not a model: give it to its model with --lora",
    ),
    # ggml-org/llama.cpp#7799, #7779
    "mmproj": ("clip", "mmproj", "is the vision part of a model"),
    "mmproj of old": ("clip", None, "is the vision part of a model"),
    "imatrix": ("none", "imatrix", "is an importance matrix, not a model: it is for --imatrix"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_gguf_that_is_no_model_is_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture, type, pattern = OTHERS[kind]
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    if type is not None:
        writer.add_type(type)
    finish(writer, {"blk.0.attn_q.weight.lora_a": np.ones((8, 64), np.float32)})
    with pytest.raises(UnsupportedModelError, match=pattern):
        DiffusionModel(path, n_threads=1)
    with pytest.raises(ConversionError, match=pattern):
        quantize(path, tmp_path / "q.gguf", "q8_0")
    assert not (tmp_path / "q.gguf").exists()
    assert main(["inspect", str(path), "--tensors"]) == 0
    assert "lora_a" in capsys.readouterr().out
    repack(path, tmp_path / "copy.gguf")  # any architecture is copied


def test_merges_as_pairs_and_as_strings_give_the_same_file(tmp_path: Path) -> None:
    """ggml-org/llama.cpp#9692: tokenizers 0.20 writes pairs, before it wrote text with a space."""
    files = []
    for style in ("pairs", "strings"):
        folder = folders.make_folder(tmp_path / style)
        value = folders.tokenizer_json()
        if style == "strings":
            value["model"]["merges"] = [" ".join(pair) for pair in folders.MERGES]
        folders.write_json(folder / "tokenizer.json", value)
        convert(folder, tmp_path / "m.gguf", "bf16")
        files.append(fields_of(gguf.GGUFReader(tmp_path / "m.gguf")))
    assert files[0].pop("general.name") != files[1].pop("general.name")  # the folders'
    assert files[0] == files[1]


def test_of_named_templates_the_default_is_kept_and_the_rest_noted(tmp_path: Path) -> None:
    """ggml-org/llama.cpp#6484, #6588: ``chat_template`` may be a list of templates with names."""
    folder = folders.make_folder(tmp_path / "f")
    (folder / "chat_template.jinja").unlink()
    named = [
        {"name": "tool_use", "template": "{{ tools }}"},
        {"name": "default", "template": folders.TEMPLATE},
    ]
    folders.write_json(
        folder / "tokenizer_config.json", folders.tokenizer_config() | {"chat_template": named}
    )
    report = convert(folder, tmp_path / "m.gguf", "bf16")
    fields = fields_of(gguf.GGUFReader(tmp_path / "m.gguf"))
    assert fields["tokenizer.chat_template"] == ("STRING", folders.TEMPLATE)
    assert fields.get("tokenizer.chat_template.tool_use") or any("named default" in n for n in report.notes)


def test_generation_tags_are_no_fault_of_a_template(tmp_path: Path) -> None:
    """abetlen/llama-cpp-python#2225, oobabooga/textgen#6985: tags for training masks."""
    marked = folders.TEMPLATE.replace(
        "{{ message['role'] }}", "{% generation %}{{ message['role'] }}{% endgeneration %}"
    )
    prompts = []
    for text in (folders.TEMPLATE, marked):
        folder = folders.make_folder(tmp_path / f"f{len(prompts)}")
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        report = convert(folder, tmp_path / "m.gguf", "bf16")
        assert not any("template" in note for note in report.notes)
        model = DiffusionModel(tmp_path / "m.gguf", n_threads=1)
        prompts.append(list(model.chat_prompt([{"role": "user", "content": "he"}])))
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("n_bits", [4, 8])
def test_bitsandbytes_is_refused_by_its_name(n_bits: int, tmp_path: Path) -> None:
    """unslothai/unsloth#1757, ggml-org/llama.cpp#12494 (4 bits), #12923 (8 bits)."""
    method = {"quant_method": "bitsandbytes", f"load_in_{n_bits}bit": True}
    folder = folders.make_folder(
        tmp_path / "f", config=folders.model_config() | {"quantization_config": method}
    )
    with pytest.raises(ConversionError, match="bitsandbytes"):
        convert(folder, tmp_path / "m.gguf", "q8_0")
    assert not list(tmp_path.glob("m.gguf*"))


def test_an_index_of_other_shards_is_named(tmp_path: Path) -> None:
    """Blaizzy/mlx-vlm#1827, Neph0s/CoSER#3: saved again under other names, the old index left in place."""
    folder = folders.make_folder(tmp_path / "f", n_shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text(encoding="utf-8").replace("of-00002", "of-00030"), encoding="utf-8")
    beside = r"index\.json and model-00001-of-00002"
    with pytest.raises(ConversionError, match=rf"model-00001-of-00030\.safetensors|{beside}"):
        convert(folder, tmp_path / "m.gguf", "q8_0")


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    """ggml-org/llama.cpp#10756, arcee-ai/mergekit#591: one of the copies in another type."""
    folder = folders.make_folder(tmp_path / "f", n_shards=2)
    name = "model.decoder.norm.weight"
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))[
        "weight_map"
    ]
    other = next(shard for shard in weight_map.values() if shard != weight_map[name])
    part = {n: values for n, values in folders.weights().items() if weight_map[n] == other}
    part[name] = folders.weights()[name]
    folders.write_safetensors(folder / other, part, dict.fromkeys(part, "BF16") | {name: "F32"})
    with pytest.raises(ConversionError, match=f"{other}: contains '{name}'"):
        convert(folder, tmp_path / "m.gguf", "q8_0")


@pytest.mark.parametrize("n_bytes", [4, 100, 5000, -1])
def test_a_broken_off_download_is_named(n_bytes: int, tmp_path: Path) -> None:
    """QwenLM/Qwen#462, lyogavin/airllm#137 (MetadataIncompleteBuffer)."""
    folder = folders.make_folder(tmp_path / "f")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:n_bytes])
    with pytest.raises(ConversionError, match=r"model\.safetensors.*truncated"):
        convert(folder, tmp_path / "m.gguf", "q8_0")


def test_a_name_with_another_prefix_is_named(tmp_path: Path) -> None:
    """ggml-org/llama.cpp#9211, #1516: of wrappers, such as ``base_model.model.``."""
    tensors = {f"base_model.model.{name}": values for name, values in folders.weights().items()}
    folder = folders.make_folder(tmp_path / "f", tensors=tensors)
    with pytest.raises(ConversionError, match=r"'(base_model\.)?model\.decoder\."):
        convert(folder, tmp_path / "m.gguf", "q8_0")


@pytest.mark.parametrize("type", ["UD-Q4_K_XL", "int8", "150", "auto", ""])
def test_an_unknown_type_lists_the_known_ones(
    type: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ggml-org/llama.cpp#14667."""
    assert main(["convert", str(folder), "-o", str(tmp_path / "m.gguf"), "--type", type]) == 2
    assert "q4_k_m, q4_k_s" in capsys.readouterr().err


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_ids_beyond_every_vocabulary_are_named(value: int, sound: RawGguf, tmp_path: Path) -> None:
    """An absent id is written by some as -1, which unsigned is the largest number."""
    raw = sound.copy()
    raw.set(TEXT + "eos_token_id", U64, value)
    with pytest.raises(ModelFormatError, match=f"eos_token_id.*{value}"):
        DiffusionModel(raw.write(tmp_path / "x.gguf"), n_threads=1)
    raw.set(TEXT + "eos_token_id", U16, 1)
    raw.set(TEXT + "eos_token_ids", ARRAY, Array(U64, [1, value]))
    with pytest.raises(ModelFormatError, match=r"eos_token_ids|larger than 2\^63"):
        DiffusionModel(raw.write(tmp_path / "x.gguf"), n_threads=1)
