"""DiffusionGemma, as the converter's registry lists it."""

from __future__ import annotations

from pydiffusion.convert.architectures.architecture import Architecture, ModelShape
from pydiffusion.convert.architectures.diffusion_gemma import tensor_names
from pydiffusion.convert.architectures.diffusion_gemma.adapted import DiffusionGemmaMatrices
from pydiffusion.convert.architectures.diffusion_gemma.config import (
    DEFAULT_SAMPLER,
    TextConfig,
    read_text_config,
)
from pydiffusion.convert.architectures.diffusion_gemma.inventory import plan_tensors
from pydiffusion.convert.architectures.diffusion_gemma.metadata import (
    implied_keys,
    model_metadata,
    read_metadata,
)
from pydiffusion.convert.architectures.diffusion_gemma.vision import plan_mmproj


def model_shape(config: TextConfig) -> ModelShape:
    """The model's size."""
    metadata = model_metadata("", config, DEFAULT_SAMPLER, 0)
    return ModelShape(tensor_names.KINDS, tensor_names.shapes(config), metadata)


DIFFUSION_GEMMA = Architecture(
    name=tensor_names.ARCHITECTURE,
    model_types=("diffusion_gemma",),
    class_names=("DiffusionGemmaForBlockDiffusion", "DiffusionGemmaModel"),
    kinds=tensor_names.KINDS,
    read_config=read_text_config,
    shape=model_shape,
    metadata=read_metadata,
    tensors=plan_tensors,
    mmproj=plan_mmproj,
    implied=implied_keys,
    matrices=DiffusionGemmaMatrices,
)
