"""Ways to break a GGUF, and invalid arguments, with the error that each must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from support.gguf_mutator import (
    ARRAY,
    BOOL,
    F32,
    GGML_F32,
    I32,
    I64,
    STRING,
    U8,
    U32,
    U64,
    Array,
    KeyValue,
    RawGguf,
    String,
    Tensor,
    float_tensor,
)

A = "diffusion-gemma."
GGML_F16 = 1


@dataclass(frozen=True)
class Case:
    """``make`` breaks its argument; the message must hold ``names``; no ``error``: a format or support error.

    ``in_python``: only the Python side looks at what is broken (tokenizer, chat template).
    """

    make: Callable[[RawGguf], RawGguf | bytes]
    names: str = ""
    error: str | None = None
    in_python: bool = False


def edit(*steps: Callable[[RawGguf], object]) -> Callable[[RawGguf], RawGguf]:
    """Apply changes to a copy and give it back."""

    def make(file: RawGguf) -> RawGguf:
        for step in steps:
            step(file)
        return file

    return make


def put(key: str, type: int, value: object) -> Callable[[RawGguf], RawGguf]:
    return edit(lambda f: f.set(key, type, value))


def change(**fields: object) -> Callable[[RawGguf], RawGguf]:
    return edit(*(lambda f, k=k, v=v: setattr(f, k, v) for k, v in fields.items()))


def change_tensor(name: str, **fields: object) -> Callable[[RawGguf], RawGguf]:
    return edit(*(lambda f, k=k, v=v: setattr(f.tensor(name), k, v) for k, v in fields.items()))


def first_key(file: RawGguf) -> RawGguf:
    file.pairs.insert(0, KeyValue(b"strange.key", STRING, String(b"abc", 2**63)))
    return file


def swap_bytes_of_version(file: RawGguf) -> bytes:
    data = file.to_bytes()
    return data[:4] + data[4:8][::-1] + data[8:]


def overlap(file: RawGguf) -> RawGguf:
    file.tensor("blk.1.attn_k.weight").offset = 0
    return file


def touch(file: RawGguf) -> RawGguf:
    """Two tensors that share their last block only."""
    at = 0
    for before, after in zip(file.tensors, file.tensors[1:], strict=False):
        at += -(-len(before.data) // 32) * 32
        if len(before.data) > 64 and before.name == b"blk.0.attn_q.weight":
            after.offset = at - 32
            return file
    raise AssertionError("no tensor to overlap")


FRAME: dict[str, Case] = {
    "empty": Case(lambda f: b"", "empty"),
    "one byte": Case(lambda f: b"G", ""),
    "zero-filled": Case(lambda f: b"\0" * 65536, "GGUF"),
    "text": Case(lambda f: b"this is a text file, not a model\n" * 40, "GGUF"),
    "safetensors": Case(lambda f: b'\x08\0\0\0\0\0\0\0{"a":{}}', "GGUF"),
    "wrong magic": Case(change(magic=b"GGUX"), "GGUF"),
    "old magic": Case(change(magic=b"ggjt"), "GGUF"),
    "version 0": Case(change(version=0), "version 0"),
    "version 1": Case(change(version=1), "version 1"),
    "version 4": Case(change(version=4), "version 4"),
    "version 2^32 - 1": Case(change(version=2**32 - 1), "version"),
    "big-endian": Case(change(big_endian=True), "big-endian"),
    "big-endian version only": Case(swap_bytes_of_version, "big-endian"),
    "no keys, no tensors": Case(change(pairs=[], tensors=[]), "general.architecture"),
    "keys only": Case(change(tensors=[]), "tensor"),
    "tail cut by a block": Case(change(cut_tail=32), "past the end"),
    "half of it": Case(lambda f: f.to_bytes()[: len(f.to_bytes()) // 2], "past the end"),
    "key count of 2^64 - 1": Case(change(n_pairs=2**64 - 1), "key count"),
    "key count of 2^32": Case(change(n_pairs=2**32), "key count"),
    "one key too many": Case(edit(lambda f: setattr(f, "n_pairs", len(f.pairs) + 1)), ""),
    "one key too few": Case(edit(lambda f: setattr(f, "n_pairs", len(f.pairs) - 1)), ""),
    "tensor count of 2^64 - 1": Case(change(n_tensors=2**64 - 1), "tensor count"),
    "tensor count of 2^63": Case(change(n_tensors=2**63), "tensor count"),
    "one tensor too many": Case(edit(lambda f: setattr(f, "n_tensors", len(f.tensors) + 1)), ""),
}

VALUES: dict[str, Case] = {
    "key twice": Case(edit(lambda f: f.pairs.append(f.get(A + "block_count"))), "block_count"),
    "key without name": Case(put("", U32, 1), "key"),
    "string of 2^63 bytes": Case(first_key, "strange.key"),
    "string one byte past the end": Case(
        lambda f: RawGguf(pairs=[KeyValue(b"strange.key", STRING, String(b"x" * 99, 100 + 31))]),
        "strange.key",
    ),
    "unknown value type": Case(put("strange.key", 13, b"\0\0\0\0"), "strange.key"),
    "value type of 2^32 - 1": Case(put("strange.key", 2**32 - 1, b"\0\0\0\0"), "strange.key"),
    "array of unknown type": Case(
        put("strange.key", ARRAY, b"\x63\0\0\0" + b"\x01" + b"\0" * 7 + b"\0" * 8), "strange.key"
    ),
    "array in an array": Case(put("strange.key", ARRAY, Array(ARRAY, [Array(U32, [1])])), "strange.key"),
    "array of 2^64 - 1": Case(put("strange.key", ARRAY, Array(U8, [1], 2**64 - 1)), "strange.key"),
    "array of 2^62 strings": Case(put("strange.key", ARRAY, Array(STRING, [], 2**62)), "strange.key"),
    "array of 2^61 u64": Case(put("strange.key", ARRAY, Array(U64, [1], 2**61)), "strange.key"),
    "boolean of 7": Case(put("strange.key", BOOL, b"\x07"), "strange.key"),
    "alignment 0": Case(put("general.alignment", U32, 0), "general.alignment"),
    "alignment 24": Case(put("general.alignment", U32, 24), "general.alignment"),
    "alignment 2^31": Case(put("general.alignment", U32, 2**31), "general.alignment"),
    "alignment of text": Case(put("general.alignment", STRING, "32"), "general.alignment"),
    "alignment of -32": Case(put("general.alignment", I32, -32), "general.alignment"),
}

TENSORS: dict[str, Case] = {
    "tensor twice": Case(edit(lambda f: f.tensors.append(f.tensors[3])), "duplicate"),
    "tensor without name": Case(edit(lambda f: f.tensors.append(float_tensor("", [8], b"\0" * 32))), "name"),
    "tensor of no dimensions": Case(
        edit(lambda f: f.tensors.append(float_tensor("strange", [], b"\0" * 32))), "strange"
    ),
    "tensor of 5 dimensions": Case(change_tensor("blk.0.attn_q.weight", dims=[64, 32, 1, 1, 1]), "attn_q"),
    "tensor of 2^32 - 1 dimensions": Case(change_tensor("blk.0.attn_q.weight", n_dims=2**32 - 1), "attn_q"),
    "dimension 0": Case(change_tensor("blk.0.attn_q.weight", dims=[64, 0]), "attn_q"),
    "dimension 2^63": Case(change_tensor("blk.0.attn_q.weight", dims=[2**63, 1]), "attn_q"),
    "dimension 2^64 - 1": Case(change_tensor("blk.0.attn_q.weight", dims=[64, 2**64 - 1]), "attn_q"),
    "dimensions that overflow": Case(change_tensor("blk.0.attn_q.weight", dims=[2**32, 2**32]), "attn_q"),
    "dimensions that overflow to the right size": Case(
        change_tensor("blk.0.attn_q.weight", dims=[64, 2**58 + 32]), "attn_q"
    ),
    "tensor larger than the file": Case(change_tensor("blk.0.attn_q.weight", dims=[64, 2**40]), "attn_q"),
    "unknown tensor type": Case(change_tensor("blk.0.attn_q.weight", type=200), "attn_q"),
    "removed tensor type": Case(change_tensor("blk.0.attn_q.weight", type=4), "attn_q"),
    "tensor type of 2^32 - 1": Case(change_tensor("blk.0.attn_q.weight", type=2**32 - 1), "attn_q"),
    "tensor of integers": Case(change_tensor("blk.0.attn_q.weight", type=26), "attn_q"),
    "rows that are no multiple of a block": Case(change_tensor("blk.0.attn_q.weight", type=12), "attn_q"),
    "norm that is not F32": Case(change_tensor("blk.0.attn_norm.weight", type=1), "attn_norm"),
    "offset of 2^64 - 32": Case(change_tensor("blk.1.attn_k.weight", offset=2**64 - 32), "attn_k"),
    "offset of 2^63": Case(change_tensor("blk.1.attn_k.weight", offset=2**63), "attn_k"),
    "offset past the end": Case(change_tensor("blk.1.attn_k.weight", offset=2**31), "attn_k"),
    "offset that is not aligned": Case(change_tensor("blk.1.attn_k.weight", offset=4), "attn_k"),
    "tensors that overlap": Case(overlap, "overlap"),
    "tensors that share a block": Case(touch, "overlap"),
    "wrong shape": Case(change_tensor("blk.0.attn_q.weight", dims=[32, 64]), "attn_q"),
    "a dimension more": Case(change_tensor("blk.0.attn_norm.weight", dims=[32, 2]), "attn_norm"),
    "embedding of one dimension": Case(change_tensor("token_embd.weight", dims=[64 * 384]), "token_embd"),
    "tensor of a layer we don't know": Case(
        edit(lambda f: f.tensors.append(float_tensor("blk.0.strange.weight", [8], b"\0" * 32))), "strange"
    ),
    "layer past the last": Case(
        edit(lambda f: f.tensors.append(float_tensor("blk.2.attn_norm.weight", [64], b"\0" * 256))), "blk.2"
    ),
}
for _what, _name, _dims, _type, _values, _named in (
    ("two scales of one matrix", "blk.0.attn_q.scale", [2], GGML_F32, [1, 1], "blk.0.attn_q.scale"),
    (
        "one scale for all experts",
        "blk.1.ffn_gate_up_exps.scale",
        [1],
        GGML_F32,
        [1],
        "ffn_gate_up_exps.scale",
    ),
    ("scale of F16", "blk.0.ffn_down.scale", [1], GGML_F16, [1], "blk.0.ffn_down.scale"),
    ("scale of NaN", "self_cond_gate.scale", [1], GGML_F32, [float("nan")], "self_cond_gate.scale"),
    ("infinite scale", "token_embd.scale", [1], GGML_F32, [float("inf")], "token_embd.scale"),
    (
        "an expert's scale of NaN",
        "blk.0.ffn_gate_up_exps.scale",
        [4],
        GGML_F32,
        [1, 1, float("nan"), 1],
        "exps",
    ),
    ("scale of a norm", "blk.0.attn_norm.scale", [1], GGML_F32, [1], "blk.0.attn_norm.scale"),
    ("scale of the model's norm", "output_norm.scale", [1], GGML_F32, [1], "output_norm.scale"),
    ("scale of a head that there isn't", "output.scale", [1], GGML_F32, [1], "output.scale"),
    ("scale of V in a full layer", "blk.1.attn_v.scale", [1], GGML_F32, [1], "blk.1.attn_v.scale"),
    (
        "scale of separate experts",
        "blk.0.ffn_up_exps.scale",
        [4],
        GGML_F32,
        [1] * 4,
        "blk.0.ffn_up_exps.scale",
    ),
    ("input scale of a norm", "blk.0.attn_norm.input_scale", [1], GGML_F32, [1], "attn_norm.input_scale"),
    ("input scale of nothing", "strange.input_scale", [1], GGML_F32, [1], "strange.input_scale"),
):
    _data = np.array(_values, np.float16 if _type == GGML_F16 else np.float32).tobytes()
    _added = Tensor(_name.encode(), _dims, _type, _data)
    TENSORS[_what] = Case(edit(lambda f, added=_added: f.tensors.append(added)), _named)
for _name in (
    "token_embd.weight",
    "output_norm.weight",
    "rope_freqs.weight",
    "self_cond_pre_norm.weight",
    "self_cond_down.weight",
    "blk.0.attn_v.weight",
    "blk.1.attn_q_norm.weight",
    "blk.0.ffn_gate_inp.scale",
    "blk.0.ffn_gate_up_exps.weight",
    "blk.1.ffn_down_exps.scale",
    "blk.1.layer_output_scale.weight",
    "blk.0.enc_layer_output_scale.weight",
):
    # Without fused experts the separate ones are looked for, and named.
    _named = "exps" if "up_exps" in _name else _name
    TENSORS[f"without {_name}"] = Case(edit(lambda f, name=_name: f.drop_tensor(name)), _named)

HYPERPARAMETERS: dict[str, Case] = {
    "other architecture": Case(
        put("general.architecture", STRING, "llama"), "llama", "UnsupportedModelError"
    ),
    "architecture of a number": Case(put("general.architecture", U32, 3), "general.architecture"),
}
for _key, _type, _values in (
    ("diffusion.canvas_length", U32, (0, 2**31, 2**32 - 1)),
    ("diffusion.canvas_length", I32, (-1,)),
    ("diffusion.canvas_length", F32, (8.0,)),
    ("diffusion.canvas_length", STRING, ("8",)),
    ("diffusion.eb_max_steps", U32, (0, 2**31)),
    ("diffusion.eb_t_min", F32, (float("nan"), -1.0, float("inf"))),
    ("diffusion.eb_t_max", F32, (float("nan"), 0.0)),
    ("diffusion.eb_entropy_bound", F32, (float("nan"), -1.0)),
    ("diffusion.eb_confidence_threshold", F32, (float("nan"),)),
    ("diffusion.eb_stability_threshold", I32, (-1,)),
    (A + "block_count", U32, (0, 1, 3, 2**31, 2**32 - 1)),
    (A + "block_count", I64, (-2,)),
    (A + "context_length", U32, (0, 2**32 - 1)),
    (A + "embedding_length", U32, (0, 63, 128, 2**31)),
    (A + "feed_forward_length", U32, (0, 97, 2**31)),
    (A + "expert_feed_forward_length", U32, (0, 33)),
    (A + "expert_count", U32, (0, 3, 5, 2**31)),
    (A + "expert_used_count", U32, (0, 5, 2**31)),
    (A + "expert_used_count", I32, (-1,)),
    (A + "attention.head_count", U32, (0, 3, 2**31)),
    (A + "attention.head_count", I32, (-2,)),
    (A + "attention.head_count_kv", U32, (0, 3, 2**31)),
    (A + "attention.head_count_kv", STRING, ("1",)),
    (A + "attention.key_length", U32, (0, 31, 2**31)),
    (A + "attention.key_length_swa", U32, (0, 64, 15)),
    (A + "attention.value_length", U32, (16,)),
    (A + "attention.sliding_window", U32, (0, 2**31)),
    (A + "attention.sliding_window", I32, (-4,)),
    (A + "attention.layer_norm_rms_epsilon", F32, (float("nan"), -1e-6, float("inf"), 0.0)),
    (A + "final_logit_softcapping", F32, (float("nan"), 0.0, -30.0)),
    (A + "rope.freq_base", F32, (float("nan"), 0.0, -1.0, float("inf"))),
    (A + "rope.freq_base_swa", F32, (float("nan"), 0.0)),
    (A + "rope.dimension_count", U32, (3,)),
):
    for _value in _values:
        # A wrong size shows where a tensor does not have it: either may be named.
        _about = _key if _type != U32 or _value in (0, 2**31) else ""
        HYPERPARAMETERS[f"{_key} = {_value!r} of type {_type}"] = Case(put(_key, _type, _value), _about)
for _key in (
    "general.architecture",
    "diffusion.canvas_length",
    A + "block_count",
    A + "context_length",
    A + "embedding_length",
    A + "expert_count",
    A + "expert_used_count",
    A + "attention.head_count",
    A + "attention.head_count_kv",
    A + "attention.sliding_window",
    A + "attention.sliding_window_pattern",
    A + "attention.layer_norm_rms_epsilon",
    A + "rope.freq_base",
):
    HYPERPARAMETERS[f"without {_key}"] = Case(edit(lambda f, key=_key: f.drop(key)), _key)
for _key, _item, _lengths in (
    (A + "attention.head_count_kv", I32, (0, 1, 3, 1000)),
    (A + "attention.sliding_window_pattern", BOOL, (0, 1, 3)),
):
    for _n in _lengths:
        HYPERPARAMETERS[f"{_key} for {_n} layers"] = Case(put(_key, ARRAY, Array(_item, [1] * _n)), _key)
HYPERPARAMETERS["negative head_count_kv in an array"] = Case(
    put(A + "attention.head_count_kv", ARRAY, Array(I32, [1, -1])), "head_count_kv"
)
HYPERPARAMETERS["pattern of numbers"] = Case(
    put(A + "attention.sliding_window_pattern", ARRAY, Array(I32, [5, 0])), "sliding_window_pattern"
)
HYPERPARAMETERS["pattern of text"] = Case(
    put(A + "attention.sliding_window_pattern", ARRAY, Array(STRING, [String(b"s"), String(b"f")])),
    "sliding_window_pattern",
)
HYPERPARAMETERS["sliding and full exchanged"] = Case(
    put(A + "attention.sliding_window_pattern", ARRAY, Array(BOOL, [False, True])), ""
)

T = "tokenizer.ggml."


def shorten(key: str) -> Callable[[RawGguf], RawGguf]:
    return edit(lambda f: f.get(key).value.items.pop())


def in_python(make: Callable[[RawGguf], RawGguf], names: str) -> Case:
    return Case(make, names, in_python=True)


TOKENIZER: dict[str, Case] = {
    "tokens missing": in_python(edit(lambda f: f.drop(T + "tokens")), T + "tokens"),
    "one token too few": in_python(shorten(T + "tokens"), T + "tokens"),
    "tokens of numbers": in_python(put(T + "tokens", ARRAY, Array(U32, [1] * 384)), T + "tokens"),
    "tokens of text": in_python(put(T + "tokens", STRING, "abc"), T + "tokens"),
    "one token type too few": in_python(shorten(T + "token_type"), T + "token_type"),
    "token types of text": in_python(put(T + "token_type", STRING, "abc"), T + "token_type"),
    "merges missing": in_python(edit(lambda f: f.drop(T + "merges")), T + "merges"),
    "merges of numbers": in_python(put(T + "merges", ARRAY, Array(U32, [1])), T + "merges"),
    "merge of one part": in_python(put(T + "merges", ARRAY, Array(STRING, [String(b"a")])), T + "merges"),
    "merge of unknown tokens": in_python(
        put(T + "merges", ARRAY, Array(STRING, [String(b"zzzz qqqq")])), T + "merges"
    ),
    "other tokenizer": in_python(put(T + "model", STRING, "gpt2"), T + "model"),
    "tokenizer of a number": in_python(put(T + "model", U32, 1), T + "model"),
    "eos past the vocabulary": in_python(put(T + "eos_token_id", U32, 384), "eos_token_id"),
    "eos of 2^32 - 1": in_python(put(T + "eos_token_id", U32, 2**32 - 1), "eos_token_id"),
    "eos list past the vocabulary": in_python(
        put(T + "eos_token_ids", ARRAY, Array(I32, [1, 9999])), "eos_token_ids"
    ),
    "eos list below zero": in_python(put(T + "eos_token_ids", ARRAY, Array(I32, [-1])), "eos_token_ids"),
    "bos past the vocabulary": in_python(put(T + "bos_token_id", U32, 5000), "bos_token_id"),
    "bos of text": in_python(put(T + "bos_token_id", STRING, "<bos>"), "bos_token_id"),
    "template of a number": in_python(put("tokenizer.chat_template", U32, 1), "tokenizer.chat_template"),
}

CASES = FRAME | VALUES | TENSORS | HYPERPARAMETERS | TOKENIZER

_ARGUMENT = "ValueError|TypeError"

#: Call of hostile_worker.CALLS -> the kinds of error that will do, and what the message must name.
REFUSED: dict[str, tuple[str, str]] = {
    "a folder": ("ModelFormatError", "regular file"),
    "no such file": ("ModelFormatError", "open"),
    "path of wrong type": ("TypeError", ""),
    "path with nul": ("ModelFormatError|ValueError", ""),
    "unknown cache type": ("ValueError", "kv_type"),
    "threads below zero": ("ValueError", "n_threads"),
    "threads without number": ("ValueError", "n_threads"),
    "context of zero": ("ValueError", "n_ctx"),
    "context below zero": ("ValueError", "n_ctx"),
    "context smaller than canvas": ("ValueError|ContextOverflowError", "n_ctx"),
    "token below zero": ("ValueError", "-1"),
    "token past the vocabulary": ("ValueError", "384"),
    "token of 2^31 - 1": ("ValueError", "2147483647"),
    "tokens of int64": (_ARGUMENT, "ids"),
    "tokens of float": (_ARGUMENT, "ids"),
    "tokens of two dimensions": (_ARGUMENT, "ids"),
    "tokens none": (_ARGUMENT, "ids"),
    "prompt longer than the context": ("ContextOverflowError", "48"),
    "prompt that leaves no room for a canvas": ("ContextOverflowError", "48"),
    "truncate below zero": ("ValueError", "-1"),
    "truncate past the end": ("ValueError", "4"),
    "canvas too short": ("ValueError", "canvas"),
    "canvas too long": ("ValueError", "canvas"),
    "canvas empty": ("ValueError", "canvas"),
    "canvas of int64": (_ARGUMENT, "canvas"),
    "canvas token below zero": ("ValueError", "-1"),
    "canvas token past the vocabulary": ("ValueError", "384"),
    "conditioning of nan": ("PyDiffusionError|ValueError", "self-conditioning"),
    "conditioning of inf": ("PyDiffusionError|ValueError", "self-conditioning"),
    "conditioning of float64": (_ARGUMENT, "self_conditioning"),
    "conditioning too narrow": (_ARGUMENT, "self_conditioning"),
    "conditioning of one dimension": (_ARGUMENT, "self_conditioning"),
    "conditioning of strides": (_ARGUMENT, "self_conditioning"),
    "generate zero tokens": ("ValueError", "max_tokens"),
    "generate with zero steps": ("ValueError", "steps"),
    "generate with temperature nan": ("ValueError", "t_min"),
    "generate with temperature zero": ("ValueError", "t_max"),
    "generate with temperature below zero": ("ValueError", "t_min"),
    "generate with bound nan": ("ValueError", "entropy_bound"),
    "generate with bound below zero": ("ValueError", "entropy_bound"),
    "generate with stability below zero": ("ValueError", "stability_threshold"),
    "generate with confidence nan": ("ValueError", "confidence_threshold"),
    "generate with eos past the vocabulary": ("ValueError", "384"),
    "generate with seed of text": (_ARGUMENT, ""),
    "measure with u out of range": ("ValueError", "u"),
    "measure with temperature zero": ("ValueError", "temperature"),
    "measure with draws missing": ("ValueError", "u"),
    "accept with bound nan": ("ValueError", "bound"),
    "quantize with unknown type": ("ValueError", "Q9_X"),
    "quantize rows of 100": ("ValueError", "100"),
    "dequantize short rows": ("ValueError", ""),
    "convert short rows": ("ValueError", ""),
    "convert rows whose size overflows": ("ValueError", ""),
    "compare with more rows": ("ValueError", ""),
    "public: no such file": ("ModelFormatError|FileNotFoundError", ""),
    "public: a folder": ("ModelFormatError|OSError", ""),
    "public: path of wrong type": ("TypeError", ""),
    "public: path with nul": ("ModelFormatError|ValueError|OSError", ""),
    "public: context beyond the model's": ("ValueError", "n_ctx"),
    "public: context below zero": ("ValueError", "n_ctx"),
    "public: session's context of text": (_ARGUMENT, "n_ctx"),
    "public: layers on a device that is not there": ("ValueError|PyDiffusionError", "n_gpu_layers"),
    "public: tokens of float": (_ARGUMENT, "float"),
    "public: tokens of two dimensions": (_ARGUMENT, "dimension"),
    "public: tokens of text": (_ARGUMENT, ""),
    "public: tokens none": (_ARGUMENT, ""),
    "public: token past int32": (_ARGUMENT, "1099511627776"),
    "public: token past the vocabulary": ("ValueError", "384"),
    "public: prompt longer than the context": ("ContextOverflowError", "48"),
    "public: text longer than the context": ("ContextOverflowError", "48"),
    "public: prompt of nothing": ("ValueError", "no tokens"),
    "public: canvas too short": ("ValueError", "canvas"),
    "public: canvas of float": (_ARGUMENT, "float"),
    "public: conditioning of nan": ("PyDiffusionError|ValueError", "self-conditioning"),
    "public: conditioning of one dimension": ("ValueError", "self_conditioning"),
    "public: conditioning of text": (_ARGUMENT, ""),
    "public: unknown option": (_ARGUMENT, "temperature"),
    "public: steps of zero": ("ValueError", "steps"),
    "public: steps of text": (_ARGUMENT, "steps"),
    "public: temperature nan": ("ValueError", "t_min"),
    "public: seed below zero": ("ValueError", "seed"),
    "public: eos past the vocabulary": ("ValueError", "384"),
    "public: adapters of text": ("ValueError", "lora is 'folder'"),
    "public: adapters that are not there": ("PyDiffusionError", "no such adapter"),
    "public: a model as adapter": ("PyDiffusionError", "not 'adapter'"),
    "public: adapters of numbers": (_ARGUMENT, "lora"),
    "public: adapter's scale nan": ("ValueError", "scale nan"),
    "public: adapter's scale past float32": ("ValueError", "scale 1000"),
    "public: detokenize past the vocabulary": ("ValueError", "384"),
    "public: accept with bound nan": ("ValueError", "bound"),
    "public: measure of wrong shape": ("ValueError", "dimension"),
    "public: step past the steps": ("ValueError", "9"),
}
