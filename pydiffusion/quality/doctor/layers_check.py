"""The runtime's layers against those of transformers: where does a difference begin?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
from pathlib import Path

from pydiffusion._util.sizes import format_size
from pydiffusion.convert.architectures.diffusion_gemma.config import TextConfig
from pydiffusion.convert.architectures.diffusion_gemma.experts import stack_experts
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import ARCHITECTURE, wanted_tensors
from pydiffusion.convert.architectures.source import open_gguf, open_tensors, read_config
from pydiffusion.convert.checkpoint.tensor_map import split_name

from .layer_differences import (
    PASSES,
    Comparer,
    Comparison,
    Errors,
    LayerDifference,
    LogitsDifference,
    PointDifference,
)
from .layer_trace import POINTS, TracedPass, trace
from .report import Section, Table
from .subject import Subject
from .weight_readers import CheckpointReader, FileReader

_WHAT = "layer by layer against transformers"
_INSTALL = "pip install torch transformers"
_NEEDED = ("torch", "transformers")
_CLASS = "transformers.models.diffusion_gemma"
#: Differences may be this many times what rounding of activations does to the reference: of the token of the
#: middle as in tests/parity, and of the worst one.
_TYPICAL, _WORST = 1.5, 4.0
#: Relative differences that two correct evaluations may have, by type of the KV cache, f32's being those of
#: sums in another order; and on a device, whose attention computes with 16 bits.
_BY_CACHE, _DEVICE = {"f32": 2e-5, "f16": 2e-3, "q8_0": 1e-1}, 1e-2
#: The worst token may be this many times above these.
_OUTLIER = 8.0
#: A layer whose difference with the checkpoint's weights is this many times that of the others stands out.
_STANDS_OUT = 4.0


def check(subject: Subject, section: Section) -> None:
    """Run a prompt and two canvases here and in transformers, and compare every layer."""
    why = _missing(subject)
    if why is not None:
        section.skip(_WHAT, *why)
        return
    model = subject.model
    types, description = set(model.description["weight_types"]), model.description
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _NEEDED)
    section.passed("the reference", versions, "tested with torch 2.13, transformers 5.23")
    subject.progress("running the model", 0.0)
    passes = trace(model)
    subject.close_model()
    floor = max(_BY_CACHE[description["kv_type"]], _DEVICE if description["n_gpu_layers"] else 0.0)
    assert subject.reference is not None
    _, config = read_config(subject.reference, [])
    if len(config.sliding) != len(passes[PASSES[0]].points) or _widths(config) != _widths_of(passes):
        section.fail(
            _WHAT,
            f"the file has {len(passes[PASSES[0]].points)} layers of {_widths_of(passes)}",
            f"the reference has {len(config.sliding)} layers of {_widths(config)}",
            "the reference is of another model: give the folder that the file was made from",
        )
        return
    found = _compare(subject, subject.reference, config, passes, types)
    _judge(found, floor, config, subject.weight_errors, section)
    section.tables.append(_table(found, config, subject.weight_errors))


def _missing(subject: Subject) -> tuple[str, str] | None:
    """Why the comparison can't be made, and what to do."""
    if subject.reference is None:
        return "no --reference", "give the checkpoint's folder"
    if not subject.has_reference_weights:
        return "the reference has no weights", "download them, too"
    if subject.metadata.get("general.architecture") != ARCHITECTURE:
        return "there is no reference for this architecture", ""
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed", _INSTALL
    if importlib.util.find_spec(_CLASS) is None:
        return "this version of transformers has no diffusion_gemma", "pip install 'transformers>=5.23'"
    with subject.folder() as source:
        largest = max(_layer_bytes(source.tensors), default=0)
    free = _available_bytes()
    if free is not None and free < 3 * largest:
        return (
            f"a layer takes {format_size(3 * largest)} in float32 while it is read and run,"
            f" {format_size(free)} are free",
            "close other programs, or use a machine with more memory",
        )
    return None


def _layer_bytes(tensors: list) -> list[int]:
    """Bytes of each layer in float32."""
    sizes: dict[int | None, int] = {}
    for tensor in tensors:
        n = 4
        for length in tensor.shape:
            n *= length
        i_layer = split_name(tensor.name)[1]
        sizes[i_layer] = sizes.get(i_layer, 0) + n
    return [n for i_layer, n in sizes.items() if i_layer is not None]


def _available_bytes() -> int | None:
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _widths(config: TextConfig) -> int:
    return config.hidden_size


def _widths_of(passes: dict[str, TracedPass]) -> int:
    return passes[PASSES[0]].inputs.shape[1]


def _compare(
    subject: Subject, folder: Path, config: TextConfig, passes: dict[str, TracedPass], types: set[str]
) -> Comparison:
    from .layer_reference import LayerReference, rounding_of

    names = {tensor.source: tensor.name for tensor in wanted_tensors(config)}
    found, n_layer = Comparison(), len(config.sliding)
    reference = LayerReference(folder)
    with open_tensors(folder) as weights, open_gguf(subject.path) as file:
        tensors = {tensor.name: tensor for tensor in file.tensors}
        comparer = Comparer(
            reference,
            passes,
            CheckpointReader(stack_experts(weights)),
            FileReader(tensors, names),
            rounding_of(types),
        )
        found.inputs = comparer.embed()
        for i_layer in range(n_layer):
            subject.progress(f"layer {i_layer} in transformers", i_layer / n_layer)
            found.layers.append(comparer.layer(i_layer))
        found.logits = comparer.logits()
    return found


def _bounds(rounding: Errors, floor: float) -> Errors:
    return Errors(max(floor, _TYPICAL * rounding.typical), max(_OUTLIER * floor, _WORST * rounding.worst))


def _exceeds(found: PointDifference | LogitsDifference, floor: float) -> bool:
    bound = _bounds(found.rounding, floor)
    return not (found.computed.typical <= bound.typical and found.computed.worst <= bound.worst)


def _judge(
    found: Comparison, floor: float, config: TextConfig, weight_errors: dict[str, float], section: Section
) -> None:
    points = [*found.inputs, *(point for layer in found.layers for point in layer.points)]
    wrong = [point for point in points if _exceeds(point, floor)]
    expected = (
        f"within {_TYPICAL:g} times what rounding activations as this file's matmuls do costs transformers"
        f" (worst token {_WORST:g} times), or {floor:.0e}"
    )
    if not wrong:
        worst = max(points, key=lambda point: point.computed.typical)
        section.passed(
            _WHAT,
            f"all {len(found.layers)} layers agree, in {len(PASSES)} passes; largest difference"
            f" {worst.computed.typical:.1e} ({_place(worst, config)}), rounding {worst.rounding.typical:.1e}",
            expected,
        )
    else:
        first = wrong[0]
        others = sorted({point.i_layer for point in wrong[1:]} - {first.i_layer})
        also = f"; also in layers {', '.join(map(str, others[:12]))}" if others else "; in no other layer"
        section.fail(
            f"a difference begins in {_place(first, config)}",
            f"relative difference {first.computed.typical:.1e}, worst token {first.computed.worst:.1e}, from"
            f" the same input and weights{also}",
            f"{expected}: here {_bounds(first.rounding, floor).typical:.1e} and"
            f" {_bounds(first.rounding, floor).worst:.1e}",
            "metadata that differ from the reference's (shapes) explain it; else it is a fault of"
            f" pydiffusion: report it with this page{_worst_tensor(first.i_layer, weight_errors)}",
        )
    _judge_logits(found, floor, section)
    _find_outlier(found, config, weight_errors, section)


def _place(point: PointDifference, config: TextConfig) -> str:
    if point.i_layer < 0:
        return f"the input of the first layer, {point.in_pass}"
    kind = "sliding" if config.sliding[point.i_layer] else "full"
    return f"layer {point.i_layer} ({kind}), {POINTS[point.point]}, {point.in_pass}"


def _worst_tensor(i_layer: int, weight_errors: dict[str, float]) -> str:
    own = {name: error for name, error in weight_errors.items() if split_name(name)[1] == i_layer}
    if not own or not max(own.values()):
        return ""
    name = max(own, key=lambda each: own[each])
    return f"; its tensor with the largest difference from the reference is {name} ({own[name]:.2g})"


def _judge_logits(found: Comparison, floor: float, section: Section) -> None:
    for one in found.logits:
        section.judge(
            not _exceeds(one, floor),
            f"logits from the same hidden states, {one.in_pass}",
            f"relative difference {one.computed.typical:.1e}, worst token {one.computed.worst:.1e}",
            f"{_bounds(one.rounding, floor).typical:.1e} and {_bounds(one.rounding, floor).worst:.1e}",
            "a difference in the final norm, the output head or the soft cap: compare output_norm.weight and"
            " token_embd.weight (weights)",
        )
        section.passed(
            f"logits through all layers, {one.in_pass}",
            f"argmax equal at {one.agreement:.1%} of positions, mean KL {one.mean_kl:.2g} nats",
            "quantization moves them: docs/quantization.md, docs/parity.md",
        )


def _find_outlier(
    found: Comparison, config: TextConfig, weight_errors: dict[str, float], section: Section
) -> None:
    """With the checkpoint's weights, layers differ alike, by what their types round."""
    own = [layer.with_checkpoint for layer in found.layers]
    if len(own) < 3:
        return
    i_layer = max(range(len(own)), key=lambda i: own[i])
    usual = max(_BY_CACHE["f32"], statistics.median(own))
    if own[i_layer] <= _STANDS_OUT * usual:
        section.passed(
            "each layer with the checkpoint's weights",
            f"differs by {min(own):.1e} to {max(own):.1e}",
            f"no layer by more than {_STANDS_OUT:g} times the median",
        )
        return
    kind = "sliding" if config.sliding[i_layer] else "full"
    section.fail(
        f"layer {i_layer} ({kind}) with the checkpoint's weights",
        f"differs by {own[i_layer]:.1e}, the median of all layers is {usual:.1e}",
        f"at most {_STANDS_OUT:g} times the median",
        f"its weights are not the checkpoint's{_worst_tensor(i_layer, weight_errors)}",
    )


def _table(found: Comparison, config: TextConfig, weight_errors: dict[str, float]) -> Table:
    heads = ["layer", *POINTS, "rounding alone", "checkpoint's weights", "experts turned"]
    heads += [f"accumulated, {name}" for name in PASSES]
    rows = [_row(i, layer, config) for i, layer in enumerate(found.layers)]
    if weight_errors:
        heads.append("tensor that differs most")
        for i, row in enumerate(rows):
            own = {name: e for name, e in weight_errors.items() if split_name(name)[1] == i}
            name = max(own, key=lambda each: own[each], default="")
            row.append(f"{name} {own[name]:.1e}" if name else "")
    return Table("Relative differences of the token of the middle, the largest of the passes", heads, rows)


def _row(i_layer: int, layer: LayerDifference, config: TextConfig) -> list[str]:
    row = [f"{i_layer} {'sliding' if config.sliding[i_layer] else 'full'}"]
    for name in POINTS:
        row.append(f"{max(p.computed.typical for p in layer.points if p.point == name):.1e}")
    row.append(f"{max(p.rounding.typical for p in layer.points if p.point == 'output'):.1e}")
    row += [f"{layer.with_checkpoint:.1e}", f"{layer.flips:.1f}%"]
    return row + [f"{layer.accumulated[name]:.1e}" for name in PASSES]


CHECKS = (check,)
