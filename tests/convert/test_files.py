"""Files that `convert` writes, read back with the gguf package's reader and dequantizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from support import checkpoint_folders as folders
from support.gguf_files import NEED_IMATRIX, fields_of, read_tensors

from pydiffusion.convert import TYPES, ConversionProgress, convert
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import KINDS
from pydiffusion.convert.gguf.tensor_types import fit_to_rows
from pydiffusion.convert.quantization.recipes import RECIPES, has_more_bits
from pydiffusion.convert.quantization.type_plan import plan_types


@pytest.fixture(scope="module")
def f32_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GGUFReader:
    target = tmp_path_factory.mktemp("f32") / "small.gguf"
    convert(folder, target, "f32")
    return GGUFReader(target)


def test_f32_holds_every_weight_exactly(f32_file: GGUFReader) -> None:
    found = read_tensors(f32_file)
    expected = {folders.gguf_name(name): values for name, values in folders.weights().items()}
    assert set(found) == set(expected) | {"rope_freqs.weight"}
    for name, values in expected.items():
        assert found[name].shape == values.shape, name
        assert np.array_equal(found[name], values), name


def test_order_is_embedding_then_layers_then_output(f32_file: GGUFReader) -> None:
    names = [tensor.name for tensor in f32_file.tensors]
    assert names[:2] == ["token_embd.weight", "rope_freqs.weight"]
    assert names[-1] == "output_norm.weight"
    layers = [int(name.split(".")[1]) for name in names if name.startswith("blk.")]
    assert layers == sorted(layers)


def test_rope_divisors(f32_file: GGUFReader) -> None:
    divisors = read_tensors(f32_file)["rope_freqs.weight"]
    n_pairs = folders.GLOBAL_HEAD_DIM // 2
    assert divisors.tolist() == [1.0] * (n_pairs // 4) + [float(np.float32(1e30))] * (n_pairs - n_pairs // 4)


@pytest.mark.parametrize(
    ("type", "relative_error"),
    [
        ("f16", 4e-4),
        ("bf16", 0.0),
        ("q8_0", 0.01),
        ("q6_k", 0.03),
        ("q5_k_m", 0.07),
        ("q4_k_m", 0.12),
        ("iq4_nl", 0.12),
        ("q3_k_l", 0.2),
        ("mxfp4", 0.15),
        ("nvfp4", 0.15),
    ],
)
def test_other_types_stay_near_the_weights(
    folder: Path, tmp_path: Path, type: str, relative_error: float
) -> None:
    report = convert(folder, tmp_path / "m.gguf", type)
    reader = GGUFReader(tmp_path / "m.gguf")
    found = read_tensors(reader)
    for name, values in folders.weights().items():
        difference = np.linalg.norm(found[folders.gguf_name(name)] - values)
        assert difference <= relative_error * np.linalg.norm(values), name
    assert report.n_bytes == (tmp_path / "m.gguf").stat().st_size
    assert report.n_tensors == len(reader.tensors)
    assert report.n_weights == sum(int(t.n_elements) for t in reader.tensors)
    assert sum(report.types.values()) == report.n_tensors
    data_bytes = sum(int(t.n_bytes) for t in reader.tensors)
    assert report.bits_per_weight == pytest.approx(8 * data_bytes / report.n_weights)


@pytest.mark.parametrize("type", [type for type in TYPES if type not in NEED_IMATRIX])
def test_norms_scales_and_router_are_f32_in_every_type(folder: Path, tmp_path: Path, type: str) -> None:
    convert(folder, tmp_path / "m.gguf", type)
    reader = GGUFReader(tmp_path / "m.gguf")
    for tensor in reader.tensors:
        if len(tensor.shape) == 1 or ".ffn_gate_inp." in tensor.name:
            assert tensor.tensor_type.name == "F32", tensor.name
    assert fields_of(reader)["general.file_type"] == ("UINT32", RECIPES[type].file_type)


def test_model_metadata(f32_file: GGUFReader) -> None:
    fields = fields_of(f32_file)
    own = "diffusion-gemma."
    expected = {
        "general.architecture": ("STRING", "diffusion-gemma"),
        "general.type": ("STRING", "model"),
        "general.name": ("STRING", "small"),
        own + "block_count": ("UINT32", 4),
        own + "context_length": ("UINT32", 1024),
        own + "embedding_length": ("UINT32", folders.D),
        own + "feed_forward_length": ("UINT32", folders.FF),
        own + "expert_feed_forward_length": ("UINT32", folders.XF),
        own + "expert_count": ("UINT32", folders.EXPERTS),
        own + "expert_used_count": ("UINT32", 2),
        own + "attention.head_count": ("UINT32", folders.HEADS),
        own + "attention.head_count_kv": ("ARRAY/INT32", [2, 2, 2, 1]),
        own + "attention.key_length": ("UINT32", 128),
        own + "attention.value_length": ("UINT32", 128),
        own + "attention.key_length_swa": ("UINT32", 64),
        own + "attention.value_length_swa": ("UINT32", 64),
        own + "attention.sliding_window": ("UINT32", 16),
        own + "attention.sliding_window_pattern": ("ARRAY/BOOL", [True, True, True, False]),
        own + "attention.layer_norm_rms_epsilon": ("FLOAT32", np.float32(1e-6)),
        own + "attention.causal": ("BOOL", False),
        own + "attention.bidirectional": ("STRING", "vision"),
        own + "rope.freq_base": ("FLOAT32", 1e6),
        own + "rope.freq_base_swa": ("FLOAT32", 1e4),
        own + "rope.dimension_count": ("UINT32", 128),
        own + "rope.dimension_count_swa": ("UINT32", 64),
        own + "final_logit_softcapping": ("FLOAT32", 30.0),
        "diffusion.canvas_length": ("UINT32", 8),
        "diffusion.eb_max_steps": ("UINT32", 32),
        "diffusion.eb_t_min": ("FLOAT32", 0.5),
        "diffusion.eb_t_max": ("FLOAT32", np.float32(0.9)),
        "diffusion.eb_entropy_bound": ("FLOAT32", np.float32(0.2)),
        "diffusion.eb_stability_threshold": ("UINT32", 2),
        "diffusion.eb_confidence_threshold": ("FLOAT32", np.float32(0.01)),
        "general.file_type": ("UINT32", 0),
        "general.quantization_version": ("UINT32", 2),
    }
    for key, value in expected.items():
        assert fields.get(key) == value, key


def test_tokenizer_metadata(f32_file: GGUFReader) -> None:
    fields = fields_of(f32_file)
    tokens, types = fields["tokenizer.ggml.tokens"][1], fields["tokenizer.ggml.token_type"][1]
    vocab = folders.tokenizer_json()["model"]["vocab"]
    assert tokens[: len(vocab)] == list(vocab)
    assert tokens[len(vocab) :] == [f"[PAD{i}]" for i in range(len(vocab), folders.VOCAB)]
    by_token = dict(zip(tokens, types, strict=True))
    for token in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>"):
        assert by_token[token] == 3, token
    for token in ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "\n\n"):
        assert by_token[token] == 4, token
    assert [by_token[f"<0x{byte:02X}>"] for byte in range(256)] == [6] * 256
    assert by_token["a"] == by_token["\u2581the"] == 1
    assert set(types[len(vocab) :]) == {5}
    assert fields["tokenizer.ggml.merges"] == ("ARRAY/STRING", ["a b", "\u2581 t", "h e", "\u2581t he"])
    assert fields["tokenizer.ggml.scores"] == ("ARRAY/FLOAT32", [-1000.0] * folders.VOCAB)
    ids = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0, "mask": 4}
    for role, token_id in ids.items():
        assert fields[f"tokenizer.ggml.{role}_token_id"] == ("UINT32", token_id)
    assert fields["tokenizer.ggml.eos_token_ids"] == ("ARRAY/INT32", [1, 6])
    assert fields["tokenizer.ggml.model"] == ("STRING", "gemma4")
    assert fields["tokenizer.ggml.add_bos_token"] == ("BOOL", True)
    assert fields["tokenizer.ggml.add_eos_token"] == ("BOOL", False)
    assert fields["tokenizer.ggml.add_space_prefix"] == ("BOOL", False)
    assert fields["tokenizer.chat_template"] == ("STRING", folders.TEMPLATE)


@pytest.mark.parametrize(
    ("settings", "processor", "expected"),
    [
        ({"add_bos_token": False, "tokenizer_class": "GemmaTokenizer"}, True, False),
        ({}, True, True),
        ({}, False, False),
        ({"tokenizer_class": "GemmaTokenizer"}, False, True),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, False, False),
    ],
)
def test_whether_a_bos_is_added(
    tmp_path: Path, settings: dict[str, object], processor: bool, expected: bool
) -> None:
    made = folders.make_folder(tmp_path / "small")
    names = {key: value for key, value in folders.tokenizer_config().items() if key != "add_bos_token"}
    folders.write_json(made / "tokenizer_config.json", names | settings)
    tokenizer = folders.tokenizer_json()
    if processor:
        pieces = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": pieces}
    folders.write_json(made / "tokenizer.json", tokenizer)
    convert(made, tmp_path / "m.gguf", "q8_0")
    fields = fields_of(GGUFReader(tmp_path / "m.gguf"))
    assert fields["tokenizer.ggml.add_bos_token"] == ("BOOL", expected)
    assert fields["tokenizer.ggml.add_eos_token"] == ("BOOL", False)


def converted(folder: Path, target: Path, type: str = "f32") -> bytes:
    convert(folder, target, type)
    return target.read_bytes()


def test_both_config_shapes_shards_and_prefixes_give_the_same_file(folder: Path, tmp_path: Path) -> None:
    expected = converted(folder, tmp_path / "a.gguf")
    bare = {name.removeprefix("model."): values for name, values in folders.weights().items()}
    variants = {
        "google": {"shape": "google"},
        "sharded": {"n_shards": 3},
        "from-f32": {"dtype": "F32"},
        "bare": {"tensors": bare},
    }
    for name, options in variants.items():
        made = folders.make_folder(tmp_path / name / "small", **options)
        assert converted(made, tmp_path / f"{name}.gguf") == expected, name


def test_f16_and_mixed_sources(tmp_path: Path) -> None:
    mixed = {"model.decoder.norm.weight": "F32", "model.decoder.embed_tokens.weight": "BF16"}
    made = folders.make_folder(tmp_path / "f16", dtype="F16", dtypes=mixed)
    convert(made, tmp_path / "m.gguf", "f32")
    found = read_tensors(GGUFReader(tmp_path / "m.gguf"))
    for name, values in folders.weights().items():
        exact = values if name in mixed else values.astype(np.float16).astype(np.float32)
        assert np.array_equal(found[folders.gguf_name(name)], exact), name


def test_bfloat16_rounding_is_to_nearest_even(tmp_path: Path) -> None:
    tensors = folders.weights()
    bits = np.random.default_rng(3).integers(0, 2**32, (folders.FF, folders.D), dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.where(np.abs(values) < 1e30, values, 0).astype(np.float32)  # subnormals stay
    values[0, :4] = np.array([0x3F808000, 0x3F818000, 0x00000001, 0x00018000], np.uint32).view(np.float32)
    name = "model.decoder.layers.0.mlp.up_proj.weight"
    made = folders.make_folder(tmp_path / "f", dtype="F32", tensors=tensors | {name: values})
    convert(made, tmp_path / "m.gguf", "bf16")
    reader = GGUFReader(tmp_path / "m.gguf")
    found = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    assert np.array_equal(found.data.view(np.uint16).reshape(values.shape), folders.bfloat16_bits(values))


def test_vision_tensors_are_left_out_with_a_note(folder: Path, tmp_path: Path) -> None:
    vision = {
        "model.encoder.vision_tower.patch_embedder.input_proj.weight": np.ones((4, 4), np.float32),
        "model.encoder.embed_vision.embedding_projection.weight": np.ones((4, 4), np.float32),
    }
    made = folders.make_folder(tmp_path / "v" / "small", tensors=folders.weights() | vision)
    report = convert(made, tmp_path / "v.gguf", "f32")
    assert (tmp_path / "v.gguf").read_bytes() == converted(folder, tmp_path / "a.gguf")
    assert any("2 vision tensors were skipped" in note for note in report.notes)


def test_equal_encoder_weights_and_head_are_dropped(folder: Path, tmp_path: Path) -> None:
    tensors = folders.weights()
    for name in list(tensors):
        if name.startswith("model.decoder.layers.") and not name.endswith(".layer_scalar"):
            tensors[name.replace("decoder.", "encoder.language_model.")] = tensors[name]
    tensors["model.encoder.language_model.norm.weight"] = tensors["model.decoder.norm.weight"]
    tensors["model.encoder.language_model.embed_tokens.weight"] = tensors["model.decoder.embed_tokens.weight"]
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    # Equal values in another dtype count as equal.
    made = folders.make_folder(tmp_path / "e" / "small", tensors=tensors, dtypes={"lm_head.weight": "F32"})
    expected = converted(folder, tmp_path / "a.gguf")
    assert converted(made, tmp_path / "e.gguf") == expected
    config = folders.model_config()
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    made = folders.make_folder(tmp_path / "u" / "small", tensors=tensors, config=config)
    assert converted(made, tmp_path / "u.gguf") == expected


def test_another_head_is_kept(tmp_path: Path) -> None:
    head = folders.from_bits(np.full((folders.VOCAB, folders.D), 0.5, np.float32))
    made = folders.make_folder(tmp_path / "h", tensors=folders.weights() | {"lm_head.weight": head})
    convert(made, tmp_path / "h.gguf", "q4_k_m")
    reader = GGUFReader(tmp_path / "h.gguf")
    assert reader.tensors[-1].name == "output.weight"
    assert reader.tensors[-1].tensor_type.name == "Q6_K"
    assert np.allclose(read_tensors(reader)["output.weight"], 0.5, atol=0.01)


def test_defaults_come_from_transformers_with_a_note(tmp_path: Path) -> None:
    config = folders.model_config()
    text = config["text_config"]
    for key in ("layer_types", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "attention_bias"):
        del text[key]
    # transformers' default is five sliding layers to one full one, with the last forced to be full: as here.
    made = folders.make_folder(tmp_path / "d" / "small", config=config)
    (made / "generation_config.json").unlink()
    report = convert(made, tmp_path / "d.gguf", "f32")
    fields = fields_of(GGUFReader(tmp_path / "d.gguf"))
    assert fields["diffusion-gemma.attention.sliding_window_pattern"][1] == [True, True, True, False]
    assert fields["diffusion.eb_max_steps"][1] == 48
    assert fields["diffusion.eb_t_max"][1] == np.float32(0.8)
    assert fields["tokenizer.ggml.eos_token_ids"][1] == [1]
    told = " ".join(report.notes)
    for word in ("layer_types", "rope_parameters", "rms_norm_eps = 1e-06", "max_denoising_steps = 48"):
        assert word in told


def test_progress_and_report(folder: Path, tmp_path: Path) -> None:
    seen: list[ConversionProgress] = []
    report = convert(str(folder), str(tmp_path / "m.gguf"), "q8_0", progress=seen.append)
    assert list(dict.fromkeys(step.stage for step in seen)) == ["write", "verify"]
    for stage in ("write", "verify"):
        done = [step.done_bytes for step in seen if step.stage == stage]
        assert done == sorted(done)
        assert done[-1] == seen[0].total_bytes
    assert json.loads(json.dumps(report.to_dict()))["type"] == "q8_0"
    assert report.seconds > 0


def test_more_bits_rule() -> None:
    picked = [i for i in range(30) if has_more_bits(i, 30)]
    assert picked == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert [i for i in range(4) if has_more_bits(i, 4)] == [2, 3]


def test_fallback_types_by_row_length() -> None:
    assert [fit_to_rows("Q4_K", n) for n in (512, 704, 100)] == ["Q4_K", "Q5_0", "F16"]
    assert [fit_to_rows("Q6_K", n) for n in (512, 704, 100)] == ["Q6_K", "Q8_0", "F16"]
    assert [fit_to_rows("Q8_0", n) for n in (512, 704, 100)] == ["Q8_0", "Q8_0", "F16"]
    plan = plan_types(
        [("self_cond_down.weight", (256, 320)), ("token_embd.weight", (512, 256))], "q4_k_m", KINDS, pad=False
    )
    assert {name: tensor.type for name, tensor in plan.tensors.items()} == {
        "self_cond_down.weight": "Q5_0",
        "token_embd.weight": "Q6_K",
    }
    assert plan.fallbacks == ["self_cond_down.weight: Q4_K -> Q5_0 (rows of 320)"]


def test_recipe_is_that_of_a_circulating_file(circulating: Path) -> None:
    reader = GGUFReader(circulating / "small-q4_k_m.gguf")
    found = {t.name: t.tensor_type.name for t in reader.tensors}
    shapes = [(t.name, tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors]
    plan = plan_types(shapes, "q4_k_m", KINDS, pad=False)
    assert {name: tensor.type for name, tensor in plan.tensors.items()} == found


def test_keys_types_and_tensors_are_those_of_a_circulating_file(
    f32_file: GGUFReader, circulating: Path
) -> None:
    theirs, ours = fields_of(GGUFReader(circulating / "small-f32.gguf")), fields_of(f32_file)
    # general.size_label is decoration; the list of end tokens and the mask of images are ours alone.
    assert set(theirs) - set(ours) == {"general.size_label"}
    assert set(ours) - set(theirs) == {
        "diffusion-gemma.attention.bidirectional",
        "tokenizer.ggml.eos_token_ids",
    }
    for key in set(theirs) & set(ours):
        assert theirs[key][0] == ours[key][0], key
    their_names = {t.name for t in GGUFReader(circulating / "small-f32.gguf").tensors}
    assert their_names == {t.name for t in f32_file.tensors}
