"""Training loss: uniform noise on the canvas, self-conditioning, and steps of the sampler."""

from __future__ import annotations

import torch
from torch import nn

SHARE_FULLY_NOISED = 0.2
"""Fraction of examples that start from a canvas of pure noise, as in generation."""
SHARE_SAME_CANVAS = 0.2
"""Fraction of examples with the first pass's logits and the same canvas."""
SHARE_NEXT_CANVAS = 0.4
"""Fraction of examples with the first pass's logits and the sampler's next canvas."""
WEIGHT_KEPT = 0.1
"""Loss weight of a position whose canvas token is already correct; 1 otherwise."""
WEIGHT_PADDING = 0.2
"""Loss weight of positions after the end marker."""
MAX_WEIGHT_SHORT = 6.0
"""Maximum extra weight of positions in short answers, which balances examples of different lengths."""


class DenoisingLoss(nn.Module):
    """Cross-entropy of the whole canvas after one or two passes of the decoder.

    Each example's canvas has its own fraction t of noise: tokens drawn uniformly from the vocabulary. A first
    pass without gradient gives self-conditioning logits, divided by a temperature as in generation. Two in
    five examples are then denoised without them, one in five with them on the same canvas, and two in five
    with them on the canvas after one step of the entropy-bound sampler, so that the model sees its own
    mistakes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        text = model.config.text_config
        self.vocab_size = text.vocab_size
        self.window = text.sliding_window
        self.soft_cap = text.final_logit_softcapping

    def forward(
        self,
        prefix: torch.Tensor,
        prefix_length: torch.Tensor,
        target: torch.Tensor,
        is_padding: torch.Tensor,
        running: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the mean loss of a batch, and the rollouts' logits; arguments as in `data.Batch`.

        prefix: or (n, length, d), what the encoder reads in place of the embeddings of tokens.
        running: `rollout.Rollouts.state`, for the last rows of the batch: canvases, self-conditioning logits,
        and which rows have such logits. Their logits are returned without gradient.
        """
        n, length = target.shape
        n_running = 0 if running is None else running[0].shape[0]
        canvas = self._noised(target)
        temperature = 0.4 + 0.4 * torch.rand(n, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            given = "input_ids" if prefix.ndim == 2 else "inputs_embeds"
            cache = self.model.model.encoder.language_model(
                **{given: prefix}, attention_mask=self._encoder_masks(prefix.shape[1])
            ).past_key_values
            masks = self._decoder_masks(prefix.shape[1], prefix_length, length)
            positions = prefix_length[:, None] + torch.arange(length)
            with torch.no_grad():
                scaled = self._logits(canvas, cache, masks, positions) / temperature
            kind = torch.rand(n)
            conditioned = kind < SHARE_SAME_CANVAS + SHARE_NEXT_CANVAS
            moved = (kind < SHARE_NEXT_CANVAS)[:, None]
            canvas = torch.where(moved, self._next_canvas(scaled), canvas)
            if running is not None:
                canvas = torch.cat([canvas[:-n_running], running[0]])
                scaled = torch.cat([scaled[:-n_running], running[1]])
                conditioned = torch.cat([conditioned[:-n_running], running[2]])
            logits = self._logits(canvas, cache, masks, positions, scaled, conditioned)
        weight = torch.where(canvas == target, WEIGHT_KEPT, 1.0) * torch.where(
            is_padding, WEIGHT_PADDING, 1.0
        )
        weight = weight * (length / (~is_padding).sum(1, keepdim=True)).clamp(max=MAX_WEIGHT_SHORT)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        mean = (loss * weight.flatten()).sum() / weight.sum()
        return mean, None if running is None else logits[-n_running:].detach()

    def _noised(self, target: torch.Tensor) -> torch.Tensor:
        n, length = target.shape
        share = torch.rand(n, 1)
        share = torch.where(torch.rand(n, 1) < SHARE_FULLY_NOISED, torch.ones_like(share), share)
        noise = torch.randint(0, self.vocab_size, (n, length))
        return torch.where(torch.rand(n, length) < share, noise, target)

    def _next_canvas(self, logits: torch.Tensor) -> torch.Tensor:
        """Run one step of the entropy-bound sampler, with a random bound per example (0.02 to 2)."""
        n, length, _ = logits.shape
        log_probabilities = torch.log_softmax(logits, dim=-1)
        probabilities = log_probabilities.exp()
        entropy = -(probabilities * log_probabilities).sum(-1)
        uniform = torch.rand(n, length, self.vocab_size).clamp(1e-6, 1 - 1e-6)
        sampled = (logits - torch.log(-torch.log(uniform))).argmax(-1)
        bound = 0.02 * 100 ** torch.rand(n, 1)
        ascending, order = torch.sort(entropy, dim=-1)
        chosen = torch.cumsum(ascending, dim=-1) - ascending <= bound
        accepted = torch.zeros_like(chosen).scatter(1, order, chosen)
        return torch.where(accepted, sampled, torch.randint(0, self.vocab_size, (n, length)))

    def _logits(self, canvas, cache, masks, positions, conditioning=None, conditioned=None) -> torch.Tensor:

        hidden = self.model.model.decoder(
            decoder_input_ids=canvas,
            past_key_values=cache,
            self_conditioning_logits=conditioning,
            self_conditioning_mask=conditioned,
            decoder_attention_mask=masks,
            decoder_position_ids=positions,
        ).last_hidden_state
        return self.soft_cap * torch.tanh(self.model.lm_head(hidden).float() / self.soft_cap)

    def _encoder_masks(self, length: int) -> dict[str, torch.Tensor]:
        index = torch.arange(length)
        distance = index[:, None] - index
        causal = distance >= 0
        sliding = causal & (distance < self.window)
        return {"full_attention": causal[None, None], "sliding_attention": sliding[None, None]}

    def _decoder_masks(
        self, length: int, prefix_length: torch.Tensor, n_canvas: int
    ) -> dict[str, torch.Tensor]:
        """Return which keys each example attends to: its cached prefix without padding, and the canvas."""
        masks = {}
        for name, kept in (("full_attention", length), ("sliding_attention", min(length, self.window - 1))):
            prefix = torch.arange(length - kept, length) < prefix_length[:, None]
            canvas = torch.ones(prefix.shape[0], n_canvas, dtype=torch.bool)
            masks[name] = torch.cat([prefix, canvas], dim=1)[:, None, None, :]
        return masks
