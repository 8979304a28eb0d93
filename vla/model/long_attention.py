"""Self-attention of the encoder, for sequences of any length: one class per `model.attention.kind`.

    B batch   S sequence length   D d_model   n heads   d = D / n
    w block or chunk length   C blocks of a sequence   r rank   R rounds of hashing

full is attention.py's. The others cost O(S) instead of O(S²) and approximate it: window sees what
is near, linformer a summary of fixed length, lsh what hashes alike. torch's FlexAttention could be
the window, but has no backward on the CPU (torch 2.11 refuses it); transformers' Reformer could be
lsh, but draws new rotations, and seeds torch's generator, at every call. Both are references of the
tests instead. What departs from the papers:

- Padding changes nothing: the tokens that count move to the front of the sequence, so that
  neighbours, rows of a projection and places in a hash order are counted among them alone.
- lsh: sorted chunks do not look back from the first to the last one, because which tokens the last
  one holds would depend on the padding; the number of buckets follows from the longest sequence
  instead of the present one; the random rotations are drawn once and saved with the weights, so
  that a policy is deterministic. Where rounds of hashing find the same pair it counts once, as in
  the paper (appendix A), though not in transformers' Reformer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla.architecture import AttentionConfig
from vla.model.attention import KeyValues, MultiHeadAttention

ITSELF = -1e5  # score of a token with itself in lsh: it attends to itself only where it is alone


class FullAttention(MultiHeadAttention):
    """Every token to every token."""

    def __init__(
        self, d_model: int, n_heads: int, dropout: float, config: AttentionConfig, length: int
    ) -> None:
        super().__init__(d_model, n_heads, dropout)


class LongAttention(MultiHeadAttention):
    """Self-attention over at most `length` tokens; subclasses `attend` to a part or a summary of them.

    Their `attend` receives padding at the end of the sequence only. It never is causal.
    """

    def __init__(
        self, d_model: int, n_heads: int, dropout: float, config: AttentionConfig, length: int
    ) -> None:
        super().__init__(d_model, n_heads, dropout)
        self.kind, self.length = config.kind, length

    def forward(self, x: Tensor, memory: Tensor, pad: Tensor | None = None, causal: bool = False) -> Tensor:
        """x: (B, S, D), and again as memory -> (B, S, D). pad: (B, S) bool, True = ignore.

        Raises ValueError for another memory, causal attention, and more than `length` tokens.
        """
        self.require(memory is x and not causal, "causal or cross-attention", "self-attention of an encoder")
        self.require(x.shape[1] <= self.length, f"{x.shape[1]} tokens", f"at most {self.length}")
        if pad is None:
            return super().forward(x, x)
        order = pad.byte().argsort(dim=1, stable=True)  # (B, S), tokens that count first
        y = in_order(x, order)
        return in_order(super().forward(y, y, pad.gather(1, order)), order.argsort(dim=1))

    def require(self, holds: bool, got: str, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"model.attention.kind={self.kind}: got {got}, expected {expected}. "
                "remedy: set model.attention.kind=full."
            )


class WindowAttention(LongAttention):
    """Token i attends to the tokens j with |i - j| ≤ window (Beltagy et al. 2020, without global tokens).

    Blocks of w = window tokens attend to themselves and their two neighbours, which hold every such j.
    """

    def __init__(
        self, d_model: int, n_heads: int, dropout: float, config: AttentionConfig, length: int
    ) -> None:
        super().__init__(d_model, n_heads, dropout, config, length)
        self.window = config.window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, causal: bool) -> Tensor:
        batch, _, length, _ = q.shape
        w = min(self.window, length)
        filler = -length % w
        real = q.new_ones(batch, length, dtype=torch.bool) if pad is None else ~pad

        near = (torch.arange(w, device=q.device)[:, None] + w - torch.arange(3 * w, device=q.device)).abs()
        real = F.pad(real, (w, w + filler)).unfold(1, 3 * w, w)  # (B, C, 3w)
        # Padding attends to itself, or a row of it would have nothing to attend to.
        keep = (near <= w) & real.flatten(0, 1)[:, None, None] | (near == 0)  # (B C, 1, w, 3w)

        q = F.pad(q, (0, 0, 0, filler)).unflatten(2, (-1, w))  # (B, n, C, w, d)
        k, v = (F.pad(t, (0, 0, w, w + filler)).unfold(2, 3 * w, w).mT for t in (k, v))  # (B, n, C, 3w, d)
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (B C, n, w or 3w, d)
        y = F.scaled_dot_product_attention(q, k, v, keep, self.dropout if self.training else 0.0)
        y = y.unflatten(0, (-1, (length + filler) // w)).transpose(1, 2)  # (B, n, C, w, d)
        return y.flatten(2, 3)[:, :, :length]  # (B, n, S, d)


class LinformerAttention(LongAttention):
    """softmax(Q (E K)ᵀ / √d) F V, where E and F project the sequence to r rows (Wang et al. 2020).

    The heads share E (`keys`) and F (`values`). Of a shorter sequence their first columns count.
    """

    def __init__(
        self, d_model: int, n_heads: int, dropout: float, config: AttentionConfig, length: int
    ) -> None:
        super().__init__(d_model, n_heads, dropout, config, length)
        self.keys = nn.Linear(length, config.rank, bias=False)
        self.values = nn.Linear(length, config.rank, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, causal: bool) -> Tensor:
        if pad is not None:
            k, v = (t.masked_fill(pad[:, None, :, None], 0.0) for t in (k, v))
        k = F.linear(k.mT, self.keys.weight[:, : k.shape[2]]).mT  # (B, n, r, d)
        v = F.linear(v.mT, self.values.weight[:, : v.shape[2]]).mT
        return F.scaled_dot_product_attention(q, k, v, None, self.dropout if self.training else 0.0)


class LSHAttention(LongAttention):
    """Tokens whose queries hash alike attend to each other (Kitaev et al. 2020, Reformer).

    Keys are the queries at length one. Each of R rounds of hashing sorts the tokens by bucket and cuts
    them into chunks of w, which attend to themselves and the chunk before. A softmax over all pairs
    that some round brought together is put together from the rounds by their normalisers.
    """

    def __init__(
        self, d_model: int, n_heads: int, dropout: float, config: AttentionConfig, length: int
    ) -> None:
        super().__init__(d_model, n_heads, dropout, config, length)
        del self.key_value
        self.value = nn.Linear(d_model, d_model)
        self.chunk = config.chunk
        half = math.ceil(length / config.chunk)  # of the buckets, which a sequence of `length` half fills
        self.rotations = nn.Buffer(torch.randn(n_heads, d_model // n_heads, config.hashes, half))

    def key_values(self, memory: Tensor) -> KeyValues:
        """(B, S, D) -> queries, which are the keys, and values by heads."""
        return KeyValues(self.split(self.query(memory)), self.split(self.value(memory)))

    def answer(self, x: Tensor, memory: KeyValues, pad: Tensor | None = None, causal: bool = False) -> Tensor:
        y = self.attend(memory.k, memory.k, memory.v, pad, causal)  # (B, n, S, d)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, S, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, causal: bool) -> Tensor:
        (batch, _, length, _), w = q.shape, self.chunk
        q, v = (F.pad(t, (0, 0, 0, -length % w)) for t in (q, v))  # (B, n, S, d), S now divides by w
        ignored = q.new_zeros(batch, length, dtype=torch.bool) if pad is None else pad
        real = (~ignored).sum(dim=1)[:, None, None, None]  # (B, 1, 1, 1): tokens that count, all in front

        order = self.hash(q, real).argsort(dim=3, stable=True)  # (B, n, R, S): token at each place
        place = order.argsort(dim=3)  # (B, n, R, S): place of each token
        tokens = order.unflatten(3, (-1, w))  # (B, n, R, C, w)
        others = with_chunk_before(tokens, -1)  # (B, n, R, C, 2w)

        q, v = (t[:, :, None].expand(*order.shape, -1) for t in (q, v))  # (B, n, R, S, d)
        q, v = (in_order(t, order).unflatten(3, (-1, w)) for t in (q, v))  # (B, n, R, C, w, d)
        k = with_chunk_before(F.normalize(q, dim=-1), 0.0)  # (B, n, R, C, 2w, d)
        scores = q @ k.mT  # (B, n, R, C, w, 2w)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores -= times_met(order, place // w, w).to(scores.dtype).log_()  # in place: the widest tensors here
        scores.masked_fill_(((others < 0) | (others >= real[..., None]))[..., None, :], -torch.inf)
        scores.masked_fill_(tokens[..., :, None] == others[..., None, :], ITSELF)

        weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training).to(v.dtype)
        y = (weights @ with_chunk_before(v, 0.0)).flatten(3, 4)  # (B, n, R, S, d), in sorted order
        share = scores.logsumexp(dim=-1).flatten(3).gather(3, place).softmax(dim=2)  # (B, n, R, S)
        y = in_order(y, place) * share[..., None].to(y.dtype)  # in the order of the tokens
        return y.sum(dim=2)[:, :, :length]  # (B, n, S, d)

    @torch.no_grad()
    def hash(self, q: Tensor, real: Tensor) -> Tensor:
        """Buckets (B, n, R, S) of q (B, n, S, d): the nearest of ± the rotations' axes; padding in the last."""
        along = torch.einsum("bnsd,ndrh->bnrsh", q, self.rotations.to(q.dtype))  # (B, n, R, S, half)
        buckets = torch.cat([along, -along], dim=-1).argmax(dim=-1)
        ignored = torch.arange(q.shape[2], device=q.device) >= real
        return buckets.masked_fill(ignored, 2 * along.shape[-1])


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """Tokens x (…, S, D) as `order` (…, S) names them."""
    return x.gather(-2, order[..., None].expand(*order.shape, x.shape[-1]))


def with_chunk_before(x: Tensor, fill: float) -> Tensor:
    """Chunks (B, n, R, C, w, …) -> (B, n, R, C, 2w, …): each after the one before, `fill` before the first."""
    before = torch.cat([torch.full_like(x[:, :, :, :1], fill), x[:, :, :, :-1]], dim=3)
    return torch.cat([before, x], dim=4)


@torch.no_grad()
def times_met(order: Tensor, chunk: Tensor, w: int) -> Tensor:
    """In how many rounds each pair meets, (B, n, R, C, w, 2w), for the pairs that a round compares.

    order: (B, n, R, S), the token at each place; chunk: (B, n, R, S), the chunk of each token.
    """
    met = torch.zeros((), dtype=torch.uint8, device=order.device)
    for chunk_of in chunk.int().unbind(dim=2):  # (B, n, S): one round's chunks, seen from all rounds
        mine = chunk_of[:, :, None].expand_as(order).gather(3, order).unflatten(3, (-1, w))  # (B, n, R, C, w)
        mine, others = mine[..., :, None], with_chunk_before(mine, -1)[..., None, :]
        met = met + ((mine == others) | (mine - 1 == others))
    return met


ATTENTIONS: dict[str, type[FullAttention] | type[LongAttention]] = {
    "full": FullAttention,
    "window": WindowAttention,
    "linformer": LinformerAttention,
    "lsh": LSHAttention,
}
