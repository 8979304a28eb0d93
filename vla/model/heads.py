"""Heads: from the decoder's output to actions, and the loss between them.

    B batch   H chunk_size   A action_dim   D d_model   K components

Actions are normalised here; vla.py turns them into robot units and clips them to the limits of the
data. l1, bins and gmm act token by token, so an autoregressive decoder may call them with H = 1;
flow makes the chunk as a whole. A new head is one class beside these, a line in HEADS and its name in
architecture.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla.architecture import ModelConfig
from vla.data.normalize import Normalizer
from vla.model.transformer import Encoder
from vla.observation import Tokens

Prefix = tuple[Tensor, Tensor]  # (B, H, A) actions, of which those are committed where (B, H) bool is True


@dataclass(frozen=True)
class Kinds:
    """Of samples from several datasets: source (B,) int64, which one; real (B, 1, A) bool, the dimensions its
    actions have. The others are 0 in the target, and nothing of them enters a loss.
    """

    source: Tensor
    real: Tensor


class Head(Protocol):
    """What every head offers. kinds: None where the data is one dataset, as it always is for a policy."""

    def loss(self, hidden: Tensor, target: Tensor, ignore: Tensor, kinds: Kinds | None = None) -> Tensor:
        """hidden: (B, H, D), target: (B, H, A), ignore: (B, H) bool -> scalar over what is left."""
        ...

    def decode(
        self, hidden: Tensor, sample: bool = False, prefix: Prefix | None = None, kinds: Kinds | None = None
    ) -> Tensor:
        """(B, H, D) -> (B, H, A) float32; sample: drawn from the head's distribution, else always the same.

        The tokens of a prefix carry it in `hidden`, which is all that heads need that act token by token;
        one that makes the chunk as a whole continues the actions themselves. The caller puts them in place.
        """
        ...


def average(cost: Tensor, ignore: Tensor) -> Tensor:
    """Mean of cost (B, H) over what is not ignored; 0 when everything is."""
    return torch.where(ignore, 0, cost).sum() / (~ignore).sum().clamp(min=1)


def over_dimensions(cost: Tensor, kinds: Kinds | None) -> Tensor:
    """Mean of cost (B, H, A) over the dimensions that are real -> (B, H)."""
    if kinds is None:
        return cost.mean(dim=2)
    return torch.where(kinds.real, cost, 0).sum(dim=2) / kinds.real.sum(dim=2)


def draw(logits: Tensor) -> Tensor:
    """Indices along the last axis with probabilities softmax(logits): the maximum of logits plus
    Gumbel noise, which unlike torch.multinomial needs no look at the values from the CPU."""
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=-1)


class L1Head(nn.Module):
    """Regression: the mean absolute error leads to the median action, which outliers do not move.

    Where the data goes two ways the median is anywhere between them.
    """

    def __init__(self, config: ModelConfig, normalizer: Normalizer) -> None:
        super().__init__()
        self.out = nn.Linear(config.d_model, normalizer.size)

    def loss(self, hidden: Tensor, target: Tensor, ignore: Tensor, kinds: Kinds | None = None) -> Tensor:
        error = F.l1_loss(self.decode(hidden), target, reduction="none")  # (B, H, A)
        return average(over_dimensions(error, kinds), ignore)

    def decode(
        self, hidden: Tensor, sample: bool = False, prefix: Prefix | None = None, kinds: Kinds | None = None
    ) -> Tensor:
        return self.out(hidden).float()


class BinsHead(nn.Module):
    """Classification: per dimension, which of N equal bins between the limits of the data.

    Cross-entropy keeps several ways open. The dimensions of one action are independent of each other
    given `hidden`; actions of one chunk are made consistent by decoding them one after another.
    """

    low: Tensor
    width: Tensor

    def __init__(self, config: ModelConfig, normalizer: Normalizer) -> None:
        super().__init__()
        low, high = (normalizer.normalize(limit) for limit in (normalizer.low, normalizer.high))
        self.bins = config.bins
        self.register_buffer("low", low, persistent=False)  # (A,), or of each dataset, as in Normalizer
        self.register_buffer("width", (high - low) / self.bins, persistent=False)  # the same; 0 if constant
        self.out = nn.Linear(config.d_model, normalizer.size * self.bins)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, H, D) -> (B, H, A, N) float32."""
        return self.out(hidden).unflatten(-1, (-1, self.bins)).float()

    def index(self, actions: Tensor, kinds: Kinds | None = None) -> Tensor:
        """(B, H, A) -> bins (B, H, A) int64, the outermost beyond the limits, 0 in a constant dimension."""
        low, width = self.edges(kinds)
        return ((actions - low) / torch.where(width > 0, width, torch.inf)).long().clamp(0, self.bins - 1)

    def centre(self, index: Tensor, kinds: Kinds | None = None) -> Tensor:
        """The inverse, up to half a bin: bins (B, H, A) -> (B, H, A) float32."""
        low, width = self.edges(kinds)
        return (low + (index + 0.5) * width).float()

    def edges(self, kinds: Kinds | None) -> tuple[Tensor, Tensor]:
        """The lowest bin's lower edge and the width of bins: (A,) each, or (B, 1, A) of each sample's dataset."""
        if kinds is None:
            return self.low, self.width
        return self.low[kinds.source][:, None], self.width[kinds.source][:, None]

    def loss(self, hidden: Tensor, target: Tensor, ignore: Tensor, kinds: Kinds | None = None) -> Tensor:
        logits = self.logits(hidden)  # (B, H, A, N)
        error = F.cross_entropy(logits.movedim(-1, 1), self.index(target, kinds), reduction="none")
        return average(over_dimensions(error, kinds), ignore)

    def decode(
        self, hidden: Tensor, sample: bool = False, prefix: Prefix | None = None, kinds: Kinds | None = None
    ) -> Tensor:
        logits = self.logits(hidden)
        return self.centre(draw(logits) if sample else logits.argmax(dim=-1), kinds)


class GMMHead(nn.Module):
    """Mixture density (Bishop 1994): per action, K Gaussians with diagonal covariance and their weights.

    The likelihood has no upper bound without a floor under the scales: a component that sits on a
    value that repeats exactly (a gripper command, a dimension that never moves) gains by shrinking
    for ever, and its gradients grow as 1 / scale².
    """

    floor = 0.05  # normalised units: a twentieth of the data's standard deviation

    def __init__(self, config: ModelConfig, normalizer: Normalizer) -> None:
        super().__init__()
        self.sizes = [1, normalizer.size, normalizer.size]  # weight, mean, scale of a component
        self.components = config.components
        self.out = nn.Linear(config.d_model, self.components * sum(self.sizes))

    def mixture(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, D) -> logits (B, H, K), means and scales (B, H, K, A); float32 under autocast too."""
        out = self.out(hidden).unflatten(-1, (self.components, -1)).float()  # (B, H, K, 1 + 2 A)
        logits, means, scales = out.split(self.sizes, dim=-1)
        return logits.squeeze(-1), means, F.softplus(scales) + self.floor

    def loss(self, hidden: Tensor, target: Tensor, ignore: Tensor, kinds: Kinds | None = None) -> Tensor:
        """Negative log likelihood in nats per dimension, so that its size is not the robot's."""
        logits, means, scales = self.mixture(hidden)
        z = (target[..., None, :] - means) / scales  # (B, H, K, A)
        log_density = -(z.square() / 2 + scales.log() + math.log(2 * math.pi) / 2)  # (B, H, K, A)
        size: int | Tensor = target.shape[-1]
        if kinds is not None:
            log_density = torch.where(kinds.real[:, :, None], log_density, 0)
            size = kinds.real.sum(dim=-1)  # (B, 1)
        log_density = log_density.sum(dim=-1)  # (B, H, K)
        log_likelihood = torch.logsumexp(logits.log_softmax(dim=-1) + log_density, dim=-1)  # (B, H)
        return average(-log_likelihood / size, ignore)

    def decode(
        self, hidden: Tensor, sample: bool = False, prefix: Prefix | None = None, kinds: Kinds | None = None
    ) -> Tensor:
        """The mean of the component with the largest weight, or a draw from the mixture.

        Not the mean of the mixture, which lies between its modes where nobody ever acted; nor the
        highest peak, which a narrow component has however seldom it is meant.
        """
        logits, means, scales = self.mixture(hidden)
        which = draw(logits) if sample else logits.argmax(dim=-1)  # (B, H)
        which = which[..., None, None].expand(-1, -1, 1, means.shape[-1])  # (B, H, 1, A)
        mean, scale = (x.gather(2, which).squeeze(2) for x in (means, scales))  # (B, H, A)
        return mean + scale * torch.randn_like(mean) if sample else mean


class TimeEmbedding(nn.Module):
    """Sinusoids of the time in [0, 1], counted in thousandths as positions are, through an MLP."""

    frequency: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        even = torch.arange(0, d_model, 2) / d_model
        self.register_buffer("frequency", 1000 / 10_000**even, persistent=False)  # (ceil(D / 2),)
        self.up = nn.Linear(2 * len(even), d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, time: Tensor) -> Tensor:
        """(B, H, 1) -> (B, H, D)."""
        angle = time * self.frequency  # (B, H, D / 2)
        return self.out(F.silu(self.up(torch.cat((angle.sin(), angle.cos()), dim=-1))))


class FlowHead(nn.Module):
    """Conditional flow matching over the chunk (Lipman et al. 2023), on straight paths in causal order.

    x_τ = (1 - τ) noise + τ target. Causal layers over [hidden + noisy action + time] learn the velocity
    target - noise; following it from τ = 0 to 1 turns noise into actions. With one τ for the whole
    chunk that holds only if each velocity sees the whole chunk: causal ones each decide by what they
    see, and disagree (on the toy problem of tests/test_heads.py 16 to 20 % of chunks mix two modes, with
    earlier actions ahead 0 to 0.4 %). So every action has a τ of its own (Chen et al. 2024, Diffusion
    Forcing), in decoding `lag` behind that of the action before. Committed actions are at τ = 1, always.
    """

    lag = 0.2  # of the way; 0.1 leaves 1 to 5 % of those chunks mixed
    noise: Tensor

    def __init__(self, config: ModelConfig, normalizer: Normalizer) -> None:
        super().__init__()
        action_dim, d_model = normalizer.size, config.d_model
        self.steps = config.flow_steps
        self.noisy = nn.Linear(action_dim, d_model)
        self.time = TimeEmbedding(d_model)
        self.trunk = Encoder(
            config.flow_layers, d_model, causal=True, n_heads=config.n_heads, d_ff=config.d_ff,
            dropout=config.dropout, norm=config.norm, activation=config.activation,
            checkpointing=config.checkpointing, chunks=config.feed_forward_chunks,
        )  # fmt: skip
        self.out = nn.Linear(d_model, action_dim)
        # Where decoding starts unless it samples: the same draw for ever, so that replanning does not jump
        # between modes; not zero, the ridge between them. NumPy keeps this legacy stream as it is over
        # all its versions, which torch does not promise of its own: no checkpoint need carry it.
        noise = np.random.RandomState(0).standard_normal((config.chunk_size, action_dim))
        self.register_buffer("noise", torch.tensor(noise, dtype=torch.float32), persistent=False)

    def velocity(self, hidden: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """hidden: (B, H, D), x: (B, H, A) noisy actions, time: (B, H, 1) -> (B, H, A).

        Row t depends on rows 0 … t only, so that padding behind the end changes nothing before it.
        """
        tokens = hidden + self.noisy(x) + self.time(time)  # (B, H, D)
        none = torch.zeros_like(tokens[..., 0], dtype=torch.bool)  # (B, H)
        return self.out(self.trunk(Tokens(tokens, none)).x).to(x.dtype)

    def loss(self, hidden: Tensor, target: Tensor, ignore: Tensor, kinds: Kinds | None = None) -> Tensor:
        noise, time = torch.randn_like(target), torch.rand_like(target[..., :1])
        time = torch.where(ignore[..., None], 1, time)  # (B, H, 1); a prefix is ignored: no noise on it
        if kinds is not None:  # what a robot lacks must not speak to the rest of its action
            noise = torch.where(kinds.real, noise, 0)
        x = (1 - time) * noise + time * target  # (B, H, A)
        error = (self.velocity(hidden, x, time) - (target - noise)).square()  # (B, H, A)
        return average(over_dimensions(error, kinds), ignore)

    def decode(
        self, hidden: Tensor, sample: bool = False, prefix: Prefix | None = None, kinds: Kinds | None = None
    ) -> Tensor:
        """Euler's method from the one fixed noise, or (sample) from fresh noise.

        Each action takes `flow_steps` steps; the chunk takes those and the last one's delay.
        """
        noise = self.noise[: hidden.shape[1]].expand(len(hidden), -1, -1)  # (B, H, A)
        noise = torch.randn_like(noise) if sample else noise
        x = noise if kinds is None else torch.where(kinds.real, noise, 0)
        actions, committed = prefix or (x, torch.zeros_like(x[..., 0], dtype=torch.bool))
        keep = committed[..., None]  # (B, H, 1)
        x = torch.where(keep, actions, x)
        lag = max(1, round(self.lag * self.steps))
        start = lag * torch.arange(x.shape[1], device=x.device)[:, None]  # (H, 1)

        def clock(i: int) -> Tensor:
            return torch.where(keep, 1, (i - start).clamp(0, self.steps) / self.steps)  # (B, H, 1)

        for i in range(self.steps + lag * (x.shape[1] - 1)):
            velocity = self.velocity(hidden, x, clock(i))
            if kinds is not None:
                velocity = torch.where(kinds.real, velocity, 0)
            x = x + (clock(i + 1) - clock(i)) * velocity
        return x.float()


HEADS: dict[str, type[L1Head] | type[BinsHead] | type[GMMHead] | type[FlowHead]] = {
    "l1": L1Head,
    "bins": BinsHead,
    "gmm": GMMHead,
    "flow": FlowHead,
}
