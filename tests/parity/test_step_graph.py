"""The operations of a step's graph, counted: which nodes each kind of backend gets, and no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from pydiffusion import _native

# Operation -> number in a graph: once, in each sliding layer, in each full layer (which has no V projection).
Counts = Mapping[str, tuple[int, int, int]]

#: What every graph has: embedded tokens, scaled, plus self-conditioning.
_EMBEDDING: Counts = {"GET_ROWS": (1, 0, 0), "SCALE": (1, 0, 0), "ADD": (1, 0, 0)}
#: Rows between matmuls in one node each. Self-conditioning has an MLP too; norms outside layers are those of
#: self-conditioning, of embedded tokens and of the head.
_FUSED_ROWS: Counts = {"gated_gelu": (1, 2, 2), "join_branches": (0, 1, 1)}
#: Q, K, V, output, gate, up, down and router; gate, up and down of self-conditioning; the head.
_MATMULS: Counts = {"MUL_MAT": (4, 8, 7), "MUL_MAT_ID": (0, 2, 2)}
#: Scores and weighted V by matmuls, for a float32 cache on a device.
_ATTENTION_BY_MATMUL: Counts = {
    "MUL_MAT": (0, 2, 2), "SOFT_MAX": (0, 1, 1), "PERMUTE": (0, 2, 2), "TRANSPOSE": (0, 1, 1),
    "CONT": (0, 2, 2),
}  # fmt: skip

CPU: list[Counts] = [
    _EMBEDDING, _FUSED_ROWS, _MATMULS,
    {
        "add_normed": (0, 1, 1), "top_k": (0, 1, 1),
        "rms_norm": (3, 5, 5), "attend": (0, 1, 1),  # which rotates Q while it reads it
        "rotate_normed": (0, 1, 1), "CPY": (0, 2, 2), "RESHAPE": (0, 6, 5), "VIEW": (2, 8, 8),
        "soft_probabilities": (1, 0, 0), "soft_embedding": (1, 0, 0), "cap_and_measure": (1, 0, 0),
    },
]  # fmt: skip
GGML: list[Counts] = [
    _EMBEDDING, _MATMULS, _ATTENTION_BY_MATMUL,
    {  # with two experts per token, the sum of their outputs is one addition
        "RMS_NORM": (3, 11, 11), "MUL": (2, 13, 13), "ADD": (0, 4, 4), "ROPE": (0, 2, 2), "CPY": (0, 2, 2),
        "GLU": (1, 2, 2), "SCALE": (0, 1, 1), "SOFT_MAX": (0, 1, 1), "ARGSORT": (0, 1, 1),
        "GET_ROWS": (0, 2, 2), "SUM_ROWS": (0, 1, 1), "CLAMP": (0, 1, 1), "DIV": (0, 1, 1),
        "REPEAT": (0, 1, 1),
        "RESHAPE": (0, 11, 10), "VIEW": (2, 11, 11),
    },
]  # fmt: skip
#: Nodes of several results, which are views: the end of attention with the norms of the dense branch and the
#: router, the router with the choice of experts, the end of a layer with the next one's norm. So of norms in
#: layers the first one and those of the experts are left, which no device packs here.
_SEVERAL_RESULTS: Counts = {
    "end_attention": (0, 1, 1), "route": (0, 1, 1), "rms_norm": (4, 1, 1), "rotate_and_store": (0, 1, 1),
    "VIEW": (-2, 7, 7),
}  # fmt: skip
OWN_KERNELS: list[Counts] = [
    _EMBEDDING, _FUSED_ROWS, _MATMULS, _ATTENTION_BY_MATMUL, _SEVERAL_RESULTS,
    {"MUL_MAT": (0, -1, -1), "RESHAPE": (0, 5, 4), "VIEW": (2, 7, 7)},  # the router is no matmul
]  # fmt: skip
#: The same with Q, K and V, and gate and up, concatenated and multiplied at once.
CONCATENATED: list[Counts] = [
    _EMBEDDING, _FUSED_ROWS, _ATTENTION_BY_MATMUL, _SEVERAL_RESULTS,
    {
        "MUL_MAT": (3, 4, 4), "MUL_MAT_ID": (0, 2, 2), "RESHAPE": (0, 2, 2), "VIEW": (4, 12, 11),
    },
]  # fmt: skip


def expected(parts: list[Counts], n_sliding: int, n_full: int) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in parts:
        for name, (once, sliding, full) in part.items():
            counts[name] = counts.get(name, 0) + once + n_sliding * sliding + n_full * full
    return counts


@pytest.mark.parametrize(
    ("device", "kernels", "type", "options", "parts"),
    [
        pytest.param("cpu", "ggml", "f32", {}, CPU, id="cpu"),
        pytest.param("host", "ggml", "f32", {}, GGML, id="ggml"),
        pytest.param("host", "cuda", "f32", {}, OWN_KERNELS, id="own-kernels"),
        pytest.param("host", "cuda", "q8_0", {"dense_type": "bf16"}, CONCATENATED, id="concatenated"),
    ],
)
def test_operations(
    device: str, kernels: str, type: str, options: dict[str, Any], parts: list[Counts], gguf_file: Callable
) -> None:
    file = gguf_file("small", type, seed=0, dtype="f32")
    model = _native.Model(str(file), 2, device=device, kernels=kernels, kv_type="f32", **options)
    session = _native.Session(model, 128)
    session.encode(np.arange(2, 30, dtype=np.int32))
    session.denoise(np.arange(model.canvas_length, dtype=np.int32), None)
    sliding = model.hparams["sliding"]
    assert model.hparams["n_expert_used"] == 2 and len(set(sliding)) == 2
    assert session.step_ops == expected(parts, sliding.count(True), sliding.count(False))
