"""Transformer encoder and causal decoder (Vaswani et al. 2017), pre- and post-norm.

    B batch   S memory length   H action tokens   D d_model   F d_ff

What departs from the original: `pre` normalises each branch's input instead of its sum
(Xiong et al. 2020) and ends the stack with one norm; GELU and SwiGLU (Shazeer 2020) beside
ReLU; initialisation scaled by depth (vla/model/parameters.py). `post` with `relu` is the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vla.model.attention import KeyValues, MultiHeadAttention
from vla.observation import Tokens

Attention = Callable[[int, int, float], MultiHeadAttention]  # (d_model, n_heads, dropout)


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


def at_once(layer: Callable[[Tensor], Tensor], x: Tensor, parts: int) -> Tensor:
    return layer(x)


def in_parts(layer: Callable[[Tensor], Tensor], x: Tensor, parts: int) -> Tensor:
    """A layer that treats every token alike, on (B, S, D) in parts of S, one after the other (Kitaev et al.
    2020, section 3): its widest activation is that much smaller.
    """
    return torch.cat([layer(part) for part in x.chunk(parts, dim=1)], dim=1)


def kept(layer: Callable[..., Any], *inputs: Any) -> Any:
    return layer(*inputs)


def recomputed(layer: Callable[..., Any], *inputs: Any) -> Any:
    """Forget a layer's activations, compute them again going backward (Chen et al. 2016).

    Tokens are handed over as tensors: torch keeps a GPU's random state only of those it finds.
    """
    tensors = [x for each in inputs for x in ((each.x, each.pad) if isinstance(each, Tokens) else (each,))]

    def again(*tensors: Tensor) -> Any:
        left = iter(tensors)
        return layer(
            *(Tokens(next(left), next(left)) if isinstance(each, Tokens) else next(left) for each in inputs)
        )

    return checkpoint(again, *tensors, use_reentrant=False)


CHUNKING = {False: at_once, True: in_parts}
ACTIVATIONS = {False: kept, True: recomputed}


class EncoderLayer(nn.Module):
    """Self-attention, feed-forward. causal: token t sees 0 … t only; chunks: see `in_parts`."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        dropout: float = 0.0,
        norm: str = "pre",
        activation: str = "gelu",
        causal: bool = False,
        chunks: int = 1,
        attention: Attention = MultiHeadAttention,
    ) -> None:
        super().__init__()
        self.causal, self.chunks, self.in_chunks = causal, chunks, CHUNKING[chunks > 1]
        self.attention = attention(d_model, n_heads, dropout)
        self.feed_forward = FEED_FORWARDS[activation](d_model, d_ff, dropout)
        self.around_attention = NORMS[norm](d_model, dropout)
        self.around_feed_forward = NORMS[norm](d_model, dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        """(B, S, D) with padding -> the same."""
        x = self.around_attention(tokens.x, lambda x: self.attention(x, x, tokens.pad, self.causal))
        x = self.around_feed_forward(x, lambda x: self.in_chunks(self.feed_forward, x, self.chunks))
        return Tokens(x, tokens.pad)


@dataclass
class Cache:
    """What a decoder layer keeps while decoding: of the action tokens so far, and of the memory."""

    own: KeyValues
    memory: KeyValues


class DecoderLayer(nn.Module):
    """Self-attention, causal unless said otherwise, cross-attention to the memory, feed-forward."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        dropout: float = 0.0,
        norm: str = "pre",
        activation: str = "gelu",
        causal: bool = True,
        chunks: int = 1,
        attention: Attention = MultiHeadAttention,
    ) -> None:
        super().__init__()
        self.causal, self.chunks, self.in_chunks = causal, chunks, CHUNKING[chunks > 1]
        self.attention = attention(d_model, n_heads, dropout)
        self.cross_attention = MultiHeadAttention(d_model, n_heads, dropout)
        self.feed_forward = FEED_FORWARDS[activation](d_model, d_ff, dropout)
        self.around_attention = NORMS[norm](d_model, dropout)
        self.around_cross_attention = NORMS[norm](d_model, dropout)
        self.around_feed_forward = NORMS[norm](d_model, dropout)

    def forward(self, x: Tensor, memory: Tokens, pad: Tensor | None = None) -> Tensor:
        """x: (B, H, D) with padding (B, H), memory: (B, S, D) with padding -> (B, H, D)."""
        x = self.around_attention(x, lambda x: self.attention(x, x, pad, self.causal))
        x = self.around_cross_attention(x, lambda x: self.cross_attention(x, memory.x, memory.pad))
        return self.around_feed_forward(x, lambda x: self.in_chunks(self.feed_forward, x, self.chunks))

    def cache(self, memory: Tensor, length: int) -> Cache:
        """Room for `length` tokens, and the keys and values of the memory (B, S, D), computed once."""
        known = self.cross_attention.key_values(memory)
        room = known.k.new_zeros(len(memory), known.k.shape[1], length, known.k.shape[3])  # (B, n, H, d)
        return Cache(KeyValues(room, room.clone()), known)

    def step(self, x: Tensor, t: int, cache: Cache, pad: Tensor) -> Tensor:
        """`forward` for token t alone, x (B, 1, D), after the tokens 0 … t - 1 went through."""

        def attend_to_past(x: Tensor) -> Tensor:
            cache.own.write(t, self.attention.key_values(x))
            return self.attention.answer(x, cache.own.upto(t))

        x = self.around_attention(x, attend_to_past)
        x = self.around_cross_attention(x, lambda x: self.cross_attention.answer(x, cache.memory, pad))
        return self.around_feed_forward(x, self.feed_forward)


class Stack(nn.Module):
    """n layers, and the norm that ends them. `layer`: see the kind's own; checkpointing: see `recomputed`."""

    def __init__(
        self,
        kind: Callable[..., nn.Module],
        n_layers: int,
        d_model: int,
        norm: str = "pre",
        checkpointing: bool = False,
        **layer: Any,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(d_model, norm=norm, **layer) for _ in range(n_layers))
        self.norm = NORMS[norm].final(d_model)
        self.run = ACTIVATIONS[checkpointing]


class Encoder(Stack):
    """The layers over the multimodal sequence; its output is the memory."""

    def __init__(self, n_layers: int, d_model: int, **options: Any) -> None:
        super().__init__(EncoderLayer, n_layers, d_model, **options)

    def forward(self, tokens: Tokens) -> Tokens:
        """(B, S, D) with padding -> the same."""
        for layer in self.layers:
            tokens = self.run(layer, tokens)
        return Tokens(self.norm(tokens.x), tokens.pad)


class Decoder(Stack):
    """The causal layers over the action tokens."""

    def __init__(self, n_layers: int, d_model: int, **options: Any) -> None:
        super().__init__(DecoderLayer, n_layers, d_model, **options)

    def forward(self, x: Tensor, memory: Tokens) -> Tensor:
        """x: (B, H, D), memory: (B, S, D) with padding -> (B, H, D); t depends on 0 … t only."""
        for layer in self.layers:
            x = self.run(layer, x, memory)
        return self.norm(x)

    def caches(self, memory: Tokens, length: int) -> list[Cache]:
        """Empty caches for `length` steps, one per layer."""
        return [cast(DecoderLayer, layer).cache(memory.x, length) for layer in self.layers]

    def step(self, x: Tensor, t: int, caches: list[Cache], pad: Tensor) -> Tensor:
        """`forward` for token t alone: x (B, 1, D) -> (B, 1, D); pad: the memory's, (B, S)."""
        for layer, cache in zip(self.layers, caches, strict=True):
            x = cast(DecoderLayer, layer).step(x, t, cache, pad)
        return self.norm(x)
