"""The native table of sampler options, for everything in Python that needs a default or a metadata key."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydiffusion import _native

CANVAS_LENGTH_KEY = _native.CANVAS_LENGTH_KEY
REFERENCE_CANVAS_LENGTH = 256  # default of the reference's configuration


@dataclass(frozen=True)
class SamplerOption:
    """An option that a file can give a default for.

    name: as in :class:`pydiffusion.GenerationOptions`. key: of the file's metadata. default: the reference
    implementation's. low, high: the range permitted in a file.
    """

    name: str
    key: str
    integer: bool
    default: int | float
    low: int | float
    high: int | float

    @property
    def gguf_type(self) -> str:
        """Type of the metadata value: ``u32`` or ``f32``."""
        return "u32" if self.integer else "f32"


# By the name of the sampler.
SAMPLER_OPTIONS = MappingProxyType(
    {
        sampler: tuple(SamplerOption(**option) for option in options)
        for sampler, options in _native.sampler_options().items()
    }
)
ENTROPY_BOUND = SAMPLER_OPTIONS["entropy-bound"]
ENTROPY_BOUND_DEFAULTS: MappingProxyType[str, Any] = MappingProxyType(
    {option.name: option.default for option in ENTROPY_BOUND}
)
_ARCHITECTURE_TO_SAMPLER: MappingProxyType[str, str] = MappingProxyType(_native.samplers_of_architectures())


def sampler_of(metadata: Mapping[str, Any]) -> str:
    """Name of the sampler that a file's architecture has; the entropy bound for an unknown one."""
    return _ARCHITECTURE_TO_SAMPLER.get(metadata.get("general.architecture", ""), "entropy-bound")


@functools.cache
def file_options(sampler: str) -> Mapping[str, tuple[str | None, Any]]:
    """Options that a file with this sampler can give a default for: name -> (metadata key, the reference's
    default). The key is None for an option of the entropy bound that another sampler doesn't have.
    """
    others = {name: (None, default) for name, default in ENTROPY_BOUND_DEFAULTS.items()}
    own = {option.name: (option.key, option.default) for option in SAMPLER_OPTIONS[sampler]}
    return {**others, **own, "canvas_length": (CANVAS_LENGTH_KEY, REFERENCE_CANVAS_LENGTH)}
