"""Read how a checkpoint's images become pixels of the vision tower: the settings of its preprocessing.

What the runtime does otherwise than the file says is refused by name. As in the reference, the settings are
``image_processor`` in ``processor_config.json``, or the whole ``preprocessor_config.json`` without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydiffusion.convert.checkpoint.strict_json import Fields, read_json_object
from pydiffusion.errors import ConversionError

PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"
_MAX_JSON = 64 << 20
_SOFT_TOKENS = (70, 140, 280, 560, 1120)
MAX_SOFT_TOKENS = 280  # without settings, and of files that do not say it
_PATCH, _POOLING = 16, 3  # defaults of the reference's class
_TYPES = ("Gemma4ImageProcessor", "Gemma4ImageProcessorFast", "Gemma4ImageProcessorPil")
_BICUBIC = 3
# Steps that the runtime always takes; others are refused.
_STEPS = {"do_convert_rgb": True, "do_resize": True, "do_rescale": True}
# Keys that the reference's class takes without an effect on pixels.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_map", "crop_size", "data_format", "default_to_square", "device", "disable_grouping",
        "do_center_crop", "do_pad", "feature_extractor_type", "image_seq_length", "pad_size",
        "processor_class", "return_tensors", "size",
    }
)  # fmt: skip
# Of those, the ones that read as if they had one.
_MISLEADING = ("crop_size", "do_center_crop", "do_pad", "pad_size", "size")


def read_image_processor(folder: Path, patch_size: int, pooling: int, notes: list[str]) -> int:
    """The soft tokens of an image at most; 280, with a note, if no file has settings.

    ``patch_size``, ``pooling``: the tower's, which the settings must repeat. Raises ConversionError for
    settings that are invalid, unsupported, or contradict the tower.
    """
    found = _find_settings(folder, notes)
    if found is None:
        notes.append(
            f"no {PROCESSOR} and no {IMAGE_PROCESSOR}: images are resized to at most {MAX_SOFT_TOKENS} soft "
            "tokens and not normalized, the reference's defaults"
        )
        return MAX_SOFT_TOKENS
    # A null is not an absent key: in the reference it takes the place of the default, as false does.
    fields = Fields(found[1], found[0], notes)
    fields.accept_if_there("image_processor_type", (None, *_TYPES))
    for key, only in _STEPS.items():
        fields.one_of(key, (only,), only)
    fields.one_of("resample", (_BICUBIC,), _BICUBIC)
    if fields.has("input_data_format") and fields.values["input_data_format"] is not None:
        raise fields.error("input_data_format", "absent: the axes of an image are found from its shape")
    factor = fields.number("rescale_factor", 1 / 255, minimum=0)
    if abs(factor * 255 - 1) > 1e-6:
        raise fields.error("rescale_factor", "1/255 (others are not supported)")
    _check_normalization(fields)
    for key, tower, default in (
        ("patch_size", patch_size, _PATCH),
        ("pooling_kernel_size", pooling, _POOLING),
    ):
        if fields.integer(key, default) != tower:
            absent = "" if fields.has(key) else ", the reference's default,"
            raise ConversionError(
                f"{fields.where}: {key!r} = {fields.values.get(key, default)}{absent} contradicts "
                f"config.json: vision_config, which has {tower}"
            )
    max_soft_tokens = fields.integer("max_soft_tokens", MAX_SOFT_TOKENS)
    if max_soft_tokens not in _SOFT_TOKENS:
        raise fields.error("max_soft_tokens", f"one of {', '.join(map(str, _SOFT_TOKENS))}")
    fields.note_defaults()
    _note_unread(fields)
    return max_soft_tokens


def _find_settings(folder: Path, notes: list[str]) -> tuple[str, dict[str, Any]] | None:
    """(where, settings) of the file that counts; a note if another one says something else."""
    found: list[tuple[str, dict[str, Any]]] = []
    if (folder / PROCESSOR).is_file():
        top = Fields(read_json_object(folder / PROCESSOR, _MAX_JSON), PROCESSOR, notes)
        if top.has("image_processor"):
            nested = top.object("image_processor")
            found.append((nested.where, nested.values))
    if (folder / IMAGE_PROCESSOR).is_file():
        found.append((IMAGE_PROCESSOR, read_json_object(folder / IMAGE_PROCESSOR, _MAX_JSON)))
    if len(found) == 2:
        (first, counts), (second, ignored) = found
        differing = sorted(key for key in counts | ignored if counts.get(key) != ignored.get(key))
        if differing:
            notes.append(
                f"{first} counts, as in the reference; {second} differs in {', '.join(map(repr, differing))}"
            )
    return found[0] if found else None


def _check_normalization(fields: Fields) -> None:
    """Refuse any that changes pixels; mean and deviation have no effect without ``do_normalize``."""
    is_on = fields.one_of("do_normalize", (False, True, None), False)
    for key, identity in (("image_mean", 0.0), ("image_std", 1.0)):
        given = fields.values[key] if fields.has(key) else identity
        numbers = given if isinstance(given, list) else [given] * 3
        if all(number == identity for number in numbers) and len(numbers) == 3:
            continue
        if is_on:
            raise ConversionError(
                f"{fields.where}: {key!r} = {given!r:.60} with 'do_normalize' = true is not supported: the "
                f"tower takes pixels from 0 to 1 (only {identity:g})"
            )
        fields.notes.append(f"{fields.where}: {key!r} has no effect: 'do_normalize' is false")


def _note_unread(fields: Fields) -> None:
    without = [key for key in _MISLEADING if fields.values.get(key) not in (None, False)]
    if without:
        fields.notes.append(
            f"{fields.where}: without effect, as in the reference: {', '.join(map(repr, without))}"
        )
    fields.note_unread(_WITHOUT_EFFECT)
