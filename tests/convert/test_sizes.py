"""File and memory sizes from a config: arithmetic for the released shape, real files for a small one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import checkpoint_folders as folders

from pydiffusion import _native
from pydiffusion.cli import main
from pydiffusion.convert import convert, fit, plan_sizes
from pydiffusion.convert.quantization import sizes
from pydiffusion.errors import ConversionError

GIB = 1 << 30
D, V, E, FF, XF = 2816, 262144, 128, 2112, 704


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but the config of the released 26B."""
    folder = tmp_path_factory.mktemp("26b")
    layers = [("full" if i % 6 == 5 else "sliding") + "_attention" for i in range(30)]
    text = {
        "model_type": "diffusion_gemma_text", "vocab_size": V, "hidden_size": D, "intermediate_size": FF,
        "num_hidden_layers": 30, "num_attention_heads": 16, "num_key_value_heads": 8,
        "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512, "num_experts": E,
        "top_k_experts": 8, "moe_intermediate_size": XF, "sliding_window": 1024,
        "max_position_embeddings": 262144, "layer_types": layers,
    }  # fmt: skip
    config = {"model_type": "diffusion_gemma", "canvas_length": 256, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_released_model_by_arithmetic(released: Path) -> None:
    attention = 25 * D * 256 * (16 + 8 + 8 + 16) + 5 * D * 512 * (16 + 2 + 16)
    dense, experts = 31 * 3 * D * FF, 30 * E * 3 * D * XF  # self-conditioning is the 31st
    router = 30 * E * D
    small = 30 * (7 * D + D) + 25 * 512 + 5 * 1024 + 30 * (E + 2) + D + D + 256
    plan = plan_sizes(released, "q8_0")
    assert plan.n_weights == V * D + attention + dense + experts + router + small
    expected = (V * D + attention + dense + experts) * 34 // 32 + 4 * (router + small)
    assert plan.n_bytes == expected
    assert plan.bits_per_weight == pytest.approx(8 * expected / plan.n_weights)


def test_padding_keeps_q4_k_m_small(released: Path) -> None:
    padded, plain = plan_sizes(released), plan_sizes(released, pad=False)
    assert not padded.fallbacks and len(plain.fallbacks) == 30 + 30 + 1
    assert padded.n_bytes < plain.n_bytes and padded.n_weights == plain.n_weights
    shapes = {tensor.name: tensor.shape for tensor in padded.tensors}
    assert shapes["blk.0.ffn_gate_up_exps.weight"] == (128, 2 * 768, D)
    assert shapes["blk.0.ffn_down_exps.weight"] == (128, D, 768)
    assert shapes["self_cond_down.weight"] == (D, 2304)


def test_the_cache_by_arithmetic(released: Path) -> None:
    plan = plan_sizes(released)
    memory = sizes.estimate_memory(sizes.read_shape(released), plan, 4096)
    padding = 256  # rows that masks on devices are padded with
    sliding = 25 * 2 * 8 * 256 * 2 * (2 * 1024 + 512 + padding)
    full = 5 * 2 * 2 * 512 * 2 * (4096 + padding)
    assert memory.cache == sliding + full
    assert memory.buffers > 4 * 256 * V  # the logits alone
    assert memory.reserve == max(512 << 20, (memory.weights + memory.cache + memory.buffers) // 19)
    assert memory.total == memory.weights + memory.cache + memory.buffers + memory.reserve


@pytest.mark.parametrize("pad", [None, True])
@pytest.mark.parametrize("type", ["q4_k_m", "mxfp4", "q2_k"])
def test_planned_sizes_equal_the_files(tmp_path: Path, type: str, pad: bool | None) -> None:
    folder = folders.make_folder(tmp_path / "small")
    overrides = {"attn_q": "q6_k"}
    report = convert(folder, tmp_path / "m.gguf", type, pad=pad, tensor_types=overrides)
    plan = plan_sizes(folder, type, pad=pad, tensor_types=overrides)
    found = {t.name: (t.type, tuple(t.shape)) for t in _native.GgufFile(str(tmp_path / "m.gguf")).tensors}
    assert {t.name: (t.type, t.shape) for t in plan.tensors} == found
    assert plan.n_weights == report.n_weights
    assert plan.bits_per_weight == pytest.approx(report.bits_per_weight)
    (share,) = _native.plan(str(tmp_path / "m.gguf"), device="host", n_ctx=600)["shares"]
    memory = sizes.estimate_memory(sizes.read_shape(folder), plan, 600)
    # ggml aligns each tensor; the host's and the CPU's alignment differ.
    assert memory.weights == pytest.approx(share["weight_bytes"], abs=128 * len(plan.tensors))
    assert memory.weights == pytest.approx(plan.n_bytes, abs=128 * len(plan.tensors))
    assert (memory.cache, memory.buffers) == (share["cache_bytes"], share["step_bytes"])


@pytest.mark.parametrize(("gib", "least_bits"), [(12, 3.2), (16, 4.4), (24, 7.0), (32, 8.5), (80, 16)])
def test_fit_fills_the_memory_but_not_more(released: Path, gib: int, least_bits: float) -> None:
    plan, memory = fit(released, gib * GIB)
    assert memory.total <= gib * GIB
    assert plan.bits_per_weight > least_bits
    again = plan_sizes(released, plan.type, tensor_types=plan.overrides)
    assert again.n_bytes == plan.n_bytes
    assert plan.n_bytes <= memory.weights < 1.0001 * plan.n_bytes
    longer = fit(released, gib * GIB, n_ctx=8192)[0]
    assert longer.n_bytes <= plan.n_bytes


def test_fit_needs_an_imatrix_for_the_smallest(released: Path) -> None:
    with pytest.raises(ConversionError, match=r"nothing fits 8\.59 GB.*imatrix allows smaller"):
        fit(released, 8 * GIB)
    plan, _ = fit(released, 8 * GIB, has_imatrix=True)
    assert plan.type.startswith("iq1")


def test_fit_keeps_what_was_asked_for(released: Path) -> None:
    plan, _ = fit(released, 16 * GIB, tensor_types={"token_embd": "q4_k"})
    assert next(t.type for t in plan.tensors if t.name == "token_embd.weight") == "Q4_K"


def test_a_planned_file_is_all_on_the_smallest_device_that_holds_it(tmp_path: Path) -> None:
    folder = folders.make_folder(tmp_path / "small")
    convert(folder, tmp_path / "m.gguf", "q8_0")
    memory = sizes.estimate_memory(sizes.read_shape(folder), plan_sizes(folder, "q8_0"), 100)
    n_bytes = memory.total - memory.reserve

    def n_cpu_moe(limit: int) -> int:
        given = {"device": "host", "n_gpu_layers": -1, "n_ctx": 100, "memory_limits": [limit]}
        found = _native.plan(str(tmp_path / "m.gguf"), **given)
        return -1 if found["n_gpu_layers"] < found["n_layer"] else found["n_cpu_moe"]

    assert n_cpu_moe(n_bytes + 4096) == 0
    assert n_cpu_moe(n_bytes - 4096) != 0


def test_the_dry_run_prints_and_writes_nothing(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(released), "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert "ffn_down_exps            Q6_K         14" in table and "padded with zeros to 768" in table
    assert main(["convert", str(released), "--dry-run", "--json", "--fit", "16GiB"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["memory"]["total"] <= 16 * GIB and f"--type {found['type']}" in err
    assert main(["convert", str(released), "--dry-run", "--fit", "much"]) == 2
    assert main(["convert", str(released), "--dry-run", "--tensor-type", "attn_q"]) == 2
    assert list(tmp_path.iterdir()) == []
