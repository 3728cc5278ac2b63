"""Errors and warnings of this package; wrong arguments raise ``ValueError`` (for an option its subclass
``OptionError``) and ``TypeError`` instead.
"""

from __future__ import annotations

from typing import Any


class PyDiffusionError(Exception):
    """Base class of all errors of this package; raised itself where no subclass fits."""


class ModelFormatError(PyDiffusionError):
    """A model file is damaged or malformed."""


class UnsupportedModelError(PyDiffusionError):
    """A well-formed model that this version does not support: architecture, tensor type or feature."""


class ContextOverflowError(PyDiffusionError):
    """The tokens don't fit in the session's context."""


class InsufficientMemoryError(PyDiffusionError):
    """Failed to allocate memory for weights, cache or buffers."""


class ImageError(PyDiffusionError):
    """An image that is damaged, truncated, too large, in an unknown format, or of an unusable shape."""


class GenerationCancelled(PyDiffusionError):
    """Cancelled by ``Session.cancel()``."""


class OptionError(ValueError):
    """The value of an option is refused. ``param``: the option's name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[OptionError], tuple[str, str]]:
        return type(self), (self.param, str(self))  # both arguments, or it could not be pickled


class FunctionError(OptionError):
    """A function of ``function_calls`` whose calls can't be guaranteed.

    index: in the list of functions.  name: the function's.  what: what is wrong, without where.
    is_about_name: the name is refused, not the parameters.
    """

    def __init__(self, index: int, name: str, what: str, is_about_name: bool = False) -> None:
        super().__init__("function_calls", f"function_calls, functions[{index}], {name!r}: {what}"[:500])
        self.index = index
        self.name = name
        self.what = what
        self.is_about_name = is_about_name

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.index, self.name, self.what, self.is_about_name)


class PyDiffusionWarning(UserWarning):
    """Base class of all warnings of this package; raised itself for a choice that costs quality."""


class PromptWarning(PyDiffusionWarning):
    """A prompt whose bos token is missing or doubled; the answer will be poor."""


class ConversionError(PyDiffusionError):
    """A checkpoint or GGUF can't be converted as requested."""


class AdapterError(PyDiffusionError):
    """An adapter (LoRA) is damaged, for another model, or asks for what is not supported."""
