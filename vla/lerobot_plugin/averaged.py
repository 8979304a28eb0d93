"""The averaged weights, which act, and the live ones, which learn: one of them is in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla.training.average import Average


class Averaged:
    """The exponential moving average of a network's trainable weights, swapped with them in place.

    It is no part of the module, so that DDP does not send it round at every step; it follows the
    network to its device when it is needed.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.average = model, Average(model, decay)
        self.live = True  # whether the live weights are in place

    def update(self, step: int) -> None:
        """One more into the average, behind step number `step` (from 0); the live weights are in place."""
        self._follow()
        self.average.update(self.model, self.average.share(step))

    @torch.no_grad()
    def place(self, live: bool) -> None:
        """Put the live or the averaged weights in place; optimiser and DDP keep the same tensors."""
        if live == self.live:
            return
        self._follow()
        for parameter, other in zip(Average.live(self.model), self.average.weights.values(), strict=True):
            here = parameter.clone()
            parameter.copy_(other)
            other.copy_(here)
        self.live = live

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The averaged weights and the live ones, by the network's names."""
        placed = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        return (self.average.weights, placed) if self.live else (placed, self.average.weights)

    def _follow(self) -> None:
        weights, device = self.average.weights, next(self.model.parameters()).device
        if any(w.device != device for w in weights.values()):
            self.average.weights = {n: w.to(device) for n, w in weights.items()}
