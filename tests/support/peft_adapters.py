"""Random adapters on the reference: made, saved and applied by PEFT. Needs torch, transformers and peft.

``native_targets`` is the tests' own map from PEFT's modules to tensors of a GGUF, written apart from the
package's, so that a mistake there shows.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from reference.random_checkpoint import bell
from safetensors.torch import load_file, save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")  # of the dense MLPs and of self-conditioning
ROUTER = ("router.proj",)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
#: Size of a change relative to its matrix: plain in the logits, and no more chaotic than the model itself.
STRENGTH = 0.3

_LAYERS = {"encoder": r"encoder\.language_model\.layers", "decoder": r"decoder\.(layers|self_conditioning)"}
_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "router.proj": "ffn_gate_inp",
    "experts.gate_up_proj": "ffn_gate_up_exps",
    "experts.down_proj": "ffn_down_exps",
}

#: (tensor without ".weight", side, A, scaled B), as the native adapter takes them.
NativeTarget = tuple[str, str, np.ndarray, np.ndarray]


def make_adapter(
    model: Any,
    folder: Path,
    *,
    seed: int,
    modules: Sequence[str] = (*ATTENTION, *DENSE, *ROUTER),
    parameters: Sequence[str] = EXPERTS,
    sides: Sequence[str] = ("encoder", "decoder"),
    alike: bool = False,
    strength: float = STRENGTH,
    r: int = 4,
    lora_alpha: int = 6,
    **options: Any,
) -> Path:
    """Save a random adapter of ``model``, a fresh reference (which is left adapted): returns ``folder``.

    alike: the same values for both modes, as of one that was trained as a single set. options: of LoraConfig.
    """
    options |= {"r": r, "lora_alpha": lora_alpha}
    config = _config(model, modules, parameters, sides, options)
    with _quiet():
        adapted = get_peft_model(model, config)
        for name, layer in lora_layers(adapted):
            part = re.sub(r"encoder\.language_model|decoder", "", name) if alike else name
            _fill(layer, seed, part + getattr(layer, "parameter_name", ""), strength)
        adapted.save_pretrained(folder)
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns that it ignores an expert's ``rank_pattern``, which it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _config(
    model: Any,
    modules: Sequence[str],
    parameters: Sequence[str],
    sides: Sequence[str],
    options: Mapping[str, Any],
) -> LoraConfig:
    """One that PEFT applies to those sides alone, and never to the vision tower."""
    what = "|".join(re.escape(module) for module in modules)
    where = "|".join(_LAYERS[side] for side in sides)
    whole = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name.endswith(tuple(parameters)) and re.search(where, name)
    ]
    return LoraConfig(
        target_modules=rf".*\.({where})\..*?({what})" if modules else [],
        target_parameters=(list(parameters) if len(sides) == 2 else whole) or None,
        **options,
    )


def lora_layers(adapted: Any) -> Iterator[tuple[str, LoraLayer]]:
    """PEFT's layers with their names, those of an expert's two parameters too."""
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _fill(layer: LoraLayer, seed: int, name: str, strength: float) -> None:
    """Random A and B that, multiplied and scaled, are ``strength`` times as large as the base weight."""
    (adapter,) = layer.lora_A
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    base = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    n_in, r = a.shape[1], layer.r[adapter]
    size = strength * float(base.detach().std()) * n_in**0.5 / (layer.scaling[adapter] * r**0.5)
    with torch.no_grad():
        a.copy_(torch.from_numpy(bell(seed, name + ".A", tuple(a.shape), n_in**-0.5)))
        b.copy_(torch.from_numpy(bell(seed, name + ".B", tuple(b.shape), size)))


def write_shared(folder: Path, target: Path) -> Path:
    """Save an adapter of alike sides as one that was trained as a single set, the way NeMo does.

    folder: as ``make_adapter(alike=True)`` saved it, which stays the reference. Returns ``target``.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    shared = {
        name.replace("model.model.decoder.", "model.model."): tensor
        for name, tensor in tensors.items()
        if ".encoder." not in name
    }
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    modules = {re.sub(r"base_model\.model\.(.*)\.lora_[AB]\.weight", r"\1", name) for name in shared}
    kept = {key: config[key] for key in ("peft_type", "r", "lora_alpha", "use_dora", "bias")}
    target.mkdir(parents=True)
    (target / "adapter_config.json").write_text(
        json.dumps(kept | {"task_type": "CAUSAL_LM", "target_modules": sorted(modules)}), encoding="utf-8"
    )
    save_file(shared, target / "adapter_model.safetensors")
    return target


def apply_adapters(model: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    """Have PEFT load saved adapters onto ``model``, a fresh reference, all at once; returns PEFT's model.

    The reference given computes with them from now on.
    """
    names = [f"adapter{i}" for i in range(len(adapters))]
    with _quiet():
        adapted = PeftModel.from_pretrained(model, adapters[0][0], adapter_name=names[0])
        for name, (folder, _) in zip(names[1:], adapters[1:], strict=True):
            adapted.load_adapter(folder, name)
    adapted.base_model.set_adapter(names)
    for _, layer in lora_layers(adapted):
        for name, (_, scale) in zip(names, adapters, strict=True):
            if name in layer.scaling:
                layer.set_scale(name, scale)
    return adapted.eval()


@contextmanager
def rounded_factors(adapted: Any) -> Iterator[None]:
    """While open, all A and B of an adapted model have the values of BF16."""
    parameters = [p for _, layer in lora_layers(adapted) for p in _factors(layer)]
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16).float()
    try:
        yield
    finally:
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.data = values


def _factors(layer: LoraLayer) -> Iterator[torch.nn.Parameter]:
    for linears in (layer.lora_A, layer.lora_B):
        yield from (linear.weight for linear in linears.values())


def native_targets(adapted: Any, adapter: str = "adapter0") -> Iterator[NativeTarget]:
    """What an adapter that PEFT has loaded changes, at scale 1 (``apply_adapters`` with 1.0)."""
    for name, layer in lora_layers(adapted):
        if adapter not in layer.lora_A:
            continue
        a = layer.lora_A[adapter].weight.detach().numpy()
        b = layer.lora_B[adapter].weight.detach().numpy()
        module = name.removesuffix(".base_layer")
        if isinstance(layer, ParamWrapper):
            n, module = layer.num_experts, f"{module.removesuffix('.base_layer')}.{layer.parameter_name}"
            a = a.reshape(n, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, n).transpose(2, 0, 1)
        scaled = np.float32(layer.scaling[adapter]) * b
        yield (*tensor_and_side(module), np.ascontiguousarray(a), np.ascontiguousarray(scaled))


def tensor_and_side(module: str) -> tuple[str, str]:
    """The GGUF's tensor of a module or parameter of the reference, and the mode in which that one is used."""
    if match := re.search(r"decoder\.self_conditioning\.(gate|up|down)_proj$", module):
        return f"self_cond_{match[1]}", "decoder"
    match = re.search(r"(encoder\.language_model|decoder)\.layers\.(\d+)\.(.+)$", module)
    if match is None:
        raise KeyError(f"no tensor of a GGUF is the reference's {module}")
    return f"blk.{match[2]}.{_TENSORS[match[3]]}", "decoder" if match[1] == "decoder" else "encoder"


def merged_apart(model: Any, adapters: Sequence[tuple[Sequence[NativeTarget], float]]) -> Any:
    """Add adapters to the weights of ``model``, a fresh reference, each mode's to weights of its own.

    PEFT's own merge adds both modes' to the weights that the two share. Returns ``model``.
    """
    weights = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if "vision" in name or not re.search(r"(_proj|router\.proj\.weight|_proj\.weight)$", name):
            continue
        module, _, attribute = name.rpartition(".")
        own = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
        setattr(model.get_submodule(module), attribute, own)
        weights[tensor_and_side(name.removesuffix(".weight"))] = own
    for targets, scale in adapters:
        for tensor, side, a, b in targets:
            weights[tensor, side] += torch.from_numpy(np.matmul(b, a) * np.float32(scale))
    return model
