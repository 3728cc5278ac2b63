"""The matrices of this architecture that adapters can change: modules, tensors and sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydiffusion.convert.architectures.architecture import Matrix, Mode, Place
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import (
    ARCHITECTURE,
    DECODER,
    ENCODER,
    GLOBAL,
    LAYER,
)
from pydiffusion.errors import AdapterError

_OF_LAYER = (
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_inp",
    "ffn_gate_up_exps", "ffn_down_exps",
)  # fmt: skip
_OF_MODEL = ("self_cond_gate", "self_cond_up", "self_cond_down")
# Kind of tensor -> its module below a layer (or the decoder), and its dimensions by name.
_KINDS = {
    name.removesuffix(".weight"): (source.removeprefix(DECODER).removesuffix(".weight"), dimensions)
    for source, name, dimensions in (*LAYER, *GLOBAL)
    if name.removesuffix(".weight") in (*_OF_LAYER, *_OF_MODEL)
}
# Gate and up of experts in two matrices, which only GGUF files of other converters have.
_SPLIT: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {"ffn_gate_exps": ("", ("e", "xf", "d")), "ffn_up_exps": ("", ("e", "xf", "d"))}
)
_KIND_OF_MODULE = {module: kind for kind, (module, _) in _KINDS.items()} | {
    "moe.gate.proj": "ffn_gate_inp"  # as NeMo names the router
}
# Dimensions that are feed-forward lengths, which files may have padded, and of how many.
_PADDED = MappingProxyType({"ff": 1, "xf": 1, "2xf": 2})
# Modules that exist, but that no adapter can change here: a pattern of the path, and what they are.
_OTHERS = (
    (r"(?:.*\.)?(?:vision_tower|vision_model)(?:\..*)?", "the vision tower"),
    (r"(?:.*\.)?embed_vision(?:\..*)?", "the projector of images"),
    (r"(?:.*\.)?embed_tokens(?:\..*)?", "the token embedding"),
    (r"(?:.*\.)?lm_head(?:\..*)?", "the output head"),
    (r"(?:.*\.)?(?:\w*norm\w*)", "a norm"),
    (r"language_model\.layers\..*", "a layer named as in Gemma 4, another model"),
    (r"(?:.*\.)?layers\.\d+\.moe\.experts(?:\..*)?", "experts in NeMo's own layout"),
    (r"(?:.*\.)?layers\.\d+\.experts\.\d+\..*", "an expert by itself (only all of a layer's, in one tensor)"),
)
_LAYER_PATH = re.compile(r"layers\.(0|[1-9]\d{0,4})\.(.+)")
_TENSOR = re.compile(r"(?:blk\.(0|[1-9]\d{0,4})\.)?(\w+)")


class DiffusionGemmaMatrices:
    """The matrices that adapters can change. ``keys``: metadata of the GGUF that they are for; None: of any
    size.
    """

    architecture = ARCHITECTURE

    def __init__(self, keys: Mapping[str, Any] | None):
        self._sizes = None if keys is None else _Sizes(keys)
        self.n_experts = None if self._sizes is None else self._sizes.all["e"]

    def place(self, module: str, shared: bool = False) -> Place | None:
        """The place of a module's path in transformers, without ``model.`` before it; None if it is no matrix
        that can be adapted. ``shared``: ``decoder.layers`` serve both modes, as in MLX.
        """
        side: Mode = "both"
        if module.startswith(ENCODER):
            module, side = module.removeprefix(ENCODER), "encoder"
        elif module.startswith(DECODER):
            module, side = module.removeprefix(DECODER), "both" if shared else "decoder"
        match = _LAYER_PATH.fullmatch(module)
        kind = _KIND_OF_MODULE.get(match[2] if match else module)
        if kind is None or (kind in _OF_MODEL) != (match is None):
            return None
        if match is None:
            return None if side == "encoder" else Place(kind, "decoder")
        return Place(f"blk.{match[1]}.{kind}", side)

    def other(self, module: str) -> str:
        """Describe a module that has no :meth:`place`; empty if unknown."""
        return next((what for pattern, what in _OTHERS if re.fullmatch(pattern, module)), "")

    def module(self, tensor: str, side: str) -> str:
        """The path of a tensor's module in transformers, below ``model.``: the inverse of :meth:`place`."""
        layer, kind = self._split(tensor)
        below = _KINDS[kind][0] if kind in _KINDS else kind.removesuffix("_exps").replace("ffn_", "experts.")
        prefix = {"encoder": ENCODER, "decoder": DECODER, "both": ""}[side]
        return f"{DECODER}{below}" if layer is None else f"{prefix}layers.{layer}.{below}"

    def matrix(self, tensor: str) -> Matrix | None:
        """Sizes of a tensor; None if it is no matrix of this model that can be adapted."""
        match = _TENSOR.fullmatch(tensor)
        kind = match[2] if match else ""
        if match is None or kind not in (_OF_MODEL if match[1] is None else (*_OF_LAYER, *_SPLIT)):
            return None
        dimensions = (_KINDS.get(kind) or _SPLIT[kind])[1]
        layer = None if match[1] is None else int(match[1])
        shape = None
        if self._sizes is not None:
            if layer is not None and not self._sizes.has(kind, layer):
                return None
            sizes = self._sizes.of_layer(layer)
            shape = tuple(sizes[dimension] for dimension in dimensions)
        padded = tuple(_PADDED.get(dimension, 0) for dimension in dimensions[-2:])
        return Matrix(shape, (padded[0], padded[1]), dimensions[0] == "e" and len(dimensions) == 3)

    def missing(self, tensor: str) -> str:
        """Why a tensor that other models of this architecture have is not in this one; empty if unknown."""
        layer, kind = self._split(tensor)
        if self._sizes is None or layer is None or self._sizes.has(kind, layer):
            return ""
        if layer >= self._sizes.n_layers:
            return f"the model has {self._sizes.n_layers} layers, numbered from 0"
        return f"layer {layer} of this model has no v_proj (its keys are its values)"

    def is_used(self, tensor: str, side: str) -> bool:
        """Whether a tensor is used in a mode: self-conditioning only in the decoder's."""
        return self._split(tensor)[0] is not None or side == "decoder"

    @staticmethod
    def _split(tensor: str) -> tuple[int | None, str]:
        match = _TENSOR.fullmatch(tensor)
        if match is None:
            return None, ""
        return None if match[1] is None else int(match[1]), match[2]


class _Sizes:
    """Sizes by the names of the tables, from a GGUF's metadata."""

    def __init__(self, keys: Mapping[str, Any]):
        self._keys = keys
        self.n_layers = self._number("block_count")
        self._heads = self._per_layer("attention.head_count")
        self._kv_heads = self._per_layer("attention.head_count_kv")
        self._sliding = self._read_pattern()
        xf = self._number("expert_feed_forward_length")
        self.all = {
            "d": self._number("embedding_length"),
            "ff": self._number("feed_forward_length"),
            "e": self._number("expert_count"),
            "xf": xf,
            "2xf": 2 * xf,
        }

    def _key(self, name: str) -> Any:
        key = f"{ARCHITECTURE}.{name}"
        if key not in self._keys:
            raise AdapterError(f"the model's metadata has no key {key!r}: is it a whole model?")
        return self._keys[key]

    def _number(self, name: str) -> int:
        return self._checked(name, self._key(name))

    def _checked(self, name: str, value: Any) -> int:
        if type(value) not in (int, bool) or not 0 <= value < 2**31:
            raise AdapterError(f"the model's metadata has {value!r:.60} in '{ARCHITECTURE}.{name}'")
        return int(value)

    def _per_layer(self, name: str) -> list[int]:
        value = self._key(name)
        values = value if isinstance(value, list) else [value] * self.n_layers
        if len(values) != self.n_layers:
            raise AdapterError(
                f"the model's metadata has {len(values)} values in '{ARCHITECTURE}.{name}', for "
                f"{self.n_layers} layers"
            )
        return [self._checked(name, item) for item in values]

    def _read_pattern(self) -> list[bool]:
        """Whether each layer is a sliding one: a bool per layer, or a period whose last layer is full."""
        name = "attention.sliding_window_pattern"
        flags = self._per_layer(name)
        if isinstance(self._key(name), list):
            return [bool(flag) for flag in flags]
        return [period < 1 or (i + 1) % period != 0 for i, period in enumerate(flags)]

    def has(self, kind: str, layer: int) -> bool:
        return layer < self.n_layers and (kind != "attn_v" or self._sliding[layer])

    def of_layer(self, layer: int | None) -> dict[str, int]:
        if layer is None:
            return self.all
        head = self._number("attention.key_length_swa" if self._sliding[layer] else "attention.key_length")
        return self.all | {"q": self._heads[layer] * head, "kv": self._kv_heads[layer] * head}
