"""Differences between the runtime's layers and the reference's, with what rounding alone explains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .layer_trace import CANVAS, CONDITIONED, ENCODER, POINTS, TracedPass
from .weight_readers import WeightReader

PASSES = (ENCODER, CANVAS, CONDITIONED)


@dataclass(frozen=True)
class Errors:
    """Relative errors of tokens: the median, and the largest."""

    typical: float
    worst: float

    @classmethod
    def between(cls, ours: np.ndarray, theirs: np.ndarray, counted: np.ndarray | None = None) -> Errors:
        """|ours - theirs| / |theirs| of every token, of the counted ones if given; NaN counts as infinite."""
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        error = np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-30)
        error = np.nan_to_num(error, nan=np.inf)
        if counted is not None:
            error = error[counted]
        return cls(float(np.median(error)), float(error.max())) if len(error) else cls(0.0, 0.0)


@dataclass(frozen=True)
class PointDifference:
    """A value within a layer, from the same input and with the file's own weights in the reference.

    computed: the difference; rounding: what the matmuls' rounding of activations does to the reference.
    """

    i_layer: int
    in_pass: str
    point: str
    computed: Errors
    rounding: Errors


@dataclass
class LayerDifference:
    """A layer's differences. ``flips``: tokens that went to other experts than the reference's, in percent.

    with_checkpoint: typical error of the output from the same input, with the checkpoint's weights in the
    reference. accumulated: by pass, that of the output, from the reference's own input.
    """

    points: list[PointDifference] = field(default_factory=list)
    flips: float = 0.0
    with_checkpoint: float = 0.0
    accumulated: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LogitsDifference:
    """Logits of a pass: of the head alone, from the same hidden states; and accumulated over all layers."""

    in_pass: str
    computed: Errors
    rounding: Errors
    agreement: float
    mean_kl: float


@dataclass
class Comparison:
    """All differences. ``inputs``: of the first layer, with the checkpoint's weights, by pass."""

    inputs: list[PointDifference] = field(default_factory=list)
    layers: list[LayerDifference] = field(default_factory=list)
    logits: list[LogitsDifference] = field(default_factory=list)


class Comparer:
    """Compares traced passes with a reference (``layer_reference.LayerReference``), layer by layer.

    Every layer runs three times in the reference: with the checkpoint's weights, at once from the reference's
    own hidden states and from the runtime's; with the file's weights, from the runtime's; and so again, with
    activations rounded as matmuls round them.
    """

    def __init__(
        self,
        reference: Any,
        passes: dict[str, TracedPass],
        checkpoint: WeightReader,
        file: WeightReader,
        rounding: Any,
    ) -> None:
        import torch

        self._torch = torch
        self._reference, self._passes, self._rounding = reference, passes, rounding
        self._checkpoint, self._file = checkpoint, file
        self._free: list[Any] = []  # the reference's own hidden states, by pass: (n, d)

    def embed(self) -> list[PointDifference]:
        """Compare the inputs of the first layer."""
        found = []
        with self._torch.no_grad():
            for name in PASSES:
                self._free.append(self._embed(self._checkpoint, name))
                exact = self._embed(self._file, name).numpy()
                rounded = self._embed(self._file, name, self._rounding).numpy()
                computed = Errors.between(self._passes[name].inputs, exact)
                found.append(PointDifference(-1, name, "input", computed, Errors.between(rounded, exact)))
        return found

    def _embed(self, weights: WeightReader, name: str, rounding: Any = None) -> Any:
        one = self._passes[name]
        if name == ENCODER:
            return self._reference.embed(weights, one.ids)
        return self._reference.embed_canvas(weights, one.ids, one.conditioning, rounding)

    def layer(self, i_layer: int) -> LayerDifference:
        """Compare the next layer; call it for every layer in order."""
        from .layer_reference import softmax_of_scores

        ours = [self._torch.from_numpy(self._passes[name].layer_input(i_layer)) for name in PASSES]
        result = LayerDifference()
        layer = self._reference.layer(self._checkpoint, i_layer)
        both = [self._torch.stack(pair) for pair in zip(self._free, ours, strict=True)]
        found = layer.run(both[0], both[1:])
        self._free = [points["output"][0] for points in found]
        of_checkpoint = [points["output"][1].numpy() for points in found]
        del layer, both, found  # before the next layer's weights are read
        layer = self._reference.layer(self._file, i_layer)
        inputs = [x[None] for x in ours]
        exact = [_numpy(points) for points in layer.run(inputs[0], inputs[1:])]
        rounded = exact
        if self._rounding is not None:
            rounded = [_numpy(points) for points in layer.run(inputs[0], inputs[1:], self._rounding)]
        turned, total = 0, 0
        for i, name in enumerate(PASSES):
            seen = dict(self._passes[name].points[i_layer])
            seen["router"] = softmax_of_scores(seen["router"], seen["output"].shape[1])
            same = self._same_experts(seen["router"], exact[i]["router"])
            same_rounded = self._same_experts(rounded[i]["router"], exact[i]["router"])
            turned, total = turned + int((~same).sum()), total + len(same)
            for point in POINTS:
                of_all = point != "output"
                result.points.append(
                    PointDifference(
                        i_layer,
                        name,
                        point,
                        Errors.between(seen[point], exact[i][point], None if of_all else same),
                        Errors.between(rounded[i][point], exact[i][point], None if of_all else same_rounded),
                    )
                )
            own = Errors.between(seen["output"], of_checkpoint[i])
            result.with_checkpoint = max(result.with_checkpoint, own.typical)
            result.accumulated[name] = Errors.between(seen["output"], self._free[i].numpy()).typical
        result.flips = 100 * turned / total
        return result

    def _same_experts(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether each token goes to the same experts: bool (n,)."""
        k = self._reference.n_expert_used
        chosen = [np.sort(np.argpartition(-p, k - 1, axis=-1)[:, :k], axis=-1) for p in (a, b)]
        return (chosen[0] == chosen[1]).all(axis=-1)

    def logits(self) -> list[LogitsDifference]:
        """Compare the logits, after all layers."""
        found = []
        with self._torch.no_grad():
            for i, name in enumerate(PASSES):
                one = self._passes[name]
                if one.logits is None:
                    continue
                hidden = self._torch.from_numpy(one.points[-1]["output"])
                exact = self._reference.head(self._file, hidden)
                rounded = exact
                if self._rounding is not None:
                    rounded = self._reference.head(self._file, hidden, self._rounding)
                free = self._reference.head(self._checkpoint, self._free[i])
                found.append(
                    LogitsDifference(
                        name,
                        Errors.between(one.logits, exact),
                        Errors.between(rounded, exact),
                        float((one.logits.argmax(-1) == free.argmax(-1)).mean()),
                        _mean_kl(free, one.logits),
                    )
                )
        return found


def _numpy(points: dict[str, Any]) -> dict[str, np.ndarray]:
    """The first of a batch, as arrays (n, width)."""
    return {name: values[0].numpy() for name, values in points.items()}


def _mean_kl(reference: np.ndarray, ours: np.ndarray) -> float:
    """Mean over rows of KL(softmax(reference) || softmax(ours)), in nats."""
    total = 0.0
    for p_row, q_row in zip(reference, ours, strict=True):  # row by row: rows are long
        p, q = (_log_softmax(row.astype(np.float64)) for row in (p_row, q_row))
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(reference)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())
