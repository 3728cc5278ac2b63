"""Every tensor against the reference's."""

from __future__ import annotations

from pydiffusion.convert import verify
from pydiffusion.convert.verification import TensorCheck

from .report import Section, Table
from .subject import Subject

_SHOWN = 5
_APART, _JOINED = ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "ffn_gate_up_exps.weight"


def check(subject: Subject, section: Section) -> None:
    """Compare all weights with the checkpoint's."""
    if subject.reference is None:
        section.skip("weights of the reference", "no --reference", "give the checkpoint's folder")
        return
    if not subject.has_reference_weights:
        section.skip("weights of the reference", "the reference has no weights", "download them, too")
        return
    with subject.folder() as source:
        wanted = {tensor.name for tensor in source.tensors}
    there = {str(tensor.name) for tensor in subject.parts.tensors}
    apart = {name for name in there if name.endswith(_APART)}
    if apart:
        joined = {name for name in wanted - there if name.endswith(_JOINED)}
        section.skip(
            f"{len(joined)} tensors of experts",
            "the file has their gate and up apart",
            "the layers check them",
        )
        wanted, there = wanted - joined, there - apart
    scaled = _with_own_scales(there, wanted)
    if scaled:
        section.skip(
            f"{sum(name.endswith('.weight') for name in scaled)} matrices with scales",
            "the reference has no scales beside them",
            "the layers check them",
        )
        wanted, there = wanted - scaled, there - scaled
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
    compared = [one for one in report.tensors if one.n_weights and one.name not in scaled]
    _judge(compared, section)
    section.tables.append(_table(compared))
    subject.weight_errors.update({one.name: one.relative_error for one in compared})


def _with_own_scales(there: set[str], wanted: set[str]) -> set[str]:
    """Scales that the reference doesn't have (NVFP4 files of llama.cpp's converter), and what is only right
    together with them: their matrices, and the experts whose scales are in the router's.
    """
    scales = {name for name in there - wanted if name.endswith((".scale", ".input_scale"))}
    stems = {name.rpartition(".")[0] for name in scales}
    stems |= {stem.rpartition(".")[0] + ".ffn_down_exps" for stem in stems if stem.endswith("_exps")}
    return {name for name in there & wanted if name.rpartition(".")[0] in stems} | scales


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
