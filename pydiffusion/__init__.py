"""Run block text-diffusion language models (DiffusionGemma) from GGUF files.

Names are imported on first use, so that ``import pydiffusion`` and ``pydiffusion --help`` stay quick
and the pure-Python parts (errors, options) work where the native module is not built.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._util.version import DISTRIBUTION as DISTRIBUTION
    from ._util.version import __version__
    from .adapters.adapter import Adapter
    from .device_plan import Device, DeviceShare, Plan, devices, plan
    from .errors import (
        AdapterError,
        ContextOverflowError,
        ConversionError,
        GenerationCancelled,
        ImageError,
        InsufficientMemoryError,
        ModelFormatError,
        OptionError,
        PromptWarning,
        PyDiffusionError,
        PyDiffusionWarning,
        UnsupportedModelError,
    )
    from .events import CanvasEvent, ChatCompletion, Completion, DraftEvent, EndEvent, Event
    from .generation.infill import Infill
    from .model import DiffusionModel
    from .options import GenerationOptions, ResolvedOptions
    from .session import Session
    from .tokenizer import Tokenizer

_NAME_TO_MODULE = {
    "Adapter": "adapters.adapter",
    "AdapterError": "errors",
    "CanvasEvent": "events",
    "ChatCompletion": "events",
    "Completion": "events",
    "ContextOverflowError": "errors",
    "ConversionError": "errors",
    "DISTRIBUTION": "_util.version",
    "Device": "device_plan",
    "DeviceShare": "device_plan",
    "DiffusionModel": "model",
    "DraftEvent": "events",
    "EndEvent": "events",
    "Event": "events",
    "GenerationCancelled": "errors",
    "GenerationOptions": "options",
    "ImageError": "errors",
    "Infill": "generation.infill",
    "InsufficientMemoryError": "errors",
    "ModelFormatError": "errors",
    "OptionError": "errors",
    "Plan": "device_plan",
    "PromptWarning": "errors",
    "PyDiffusionWarning": "errors",
    "PyDiffusionError": "errors",
    "ResolvedOptions": "options",
    "Session": "session",
    "Tokenizer": "tokenizer",
    "UnsupportedModelError": "errors",
    "__version__": "_util.version",
    "devices": "device_plan",
    "plan": "device_plan",
}

__all__ = [
    "Adapter",
    "AdapterError",
    "CanvasEvent",
    "ChatCompletion",
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
    "ImageError",
    "Infill",
    "InsufficientMemoryError",
    "ModelFormatError",
    "OptionError",
    "Plan",
    "PromptWarning",
    "PyDiffusionError",
    "PyDiffusionWarning",
    "ResolvedOptions",
    "Session",
    "Tokenizer",
    "UnsupportedModelError",
    "__version__",
    "devices",
    "plan",
]


if os.environ.get("PYDIFFUSION_LOG_LEVEL"):
    import_module("._util.log", __name__).print_as_asked()


def __getattr__(name: str) -> Any:
    if name in _NAME_TO_MODULE:
        value: Any = getattr(import_module(f".{_NAME_TO_MODULE[name]}", __name__), name)
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
            f"{__path__[0]} is pydiffusion's source tree, without the compiled extension, and Python imports"
            " it because it is in the current folder: run elsewhere, or install with `pip install -e .`",
            name=error.name,
        ) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
