"""Device graphs, on the CPU (device "host") and on every GPU present, whole and split over several devices.

docs/gpu.md says what only a GPU can show.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES
from support.models import case, compare, denoise_case, encode_case, load_golden
from support.parity import CASES, MAX_BOUND, MEAN_BOUND, Q8_0_CACHE_MEAN, SOURCES, assert_within

from pydiffusion import DiffusionModel, DraftEvent, GenerationOptions, _native, devices
from pydiffusion.convert import convert
from pydiffusion.errors import PyDiffusionError, UnsupportedModelError
from pydiffusion.testing.synthetic import write_synthetic

GPUS = [device.name for device in devices()]
#: The CPU in place of a GPU, as one device and as two, with the graph of ggml's operations and with that of
#: fused rows; every GPU present, and all of them together.
DEVICES = [
    "host", "host,host", "host with fused rows", "host,host with fused rows", *GPUS,
    *([",".join(GPUS)] if len(GPUS) > 1 else []),
]  # fmt: skip
pytestmark = pytest.mark.parametrize("device", DEVICES)

N_LAYERS = {name: len(SHAPES[shape].layers) for name, (shape, _) in SOURCES.items()}


def name_of(device: str) -> str:
    return device.partition(" ")[0]


def on(device: str) -> dict[str, str]:
    return {"device": name_of(device), "kernels": "cuda" if "fused" in device else "auto"}


def open_on(path: Path, device: str, kv_type: str = "f32", **device_plan: int | str) -> _native.Model:
    return _native.Model(str(path), 2, kv_type=kv_type, **on(device), **device_plan)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("source", SOURCES)
def test_f32_logits(
    device: str, source: str, name: str, gguf_file: Callable, report: Callable[[str], None]
) -> None:
    """Against transformers. ggml's GELU on the CPU goes through a table of float16, CUDA's does not."""
    slack = 10 if "host" in device else 1
    shape, options = SOURCES[source]
    model = open_on(gguf_file(shape, "f32", **options), device)
    assert model.description["backend"] == name_of(device)
    assert model.description["n_gpu_layers"] == N_LAYERS[source]
    golden = case(load_golden(f"logits-{source}"), name)
    session = _native.Session(model, 128)
    encode_case(session, golden)
    for key, logits in denoise_case(session, golden).items():
        difference = compare(logits, golden[key])
        report(f"device {device}, F32, {source}, {name}, {key}: {difference}")
        assert_within(difference, slack * MEAN_BOUND, slack * MAX_BOUND)


@pytest.mark.parametrize("source", SOURCES)
def test_f16_cache(device: str, source: str, gguf_file: Callable) -> None:
    """Flash attention with masked padding rows, against our own attention on the CPU."""
    shape, options = SOURCES[source]
    file = gguf_file(shape, "f32", **options)
    golden = case(load_golden(f"logits-{source}"), "long")
    both = []
    for where in ("cpu", device):
        session = _native.Session(open_on(file, where, "f16"), 128)
        encode_case(session, golden)
        both.append(denoise_case(session, golden))
        ops = session.step_ops
        assert (ops.get("FLASH_ATTN_EXT", 0) > 0) == (where != "cpu"), "each device uses its own attention"
    for key, logits in both[0].items():
        assert_within(compare(both[1][key], logits), 0.05, 0.5, 0.99)


@pytest.mark.parametrize("source", SOURCES)
def test_q8_0_cache(device: str, source: str, gguf_file: Callable, report: Callable[[str], None]) -> None:
    """An 8-bit cache on the device, against our own attention over such a cache on the CPU."""
    shape, options = SOURCES[source]
    file = gguf_file(shape, "f32", **options)
    models = [open_on(file, where, "q8_0") for where in ("cpu", device)]
    for name in CASES:
        golden = case(load_golden(f"logits-{source}"), name)
        both = []
        for model in models:
            assert model.description["kv_type"] == "q8_0"
            session = _native.Session(model, 128)
            encode_case(session, golden)
            both.append(denoise_case(session, golden))
            assert ("FLASH_ATTN_EXT" in session.step_ops) == (model is models[1])
        for key, logits in both[0].items():
            difference = compare(both[1][key], logits)
            report(f"device {device}, cache q8_0 against the CPU's, {source}, {name}, {key}: {difference}")
            assert difference.mean <= Q8_0_CACHE_MEAN and difference.agreement >= 0.85, difference  # 7 of 8


def test_head_sizes_without_a_flash_attention_kernel(device: str, gguf_file: Callable) -> None:
    """Head sizes that flash attention has no kernel for (CUDA: 16 and 32) go through plain matmuls."""
    file = gguf_file("tiny", "f32", seed=0, dtype="f32")
    results = []
    for where in ("cpu", device):
        session = _native.Session(open_on(file, where, "f16"), 64)
        session.encode(np.arange(2, 22, dtype=np.int32))
        results.append(session.denoise(np.arange(4, dtype=np.int32), None))
    assert "FLASH_ATTN_EXT" not in session.step_ops
    assert_within(compare(results[1], results[0]), 0.05, 0.5)


def test_types_without_a_kernel(
    device: str, checkpoint_folder: Callable, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """Weights whose type a device can't multiply stay on the CPU, such as ternary ones on CUDA; where the
    device must read them itself, the error says which and what to do.
    """
    folder = checkpoint_folder("small", seed=0, dtype="f32")
    layers, embedding = tmp_path / "layers.gguf", tmp_path / "embedding.gguf"
    convert(folder, layers, "f32", tensor_types={r"blk\.1\.(ffn_up\.|ffn_gate_up_exps)": "tq2_0"})
    golden = case(load_golden("logits-small-f32"), "commit")
    results = []
    for where in ("cpu", device):
        session = _native.Session(open_on(layers, where), 128)
        encode_case(session, golden)
        results.append(denoise_case(session, golden))
    for key, logits in results[0].items():
        difference = compare(results[1][key], logits)
        report(f"device {device}, some 2-bit weights on the CPU, {key}: {difference}")
        assert_within(difference, 0.05, 0.5, 0.9)
    convert(folder, embedding, "f32", tensor_types={"token_embd": "tq2_0"})
    with pytest.raises(
        UnsupportedModelError,
        match=rf"tq2_0, which is not supported on {name_of(device)}.*--tensor-type token_embd.weight=q6_k",
    ):
        open_on(embedding, device, dense_type="file")
    session = _native.Session(open_on(embedding, device, dense_type="bf16"), 128)
    encode_case(session, golden)
    assert all(np.isfinite(logits).all() for logits in denoise_case(session, golden).values())


def test_a_q8_0_cache_shared_by_cpu_and_device(device: str, gguf_file: Callable) -> None:
    """Layers on the CPU read and write an 8-bit cache as those on the device do."""
    file = gguf_file("small", "f32", seed=0, dtype="f32")
    golden = case(load_golden("logits-small-f32"), "commit")
    results = []
    for n_gpu_layers in (-1, 1):
        session = _native.Session(open_on(file, device, "q8_0", n_gpu_layers=n_gpu_layers), 128)
        encode_case(session, golden)
        results.append(denoise_case(session, golden))
    for key, logits in results[0].items():
        if device == "host":
            assert np.array_equal(logits, results[1][key])
        assert compare(results[1][key], logits).mean <= Q8_0_CACHE_MEAN


@pytest.mark.parametrize(("n_gpu_layers", "n_cpu_moe"), [(1, 0), (1, 1), (2, 1), (-1, 2)])
def test_partial_offload(
    device: str, n_gpu_layers: int, n_cpu_moe: int, gguf_file: Callable, report: Callable[[str], None]
) -> None:
    """Offloading part of the model changes nothing. On a GPU: with float32 weights and up to rounding, as its
    quantized matmuls round activations in other blocks than the CPU's.
    """
    on_gpu = "host" not in device
    file = gguf_file("small", "f32" if on_gpu or "fused" in device else "q4_k_m", seed=0, dtype="f32")
    golden = case(load_golden("logits-small-f32"), "commit")
    whole = open_on(file, device)
    parts = open_on(file, device, n_gpu_layers=n_gpu_layers, n_cpu_moe=n_cpu_moe)
    expected = N_LAYERS["small-f32"] if n_gpu_layers < 0 else n_gpu_layers
    assert parts.description["n_gpu_layers"] == expected and parts.description["n_cpu_moe"] == n_cpu_moe
    results = []
    for model in (whole, parts):
        session = _native.Session(model, 128)
        encode_case(session, golden)
        results.append(denoise_case(session, golden))
    for key, logits in results[0].items():
        difference = compare(results[1][key], logits)
        report(f"device {device}, layers {n_gpu_layers}, without experts {n_cpu_moe}, {key}: {difference}")
        if on_gpu or ("fused" in device and n_cpu_moe):
            # GELU's table of float16 on the CPU; layers with experts on the CPU use ggml's operations
            assert_within(difference, 10 * MEAN_BOUND, 10 * MAX_BOUND)
        else:
            assert np.array_equal(results[1][key], logits)


@pytest.mark.parametrize(("n_gpu_layers", "n_cpu_moe"), [(1, 0), (-1, 1)])
def test_partial_offload_with_a_float16_cache(
    device: str, n_gpu_layers: int, n_cpu_moe: int, tmp_path: Path
) -> None:
    """Heads and a cache for which Hopper has attention of ours, which layers on the CPU can't use."""
    file = write_synthetic("tiny-heads", tmp_path / "model.gguf", "f32")
    prompt = np.arange(300, 360, dtype=np.int32)
    canvas = np.arange(400, 656, dtype=np.int32)
    results = []
    for arguments in ({}, {"n_gpu_layers": n_gpu_layers, "n_cpu_moe": n_cpu_moe}):
        model = open_on(file, device, "f16", **arguments)
        session = _native.Session(model, 512)
        session.encode(prompt)
        results.append(session.denoise(canvas[: model.canvas_length], None))
    bound = (1e-4 if "host" in device else 1e-2) * float(results[0].std())
    assert compare(results[1], results[0]).mean <= bound


OPTIONS = GenerationOptions(max_tokens=40, steps=6, seed=5, dropped_mass=1e-4)


def generations(model: DiffusionModel, n: int) -> list[list[int]]:
    prompts = [[2, 5 + i, 9, 11] for i in range(n)]
    alone = []
    for prompt in prompts:
        session = model.new_session()
        session.encode(prompt)
        alone.append(list(session.complete(OPTIONS).tokens))
    return alone


@pytest.mark.parametrize("type", ["f32", "q4_k_m"])
def test_a_generation(device: str, type: str, gguf_file: Callable) -> None:
    """Several canvases on the device: the same text every time; held tokens stay."""
    file = gguf_file("small", type, seed=0, dtype="f32")
    model = DiffusionModel(file, n_ctx=128, dense_type="bf16", **on(device))
    assert generations(model, 2) == generations(model, 2)
    session = model.new_session()
    session.encode([2, 5, 9])
    n = model.canvas_length
    canvas = [7] * n
    options = GenerationOptions(
        max_tokens=n, steps=4, seed=1, canvas=canvas, hold=[i % 2 == 0 for i in range(n)]
    )
    drafts = [event for event in session.generate(options) if isinstance(event, DraftEvent)]
    assert drafts and all((draft.tokens[::2] == 7).all() for draft in drafts)
    assert not all((draft.tokens == 7).all() for draft in drafts), "tokens that are not held change"


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_a_saved_session_can_be_loaded(
    device: str, kv_type: str, gguf_file: Callable, tmp_path: Path
) -> None:
    file = gguf_file("small", "f32", seed=0, dtype="f32")
    model = DiffusionModel(file, n_ctx=128, **on(device), kv_type=kv_type)
    session = model.new_session()
    session.encode(list(range(2, 60)))  # beyond the window
    session.save(tmp_path / "session")
    canvas = np.arange(model.canvas_length, dtype=np.int32)
    again = model.load_session(tmp_path / "session")
    assert np.array_equal(session.denoise(canvas), again.denoise(canvas))
    session.truncate(40)
    fresh = model.new_session()
    fresh.encode(list(range(2, 42)))
    difference = compare(session.denoise(canvas), fresh.denoise(canvas))
    if "host" in device:
        assert difference.max <= 1e-4
    else:  # 58 tokens and 40 may go through other kernels, and what is rounded to 8 bits by other sums
        assert difference.mean <= (MEAN_BOUND if kv_type == "f32" else Q8_0_CACHE_MEAN)


@pytest.mark.parametrize("type", ["f32", "q4_k_m"])
def test_a_batch(device: str, type: str, gguf_file: Callable) -> None:
    """Batched texts equal those of each prompt alone. On a GPU, where a matmul's width selects its kernel,
    only the same batch gives the same texts.
    """
    file = gguf_file("small", type, seed=0, dtype="f32")
    model = DiffusionModel(file, n_ctx=128, dense_type="bf16", **on(device))
    prompts = [[2, 5 + i, 9, 11] for i in range(3)]

    def batch() -> list[list[int]]:
        done = dict(model.generate_batch(prompts, OPTIONS, n_parallel=2))
        return [list(done[i].tokens) for i in range(3)]

    assert batch() == (generations(model, 3) if "host" in device else batch())


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("n_kept", [100, 95, 3])
def test_nan_in_masked_cache_rows_has_no_effect(
    device: str, n_kept: int, kv_type: str, gguf_file: Callable
) -> None:
    """A step that ends in NaN leaves it in the cache rows after the prompt, and the next step reads those
    rows too, masked, as its number of rows is padded. (ggml's flash attention on the CPU skips masked rows.)
    """
    file = gguf_file("small", "f32", seed=0, dtype="f32")
    model = DiffusionModel(file, n_ctx=200, **on(device), kv_type=kv_type)
    n = model.canvas_length
    canvas = np.arange(n, dtype=np.int32)
    prompt = list(range(2, 102))
    bound = MEAN_BOUND if kv_type == "f32" else Q8_0_CACHE_MEAN
    session, fresh = model.new_session(), model.new_session()
    session.encode(prompt)
    with pytest.raises(PyDiffusionError, match="not finite"):
        session.denoise(canvas, np.full((n, model.n_vocab), np.nan, np.float32))
    session.truncate(n_kept)
    fresh.encode(prompt[:n_kept])
    for more in ([], [5, 6, 7]):
        for one in (session, fresh):
            one.encode(more)
        after, expected = session.denoise(canvas), fresh.denoise(canvas)
        assert compare(after, expected).mean <= bound
        if "host" in device and n_kept == len(prompt):
            assert np.array_equal(after, expected)


def test_unknown_devices_are_refused(device: str, gguf_file: Callable) -> None:
    with pytest.raises((ValueError, PyDiffusionError), match="no device 'CUDA77'"):
        open_on(gguf_file("small", "q8_0", seed=0, dtype="f32"), "CUDA77")


def test_imatrix_collection_needs_the_cpu(device: str, gguf_file: Callable) -> None:
    model = open_on(gguf_file("small", "f32", seed=0, dtype="f32"), device)
    with pytest.raises(PyDiffusionError, match="only be collected on the CPU"):
        _native.Session(model, 128).collect_imatrix(True)
