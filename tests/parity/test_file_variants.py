"""Equivalent files: other integer types, scalars for arrays, separate experts, other alignments.

Each is the same model as the plain file, so it must give the same logits, mostly to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.gguf_mutator import (
    ARRAY,
    BOOL,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Array,
    RawGguf,
    float_tensor,
    read_gguf,
)

from pydiffusion import _native

A = "diffusion-gemma."


def logits(path: Path, shape: str = "tiny") -> np.ndarray:
    """Both passes after a prompt of more than two windows."""
    s = SHAPES[shape]
    session = _native.Session(_native.Model(str(path), n_threads=1, kv_type="f32"), 64)
    session.encode(random_ids(0, "files", 2 * s.window + 5, s.vocab))
    canvas = random_ids(0, "filescanvas", s.canvas, s.vocab)
    first = session.denoise(canvas, None)
    return np.concatenate([first, session.denoise(canvas, first)])


@pytest.fixture(scope="module")
def plain(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("tiny", "f32")


@pytest.fixture(scope="module")
def expected(plain: Path) -> np.ndarray:
    return logits(plain)


def every_integer_as(type: int) -> Callable[[RawGguf], None]:
    def change(file: RawGguf) -> None:
        n_changed = 0
        for pair in file.pairs:
            if pair.key.startswith((A.encode(), b"diffusion.")) and pair.type in (U32, I32):
                pair.type, n_changed = type, n_changed + 1
        assert n_changed > 10

    return change


def arrays_for_scalars(file: RawGguf) -> None:
    n_layer = len(SHAPES["tiny"].layers)
    for key in ("attention.head_count", "feed_forward_length"):
        value = file.get(A + key).value
        file.set(A + key, ARRAY, Array(I32, [value] * n_layer))


def scalar_head_count_kv(file: RawGguf) -> None:
    file.set(A + "attention.head_count_kv", U32, 1)


def pattern_as_period(file: RawGguf) -> None:
    """The last of every two layers is full."""
    file.set(A + "attention.sliding_window_pattern", U32, 2)


def pattern_as_integers(file: RawGguf) -> None:
    file.set(A + "attention.sliding_window_pattern", ARRAY, Array(U8, [1, 0]))


def separate_experts(file: RawGguf) -> None:
    s = SHAPES["tiny"]
    for i in range(len(s.layers)):
        fused = file.tensor(f"blk.{i}.ffn_gate_up_exps.weight")
        n_bytes = 4 * s.n_expert * 2 * s.expert * s.d
        both = np.frombuffer(fused.data[:n_bytes], np.float32).reshape(s.n_expert, 2 * s.expert, s.d)
        file.tensors.remove(fused)
        for name, part in (("gate", both[:, : s.expert]), ("up", both[:, s.expert :])):
            dims = [s.d, s.expert, s.n_expert]
            file.tensors.append(float_tensor(f"blk.{i}.ffn_{name}_exps.weight", dims, part.tobytes()))


def own_output_head(file: RawGguf) -> None:
    embedding = file.tensor("token_embd.weight")
    file.tensors.append(float_tensor("output.weight", list(embedding.dims), embedding.data))


def aligned_to(n: int) -> Callable[[RawGguf], None]:
    def change(file: RawGguf) -> None:
        for tensor in file.tensors:  # without the padding that the old alignment asked for
            tensor.data = tensor.data[: 4 * int(np.prod(tensor.dims))]
        file.alignment = n
        file.set("general.alignment", U32, n)
        # An odd number of bytes before the data, so that nothing is aligned by chance.
        file.set("general.note", STRING, "x" * 33)

    return change


def tensors_backwards(file: RawGguf) -> None:
    file.tensors.reverse()


def unknown_keys(file: RawGguf) -> None:
    file.set("some.other.key", ARRAY, Array(BOOL, [True, False]))
    file.set(A + "some.other.key", U64, 2**64 - 1)


SAME: dict[str, Callable[[RawGguf], None]] = {
    "i32 for every integer": every_integer_as(I32),
    "u64 for every integer": every_integer_as(U64),
    "i64 for every integer": every_integer_as(I64),
    "u16 for every integer": every_integer_as(U16),
    "arrays where scalars are usual": arrays_for_scalars,
    "scalar head_count_kv": scalar_head_count_kv,
    "pattern as a period": pattern_as_period,
    "pattern as integers": pattern_as_integers,
    "separate experts": separate_experts,
    "own output head": own_output_head,
    "aligned to 8": aligned_to(8),
    "aligned to 4096": aligned_to(4096),
    "tensors backwards": tensors_backwards,
    "unknown keys": unknown_keys,
    "version 2": lambda file: setattr(file, "version", 2),
    "no sampler defaults": lambda file: [
        file.pairs.remove(pair) for pair in list(file.pairs) if pair.key.startswith(b"diffusion.eb_")
    ],
    "no tokenizer": lambda file: [
        file.pairs.remove(pair) for pair in list(file.pairs) if pair.key.startswith(b"tokenizer.")
    ],
}


@pytest.mark.parametrize("name", SAME)
def test_equivalent_files_give_the_same_logits(
    name: str, plain: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    file = read_gguf(plain)
    SAME[name](file)
    path = file.write(tmp_path / "other.gguf")
    assert path.read_bytes() != plain.read_bytes()
    assert np.abs(logits(path) - expected).max() < 1e-4


def test_rope_freqs_are_read(plain: Path, expected: np.ndarray, tmp_path: Path) -> None:
    """The file's divisors decide which dimensions are rotated, not a factor in the code."""
    file = read_gguf(plain)
    tensor = file.tensor("rope_freqs.weight")
    divisors = np.frombuffer(tensor.data[: 4 * tensor.dims[0]], np.float32)
    n_rotated = tensor.dims[0] // 4
    assert (divisors[:n_rotated] == 1).all() and (divisors[n_rotated:] > 1e29).all()
    tensor.data = np.ones(tensor.dims[0], np.float32).tobytes()
    assert np.abs(logits(file.write(tmp_path / "all-rotated.gguf")) - expected).max() > 0.1


@pytest.mark.parametrize("name", ["layer_output_scale", "enc_layer_output_scale"])
def test_encoder_and_denoiser_have_their_own_output_scale(
    name: str, gguf_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Changing either mode's scalar of the first layer changes the logits.

    It takes three layers: a layer's scalar multiplies all that the next layer's norms divide by, so what it
    changes is the weight of the next layer's addition, which shows one layer on.
    """
    path = gguf_file("small", "f32")
    file = read_gguf(path)
    file.tensor(f"blk.0.{name}.weight").data = np.array([2.5] + [0] * 7, np.float32).tobytes()
    changed = logits(file.write(tmp_path / "scaled.gguf"), "small")
    assert np.abs(changed - logits(path, "small")).max() > 0.1
