"""The reference: transformers' DiffusionGemma, float32, eager attention. Needs torch and transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()


def load_reference(folder: Path) -> DiffusionGemmaForBlockDiffusion:
    """Load a checkpoint folder in float32, eager, and check that nothing fell back to initial weights."""
    model, info = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    missing = [name for name in info["missing_keys"] if "vision" not in name and name != "lm_head.weight"]
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"{folder}: transformers did not take all weights: {missing} {info}")
    if model.config.text_config._attn_implementation != "eager":
        raise ValueError(f"{folder}: attention is {model.config.text_config._attn_implementation}, not eager")
    return model.eval()


@dataclass
class Context:
    """A cache with the tokens encoded so far and the hidden states of the last ``encode``."""

    model: DiffusionGemmaForBlockDiffusion
    cache: DynamicCache
    n_past: int = 0

    @classmethod
    def new(cls, model: DiffusionGemmaForBlockDiffusion) -> Context:
        return cls(model, DynamicCache(config=model.config.get_text_config(decoder=True)))

    @torch.no_grad()
    def encode(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens causally; returns encoder_last_hidden_state, float32 (n, d)."""
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        position_ids = torch.arange(self.n_past, self.n_past + len(ids))[None]
        masks = self.model.model.encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty((1, len(ids), 0)),
            attention_mask=torch.ones((1, self.n_past + len(ids)), dtype=torch.bool),
            past_key_values=self.cache,
            position_ids=position_ids,
        )
        out = self.model.model.encoder(
            input_ids=tokens, attention_mask=masks, past_key_values=self.cache, position_ids=position_ids
        )
        self.n_past += len(ids)
        return out.last_hidden_state[0].float().numpy()

    @torch.no_grad()
    def denoise(self, canvas: np.ndarray, self_conditioning: np.ndarray | None = None) -> np.ndarray:
        """Logits (canvas_length, n_vocab) float32 of one decoder pass over the cache."""
        conditioning = None if self_conditioning is None else torch.from_numpy(self_conditioning)[None]
        out = self.model(
            past_key_values=self.cache,
            decoder_input_ids=torch.from_numpy(canvas.astype(np.int64))[None],
            self_conditioning_logits=conditioning,
        )
        return out.logits[0].numpy()


class RouterGap:
    """While open: the distance between the last chosen expert and the first left out (log scale). Of all so
    far the smallest, and that of each position of the last decoder pass.

    Where it is small, another rounding picks another expert, and the logits jump.
    """

    def __init__(self, model: DiffusionGemmaForBlockDiffusion) -> None:
        self.smallest = float("inf")
        self.of_layer: dict[torch.nn.Module, np.ndarray] = {}
        self.k = model.config.text_config.top_k_experts
        routers = [module for name, module in model.named_modules() if name.endswith(".router")]
        self.handles = [router.register_forward_hook(self.look) for router in routers]
        self.decoders = set(model.model.decoder.modules())

    def look(self, module: torch.nn.Module, args: tuple, output: tuple) -> None:
        best = torch.topk(output[0], self.k + 1, dim=-1).values.log()
        gaps = (best[:, -2] - best[:, -1]).numpy()
        self.smallest = min(self.smallest, float(gaps.min()))
        if module in self.decoders:
            self.of_layer[module] = gaps

    def of_positions(self) -> np.ndarray:
        """The smallest of the layers for each canvas position, float32 (n,)."""
        return np.min(list(self.of_layer.values()), axis=0)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def nudged(model: DiffusionGemmaForBlockDiffusion, relative: float) -> DiffusionGemmaForBlockDiffusion:
    """A copy whose weights are off by that much: what changes between the two hangs on rounding."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + relative * noise)
    return other


def _rounded(x: torch.Tensor, kind: str, padded: bool) -> torch.Tensor:
    """Round activations as ggml does for weights of that type: to 16 bits, or to 8-bit blocks."""
    if kind in ("bf16", "f16"):
        return x.to(torch.bfloat16 if kind == "bf16" else torch.float16).float()
    block = 256 if kind == "q4_k_m" and (padded or x.shape[-1] % 256 == 0) else 32
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    step = blocks.abs().amax(dim=-1, keepdim=True) / 127
    rounded = torch.where(step == 0, blocks, (blocks / step).round() * step)
    return rounded.flatten(-2)[..., : x.shape[-1]]


@contextmanager
def rounded_activations(
    model: DiffusionGemmaForBlockDiffusion, kind: str, padded: bool = False
) -> Iterator[None]:
    """While open, linear layers but the router round their input as ggml does: what that alone costs.

    ``padded``: as for a file whose feed-forward lengths are padded to whole blocks of 256.
    """
    linear, n_expert = torch.nn.functional.linear, model.config.text_config.num_experts

    def rounding(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x if weight.shape[0] == n_expert else _rounded(x, kind, padded), weight, bias)

    torch.nn.functional.linear = rounding
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def set_weights(model: DiffusionGemmaForBlockDiffusion, tensors: dict[str, np.ndarray]) -> None:
    """Replace weights by their checkpoint names, tied copies too; an unknown name or shape raises."""
    state = model.state_dict()
    with torch.no_grad():
        for name, value in tensors.items():
            if name not in state:
                raise KeyError(f"the reference has no tensor {name}")
            if tuple(state[name].shape) != value.shape:
                raise ValueError(f"{name}: {value.shape} for {tuple(state[name].shape)}")
            state[name].copy_(torch.from_numpy(np.asarray(value, dtype=np.float32)))
