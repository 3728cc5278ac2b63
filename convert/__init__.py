"""From a Hugging Face folder to GGUF, and from one GGUF to another::

convert("DiffusionGemma/", "model.gguf", type="q4_k_m")
quantize("model-f32.gguf", "model-q8_0.gguf", type="q8_0")
repack("model-00001-of-00003.gguf", "model.gguf")
verify("model.gguf", against="DiffusionGemma/")
"""

from pydiffusion.convert.collect import ImatrixReport, collect_imatrix
from pydiffusion.convert.conversion import Variant, convert, convert_family, quantize
from pydiffusion.convert.evaluation import EvaluationReport, evaluate, evaluate_family
from pydiffusion.convert.plotting import plot
from pydiffusion.convert.recipes import TYPES
from pydiffusion.convert.repacking import edit_metadata, repack
from pydiffusion.convert.report import ConversionProgress, ConversionReport
from pydiffusion.convert.sizes import SizePlan, fit, plan_sizes
from pydiffusion.convert.verification import VerifyReport, verify
from pydiffusion.convert.vision import MMPROJ_TYPES, convert_mmproj

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
