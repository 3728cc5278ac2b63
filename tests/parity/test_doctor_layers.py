"""The doctor's comparison with transformers, layer by layer: right files pass, faults are found in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.gguf_mutator import ARRAY, F32, U32, Array, RawGguf, read_gguf
from support.scaled_weights import split_experts, to_nvfp4

from pydiffusion.quality.doctor import layers_check
from pydiffusion.quality.doctor.examination import examine
from pydiffusion.quality.doctor.report import Finding, Report, Result

pytestmark = pytest.mark.reference

A = "diffusion-gemma."
WHAT = "layer by layer against transformers"


@pytest.fixture
def broken(gguf_file: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``broken(change, shape)``: a copy of that shape's F32 file, changed."""

    def make(change: Callable[[RawGguf], object], shape: str = "small") -> Path:
        file = read_gguf(gguf_file(shape, "f32"))
        change(file)
        return file.write(tmp_path / "broken.gguf")

    return make


def look(path: Path, reference: Path, *checks: str, **runtime: Any) -> Report:
    chosen = {"n_threads": 1, "n_gpu_layers": 0, **runtime}
    return examine(path, reference, checks=checks or ("layers",), runtime=chosen)


def failures(report: Report) -> list[Finding]:
    return [finding for finding in report.findings if finding.result is Result.FAILED]


def test_layers_one_at_a_time_are_the_whole_model(checkpoint_folder: Callable[..., Path]) -> None:
    """Against transformers' own encoder and decoder."""
    import torch
    from reference.hf_model import Context, load_reference

    from pydiffusion.convert.architectures.source import open_tensors
    from pydiffusion.quality.doctor.layer_reference import LayerReference
    from pydiffusion.quality.doctor.weight_readers import CheckpointReader

    folder, s = checkpoint_folder("wide", seed=5), SHAPES["wide"]
    prompt, canvas = random_ids(5, "streamed", 40, s.vocab), random_ids(5, "canvas", s.canvas, s.vocab)
    whole = Context.new(load_reference(folder))
    hidden = whole.encode(prompt)
    logits = whole.denoise(canvas)
    conditioning = (logits / np.float32(0.5)).astype(np.float32)
    wanted = [logits, whole.denoise(canvas, conditioning)]
    reference = LayerReference(folder)
    with open_tensors(folder) as stored, torch.no_grad():
        weights = CheckpointReader(stored)
        x = [reference.embed(weights, prompt)]
        x += [reference.embed_canvas(weights, canvas, logits_) for logits_ in (None, conditioning)]
        for i_layer in range(len(s.layers)):
            points = reference.layer(weights, i_layer).run(x[0][None], [each[None] for each in x[1:]])
            x = [one["output"][0] for one in points]
        for found, expected in zip(x[1:], wanted, strict=True):
            np.testing.assert_allclose(reference.head(weights, found), expected, atol=2e-4)
        norm = whole.model.model.encoder.language_model.norm
        np.testing.assert_allclose(norm(x[0]).numpy(), hidden, atol=2e-5)


@pytest.mark.parametrize("shape", ["small", "wide"])
@pytest.mark.parametrize("type", ["f32", "bf16", "q8_0", "q4_k_m"])
def test_right_files_pass(
    shape: str, type: str, gguf_file: Callable, checkpoint_folder: Callable, report: Callable
) -> None:
    made = look(gguf_file(shape, type), checkpoint_folder(shape), "weights", "layers")
    assert failures(made) == []
    (finding,) = (finding for finding in made.findings if finding.what == WHAT)
    assert finding.result is Result.PASS and "3 passes" in finding.seen
    report(f"doctor: {type}, {shape}: {finding.seen}")
    (section,) = (section for section in made.sections if section.title == "layers")
    (table,) = section.tables
    assert len(table.rows) == len(SHAPES[shape].layers)
    assert {len(row) for row in table.rows} == {len(table.heads)}
    own = [float(row[table.heads.index("output")]) for row in table.rows]
    alone = [float(row[table.heads.index("rounding alone")]) for row in table.rows]
    if type == "f32":
        assert max(own) <= 1e-5 and alone == [0.0] * len(own)
    else:  # the rounding that is allowed for is really there, and is all that there is
        assert all(a > 1e-4 for a in alone)
        assert all(a <= layers_check._TYPICAL * b for a, b in zip(own, alone, strict=True))


def test_a_device_s_graph_passes(gguf_file: Callable, checkpoint_folder: Callable) -> None:
    """With its own bound: attention on a device computes with 16 bits."""
    made = look(
        gguf_file("small", "f32"), checkpoint_folder("small"), "shapes", "layers",
        n_gpu_layers="auto", device="host",
    )  # fmt: skip
    assert failures(made) == []
    assert any("layers on" in f.seen for f in made.findings if f.what == "runs on")
    assert any(finding.what == WHAT for finding in made.findings if finding.result is Result.PASS)


def test_matrices_with_scales_pass(broken: Callable, checkpoint_folder: Callable) -> None:
    """An NVFP4 file with scales, against a reference without them; a damaged scale is found."""

    def change(file: RawGguf) -> None:
        to_nvfp4(file)
        split_experts(file)

    made = look(broken(change), checkpoint_folder("small"), "weights", "layers")
    assert failures(made) == []
    assert any(finding.what == WHAT for finding in made.findings if finding.result is Result.PASS)

    def damage(file: RawGguf) -> None:
        change(file)
        scale = file.tensor("blk.1.attn_q.scale")
        scale.data = (2 * np.frombuffer(scale.data, np.float32)).tobytes()

    found = failures(look(broken(damage), checkpoint_folder("small"), "weights"))
    assert [finding.what for finding in found] == ["blk.1.attn_q.weight"]


def test_padded_rows_and_separate_experts_pass(
    gguf_file: Callable, checkpoint_folder: Callable, tmp_path: Path
) -> None:
    from pydiffusion.convert import convert

    padded = tmp_path / "padded.gguf"
    convert(checkpoint_folder("small"), padded, "q4_k_m", pad=True)
    assert failures(look(padded, checkpoint_folder("small"), "shapes", "weights", "layers")) == []
    file, s = read_gguf(gguf_file("small", "f32")), SHAPES["small"]
    for i in range(len(s.layers)):
        fused = file.tensor(f"blk.{i}.ffn_gate_up_exps.weight")
        both = np.frombuffer(fused.data, np.float32).reshape(s.n_expert, 2, s.expert, s.d)
        file.tensors.remove(fused)
        for half, name in enumerate(("gate", "up")):
            data = np.ascontiguousarray(both[:, half]).tobytes()
            dims = [s.d, s.expert, s.n_expert]
            file.tensors.append(type(fused)(f"blk.{i}.ffn_{name}_exps.weight".encode(), dims, 0, data))
    apart = look(file.write(tmp_path / "apart.gguf"), checkpoint_folder("small"), "weights", "layers")
    assert failures(apart) == []
    assert any("tensors agree" in finding.seen for finding in apart.findings)


@pytest.mark.parametrize(
    ("key", "type", "value", "place"),
    [
        ("rope.freq_base_swa", F32, 12_000.0, "layer 0 (sliding), attention"),
        ("rope.freq_base", F32, 900_000.0, "layer 2 (full), attention"),
        ("attention.sliding_window", U32, 15, "layer 0 (sliding), attention"),
        ("attention.sliding_window", U32, 17, "layer 0 (sliding), attention"),
        ("expert_used_count", U32, 3, "layer 0 (sliding), experts"),
        ("attention.layer_norm_rms_epsilon", F32, 1e-2, "the input of the first layer, canvas"),
    ],
)
def test_where_a_wrong_hyperparameter_begins(
    key: str, type: int, value: float, place: str, broken: Callable, checkpoint_folder: Callable
) -> None:
    found = failures(look(broken(lambda file: file.set(A + key, type, value)), checkpoint_folder("small")))
    assert found and found[0].what.startswith(f"a difference begins in {place}"), found


def test_a_wrong_soft_cap(broken: Callable, checkpoint_folder: Callable) -> None:
    path = broken(lambda file: file.set(A + "final_logit_softcapping", F32, 25.0))
    found = failures(look(path, checkpoint_folder("small")))
    assert [finding.what for finding in found] == [
        f"logits from the same hidden states, {name}" for name in ("canvas", "conditioned canvas")
    ]


@pytest.mark.parametrize(
    "name",
    [
        "blk.1.attn_k.weight",
        "blk.1.ffn_down_exps.weight",
        "blk.1.layer_output_scale.weight",
        "blk.1.ffn_norm.weight",
    ],
)
def test_the_layer_of_a_changed_tensor(name: str, broken: Callable, checkpoint_folder: Callable) -> None:
    def change(file: RawGguf) -> None:
        tensor = file.tensor(name)
        values = np.frombuffer(tensor.data, np.float32)
        factors = np.random.default_rng(0).uniform(0.6, 1.1, values.shape)  # a norm undoes a single one
        tensor.data = (values * factors).astype(np.float32).tobytes()

    found = failures(look(broken(change), checkpoint_folder("small"), "weights", "layers"))
    assert found[0].what == name
    assert found[1].what.startswith("layer 1 (sliding) with the checkpoint's weights")
    assert name in found[1].advice and len(found) == 2


def test_scalars_of_encoder_and_decoder_swapped(broken: Callable, checkpoint_folder: Callable) -> None:
    def swap(file: RawGguf) -> None:
        one, other = (file.tensor(f"blk.0.{n}layer_output_scale.weight") for n in ("", "enc_"))
        one.data, other.data = other.data, one.data

    found = failures(look(broken(swap), checkpoint_folder("small"), "weights", "layers"))
    assert {f.what for f in found[:2]} == {
        "blk.0.layer_output_scale.weight", "blk.0.enc_layer_output_scale.weight"
    }  # fmt: skip
    assert found[2].what.startswith("layer 0 (sliding)")


def test_a_fault_of_the_runtime_is_found_in_place(
    gguf_file: Callable, checkpoint_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this machine's dense MLP of layer 1 were off by a thousandth, in the canvas alone."""
    traced = layers_check.trace

    def wrong(model: Any) -> Any:
        passes = traced(model)
        passes["canvas"].points[1]["dense"] *= np.float32(1.001)
        return passes

    monkeypatch.setattr(layers_check, "trace", wrong)
    (finding,) = failures(look(gguf_file("small", "f32"), checkpoint_folder("small")))
    assert finding.what == "a difference begins in layer 1 (sliding), dense MLP, canvas"
    assert "1.0e-03" in finding.seen and "in no other layer" in finding.seen


def test_values_that_are_not_numbers_fail(
    gguf_file: Callable, checkpoint_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = layers_check.trace

    def wrong(model: Any) -> Any:
        passes = traced(model)
        passes["prompt"].points[2]["attention"][5, 7] = np.nan
        return passes

    monkeypatch.setattr(layers_check, "trace", wrong)
    found = failures(look(gguf_file("small", "q4_k_m"), checkpoint_folder("small")))
    assert found[0].what == "a difference begins in layer 2 (full), attention with its norms and RoPE, prompt"


def test_the_reference_of_another_model(gguf_file: Callable, checkpoint_folder: Callable) -> None:
    (finding,) = failures(look(gguf_file("small", "f32"), checkpoint_folder("tiny")))
    assert finding.what == WHAT and "layers of 64" in finding.expected


def test_a_layer_pattern_that_is_shifted(broken: Callable, checkpoint_folder: Callable) -> None:
    def change(file: RawGguf) -> None:
        file.set(A + "attention.sliding_window_pattern", ARRAY, Array(7, [True, False, True]))

    found = failures(look(broken(change), checkpoint_folder("small"), "shapes", "layers"))
    assert f"metadata of the reference: {A}attention.sliding_window_pattern" in [f.what for f in found]
