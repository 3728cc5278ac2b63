"""Which weights a folder holds: shards without an index, two sets, other formats, unfinished downloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import checkpoint_folders as folders

from pydiffusion.convert import convert, plan_sizes, quantize
from pydiffusion.errors import ConversionError

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The GGUF of the whole folder."""
    target = tmp_path_factory.mktemp("expected") / "m.gguf"
    convert(folder, target, "bf16")
    return target.read_bytes()


def sharded(folder: Path, n_shards: int, name: Callable[[int], str], tmp_path: Path) -> Path:
    """The folder's weights in shards of these names, without an index."""
    made = folders.make_folder(tmp_path / folder.name, n_shards=n_shards)
    (made / INDEX).unlink()
    for i in range(n_shards):
        shard = made / f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        shard.rename(made / name(i))
    return made


def refused(folder: Path, *words: str) -> str:
    """Converting is refused with these words, on one line, and nothing is left."""
    target = folder.parent / "refused.gguf"
    with pytest.raises(ConversionError) as caught:
        convert(folder, target, "bf16")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not list(folder.parent.glob("*refused*"))
    return message


@pytest.mark.parametrize(
    ("n_shards", "name"),
    [
        (3, lambda i: f"model-{i + 1:05d}-of-00003.safetensors"),
        (3, lambda i: f"model-{i:05d}-of-00003.safetensors"),  # numbered from 0
        (2, lambda i: f"model-{i + 1:05d}-of-000002.safetensors"),  # six digits, as DeepSeek's
        (2, lambda i: f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors"),
    ],
)
def test_shards_without_an_index(
    folder: Path, tmp_path: Path, expected: bytes, n_shards: int, name: Callable[[int], str]
) -> None:
    convert(sharded(folder, n_shards, name, tmp_path), tmp_path / "m.gguf", "bf16")
    assert (tmp_path / "m.gguf").read_bytes() == expected


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "model.bf16.safetensors", "weights.safetensors"]
)
def test_one_file_of_another_name(folder: Path, tmp_path: Path, expected: bytes, name: str) -> None:
    made = folders.make_folder(tmp_path / folder.name)
    (made / "model.safetensors").rename(made / name)
    convert(made, tmp_path / "m.gguf", "bf16")
    assert (tmp_path / "m.gguf").read_bytes() == expected


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_missing_shard_is_named(folder: Path, tmp_path: Path, missing: int) -> None:
    made = sharded(folder, 3, lambda i: f"model-{i + 1:05d}-of-00003.safetensors", tmp_path)
    lost = made / f"model-{missing:05d}-of-00003.safetensors"
    lost.rename(lost.with_name(lost.name + ".crdownload"))
    refused(made, f"{lost}: is missing", "unfinished download")
    lost.with_name(lost.name + ".crdownload").unlink()
    refused(made, f"{lost}: is missing")


def test_one_shard_of_many(folder: Path, tmp_path: Path) -> None:
    """The number of those missing is said; a huge claim costs nothing."""
    made = folders.make_folder(tmp_path / "one")
    (made / "model.safetensors").rename(made / "model-00002-of-00005.safetensors")
    refused(made, "model-00001-of-00005.safetensors (and 3 more): is missing")
    (made / "model-00002-of-00005.safetensors").rename(made / "model-00002-of-999999.safetensors")
    refused(made, "model-00001-of-999999.safetensors: is missing")


def test_a_tensor_in_two_shards_is_refused(folder: Path, tmp_path: Path) -> None:
    made = sharded(folder, 2, lambda i: f"model-{i + 1:05d}-of-00002.safetensors", tmp_path)
    one, two = (made / f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))
    two.write_bytes(one.read_bytes())
    refused(made, two.name, "contains", one.name)


TWO_SETS = [
    ((2, True), "model.safetensors"),
    ((2, False), "model.safetensors"),
    ((2, True), "model-00001-of-00003.safetensors"),
    ((2, False), "model-00001-of-00003.safetensors"),
    ((1, False), "consolidated.safetensors"),
    ((1, False), "model (1).safetensors"),
    ((2, False), "model-00001-of-00002 (1).safetensors"),
    ((2, True), "model.fp16.safetensors.index.json"),
]


@pytest.mark.parametrize(("kept", "other"), TWO_SETS, ids=str)
def test_two_sets_of_weights_are_refused(
    folder: Path, tmp_path: Path, kept: tuple[int, bool], other: str
) -> None:
    n_shards, has_index = kept
    made = folders.make_folder(tmp_path / "two", n_shards=n_shards)
    if not has_index and n_shards > 1:
        (made / INDEX).unlink()
    source = INDEX if other.endswith(".json") else sorted(made.glob("*.safetensors"))[0].name
    (made / other).write_bytes((made / source).read_bytes())
    first = INDEX if has_index else f"model-00001-of-{n_shards:05d}" if n_shards > 1 else "model.safetensors"
    refused(made, "two sets of weights", first, other)


@pytest.mark.parametrize("n_shards", [1, 2])
def test_a_stale_index_is_named(folder: Path, tmp_path: Path, expected: bytes, n_shards: int) -> None:
    """Left over from an export in other shards; without it the folder is whole."""
    made = folders.make_folder(tmp_path / folder.name, n_shards=5)
    for shard in made.glob("*.safetensors"):
        shard.unlink()
    other = folders.make_folder(tmp_path / "other", n_shards=n_shards)
    for shard in other.glob("*.safetensors"):
        shard.rename(made / shard.name)
    refused(made, INDEX, "model-00001-of-00005.safetensors", "remove the index if it is stale")
    (made / INDEX).unlink()
    convert(made, tmp_path / "m.gguf", "bf16")
    assert (tmp_path / "m.gguf").read_bytes() == expected


def test_an_index_of_one_file(folder: Path, tmp_path: Path, expected: bytes) -> None:
    made = folders.make_folder(tmp_path / folder.name)
    names = folders.weights()
    folders.write_json(made / INDEX, {"weight_map": dict.fromkeys(names, "model.safetensors")})
    convert(made, tmp_path / "m.gguf", "bf16")
    assert (tmp_path / "m.gguf").read_bytes() == expected
    (made / "mtp.safetensors").write_bytes((made / "model.safetensors").read_bytes())
    refused(made, "two sets of weights", "mtp.safetensors")


def test_pickles_beside_safetensors_are_noted(folder: Path, tmp_path: Path, expected: bytes) -> None:
    """transformers prefers safetensors too; a Trainer's own files are nobody's weights."""
    made = folders.make_folder(tmp_path / folder.name)
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        (made / name).write_bytes(b"\x80\x02}q\0.")
    report = convert(made, tmp_path / "m.gguf", "bf16")
    assert [note for note in report.notes if "pytorch_model.bin" in note]
    assert not [note for note in report.notes if "optimizer" in note or "training_args" in note]
    assert (tmp_path / "m.gguf").read_bytes() == expected


OTHER_WEIGHTS = [
    ("pytorch_model.bin", ["pickle", "save_pretrained"]),
    ("model.pt", ["pickle"]),
    ("consolidated.00.pth", ["pickle"]),
    ("model-q4_k_m.gguf", ["is GGUF", "pydiffusion quantize"]),
    ("tf_model.h5", ["TensorFlow", "save_pretrained"]),
    ("flax_model.msgpack", ["Flax", "save_pretrained"]),
    ("model.onnx", ["ONNX", "original checkpoint"]),
    ("weights.npz", ["MLX", "original checkpoint"]),
    ("__0_0.distcp", ["distributed", "save_pretrained"]),
    ("model.safetensors.part", ["unfinished download"]),
    ("model-00001-of-00002.safetensors.incomplete", ["unfinished download"]),
    ("README.md", ["no safetensors file", "download"]),
]


@pytest.mark.parametrize(("name", "words"), OTHER_WEIGHTS, ids=[name for name, _ in OTHER_WEIGHTS])
def test_weights_in_other_formats_are_named(tmp_path: Path, name: str, words: list[str]) -> None:
    made = folders.make_folder(tmp_path / "other")
    (made / "model.safetensors").unlink()
    (made / name).write_bytes(b"x")
    refused(made, *words, "" if name == "README.md" else name)
    if not name.endswith((".part", ".incomplete", ".md")):  # without the small files too
        (made / "config.json").unlink()
        refused(made, "no config.json", name, *words)


@pytest.mark.parametrize("below", ["snapshots/0123abcd", "original", "a/b/c"])
def test_a_checkpoint_below_is_pointed_to(tmp_path: Path, below: str) -> None:
    """The folder of a repo in the hub's cache, a folder too high."""
    folders.make_folder(tmp_path / "up" / below)
    message = refused(tmp_path / "up", "no config.json", f"give {tmp_path / 'up' / below}")
    with pytest.raises(ConversionError) as caught:
        plan_sizes(tmp_path / "up")
    assert str(caught.value) == message


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize("has_config", [False, True])
@pytest.mark.parametrize("files", [ADAPTER[:1], ADAPTER[1:], ADAPTER])
def test_an_adapter_is_named(tmp_path: Path, has_config: bool, files: tuple[str, ...]) -> None:
    made = folders.make_folder(tmp_path / "adapter")
    (made / "model.safetensors").unlink()
    if not has_config:
        (made / "config.json").unlink()
    for name in files:
        (made / name).write_text("{}")
    refused(made, "adapter (LoRA)", f"pydiffusion convert CHECKPOINT --lora {made}")


def test_an_adapter_beside_its_base_is_refused(tmp_path: Path) -> None:
    """transformers would apply it."""
    made = folders.make_folder(tmp_path / "both")
    (made / "adapter_model.safetensors").write_bytes((made / "model.safetensors").read_bytes())
    refused(made, "adapter_model.safetensors", "beside the model's model.safetensors: move it")


def test_a_file_in_place_of_the_folder(folder: Path, tmp_path: Path) -> None:
    refused_file = tmp_path / "m.gguf"
    refused_file.write_bytes(b"GGUF" + bytes(60))
    for path, words in (
        (folder / "model.safetensors", f"give its folder, {folder}"),
        (folder / "config.json", f"give its folder, {folder}"),
        (refused_file, "pydiffusion quantize"),
    ):
        with pytest.raises(ConversionError, match=r"is (a|one) file") as caught:
            convert(path, tmp_path / "o.gguf")
        assert words in str(caught.value)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    made = folders.make_folder(tmp_path / "tokens")
    (made / "tokenizer.json").unlink()
    refused(made, "tokenizer.json: is missing: download it")
    (made / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    refused(made, "tokenizer.json: is missing", "tokenizer.model", "save_pretrained")


def test_a_folder_in_place_of_a_gguf(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is a folder; give a GGUF"):
        quantize(folder, tmp_path / "o.gguf", "q8_0")
