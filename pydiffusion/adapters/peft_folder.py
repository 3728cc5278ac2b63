"""Read an adapter folder of PEFT, which Unsloth, NeMo and others write too.

Names of modules decide what a pair changes: ``decoder.layers`` and ``encoder.language_model.layers`` of
transformers are one mode each, ``layers`` without either (NeMo) serves both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from pydiffusion.adapters.adapter import Adapter, Factors, Target
from pydiffusion.adapters.folder_files import CONFIG, open_tensors
from pydiffusion.adapters.mlx_folder import is_mlx, read_mlx_folder
from pydiffusion.adapters.peft_settings import PeftSettings, read_settings
from pydiffusion.adapters.stored import (
    FLOATS,
    Change,
    PairRead,
    Stored,
    adapter_errors,
    has_no_effect,
    make_adapter,
    tensor_error,
)
from pydiffusion.convert.architectures.architecture import Matrices, Matrix
from pydiffusion.convert.checkpoint.strict_json import Fields, read_json_object

_MAX_CONFIG = 64 << 20  # bytes
_BASE = "base_model.model."
_NEMO = "automodel_peft_config.json"  # which NeMo writes beside PEFT's files
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<name>[^.]+))?\.weight", re.DOTALL)
# Parts of a path that come from wrapping a model for training.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
# Tensors that are no pairs of LoRA: a pattern, what they are, and what to do.
_OTHER_TENSORS = (
    (r".*\.lora_magnitude_vector(?:\..*)?", "DoRA's magnitudes", "train without use_dora"),
    (r".*\.lora_[AB](?:\..*)?\.bias", "a trained bias", "train with lora_bias=False and bias='none'"),
    (r".*\.lora_embedding_[AB](?:\..*)?", "LoRA of an embedding", "train without embed_tokens"),
    (r".*\.lora_(?:E|diag|ranknum)(?:\..*)?", "of another method than LoRA", "train a plain LoRA"),
    (r".*trainable_tokens_.*", "trained token embeddings", "train without them"),
    (r".*\.lora_(?:gate_and_up|down)_[AB]", "experts in NeMo's own layout", "train attention and dense MLP"),
    (r".*\.bias", "a trained bias", "train with bias='none'"),
    (
        r"(?!.*\.lora_).*\.(?:modules_to_save\..*|weight|scale|per_expert_scale|layer_scalar)",
        "a weight trained as a whole",
        "train without modules_to_save and embedding layers",
    ),
)


# Module's path in the model -> its "A" and "B".
_Pairs = Mapping[str, Mapping[str, Stored]]


def read_peft_folder(folder: Path, matrices: Matrices, name: str = "") -> Adapter:
    """Read a folder with ``adapter_config.json``, of PEFT or MLX.

    matrices: of the model that it is for. name: for people; empty: the folder's.
    Raises AdapterError, naming the file and the tensor or key.
    """
    name = name or folder.absolute().name
    with adapter_errors(folder):
        notes: list[str] = []
        fields = Fields(
            read_json_object(folder / CONFIG, _MAX_CONFIG), str(folder / CONFIG), notes, null_is_missing=True
        )
        if is_mlx(fields):
            return read_mlx_folder(folder, fields, matrices, name)
        settings = read_settings(fields, notes)
        notes += _of_another_model(settings)
        tensors = open_tensors(folder)
        pairs = _pairs(tensors)
        shared = _is_shared(folder, pairs, notes)
        changes = list(_changes(pairs, settings, matrices, shared, notes))
        return make_adapter(name, folder, changes, matrices, settings.shown, notes)


def _of_another_model(settings: PeftSettings) -> list[str]:
    """A note if the adapter was trained on an autoregressive Gemma, whose names and sizes may be the same."""
    base = settings.shown.get("base_model_name_or_path")
    name = base.lower().replace("_", "-") if isinstance(base, str) else ""
    is_other = re.search(r"gemma-?[1-4]", name) is not None and "diffusion" not in name
    return [f"it was trained on {base:.200}, which is no diffusion model"] if is_other else []


def _is_shared(folder: Path, pairs: _Pairs, notes: list[str]) -> bool:
    """Whether ``decoder.layers`` serve both modes: NeMo has one stack of layers, and names it so in some
    versions.
    """
    of_encoder = any(".encoder." in f".{module}" for module in pairs)
    of_decoder = any(".decoder.layers." in f".{module}" for module in pairs)
    if of_encoder or not of_decoder or not (folder / _NEMO).is_file():
        return False
    notes.append(f"{_NEMO} is there: NeMo trains one set, so that of the decoder is taken for both modes")
    return True


def _pairs(tensors: Mapping[str, Stored]) -> _Pairs:
    """Raises AdapterError for anything but whole pairs."""
    pairs: dict[str, dict[str, Stored]] = {}
    names: dict[str | None, str] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise tensor_error(tensor.path, key, _what_is(key))
        first = names.setdefault(match["name"], key)
        if len(names) > 1:
            second = next(found for found in names.values() if found != first)
            raise tensor_error(tensor.path, key, f"is of another adapter than {second!r:.300}: save one")
        module = match["module"]
        while module.startswith(_BASE):  # twice, of a model that was wrapped twice
            module = module.removeprefix(_BASE)
        module = _WRAPPERS.sub("", module)
        other = pairs.setdefault(module, {}).setdefault(match["part"], tensor)
        if other is not tensor:
            raise tensor_error(tensor.path, key, f"is of the same module as {other.key!r:.300}")
    for pair in pairs.values():
        for part, missing in (("A", "B"), ("B", "A")):
            if missing not in pair:
                found = pair[part]
                raise tensor_error(found.path, found.key, f"has no lora_{missing} beside it: save it again")
    return pairs


def _what_is(key: str) -> str:
    for pattern, what, advice in _OTHER_TENSORS:
        if re.fullmatch(pattern, key, re.DOTALL):
            return f"is {what}, which is not supported: {advice}"
    return "is no lora_A.weight or lora_B.weight of a module"


def _changes(
    pairs: _Pairs,
    settings: PeftSettings,
    matrices: Matrices,
    shared: bool,
    notes: list[str],
) -> Iterator[Change]:
    dropped: dict[str, int] = {}
    for module, pair in pairs.items():
        a, b = pair["A"], pair["B"]
        parameter = _parameter(module, pairs, settings, matrices)
        path = parameter or module
        place = matrices.place(path.removeprefix("model."), shared)
        if place is None:
            what = matrices.other(module.removeprefix("model."))
            _require_floats(a, b)
            if what and has_no_effect(a, b):
                dropped[what] = dropped.get(what, 0) + 1
                continue
            raise tensor_error(a.path, a.key, _why_not(what))
        target = Target(place.tensor, place.side)
        yield _change(target, path, a, b, settings, matrices, notes)
    notes += [f"{n} pairs of {what} were not trained, and are left out" for what, n in dropped.items()]


def _why_not(what: str) -> str:
    if not what:
        return "is of no matrix of this model: is the adapter for another model?"
    return (
        f"changes {what}, which is not supported: train with target_modules of the text model's attention, "
        "MLP, experts, router and self-conditioning"
    )


def _require_floats(*tensors: Stored) -> None:
    for tensor in tensors:
        if tensor.dtype not in FLOATS:
            raise tensor_error(
                tensor.path, tensor.key, f"is stored as {tensor.dtype}; save it as {', '.join(FLOATS)}"
            )
        if len(tensor.shape) < 2 or 0 in tensor.shape:
            raise tensor_error(
                tensor.path,
                tensor.key,
                f"has the shape {list(tensor.shape)}, part of a matrix only: gather the shards before saving",
            )


def _parameter(module: str, pairs: _Pairs, settings: PeftSettings, matrices: Matrices) -> str | None:
    """The path of the parameter that a pair on experts is for; None for any other module.

    PEFT wraps a module once per parameter, in their order: of two, gate_up_proj is the inner one.
    """
    inner = module.removesuffix(".base_layer")
    if not inner.endswith(".experts"):
        return None
    first, second = f"{inner}.gate_up_proj", f"{inner}.down_proj"
    if inner != module:
        return first
    if f"{inner}.base_layer" in pairs:
        return second
    named = [path for path in (first, second) if settings.is_parameter(path)]
    a, b = pairs[module]["A"], pairs[module]["B"]
    if len(named) != 1:
        named = [path for path in (first, second) if _fits(path, a, b, settings, matrices)]
    if len(named) == 1:
        return named[0]
    raise tensor_error(
        a.path,
        a.key,
        f"is of the experts' gate_up_proj or down_proj, and target_parameters of {CONFIG} doesn't say which",
    )


def _fits(path: str, a: Stored, b: Stored, settings: PeftSettings, matrices: Matrices) -> bool:
    """Whether a pair on experts has the sizes of a parameter of the model."""
    place = matrices.place(path.removeprefix("model."))
    matrix = None if place is None else matrices.matrix(place.tensor)
    if matrix is None or matrix.shape is None or len(a.shape) != 2 or len(b.shape) != 2:
        return False
    n_experts = matrix.shape[0]
    return (settings.swaps_experts is not True and matrix.fits((n_experts, b.shape[0], a.shape[1]))) or (
        settings.swaps_experts is not False and matrix.fits((n_experts, a.shape[1], b.shape[0]))
    )


def _change(
    target: Target,
    path: str,
    a: Stored,
    b: Stored,
    settings: PeftSettings,
    matrices: Matrices,
    notes: list[str],
) -> Change:
    _require_floats(a, b)
    keys = (a.key, b.key)
    matrix = matrices.matrix(target.tensor)
    if settings.is_parameter(f"{path}.weight"):  # has the module's keys, but patterns see the parameter
        path += ".weight"
    rank = settings.rank(path)
    of_experts = matrix is not None and matrix.of_experts
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise tensor_error(a.path, a.key, f"is {list(a.shape)}, B {list(b.shape)}; PEFT saves matrices")
    if a.shape[0] != b.shape[1]:
        raise tensor_error(
            a.path, a.key, f"is {list(a.shape)}, {b.key!r:.300} {list(b.shape)}: their ranks differ"
        )
    n_experts = (matrices.n_experts or a.shape[0] // rank) if of_experts else 1
    if a.shape[0] != rank * n_experts:
        each = f" for each of {n_experts} experts" if of_experts else ""
        raise tensor_error(
            a.path,
            a.key,
            f"has {a.shape[0]} rows, but r of {settings.file} is {rank}{each}: the two don't belong together",
        )
    scale = settings.scale(path, notes)
    if of_experts:
        factors = _of_experts(a, b, n_experts, scale, _are_swapped(a, b, n_experts, settings, matrix))
    else:
        factors = Factors(a.shape, b.shape, scale, PairRead(a, b))
    return Change(target, factors, keys, a.path)


def _are_swapped(a: Stored, b: Stored, n_experts: int, settings: PeftSettings, matrix: Matrix | None) -> bool:
    """Whether A has the outputs and B the inputs: PEFT before 0.19.1 took experts' matrices as transposed."""
    straight, swapped = (n_experts, b.shape[0], a.shape[1]), (n_experts, a.shape[1], b.shape[0])
    if settings.swaps_experts is not None or matrix is None or matrix.shape is None:
        return bool(settings.swaps_experts)
    if matrix.shape in (straight, swapped):
        return matrix.shape != straight
    return matrix.fits(swapped) and not matrix.fits(straight)


def _of_experts(a: Stored, b: Stored, n_experts: int, scale: float, swapped: bool) -> Factors:
    """Factors of a pair on experts: in A an expert's rows are together, in B a rank's values of all."""
    rank = a.shape[0] // n_experts
    if swapped:
        read = PairRead(b, a, partial(_from_b, n_experts, False), partial(_from_a, n_experts, True))
        return Factors((n_experts, rank, b.shape[0]), (n_experts, a.shape[1], rank), scale, read)
    read = PairRead(a, b, partial(_from_a, n_experts, False), partial(_from_b, n_experts, True))
    return Factors((n_experts, rank, a.shape[1]), (n_experts, b.shape[0], rank), scale, read)


def _from_a(n_experts: int, rank_last: bool, a: np.ndarray) -> np.ndarray:
    """(n_expert * r, n) -> (n_expert, r, n), or (n_expert, n, r)."""
    values = a.reshape(n_experts, -1, a.shape[1])
    return values.transpose(0, 2, 1) if rank_last else values


def _from_b(n_experts: int, rank_last: bool, b: np.ndarray) -> np.ndarray:
    """(n, r * n_expert) -> (n_expert, n, r), or (n_expert, r, n)."""
    values = b.reshape(b.shape[0], -1, n_experts)
    return values.transpose(2, 0, 1) if rank_last else values.transpose(2, 1, 0)
