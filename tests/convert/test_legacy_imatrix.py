"""Importance matrices of llama.cpp's older format (.dat): as a GGUF of the same data, or one clear line."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.random_checkpoint import SHAPES
from support.gguf_files import finish

from pydiffusion.convert import convert
from pydiffusion.convert.quantization.imatrix_file import Imatrix, read_imatrix
from pydiffusion.errors import ConversionError, ModelFormatError, PyDiffusionError

SHAPE = SHAPES["mild"]
EXPERTS = "blk.0.ffn_gate_up_exps.weight"
DENSE = "blk.0.attn_q.weight"
#: Rows of the activations' sums of squares, and how many activations each has: expert 1 has none.
SUMS = {
    DENSE: np.random.default_rng(0).random((1, SHAPE.d)).astype(np.float32) * 90,
    EXPERTS: np.random.default_rng(1).random((SHAPE.n_expert, SHAPE.d)).astype(np.float32) * 90,
}
COUNTS = {DENSE: np.array([64], np.float32), EXPERTS: np.array([4, 0, 16, 1, 2, 32], np.float32)}
SUMS[EXPERTS][1] = 0
CHUNK = 32
SHAPES_OF = {DENSE: (2 * SHAPE.head_dim, SHAPE.d), EXPERTS: (SHAPE.n_expert, 2 * SHAPE.expert, SHAPE.d)}

Entry = tuple[str, int, np.ndarray]


def entries() -> list[Entry]:
    """The data as llama.cpp writes it: mean times calls, and ones where nothing was counted."""
    found = []
    for name, sums in SUMS.items():
        counts = COUNTS[name][:, None]
        n_calls = -(-int(counts.max()) // CHUNK)
        means = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
        found.append((name, n_calls, (means * np.float32(n_calls)).reshape(-1)))
    return found


def pack(entries: list[Entry], end: bytes | None = None) -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, n_calls, values in entries:
        text = name.encode()
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", n_calls, len(values))]
        parts.append(values.astype("<f4").tobytes())
    return b"".join(parts) + (struct.pack("<ii", 3, 5) + b"a.txt" if end is None else end)


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    writer = GGUFWriter(path, arch="none")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", CHUNK)
    values = {}
    for name, (sums, counts) in tensors.items():
        values |= {name + ".in_sum2": sums, name + ".counts": counts.reshape(-1, 1)}
    finish(writer, values)
    return path


def importance(imatrix: Imatrix, name: str) -> np.ndarray:
    found = imatrix.importance(name, SHAPES_OF[name], SHAPE.d, [])
    assert found is not None
    return found


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(pack(entries()))
    return path


def test_it_equals_a_gguf_of_the_same_activations(legacy: Path, tmp_path: Path) -> None:
    whole = read_imatrix(write_gguf(tmp_path / "i.gguf", {name: (SUMS[name], COUNTS[name]) for name in SUMS}))
    read = read_imatrix(legacy)
    assert read.datasets == ("a.txt",) and read.chunk_count == 3
    assert importance(read, DENSE) == pytest.approx(importance(whole, DENSE), rel=1e-6)
    reached = COUNTS[EXPERTS] > 0
    found, wanted = importance(read, EXPERTS), importance(whole, EXPERTS)
    assert found[reached] == pytest.approx(wanted[reached], rel=1e-6)
    # Each expert counts the same here, since the older format has no counts of its own for them.
    assert found[1] == pytest.approx(found[reached].mean(axis=0), rel=1e-6)


def test_it_equals_the_gguf_that_llama_cpp_converts_it_to(legacy: Path, tmp_path: Path) -> None:
    """llama-imatrix --in-file: values and calls times the chunk size, one count for all experts."""
    theirs = {
        name: (values.reshape(1, -1) * np.float32(CHUNK), np.array([n_calls * CHUNK], np.float32))
        for name, n_calls, values in entries()
    }
    converted, read = read_imatrix(write_gguf(tmp_path / "i.gguf", theirs)), read_imatrix(legacy)
    for name in SUMS:
        assert np.array_equal(importance(read, name), importance(converted, name))
    notes: list[str] = []
    read.importance(EXPERTS, SHAPES_OF[EXPERTS], SHAPE.d, notes)
    assert notes == [
        f"{EXPERTS}: the imatrix has no activations for 1 of 6 experts; they get the average of the others"
    ]


def test_a_file_is_quantized_as_with_the_gguf(
    legacy: Path, tmp_path: Path, checkpoint_folder: Callable[..., Path]
) -> None:
    """Counts of powers of two: the means are exact in both."""
    counts = {DENSE: np.array([64], np.float32), EXPERTS: np.array([4, 8, 16, 1, 2, 32], np.float32)}
    whole = write_gguf(tmp_path / "i.gguf", {name: (SUMS[name], counts[name]) for name in SUMS})
    means = {name: SUMS[name] / counts[name][:, None] for name in SUMS}
    legacy.write_bytes(pack([(name, 2, (means[name] * 2).reshape(-1)) for name in SUMS]))
    for path, target in ((whole, "a.gguf"), (legacy, "b.gguf")):
        convert(checkpoint_folder("mild"), tmp_path / target, "q4_k_s", imatrix=path)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    convert(checkpoint_folder("mild"), tmp_path / "none.gguf", "q4_k_s")
    plain = {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(tmp_path / "none.gguf").tensors}
    with_it = {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(tmp_path / "b.gguf").tensors}
    assert {name for name in plain if plain[name] != with_it[name]} == set(SUMS)


@pytest.mark.parametrize("end", [b"", struct.pack("<i", 3), struct.pack("<ii", 3, 0)])
def test_files_without_the_text_or_the_chunks(legacy: Path, end: bytes) -> None:
    """As before 2024-04, and with an empty name."""
    legacy.write_bytes(pack(entries(), end))
    assert read_imatrix(legacy).datasets == ()
    assert importance(read_imatrix(legacy), DENSE).shape == (1, SHAPE.d)


def test_no_calls_mean_values_as_they_are(legacy: Path) -> None:
    legacy.write_bytes(pack([(DENSE, 0, SUMS[DENSE][0])]))
    assert importance(read_imatrix(legacy), DENSE) == pytest.approx(SUMS[DENSE], rel=1e-6)


VALUES = np.ones(8, np.float32)
ONE = pack([("a", 1, VALUES)])
TWO = pack([("a", 1, VALUES), ("b", 1, VALUES)])
BROKEN: dict[str, tuple[bytes, str]] = {
    "too many entries": (struct.pack("<i", 3) + pack(entries(), b"")[4:], "it ends within"),
    "a negative length": (TWO.replace(b"\1\0\0\0b", b"\xff\xff\xff\xffb"), "is -1"),
    "a giant length": (TWO.replace(b"\1\0\0\0b", b"\xff\xff\xff\x7fb"), "2147483647"),
    "negative calls": (pack([("a", -1, VALUES)]), "number of calls of 'a' is -1"),
    "giant values": (ONE.replace(b"\x08\0\0\0", b"\xff\xff\xff\x7f"), "2147483647"),
    "negative values": (pack([("a", 1, -VALUES)]), "negative or non-finite"),
    "NaN": (pack([("a", 1, VALUES * np.float32("nan"))]), "negative or non-finite"),
    "infinity": (pack([("a", 1, VALUES * np.float32("inf"))]), "negative or non-finite"),
    "no values": (pack([("a", 1, VALUES[:0])]), "number of values of 'a' is 0"),
    "an entry twice": (pack([("a", 1, VALUES), ("a", 1, VALUES)]), "'a' occurs twice"),
    "negative chunks": (pack([("a", 1, VALUES)], struct.pack("<i", -3)), "number of chunks is -3"),
    "a giant text": (pack([("a", 1, VALUES)], struct.pack("<ii", 1, 2**31 - 1)), "name of the text"),
    "bytes too many": (pack([("a", 1, VALUES)], struct.pack("<ii", 1, 0) + b"x"), "1 bytes too many"),
    # As a converter wrote it whose rows of experts count as values (ikawrakow/ik_llama.cpp#2385).
    "rows for values": (ONE.replace(b"\1", b"\2", 1).replace(b"\x08\0\0\0", b"\2\0\0\0"), "length of"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(ModelFormatError) as caught:
        read_imatrix(tmp_path / "i.dat")
    message = str(caught.value)
    assert (
        words in message and "\n" not in message and "i.dat" in message and "pydiffusion imatrix" in message
    )


@pytest.mark.parametrize(
    "data", [b"\1\0\0\0", struct.pack("<ii", 0, 1) + b"a" * 40, b"no imatrix at all" * 40]
)
def test_other_files_are_no_imatrix(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(ModelFormatError, match="not a GGUF file"):
        read_imatrix(tmp_path / "i.dat")


def test_one_of_another_model_is_refused(legacy: Path) -> None:
    for shape in ((2, SHAPE.d + 1), (SHAPE.n_expert + 1, 4, SHAPE.d)):
        with pytest.raises(ConversionError, match="another model"):
            read_imatrix(legacy).importance(EXPERTS, shape, shape[-1], [])


def test_any_bytes_are_refused_or_read(tmp_path: Path) -> None:
    good = pack([(DENSE, 2, VALUES), (EXPERTS, 1, VALUES)])
    path = tmp_path / "i.dat"
    outcomes: set[bool] = set()

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, len(good) - 1), st.binary(min_size=1, max_size=4), st.integers(1, len(good)))
    def check(at: int, patch: bytes, end: int) -> None:
        damaged = good[:at] + patch + good[at + len(patch) :]
        path.write_bytes(damaged[:end] if end % 3 == 0 else damaged)
        try:
            read_imatrix(path)
        except PyDiffusionError as error:
            assert "\n" not in str(error)
            outcomes.add(False)
        else:
            outcomes.add(True)

    check()
    assert outcomes == {True, False}
