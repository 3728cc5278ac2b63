"""Convert a Hugging Face checkpoint to GGUF, and one GGUF to another::

convert("DiffusionGemma/", "model.gguf", type="q4_k_m")
quantize("model-f32.gguf", "model-q8_0.gguf", type="q8_0")
repack("model-00001-of-00003.gguf", "model.gguf")
verify("model.gguf", against="DiffusionGemma/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydiffusion.convert.conversion import (
        MMPROJ_TYPES,
        Variant,
        convert,
        convert_family,
        convert_mmproj,
        quantize,
    )
    from pydiffusion.convert.gguf.report import ConversionProgress, ConversionReport
    from pydiffusion.convert.quantization.recipes import TYPES
    from pydiffusion.convert.quantization.sizes import SizePlan, fit, plan_sizes
    from pydiffusion.convert.repacking import edit_metadata, repack
    from pydiffusion.convert.verification import VerifyReport, verify
    from pydiffusion.quality.evaluation import EvaluationReport, evaluate, evaluate_family
    from pydiffusion.quality.imatrix_collection import ImatrixReport, collect_imatrix
    from pydiffusion.quality.plotting import plot

# Imported on first use: importing one name does not import the others, and quality/ (which is above convert/)
# can be exported here without a cycle.
_NAME_TO_MODULE = {
    "ConversionProgress": "pydiffusion.convert.gguf.report",
    "ConversionReport": "pydiffusion.convert.gguf.report",
    "EvaluationReport": "pydiffusion.quality.evaluation",
    "ImatrixReport": "pydiffusion.quality.imatrix_collection",
    "MMPROJ_TYPES": "pydiffusion.convert.conversion",
    "SizePlan": "pydiffusion.convert.quantization.sizes",
    "TYPES": "pydiffusion.convert.quantization.recipes",
    "Variant": "pydiffusion.convert.conversion",
    "VerifyReport": "pydiffusion.convert.verification",
    "collect_imatrix": "pydiffusion.quality.imatrix_collection",
    "convert": "pydiffusion.convert.conversion",
    "convert_family": "pydiffusion.convert.conversion",
    "convert_mmproj": "pydiffusion.convert.conversion",
    "edit_metadata": "pydiffusion.convert.repacking",
    "evaluate": "pydiffusion.quality.evaluation",
    "evaluate_family": "pydiffusion.quality.evaluation",
    "fit": "pydiffusion.convert.quantization.sizes",
    "plan_sizes": "pydiffusion.convert.quantization.sizes",
    "plot": "pydiffusion.quality.plotting",
    "quantize": "pydiffusion.convert.conversion",
    "repack": "pydiffusion.convert.repacking",
    "verify": "pydiffusion.convert.verification",
    # For the command line and the examples; not public.
    "check_overrides": "pydiffusion.convert.quantization.type_plan",
    "estimate_memory": "pydiffusion.convert.quantization.sizes",
    "open_parts": "pydiffusion.convert.gguf.reader",
    "parse_size": "pydiffusion._util.sizes",
    "recipe_name": "pydiffusion.convert.quantization.recipes",
    "read_shape": "pydiffusion.convert.architectures.source",
    "repo_id": "pydiffusion.convert.checkpoint.hub",
}

__all__ = [
    "MMPROJ_TYPES",
    "TYPES",
    "ConversionProgress",
    "ConversionReport",
    "EvaluationReport",
    "ImatrixReport",
    "SizePlan",
    "Variant",
    "VerifyReport",
    "collect_imatrix",
    "convert",
    "convert_family",
    "convert_mmproj",
    "edit_metadata",
    "evaluate",
    "evaluate_family",
    "fit",
    "plan_sizes",
    "plot",
    "quantize",
    "repack",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _NAME_TO_MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_NAME_TO_MODULE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
