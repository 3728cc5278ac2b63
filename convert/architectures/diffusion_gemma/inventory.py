"""The tensors of a GGUF from those of a checkpoint; some are shared, tied or computed."""

from __future__ import annotations

import numpy as np

from pydiffusion.convert.architectures.diffusion_gemma import tensor_names
from pydiffusion.convert.architectures.diffusion_gemma.config import TextConfig
from pydiffusion.convert.architectures.diffusion_gemma.experts import stack_experts
from pydiffusion.convert.architectures.diffusion_gemma.kept_blocks import keep_blocks
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import EMBEDDING, LM_HEAD
from pydiffusion.convert.checkpoint.inventory import Inventory
from pydiffusion.convert.checkpoint.tensor_map import Wanted
from pydiffusion.convert.checkpoint.weights import Weights
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from pydiffusion.errors import ConversionError


def plan_tensors(weights: Weights, config: TextConfig, notes: list[str]) -> list[SourceTensor]:
    """Plan the tensors of the GGUF in order. Raises ConversionError for missing or unexpected tensors,
    shapes, types, and for an encoder with weights of its own.
    """
    inventory = Inventory(stack_experts(weights), tensor_names.PREFIX)
    wanted = tensor_names.wanted_tensors(config)
    twins = {twin: want for want in wanted if (twin := tensor_names.encoder_twin(want.source)) is not None}
    if config.tied:
        _take_from_twins(inventory, twins)
    planned = inventory.take(wanted)
    planned.insert(1, _rope_divisors(config))
    if not config.tied:
        _check_untied(inventory, twins)
    vision = [name for name in inventory.stored if name.startswith(tensor_names.VISION)]
    inventory.refuse_others({want.source for want in wanted} | set(twins) | {LM_HEAD} | set(vision))
    if vision:
        notes.append(f"{len(vision)} vision tensors were skipped: convert --mmproj writes them")
    by_name = {want.name: inventory.stored[want.source] for want in wanted}
    if LM_HEAD in inventory.stored:
        head = inventory.take([Wanted(LM_HEAD, "output.weight", (config.vocab_size, config.hidden_size))])
        if not inventory.equal(LM_HEAD, EMBEDDING):
            planned += head
            by_name["output.weight"] = inventory.stored[LM_HEAD]
            notes.append("lm_head.weight differs from the embedding and is kept as output.weight")
    _compare_twins(inventory, twins)
    if weights.keep:
        planned = keep_blocks(planned, by_name, weights.keep)
    return planned


def _take_from_twins(inventory: Inventory, twins: dict[str, Wanted]) -> None:
    """Of tied weights it is up to the program that saved them which of the two names they have."""
    for twin, want in twins.items():
        if want.source not in inventory.stored and twin in inventory.stored:
            inventory.stored[want.source] = inventory.stored.pop(twin)


def _check_untied(inventory: Inventory, twins: dict[str, Wanted]) -> None:
    """With ``tie_word_embeddings`` false nothing is shared, so all tensors must exist."""
    for name, source in [*((twin, want.source) for twin, want in twins.items()), (LM_HEAD, EMBEDDING)]:
        if name not in inventory.stored:
            raise ConversionError(
                f"{inventory.folder}: tensor {name!r} is missing: with 'tie_word_embeddings' = false it "
                f"can't be taken from {source!r}"
            )


def _rope_divisors(config: TextConfig) -> SourceTensor:
    """rope_freqs of the full layers: 1 for rotated pairs, and so large for the others that they don't
    rotate.
    """
    shape = tensor_names.rope_divisors_shape(config)
    divisors = np.full(shape, 1e30, np.float32)
    divisors[: config.n_rotated_pairs] = 1.0
    data = divisors.view(np.uint8)
    return SourceTensor(
        "rope_freqs.weight", "F32", shape, lambda start, n_bytes: data[start : start + n_bytes]
    )


def _compare_twins(inventory: Inventory, twins: dict[str, Wanted]) -> None:
    """Check that encoder weights, if present, equal the decoder's: the GGUF stores only one of them."""
    for twin, want in twins.items():
        if twin not in inventory.stored:
            continue
        inventory.check(twin, want.shape)
        if not inventory.equal(twin, want.source):
            encoder, decoder = inventory.stored[twin], inventory.stored[want.source]
            raise ConversionError(
                f"{encoder.file}: tensor {encoder.name!r} differs from {decoder.name!r}: a model with untied "
                "encoder weights is not supported"
            )
