"""Transformer encoder and causal decoder (Vaswani et al. 2017), pre- and post-norm.

    B batch   S memory length   H action tokens   D d_model   F d_ff

What departs from the original: `pre` normalises each branch's input instead of its sum
(Xiong et al. 2020) and ends the stack with one norm; GELU and SwiGLU (Shazeer 2020) beside
ReLU; initialisation scaled by depth (vla/model/parameters.py). `post` with `relu` is the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla.model.attention import MultiHeadAttention
from vla.observation import Tokens


class PreNorm(nn.Module):
    """x + branch(LN(x))."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.dropout(branch(self.norm(x)))

    @staticmethod
    def final(d_model: int) -> nn.Module:
        return nn.LayerNorm(d_model)


class PostNorm(nn.Module):
    """LN(x + branch(x))."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        return self.norm(x + self.dropout(branch(x)))

    @staticmethod
    def final(d_model: int) -> nn.Module:
        return nn.Identity()  # every layer ends on a norm already


class FeedForward(nn.Module):
    """W_2 f(W_1 x)."""

    def __init__(
        self, d_model: int, d_ff: int, dropout: float, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.activation(self.up(x))))


class SwiGLU(nn.Module):
    """W_2 (silu(W_1 x) · W_3 x), at two thirds of d_ff so that the parameters stay equal."""

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        width = 8 * max(1, round(d_ff * 2 / 3 / 8))
        self.up = nn.Linear(d_model, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.out(self.dropout(F.silu(gate) * value))


NORMS: dict[str, type[PreNorm] | type[PostNorm]] = {"pre": PreNorm, "post": PostNorm}
FEED_FORWARDS: dict[str, Callable[[int, int, float], nn.Module]] = {
    "gelu": lambda d_model, d_ff, dropout: FeedForward(d_model, d_ff, dropout, F.gelu),
    "relu": lambda d_model, d_ff, dropout: FeedForward(d_model, d_ff, dropout, F.relu),
    "swiglu": SwiGLU,
}


class EncoderLayer(nn.Module):
    """Self-attention, feed-forward."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        dropout: float = 0.0,
        norm: str = "pre",
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(d_model, n_heads, dropout)
        self.feed_forward = FEED_FORWARDS[activation](d_model, d_ff, dropout)
        self.around_attention = NORMS[norm](d_model, dropout)
        self.around_feed_forward = NORMS[norm](d_model, dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        """(B, S, D) with padding -> the same."""
        x = self.around_attention(tokens.x, lambda x: self.attention(x, x, tokens.pad))
        x = self.around_feed_forward(x, self.feed_forward)
        return Tokens(x, tokens.pad)


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to the memory, feed-forward."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        dropout: float = 0.0,
        norm: str = "pre",
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(d_model, n_heads, dropout)
        self.cross_attention = MultiHeadAttention(d_model, n_heads, dropout)
        self.feed_forward = FEED_FORWARDS[activation](d_model, d_ff, dropout)
        self.around_attention = NORMS[norm](d_model, dropout)
        self.around_cross_attention = NORMS[norm](d_model, dropout)
        self.around_feed_forward = NORMS[norm](d_model, dropout)

    def forward(self, x: Tensor, memory: Tokens) -> Tensor:
        """x: (B, H, D), memory: (B, S, D) with padding -> (B, H, D)."""
        x = self.around_attention(x, lambda x: self.attention(x, x, causal=True))
        x = self.around_cross_attention(x, lambda x: self.cross_attention(x, memory.x, memory.pad))
        return self.around_feed_forward(x, self.feed_forward)


class Encoder(nn.Module):
    """n layers over the multimodal sequence; its output is the memory. `layer`: see EncoderLayer."""

    def __init__(self, n_layers: int, d_model: int, norm: str = "pre", **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(d_model, norm=norm, **layer) for _ in range(n_layers))
        self.norm = NORMS[norm].final(d_model)

    def forward(self, tokens: Tokens) -> Tokens:
        """(B, S, D) with padding -> the same."""
        for layer in self.layers:
            tokens = layer(tokens)
        return Tokens(self.norm(tokens.x), tokens.pad)


class Decoder(nn.Module):
    """n causal layers over the action tokens. `layer`: see DecoderLayer."""

    def __init__(self, n_layers: int, d_model: int, norm: str = "pre", **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(d_model, norm=norm, **layer) for _ in range(n_layers))
        self.norm = NORMS[norm].final(d_model)

    def forward(self, x: Tensor, memory: Tokens) -> Tensor:
        """x: (B, H, D), memory: (B, S, D) with padding -> (B, H, D); t depends on 0 … t only."""
        for layer in self.layers:
            x = layer(x, memory)
        return self.norm(x)


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


POSITIONS: dict[str, type[SinusoidalPositions] | type[LearnedPositions]] = {
    "sinusoidal": SinusoidalPositions,
    "learned": LearnedPositions,
}
