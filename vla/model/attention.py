"""Scaled dot-product attention with several heads (Vaswani et al. 2017, section 3.2).

    B batch   Q query length   S memory length   D d_model   n heads   d = D / n

Departs from the formula in nothing but the kernel: the product, the masks and the softmax run
in torch's fused scaled_dot_product_attention. tests/test_attention.py holds the formula.
"""

from __future__ import annotations

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
        heads = (self.n_heads, -1)
        q = self.query(x).unflatten(-1, heads).transpose(1, 2)  # (B, n, Q, d)
        k, v = self.key_value(memory).chunk(2, dim=-1)  # (B, S, D) each
        k = k.unflatten(-1, heads).transpose(1, 2)  # (B, n, S, d)
        v = v.unflatten(-1, heads).transpose(1, 2)  # (B, n, S, d)
        keep = keep_mask(pad, x.shape[1], causal)
        y = F.scaled_dot_product_attention(
            q, k, v, keep, self.dropout if self.training else 0.0, is_causal=causal and keep is None
        )  # (B, n, Q, d)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, Q, D)
