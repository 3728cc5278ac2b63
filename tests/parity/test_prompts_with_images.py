"""Prompts with images against transformers: masks, features in their places, the canvas behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.image_prompts import ImagePrompt, encode, image_prompt, reading_images, reference_encode
from support.kernels import ALL_KERNELS
from support.models import compare
from support.parity import MAX_BOUND, MEAN_BOUND

from pydiffusion import DiffusionModel, _native
from pydiffusion.convert import convert, convert_mmproj
from pydiffusion.vision.preprocessing import PreparedImage

Parts = Sequence[int | tuple[int]]

#: The window of "small" is 16 tokens, of "wide" 12.
PROMPTS: dict[str, Parts] = {
    "one": [5, (9,), 6],
    "longer than the window": [3, (40,), 7],
    "first and last": [(6,), 11, (5,)],
    "several, one after another": [9, (4,), (1,), (23,), 2, (12,), 30],
    "behind the window": [4, (8,), 60],
    "across chunks": [470, (60,), 40, (30,), 5],  # no chunk of 512 may end within the first image
    "longer than a chunk": [20, (600,), 9],
}


@pytest.fixture(scope="module")
def model_file(
    gguf_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``model_file("small", "vision", "f32")``: a file that says how an image's tokens see each other."""

    def get(shape: str, how: str = "vision", type: str = "f32") -> Path:
        folder = tmp_path_factory.mktemp("images")
        return reading_images(gguf_file(shape, type, seed=3, dtype="f32"), folder / f"{how}.gguf", how)

    return get


def prompt_for(shape: str, parts: Parts) -> ImagePrompt:
    return image_prompt(SHAPES[shape].d, SHAPES[shape].vocab, parts)


def new_session(model: _native.Model) -> _native.Session:
    return _native.Session(model, 1024, image_tokens=1000)


CASES = [("small", name) for name in PROMPTS]
CASES += [
    ("wide", name) for name in ("longer than the window", "several, one after another", "across chunks")
]


@pytest.mark.reference
@pytest.mark.parametrize(("shape", "name"), CASES)
def test_against_transformers(
    shape: str,
    name: str,
    model_file: Callable[..., Path],
    checkpoint_folder: Callable[..., Path],
    report: Callable[[str], None],
) -> None:
    from reference.hf_model import Context, load_reference

    prompt, s = prompt_for(shape, PROMPTS[name]), SHAPES[shape]
    context = Context.new(load_reference(checkpoint_folder(shape, seed=3, dtype="f32")))
    session = new_session(_native.Model(str(model_file(shape)), n_threads=2, kv_type="f32"))
    wanted, found = reference_encode(context, prompt), encode(session, prompt)
    hidden = np.abs(found - wanted).max() / np.abs(wanted).max()
    canvas = random_ids(0, "canvas", s.canvas, s.vocab)
    difference = compare(session.denoise(canvas, None), context.denoise(canvas))
    report(f"images: {shape}, {name}: hidden states {hidden:.1e} of their range; canvas: {difference}")
    assert hidden < 1e-4
    assert difference.mean <= MEAN_BOUND and difference.max <= MAX_BOUND and difference.agreement == 1.0
    assert session.images == [(at, len(x), key) for at, x, key in prompt.images]


@pytest.mark.reference
def test_causal_images_against_transformers(
    model_file: Callable[..., Path], checkpoint_folder: Callable[..., Path]
) -> None:
    """Of a model whose images are read causally; the other mask gives something else."""
    from reference.hf_model import Context, load_reference

    prompt = prompt_for("small", [5, (9,), 30, (20,), 6])
    context = Context.new(load_reference(checkpoint_folder("small", seed=3, dtype="f32")))
    wanted = reference_encode(context, prompt, how=None)
    difference = {}
    for how in ("none", "vision"):
        model = _native.Model(str(model_file("small", how)), n_threads=1, kv_type="f32")
        assert model.bidirectional_images == (how == "vision")
        difference[how] = np.abs(encode(new_session(model), prompt) - wanted).max() / np.abs(wanted).max()
    assert difference["none"] < 1e-4 and difference["vision"] > 1e-2


def content(session: _native.Session) -> tuple[list[bytes], bytes]:
    rows = [array.tobytes() for layer in session.cache_rows() for array in layer]
    canvas = random_ids(0, "canvas", SHAPES["small"].canvas, SHAPES["small"].vocab)
    return rows, session.denoise(canvas, None).tobytes()


@pytest.mark.parametrize("kernels", ALL_KERNELS)
@pytest.mark.parametrize(("type", "kv_type"), [("f32", "f32"), ("bf16", "f16"), ("q8_0", "q8_0")])
def test_the_same_bits_however_a_prompt_is_cut(
    type: str, kv_type: str, kernels: str, model_file: Callable[..., Path]
) -> None:
    """And with another number of threads; the window, 16, has slid past most images."""
    path = str(model_file("small", "vision", type))
    prompt = prompt_for("small", [470, (60,), 40, (30,), 5, (330,), 3, (4,), 20])
    whole = encoded_content(path, kernels, kv_type, prompt, [], 2)
    begins = [at for at, _, _ in prompt.images]
    cuts = [[1, 64, 531, 560], begins, [at + len(x) for at, x, _ in prompt.images]]
    for n_threads, at in zip((1, 3, 2), cuts, strict=True):
        assert encoded_content(path, kernels, kv_type, prompt, at, n_threads) == whole, at


def encoded_content(
    path: str, kernels: str, kv_type: str, prompt: ImagePrompt, cuts: Sequence[int], n_threads: int
) -> tuple[list[bytes], bytes]:
    session = new_session(_native.Model(path, n_threads=n_threads, kv_type=kv_type, kernels=kernels))
    for piece in prompt.pieces(cuts):
        session.encode(piece.ids, images=piece.images)
    return content(session)


@pytest.mark.parametrize("kernels", ["ggml", "cuda"])
@pytest.mark.parametrize(("kv_type", "place"), [("f32", {}), ("f16", {}), ("f32", {"n_gpu_layers": 2})])
def test_a_device_sees_images_as_the_cpu_does(
    kernels: str, kv_type: str, place: dict[str, int], model_file: Callable[..., Path]
) -> None:
    """The device is the host in place of one, with masks in place of ranges; ggml's GELU is a table."""
    path = str(model_file("small"))
    prompt = prompt_for("small", [3, (40,), 7, (5,), 450, (60,), 9])
    on_cpu = new_session(_native.Model(path, n_threads=1, kv_type=kv_type))
    on_host = new_session(
        _native.Model(path, n_threads=1, kv_type=kv_type, device="host", kernels=kernels, **place)
    )
    wanted, found = encode(on_cpu, prompt), encode(on_host, prompt)
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < (1e-3 if kv_type == "f32" else 2e-2)


def test_an_image_fits_wherever_it_begins(model_file: Callable[..., Path]) -> None:
    """Longer than the sliding layers' rows have room for after a chunk."""
    model = _native.Model(str(model_file("small")), n_threads=2, kv_type="f32")
    for n_before in (0, 63, 130):
        prompt = prompt_for("small", [n_before, (600,), 3])
        session, fresh = (_native.Session(model, 1024, image_tokens=600) for _ in range(2))
        encode(session, prompt)
        encode(fresh, prompt, [1 + n_before])
        assert content(session) == content(fresh)
        assert session.cache_bytes < _native.Session(model, 1024, image_tokens=1024).cache_bytes


@pytest.mark.reference
def test_pixels_to_logits_against_transformers(
    checkpoint_folder: Callable[..., Path], tmp_path: Path, report: Callable[[str], None]
) -> None:
    """The whole way, with the tower and the projector: two images in a prompt, and a canvas behind them."""
    import torch
    from reference.hf_model import Context, load_reference

    folder, s = checkpoint_folder("small", seed=3, dtype="f32"), SHAPES["small"]
    text, mmproj = tmp_path / "text.gguf", tmp_path / "mmproj.gguf"
    convert(folder, tmp_path / "converted.gguf", "f32")
    reading_images(tmp_path / "converted.gguf", text)
    convert_mmproj(folder, mmproj, "f32")
    images = [prepared(seed, columns, rows) for seed, (columns, rows) in enumerate([(6, 9), (12, 3)])]
    words = random_ids(0, "words", 40, s.vocab - 13) + 13
    with DiffusionModel(text, n_threads=2, mmproj=mmproj) as model:
        session = model.new_session()
        found = session.encode(
            [*words[:9], images[0], *words[9:12], images[1], *words[12:]], return_hidden=True
        )
        canvas = random_ids(0, "canvas", s.canvas, s.vocab)
        logits = session.denoise(canvas)
    reference = load_reference(folder)
    placed = []
    for (begin, n, key), image in zip(session.native.images, images, strict=True):
        with torch.no_grad():
            theirs = reference.model.encoder.get_image_features(
                torch.from_numpy(image.patches)[None], torch.from_numpy(image.positions).long()[None]
            )
        features = theirs.pooler_output.reshape(n, s.d).numpy()
        own = session.native.image_features(len(placed))
        assert np.abs(own - features).max() <= 1e-4 * np.ptp(features)
        placed.append((begin, features, key))
    context = Context.new(reference)
    wanted = reference_encode(context, ImagePrompt(session.tokens, placed))
    difference = compare(logits, context.denoise(canvas))
    hidden = np.abs(found - wanted).max() / np.abs(wanted).max()
    report(f"images: with the tower: hidden states {hidden:.1e} of their range; canvas: {difference}")
    assert hidden < 1e-4
    assert difference.mean <= MEAN_BOUND and difference.max <= MAX_BOUND and difference.agreement == 1.0


def prepared(seed: int, columns: int, rows: int) -> PreparedImage:
    """An image of that many patches, 16 pixels wide, of which a soft token covers 3 x 3."""
    rng = np.random.default_rng(seed)
    patches = rng.random((columns * rows, 3 * 16**2), np.float32)
    at = np.arange(columns * rows)
    positions = np.stack([at % columns, at // columns], axis=1).astype(np.int32)
    return PreparedImage(patches, positions, columns * rows // 9, bytes([seed] * 16))
