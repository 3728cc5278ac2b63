"""The methods of ``DiffusionModel`` for adapters."""

from __future__ import annotations

from pydiffusion.options import Lora, LoraSource

from .adapter import Adapter
from .applied import AdapterStore


class LoraMethods:
    """Adapters (LoRA), loaded beside the weights and applied without changing them."""

    adapters: AdapterStore

    @property
    def lora(self) -> tuple[tuple[Adapter, float], ...]:
        """The adapters of the model's sessions, each with its scale."""
        return self.adapters.current.given

    def set_lora(self, lora: Lora) -> None:
        """Apply these adapters, in place of all earlier ones, in every session without its own.

        lora: each a source (the path of a PEFT folder or a GGUF, "user/repo" of the Hugging Face Hub, or an
            Adapter) or ``(source, scale)``, scale 1 unless given; empty takes all off. Adapters add up.
        Sessions that are open encode their tokens anew before they next use them. A generation that has begun
        keeps its adapters. Raises AdapterError, and OptionError for a wrong argument, with the earlier ones
        left set.
        """
        self.adapters.current = self.adapters.set_of(lora)

    def load_lora(self, source: LoraSource) -> Adapter:
        """Load an adapter, to be applied later: ``set_lora`` and others then don't read its files again.

        Loaded ones are kept (``unload_lora``); a path whose files have changed is read again.
        Raises AdapterError, saying what to do, for one that can't be read or does not fit the model.
        """
        return self.adapters.load(source)

    def unload_lora(self, adapter: Adapter) -> None:
        """Forget a loaded adapter: its memory is free once no model or session applies it. Applied again, it
        is loaded anew. One that is not loaded: nothing happens.
        """
        self.adapters.unload(adapter)

    def lora_key(self, lora: Lora | None = None) -> bytes:
        """The ``Session.lora_key`` of sessions that apply these adapters; None: the model's.

        Empty without adapters. Raises as ``set_lora``.
        """
        return (self.adapters.current if lora is None else self.adapters.set_of(lora)).key
