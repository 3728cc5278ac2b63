"""Errors and warnings of this package; wrong arguments raise ``ValueError`` and ``TypeError`` instead."""


class PyDiffusionError(Exception):
    """Base of all errors of this package; also raised itself for what has no narrower type."""


class ModelFormatError(PyDiffusionError):
    """A model file is damaged, or is not what it claims to be."""


class UnsupportedModelError(PyDiffusionError):
    """A well-formed model that this version can't run: another architecture, type or feature."""


class ContextOverflowError(PyDiffusionError):
    """The tokens don't fit in the session's context."""


class InsufficientMemoryError(PyDiffusionError):
    """Memory for weights, cache or buffers could not be had."""


class GenerationCancelled(PyDiffusionError):
    """Work was stopped by ``Session.cancel()``."""


class PyDiffusionWarning(UserWarning):
    """Base of all warnings of this package; also given itself: what was asked for is done, at a price."""


class PromptWarning(PyDiffusionWarning):
    """A prompt that will be answered, but badly: its bos token is missing or doubled."""


class ConversionError(PyDiffusionError):
    """A checkpoint or GGUF can't be converted as asked."""
