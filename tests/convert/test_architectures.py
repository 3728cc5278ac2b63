"""The converter's registry of architectures."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.paths import REPOSITORY

from pydiffusion.convert.architectures import registry
from pydiffusion.convert.architectures.architecture import Architecture
from pydiffusion.convert.architectures.diffusion_gemma.architecture import DIFFUSION_GEMMA
from pydiffusion.convert.checkpoint.strict_json import Fields
from pydiffusion.errors import ConversionError

FOLDERS = sorted(path.parent for path in (REPOSITORY / "convert/architectures").glob("*/__init__.py"))
REGISTRY = "convert/architectures/registry.py"
#: What knows one architecture by design: a maker of files, and the doctor's comparison with transformers.
USERS = {
    "diffusion_gemma": {
        "pydiffusion/testing/synthetic.py",
        "pydiffusion/quality/doctor/layer_reference.py",
        "pydiffusion/quality/doctor/layers_check.py",
        "pydiffusion/quality/doctor/released.py",
        "pydiffusion/quality/doctor/weight_readers.py",
    }
}


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ARCHITECTURES", [DIFFUSION_GEMMA])


def names_in(path: Path) -> Iterator[str]:
    """Modules that a file imports, and those that a table of its names for imports on first use."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_only_the_registry_knows_an_architecture(folder: Path) -> None:
    users = {
        path.relative_to(REPOSITORY).as_posix()
        for top in ("convert", "pydiffusion")
        for path in (REPOSITORY / top).rglob("*.py")
        if folder not in path.parents
        and any(f"architectures.{folder.name}" in name for name in names_in(path))
    }
    assert users == {REGISTRY} | USERS.get(folder.name, set())


def test_every_folder_of_an_architecture_is_looked_at() -> None:
    assert "diffusion_gemma" in {folder.name for folder in FOLDERS}


def other(**changes: Any) -> Architecture[Any]:
    changes = {
        "name": "other",
        "model_types": ("other", "other_v2"),
        "class_names": ("OtherModel",),
    } | changes
    return dataclasses.replace(registry.ARCHITECTURES[0], **changes)


def config(**values: Any) -> Fields:
    return Fields(values, "config.json", [])


def test_selection_by_model_type_and_by_gguf() -> None:
    first, second = registry.ARCHITECTURES[0], other()
    registry.register(second)
    assert registry.of_config(config(model_type="diffusion_gemma")) is first
    assert registry.of_config(config(model_type="other_v2", architectures=["OtherModel"])) is second
    assert registry.of_config(config(model_type="other", architectures=None)) is second
    assert registry.of_gguf(Path("m.gguf"), "diffusion-gemma") is first
    assert registry.of_gguf(Path("m.gguf"), "other") is second


@pytest.mark.parametrize("model_type", ["llama", None, 3, ["other"]])
def test_an_unknown_model_type_names_the_known_ones(model_type: object) -> None:
    registry.register(other())
    with pytest.raises(ConversionError, match=r'config\.json.*"diffusion_gemma" or "other" or "other_v2"'):
        registry.of_config(config(model_type=model_type))


@pytest.mark.parametrize(
    "names", [[], "OtherModel", ["DiffusionGemmaModel"], ["OtherModel", 3], [["OtherModel"]]]
)
def test_class_names_of_another_architecture(names: object) -> None:
    registry.register(other())
    with pytest.raises(ConversionError, match=r"config\.json: 'architectures' should be OtherModel, is"):
        registry.of_config(config(model_type="other", architectures=names))


@pytest.mark.parametrize("name", ["llama", None, 3, ["other"]])
def test_a_gguf_of_another_architecture_names_the_known_ones(name: object) -> None:
    registry.register(other())
    with pytest.raises(ConversionError, match=r"m\.gguf: .*supported: 'diffusion-gemma', 'other'$"):
        registry.of_gguf(Path("m.gguf"), name)


@pytest.mark.parametrize(
    "changes", [{"name": "diffusion-gemma"}, {"model_types": ("new", "diffusion_gemma")}]
)
def test_names_are_registered_once(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'diffusion-gemma'"):
        registry.register(other(**changes))
    assert len(registry.ARCHITECTURES) == 1
