"""Scales beside matrices, as NVFP4 files of llama.cpp have them: they multiply each matmul's result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.gguf_mutator import RawGguf, float_tensor, read_gguf
from support.kernels import OWN_KERNELS
from support.parity import MAX_BOUND, MEAN_BOUND, ROUNDING_FACTOR
from support.scaled_weights import own_output_head, scale_by_powers_of_two, split_experts, to_nvfp4, values_of

from pydiffusion import _native
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.cli import main
from pydiffusion.convert import quantize, verify
from pydiffusion.convert.architectures.source import open_gguf
from pydiffusion.quality.doctor.examination import examine
from pydiffusion.quality.doctor.report import Result
from pydiffusion.quality.doctor.weight_readers import FileReader

SHAPE = SHAPES["small"]
PROMPT = random_ids(0, "scales", 2 * SHAPE.window + 5, SHAPE.vocab)
CANVAS = random_ids(0, "scalescanvas", SHAPE.canvas, SHAPE.vocab)

#: Device, kernels and other arguments of a model.
PLACES = [
    pytest.param("cpu", "ggml", {}, id="cpu"),
    *(pytest.param("cpu", *own.values, {}, marks=own.marks, id=own.values[0]) for own in OWN_KERNELS),
    pytest.param("host", "ggml", {}, id="host-ggml"),
    pytest.param("host", "cuda", {}, id="host-own-kernels"),
    pytest.param("host", "ggml", {"n_gpu_layers": 2, "n_cpu_moe": 1}, id="experts-on-the-cpu"),
]  # fmt: skip


def outputs(path: Path, device: str = "cpu", kernels: str = "ggml", **options: Any) -> list[np.ndarray]:
    """Hidden states of a prompt, logits of two steps, the second conditioned on the first, and of the token
    after another prompt, read causally.
    """
    hidden, first, second = _steps(_open(path, device, kernels, **options))
    logits = _native.Session(_open(path, device, kernels, **options), 160).next_logits(PROMPT)
    return [hidden, first, second, logits]


def _open(path: Path, device: str, kernels: str, **options: Any) -> _native.Model:
    return _native.Model(str(path), n_threads=2, device=device, kernels=kernels, kv_type="f32", **options)


def _steps(model: _native.Model, conditioning: np.ndarray | None = None) -> list[np.ndarray]:
    session = _native.Session(model, 160)
    hidden = session.encode(PROMPT, return_hidden=True)
    first = session.denoise(CANVAS, None)
    return [hidden, first, session.denoise(CANVAS, first if conditioning is None else conditioning)]


def operations(path: Path, device: str = "cpu", kernels: str = "ggml", **options: Any) -> dict[str, int]:
    """Node counts of a step's graph."""
    session = _native.Session(_open(path, device, kernels, **options), 160)
    session.denoise(CANVAS, None)
    return session.step_ops


def assert_same_bits(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for found, wanted in zip(ours, theirs, strict=True):
        assert np.array_equal(found, wanted), np.abs(found - wanted).max()


def changed(path: Path, target: Path, *changes: Callable[[RawGguf], object]) -> Path:
    file = read_gguf(path)
    for change in changes:
        change(file)
    return file.write(target)


def add_input_scales(file: RawGguf) -> None:
    """Scales of activations, for each matrix that has a scale."""
    for tensor in list(file.tensors):
        if tensor.name.endswith(b".scale") and b"ffn_gate_inp" not in tensor.name:
            name = tensor.name.decode().removesuffix("scale") + "input_scale"
            values = np.full(tensor.dims, 0.01, np.float32)
            file.tensors.append(float_tensor(name, list(tensor.dims), values.tobytes()))


@pytest.mark.parametrize(
    ("type", "parts"),
    [("f32", []), ("bf16", [split_experts]), ("q8_0", [split_experts, own_output_head])],
    ids=["f32", "bf16-split-experts", "q8_0-own-head"],
)
@pytest.mark.parametrize(("device", "kernels", "options"), PLACES)
def test_powers_of_two_change_no_bit(
    device: str, kernels: str, options: dict, type: str, parts: list, gguf_file: Callable, tmp_path: Path
) -> None:
    plain = changed(gguf_file("small", type), tmp_path / "plain.gguf", *parts)
    scaled = changed(plain, tmp_path / "scaled.gguf", scale_by_powers_of_two, add_input_scales)
    place = {"device": device, "kernels": kernels, **options}
    assert_same_bits(outputs(scaled, **place), outputs(plain, **place))
    before, after = operations(plain, **place), operations(scaled, **place)
    # Q, K, V, output, gate, up, down of each layer, but for V in one; three of self-conditioning; the head.
    n_experts = len(SHAPE.layers) * (2 if parts else 1)
    more = {"SCALE": 7 * len(SHAPE.layers) - 1 + 4, "REPEAT": n_experts, "MUL": n_experts}
    assert {name: after[name] - before.get(name, 0) for name in more} == more


def test_scales_of_bf16_matrices_on_a_device(gguf_file: Callable, tmp_path: Path) -> None:
    """Matrices with scales are not concatenated; plain ones are."""
    plain = gguf_file("small", "q8_0")
    scaled = changed(plain, tmp_path / "scaled.gguf", scale_by_powers_of_two)
    place = {"device": "host", "kernels": "cuda", "dense_type": "bf16"}
    assert_same_bits(outputs(scaled, **place), outputs(plain, **place))
    assert operations(scaled, **place)["MUL_MAT"] > operations(plain, **place)["MUL_MAT"]


def test_sequences_in_one_graph(gguf_file: Callable, tmp_path: Path) -> None:
    plain = gguf_file("small", "f32")
    scaled = changed(plain, tmp_path / "scaled.gguf", scale_by_powers_of_two)
    entropies = []
    for path in (plain, scaled):
        model = _open(path, "cpu", "ggml")
        sessions, batch = [_native.Session(model, 160) for _ in range(2)], _native.Batch(model)
        for i, session in enumerate(sessions):
            session.encode(PROMPT[: 10 + i])
            session.begin(**ENTROPY_BOUND_DEFAULTS, max_tokens=SHAPE.canvas, seed=i, eos=[])
        steps = [batch.next_steps(sessions) for _ in range(2)]
        entropies.append(np.array([step.entropy for pair in steps for step in pair]))
    assert np.array_equal(*entropies) and entropies[0].min() > 0


@pytest.fixture(scope="module")
def nvfp4(gguf_file: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """``nvfp4(own_head=False, split=False)``: an NVFP4 file with scales, and an F32 file of its weights."""

    def make(own_head: bool = False, split: bool = False) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("nvfp4")
        file = read_gguf(gguf_file("small", "f32", seed=20))
        if own_head:
            own_output_head(file)
        plain = to_nvfp4(file)
        if split:
            split_experts(file)
        return file.write(folder / "nvfp4.gguf"), plain.write(folder / "plain.gguf")

    return make


@pytest.fixture(scope="module")
def rounding(nvfp4: Callable, checkpoint_folder: Callable) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs of transformers with the NVFP4 file's weights, and with activations rounded to 8 bits."""
    from reference.dequantized import read_dequantized
    from reference.hf_model import Context, load_reference, rounded_activations, set_weights

    reference = load_reference(checkpoint_folder("small", seed=20))
    set_weights(reference, read_dequantized(nvfp4()[1]))

    def theirs(conditioning: np.ndarray | None = None) -> list[np.ndarray]:
        context = Context.new(reference)
        hidden = context.encode(PROMPT)
        first = context.denoise(CANVAS)
        return [hidden, first, context.denoise(CANVAS, first if conditioning is None else conditioning)]

    exact = theirs()
    with rounded_activations(reference, "q8_0"):
        return exact, theirs(exact[1])


@pytest.mark.reference
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("device", "kernels", "options"), PLACES)
def test_nvfp4_against_transformers(
    device: str, kernels: str, options: dict, split: bool, nvfp4: Callable, rounding: tuple[list, list],
    report: Callable,
) -> None:  # fmt: skip
    """Rounding activations to 8 bits is all that may differ."""
    ours = _steps(_open(nvfp4(split=split)[0], device, kernels, **options), rounding[0][1])
    for name, found, exact, rounded in zip(
        ("encoder", "first step", "conditioned"), ours, *rounding, strict=True
    ):
        middle, allowed = (float(np.median(np.abs(x - exact).mean(axis=1))) for x in (found, rounded))
        report(f"NVFP4 with scales, {device}, {kernels}, {name}: middle {middle:.1e}, allowed {allowed:.1e}")
        assert middle <= ROUNDING_FACTOR * allowed, name


@pytest.mark.parametrize("split", [False, True])
def test_quantize_keeps_scales(split: bool, nvfp4: Callable, tmp_path: Path) -> None:
    """As F32, NVFP4's weights are not rounded: the logits are those of the weights times their scales."""
    scaled, plain = nvfp4(own_head=True, split=split)
    target = tmp_path / "target.gguf"
    quantize(scaled, target, "f32")
    assert verify(target, scaled).problems == []
    before, after = ({t.name: t for t in read_gguf(path).tensors} for path in (scaled, target))
    assert list(before) == list(after)
    for name in before:
        if name.endswith(b".scale"):
            assert np.array_equal(values_of(before[name]), values_of(after[name])), name
    for found, exact in zip(outputs(target), outputs(plain), strict=True):
        assert np.abs(found - exact).mean() <= MEAN_BOUND and np.abs(found - exact).max() <= MAX_BOUND


def test_commands(nvfp4: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaled, target = str(nvfp4(split=True)[0]), str(tmp_path / "target.gguf")
    assert main(["inspect", scaled, "--tensors"]) == 0
    assert "blk.0.ffn_up_exps.scale" in capsys.readouterr().out
    assert main(["quantize", scaled, target, "--type", "q4_k_m"]) == 0
    assert main(["verify", target, "--against", scaled]) == 0
    model = _open(Path(target), "cpu", "ggml")
    assert set(model.description["weight_types"]) == {"F32", "Q4_K", "Q6_K", "Q5_0", "Q8_0"}
    assert np.isfinite(_steps(model)[2]).all()


@pytest.mark.parametrize("split", [False, True])
def test_the_doctor_reads_weights_times_their_scales(split: bool, nvfp4: Callable) -> None:
    scaled, plain = nvfp4(split=split)
    with open_gguf(scaled) as file, open_gguf(plain) as reference:
        tables = [{tensor.name: tensor for tensor in source.tensors} for source in (file, reference)]
        own_names = {name: name for name in tables[1]}
        ours, theirs = (FileReader(table, own_names) for table in tables)
        for name, tensor in tables[1].items():
            if "ffn_down_exps" in name:  # the router's scales hold the experts'
                continue
            assert np.array_equal(ours.read(name), theirs.read(name)), name
            if len(tensor.shape) == 2:
                ids = [0, tensor.shape[0] - 1]
                assert np.array_equal(ours.read_rows(name, ids), theirs.read_rows(name, ids)), name


def test_the_doctor_compares_matrices_with_their_scales(nvfp4: Callable, checkpoint_folder: Callable) -> None:
    """Against a reference that has neither scales nor experts in two matrices."""
    report = examine(nvfp4(split=True)[0], checkpoint_folder("small", seed=20), checks=("weights",))
    assert [(finding.what, finding.result) for finding in report.findings] == [("weights", Result.PASS)]
