"""What the text file says of images: which tokens stand for one, and whether they attend both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFReader
from support import checkpoint_folders as folders
from support.gguf_files import fields_of

from pydiffusion.convert import convert

OWN = "diffusion-gemma."
KEYS = ("image_token_id", "image_begin_token_id", "image_end_token_id")


def keys_of(
    folder: Path, text: dict[str, Any], top: dict[str, Any], tokenizer: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """The file's keys about images, without their prefix, and the notes."""
    config = folders.model_config() | top
    config["text_config"] |= text
    folders.make_folder(folder, config=config)
    folders.write_json(folder / "tokenizer_config.json", folders.tokenizer_config() | tokenizer)
    report = convert(folder, folder / "made.gguf", "f16")
    fields = fields_of(GGUFReader(folder / "made.gguf"))
    found = {key: fields.get(OWN + key) for key in ("attention.bidirectional", *KEYS)}
    assert all(found[key] is None or found[key][0] == "UINT32" for key in KEYS)
    return {key: value and value[1] for key, value in found.items()}, "\n".join(report.notes)


def test_ids_of_the_config(tmp_path: Path) -> None:
    top = {"image_token_id": 9, "boi_token_id": 7, "eoi_token_id": 8}
    keys, notes = keys_of(tmp_path / "a", {}, top, {})
    assert keys == dict(zip(("attention.bidirectional", *KEYS), ("vision", 9, 7, 8), strict=True))
    assert "image" not in notes and "boi" not in notes
    keys, _ = keys_of(tmp_path / "b", {"use_bidirectional_attention": None}, top, {})
    assert keys["attention.bidirectional"] == "none"


def test_ids_beyond_the_vocabulary_are_not_written(tmp_path: Path) -> None:
    """The class's defaults are; with a note only where the config itself says them."""
    keys, notes = keys_of(tmp_path / "a", {}, {"boi_token_id": 255999, "eoi_token_id": None}, {})
    assert [keys[key] for key in KEYS] == [None] * 3
    assert "not written: 'boi_token_id' = 255999" in notes and "258880" not in notes


def test_the_tokenizers_names_count(tmp_path: Path) -> None:
    """Its tokens are those that transformers puts into prompts."""
    names = folders.SPECIALS
    tokenizer = {
        "boi_token": names[7],
        "extra_special_tokens": {"image_token": names[9], "eoi_token": "<not there>"},
    }
    keys, notes = keys_of(tmp_path / "a", {}, {"image_token_id": 9, "boi_token_id": 4}, tokenizer)
    assert [keys[key] for key in KEYS] == [9, 7, None]
    assert "disagree on 'boi_token': 7" in notes and "'eoi_token' is '<not there>'" in notes
    assert "disagree on 'image_token'" not in notes
