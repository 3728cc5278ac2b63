"""Random native adapters, and files that their changes are merged into."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from zlib import crc32

import numpy as np
from gguf import GGUFReader

from pydiffusion import _native

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
DENSE = ("ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
ROUTER = ("ffn_gate_inp",)
SELF_CONDITIONING = ("self_cond_gate", "self_cond_up", "self_cond_down")
EVERYTHING = (*ATTENTION, *DENSE, *EXPERTS, *ROUTER, *SELF_CONDITIONING)

#: (tensor, side, a, b), as the native adapter takes them.
Target = tuple[str, str, np.ndarray, np.ndarray]


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices that can be adapted, by name without ".weight", in C order."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        name = tensor.name.removesuffix(".weight")
        if name != tensor.name and name.split(".")[-1] in EVERYTHING:
            found[name] = tuple(int(n) for n in reversed(tensor.shape))
    return found


def random_targets(
    path: Path, seed: int, rank: int = 4, kinds: Iterable[str] = EVERYTHING, side: str = "both"
) -> Iterator[Target]:
    """Changes of about a tenth of the activations' size, of all matrices of these kinds."""
    kinds = tuple(kinds)
    for name, shape in shapes_of(path).items():
        if name.split(".")[-1] not in kinds or (side == "encoder" and name.startswith("self_cond")):
            continue
        its = "decoder" if name.startswith("self_cond") else side
        rng = np.random.default_rng([seed, crc32(name.encode())])
        *experts, n_out, n_in = shape
        a = rng.standard_normal((*experts, rank, n_in)).astype(np.float32) / np.sqrt(np.float32(n_in))
        b = rng.standard_normal((*experts, n_out, rank)).astype(np.float32) * np.float32(0.1)
        yield name, its, a, b


def merge(path: Path, changes: Iterable[tuple[Iterable[Target], float]], target: Path) -> Path:
    """A copy of an F32 file with the changes added to its matrices, whichever side they are of."""
    shutil.copyfile(path, target)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(target, "r+").tensors}
    for targets, scale in changes:
        for name, _, a, b in targets:
            delta = scale * np.matmul(b.astype(np.float64), a.astype(np.float64))
            data = tensors[f"{name}.weight"]
            data[...] = (data + delta.reshape(data.shape)).astype(np.float32)
    return target


def adapter(model: _native.Model, targets: Iterable[Target], name: str = "test") -> _native.Adapter:
    return _native.Adapter(model, name, targets)
