"""Heads: from the decoder's output to actions, and the loss between them.

    B batch   H chunk_size   A action_dim   D d_model

Actions are normalised here; vla.py turns them into robot units. A new head is one class
beside this one and a line in HEADS.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F


class Head(Protocol):
    """What every head offers."""

    def loss(self, hidden: Tensor, target: Tensor, ignore: Tensor) -> Tensor:
        """hidden: (B, H, D), target: (B, H, A), ignore: (B, H) bool -> scalar over what is left."""
        ...

    def decode(self, hidden: Tensor) -> Tensor:
        """(B, H, D) -> (B, H, A) float32."""
        ...


class L1Head(nn.Module):
    """Regression: the mean absolute error leads to the median action, which outliers do not move."""

    def __init__(self, d_model: int, action_dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(d_model, action_dim)

    def loss(self, hidden: Tensor, target: Tensor, ignore: Tensor) -> Tensor:
        error = F.l1_loss(self.decode(hidden), target, reduction="none").mean(dim=2)  # (B, H)
        keep = (~ignore).to(error.dtype)
        return (error * keep).sum() / keep.sum().clamp(min=1)

    def decode(self, hidden: Tensor) -> Tensor:
        return self.out(hidden).float()


HEADS: dict[str, type[L1Head]] = {"l1": L1Head}
