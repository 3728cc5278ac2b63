"""Matrices other than experts converted to BF16 when a model is loaded onto a device."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import case, compare, denoise_case, encode_case, load_golden

from pydiffusion import DiffusionModel, _native, devices, plan
from pydiffusion.convert import quantize

GPUS = [device.name for device in devices()]
DEVICES = [
    "host", "host,host", "host with fused rows", *GPUS, *([",".join(GPUS)] if len(GPUS) > 1 else []),
]  # fmt: skip
#: All matrices but the experts.
DENSE = {r"token_embd|output\.weight|attn_(q|k|v|output)\.|ffn_(gate|up|down)\.weight|self_cond": "bf16"}


def logits_of(path: Path, device: str, **options: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    name, _, how = device.partition(" ")
    kernels = "cuda" if how else "auto"
    model = _native.Model(str(path), 2, device=name, kernels=kernels, kv_type="f32", **options)
    session = _native.Session(model, 128)
    golden = case(load_golden("logits-small-f32"), "commit")
    encode_case(session, golden)
    return model.description, [np.array(logits) for logits in denoise_case(session, golden).values()]


@pytest.mark.parametrize("type", ["q4_k_m", "q8_0", "q2_k", "f16"])
@pytest.mark.parametrize("device", DEVICES)
def test_equals_a_file_of_these_types(
    device: str, type: str, gguf_file: Callable, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """Bit by bit; and at least as near to float32 as the file's types, whose matmuls round activations."""
    file = gguf_file("small", type, seed=0, dtype="f32")
    wide = tmp_path / "wide.gguf"
    quantize(file, wide, type, tensor_types={} if type == "f16" else DENSE)
    expected = logits_of(wide, device, dense_type="file")[1]
    description, found = logits_of(file, device, dense_type="bf16")
    assert description["dense_type"] == ("file" if type == "f16" else "bf16"), "F16 matrices stay"
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    if type != "f16":
        kept = logits_of(file, device, dense_type="file")
        assert kept[0]["dense_type"] == "file"
        assert not any(np.array_equal(a, b) for a, b in zip(kept[1], found, strict=True))
        quantize(file, tmp_path / "exact.gguf", "f32")  # the same weights, activations not rounded either
        exact = logits_of(tmp_path / "exact.gguf", device)[1]
        for bf16, own, golden in zip(found, kept[1], exact, strict=True):
            differences = compare(bf16, golden).mean, compare(own, golden).mean
            report(f"device {device}, {type}: mean differences {differences} (BF16, the file's types)")
            assert differences[0] < 1.1 * differences[1]


@pytest.mark.parametrize("device", DEVICES)
def test_experts_and_layers_on_the_cpu_keep_their_types(device: str, gguf_file: Callable) -> None:
    file = gguf_file("small", "q4_k_m", seed=0, dtype="f32")
    name = device.partition(" ")[0]
    whole = plan(file, device=name, dense_type="bf16")
    expected = logits_of(file, device, dense_type="bf16")[1]
    for arguments in ({"n_gpu_layers": 2, "n_cpu_moe": 1}, {"n_gpu_layers": 1}):
        part = plan(file, device=name, dense_type="bf16", **arguments)
        assert part.dense_type == "bf16" and part.weight_bytes < whole.weight_bytes
        description, found = logits_of(file, device, dense_type="bf16", **arguments)
        assert description["dense_type"] == "bf16"
        for part_logits, whole_logits in zip(found, expected, strict=True):
            assert compare(part_logits, whole_logits).mean < 0.5, "activations rounded to 8 bits on the CPU"


def test_the_host_keeps_the_files_types_unless_asked(gguf_file: Callable) -> None:
    """``auto`` is for GPUs that multiply BF16 fast: tests on the host are to compute what the CPU does."""
    file = gguf_file("small", "q4_k_m", seed=0, dtype="f32")
    found = plan(file, device="host")
    assert found.dense_type == "file" and found.to_dict()["dense_type"] == "file"
    assert plan(file, device="host", dense_type="bf16").weight_bytes > found.weight_bytes
    assert plan(file, device="cpu", dense_type="bf16").dense_type == "file"
    assert plan(gguf_file("small", "f32", seed=0, dtype="f32"), device="host", dense_type="bf16") == plan(
        gguf_file("small", "f32", seed=0, dtype="f32"), device="host"
    )


def test_another_type_is_refused(gguf_file: Callable) -> None:
    file = gguf_file("small", "q4_k_m", seed=0, dtype="f32")
    with pytest.raises(ValueError, match=r"dense_type is 'f16'; permitted are 'auto', 'file', 'bf16'"):
        DiffusionModel(file, dense_type="f16")
    with pytest.raises(ValueError, match="dense_type must be"):
        _native.plan(str(file), device="host", dense_type="f16")


@pytest.mark.parametrize(
    "device", [one.name for one in devices() if re.search("A100|H100|H200", one.description)]
)
def test_a_data_centre_gpu_runs_all_of_it(device: str, gguf_file: Callable) -> None:
    """Nothing falls back unnoticed: BF16, kernels of ours, the MLP beside the experts, repacked on Hopper."""
    file = gguf_file("wide", "q4_k_m", seed=0, dtype="f32")
    model = _native.Model(str(file), 2, device=device)
    description = model.description
    assert description["dense_type"] == "bf16" and description["kernels"] == "cuda"
    hopper = next("A100" not in one.description for one in devices() if one.name == device)
    assert description["repacked_experts"] == hopper
    session = _native.Session(model, 128)
    session.encode(np.arange(2, 30, dtype=np.int32))
    session.denoise(np.arange(model.canvas_length, dtype=np.int32), None)
    expected = {
        "mlp_beside", "device_expert_matmul", "end_attention", "route", "join_branches", "rotate_and_store",
    }  # fmt: skip
    if hopper:
        expected.add("device_gated_expert_matmul")
    assert expected <= session.step_ops.keys()


@pytest.mark.parametrize("device", GPUS)
def test_auto_on_a_gpu(device: str, gguf_file: Callable, report: Callable[[str], None]) -> None:
    """Whatever ``auto`` chooses fits, and a limit below the wide weights makes it keep the file's types."""
    file = gguf_file("wide", "q8_0", seed=0, dtype="f32")
    found = plan(file, device=device, n_ctx=512)
    report(f"device {device}: dense_type auto chooses {found.dense_type}")
    if found.dense_type == "bf16":
        less = plan(file, device=device, n_ctx=512, gpu_memory=found.total_bytes - 1)
        assert less.dense_type == "file" and less.n_gpu_layers == less.n_layer and not less.n_cpu_moe
