"""Small checkpoint folders for conversion tests, made with numpy alone."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, D, FF, HEADS, EXPERTS, XF = 320, 256, 320, 2, 6, 64
HEAD_DIM, GLOBAL_HEAD_DIM, KV, GLOBAL_KV = 64, 128, 2, 1
SLIDING = (True, True, True, False)
SPECIALS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>",
    "<|tool_call>", "<tool_call|>", "<|think|>",
)  # fmt: skip
MERGES = (("a", "b"), ("\u2581", "t"), ("h", "e"), ("\u2581t", "he"))
TEMPLATE = "{{ bos_token }}{% for message in messages %}<|turn>{{ message['role'] }}<turn|>{% endfor %}"


def text_config(shape: str = "saved") -> dict[str, Any]:
    """``text_config`` in the shape that save_pretrained of 5.23 writes, or in Google's."""
    config: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": HEAD_DIM,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": D,
        "initializer_range": 0.02,
        "intermediate_size": FF,
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in SLIDING],
        "max_position_embeddings": 1024,
        "model_type": "diffusion_gemma_text",
        "moe_intermediate_size": XF,
        "num_attention_heads": HEADS,
        "num_experts": EXPERTS,
        "num_hidden_layers": len(SLIDING),
        "num_key_value_heads": KV,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 16,
        "tie_word_embeddings": True,
        "top_k_experts": 2,
        "use_bidirectional_attention": "vision",
        "vocab_size": VOCAB,
    }
    if shape == "google":
        config |= {"global_head_dim": GLOBAL_HEAD_DIM, "num_global_key_value_heads": GLOBAL_KV}
        config |= {"attention_k_eq_v": True}
    else:
        config["per_layer_config"] = {"3": {"head_dim": GLOBAL_HEAD_DIM, "num_key_value_heads": GLOBAL_KV}}
    return config


def model_config(shape: str = "saved") -> dict[str, Any]:
    """``config.json``."""
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "boi_token_id": 255999,
        "canvas_length": 8,
        "dtype": "bfloat16",
        "model_type": "diffusion_gemma",
        "text_config": text_config(shape),
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
        "vision_config": {"model_type": "gemma4_vision", "hidden_size": 32},
    }


def generation_config() -> dict[str, Any]:
    """``generation_config.json`` with values that are nobody's default."""
    return {
        "confidence_threshold": 0.01,
        "eos_token_id": [1, 6],
        "max_denoising_steps": 32,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.2},
        "stability_threshold": 2,
        "t_max": 0.9,
        "t_min": 0.5,
    }


def tokenizer_json() -> dict[str, Any]:
    """``tokenizer.json`` of a byte-fallback BPE in Gemma's manner; fewer tokens than the model has ids."""
    texts = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abhet", "\n\n"]
    texts += [left + right for left, right in MERGES]
    vocab = {text: token_id for token_id, text in enumerate(texts)}
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = [{"id": i, "content": text, "special": True, **flags} for i, text in enumerate(SPECIALS)]
    added.append({"id": vocab["\n\n"], "content": "\n\n", "special": False, **flags})
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in MERGES],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """``tokenizer_config.json``."""
    names = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
    return {f"{role}_token": token for role, token in names.items()} | {"add_bos_token": True}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """All text tensors under the names that transformers writes: float32, already rounded to bfloat16."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.embed_tokens.weight": (VOCAB, D),
        "decoder.norm.weight": (D,),
        "decoder.self_conditioning.pre_norm.weight": (D,),
        "decoder.self_conditioning.gate_proj.weight": (FF, D),
        "decoder.self_conditioning.up_proj.weight": (FF, D),
        "decoder.self_conditioning.down_proj.weight": (D, FF),
    }
    for i_layer, sliding in enumerate(SLIDING):
        head, kv = (HEAD_DIM, KV) if sliding else (GLOBAL_HEAD_DIM, GLOBAL_KV)
        layer = {
            "input_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (HEADS * head, D),
            "self_attn.k_proj.weight": (kv * head, D),
            "self_attn.o_proj.weight": (D, HEADS * head),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            "post_attention_layernorm.weight": (D,),
            "pre_feedforward_layernorm.weight": (D,),
            "mlp.gate_proj.weight": (FF, D),
            "mlp.up_proj.weight": (FF, D),
            "mlp.down_proj.weight": (D, FF),
            "post_feedforward_layernorm_1.weight": (D,),
            "pre_feedforward_layernorm_2.weight": (D,),
            "router.proj.weight": (EXPERTS, D),
            "router.scale": (D,),
            "router.per_expert_scale": (EXPERTS,),
            "experts.gate_up_proj": (EXPERTS, 2 * XF, D),
            "experts.down_proj": (EXPERTS, D, XF),
            "post_feedforward_layernorm_2.weight": (D,),
            "post_feedforward_layernorm.weight": (D,),
            "layer_scalar": (1,),
        }
        if sliding:
            layer["self_attn.v_proj.weight"] = (kv * head, D)
        shapes |= {f"decoder.layers.{i_layer}.{name}": shape for name, shape in layer.items()}
        shapes[f"encoder.language_model.layers.{i_layer}.layer_scalar"] = (1,)
    return {
        f"model.{name}": from_bits(random.standard_normal(shape).astype(np.float32))
        for name, shape in shapes.items()
    }


def from_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the nearest float32 with a bfloat16's bits."""
    return (bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def tensor_bytes(values: np.ndarray, dtype: str) -> bytes:
    """Little-endian bytes of a tensor in a safetensors dtype."""
    if dtype == "BF16":
        return bfloat16_bits(values).tobytes()
    return values.astype({"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtypes: dict[str, str]) -> None:
    """A safetensors file, header padded to eight bytes as the library does it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, offset = [], 0
    for name, values in tensors.items():
        data.append(tensor_bytes(values, dtypes[name]))
        end = offset + len(data[-1])
        header[name] = {"dtype": dtypes[name], "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def write_json(path: Path, value: Any) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def make_folder(
    folder: Path,
    *,
    shape: str = "saved",
    dtype: str = "BF16",
    n_shards: int = 1,
    tensors: dict[str, np.ndarray] | None = None,
    dtypes: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """A whole checkpoint folder; ``dtypes`` overrides ``dtype`` by tensor name."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights() if tensors is None else tensors
    kinds = dict.fromkeys(tensors, dtype) | (dtypes or {})
    write_json(folder / "config.json", copy.deepcopy(config or model_config(shape)))
    write_json(folder / "generation_config.json", generation_config())
    write_json(folder / "tokenizer.json", tokenizer_json())
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, kinds)
        return folder
    weight_map: dict[str, str] = {}
    for i_shard in range(n_shards):
        name = f"model-{i_shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = dict(list(tensors.items())[i_shard::n_shards])
        write_safetensors(folder / name, part, kinds)
        weight_map |= dict.fromkeys(part, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def gguf_name(name: str) -> str:
    """The GGUF's name of a checkpoint tensor; written apart from the package's own table, to check it."""
    import re

    name = name.removeprefix("model.")
    top = {
        "decoder.embed_tokens.weight": "token_embd.weight",
        "decoder.norm.weight": "output_norm.weight",
        "decoder.self_conditioning.pre_norm.weight": "self_cond_pre_norm.weight",
        "decoder.self_conditioning.gate_proj.weight": "self_cond_gate.weight",
        "decoder.self_conditioning.up_proj.weight": "self_cond_up.weight",
        "decoder.self_conditioning.down_proj.weight": "self_cond_down.weight",
    }
    if name in top:
        return top[name]
    encoder = re.fullmatch(r"encoder\.language_model\.layers\.(\d+)\.layer_scalar", name)
    if encoder:
        return f"blk.{encoder[1]}.enc_layer_output_scale.weight"
    _, _, i_layer, rest = name.split(".", 3)
    layer = {
        "input_layernorm.weight": "attn_norm.weight",
        "self_attn.q_proj.weight": "attn_q.weight",
        "self_attn.k_proj.weight": "attn_k.weight",
        "self_attn.v_proj.weight": "attn_v.weight",
        "self_attn.o_proj.weight": "attn_output.weight",
        "self_attn.q_norm.weight": "attn_q_norm.weight",
        "self_attn.k_norm.weight": "attn_k_norm.weight",
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "pre_feedforward_layernorm.weight": "ffn_norm.weight",
        "mlp.gate_proj.weight": "ffn_gate.weight",
        "mlp.up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight",
        "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
        "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
        "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
        "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
        "router.proj.weight": "ffn_gate_inp.weight",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "experts.down_proj": "ffn_down_exps.weight",
        "layer_scalar": "layer_output_scale.weight",
    }
    return f"blk.{i_layer}.{layer[rest]}"
