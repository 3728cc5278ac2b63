"""masked-toy on a page of numpy: encoder, denoiser, sampler. Shapes: n tokens, d hidden, v vocabulary."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

Cache = list[tuple[np.ndarray, np.ndarray]]  # per layer K and V, (kv heads, n cached tokens, head_dim)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@dataclass
class Step:
    """One denoising step; ``canvas`` and ``settled`` are those after it."""

    i_canvas: int
    steps_left: int  # this one included
    canvas: np.ndarray  # (n,)
    settled: np.ndarray  # (n,) bool
    entropy: np.ndarray  # (n,) nats
    logits: np.ndarray  # (n, v)


@dataclass
class Generation:
    """``tokens`` of all canvases, and all steps."""

    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


class Toy:
    """A checkpoint folder, computed in ``dtype``."""

    def __init__(self, folder: Path, dtype: type = np.float32):
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        self.weights = {name: value.astype(dtype) for name, value in weights.items()}

    def empty_cache(self) -> Cache:
        c = self.config
        nothing = np.zeros((c["num_key_value_heads"], 0, c["head_dim"]), self.weights["norm.weight"].dtype)
        return [(nothing, nothing)] * c["num_hidden_layers"]

    def rms(self, x: np.ndarray, name: str) -> np.ndarray:
        """RMS norm over the last axis, by the weight ``name``."""
        scale = np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[name + ".weight"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[name + ".weight"].T

    def rope(self, x: np.ndarray, start: int) -> np.ndarray:
        """Rotate the halves of (heads, n, head_dim), of positions from ``start``."""
        half = x.shape[-1] // 2
        angles = np.arange(start, start + x.shape[1])[:, None] * self.config["rope_theta"] ** (
            -np.arange(half) / half
        )
        cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def heads(self, x: np.ndarray) -> np.ndarray:
        """(n, heads * head_dim) -> (heads, n, head_dim)."""
        return x.reshape(len(x), -1, self.config["head_dim"]).transpose(1, 0, 2)

    def layer(
        self, i: int, x: np.ndarray, past: tuple[np.ndarray, np.ndarray], causal: bool
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """One layer on (n, d) after the tokens of ``past``; returns its output, and K and V of them all."""
        w, n_past = f"layers.{i}.", past[0].shape[1]
        h = self.rms(x, w + "input_layernorm")
        q, k, v = (self.heads(self.linear(h, f"{w}self_attn.{name}_proj")) for name in "qkv")
        q = self.rope(self.rms(q, w + "self_attn.q_norm"), n_past)
        k = self.rope(self.rms(k, w + "self_attn.k_norm"), n_past)
        k, v = np.concatenate([past[0], k], axis=1), np.concatenate([past[1], v], axis=1)
        group = len(q) // len(k)
        scores = q @ np.repeat(k, group, axis=0).transpose(0, 2, 1) / self.config["head_dim"] ** 0.5
        if causal:
            scores[:, np.arange(k.shape[1]) > n_past + np.arange(len(x))[:, None]] = -np.inf
        a = (softmax(scores) @ np.repeat(v, group, axis=0)).transpose(1, 0, 2).reshape(len(x), -1)
        r = x + self.rms(self.linear(a, w + "self_attn.o_proj"), w + "post_attention_layernorm")
        h = self.rms(r, w + "pre_feedforward_layernorm")
        gated = silu(self.linear(h, w + "mlp.gate_proj")) * self.linear(h, w + "mlp.up_proj")
        y = r + self.rms(self.linear(gated, w + "mlp.down_proj"), w + "post_feedforward_layernorm")
        return y, (k, v)

    def encode(self, ids: np.ndarray, cache: Cache | None = None) -> tuple[Cache, np.ndarray]:
        """Encode tokens after those in the cache: the longer cache, and the hidden states (n, d)."""
        past = self.empty_cache() if cache is None else cache
        x, new = self.weights["embed_tokens.weight"][ids], []
        for i, kv in enumerate(past):
            x, longer = self.layer(i, x, kv, causal=True)
            new.append(longer)
        return new, self.rms(x, "norm")

    def denoise(self, cache: Cache, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        """Logits (n, v) of a canvas; ``previous`` ones, divided by their temperature, condition them."""
        embedding, cap = self.weights["embed_tokens.weight"], self.config["final_logit_softcapping"]
        x = embedding[canvas]
        if previous is not None:
            soft = softmax(previous.astype(x.dtype)) @ embedding
            x = x + self.linear(self.rms(soft, "self_conditioning.norm"), "self_conditioning.proj")
        for i, kv in enumerate(cache):
            x, _ = self.layer(i, x, kv, causal=False)
        return cap * np.tanh(self.linear(self.rms(x, "norm"), "lm_head") / cap)

    def generate(self, prompt: np.ndarray, steps: int, n_canvases: int) -> Generation:
        """Denoise canvas after canvas, each encoded before the next; every canvas begins masked."""
        result = Generation()
        cache, _ = self.encode(prompt)
        for i_canvas in range(n_canvases):
            canvas = np.full(self.config["canvas_length"], self.config["mask_token_id"])
            settled, logits = np.zeros(len(canvas), bool), None
            for steps_left in range(steps, 0, -1):
                logits = self.denoise(cache, canvas, logits)
                canvas, entropy, accepted = unmask(logits, canvas, settled, steps_left)
                settled = settled | accepted
                result.steps.append(Step(i_canvas, steps_left, canvas, settled, entropy, logits))
                if settled.all():
                    break
            result.tokens += canvas.tolist()
            if i_canvas + 1 < n_canvases:
                cache, _ = self.encode(canvas, cache)
        return result


def unmask(
    logits: np.ndarray, canvas: np.ndarray, settled: np.ndarray, steps_left: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of the sampler: of m masked positions, the ceil(m / steps_left) of lowest entropy get their
    most likely token. Returns the canvas after it, the entropies (nats) and the newly settled positions.
    """
    p = softmax(logits.astype(np.float64))
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)
    masked = np.flatnonzero(~settled)
    n = -(-len(masked) // steps_left)
    chosen = masked[np.argsort(entropy[masked], kind="stable")[:n]]  # ties: the earlier position
    accepted = np.isin(np.arange(len(canvas)), chosen)
    return np.where(accepted, logits.argmax(axis=-1), canvas), entropy, accepted
