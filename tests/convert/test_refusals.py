"""Checkpoints that `convert` refuses; each refusal names the file, key or tensor at fault."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoint_folders as folders

from pydiffusion.convert import convert
from pydiffusion.errors import ConversionError

Json = dict[str, Any]
LAYER = "model.decoder.layers.0."


def refused(folder: Path, target: Path, pattern: str) -> None:
    """Converting raises ConversionError that matches, and leaves nothing behind."""
    with pytest.raises(ConversionError, match=pattern) as caught:
        convert(folder, target, "q8_0")
    assert "\n" not in str(caught.value)
    assert not any(path.suffix in (".part", ".gguf") for path in target.parent.iterdir())


def edited(folder: Path, tmp_path: Path, file: str, edit: Callable[[Json], None]) -> Path:
    """A folder that shares all files with ``folder`` but one, which ``edit`` has changed."""
    copy = tmp_path / "edited"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    value = json.loads((folder / file).read_text(encoding="utf-8"))
    edit(value)
    (copy / file).unlink()
    folders.write_json(copy / file, value)
    return copy


def text(key: str, value: Any) -> Callable[[Json], None]:
    return lambda config: config["text_config"].__setitem__(key, value)


def top(key: str, value: Any) -> Callable[[Json], None]:
    return lambda config: config.__setitem__(key, value)


def without(*keys: str) -> Callable[[Json], None]:
    def edit(config: Json) -> None:
        for key in keys[:-1]:
            config = config[key]
        del config[keys[-1]]

    return edit


def at(*path: Any) -> Callable[[Json], None]:
    """``at("a", "b", 3)`` sets config["a"]["b"] = 3."""

    def edit(config: Any) -> None:
        for key in path[:-2]:
            config = config[key]
        config[path[-2]] = path[-1]

    return edit


FULL, SLIDING = ("text_config", "rope_parameters", "full_attention"), ("text_config", "rope_parameters")
CONFIG_EDITS = [
    (top("model_type", "gemma4"), "model_type.*'gemma4'"),
    (without("model_type"), "required key 'model_type'"),
    (top("architectures", ["Gemma4ForCausalLM"]), "architectures.*Gemma4ForCausalLM"),
    (top("architectures", "DiffusionGemmaModel"), "architectures"),
    (top("quantization_config", {"quant_method": "hqq"}), "quantization_config.*hqq"),
    (top("text_config", [1]), "text_config"),
    (without("text_config"), "required key 'text_config'"),
    (top("canvas_length", 0), "canvas_length.*is 0"),
    (top("canvas_length", 2048), "canvas_length.*max_position_embeddings"),
    (top("canvas_length", None), "canvas_length.*None"),
    (top("canvas_length", 8.0), r"canvas_length.*8\.0"),
    (top("tie_word_embeddings", "yes"), "tie_word_embeddings.*yes"),
    (text("model_type", "gemma4_text"), "text_config.*model_type.*gemma4_text"),
    (text("hidden_activation", "silu"), "hidden_activation.*silu.*not supported"),
    (text("attention_bias", True), "attention_bias.*True.*not supported"),
    (text("use_bidirectional_attention", "all"), "use_bidirectional_attention.*all.*not supported"),
    (text("attention_k_eq_v", False), "attention_k_eq_v.*False.*not supported"),
    (text("num_kv_shared_layers", 2), "num_kv_shared_layers.*2"),
    (text("hidden_size_per_layer_input", 256), "hidden_size_per_layer_input.*256"),
    (text("use_double_wide_mlp", True), "use_double_wide_mlp"),
    (text("enable_moe_block", False), "enable_moe_block"),
    (text("attention_chunk_size", 64), "attention_chunk_size"),
    (text("final_logit_softcapping", None), "final_logit_softcapping.*None"),
    (text("final_logit_softcapping", 0), "final_logit_softcapping"),
    (text("rms_norm_eps", "small"), "rms_norm_eps.*small"),
    (text("hidden_size", "256"), "hidden_size.*'256'"),
    (text("hidden_size", True), "hidden_size.*True"),
    (text("hidden_size", 10**12), "hidden_size"),
    (text("num_hidden_layers", 10**6), "num_hidden_layers"),
    (text("num_hidden_layers", 5), "layer_types.*5"),
    (text("layer_types", ["full_attention"] * 3), "layer_types"),
    (text("layer_types", ["sliding_attention"] * 4), "layer_types.*last layer"),
    (
        text("layer_types", ["mamba", "sliding_attention", "sliding_attention", "full_attention"]),
        "mamba.*layer 0",
    ),
    (text("layer_types", [{}, 1, None, "full_attention"]), "layer_types"),
    (text("layer_types", [["x"] * 999, 1, None, "full_attention"]), "layer_types.{1,120} for layer 0"),
    (text("num_attention_heads", 3), "3 attention heads.*2 key-value heads of layer 0"),
    (text("top_k_experts", 7), "top_k_experts.*7"),
    (text("num_experts", None), "num_experts.*None"),
    (text("head_dim", 63), "head_dim.*63"),
    (text("global_head_dim", 256), "global_head_dim.*256.*contradicts"),
    (text("per_layer_config", {"9": {"head_dim": 128}}), "per_layer_config: '9'"),
    (text("per_layer_config", {"-1": {"head_dim": 128}}), "per_layer_config: '-1'"),
    (text("per_layer_config", {"\n": {"head_dim": 128}}), "per_layer_config"),
    (text("per_layer_config", {"\u0663": {"head_dim": 128}}), "per_layer_config"),
    (text("per_layer_config", {"3": 128}), "per_layer_config: 3.*128"),
    (text("per_layer_config", {"3": {"head_dim": 0}}), "head_dim.*is 0"),
    (text("per_layer_config", {"3": {"intermediate_size": 64}}), "intermediate_size.*64.*single layer"),
    (text("per_layer_config", {"3": {"skip": ["mlp"]}}), "skip.*single layer"),
    (
        text("per_layer_config", {"0": {"head_dim": 32}, "3": {"head_dim": 128}}),
        "sliding layers different 'head_dim'",
    ),
    (at(*FULL, "rope_type", "yarn"), "full_attention.*rope_type.*yarn"),
    (at(*FULL, "factor", 8.0), r"full_attention.*factor.*8\.0"),
    (at(*FULL, "partial_rotary_factor", 0.001), "partial_rotary_factor"),
    (at(*FULL, "partial_rotary_factor", 2), "partial_rotary_factor"),
    (at(*FULL, "beta_fast", 32), "beta_fast"),
    (without(*FULL, "rope_theta"), "full_attention.*rope_theta"),
    (at(*SLIDING, "sliding_attention", {"rope_type": "linear", "rope_theta": 1e4}), "rope_type.*linear"),
    (without(*SLIDING, "sliding_attention"), "sliding_attention"),
] + [
    (without("text_config", key), f"required key '{key}'")
    for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "num_experts", "top_k_experts", "moe_intermediate_size",
        "sliding_window", "max_position_embeddings",
    )
]  # fmt: skip


@pytest.mark.parametrize(("edit", "pattern"), CONFIG_EDITS, ids=[pattern for _, pattern in CONFIG_EDITS])
def test_config(folder: Path, tmp_path: Path, edit: Callable[[Json], None], pattern: str) -> None:
    refused(edited(folder, tmp_path, "config.json", edit), tmp_path / "m.gguf", rf"config\.json.*{pattern}")


GENERATION_EDITS = [
    (top("max_denoising_steps", 0), "max_denoising_steps"),
    (top("t_min", -1), "t_min"),
    (top("t_max", 0.5), "t_max.*t_min"),
    (top("t_max", "hot"), "t_max.*hot"),
    (top("stability_threshold", -1), "stability_threshold"),
    (top("confidence_threshold", 0), "confidence_threshold"),
    (top("sampler_config", 3), "sampler_config"),
    (top("sampler_config", {"_cls_name": "OtherSampler", "entropy_bound": 0.1}), "_cls_name.*OtherSampler"),
    (top("sampler_config", {"entropy_bound": -0.1}), "entropy_bound"),
    (top("eos_token_id", 320), "eos_token_id.*320"),
    (top("eos_token_id", [1, "x"]), "eos_token_id.*x"),
]


@pytest.mark.parametrize(("edit", "pattern"), GENERATION_EDITS)
def test_generation_config(folder: Path, tmp_path: Path, edit: Callable[[Json], None], pattern: str) -> None:
    source = edited(folder, tmp_path, "generation_config.json", edit)
    refused(source, tmp_path / "m.gguf", rf"generation_config\.json.*{pattern}")


TOKENIZER_EDITS = [
    (at("model", "type", "Unigram"), "type.*Unigram"),
    (at("model", "byte_fallback", False), "byte_fallback"),
    (at("model", "dropout", 0.1), "dropout"),
    (at("model", "ignore_merges", True), "ignore_merges"),
    (at("model", "continuing_subword_prefix", "##"), "continuing_subword_prefix"),
    (at("model", "merges", {}), "merges"),
    (at("model", "merges", [["a"]]), "merge"),
    (at("model", "merges", [["a", "\u2581"]]), "needs 'a\u2581'"),
    (at("model", "merges", ["a b c"]), "merge 'a b c'"),
    (at("model", "merges", [["a ", "b"]]), "space"),
    (at("model", "vocab", ["a"]), "vocab"),
    (at("model", "vocab", {"a": "1"}), "'a'.*'1'"),
    (at("model", "vocab", "zz", 3), "same id 3"),
    (at("model", "vocab", "zz", 320), "320 of 'zz' is beyond 'vocab_size'"),
    (at("model", "vocab", "[PAD319]", 318), "occurs twice"),
    (at("model", "vocab", "\ud800", 318), "Unicode"),
    (top("normalizer", None), "normalizer"),
    (top("normalizer", {"type": "NFKC"}), "normalizer.*NFKC"),
    (top("pre_tokenizer", {"type": "ByteLevel"}), "pre_tokenizer.*ByteLevel"),
    (top("added_tokens", [3]), "added_tokens"),
    (top("added_tokens", [{"id": 3, "content": "<other>", "special": True}]), "<other>.*same id 3"),
    (top("added_tokens", [{"id": 999, "content": "<far>", "special": True}]), "<far>.*beyond"),
    (top("added_tokens", [{"id": 3, "content": 4, "special": True}]), "content"),
    (without("model"), "required key 'model'"),
]


@pytest.mark.parametrize(("edit", "pattern"), TOKENIZER_EDITS)
def test_tokenizer(folder: Path, tmp_path: Path, edit: Callable[[Json], None], pattern: str) -> None:
    source = edited(folder, tmp_path, "tokenizer.json", edit)
    refused(source, tmp_path / "m.gguf", rf"tokenizer\.json.*{pattern}")


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        (top("bos_token", "<nowhere>"), "bos_token.*<nowhere>"),
        (top("add_bos_token", "yes"), "add_bos_token.*yes"),
        (top("chat_template", 5), "chat_template.*5"),
    ],
)
def test_tokenizer_config(folder: Path, tmp_path: Path, edit: Callable[[Json], None], pattern: str) -> None:
    source = edited(folder, tmp_path, "tokenizer_config.json", edit)
    (source / "chat_template.jinja").unlink()
    refused(source, tmp_path / "m.gguf", rf"tokenizer_config\.json.*{pattern}")


TENSOR_EDITS: list[tuple[Callable[[dict[str, np.ndarray]], Any], str]] = [
    (lambda t: t.pop(LAYER + "self_attn.q_proj.weight"), "layers.0.self_attn.q_proj.weight.*missing"),
    (lambda t: t.pop("model.encoder.language_model.layers.2.layer_scalar"), "layers.2.layer_scalar.*missing"),
    (lambda t: t.update({LAYER + "self_attn.q_proj.bias": np.ones(128)}), "unexpected.*q_proj.bias"),
    (
        lambda t: t.update({"model.decoder.layers.3.self_attn.v_proj.weight": np.ones((128, 256))}),
        "unexpected.*3.*v_proj",
    ),
    (lambda t: t.update({"model.decoder.layers.4.layer_scalar": np.ones(1)}), "unexpected.*layers.4"),
    (lambda t: t.update({"decoder.norm.weight": np.ones(256)}), "decoder.norm.weight.*duplicates"),
    (lambda t: t.update({LAYER + "router.scale": np.ones(255)}), r"router.scale.*\[255\].*\[256\]"),
    (lambda t: t.update({LAYER + "layer_scalar": np.ones(())}), r"layer_scalar.*\[\].*\[1\]"),
    (lambda t: t.update({"lm_head.weight": np.ones((2, 256))}), "lm_head.weight.*shape"),
    (
        lambda t: t.update({"model.encoder.language_model.norm.weight": t["model.decoder.norm.weight"] + 1}),
        "encoder.language_model.norm.weight.*differs.*decoder.norm.weight",
    ),
    (
        lambda t: t.update({"model.encoder.language_model.layers.1.mlp.up_proj.weight": np.ones((320, 256))}),
        "encoder.*layers.1.mlp.up_proj.*differs",
    ),
    (lambda t: t[LAYER + "mlp.up_proj.weight"].__setitem__((7, 7), np.nan), "blk.0.ffn_up.weight.*NaN"),
    (
        lambda t: t[LAYER + "input_layernorm.weight"].__setitem__(7, np.inf),
        "blk.0.attn_norm.weight.*NaN or inf",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "pattern"), TENSOR_EDITS, ids=[pattern for _, pattern in TENSOR_EDITS])
def test_tensors(tmp_path: Path, edit: Callable[[dict[str, np.ndarray]], Any], pattern: str) -> None:
    tensors = folders.weights()
    edit(tensors)
    refused(folders.make_folder(tmp_path / "t", tensors=tensors), tmp_path / "m.gguf", pattern)


def test_tied_false_needs_everything(tmp_path: Path) -> None:
    config = folders.model_config()
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    made = folders.make_folder(tmp_path / "u", config=config)
    refused(made, tmp_path / "m.gguf", "encoder.language_model.*missing.*tie_word_embeddings")


def test_other_dtypes(tmp_path: Path) -> None:
    made = folders.make_folder(tmp_path / "d", dtypes={LAYER + "router.scale": "F64"})
    refused(made, tmp_path / "m.gguf", "router.scale.*F64")


def test_weights_beyond_float16(tmp_path: Path) -> None:
    tensors = folders.weights()
    tensors[LAYER + "mlp.up_proj.weight"][3, 3] = 1e6
    made = folders.make_folder(tmp_path / "b", tensors=tensors)
    with pytest.raises(ConversionError, match=r"blk.0.ffn_up.weight.*F16.*bf16"):
        convert(made, tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files(folder: Path, tmp_path: Path, file: str) -> None:
    source = edited(folder, tmp_path, "config.json", lambda config: None)
    (source / file).unlink()
    refused(source, tmp_path / "m.gguf", re.escape(file))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"a": 1, "a": 2}', b"\xff\xfe", b'{"a": NaN}', b"[" * 10**5]
)
def test_invalid_json(folder: Path, tmp_path: Path, content: bytes) -> None:
    source = edited(folder, tmp_path, "config.json", lambda config: None)
    (source / "config.json").write_bytes(content)
    refused(source, tmp_path / "m.gguf", r"config\.json")


def test_missing_folder_and_invalid_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="q3"):
        convert(folder, tmp_path / "m.gguf", "q3")
    with pytest.raises(ValueError, match="n_threads"):
        convert(folder, tmp_path / "m.gguf", "f32", n_threads=-1)


HEADERS: list[tuple[Callable[[Json], Any], str]] = [
    (lambda h: h["a"].update(dtype="F12"), "dtype.*F12"),
    (lambda h: h["a"].update(dtype=None), "dtype"),
    (lambda h: h["a"].update(shape=[-1, 2]), "shape"),
    (lambda h: h["a"].update(shape=[2**62, 2**62, 2**62]), "shape"),
    (lambda h: h["a"].update(shape=[3]), "shape"),
    (lambda h: h["a"].update(data_offsets=[0, 4, 8]), "data_offsets"),
    (lambda h: h["a"].update(data_offsets=[8, 0]), "data_offsets"),
    (lambda h: h["a"].update(data_offsets=[0, 8.0]), "data_offsets"),
    (lambda h: h["a"].update(data_offsets=[0, 10**9]), "data_offsets"),
    (lambda h: h["b"].update(data_offsets=[0, 8]), "overlaps|hole|no tensor"),
    (lambda h: h.update(a=[1]), "not an object"),
    (lambda h: h.pop("b"), "belong to no tensor"),
    (lambda h: h.pop("a"), "hole"),
]


@pytest.mark.parametrize(("edit", "pattern"), HEADERS)
def test_safetensors_headers(folder: Path, tmp_path: Path, edit: Callable[[Json], Any], pattern: str) -> None:
    source = edited(folder, tmp_path, "config.json", lambda config: None)
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    edit(header)
    packed = json.dumps(header).encode()
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(packed)) + packed + bytes(16))
    refused(source, tmp_path / "m.gguf", rf"model\.safetensors.*({pattern})")


@pytest.mark.parametrize("length", [0, 7, 8, 100, 20_000, -1])
def test_truncated_safetensors(folder: Path, tmp_path: Path, length: int) -> None:
    source = edited(folder, tmp_path, "config.json", lambda config: None)
    data = (folder / "model.safetensors").read_bytes()
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").write_bytes(data[:length])
    refused(source, tmp_path / "m.gguf", r"model\.safetensors.*(truncated|empty)")


INDEX = "model.safetensors.index.json"
INDEX_EDITS = [
    (without("weight_map"), "weight_map"),
    (top("weight_map", [1]), "weight_map"),
    (
        at("weight_map", "model.decoder.norm.weight", "../other.safetensors"),
        "other.safetensors.*not a file of this folder",
    ),
    (at("weight_map", "model.decoder.norm.weight", "/etc/passwd"), "not a file of this folder"),
    (at("weight_map", "model.decoder.norm.weight", "no.safetensors"), "no.safetensors.*missing"),
    (at("weight_map", "model.decoder.norm.weight", "a\0.safetensors"), "not a file of this folder"),
    (at("weight_map", "model.decoder.norm.weight", 3), "not a file of this folder"),
    (at("weight_map", "more", "model-00001-of-00002.safetensors"), "'more'"),
    (without("weight_map", "model.decoder.norm.weight"), "model.decoder.norm.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "pattern"), INDEX_EDITS)
def test_index(tmp_path: Path, edit: Callable[[Json], None], pattern: str) -> None:
    made = folders.make_folder(tmp_path / "sharded", n_shards=2)
    refused(edited(made, tmp_path, INDEX, edit), tmp_path / "m.gguf", pattern)


@pytest.mark.parametrize(("change", "pattern"), [(-1, "truncated"), (-5000, "truncated"), (8, "no tensor")])
def test_a_shard_of_the_wrong_size(tmp_path: Path, change: int, pattern: str) -> None:
    made = folders.make_folder(tmp_path / "sharded", n_shards=2)
    shard = made / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:change] if change < 0 else data + bytes(change))
    refused(made, tmp_path / "m.gguf", rf"model-00002-of-00002\.safetensors.*{pattern}")


def test_a_missing_shard(tmp_path: Path) -> None:
    made = folders.make_folder(tmp_path / "sharded", n_shards=2)
    (made / "model-00002-of-00002.safetensors").unlink()
    refused(made, tmp_path / "m.gguf", "model-00002-of-00002.safetensors")
