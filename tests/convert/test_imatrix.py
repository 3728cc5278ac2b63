"""Importance matrices: collected (against numpy), written (read by gguf), and used for quantizing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from reference.random_checkpoint import SHAPES, random_ids, text_tensors
from support.gguf_files import NEED_IMATRIX, fields_of, finish, read_tensors
from support.gguf_mutator import BOOL, F32, F64, I32, RawGguf, read_gguf

from pydiffusion import DiffusionModel, _native
from pydiffusion.cli import main
from pydiffusion.convert import collect_imatrix, convert, verify
from pydiffusion.convert.quantization.imatrix_file import Entry, read_imatrix, write_imatrix
from pydiffusion.errors import ConversionError, ModelFormatError
from pydiffusion.quality import imatrix_collection as collect

SHAPE = SHAPES["mild"]
TEXT = "the river was wide and the boats were small. " * 12


@pytest.fixture(scope="module")
def model_path(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("mild")


@pytest.fixture(scope="module")
def imatrix(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "i.gguf"
    collect_imatrix(model_path, TEXT, path, chunk=32, max_chunks=4, n_threads=1, datasets=["river"])
    return path


def new_session(path: Path) -> _native.Session:
    return _native.Session(_native.Model(str(path), n_threads=1, kv_type="f32"), 128)


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6)


def test_encoder_activation_sums_equal_numpy(model_path: Path) -> None:
    session = new_session(model_path)
    session.collect_imatrix(True)
    ids = random_ids(3, "prompt", 20, SHAPE.vocab)
    session.encode(ids, return_hidden=True)
    found = session.imatrix()
    weights = text_tensors(SHAPE, 0)
    x = weights["model.decoder.embed_tokens.weight"][ids].astype(np.float64) * SHAPE.d**0.5
    h = rms(x) * weights["model.decoder.layers.0.input_layernorm.weight"]
    for kind in ("attn_q", "attn_k", "attn_v"):
        sums, counts = found[f"blk.0.{kind}.weight"]
        assert sums.shape == (1, SHAPE.d) and counts.tolist() == [20]
        assert sums[0] == pytest.approx((h**2).sum(axis=0), rel=1e-4)


def test_expert_activation_sums_equal_numpy(model_path: Path) -> None:
    """A token's experts and the dense MLP get the same activations, up to the norms' weights."""
    session = new_session(model_path)
    session.collect_imatrix(True)
    session.encode(random_ids(3, "prompt", 20, SHAPE.vocab), return_hidden=True)
    session.denoise(random_ids(3, "canvas", SHAPE.canvas, SHAPE.vocab), None)
    found = session.imatrix()
    n_tokens = 20 + SHAPE.canvas
    weights = text_tensors(SHAPE, 0)
    for i in range(len(SHAPE.layers)):
        layer = f"model.decoder.layers.{i}."
        dense, count = found[f"blk.{i}.ffn_gate.weight"]
        experts, counts = found[f"blk.{i}.ffn_gate_up_exps.weight"]
        assert count.tolist() == [n_tokens]
        assert experts.shape == (SHAPE.n_expert, SHAPE.d) and counts.sum() == n_tokens * SHAPE.n_expert_used
        plain = dense[0] / weights[layer + "pre_feedforward_layernorm.weight"].astype(np.float64) ** 2
        by_expert = experts.sum(axis=0)
        by_expert /= weights[layer + "pre_feedforward_layernorm_2.weight"].astype(np.float64) ** 2
        assert by_expert == pytest.approx(SHAPE.n_expert_used * plain, rel=1e-4)
        sums, down_counts = found[f"blk.{i}.ffn_down_exps.weight"]
        assert sums.shape == (SHAPE.n_expert, SHAPE.expert) and np.array_equal(down_counts, counts)
        assert ((sums.sum(axis=1) > 0) == (counts > 0)).all()
    # Only the denoiser uses the head and self-conditioning; without conditioning, its input is zero.
    assert found["token_embd.weight"][1].tolist() == [SHAPE.canvas]
    assert not found["self_cond_gate.weight"][0].any()


def test_collecting_does_not_change_logits(model_path: Path) -> None:
    ids, canvas = random_ids(3, "prompt", 20, SHAPE.vocab), random_ids(3, "canvas", SHAPE.canvas, SHAPE.vocab)

    def run(watched: bool) -> np.ndarray:
        session = new_session(model_path)
        session.collect_imatrix(watched)
        session.encode(ids)
        first = session.denoise(canvas, None)
        assert bool(session.imatrix()) == watched
        return np.stack([first, session.denoise(canvas, first)])

    assert np.array_equal(run(True), run(False))


def test_the_file_has_llama_cpps_layout(imatrix: Path) -> None:
    reader = GGUFReader(imatrix)
    fields = fields_of(reader)
    assert fields["general.type"] == ("STRING", "imatrix")
    assert fields["imatrix.datasets"] == ("ARRAY/STRING", ["river"])
    assert fields["imatrix.chunk_count"] == ("UINT32", 4)
    assert fields["imatrix.chunk_size"] == ("UINT32", 32)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert all(tensor.tensor_type.name == "F32" for tensor in found.values())
    name = "blk.2.ffn_down_exps.weight"
    assert found[name + ".in_sum2"].shape.tolist() == [SHAPE.expert, SHAPE.n_expert]  # ggml's order
    assert found[name + ".counts"].shape.tolist() == [1, SHAPE.n_expert]
    # Four chunks of 32 tokens, and a canvas with and without conditioning at each of four levels.
    n_tokens = 4 * (32 + 2 * 4 * SHAPE.canvas)
    assert found["blk.0.attn_q.weight.counts"].data.reshape(-1).tolist() == [n_tokens]
    assert found[name + ".counts"].data.sum() == n_tokens * SHAPE.n_expert_used
    assert found["self_cond_gate.weight.in_sum2"].data.any()
    back = read_imatrix(imatrix)
    assert np.array_equal(back.entries[name].counts, found[name + ".counts"].data.reshape(-1))
    assert back.datasets == ("river",) and (back.chunk_count, back.chunk_size) == (4, 32)


N = SHAPE.canvas


@pytest.mark.parametrize("length", [2, 3, N // 2, N // 2 + 1, N - 1, N, N + 1, 2 * N])
def test_texts_shorter_than_a_canvas_are_used(model_path: Path, tmp_path: Path, length: int) -> None:
    """Every token is either encoded or denoised: the first layer sees exactly so many rows."""
    ids = random_ids(5, "text", length, SHAPE.vocab).tolist()
    report = collect_imatrix(model_path, [ids], tmp_path / "i.gguf", noise=(0.5, 1.0), n_threads=1)
    n_read = length // 2 if length <= N else length - N
    assert (report.n_chunks, report.n_left_out, report.n_tokens) == (1, 0, n_read)
    assert read_imatrix(tmp_path / "i.gguf").entries["blk.0.attn_q.weight"].counts.tolist() == [
        n_read + 2 * 2 * N
    ]


def test_a_short_text_ends_as_an_answer_does(model_path: Path) -> None:
    """Its last tokens are on the canvas, then an eos, then padding; none twice, none lost."""
    model = DiffusionModel(model_path, n_threads=1)
    eos, pad = model.tokenizer.eos_id, model.tokenizer.pad_id
    assert None not in (eos, pad) and eos != pad
    ids = random_ids(5, "text", N - 3, SHAPE.vocab).tolist()
    [(prompt, canvas)] = collect._chunks(model, ids, 512)
    n_canvas = len(ids) - len(prompt)
    assert [*prompt, *canvas[:n_canvas]] == ids and len(canvas) == N
    assert canvas[n_canvas:].tolist() == [eos] + [pad] * (N - n_canvas - 1)
    for size in (1, 2):
        [(prompt, canvas)] = collect._chunks(model, ids, size)
        assert [*prompt, *canvas[: len(ids) - size]] == ids and len(prompt) == size


def test_lines_of_any_length_are_used(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DiffusionModel(model_path, n_threads=1)
    lines = [TEXT[:n] for n in range(1, 60) if n < 2 or not TEXT[n - 1].isspace()]
    lengths = [len(model.tokenize(line, parse_special=True)) for line in lines]
    assert min(lengths) < N // 2 and set(range(N // 2, N + 1)) <= set(lengths)
    text = tmp_path / "lines.txt"
    text.write_text("\n   \n".join(lines))
    command = ["imatrix", str(model_path), str(text), "-o", str(tmp_path / "i.gguf"), "--lines"]
    assert main([*command, "--threads", "1"]) == 0
    said = capsys.readouterr().err
    n_short = sum(length < 2 for length in lengths)
    assert f"in {len(lines) - n_short} chunks" in said
    assert ("left out" in said) == bool(n_short)


def test_texts_left_out_are_reported(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = collect_imatrix(model_path, [[5], [5, 6], []], tmp_path / "i.gguf", noise=(1.0,), n_threads=1)
    assert (report.n_chunks, report.n_left_out) == (1, 2)
    (tmp_path / "t.txt").write_text("a\nb")
    monkeypatch.setattr("pydiffusion.convert.collect_imatrix", lambda *_, **__: report)
    assert main(["imatrix", str(model_path), str(tmp_path / "t.txt"), "-o", "x", "--lines"]) == 0
    assert "2 texts of fewer than two tokens were left out" in capsys.readouterr().err


def their_imatrix(path: Path, tensors: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    writer = GGUFWriter(path, arch="none")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["theirs.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    finish(writer, tensors)
    return path


def test_each_expert_is_quantized_by_its_own_importance(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    name = "blk.0.ffn_gate_up_exps.weight"
    random = np.random.default_rng(0)
    counts = np.array([[4], [0], [7], [1], [2], [9]], np.float32)
    sums = (random.random((SHAPE.n_expert, SHAPE.d)) * counts).astype(np.float32)
    path = their_imatrix(tmp_path / "i.gguf", {name + ".in_sum2": sums, name + ".counts": counts})
    report = convert(checkpoint_folder("mild"), tmp_path / "m.gguf", "q4_k_s", imatrix=path)
    assert any(f"{name}: the imatrix has no activations for 1 of 6 experts" in note for note in report.notes)
    found = next(t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == name)
    weights = text_tensors(SHAPE, 0)["model.decoder.layers.0.experts.gate_up_proj"]
    for expert in range(SHAPE.n_expert):
        exact = sums.astype(np.float64)
        importance = exact[expert] / counts[expert] if counts[expert] else exact.sum(0) / counts.sum()
        expected = _native.quantize_rows(weights[expert], "Q4_K", 1, importance.astype(np.float32))
        assert found.data[expert].tobytes() == expected.tobytes(), expert


@pytest.mark.parametrize(("type", "pad"), [*((type, None) for type in NEED_IMATRIX), ("iq2_xs", True)])
def test_types_that_need_an_imatrix(
    checkpoint_folder: Callable[..., Path], imatrix: Path, tmp_path: Path, type: str, pad: bool | None
) -> None:
    convert(checkpoint_folder("mild"), tmp_path / "m.gguf", type, imatrix=imatrix, pad=pad)
    assert verify(tmp_path / "m.gguf", checkpoint_folder("mild")).problems == []
    values = read_tensors(GGUFReader(tmp_path / "m.gguf"))["blk.0.ffn_gate.weight"][: SHAPE.dense]
    expected = text_tensors(SHAPE, 0)["model.decoder.layers.0.mlp.gate_proj.weight"]
    assert np.linalg.norm(values - expected) < 0.65 * np.linalg.norm(expected)


def test_an_imatrix_lowers_the_weighted_error(
    checkpoint_folder: Callable[..., Path], imatrix: Path, tmp_path: Path
) -> None:
    folder = checkpoint_folder("mild")
    convert(folder, tmp_path / "with.gguf", "q4_k_m", imatrix=imatrix)
    convert(folder, tmp_path / "without.gguf", "q4_k_m")
    entries = read_imatrix(imatrix).entries
    weights = text_tensors(SHAPE, 0)["model.decoder.layers.0.mlp.gate_proj.weight"]
    name = "blk.0.ffn_gate.weight"
    weighted = {}
    for kind in ("with", "without"):
        error = read_tensors(GGUFReader(tmp_path / f"{kind}.gguf"))[name][: SHAPE.dense] - weights
        weighted[kind] = float((error**2 * entries[name].in_sum2[0]).sum())
    assert weighted["with"] < 0.97 * weighted["without"], weighted


def test_separate_and_fused_experts_share_an_entry(imatrix: Path) -> None:
    read = read_imatrix(imatrix)
    shape = (SHAPE.n_expert, 2 * SHAPE.expert, SHAPE.d)
    fused = read.importance("blk.1.ffn_gate_up_exps.weight", shape, SHAPE.d, [])
    apart = read.importance("blk.1.ffn_up_exps.weight", (shape[0], SHAPE.expert, SHAPE.d), SHAPE.d, [])
    assert np.array_equal(fused, apart)
    assert read.importance("output.weight", (512, SHAPE.d), SHAPE.d, []) is None


def test_the_imatrix_of_a_padded_model_fits_the_unpadded_one(imatrix: Path, tmp_path: Path) -> None:
    read = read_imatrix(imatrix)
    name, shape = "blk.0.ffn_down.weight", (SHAPE.d, SHAPE.dense)
    plain = read.importance(name, shape, SHAPE.dense, [])
    wide = np.pad(read.entries[name].in_sum2, ((0, 0), (0, 512 - SHAPE.dense)))
    padded = dataclasses.replace(read, entries={name: Entry(wide, read.entries[name].counts)})
    assert np.array_equal(padded.importance(name, shape, SHAPE.dense, []), plain)
    longer = read.importance(name, shape, 512, [])
    assert np.array_equal(longer[:, : SHAPE.dense], plain) and 0 < longer[0, -1] < 1e-5 * plain.mean()


def test_damaged_and_foreign_files_are_refused(
    checkpoint_folder: Callable[..., Path], model_path: Path, tmp_path: Path
) -> None:
    name = "blk.0.attn_q.weight"
    sums, counts = np.ones((1, SHAPE.d), np.float32), np.ones((1, 1), np.float32)

    def refuse(
        error: type[Exception], match: str, tensors: dict[str, np.ndarray], kind: str = "imatrix"
    ) -> None:
        path = their_imatrix(tmp_path / "i.gguf", tensors, kind)
        with pytest.raises(error, match=match):
            convert(checkpoint_folder("mild"), tmp_path / "m.gguf", "q4_k_m", imatrix=path)

    refuse(ModelFormatError, "'imatrix'", {name: sums}, kind="model")
    refuse(ModelFormatError, "counts", {name + ".in_sum2": sums})
    refuse(ModelFormatError, "negative", {name + ".in_sum2": -sums, name + ".counts": counts})
    refuse(ModelFormatError, "negative", {name + ".in_sum2": sums * np.nan, name + ".counts": counts})
    refuse(ConversionError, "another model", {name + ".in_sum2": sums[:, :-1], name + ".counts": counts})
    with pytest.raises(ConversionError, match="no such file"):
        convert(checkpoint_folder("mild"), tmp_path / "m.gguf", imatrix=tmp_path / "none.gguf")
    with pytest.raises(ConversionError, match="too short"):
        collect_imatrix(model_path, [[5]], tmp_path / "m.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"i.gguf"}


def small_file(path: Path) -> RawGguf:
    """A valid file of one entry, parsed."""
    write_imatrix(path, {"a.weight": Entry(np.ones((1, 4), np.float32), np.ones(1, np.float32))}, [], 3, 8)
    return read_gguf(path)


@pytest.mark.parametrize(
    ("type", "value"), [(F64, float("inf")), (F32, float("nan")), (BOOL, True), (I32, -1)]
)
def test_invalid_counts_are_refused(tmp_path: Path, type: int, value: object) -> None:
    """Found by fuzzing: an infinite count ended in an OverflowError."""
    file = small_file(tmp_path / "i.gguf")
    file.set("imatrix.chunk_count", type, value)
    with pytest.raises(ModelFormatError, match="chunk_count"):
        read_imatrix(file.write(tmp_path / "i.gguf"))


def test_a_text_that_is_not_utf8_is_named(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(b"caf\xe9")
    assert main(["imatrix", str(model_path), str(tmp_path / "text"), "-o", str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'text'} is not valid UTF-8 at byte 3: convert it" in capsys.readouterr().err


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    """Found by fuzzing: such a tensor could be listed but its bytes not be asked for."""
    file = small_file(tmp_path / "i.gguf")
    for tensor in file.tensors:
        tensor.name = b"\xff\x80" + tensor.name
    entries = read_imatrix(file.write(tmp_path / "i.gguf")).entries
    assert list(entries) == ["\udcff\udc80a.weight"]


def test_an_entry_that_nothing_reached_is_left_out(tmp_path: Path) -> None:
    write_imatrix(
        tmp_path / "i.gguf",
        {"blk.0.attn_q.weight": Entry(np.zeros((1, 4), "f4"), np.zeros(1, "f4"))},
        [],
        1,
        1,
    )
    notes: list[str] = []
    assert read_imatrix(tmp_path / "i.gguf").importance("blk.0.attn_q.weight", (2, 4), 4, notes) is None
    assert "has no activations" in notes[0]


def test_the_commands(model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    target = tmp_path / "i.gguf"
    arguments = [str(model_path), str(tmp_path / "text.txt"), "-o", str(target), "--chunk", "32"]
    assert main(["imatrix", *arguments, "--max-chunks", "1", "--threads", "1"]) == 0
    assert "in 1 chunks" in capsys.readouterr().err
    out = str(tmp_path / "q.gguf")
    assert main(["quantize", str(model_path), out, "--type", "iq2_xs", "--imatrix", str(target)]) == 0
    assert fields_of(GGUFReader(out))["general.file_type"] == ("UINT32", 20)
