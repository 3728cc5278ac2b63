"""The training loss: uniform-state noise on the canvas, self-conditioning, and the sampler's own steps."""

from __future__ import annotations

import torch
from torch import nn

SHARE_FULLY_NOISED = 0.2
"""Share of the examples that start from a canvas of nothing but noise, as generation does."""
SHARE_SAME_CANVAS = 0.2
"""Share of the examples that see the first pass's logits and the first pass's canvas again."""
SHARE_NEXT_CANVAS = 0.4
"""Share of the examples that see the first pass's logits and the canvas that the sampler makes of them."""
WEIGHT_KEPT = 0.1
"""Weight of a place whose canvas token is right already, against 1 for one that has to change."""
WEIGHT_PADDING = 0.2
"""Weight of the places behind the end marker."""
MAX_WEIGHT_SHORT = 6.0
"""How much more a place counts at most in a short answer, so that an example counts whatever its length."""


class DenoisingLoss(nn.Module):
    """Cross-entropy of the whole canvas after one or two passes of the decoder.

    Each example's canvas gets its own share t of noise: tokens drawn uniformly from the vocabulary. A first
    pass, without gradient, gives self-conditioning logits, divided by a temperature as in generation. Of the
    examples, two in five are then denoised without them, one in five with them on the same canvas, and two in
    five with them on the canvas that one step of the entropy-bound sampler makes, so that the model meets its
    own mistakes.
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
        """The mean loss of a batch; arguments as in `data.Batch`.

        running: the state of the batch's last rows, from `rollout.Rollouts`: their canvases, their
        self-conditioning logits, and which of them have such logits. Their logits come back beside the loss,
        without gradient.
        """
        n, length = target.shape
        n_running = 0 if running is None else running[0].shape[0]
        canvas = self._noised(target)
        temperature = 0.4 + 0.4 * torch.rand(n, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            cache = self.model.model.encoder.language_model(
                input_ids=prefix, attention_mask=self._encoder_masks(prefix.shape[1])
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
        """One step of the entropy-bound sampler, the bound drawn anew for each example (from 0.02 to 2)."""
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
        behind = index[:, None] - index
        causal = behind >= 0
        sliding = causal & (behind < self.window)
        return {"full_attention": causal[None, None], "sliding_attention": sliding[None, None]}

    def _decoder_masks(
        self, length: int, prefix_length: torch.Tensor, n_canvas: int
    ) -> dict[str, torch.Tensor]:
        """Which keys each example has: what the cache keeps of its prefix, less padding, and the canvas."""
        masks = {}
        for name, kept in (("full_attention", length), ("sliding_attention", min(length, self.window - 1))):
            prefix = torch.arange(length - kept, length) < prefix_length[:, None]
            canvas = torch.ones(prefix.shape[0], n_canvas, dtype=torch.bool)
            masks[name] = torch.cat([prefix, canvas], dim=1)[:, None, None, :]
        return masks
