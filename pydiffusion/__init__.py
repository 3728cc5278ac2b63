"""Run block text-diffusion language models (DiffusionGemma) from GGUF files.

Names are imported on first use, so that ``import pydiffusion`` and ``pydiffusion --help`` stay quick
and the pure-Python parts (errors, options) work where the native module is not built.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        ContextOverflowError,
        ConversionError,
        GenerationCancelled,
        InsufficientMemoryError,
        ModelFormatError,
        PromptWarning,
        PyDiffusionError,
        PyDiffusionWarning,
        UnsupportedModelError,
    )
    from .events import CanvasEvent, Completion, DraftEvent, EndEvent, Event
    from .infill import Infill
    from .model import DiffusionModel
    from .options import GenerationOptions
    from .placement import Device, DeviceShare, Plan, devices, plan
    from .session import Session
    from .tokenizer import Tokenizer

# As pip knows us: `pydiffusion` on the package index is another project.
DISTRIBUTION = "pydiffusion-gguf"

_NAME_TO_MODULE = {
    "CanvasEvent": "events",
    "Completion": "events",
    "ContextOverflowError": "errors",
    "ConversionError": "errors",
    "Device": "placement",
    "DeviceShare": "placement",
    "DiffusionModel": "model",
    "DraftEvent": "events",
    "EndEvent": "events",
    "Event": "events",
    "GenerationCancelled": "errors",
    "GenerationOptions": "options",
    "Infill": "infill",
    "InsufficientMemoryError": "errors",
    "ModelFormatError": "errors",
    "Plan": "placement",
    "PromptWarning": "errors",
    "PyDiffusionWarning": "errors",
    "PyDiffusionError": "errors",
    "Session": "session",
    "Tokenizer": "tokenizer",
    "UnsupportedModelError": "errors",
    "devices": "placement",
    "plan": "placement",
}

__all__ = [
    "CanvasEvent",
    "Completion",
    "ContextOverflowError",
    "ConversionError",
    "Device",
    "DeviceShare",
    "DiffusionModel",
    "DraftEvent",
    "EndEvent",
    "Event",
    "GenerationCancelled",
    "GenerationOptions",
    "Infill",
    "InsufficientMemoryError",
    "ModelFormatError",
    "Plan",
    "PromptWarning",
    "PyDiffusionError",
    "PyDiffusionWarning",
    "Session",
    "Tokenizer",
    "UnsupportedModelError",
    "__version__",
    "devices",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version(DISTRIBUTION)
        except PackageNotFoundError:  # run from a source tree that was never installed
            value = "0+unknown"
    elif name in _NAME_TO_MODULE:
        value = getattr(import_module(f".{_NAME_TO_MODULE[name]}", __name__), name)
    elif name == "_native":
        value = _import_native()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _import_native() -> Any:
    try:
        return import_module("._native", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}._native":
            raise
        raise ImportError(
            f"{__path__[0]} is pydiffusion's source, without its compiled part; Python takes it because it "
            "lies in the current folder: run from another folder, or install with `pip install -e .`",
            name=error.name,
        ) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
