"""Settings of preprocessing: what changes the pixels of transformers is honoured or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.checkpoint_folders import write_json
from support.vision_folders import TOWER, make_folder, vision_weights

from pydiffusion.convert import convert_mmproj
from pydiffusion.convert.checkpoint.image_processor import read_image_processor
from pydiffusion.errors import ConversionError

#: As transformers saves them.
SAVED: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_processor_type": "Gemma4ImageProcessor",
    "image_seq_length": 280,
    "image_std": [1.0, 1.0, 1.0],
    "max_soft_tokens": 280,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}
#: Settings, and the key that is refused; None: they change nothing but the number of soft tokens.
SETTINGS: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    (SAVED, None),
    ({"max_soft_tokens": 70}, None),
    ({"max_soft_tokens": 1120, "do_normalize": None, "size": None}, None),
    ({"do_normalize": True}, None),
    ({"do_normalize": True, "image_mean": 0.0, "image_std": [1, 1, 1]}, None),
    ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 1]}, None),
    ({"size": {"height": 224, "width": 224}, "do_pad": True, "image_seq_length": 7}, None),
    ({"image_processor_type": "Gemma4ImageProcessorFast"}, None),
    ({"do_normalize": True, "image_mean": [0.5] * 3}, "image_mean"),
    ({"do_normalize": True, "image_std": [1, 1, 0.5]}, "image_std"),
    ({"do_rescale": False}, "do_rescale"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
    ({"rescale_factor": 1}, "rescale_factor"),
    ({"do_resize": False}, "do_resize"),
    ({"do_resize": None}, "do_resize"),
    ({"rescale_factor": None}, "rescale_factor"),
    ({"do_normalize": True, "image_mean": None}, "image_mean"),
    ({"do_convert_rgb": False}, "do_convert_rgb"),
    ({"resample": 2}, "resample"),
    ({"resample": 1}, "resample"),
    ({"patch_size": 14}, "patch_size"),
    ({"pooling_kernel_size": 2}, "pooling_kernel_size"),
    ({"max_soft_tokens": 100}, "max_soft_tokens"),
    ({"max_soft_tokens": 0}, "max_soft_tokens"),
]


def read(folder: Path, settings: dict[str, Any], notes: list[str] | None = None) -> int:
    write_json(folder / "processor_config.json", {"image_processor": settings, "image_seq_length": 280})
    return read_image_processor(folder, 16, 3, [] if notes is None else notes)


@pytest.mark.parametrize(("settings", "refused"), SETTINGS)
def test_settings(settings: dict[str, Any], refused: str | None, tmp_path: Path) -> None:
    if refused is None:
        assert read(tmp_path, settings) == settings.get("max_soft_tokens", 280)
        return
    with pytest.raises(ConversionError, match=f"image_processor: '{refused}'"):
        read(tmp_path, settings)


@pytest.mark.reference
@pytest.mark.parametrize(("settings", "refused"), SETTINGS)
def test_refused_are_those_that_change_the_references_pixels(
    settings: dict[str, Any], refused: str | None
) -> None:
    """Accepted settings give the pixels of the same number of soft tokens without any."""
    pytest.importorskip("PIL")
    from PIL import Image
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    noise = np.random.default_rng(3).integers(0, 256, (90, 130), np.uint8)
    images = [
        Image.fromarray(np.stack([noise, noise.T[:90, :1] + noise, 255 - noise], 2)),
        Image.fromarray(noise),
    ]

    def pixels(**given: Any) -> list[np.ndarray]:
        made = Gemma4ImageProcessorPil(**given)
        return [np.asarray(made(image, return_tensors="np")["pixel_values"]) for image in images]

    number = {key: value for key, value in settings.items() if key == "max_soft_tokens" and refused != key}
    expected = pixels(**number)
    if refused is None:
        for ours, theirs in zip(expected, pixels(**settings), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
        return
    try:
        changed = pixels(**settings)
    except (ValueError, TypeError):
        return
    assert any(
        a.shape != b.shape or np.abs(a - b).max() > 1 / 255 for a, b in zip(expected, changed, strict=True)
    )


def made(path: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A folder with a tower of patches of 16."""
    tensors = vision_weights()
    name = TOWER + "patch_embedder.input_proj.weight"
    tensors[name] = np.zeros((len(tensors[name]), 3 * 16**2), np.float32)
    folder = make_folder(path, tensors, patch_size=16, **changes)
    if settings is not None:
        write_json(folder / "processor_config.json", {"image_processor": settings})
    return folder


def test_the_number_of_soft_tokens_is_in_the_file(tmp_path: Path) -> None:
    convert_mmproj(made(tmp_path / "made", SAVED | {"max_soft_tokens": 560}), tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("clip.vision.max_soft_tokens").contents() == 560
    with pytest.raises(
        ConversionError, match=r"'pooling_kernel_size' = 3 contradicts .*vision_config, which has 2"
    ):
        convert_mmproj(made(tmp_path / "other", SAVED, pooling_kernel_size=2), tmp_path / "o.gguf")


def test_the_file_that_counts(tmp_path: Path) -> None:
    """Nested settings before those of preprocessor_config.json, as in transformers; differences are noted."""
    notes: list[str] = []
    assert read_image_processor(tmp_path, 14, 2, notes) == 280 and "no processor_config.json" in notes[0]
    write_json(tmp_path / "processor_config.json", {"max_soft_tokens": 70, "image_seq_length": 70})
    write_json(tmp_path / "preprocessor_config.json", SAVED | {"max_soft_tokens": 140})
    assert read_image_processor(tmp_path, 16, 3, notes) == 140
    notes.clear()
    assert read(tmp_path, SAVED, notes) == 280
    assert "differs in 'max_soft_tokens'" in "\n".join(notes)


def test_what_has_no_effect_is_noted(tmp_path: Path) -> None:
    notes: list[str] = []
    read(tmp_path, SAVED | {"size": {"height": 9}, "image_mean": [0.5] * 3, "sharpen": 2}, notes)
    text = "\n".join(notes)
    assert "'size'" in text and "'image_mean' has no effect" in text and "not read: 'sharpen'" in text
    assert len(notes) == 3 and "image_seq_length" not in text
