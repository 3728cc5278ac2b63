"""A vision tower in use: kernels, threads, Ctrl-C, and its place in a device plan."""

from __future__ import annotations

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.gguf_mutator import float_tensor, read_gguf
from support.kernels import needs
from support.vision_folders import FF, D, make_folder
from support.vision_towers import Tower, picture

from pydiffusion import _native
from pydiffusion.convert import convert, convert_mmproj, edit_metadata
from pydiffusion.convert.gguf.header import Value
from pydiffusion.device_plan import plan
from pydiffusion.errors import ModelFormatError, UnsupportedModelError
from pydiffusion.vision.preprocessing import MAX_SOFT_TOKENS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> Path:
    convert(checkpoint, checkpoint.parent / "text.gguf", "q8_0")
    return checkpoint.parent / "text.gguf"


@pytest.fixture(scope="module")
def files(checkpoint: Path) -> dict[str, Path]:
    made = {type: checkpoint.parent / f"{type}.gguf" for type in ("f32", "bf16")}
    for type, path in made.items():
        convert_mmproj(checkpoint, path, type)
    return made


def open_vision(text: Path, path: Path, n_threads: int = 2, kernels: str = "auto") -> _native.Vision:
    return _native.Vision(str(path), _native.Model(str(text), n_threads=n_threads, kernels=kernels))


def small_picture(columns: int = 15, rows: int = 12) -> tuple[np.ndarray, np.ndarray]:
    return picture(Tower(D, 4, grid=(columns, rows)))


def test_the_fastest_kernels_unless_asked_otherwise(text: Path, files: dict[str, Path]) -> None:
    """The text model's own kernels stay as they are."""
    auto = open_vision(text, files["bf16"])
    assert auto.info["kernels"] == _native.kernels()[-1]
    for name in _native.kernels():
        assert open_vision(text, files["bf16"], kernels=name).info["kernels"] == name


@needs("avx512-bf16")
def test_bfloat16_is_for_files_that_are_rounded(text: Path, files: dict[str, Path]) -> None:
    patches, positions = small_picture()
    for type, same in (("f32", True), ("bf16", False)):
        by_name = [
            open_vision(text, files[type], kernels=name).encode(patches, positions)
            for name in ("ggml", "avx512-bf16")
        ]
        assert np.array_equal(*by_name) == same


@pytest.mark.parametrize("type", ["f32", "bf16"])
def test_features_do_not_depend_on_threads(type: str, text: Path, files: dict[str, Path]) -> None:
    patches, positions = small_picture()
    one = open_vision(text, files[type], n_threads=1).encode(patches, positions)
    shared = open_vision(text, files[type], n_threads=3)
    with ThreadPoolExecutor(3) as threads:
        for features in threads.map(lambda _: shared.encode(patches, positions), range(6)):
            np.testing.assert_array_equal(features, one)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="NOT CHECKED: signals within a call (Windows)")
def test_signals_are_handled_between_layers(text: Path, files: dict[str, Path]) -> None:
    """Within one call, so that Ctrl-C ends it: what is pending at its end counts once."""
    vision = open_vision(text, files["f32"])
    n_positions = vision.info["n_positions"]
    side = n_positions // 3 * 3
    patches, positions = small_picture(side, side)
    n_handled = 0

    def handle(*_: object) -> None:
        nonlocal n_handled
        n_handled += 1

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        vision.encode(patches, positions)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert n_handled >= 2
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 1e-4)
            for _ in range(1000):
                vision.encode(patches, positions)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert np.isfinite(vision.encode(patches, positions)).all()


def test_a_plan_leaves_room_for_the_tower(text: Path, files: dict[str, Path], tmp_path: Path) -> None:
    alone = plan(text, n_ctx=64, device="host")
    both = plan(text, n_ctx=64, device="host", mmproj=files["bf16"])
    info = open_vision(text, files["bf16"]).info
    weights = sum(info["weight_types"].values())
    assert weights <= both.weight_bytes - alone.weight_bytes <= weights + 256 * 100  # padding
    n_patches = info["max_soft_tokens"] * info["pooling"] ** 2
    assert info["work_bytes"] >= 3 * 4 * n_patches * FF
    assert both.step_bytes - alone.step_bytes >= info["work_bytes"]
    assert both.n_gpu_layers == alone.n_gpu_layers == alone.n_layer
    limit = alone.total_bytes + (both.total_bytes - alone.total_bytes) // 2
    smaller = plan(text, n_ctx=64, device="host", gpu_memory=limit, mmproj=files["bf16"])
    assert smaller.n_gpu_layers - smaller.n_cpu_moe < alone.n_layer
    assert smaller.total_bytes <= limit
    loaded = _native.Model(
        str(text), n_threads=1, device="host", memory_limits=[limit], n_ctx=64, mmproj=str(files["bf16"])
    )
    assert loaded.description["n_gpu_layers"] == smaller.n_gpu_layers
    assert loaded.description["n_cpu_moe"] == smaller.n_cpu_moe


def test_a_plan_finds_the_tower_that_the_model_does(
    text: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """Of several beside the model the one that fits."""
    model = Path(shutil.copy(text, tmp_path / "m.gguf"))
    shutil.copy(files["bf16"], tmp_path / "mmproj-m.gguf")
    other = tmp_path / "mmproj-other.gguf"
    edit_metadata(files["bf16"], {"clip.vision.projection_dim": Value("u32", 999)}, other)
    expected = plan(text, n_ctx=64, device="host", mmproj=files["bf16"])
    assert plan(model, n_ctx=64, device="host") == expected
    shutil.copy(files["f32"], other)
    assert plan(model, n_ctx=64, device="host") == plan(text, n_ctx=64, device="host", mmproj=None)


def test_attention_by_matmuls_is_in_the_plan(text: Path, files: dict[str, Path]) -> None:
    """F32 files keep F32 keys and values, and so scores of all patches with all patches."""
    exact, rounded = (open_vision(text, files[type]).info for type in ("f32", "bf16"))
    n_patches = exact["max_soft_tokens"] * exact["pooling"] ** 2
    assert exact["work_bytes"] - rounded["work_bytes"] == 2 * 4 * exact["n_head"] * n_patches**2


def test_a_plan_has_room_for_the_largest_images(text: Path, files: dict[str, Path]) -> None:
    """Sessions of a model with a tower take images of up to 1120 soft tokens, whatever the file says."""
    n_ctx = 1024
    model = _native.Model(str(text), 1, device="host", n_ctx=n_ctx, mmproj=str(files["bf16"]))
    sizes = [_native.Session(model, n_ctx, n_tokens).cache_bytes for n_tokens in (280, MAX_SOFT_TOKENS[-1])]
    assert sizes[0] < sizes[1] == plan(text, n_ctx=n_ctx, device="host", mmproj=files["bf16"]).cache_bytes


@pytest.mark.parametrize("type", ["f32", "bf16"])
def test_tensors_of_an_audio_tower_are_not_in_the_plan(
    type: str, text: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    raw = read_gguf(files[type])
    for name in ("a.blk.0.ffn_up.weight", "mm.a.input_projection.weight"):
        raw.tensors.append(float_tensor(name, [256, 256], bytes(2 * 256 * 256)))
        raw.tensors[-1].type = 1  # F16, which CUDA would convert to float32
    (tmp_path / "both.gguf").write_bytes(raw.to_bytes())
    alone = plan(text, n_ctx=64, device="host", mmproj=files[type])
    assert plan(text, n_ctx=64, device="host", mmproj=tmp_path / "both.gguf") == alone
    info = open_vision(text, tmp_path / "both.gguf").info
    assert info["work_bytes"] == open_vision(text, files[type]).info["work_bytes"]


def test_a_quantized_tower_keeps_its_type(text: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """On a device too: BF16 in place of quantized types is for text models, and the plan counts no other."""
    raw = read_gguf(files["f32"])
    for tensor in raw.tensors:
        if len(tensor.dims) == 2 and tensor.name.startswith(b"v.blk."):
            rows = np.frombuffer(tensor.data, np.float32).reshape(tensor.dims[::-1])
            tensor.data = _native.quantize_rows(rows, "Q8_0", 1, np.ones(rows.shape[1], np.float32)).tobytes()
            tensor.type = 8
    path = tmp_path / "q8_0.gguf"
    path.write_bytes(raw.to_bytes())
    patches, positions = small_picture()
    features = {}
    for dense_type in ("file", "bf16"):
        model = _native.Model(str(text), 2, device="host", dense_type=dense_type, mmproj=str(path))
        assert model.description["dense_type"] == dense_type
        features[dense_type] = _native.Vision(str(path), model).encode(patches, positions)
    assert np.array_equal(features["bf16"], features["file"])


@pytest.mark.parametrize("device", ["cpu", "host"])
def test_a_plan_with_a_broken_file(device: str, text: Path, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(files["f32"].read_bytes()[:-1])
    with pytest.raises(ModelFormatError, match=r"cut\.gguf"):
        plan(text, device=device, mmproj=tmp_path / "cut.gguf")
    with pytest.raises(UnsupportedModelError, match="is not the vision part"):
        plan(text, device=device, mmproj=text)
