"""The architectures that can be converted, and which one a checkpoint or a GGUF is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydiffusion.convert.architectures.architecture import Architecture
from pydiffusion.convert.architectures.diffusion_gemma.architecture import DIFFUSION_GEMMA
from pydiffusion.convert.checkpoint.strict_json import Fields
from pydiffusion.errors import ConversionError

ARCHITECTURES: list[Architecture[Any]] = [
    DIFFUSION_GEMMA,
]


def register(architecture: Architecture[Any]) -> None:
    """Add an architecture. Raises ValueError if its name or one of its model types is taken."""
    for other in ARCHITECTURES:
        if other.name == architecture.name or set(other.model_types) & set(architecture.model_types):
            raise ValueError(
                f"architecture {architecture.name!r}: its name or model type is that of {other.name!r}"
            )
    ARCHITECTURES.append(architecture)


def of_config(config: Fields) -> Architecture[Any]:
    """The architecture of a checkpoint, by ``model_type`` of its ``config.json``.

    Raises ConversionError, with the known ones, for another; also for ``architectures`` of another.
    """
    model_types = tuple(known for architecture in ARCHITECTURES for known in architecture.model_types)
    model_type = config.one_of("model_type", model_types)
    found = next(architecture for architecture in ARCHITECTURES if model_type in architecture.model_types)
    names = config.values["architectures"] if config.has("architectures") else None
    if names is not None and not (
        isinstance(names, list) and names and all(name in found.class_names for name in names)
    ):
        raise config.error("architectures", found.class_names[0])
    return found


def of_gguf(path: Path, name: object) -> Architecture[Any]:
    """The architecture of a GGUF by its ``general.architecture``.

    Raises ConversionError, with the known ones, for another.
    """
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = ", ".join(repr(architecture.name) for architecture in ARCHITECTURES)
    raise ConversionError(f"{path}: key 'general.architecture' is {name!r:.60}; supported: {known}")
