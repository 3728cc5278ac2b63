"""The released checkpoint's metadata, and comparisons of metadata by value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydiffusion._util.sampler_options import CANVAS_LENGTH_KEY
from pydiffusion.convert.architectures.diffusion_gemma.config import DEFAULT_SAMPLER
from pydiffusion.convert.architectures.diffusion_gemma.metadata import model_metadata
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import ARCHITECTURE
from pydiffusion.convert.quantization.type_plan import FEED_FORWARDS
from pydiffusion.testing.synthetic import SHAPES

NAME = "google/diffusiongemma-26B-A4B-it"
#: Tokens that end a text, by the checkpoint's generation_config.json.
END_IDS = (1, 50, 106)
#: Keys that are enough to recognize it by.
_SIZES = ("block_count", "embedding_length", "expert_count")
#: Keys that other converters leave out, since the runtime has the same without them.
_OPTIONAL = frozenset(
    f"{ARCHITECTURE}.{key}"
    for key in (
        "attention.bidirectional",
        "attention.causal",
        "attention.shared_kv_layers",
        "attention.value_length",
        "attention.value_length_swa",
        "embedding_length_per_layer_input",
        "image_begin_token_id",
        "image_end_token_id",
        "image_token_id",
        "rope.dimension_count",
        "rope.dimension_count_swa",
    )
)
_PADDED = frozenset(f"{ARCHITECTURE}.{part.key}" for part in FEED_FORWARDS)
_RELATIVE = 1e-6  # of floats, which files store with 32 bits


def released_metadata() -> dict[str, Any]:
    """Hyperparameters and sampler defaults of the released checkpoint."""
    values = model_metadata(NAME, SHAPES["26b-a4b"], DEFAULT_SAMPLER, 0)
    return {key: value.value for key, value in values.items() if is_compared(key)}


def is_released(metadata: Mapping[str, Any]) -> bool:
    """Whether a file has the released checkpoint's sizes."""
    wanted = released_metadata()
    return all(metadata.get(f"{ARCHITECTURE}.{key}") == wanted[f"{ARCHITECTURE}.{key}"] for key in _SIZES)


def is_compared(key: str) -> bool:
    """Whether a key is a hyperparameter or a default of the sampler."""
    return key.startswith((f"{ARCHITECTURE}.", "diffusion."))


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, found, wanted) of keys whose values differ; ``found`` is None for a missing key.

    A scalar equals a list of it, one per layer, and a period equals the pattern that it makes. Lengths of
    feed-forward layers may be padded.
    """
    result = []
    for key, value in wanted.items():
        other = found.get(key)
        if other is None and key in _OPTIONAL:
            continue
        if not _is_same(other, value) and not (key in _PADDED and _is_padded(other, value)):
            result.append((key, other, value))
    return result


def sampler_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Of some keys, the sampler's defaults, which a missing key leaves to the runtime."""
    return {k: v for k, v in keys.items() if k.startswith("diffusion.") and k != CANVAS_LENGTH_KEY}


def _is_same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        if isinstance(found, list):
            return len(found) == len(wanted) and all(map(_is_same, found, wanted))
        if isinstance(found, int) and not isinstance(found, bool) and all(type(w) is bool for w in wanted):
            return [(i + 1) % found != 0 for i in range(len(wanted))] == wanted if found > 0 else False
        return all(_is_same(found, each) for each in wanted)
    if isinstance(found, list):
        return bool(found) and all(_is_same(each, wanted) for each in found)
    if isinstance(wanted, float) and isinstance(found, (int, float)):
        return abs(found - wanted) <= _RELATIVE * abs(wanted)
    return found is not None and found == wanted


def _is_padded(found: Any, wanted: Any) -> bool:
    lengths = found if isinstance(found, list) else [found]
    return all(isinstance(n, int) and isinstance(wanted, int) and n >= wanted for n in lengths)
