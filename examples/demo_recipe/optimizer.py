"""Muon optimizer for the matrices of the demo model; the other parameters use AdamW."""

from __future__ import annotations

from collections import defaultdict

import torch


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Orthogonalize matrices (n, rows, columns) approximately, by five Newton-Schulz steps in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).float()


class Muon:
    """SGD with orthogonalized momentum, batched over matrices of equal shape.

    The RMS of an update is 0.2 times the learning rate, like that of AdamW. Parameters are matrices or stacks
    of matrices (experts).
    """

    def __init__(self, parameters: list[torch.nn.Parameter], momentum: float, weight_decay: float) -> None:
        self.groups: dict[tuple[int, int], list[torch.nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            self.groups[tuple(parameter.shape[-2:])].append(parameter)
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.buffers = {
            shape: torch.zeros(sum(p.numel() // (shape[0] * shape[1]) for p in group), *shape)
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update all parameters from their gradients."""
        for shape, group in self.groups.items():
            gradient = torch.cat([p.grad.reshape(-1, *shape).float() for p in group])
            buffer = self.buffers[shape]
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalized(gradient.lerp_(buffer, self.momentum))
            update *= 0.2 * max(shape) ** 0.5
            start = 0
            for parameter in group:
                part = update[start : start + parameter.numel() // (shape[0] * shape[1])]
                start += len(part)
                parameter.mul_(1 - learning_rate * self.weight_decay)
                parameter.add_(part.reshape(parameter.shape), alpha=-learning_rate)

    def state_dict(self) -> dict:
        """Return the momentum buffers by shape."""
        return {"buffers": self.buffers}

    def load_state_dict(self, state: dict) -> None:
        """Load the momentum buffers of an earlier run."""
        for shape, buffer in state["buffers"].items():
            self.buffers[shape].copy_(buffer)
