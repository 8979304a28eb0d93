"""The exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of the trainable weights; what a checkpoint deploys.

    The decay ramps up as (1 + step) / (10 + step) so that early weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @staticmethod
    def live(model: nn.Module) -> list[Tensor]:
        return [p.detach() for p in model.parameters() if p.requires_grad]

    def share(self, step: int) -> float:
        """How much of the average the weights behind step number `step` (from 0) become."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    def update(self, model: nn.Module, share: float | Tensor) -> None:
        """Move by a share of the way to the weights; a tensor, for a CUDA graph, in three passes instead of one."""
        live, averages = self.live(model), list(self.weights.values())
        if isinstance(share, float):
            torch._foreach_lerp_(averages, live, share)  # pyright: ignore[reportPrivateImportUsage]
            return
        way = torch._foreach_sub(live, averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(way, share)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(averages, way)  # pyright: ignore[reportPrivateImportUsage]
