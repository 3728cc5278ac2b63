"""Write the seeds of the fuzz targets: headers of a model's file without its data, and small odd files.

python fuzz/make_seeds.py fuzz/corpus
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from gguf_mutator import BOOL, STRING, U32, U64, Array, KeyValue, RawGguf, String, read_gguf  # noqa: E402
from reference.random_checkpoint import write_checkpoint  # noqa: E402

from pydiffusion.convert import convert  # noqa: E402


def model_headers(folder: Path) -> dict[str, RawGguf]:
    """The tiny model as the converter writes it, without its tokenizer, and told otherwise."""
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
    return headers


def small_files() -> dict[str, bytes]:
    """Files of a few values: every type of them, nothing else."""
    every = RawGguf(pairs=[KeyValue(b"s", STRING, String(b"text")), KeyValue(b"b", BOOL, True)])
    for i, type in enumerate([0, 1, 2, 3, 4, 5, 6, 10, 11, 12]):
        every.set(f"n{i}", type, 1)
        every.set(f"a{i}", 9, Array(type, [1, 0]))
    every.set("as", 9, Array(STRING, [String(b""), String(b"x")]))
    return {"every-type": every.to_bytes(), "empty": RawGguf().to_bytes(), "two-keys": RawGguf(
        version=2, pairs=[KeyValue(b"k", U64, 7), KeyValue(b"general.alignment", U32, 64)]
    ).to_bytes()}  # fmt: skip


def main(corpus: Path) -> None:
    """Write both targets' seeds below ``corpus``."""
    for name in ("file", "model"):
        (corpus / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, file in model_headers(Path(folder)).items():
            for target in ("file", "model"):
                (corpus / target / f"seed-{name}").write_bytes(file.header())
    for name, data in small_files().items():
        (corpus / "file" / f"seed-{name}").write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
