"""Scaled dot-product attention with several heads (Vaswani et al. 2017, section 3.2).

    B batch   Q query length   S memory length   D d_model   n heads   d = D / n

Departs from the formula in nothing but the kernel: the product, the masks and the softmax run
in torch's fused scaled_dot_product_attention. tests/test_attention.py holds the formula.
Attention for long sequences is in long_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


def keep_mask(pad: Tensor | None, queries: int, causal: bool) -> Tensor | None:
    """What may be attended to: True = keep, broadcastable to (B, n, Q, S); None = everything.

    pad: (B, S) bool, True = ignore. A sequence of nothing but padding keeps all of itself: its
    output has no meaning either way, and so it is finite without a branch. `causal` alone needs
    no mask, the kernel has a flag for it.
    """
    if pad is None:
        return None
    keep = (~pad | pad.all(dim=1, keepdim=True))[:, None, None, :]  # (B, 1, 1, S)
    if causal:
        keep = keep & pad.new_ones(queries, pad.shape[1]).tril()  # (B, 1, Q, S)
    return keep


@dataclass
class KeyValues:
    """Keys and values of a sequence, (B, n, S, d) each: what decoding step by step keeps."""

    k: Tensor
    v: Tensor

    def write(self, t: int, new: KeyValues) -> None:
        """Put one token's (B, n, 1, d) in place t."""
        self.k[:, :, t : t + 1] = new.k
        self.v[:, :, t : t + 1] = new.v

    def upto(self, t: int) -> KeyValues:
        """Those of the tokens 0 … t."""
        return KeyValues(self.k[:, :, : t + 1], self.v[:, :, : t + 1])


class MultiHeadAttention(nn.Module):
    """Concat(head_1 … head_n) W_O, each head softmax(Q Kᵀ / √d) V on its share of the width."""

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, memory: Tensor, pad: Tensor | None = None, causal: bool = False) -> Tensor:
        """x: (B, Q, D) asks, memory: (B, S, D) answers; x itself for self-attention. -> (B, Q, D).

        pad: (B, S) bool, True = a memory token to ignore; causal: position t sees 0 … t only.
        """
        return self.answer(x, self.key_values(memory), pad, causal)

    def answer(self, x: Tensor, memory: KeyValues, pad: Tensor | None = None, causal: bool = False) -> Tensor:
        """`forward` with the memory's keys and values computed before."""
        y = self.attend(self.split(self.query(x)), memory.k, memory.v, pad, causal)  # (B, n, Q, d)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, Q, D)

    def key_values(self, memory: Tensor) -> KeyValues:
        """(B, S, D) -> keys and values by heads."""
        k, v = self.key_value(memory).chunk(2, dim=-1)  # (B, S, D) each
        return KeyValues(self.split(k), self.split(v))

    def split(self, x: Tensor) -> Tensor:
        """(B, S, D) -> heads (B, n, S, d)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, causal: bool) -> Tensor:
        """softmax(Q Kᵀ / √d) V by heads: q (B, n, Q, d), k and v (B, n, S, d) -> (B, n, Q, d)."""
        keep = keep_mask(pad, q.shape[2], causal)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, keep, dropout, is_causal=causal and keep is None)
