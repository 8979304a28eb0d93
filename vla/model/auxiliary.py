"""A loss for training only: to say where things are, from the memory that the actions are made of.

    B batch   H chunk_size   S memory length   D d_model   K numbers of environment_state   Q = ⌈K / 3⌉ queries

A simulator knows what images only show. Mirowski et al. 2017, "Learning to navigate in complex environments"
(arXiv:1611.03673), let an agent predict depth beside its actions, and it learned faster and better; here it is
positions, which is what reaching needs. They are targets: no camera, word or joint is added to what the policy
sees, nothing of this head runs when it acts, and a checkpoint deploys none of its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla.architecture import ModelConfig
from vla.checks import require
from vla.data.normalize import CONSTANT, MixedStatistics, Normalizer, Statistics
from vla.model.attention import MultiHeadAttention
from vla.model.heads import average
from vla.observation import ENVIRONMENT_STATE, Tokens


class PositionHead(nn.Module):
    """Learned queries read the memory by attention (Lee et al. 2019, "Set Transformer", section 3.2), one for each
    place of three numbers, and a linear layer reads the places off.

    Little beside the trunk, on purpose: where things are must be in the memory, not worked out behind it.
    No dropout, so that the rest of the network trains on the numbers that it would draw without this head.
    Raises ConfigError where the data has no environment_state, or one that never changes.
    """

    share: Tensor

    def __init__(self, config: ModelConfig, statistics: Statistics | MixedStatistics) -> None:
        super().__init__()
        known = isinstance(statistics, Statistics) and ENVIRONMENT_STATE in statistics.by_key
        require(
            known, "model.auxiliary", config.auxiliary, f"0 with data that has no {ENVIRONMENT_STATE}",
            "record it (record.environment_state=true, where the environment knows it), or set model.auxiliary=0",
        )  # fmt: skip
        self.normalizer = Normalizer(statistics[ENVIRONMENT_STATE], config.normalization)
        varies = self.normalizer.high - self.normalizer.low > CONSTANT  # (K,)
        require(
            bool(varies.any()), "model.auxiliary", config.auxiliary,
            f"0 with data whose {ENVIRONMENT_STATE} never changes", "record more scenes, or set model.auxiliary=0",
        )  # fmt: skip
        # Of the error: a thing that no task has (always 0) is no achievement to predict.
        self.register_buffer("share", varies / varies.sum(), persistent=False)  # (K,)
        queries = -(-self.normalizer.size // 3)
        self.queries = nn.Parameter(torch.empty(queries, config.d_model))
        self.attention = MultiHeadAttention(config.d_model, config.n_heads)
        self.out = nn.Linear(queries * config.d_model, self.normalizer.size)

    def forward(self, memory: Tokens) -> Tensor:
        """(B, S, D) with padding -> (B, K) normalised, float32."""
        queries = self.queries.expand(len(memory.x), -1, -1)  # (B, Q, D)
        places = self.attention(queries, memory.x, memory.pad)  # (B, Q, D)
        return self.out(places.flatten(1)).float()

    def loss(self, memory: Tokens, environment_state: Tensor, ignore: Tensor) -> tuple[Tensor, Tensor]:
        """The mean absolute error, normalised: what is added to the loss; and in the data's units: for the log.

        environment_state: (B, K) in the data's units. Mean over the numbers that change in the data; over samples
        each counts as often as it has actions that are not ignored, (B, H) bool, as it does in the head's loss:
        so a batch handled in parts, or by several ranks, weighs its parts the same for both.
        """

        def mean(cost: Tensor) -> Tensor:  # (B, K) -> ()
            return average((cost * self.share).sum(dim=1, keepdim=True).expand_as(ignore), ignore)

        error = (self(memory) - self.normalizer.normalize(environment_state)).abs()  # (B, K)
        return mean(error), mean(error.detach() * self.normalizer.spread)
