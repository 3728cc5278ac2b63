"""Every tensor against the reference's."""

from __future__ import annotations

from pydiffusion.convert import verify
from pydiffusion.convert.architectures.source import open_gguf
from pydiffusion.convert.quantization.stored_scales import as_stored
from pydiffusion.convert.verification import TensorCheck

from .report import Section, Table
from .subject import Subject

_SHOWN = 5


def check(subject: Subject, section: Section) -> None:
    """Compare all weights with the checkpoint's."""
    if subject.reference is None:
        section.skip("weights of the reference", "no --reference", "give the checkpoint's folder")
        return
    if not subject.has_reference_weights:
        section.skip("weights of the reference", "the reference has no weights", "download them, too")
        return
    with subject.folder() as source, open_gguf(subject.path) as file:
        own = {tensor.name: tensor for tensor in file.tensors}
        wanted = set(as_stored({tensor.name: tensor for tensor in source.tensors}, own))
    there = set(own)
    for names, state in ((wanted - there, "missing from the file"), (there - wanted, "not in the reference")):
        if names:
            section.fail(
                f"tensors {state}",
                ", ".join(sorted(names)[:_SHOWN])
                + (f", and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)),
                "the same tensors",
                "the file is of another model, or not whole: convert the checkpoint again",
            )
    report = verify(
        subject.path,
        subject.reference,
        progress=lambda p: subject.progress(p.tensor, p.done_bytes / max(1, p.total_bytes)),
    )
    compared = [one for one in report.tensors if one.n_weights]
    _judge(compared, section)
    section.tables.append(_table(compared))
    subject.weight_errors.update({one.name: one.relative_error for one in compared})


def _judge(compared: list[TensorCheck], section: Section) -> None:
    wrong = sorted((one for one in compared if one.problem), key=lambda one: -one.relative_error)
    for one in wrong[:_SHOWN]:
        section.fail(
            one.name,
            f"{one.problem}; relative error {one.relative_error:.2g}, {one.type}",
            f"the reference's weights ({one.source_type}), rounded",
            "this tensor was changed or damaged: convert the checkpoint again",
        )
    if len(wrong) > _SHOWN:
        section.fail(
            f"{len(wrong) - _SHOWN} more tensors",
            f"differ; {len(compared) - len(wrong)} agree",
            "the reference's weights, rounded",
            "where most differ, the reference is of another model",
        )
    if not wrong:
        section.passed("weights", f"all {len(compared)} tensors agree", "as close as their types allow")


def _table(compared: list[TensorCheck]) -> Table:
    """Of each type, how many tensors there are and the one that differs most."""
    by_type: dict[str, list[TensorCheck]] = {}
    for one in compared:
        by_type.setdefault(one.type, []).append(one)
    rows = []
    for type, tensors in sorted(by_type.items()):
        worst = max(tensors, key=lambda one: one.relative_error)
        rows.append(
            (type, str(len(tensors)), f"{worst.relative_error:.2g}", f"{worst.cosine:.6f}", worst.name)
        )
    heads = ("type", "tensors", "largest relative error", "its cosine", "tensor")
    return Table("The tensor of each type that differs most from the reference", heads, rows)


CHECKS = (check,)
