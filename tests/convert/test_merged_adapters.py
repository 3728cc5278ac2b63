"""Adapters merged into a model's weights: the numbers of each matrix, what is refused, and how it is read."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from reference.random_checkpoint import SHAPES, write_checkpoint
from support import checkpoint_folders as folders
from support.adapters_by_hand import adapter_of, factors_of, given, random_adapter
from support.fp4_folders import make_fp4
from support.gguf_files import fields_of, read_tensors

from pydiffusion.adapters.adapter import Adapter, Factors, Target
from pydiffusion.adapters.merging import merge
from pydiffusion.convert import ConversionProgress, Variant, convert, convert_family, quantize, verify
from pydiffusion.convert.gguf import resume as journal
from pydiffusion.convert.gguf import writer as pipeline
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from pydiffusion.errors import ConversionError

DENSE, EXPERT = 704, 480  # padded to 768 and 512

ODD = dataclasses.replace(SHAPES["small"], layers="sf", n_expert=3, dense=DENSE, expert=EXPERT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("odd") / "odd", ODD)


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    convert(folder, path, "f32", pad=False)
    return path


@pytest.fixture(scope="module")
def tensors(base: Path) -> dict[str, np.ndarray]:
    return read_tensors(GGUFReader(base))


@pytest.fixture(scope="module")
def adapter(tensors: Mapping[str, np.ndarray]) -> Adapter:
    """One of every matrix that can be adapted, the same for both modes."""
    made = random_adapter({name: value.shape for name, value in tensors.items()})
    assert len(made.factors) == 2 * 10 - 1 + 3  # the full layer has no V
    return made


def with_change(tensors: Mapping[str, np.ndarray], *used: tuple[Adapter, float]) -> dict[str, np.ndarray]:
    """What merging should give, in float64."""
    result = {name: value.astype(np.float64) for name, value in tensors.items()}
    for adapter, scale in used:
        for target, factors in adapter.factors.items():
            a, b = (array.astype(np.float64) for array in factors.read())
            result[f"{target.tensor}.weight"] += scale * factors.scale * (b @ a)
    return result


def assert_close(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= 2e-6 * max(1.0, np.abs(value).max()), name


def test_every_matrix_gets_its_change(
    folder: Path, tensors: Mapping[str, np.ndarray], adapter: Adapter, tmp_path: Path
) -> None:
    report = convert(folder, tmp_path / "m.gguf", "f32", pad=False, lora=[(adapter, 0.75)])
    found = read_tensors(GGUFReader(tmp_path / "m.gguf"))
    wanted = with_change(tensors, (adapter, 0.75))
    assert_close(found, wanted)
    changed = {name for name in tensors if not np.array_equal(found[name], tensors[name])}
    assert changed == {f"{target.tensor}.weight" for target in adapter.factors}
    assert "adapter by hand, scale 0.75: merged, 22 matrices changed" in report.notes
    fields = fields_of(GGUFReader(tmp_path / "m.gguf"))
    assert fields["pydiffusion.merged_lora.names"] == ("ARRAY/STRING", ["by hand"])
    assert fields["pydiffusion.merged_lora.scales"] == ("ARRAY/FLOAT32", [0.75])
    assert fields["pydiffusion.merged_lora.fingerprints"] == ("ARRAY/STRING", [adapter.fingerprint.hex()])


def test_the_change_is_padded_as_the_matrix_is(
    folder: Path, base: Path, tensors: Mapping[str, np.ndarray], adapter: Adapter, tmp_path: Path
) -> None:
    """By the conversion, or in the GGUF that it is merged into: zeros stay zeros."""
    convert(folder, tmp_path / "padded.gguf", "f32", pad=True)
    convert(folder, tmp_path / "a.gguf", "f32", pad=True, lora=[adapter])
    quantize(tmp_path / "padded.gguf", tmp_path / "b.gguf", "f32", lora=[adapter])
    found, same = (read_tensors(GGUFReader(tmp_path / f"{name}.gguf")) for name in "ab")
    assert all(np.array_equal(found[name], same[name]) for name in found)
    wanted = with_change(tensors, (adapter, 1.0))
    fused = found.pop("blk.0.ffn_gate_up_exps.weight").reshape(3, 2, 512, 256)
    expected = wanted.pop("blk.0.ffn_gate_up_exps.weight").reshape(3, 2, EXPERT, 256)
    assert np.abs(fused[:, :, :EXPERT] - expected).max() < 2e-6 and not fused[:, :, EXPERT:].any()
    for name in (
        "blk.0.ffn_up.weight",
        "blk.1.ffn_down.weight",
        "self_cond_gate.weight",
        "blk.1.ffn_down_exps.weight",
    ):
        n_rows, n_columns = wanted[name].shape[-2:]
        assert found[name].shape > wanted[name].shape
        assert np.abs(found[name][..., :n_rows, :n_columns] - wanted[name]).max() < 2e-6
        assert not found[name][..., n_rows:, :].any() and not found[name][..., n_columns:].any()


@pytest.mark.parametrize("type", ["bf16", "f16"])
def test_a_gguf_of_floats_is_a_source_too(
    folder: Path, tensors: Mapping[str, np.ndarray], adapter: Adapter, tmp_path: Path, type: str
) -> None:
    convert(folder, tmp_path / "base.gguf", type, pad=False)
    quantize(tmp_path / "base.gguf", tmp_path / "m.gguf", "f32", lora=[(adapter, -1.0)])
    of_base = read_tensors(GGUFReader(tmp_path / "base.gguf"))
    assert_close(read_tensors(GGUFReader(tmp_path / "m.gguf")), with_change(of_base, (adapter, -1.0)))


def test_what_is_merged_is_then_quantized(folder: Path, adapter: Adapter, tmp_path: Path) -> None:
    """The same file as quantizing the merged weights, but for what it says of how it was made."""
    convert(folder, tmp_path / "a.gguf", "q5_k_m", lora=[adapter])
    convert(folder, tmp_path / "f32.gguf", "f32", pad=False, lora=[adapter])
    quantize(tmp_path / "f32.gguf", tmp_path / "b.gguf", "q5_k_m")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_several_adapters_add_up(folder: Path, tensors: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    shapes = {name: value.shape for name, value in tensors.items()}
    one = random_adapter(shapes, kinds=["attn_q", "ffn_down_exps"], seed=1, name="one")
    two = random_adapter(shapes, kinds=["ffn_up", "attn_q"], rank=7, seed=2, name="two")
    used = [(one, 1.0), (two, -0.25), (one, 0.0)]
    report = convert(folder, tmp_path / "m.gguf", "f32", pad=False, lora=used)
    assert_close(read_tensors(GGUFReader(tmp_path / "m.gguf")), with_change(tensors, *used))
    fields = fields_of(GGUFReader(tmp_path / "m.gguf"))
    assert fields["pydiffusion.merged_lora.names"] == ("ARRAY/STRING", ["one", "two"])
    assert "adapter one, scale 0: left out, since it changes nothing" in report.notes
    quantize(tmp_path / "m.gguf", tmp_path / "again.gguf", "f32", lora=[(two, 0.25)])  # and off again
    assert_close(read_tensors(GGUFReader(tmp_path / "again.gguf")), with_change(tensors, (one, 1.0)))
    fields = fields_of(GGUFReader(tmp_path / "again.gguf"))
    assert fields["pydiffusion.merged_lora.scales"] == ("ARRAY/FLOAT32", [1.0, -0.25, 0.25])


def test_a_family_of_merged_files(folder: Path, adapter: Adapter, tmp_path: Path) -> None:
    """With padding in one of them only: the rows are read in other pieces, and are the same."""
    variants = [
        Variant(tmp_path / "a.gguf", "q8_0", pad=True),
        Variant(tmp_path / "b.gguf", "bf16", pad=False),
    ]
    convert_family(folder, variants, lora=[adapter])
    convert(folder, tmp_path / "c.gguf", "q8_0", pad=True, lora=[adapter])
    convert(folder, tmp_path / "d.gguf", "bf16", pad=False, lora=[adapter])
    for one, other in ("ac", "bd"):
        assert (tmp_path / f"{one}.gguf").read_bytes() == (tmp_path / f"{other}.gguf").read_bytes()


def source_of(name: str, values: np.ndarray, type: str = "F32") -> SourceTensor:
    data = values.reshape(-1).view(np.uint8)
    return SourceTensor(name, type, values.shape, lambda start, n_bytes: data[start : start + n_bytes].copy())


def values_of(tensor: SourceTensor) -> np.ndarray:
    return tensor.read(0, 4 * int(np.prod(tensor.shape))).view(np.float32).reshape(tensor.shape)


def test_gate_and_up_of_experts_together_or_apart() -> None:
    """An adapter of the one, a file with the other; the rows of both padded in the file."""
    random = np.random.default_rng(1)
    gate, up = (random.standard_normal((3, 40, 16)).astype(np.float32) for _ in range(2))
    padded = [np.pad(values, ((0, 0), (0, 8), (0, 0))) for values in (gate, up)]
    joined = factors_of((3, 80, 16), 2, seed=5)
    delta = joined.delta()
    apart = [
        source_of(f"blk.0.ffn_{kind}_exps.weight", values)
        for kind, values in zip(("gate", "up"), padded, strict=True)
    ]
    merged = merge(apart, [(adapter_of({Target("blk.0.ffn_gate_up_exps", "both"): joined}), 2.0)]).tensors
    for tensor, before, part in zip(merged, (gate, up), (delta[:, :40], delta[:, 40:]), strict=True):
        assert np.allclose(values_of(tensor)[:, :40], before + 2 * part, atol=1e-5)
        assert not values_of(tensor)[:, 40:].any()
    separate = {
        Target(f"blk.0.ffn_{kind}_exps", "both"): factors_of((3, 40, 16), rank, seed=rank)
        for kind, rank in (("gate", 2), ("up", 3))
    }
    fused = source_of("blk.0.ffn_gate_up_exps.weight", np.concatenate(padded, axis=1))
    found = values_of(merge([fused], [(adapter_of(separate), 1.0)]).tensors[0]).reshape(3, 2, 48, 16)
    for half, (before, one) in enumerate(zip((gate, up), separate.values(), strict=True)):
        assert np.allclose(found[:, half, :40], before + one.delta(), atol=1e-5)
        assert not found[:, half, 40:].any()


def test_a_row_does_not_depend_on_the_rows_read_with_it() -> None:
    """Bits: what is written in some pieces is compared, and resumed, in others."""
    base = source_of(
        "blk.0.ffn_down_exps.weight", np.random.default_rng(2).standard_normal((3, 150, 96)).astype("f4")
    )
    change = factors_of((3, 150, 96), 24, seed=3)
    merged = merge([base], [(adapter_of({Target("blk.0.ffn_down_exps", "both"): change}), 1.0)]).tensors[0]
    whole, row = values_of(merged).reshape(450, 96), 4 * 96
    for pieces in (1, 7, 64, 149, 333):
        read = [merged.read(i * row, min(pieces, 450 - i) * row) for i in range(0, 450, pieces)]
        assert np.array_equal(np.concatenate(read).view(np.float32).reshape(450, 96), whole)


def test_equal_sets_of_both_modes_are_one(tensors: Mapping[str, np.ndarray]) -> None:
    """A set that was never trained, whose B is zero, counts as absent."""
    base = source_of("blk.0.attn_q.weight", np.array(tensors["blk.0.attn_q.weight"]))
    change = factors_of(base.shape, 3, seed=1)
    copy = given(*(array.copy() for array in change.read()), change.scale)
    untrained = given(np.ones((2, base.shape[1]), np.float32), np.zeros((base.shape[0], 2), np.float32))
    shared = merge([base], [(adapter_of({Target("blk.0.attn_q", "both"): change}), 1.0)]).tensors[0]
    sets = {Target("blk.0.attn_q", "encoder"): change, Target("blk.0.attn_q", "decoder"): copy}
    merged = merge([base], [(adapter_of(sets), 1.0)]).tensors[0]
    assert np.array_equal(values_of(merged), values_of(shared))
    assert not np.array_equal(values_of(merged), values_of(base))
    sets = {Target("blk.0.attn_q", "encoder"): untrained, Target("blk.0.attn_q", "decoder"): untrained}
    assert merge([base], [(adapter_of(sets), 1.0)]).tensors == [base]


def changed_q(side: str, seed: int = 0) -> dict[Target, Factors]:
    return {Target("blk.1.attn_q", side): factors_of((512, 256), 2, seed)}  # type: ignore[arg-type]


def spoiled(shape: tuple[int, ...], value: float) -> Factors:
    a, b = factors_of(shape, 2, 0).read()
    b[5, 1] = value
    return given(a, b)


REFUSED = {
    "decoder only": (changed_q("decoder"), "changes blk.1.attn_q for the decoder only"),
    "encoder only": (changed_q("encoder"), "changes blk.1.attn_q for the encoder only"),
    "two sets": (
        changed_q("encoder", 1) | changed_q("decoder", 2),
        "changes blk.1.attn_q differently for encoder and decoder",
    ),
    "no such matrix": (
        {Target("blk.1.attn_v", "both"): factors_of((256, 256), 2, 0)},
        "no blk.1.attn_v.weight",
    ),
    "no such layer": (
        {Target("blk.7.attn_q", "both"): factors_of((512, 256), 2, 0)},
        "no blk.7.attn_q.weight",
    ),
    "rows": ({Target("blk.1.attn_q", "both"): factors_of((511, 256), 2, 0)}, "don't fit blk.1.attn_q.weight"),
    "columns": (
        {Target("blk.1.attn_q", "both"): factors_of((512, 255), 2, 0)},
        "don't fit blk.1.attn_q.weight",
    ),
    "more rows": (
        {Target("blk.1.ffn_up", "both"): factors_of((DENSE + 1, 256), 2, 0)},
        "don't fit blk.1.ffn_up",
    ),
    "experts": (
        {Target("blk.1.ffn_down_exps", "both"): factors_of((4, 256, EXPERT), 2, 0)},
        "don't fit blk.1.ffn_down_exps.weight",
    ),
    "not finite": (
        {Target("blk.1.attn_q", "both"): spoiled((512, 256), np.inf)},
        "the change of blk.1.attn_q.weight holds NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_named(base: Path, tmp_path: Path, case: str) -> None:
    factors, words = REFUSED[case]
    with pytest.raises(ConversionError) as caught:
        quantize(base, tmp_path / "m.gguf", "f32", lora=[adapter_of(factors, "tuned")])
    assert words in str(caught.value) and str(caught.value).startswith("tuned: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, -1e30])
def test_scales_that_no_weights_can_have(base: Path, tmp_path: Path, scale: float) -> None:
    large = {Target("blk.1.attn_q", "both"): factors_of((512, 256), 2, 0, share=1e12)}
    with pytest.raises((ValueError, ConversionError), match=r"lora has the scale|scale too large"):
        quantize(base, tmp_path / "m.gguf", "f32", lora=[(adapter_of(large), scale)])


def test_quantized_weights_are_not_merged_into(base: Path, tmp_path: Path) -> None:
    """Nor those with a scale beside them, which is no part of what is stored."""
    quantize(base, tmp_path / "q.gguf", "q8_0")
    with pytest.raises(
        ConversionError, match=r"into blk\.1\.attn_q\.weight, which is Q8_0 here: merge it into float"
    ):
        quantize(tmp_path / "q.gguf", tmp_path / "m.gguf", "f32", lora=[adapter_of(changed_q("both"))])
    weights = [
        source_of("blk.1.attn_q.weight", np.ones((512, 256), np.float32)),
        source_of("blk.1.attn_q.scale", np.ones(1, np.float32)),
        source_of("blk.1.ffn_down_exps.weight", np.ones((2, 64, 32), np.float32)),
        source_of("blk.1.ffn_down_exps.scale", np.ones(2, np.float32)),
    ]
    with pytest.raises(ConversionError, match=r"the file has blk\.1\.attn_q\.scale"):
        merge(weights, [(adapter_of(changed_q("both")), 1.0)])
    down = adapter_of({Target("blk.1.ffn_down_exps", "both"): factors_of((2, 64, 32), 2, 0)})
    merge(weights, [(down, 1.0)])  # the router's
    weights.append(source_of("blk.1.ffn_up_exps.scale", np.ones(2, np.float32)))
    with pytest.raises(ConversionError, match=r"the file has blk\.1\.ffn_up_exps\.scale"):
        merge(weights, [(down, 1.0)])


def test_factors_are_read_a_matrix_at_a_time(
    base: Path, tensors: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    """Once to see what they change, once to write and once to compare; not kept, however many there are."""
    alive, most, reads = 0, 0, []

    def counted(name: str, factors: Factors) -> Factors:
        def read() -> tuple[np.ndarray, np.ndarray]:
            nonlocal alive, most
            arrays = tuple(array.copy() for array in factors.read())
            reads.append(name)
            alive, most = alive + 2, max(most, alive + 2)
            for array in arrays:
                weakref.finalize(array, gone)
            return arrays

        return dataclasses.replace(factors, read=read)

    def gone() -> None:
        nonlocal alive
        alive -= 1

    whole = random_adapter({name: value.shape for name, value in tensors.items()})
    lazy = dataclasses.replace(whole, factors={t: counted(str(t), f) for t, f in whole.factors.items()})
    quantize(base, tmp_path / "m.gguf", "q8_0", lora=[lazy], n_threads=1)
    assert alive == 0 and most <= 4
    assert Counter(reads) == {str(target): 3 for target in whole.factors}


def test_an_interrupted_merge_is_resumed(
    base: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file; with another scale, begun anew."""
    quantize(base, tmp_path / "whole.gguf", "q8_0", lora=[adapter])
    monkeypatch.setattr(pipeline, "CHUNK_WEIGHTS", 200_000)
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_FLUSHES", 0.0)

    def stop(state: ConversionProgress) -> None:
        if state.stage == "write" and 2 * state.done_bytes > state.total_bytes:
            raise KeyboardInterrupt

    def begin(scale: float) -> None:
        with pytest.raises(KeyboardInterrupt):
            quantize(base, tmp_path / "m.gguf", "q8_0", lora=[(adapter, scale)], resume=True, progress=stop)

    begin(1.0)
    report = quantize(base, tmp_path / "m.gguf", "q8_0", lora=[adapter], resume=True)
    assert any(note.startswith("resumed: ") for note in report.notes)
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    begin(0.5)
    report = quantize(base, tmp_path / "m.gguf", "q8_0", lora=[adapter], resume=True)
    assert any("another conversion was there" in note for note in report.notes)
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_merged_file_is_verified_against_base_and_adapter(
    base: Path, adapter: Adapter, tmp_path: Path
) -> None:
    quantize(base, tmp_path / "m.gguf", "q6_k", lora=[(adapter, 0.5)])
    assert not verify(tmp_path / "m.gguf", base, lora=[(adapter, 0.5)]).problems
    renamed = dataclasses.replace(adapter, name="another name", path=Path("elsewhere"))
    assert not verify(tmp_path / "m.gguf", base, lora=[(renamed, 0.5)]).problems
    namesake = dataclasses.replace(adapter, fingerprint=bytes(32))
    wrong = verify(tmp_path / "m.gguf", base, lora=[(namesake, 0.5)]).problems
    assert wrong == [
        f"merged adapters are by hand:0.5 ({adapter.fingerprint.hex()[:12]}), the source with --lora has by "
        "hand:0.5 (000000000000)"
    ]
    missing = verify(tmp_path / "m.gguf", base).problems
    assert "adapters were merged into the file: give them with --lora (by hand:0.5)" in missing[0]
    wrong = verify(tmp_path / "m.gguf", base, lora=[(adapter, -0.5)]).problems
    assert any("blk.1.ffn_gate_inp.weight" in problem for problem in wrong)


def test_a_quantized_checkpoint_is_merged_into_dequantized(tmp_path: Path) -> None:
    """Not into blocks that are copied as they are."""
    made = folders.make_folder(tmp_path / "fp4")
    make_fp4(made, folders.weights(), "modelopt")
    convert(made, tmp_path / "base.gguf", "f32", pad=False)
    tensors = read_tensors(GGUFReader(tmp_path / "base.gguf"))
    adapter = random_adapter(
        {name: value.shape for name, value in tensors.items()}, kinds=["attn_q", "ffn_down"]
    )
    convert(made, tmp_path / "m.gguf", "f32", pad=False, lora=[adapter])
    assert_close(read_tensors(GGUFReader(tmp_path / "m.gguf")), with_change(tensors, (adapter, 1.0)))
    with pytest.raises(ConversionError, match=r"by hand: can't be merged into \S+, which is NVFP4 here"):
        convert(made, tmp_path / "kept.gguf", "nvfp4", pad=False, lora=[adapter])
