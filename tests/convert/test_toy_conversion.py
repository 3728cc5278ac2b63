"""A second architecture through the converter, and its numpy reference against torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from support.checkpoint_folders import write_json
from support.gguf_files import fields_of, read_tensors
from support.toy.checkpoint import MASK, SHAPES, Shape, registered, weights, write_checkpoint
from support.toy.reference import Toy

from pydiffusion import _native
from pydiffusion.convert import convert, convert_mmproj, plan_sizes, quantize, verify
from pydiffusion.errors import ConversionError


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("toy") / "toy", **SHAPES["grouped heads"])


def gguf_name(name: str) -> str:
    """The GGUF's name of a checkpoint tensor; written apart from the tensor map, to check it."""
    names = {
        "embed_tokens": "token_embd",
        "self_conditioning.norm": "self_cond_pre_norm",
        "self_conditioning.proj": "self_cond_proj",
        "norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    name = name.removesuffix(".weight")
    if not name.startswith("layers."):
        return names[name] + ".weight"
    _, i_layer, rest = name.split(".", 2)
    return f"blk.{i_layer}.{names[rest]}.weight"


@pytest.mark.parametrize("shape", SHAPES)
def test_an_f32_file_has_every_weight(shape: str, tmp_path: Path) -> None:
    sizes = SHAPES[shape]
    convert(write_checkpoint(tmp_path / "toy", 3, **sizes), tmp_path / "toy.gguf", "f32")
    expected = {gguf_name(name): values for name, values in weights(3, Shape(**sizes)).items()}
    reader = GGUFReader(tmp_path / "toy.gguf")
    found = read_tensors(reader)
    assert sorted(found) == sorted(expected) and len(expected) == 5 + 13 * Shape(**sizes).n_layer
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    assert verify(tmp_path / "toy.gguf", tmp_path / "toy").problems == []


def test_metadata(toy: Path, tmp_path: Path) -> None:
    report = convert(toy, tmp_path / "toy.gguf", "f32")
    fields = fields_of(GGUFReader(tmp_path / "toy.gguf"))
    own = "masked-toy."
    model = {key: value for key, value in fields.items() if not key.startswith("tokenizer.")}
    epsilon = model.pop(own + "attention.layer_norm_rms_epsilon")
    assert epsilon == ("FLOAT32", pytest.approx(1e-6))
    assert model == {
        "general.architecture": ("STRING", "masked-toy"),
        "general.type": ("STRING", "model"),
        "general.name": ("STRING", "toy"),
        own + "block_count": ("UINT32", 3),
        own + "context_length": ("UINT32", 1024),
        own + "embedding_length": ("UINT32", 128),
        own + "feed_forward_length": ("UINT32", 192),
        own + "attention.head_count": ("UINT32", 4),
        own + "attention.head_count_kv": ("UINT32", 2),
        own + "attention.key_length": ("UINT32", 64),
        own + "rope.freq_base": ("FLOAT32", 10_000.0),
        own + "final_logit_softcapping": ("FLOAT32", 30.0),
        "diffusion.canvas_length": ("UINT32", 16),
        "diffusion.mask_token_id": ("UINT32", MASK),
        "diffusion.max_steps": ("UINT32", 8),
        "general.file_type": ("UINT32", 0),
        "general.quantization_version": ("UINT32", 2),
    }
    tokens: Any = fields["tokenizer.ggml.tokens"][1]
    assert len(tokens) == 384 and tokens[MASK] == "<mask>"
    assert fields["tokenizer.ggml.mask_token_id"] == ("UINT32", MASK)
    assert "tokenizer.chat_template" in fields and report.notes == []


def test_quantizing_keeps_norms_and_the_source(toy: Path, tmp_path: Path) -> None:
    convert(toy, tmp_path / "q8.gguf", "q8_0")
    reader = GGUFReader(tmp_path / "q8.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q8_0"}
    found = read_tensors(reader)
    for name, values in weights(0, Shape(**SHAPES["grouped heads"])).items():
        # Half a step of a block, whose largest weight is 127 steps; the step itself is rounded to 16 bits.
        bound = 0 if "norm" in name else np.abs(values).max() * (0.5 / 127 + 1e-3)
        assert np.abs(found[gguf_name(name)] - values).max() <= bound, name
    assert verify(tmp_path / "q8.gguf", toy).problems == []
    convert(toy, tmp_path / "f32.gguf", "f32")
    quantize(tmp_path / "f32.gguf", tmp_path / "again.gguf", "q8_0")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "q8.gguf").read_bytes()
    other = write_checkpoint(tmp_path / "other", 1, **SHAPES["grouped heads"])
    assert len(verify(tmp_path / "q8.gguf", other).problems) > 20


@pytest.mark.parametrize("pad", [None, True])
def test_planned_sizes_equal_the_file(toy: Path, tmp_path: Path, pad: bool | None) -> None:
    report = convert(toy, tmp_path / "m.gguf", "q4_k_m", pad=pad)
    plan = plan_sizes(toy, "q4_k_m", pad=pad)
    found = {t.name: (t.type, tuple(t.shape)) for t in _native.GgufFile(str(tmp_path / "m.gguf")).tensors}
    assert {t.name: (t.type, t.shape) for t in plan.tensors} == found
    assert plan.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert found["blk.0.ffn_up.weight"][1] == (256 if pad else 192, 128)
    assert verify(tmp_path / "m.gguf", toy).problems == []
    if pad:
        assert fields_of(GGUFReader(tmp_path / "m.gguf"))["masked-toy.feed_forward_length"][1] == 256


def edited(folder: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    write_json(target / "config.json", config)
    return target


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model_type": "llada"}, 'model_type.*llada.*"diffusion_gemma" or .*"masked_toy"'),
        ({"architectures": ["DiffusionGemmaModel"]}, "architectures.*MaskedToyForBlockDiffusion"),
        ({"hidden_size": "128"}, "hidden_size.*'128'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads.*divisor.*4"),
        ({"head_dim": 63}, "head_dim.*even"),
        ({"mask_token_id": 384}, "mask_token_id.*384"),
        ({"vocab_size": 300}, "tokenizer.json.*beyond 'vocab_size' = 300"),
        ({"num_hidden_layers": None}, "num_hidden_layers.*None"),
    ],
)
def test_wrong_configs_are_refused(toy: Path, tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    folder = write_checkpoint(tmp_path / "toy", **SHAPES["grouped heads"])
    edited(toy, folder, lambda config: config.update(changes))
    with pytest.raises(ConversionError, match=pattern):
        convert(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (lambda w: w.pop("lm_head.weight"), r"/toy: tensor 'lm_head.weight' is missing"),
        (
            lambda w: w.update({"layers.1.mlp.up_proj.bias": np.ones(96)}),
            r"/toy/model\.safetensors: unexpected tensor 'layers.1.mlp.up_proj.bias'",
        ),
        (
            lambda w: w.update({"norm.weight": np.ones(63)}),
            r"/toy/model\.safetensors: tensor 'norm.weight' has the shape \[63\]; config.json requires",
        ),
        (
            lambda w: w["layers.0.mlp.down_proj.weight"].__setitem__((3, 3), np.nan),
            r"blk.0.ffn_down.weight.*NaN",
        ),
    ],
)
def test_wrong_weights_are_refused(
    tmp_path: Path, spoil: Callable[[dict[str, np.ndarray]], Any], pattern: str
) -> None:
    tensors = weights(0, Shape())
    spoil(tensors)
    folder = write_checkpoint(tmp_path / "toy", tensors=tensors)
    with pytest.raises(ConversionError, match=pattern):
        convert(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_it_has_no_vision_part(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"'masked-toy' have no vision part"):
        convert_mmproj(toy, tmp_path / "v.gguf")


# The reference of the parity tests, tests/support/toy/reference.py


def torch_pass(toy: Toy, ids: np.ndarray, canvas: np.ndarray, previous: np.ndarray) -> tuple[Any, Any]:
    """Hidden states of ``ids``, and the logits of ``canvas`` after them, with torch's own operations.

    One pass over both: the mask lets the prompt see itself causally, and the canvas everything.
    """
    import torch
    from torch.nn import functional as F

    w = {name: torch.from_numpy(values) for name, values in toy.weights.items()}
    c, n, n_prompt = toy.config, len(ids) + len(canvas), len(ids)
    eps, head_dim = c["rms_norm_eps"], c["head_dim"]

    def norm(x: Any, name: str) -> Any:
        return F.rms_norm(x, (x.shape[-1],), w[name + ".weight"], eps)

    pair = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turn = torch.polar(
        torch.ones(n, head_dim // 2, dtype=torch.float64),
        torch.outer(torch.arange(n, dtype=torch.float64), c["rope_theta"] ** -pair),
    )

    def rope(x: Any) -> Any:
        """By complex multiplication: the halves of a head are real and imaginary parts."""
        turned = torch.complex(*x.double().chunk(2, dim=-1)) * turn
        return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)

    embedding = w["embed_tokens.weight"]
    soft = torch.from_numpy(previous).to(embedding.dtype).softmax(-1) @ embedding
    soft = F.linear(norm(soft, "self_conditioning.norm"), w["self_conditioning.proj.weight"])
    x = torch.cat([embedding[torch.from_numpy(ids)], embedding[torch.from_numpy(canvas)] + soft])
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[n_prompt:] = True
    for i in range(c["num_hidden_layers"]):
        layer = f"layers.{i}."
        h = norm(x, layer + "input_layernorm")
        q, k, v = (
            F.linear(h, w[f"{layer}self_attn.{name}_proj.weight"])
            .unflatten(-1, (-1, head_dim))
            .transpose(0, 1)
            for name in "qkv"
        )
        q, k = rope(norm(q, layer + "self_attn.q_norm")), rope(norm(k, layer + "self_attn.k_norm"))
        a = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)[0]
        a = F.linear(a.transpose(0, 1).flatten(1), w[layer + "self_attn.o_proj.weight"])
        x = x + norm(a, layer + "post_attention_layernorm")
        h = norm(x, layer + "pre_feedforward_layernorm")
        gate, up = (F.linear(h, w[f"{layer}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        h = F.linear(F.silu(gate) * up, w[layer + "mlp.down_proj.weight"])
        x = x + norm(h, layer + "post_feedforward_layernorm")
    hidden, cap = norm(x, "norm"), c["final_logit_softcapping"]
    logits = cap * torch.tanh(F.linear(hidden[n_prompt:], w["lm_head.weight"]) / cap)
    return hidden[:n_prompt].numpy(), logits.numpy()


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_against_torch(shape: str, dtype: type, tmp_path: Path) -> None:
    toy = Toy(write_checkpoint(tmp_path / "toy", 5, **SHAPES[shape]), dtype)
    random = np.random.default_rng(5)
    ids, canvas = random.integers(0, 384, 21), random.integers(0, 384, 16)
    previous = random.normal(0, 5, (16, 384))
    cache, first = toy.encode(ids[:9])
    cache, second = toy.encode(ids[9:], cache)
    hidden, logits = np.concatenate([first, second]), toy.denoise(cache, canvas, previous)
    assert hidden.dtype == logits.dtype == dtype
    wanted_hidden, wanted_logits = torch_pass(toy, ids, canvas, previous)
    tolerance = 1e-4 if dtype is np.float32 else 1e-10
    np.testing.assert_allclose(hidden, wanted_hidden, rtol=0, atol=tolerance)
    np.testing.assert_allclose(logits, wanted_logits, rtol=0, atol=10 * tolerance)
    assert np.ptp(wanted_logits) > 20, "logits of this range make the tolerance mean something"


def test_the_sampler_by_hand() -> None:
    from support.toy.reference import unmask

    # Entropies grow from position 1 over 3 and 4 to 0; position 2 is settled.
    logits = np.log(
        np.array([[0.4, 0.3, 0.3], [0.98, 0.01, 0.01], [0.1, 0.8, 0.1], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])
    )
    canvas, settled = np.array([9, 9, 7, 9, 9]), np.array([False, False, True, False, False])
    after, entropy, accepted = unmask(logits, canvas, settled, 3)  # ceil(4 / 3) of 4 masked ones
    assert after.tolist() == [9, 0, 7, 1, 9]  # of the tie of 3 and 4 the earlier one
    assert accepted.tolist() == [False, True, False, True, False]
    assert entropy[0] == pytest.approx(-0.4 * np.log(0.4) - 0.6 * np.log(0.3))
    after, _, accepted = unmask(logits, after, settled | accepted, 1)  # the last step: all that are left
    assert after.tolist() == [0, 0, 7, 1, 2] and accepted.tolist() == [True, False, False, False, True]


def test_a_reference_generation(tmp_path: Path) -> None:
    toy = Toy(write_checkpoint(tmp_path / "toy", 2))
    run = toy.generate(np.arange(40, 50), steps=5, n_canvases=2)
    assert [step.steps_left for step in run.steps] == [5, 4, 3, 2, 1] * 2
    assert [int(step.settled.sum()) for step in run.steps] == [4, 7, 10, 13, 16] * 2
    assert len(run.tokens) == 32 and MASK not in run.tokens
    for before, after in zip(run.steps, run.steps[1:], strict=False):
        if before.i_canvas == after.i_canvas:
            kept = after.canvas[before.settled]
            assert np.array_equal(kept, before.canvas[before.settled])
            assert set(after.canvas[~after.settled].tolist()) <= {MASK}
    # One step at a time: as many steps as positions settle one position each.
    single = toy.generate(np.arange(40, 50), steps=16, n_canvases=1)
    assert [int(step.settled.sum()) for step in single.steps] == list(range(1, 17))
