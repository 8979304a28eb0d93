"""Positions of a sequence: sinusoidal (Vaswani et al. 2017, section 3.5) and learned.

D d_model
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SinusoidalPositions(nn.Module):
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i + 1) = cos(same); for any length."""

    table: Tensor

    def __init__(self, length: int, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.register_buffer("table", self.rows(length), persistent=False)

    def rows(self, length: int) -> Tensor:
        """(length, D) float32; computed in float64, where 10000^x keeps its digits."""
        position = torch.arange(length, dtype=torch.float64)[:, None]
        even = torch.arange(0, self.d_model, 2, dtype=torch.float64)
        angle = position * torch.exp(even * (-math.log(10_000.0) / self.d_model))  # (length, ceil(D / 2))
        return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)[:, : self.d_model].float()

    def forward(self, length: int) -> Tensor:
        """(length, D)."""
        known = length <= len(self.table)
        return self.table[:length] if known else self.rows(length).to(self.table.device)


class LearnedPositions(nn.Module):
    """One free vector per position, up to the length it was built with."""

    def __init__(self, length: int, d_model: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, d_model))

    def forward(self, length: int) -> Tensor:
        """(length, D). Raises ValueError beyond its own length."""
        if length > len(self.table):
            raise ValueError(
                f"Learned positions end at {len(self.table)}. got: a sequence of {length}. "
                "expected: at most the length of training. remedy: use sinusoidal positions."
            )
        return self.table[:length]


class StepEmbedding(nn.Module):
    """A learned vector for each of T observation steps."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        """x of a shape that `shape` broadcasts to -> the same."""
        return x + self.table


class OneStep(nn.Module):
    """For a single observation step, which needs no telling apart."""

    def __init__(self, *shape: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


# Whether there is a history -> what tells its steps apart.
STEPS: dict[bool, type[StepEmbedding] | type[OneStep]] = {False: OneStep, True: StepEmbedding}

POSITIONS: dict[str, type[SinusoidalPositions] | type[LearnedPositions]] = {
    "sinusoidal": SinusoidalPositions,
    "learned": LearnedPositions,
}
