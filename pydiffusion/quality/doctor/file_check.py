"""The file by itself: is it whole, is it of this architecture, are its weights finite?"""

from __future__ import annotations

import hashlib
import math

from pydiffusion import _native
from pydiffusion._util.sizes import count, format_size
from pydiffusion.convert.gguf import rows
from pydiffusion.convert.gguf.reader import Parts

from .report import Section
from .subject import Subject

_CHUNK = 64 << 20  # bytes read at a time


def check(subject: Subject, section: Section) -> None:
    """Check the file, and name it by a digest of its tensors."""
    parts = subject.parts
    n_bytes = sum(tensor.n_bytes for tensor in parts.tensors)
    n_weights = sum(math.prod(tensor.shape) for tensor in parts.tensors)
    section.passed(
        "opens", f"GGUF version {parts.reader.version}, {len(parts.tensors)} tensors", "a valid GGUF"
    )
    section.passed("parts", "one file" if len(parts.paths) == 1 else f"all {len(parts.paths)} parts")
    name = parts.metadata.get("general.architecture")
    known = sorted(_native.samplers_of_architectures())
    section.judge(
        name in known,
        "architecture",
        str(name),
        " or ".join(known),
        "this is another model, which needs another program: get a GGUF of DiffusionGemma",
    )
    types = {tensor.type: 0 for tensor in parts.tensors}
    for tensor in parts.tensors:
        types[tensor.type] += 1
    listed = ", ".join(f"{number} {type}" for type, number in sorted(types.items()))
    bits = 8 * n_bytes / n_weights if n_weights else 0.0
    section.passed("types", f"{listed}; {bits:.2f} bits per weight")
    section.passed("size", f"{format_size(n_bytes)}, {count(n_weights)} weights")
    _check_weights(subject, parts, section, n_bytes)


def _check_weights(subject: Subject, parts: Parts, section: Section, total: int) -> None:
    """Read every tensor once: for weights that are not finite, and for the digest."""
    digest, bad, done = hashlib.sha256(), [], 0
    with parts.opened() as opened:
        for info, read in opened:
            name = str(info.name)
            digest.update(f"{name} {info.type} {list(info.shape)}\n".encode())
            n_per_row = info.shape[-1]
            row = rows.row_bytes(info.type, n_per_row)
            step, finite = max(1, _CHUNK // row) * row, True
            for start in range(0, info.n_bytes, step):
                data = read(start, min(step, info.n_bytes - start))
                digest.update(data.data)
                finite = finite and not rows.has_nonfinite(data.reshape(-1, row), info.type, n_per_row)
                done += len(data)
                subject.progress("reading the weights", done / total)
            bad += [] if finite else [name]
    section.judge(
        not bad,
        "weights are finite",
        "all" if not bad else f"NaN or infinite weights in {', '.join(bad[:5])}{', ...' * (len(bad) > 5)}",
        "all",
        "the file is damaged, or was made from a damaged checkpoint: make or download it again",
    )
    section.passed("digest of all tensors", digest.hexdigest()[:32], "the same for everyone with this file")


CHECKS = (check,)
