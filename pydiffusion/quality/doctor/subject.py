"""The subject of an examination: a file, opened as far as it can be, and the folder that it was made from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydiffusion._util.cpus import available_cpus
from pydiffusion.chat.template_source import TEMPLATE_KEY, find_template
from pydiffusion.convert.architectures.source import Source, open_folder, read_config
from pydiffusion.convert.gguf.reader import Parts, open_parts
from pydiffusion.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel

Opened = TypeVar("Opened")


class UnavailableError(Exception):
    """A check needs what an earlier one failed to open."""


@dataclass
class Subject:
    """runtime: arguments of ``DiffusionModel``. progress: called with what is done, and the share of it."""

    path: Path
    reference: Path | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[str, float], None] = lambda _what, _share: None
    weight_errors: dict[str, float] = field(default_factory=dict)  # relative, by tensor, once compared
    _failed: set[str] = field(default_factory=set)
    _model: DiffusionModel | None = None

    @cached_property
    def parts(self) -> Parts:
        """The file, with its tensors' places. Raises as ``open_parts``."""
        return self._first("the file can't be read", lambda: open_parts(self.path))

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's keys and values, with the chat template that the runtime's arguments give."""
        given = self.runtime.get("chat_template")
        return self.parts.metadata | ({} if given is None else {TEMPLATE_KEY: find_template(given)})

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Raises as ``Tokenizer``."""
        metadata = self.metadata
        return self._first("the tokenizer can't be built", lambda: Tokenizer(metadata))

    @property
    def model(self) -> DiffusionModel:
        """The loaded model. Raises as ``DiffusionModel``."""
        if self._model is None:
            self._model = self.load()
        return self._model

    def load(self, **changed: Any) -> DiffusionModel:
        """Load the model anew, with other arguments than given. Closes the one that is loaded."""
        from pydiffusion import DiffusionModel

        self.close_model()
        arguments: dict[str, Any] = {**self.runtime, **changed}
        loading = lambda: DiffusionModel(  # noqa: E731
            self.parts.paths[0], progress=lambda share: self.progress("loading", share), **arguments
        )
        return self._first("the model can't be loaded", loading)

    def close_model(self) -> None:
        """Free the model's memory."""
        if self._model is not None:
            self._model.close()
            self._model = None

    @property
    def n_threads(self) -> int:
        """Number of threads that the model runs on."""
        return self.runtime.get("n_threads") or available_cpus()

    @cached_property
    def reference_metadata(self) -> dict[str, Any]:
        """Keys and values that a conversion of the reference would have; needs none of its weights."""
        assert self.reference is not None
        folder = self.reference

        def read() -> dict[str, Any]:
            architecture, config = read_config(folder, [])
            return {key: value.value for key, value in architecture.metadata(folder, "", config, []).items()}

        return self._first("the reference can't be read", read)

    @property
    def has_reference_weights(self) -> bool:
        """Whether the reference has weights, not only its small files."""
        return self.reference is not None and any(self.reference.glob("*.safetensors"))

    @contextlib.contextmanager
    def folder(self) -> Iterator[Source]:
        """The reference as the converter reads it. Raises as ``open_folder``."""
        assert self.reference is not None
        opening = open_folder(self.reference)
        with contextlib.ExitStack() as stack:
            yield self._first("the reference can't be read", lambda: stack.enter_context(opening))

    def _first(self, what: str, opening: Callable[[], Opened]) -> Opened:
        """Open something; after the first failure, which is reported, raise UnavailableError."""
        if what in self._failed:
            raise UnavailableError(what)
        try:
            return opening()
        except Exception:
            self._failed.add(what)
            raise
