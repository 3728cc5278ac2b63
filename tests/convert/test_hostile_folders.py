"""Fuzzed checkpoint folders: JSON files and safetensors headers give typed errors only."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import checkpoint_folders as folders

from pydiffusion import DiffusionModel
from pydiffusion.convert import convert
from pydiffusion.errors import PyDiffusionError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["full_attention", "sliding_attention", "diffusion_gemma", "<bos>", "BPE", "F32"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FAST = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.make_folder(tmp_path_factory.mktemp("hostile") / "small", n_shards=2)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if len(path) < 4:
            found += places(inner, (*path, key))
    return found


def mutate(data: st.DataObject, value: Any) -> Any:
    """Replace, remove or rename up to three values anywhere in a JSON value."""
    for _ in range(data.draw(st.integers(1, 3))):
        if not (left := sorted(places(value), key=repr)):
            break  # all of it has been removed
        *path, key = data.draw(st.sampled_from(left))
        holder = value
        for step in path:
            holder = holder[step]
        action = data.draw(st.sampled_from(["replace", "remove", "rename"]))
        if action == "replace" or isinstance(holder, list):
            holder[key] = data.draw(JSON)
        else:
            old = holder.pop(key)
            if action == "rename":
                holder[data.draw(st.text(max_size=8))] = old
    return value


def attempt(folder: Path, target: Path) -> str:
    """Convert: success, and then the file loads, or a typed one-line error, and never a leftover file;
    returns which.
    """
    outcome = "converted"
    try:
        convert(folder, target, "q8_0")
    except PyDiffusionError as error:
        assert len(str(error)) < 2000 and "\n" not in str(error)
        outcome = "refused"
    else:
        with DiffusionModel(target, n_threads=1) as model:
            model.detokenize(model.tokenize("the bath"))
        target.unlink()
    assert list(target.parent.glob(".*.part")) == []
    return outcome


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
    ],
)
def test_json_files(folder: Path, tmp_path: Path, file: str) -> None:
    original = (folder / file).read_text(encoding="utf-8")
    outcomes: set[str] = set()

    @FAST
    @given(st.data())
    def check(data: st.DataObject) -> None:
        (folder / file).write_text(json.dumps(mutate(data, json.loads(original))), encoding="utf-8")
        outcomes.add(attempt(folder, tmp_path / "m.gguf"))

    try:
        check()
        assert "refused" in outcomes
    finally:
        (folder / file).write_text(original, encoding="utf-8")


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_chat_templates(folder: Path, tmp_path: Path, file: str) -> None:
    jinja = folder / "chat_template.jinja"
    original = jinja.read_bytes()
    good = original if jinja.name == file else json.dumps({"chat_template": original.decode()}).encode()
    outcomes: set[str] = set()

    @FAST
    @given(st.integers(0, len(good)), st.binary(max_size=4), st.integers(0, 4))
    def check(offset: int, patch: bytes, n_lost: int) -> None:
        (folder / file).write_bytes(good[:offset] + patch + good[offset + n_lost :])
        outcomes.add(attempt(folder, tmp_path / "m.gguf"))

    try:
        jinja.unlink()
        check()
        assert outcomes == {"refused", "converted"}
    finally:
        (folder / file).unlink()
        jinja.write_bytes(original)


def test_safetensors_header(folder: Path, tmp_path: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    original = shard.read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    header, body = json.loads(original[8 : 8 + length]), original[8 + length :]
    outcomes: set[str] = set()

    @FAST
    @given(st.data())
    def check(data: st.DataObject) -> None:
        text = json.dumps(mutate(data, json.loads(json.dumps(header)))).encode()
        claimed = data.draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
        shard.write_bytes(struct.pack("<Q", claimed) + text + body)
        outcomes.add(attempt(folder, tmp_path / "m.gguf"))

    try:
        check()
        assert "refused" in outcomes
    finally:
        shard.write_bytes(original)


def test_safetensors_bytes(folder: Path, tmp_path: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    original = shard.read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    outcomes: set[str] = set()

    @FAST
    @given(st.integers(0, 8 + length - 1), st.binary(min_size=1, max_size=4), st.integers(0, len(original)))
    def check(offset: int, patch: bytes, end: int) -> None:
        damaged = original[:offset] + patch + original[offset + len(patch) :]
        shard.write_bytes(damaged[:end] if end % 3 == 0 else damaged)
        outcomes.add(attempt(folder, tmp_path / "m.gguf"))

    try:
        check()
        assert "refused" in outcomes
    finally:
        shard.write_bytes(original)
