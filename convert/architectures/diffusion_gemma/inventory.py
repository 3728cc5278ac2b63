"""Match the tensors of a checkpoint with those that the architecture needs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from pydiffusion.convert.architectures.diffusion_gemma import tensor_names
from pydiffusion.convert.architectures.diffusion_gemma.config import TextConfig
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import Wanted
from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint, StoredTensor
from pydiffusion.convert.gguf.rows import to_float32
from pydiffusion.convert.gguf.tensor_reads import ReadBytes
from pydiffusion.errors import ConversionError

_FLOAT_TYPES = ("F32", "F16", "BF16")
_COMPARE_BYTES = 8 << 20

# (name in the GGUF, type in the source, shape, how to read it)
_Planned = tuple[str, str, tuple[int, ...], ReadBytes]


class Inventory:
    """Tensors of a checkpoint; every one is accounted for or rejected by name."""

    def __init__(self, checkpoint: Checkpoint, config: TextConfig):
        self.checkpoint = checkpoint
        self.config = config
        self.stored: dict[str, StoredTensor] = {}
        for name, tensor in checkpoint.tensors.items():
            # A bare DiffusionGemmaModel saves without the prefix that the full model has.
            short = name.removeprefix("model.")
            if short in self.stored:
                raise ConversionError(f"tensors {name!r} and {self.stored[short].name!r} are duplicates")
            self.stored[short] = tensor
        self.wanted = tensor_names.wanted_tensors(config)
        self.twins = {
            twin: want for want in self.wanted if (twin := tensor_names.encoder_twin(want.source)) is not None
        }

    def plan(self, notes: list[str]) -> list[_Planned]:
        """Plan the tensors of the GGUF in order. Raises for missing or unexpected tensors, shapes, types."""
        for want in self.wanted:
            self._check(want.source, want.shape)
        if not self.config.tied:
            self._check_untied()
        known = {want.source for want in self.wanted} | set(self.twins) | {tensor_names.LM_HEAD}
        vision = [name for name in self.stored if name.startswith(tensor_names.VISION)]
        unexpected = sorted(set(self.stored) - known - set(vision))
        if unexpected:
            more = f" (and {len(unexpected) - 1} more)" if len(unexpected) > 1 else ""
            raise ConversionError(
                f"unexpected tensor {self.stored[unexpected[0]].name!r}{more}: not of this architecture"
            )
        if vision:
            notes.append(f"{len(vision)} vision tensors were skipped: convert --mmproj writes them")
        planned = [self._planned(want) for want in self.wanted]
        planned.insert(1, self._rope_divisors())
        if tensor_names.LM_HEAD in self.stored:
            head = Wanted(
                tensor_names.LM_HEAD, "output.weight", (self.config.vocab_size, self.config.hidden_size)
            )
            self._check(head.source, head.shape)
            if not self._equal(tensor_names.LM_HEAD, tensor_names.EMBEDDING):
                planned.append(self._planned(head))
                notes.append("lm_head.weight differs from the embedding and is kept as output.weight")
        return planned

    def _check_untied(self) -> None:
        """With ``tie_word_embeddings`` false nothing is shared, so all tensors must exist."""
        for name, want in [*self.twins.items(), (tensor_names.LM_HEAD, None)]:
            if name not in self.stored:
                source = tensor_names.EMBEDDING if want is None else want.source
                raise ConversionError(
                    f"tensor {name!r} is missing: with 'tie_word_embeddings' = false it can't be "
                    f"taken from {source!r}"
                )

    def _planned(self, want: Wanted) -> _Planned:
        tensor = self.stored[want.source]
        return want.name, tensor.dtype, want.shape, partial(self.checkpoint.read, tensor)

    def _rope_divisors(self) -> _Planned:
        """rope_freqs of the full layers: 1 for rotated pairs, and so large for the others that they don't
        rotate.
        """
        n_pairs = self.config.global_head_dim // 2
        divisors = np.full(n_pairs, 1e30, np.float32)
        divisors[: self.config.n_rotated_pairs] = 1.0
        data = divisors.view(np.uint8)
        return "rope_freqs.weight", "F32", (n_pairs,), lambda start, n_bytes: data[start : start + n_bytes]

    def _check(self, source: str, shape: tuple[int, ...]) -> None:
        tensor = self.stored.get(source)
        if tensor is None:
            raise ConversionError(f"tensor 'model.{source}' is missing from the checkpoint")
        if tensor.shape != shape:
            raise ConversionError(
                f"tensor {tensor.name!r} has the shape {list(tensor.shape)}; config.json requires "
                f"{list(shape)}"
            )
        if tensor.dtype not in _FLOAT_TYPES:
            raise ConversionError(
                f"tensor {tensor.name!r} is stored as {tensor.dtype}, which is not supported (only "
                "F32, F16, BF16)"
            )

    def compare_tied(self) -> None:
        """Check that encoder weights, if present, equal the decoder's: the GGUF stores only one of them."""
        for twin, want in self.twins.items():
            if twin not in self.stored:
                continue
            self._check(twin, want.shape)
            if not self._equal(twin, want.source):
                raise ConversionError(
                    f"tensor {self.stored[twin].name!r} differs from "
                    f"{self.stored[want.source].name!r}: a model with "
                    "untied encoder weights is not supported"
                )

    def _equal(self, one: str, other: str) -> bool:
        first, second = self.stored[one], self.stored[other]
        for start, count in _pieces(int(np.prod(first.shape))):
            a, b = self._weights(first, start, count), self._weights(second, start, count)
            if not np.array_equal(a, b):
                return False
        return True

    def _weights(self, tensor: StoredTensor, start: int, count: int) -> np.ndarray:
        size = 4 if tensor.dtype == "F32" else 2
        return to_float32(self.checkpoint.read(tensor, start * size, count * size), tensor.dtype, count)


def _pieces(n_weights: int) -> Iterator[tuple[int, int]]:
    step = _COMPARE_BYTES // 4
    for start in range(0, n_weights, step):
        yield start, min(step, n_weights - start)
