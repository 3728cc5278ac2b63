"""The vision file: names by the gguf package's table, weights and layout against the checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from support import checkpoint_folders as folders
from support.gguf_files import read_tensors
from support.gguf_mutator import STRING, read_gguf
from support.vision_folders import (
    FF,
    HEADS,
    LAYERS,
    PATCH,
    PROJECTION,
    TOWER,
    D,
    make_folder,
    vision_config,
    vision_weights,
)
from support.vision_towers import names_by_the_table

from pydiffusion.cli import main
from pydiffusion.convert import convert, convert_mmproj
from pydiffusion.errors import ConversionError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("vision") / "small")


def test_names_and_weights(folder: Path, tmp_path: Path) -> None:
    report = convert_mmproj(folder, tmp_path / "v.gguf")
    weights = vision_weights()
    names = names_by_the_table(list(weights), LAYERS)
    reader = GGUFReader(tmp_path / "v.gguf")
    found = read_tensors(reader)
    assert sorted(found) == sorted(names.values())
    for name, values in weights.items():
        if not name.endswith("input_proj.weight"):
            np.testing.assert_array_equal(found[names[name]], values.reshape(found[names[name]].shape))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    for name, kind in kinds.items():
        is_matrix = re.search(r"(attn_(q|k|v|out)|ffn_(gate|up|down)|input_projection)\.weight$", name)
        assert kind == ("BF16" if is_matrix else "F32"), name
    assert report.n_tensors == len(weights) and report.bits_per_weight > 16


def test_the_patch_embedding_is_the_kernel_of_a_convolution(folder: Path, tmp_path: Path) -> None:
    """A flattened patch has a pixel's channels side by side; a convolution kernel has separate planes."""
    convert_mmproj(folder, tmp_path / "v.gguf", "f32")
    kernel = read_tensors(GGUFReader(tmp_path / "v.gguf"))["v.patch_embd.weight"]
    assert kernel.shape == (D, 3, PATCH, PATCH)
    image = np.random.default_rng(1).standard_normal((3, PATCH, PATCH)).astype(np.float32)
    weight = vision_weights()[TOWER + "patch_embedder.input_proj.weight"]
    expected = weight @ image.transpose(1, 2, 0).reshape(-1)
    np.testing.assert_allclose(np.einsum("dcyx,cyx->d", kernel, image), expected, rtol=1e-4, atol=1e-4)


def test_metadata(folder: Path, tmp_path: Path) -> None:
    convert_mmproj(folder, tmp_path / "v.gguf", "f16")
    reader = GGUFReader(tmp_path / "v.gguf")
    keys = gguf.Keys
    expected = {
        keys.General.ARCHITECTURE: "clip",
        keys.General.TYPE: gguf.GGUFType.MMPROJ,
        keys.General.FILE_TYPE: int(gguf.LlamaFileType.MOSTLY_F16),
        keys.Clip.HAS_VISION_ENCODER: True,
        keys.ClipVision.PROJECTOR_TYPE: gguf.VisionProjectorType.GEMMA4V,
        keys.ClipVision.PROJECTION_DIM: folders.D,
        keys.ClipVision.PATCH_SIZE: PATCH,
        keys.ClipVision.EMBEDDING_LENGTH: D,
        keys.ClipVision.FEED_FORWARD_LENGTH: FF,
        keys.ClipVision.BLOCK_COUNT: LAYERS,
        keys.ClipVision.Attention.HEAD_COUNT: HEADS,
        keys.ClipVision.Projector.SCALE_FACTOR: 3,
        keys.ClipVision.USE_GELU: True,
        "clip.vision.max_soft_tokens": 280,
        keys.ClipVision.IMAGE_MEAN: [0.0] * 3,
        keys.ClipVision.IMAGE_STD: [1.0] * 3,
    }
    assert {key: reader.get_field(key).contents() for key in expected} == expected
    eps = reader.get_field(keys.ClipVision.Attention.LAYERNORM_EPS).contents()
    assert np.float32(eps) == np.float32(1e-6)


def test_text_and_vision_files_hold_the_whole_checkpoint(folder: Path, tmp_path: Path) -> None:
    text, vision = convert(folder, tmp_path / "t.gguf", "bf16"), convert_mmproj(folder, tmp_path / "v.gguf")
    made = 1  # rope_freqs is computed
    assert text.n_tensors - made + vision.n_tensors == len(folders.weights()) + len(vision_weights())
    assert any("--mmproj writes them" in note for note in text.notes)


def test_optional_parts_and_types(tmp_path: Path) -> None:
    plain = {
        n: v for n, v in vision_weights().items() if "std_" not in n and not n.endswith(("_min", "_max"))
    }
    made = make_folder(tmp_path / "plain", plain, standardize=False, use_clipped_linears=False)
    convert_mmproj(made, tmp_path / "v.gguf", "q8_0")
    reader = GGUFReader(tmp_path / "v.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "Q8_0"}
    infinite = vision_weights()
    infinite[f"{TOWER}encoder.layers.0.mlp.up_proj.input_max"] = np.array(np.inf, np.float32)
    convert_mmproj(make_folder(tmp_path / "infinite", infinite), tmp_path / "i.gguf")
    bound = read_tensors(GGUFReader(tmp_path / "i.gguf"))["v.blk.0.ffn_up.input_max"]
    assert bound.tolist() == [np.inf]


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (lambda w: w.pop(PROJECTION), {}, "embedding_projection.weight' is missing"),
        (lambda w: w.update({TOWER + "more": np.zeros(3)}), {}, "unexpected tensor.*vision_tower.more"),
        (lambda w: w.clear(), {}, "has no vision tensors"),
        (lambda w: w.update({PROJECTION: np.zeros((D, D))}), {}, "has the shape"),
        (lambda w: w[PROJECTION].__setitem__((1, 1), np.nan), {}, "mm.input_projection.weight.*NaN"),
        (None, {"hidden_activation": "silu"}, "hidden_activation"),
        (None, {"num_key_value_heads": 2}, "num_key_value_heads"),
        (None, {"num_key_value_heads": None}, "num_key_value_heads' = 12, the reference's default"),
        (None, {"head_dim": 3}, "head_dim"),
        (None, {"head_dim": 6}, "'head_dim' of 6 is no multiple of 4"),
        (
            None,
            {"head_dim": None},
            "self_attn.q_proj.linear.weight' has the shape",
        ),  # of 16, not the class's 64
        (None, {"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta"),
        (None, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        (None, {"rope_parameters": {"factor": 4.0}}, "'factor' is not supported"),
        (None, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling"),
        (None, {"rope_theta": 50.0}, "rope_theta"),
        (None, {"model_type": "siglip_vision_model"}, "model_type"),
        (None, {"pooling_kernel_size": 32}, "too large for images of 280 soft tokens"),
    ],
)
def test_refusals(tmp_path: Path, spoil: object, changes: dict, message: str) -> None:
    tensors = vision_weights()
    if spoil is not None:
        spoil(tensors)
    made = make_folder(tmp_path / "made", tensors, **changes)
    with pytest.raises(ConversionError, match=message.replace("(", r"\(")):
        convert_mmproj(made, tmp_path / "v.gguf")
    assert not (tmp_path / "v.gguf").exists()


def test_defaults_and_keys_that_were_not_read(tmp_path: Path) -> None:
    """Of vision_config: older files call the rotation default, and Google's has keys that nobody reads."""
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 100}, "default_output_length": 280}
    changes |= {"rope_scaling": None, "rope_theta": None, "partial_rotary_factor": None}  # as if absent
    changes["rope_parameters"]["type"] = None
    made = make_folder(tmp_path / "made", **changes, window_size=7, torch_dtype="bfloat16")
    notes = convert_mmproj(made, tmp_path / "v.gguf").notes
    assert [note for note in notes if "not read" in note] == [
        "config.json: vision_config: keys that were not read: 'window_size'"
    ]
    # A head of 64, the class's, is right for one head of the toy's 64 elements.
    tensors = vision_weights()
    for name in [name for name in tensors if name.endswith(("q_norm.weight", "k_norm.weight"))]:
        tensors[name] = np.ones(D, np.float32)
    one = make_folder(tmp_path / "one", tensors, num_attention_heads=1, num_key_value_heads=1, head_dim=None)
    notes = convert_mmproj(one, tmp_path / "one.gguf").notes
    assert any("head_dim = 64" in note for note in notes)


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(folder), "--mmproj"]) == 0
    convert_mmproj(folder, tmp_path / "v.gguf", "bf16")
    assert (tmp_path / "mmproj-small-bf16.gguf").read_bytes() == (tmp_path / "v.gguf").read_bytes()
    assert main(["convert", str(folder), "--mmproj", "--type", "q4_k_m"]) == 2
    assert main(["convert", str(folder), "--mmproj", "--pad"]) == 2


def test_inspect(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_mmproj(folder, tmp_path / "v.gguf")
    assert main(["inspect", str(tmp_path / "v.gguf"), "--json"]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    assert images.pop("is_supported") and images.pop("projector") == "gemma4v"
    assert images == {
        "n_layers": LAYERS,
        "n_embd": D,
        "n_heads": HEADS,
        "projection_dim": folders.D,
        "patch_size": PATCH,
        "pooling": 3,
        "max_soft_tokens": 280,
    }
    file = read_gguf(tmp_path / "v.gguf")
    file.drop("clip.vision.max_soft_tokens")
    file.drop("clip.vision.patch_size")
    assert main(["inspect", str(file.write(tmp_path / "w.gguf"))]) == 0
    assert "patches of ? x ? pixels, 3 x 3 of them a soft token, at most 280" in capsys.readouterr().out
    file.set("clip.vision.projector_type", STRING, "qwen3vl_merger")
    assert main(["inspect", str(file.write(tmp_path / "w.gguf"))]) == 0
    assert "projector 'qwen3vl_merger'; only 'gemma4v' is supported" in capsys.readouterr().out


def test_inspect_shows_the_tokens_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folders.model_config() | {"image_token_id": 9, "boi_token_id": 7, "eoi_token_id": None}
    convert(folders.make_folder(tmp_path / "text", config=config), tmp_path / "t.gguf", "f16")
    assert main(["inspect", str(tmp_path / "t.gguf")]) == 0
    shown = capsys.readouterr().out.partition("Images\n")[2]
    assert f"image_token_id 9: {folders.SPECIALS[9]!r}" in shown and "both ways" in shown
    assert f"image_begin_token_id 7: {folders.SPECIALS[7]!r}" in shown and "image_end" not in shown


@pytest.mark.reference
def test_weights_of_the_reference_model(tmp_path: Path) -> None:
    """A checkpoint as transformers saves it: every name is known, and the kernel convolves as it embeds."""
    import torch
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    torch.manual_seed(0)
    config = vision_config()
    tower = Gemma4VisionModel(Gemma4VisionConfig(**config)).eval()
    with torch.no_grad():
        for value in [*tower.parameters(), *tower.buffers()]:
            value.copy_(torch.randn_like(value).bfloat16())
    weights = {TOWER + name: value.numpy() for name, value in tower.state_dict().items()}
    weights[PROJECTION] = vision_weights()[PROJECTION]
    convert_mmproj(make_folder(tmp_path / "made", weights), tmp_path / "v.gguf", "f32")
    found = read_tensors(GGUFReader(tmp_path / "v.gguf"))
    assert sorted(found) == sorted(names_by_the_table(list(weights), LAYERS).values())
    image = torch.rand(3, 3 * PATCH, 2 * PATCH)
    # As its image processor cuts them: rows of patches, within one rows of pixels, channels last.
    patches = image.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 3, 4, 0)
    kernel = torch.from_numpy(found["v.patch_embd.weight"])
    ours = torch.nn.functional.conv2d(image[None], kernel, stride=PATCH).flatten(2)[0].T
    with torch.no_grad():
        theirs = tower.patch_embedder.input_proj(patches.reshape(-1, 3 * PATCH**2))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
