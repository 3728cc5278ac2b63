"""The reference's side of the comparison: transformers' layers, built one at a time.

Only this module needs torch and transformers. The weights of one layer are in memory at a time, so that a
checkpoint of 52 GB can be compared on a machine of 24 GB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, DynamicCache
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling
from transformers.utils import logging

from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import DECODER, EMBEDDING, ENCODER

from .weight_readers import WeightReader

_CONDITIONING = f"{DECODER}self_conditioning."

#: Rounds activations (..., n_inner) as a matmul does.
Rounding = Callable[[torch.Tensor], torch.Tensor]


class LayerReference:
    """The reference of a checkpoint folder, float32 and eager. Raises OSError or ValueError for a folder that
    transformers does not take.
    """

    def __init__(self, folder: Path) -> None:
        logging.set_verbosity_error()
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        self._config = AutoConfig.from_pretrained(folder, **eager)
        if self._config.model_type != "diffusion_gemma":
            raise ValueError(f"the reference is a {self._config.model_type}, not a diffusion_gemma")
        self._text = self._config.text_config
        self.layer_types: list[str] = self._text.layer_types
        self.n_expert_used: int = self._text.top_k_experts
        self._rope = modeling.DiffusionGemmaTextRotaryEmbedding(self._text)

    def embed(self, weights: WeightReader, ids: np.ndarray) -> torch.Tensor:
        """Scaled embedding rows of tokens: (n, d)."""
        needed, places = np.unique(ids, return_inverse=True)
        scale = self._text.hidden_size**0.5
        module = modeling.DiffusionGemmaTextScaledWordEmbedding(len(needed), self._text.hidden_size, 0, scale)
        module.weight.data = torch.from_numpy(weights.read_rows(EMBEDDING, needed.tolist()))
        return module(torch.from_numpy(places.reshape(-1)))

    def embed_canvas(
        self,
        weights: WeightReader,
        ids: np.ndarray,
        conditioning: np.ndarray | None,
        rounding: Rounding | None = None,
    ) -> torch.Tensor:
        """Input of a canvas's first layer: (n, d)."""
        embedded = self.embed(weights, ids)
        soft = torch.zeros_like(embedded)
        if conditioning is not None:
            p = torch.from_numpy(conditioning).softmax(dim=-1)
            for first, rows in weights.chunks(EMBEDDING):
                soft += p[:, first : first + len(rows)] @ torch.from_numpy(rows)
            soft *= self._text.hidden_size**0.5
        with torch.device("meta"):
            module = modeling.DiffusionGemmaSelfConditioning(self._text)
        _fill(module, lambda name: weights.read(_CONDITIONING + name))
        with _rounding_linear(rounding, None):
            return module(embedded, soft)

    def head(
        self, weights: WeightReader, hidden: torch.Tensor, rounding: Rounding | None = None
    ) -> np.ndarray:
        """Soft-capped logits of hidden states (n, d) after the last layer: (n, n_vocab)."""
        with torch.device("meta"):
            norm = modeling.DiffusionGemmaRMSNorm(self._text.hidden_size, eps=self._text.rms_norm_eps)
        _fill(norm, lambda name: weights.read(f"{DECODER}norm.{name}"))
        x, cap = norm(hidden), self._text.final_logit_softcapping
        with _rounding_linear(rounding, None):
            parts = [
                torch.nn.functional.linear(x, torch.from_numpy(r)) for _, r in weights.chunks(weights.head)
            ]
        return (cap * torch.tanh(torch.cat(parts, dim=-1) / cap)).numpy()

    def layer(self, weights: WeightReader, i_layer: int) -> Layer:
        """One layer with its weights in memory."""
        with torch.device("meta"):
            encoder = modeling.DiffusionGemmaEncoderTextLayer(self._text, i_layer)
            decoder = modeling.DiffusionGemmaDecoderTextLayer(self._text, i_layer)
        prefix = f"{DECODER}layers.{i_layer}."
        read: dict[str, np.ndarray] = {}
        _fill(decoder, lambda name: read.setdefault(name, weights.read(prefix + name)))
        scalar = f"{ENCODER}layers.{i_layer}.layer_scalar"
        _fill(encoder, lambda name: weights.read(scalar) if name == "layer_scalar" else read[name])
        return Layer(self._config, self._rope, i_layer, encoder.eval(), decoder.eval())


class Layer:
    """One layer in both of its modes."""

    def __init__(self, config: Any, rope: Any, i_layer: int, encoder: Any, decoder: Any) -> None:
        self._config, self._rope, self._i = config, rope, i_layer
        self._encoder, self._decoder = encoder, decoder
        self._type = config.text_config.layer_types[i_layer]

    @torch.no_grad()
    def run(
        self, prompt: torch.Tensor, canvases: list[torch.Tensor], rounding: Rounding | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Values within the layer for a prompt and canvases after it, hidden states (batch, n, d) each.

        Per input, by the names of ``layer_trace.POINTS``: (batch, n, width); of the router, probabilities.
        """
        cache = DynamicCache(config=self._config.get_text_config(decoder=True))
        n = prompt.shape[1]
        with _rounding_linear(rounding, self._config.text_config.num_experts):
            found = [self._run(self._encoder, prompt, 0, cache, self._causal(prompt, cache))]
            found += [self._run(self._decoder, canvas, n, cache, None) for canvas in canvases]
        return found

    def _causal(self, prompt: torch.Tensor, cache: Any) -> torch.Tensor:
        batch, n, _ = prompt.shape
        masks = modeling.DiffusionGemmaEncoderModel.create_masks_for_generate(
            config=self._config,
            inputs_embeds=prompt,
            attention_mask=torch.ones((batch, n), dtype=torch.bool),
            past_key_values=cache,
            position_ids=torch.arange(n)[None],
        )
        return masks[self._type]

    def _run(
        self, module: Any, x: torch.Tensor, first: int, cache: Any, mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        positions = torch.arange(first, first + x.shape[1])[None]
        points: dict[str, torch.Tensor] = {}

        def before_mlp(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            points["attention"] = arguments[0].clone()

        def after(name: str, of: Callable[[Any], torch.Tensor]) -> Callable[..., None]:
            def keep(_module: Any, _arguments: Any, output: Any) -> None:
                points[name] = of(output).clone()

            return keep

        hooks = [
            module.pre_feedforward_layernorm.register_forward_pre_hook(before_mlp),
            module.mlp.register_forward_hook(after("dense", lambda output: output)),
            module.router.register_forward_hook(after("router", lambda output: output[0])),
        ]
        try:
            output = module(
                x,
                position_embeddings=self._rope(x, positions, self._type),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
            )
        finally:
            for hook in hooks:
                hook.remove()
        points["router"] = points["router"].reshape(*x.shape[:2], -1)
        return points | {"output": output}


def _fill(module: torch.nn.Module, read: Callable[[str], np.ndarray]) -> None:
    """Set all parameters and buffers. Shapes may differ: feed-forward rows of a file may be padded."""
    parameters = [name for name, _ in module.named_parameters()]
    for name in [*parameters, *(name for name, _ in module.named_buffers())]:
        owner_name, _, attribute = name.rpartition(".")
        value = torch.from_numpy(np.ascontiguousarray(read(name)))
        if name in parameters:
            value = torch.nn.Parameter(value, requires_grad=False)
        setattr(module.get_submodule(owner_name), attribute, value)


@contextmanager
def _rounding_linear(rounding: Rounding | None, n_expert: int | None) -> Iterator[None]:
    """While open, linear layers but the router (of ``n_expert`` rows) round their input first."""
    linear = torch.nn.functional.linear

    def rounded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x if rounding is None or weight.shape[0] == n_expert else rounding(x), weight, bias)

    torch.nn.functional.linear = rounded
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def rounding_of(types: set[str]) -> Rounding | None:
    """The rounding of activations in ggml's matmuls with weights of these types; None if there is none."""
    if types <= {"F32"}:
        return None
    if types <= {"F32", "F16", "BF16"}:
        half = torch.bfloat16 if "BF16" in types else torch.float16
        return lambda x: x.to(half).float()
    largest = 256 if any(name.endswith("_K") or name.startswith("IQ") for name in types) else 32
    return lambda x: _to_8_bits(x, largest)


def _to_8_bits(x: torch.Tensor, largest: int) -> torch.Tensor:
    """Round to 8 bits in blocks of the largest size, or of 32 where that doesn't divide the row."""
    block = next((n for n in (largest, 32) if x.shape[-1] % n == 0), x.shape[-1])
    blocks = x.reshape(-1, block)
    step = blocks.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(step == 0, blocks, (blocks / step).round() * step).reshape(x.shape)


def softmax_of_scores(scores: np.ndarray, d: int) -> np.ndarray:
    """The router's probabilities from the runtime's scores, which are still to be divided by sqrt(d)."""
    return torch.from_numpy(scores / np.float32(math.sqrt(d))).softmax(dim=-1).numpy()
