"""The native table of sampler options, for everything in Python that needs a default or a metadata key."""

from __future__ import annotations

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
# Of all options that a file can set: the keys (one per sampler that has the option), and the reference's
# default where the file has none of them.
FILE_KEYS: dict[str, tuple[str, ...]] = {"canvas_length": (CANVAS_LENGTH_KEY,)}
for _option in (option for options in SAMPLER_OPTIONS.values() for option in options):
    FILE_KEYS[_option.name] = (*FILE_KEYS.get(_option.name, ()), _option.key)
FILE_DEFAULTS: MappingProxyType[str, Any] = MappingProxyType(
    {
        **{option.name: option.default for options in SAMPLER_OPTIONS.values() for option in options},
        **ENTROPY_BOUND_DEFAULTS,
        "canvas_length": REFERENCE_CANVAS_LENGTH,
    }
)
