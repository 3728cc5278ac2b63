"""Write the fuzz targets' seeds: headers of a model without tensor data, and small unusual files.

python fuzz/make_seeds.py fuzz/corpus
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from reference.random_checkpoint import write_checkpoint  # noqa: E402
from support.gguf_mutator import (  # noqa: E402
    BOOL,
    GGML_F32,
    I32,
    STRING,
    U16,
    U32,
    U64,
    Array,
    KeyValue,
    RawGguf,
    String,
    Tensor,
    read_gguf,
)
from support.scaled_weights import scale_by_powers_of_two, split_experts  # noqa: E402

from pydiffusion.convert import convert  # noqa: E402


def model_headers(folder: Path) -> dict[str, RawGguf]:
    """Headers of the tiny model from the converter, without tokenizer keys; one with another alignment, one
    with scales beside its matrices.
    """
    checkpoint, target = folder / "checkpoint", folder / "tiny.gguf"
    checkpoint.mkdir()
    write_checkpoint(checkpoint, "tiny")
    headers = {}
    for type in ("f32", "q8_0"):
        convert(checkpoint, target, type)
        file = read_gguf(target)
        file.pairs = [pair for pair in file.pairs if not pair.key.startswith(b"tokenizer.")]
        headers[f"tiny-{type}"] = file
    aligned = headers["tiny-f32"].copy()
    aligned.set("general.alignment", U32, 8)
    aligned.alignment = 8
    headers["tiny-alignment-8"] = aligned
    scaled = headers["tiny-f32"].copy()
    split_experts(scaled)
    scale_by_powers_of_two(scaled)
    headers["tiny-scales"] = scaled
    return headers


def small_files() -> dict[str, bytes]:
    """Files with only a few keys, among them one of every value type."""
    every = RawGguf(pairs=[KeyValue(b"s", STRING, String(b"text")), KeyValue(b"b", BOOL, True)])
    for i, type in enumerate([0, 1, 2, 3, 4, 5, 6, 10, 11, 12]):
        every.set(f"n{i}", type, 1)
        every.set(f"a{i}", 9, Array(type, [1, 0]))
    every.set("as", 9, Array(STRING, [String(b""), String(b"x")]))
    return {"every-type": every.to_bytes(), "empty": RawGguf().to_bytes(), "two-keys": RawGguf(
        version=2, pairs=[KeyValue(b"k", U64, 7), KeyValue(b"general.alignment", U32, 64)]
    ).to_bytes()}  # fmt: skip


def split_file(cuts: list[int], repeated: bool = False) -> list[RawGguf]:
    """Parts of a file of six tensors, split before the tensors in ``cuts``; ``repeated``: with equal keys."""
    tensors = [Tensor(b"t%d" % i, [8, i + 1], GGML_F32, bytes(32 * (i + 1))) for i in range(6)]
    parts = []
    for i, (begin, end) in enumerate(zip([0, *cuts], [*cuts, 6], strict=True)):
        part = RawGguf(tensors=tensors[begin:end])
        if i == 0 or repeated:
            part.set("general.architecture", STRING, "any")
            part.set("list", 9, Array(U32, [1, 2]))
        part.set("split.no", U16, i)
        part.set("split.count", U16, len(cuts) + 1)
        part.set("split.tensors.count", I32, 6)
        parts.append(part)
    return parts


def split_files() -> dict[str, list[RawGguf]]:
    """Valid split files, and two whose parts conflict with each other, which mutation rarely produces."""
    files = {"two": split_file([3]), "three": split_file([2, 4]), "none-in-first": split_file([0, 3])}
    files["four"], files["repeated"] = split_file([1, 3, 5]), split_file([2], repeated=True)
    files["alignments"] = split_file([2, 4])
    files["alignments"][1].alignment = 8
    files["alignments"][1].set("general.alignment", U32, 8)
    files["tensor-twice"], files["key-differs"] = split_file([2, 4]), split_file([3], repeated=True)
    files["tensor-twice"][2].tensors[0].name = b"t0"
    files["key-differs"][1].set("list", 9, Array(U32, [1, 3]))
    return files


def main(corpus: Path) -> None:
    """Write the seeds of all targets to subfolders of ``corpus``."""
    for name in ("file", "model", "split"):
        (corpus / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, file in model_headers(Path(folder)).items():
            for target in ("file", "model"):
                (corpus / target / f"seed-{name}").write_bytes(file.header())
    for name, data in small_files().items():
        (corpus / "file" / f"seed-{name}").write_bytes(data)
    for name, parts in split_files().items():
        (corpus / "split" / f"seed-{name}").write_bytes(b"".join(part.header() for part in parts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
