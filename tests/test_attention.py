"""Attention against its written formula, and its masks."""

from __future__ import annotations

import math

import pytest
import torch
from parity import parity
from torch import Tensor

from vla.model.attention import MultiHeadAttention

B, Q, S, D, HEADS = 3, 5, 7, 16, 4


def formula(layer: MultiHeadAttention, x: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
    """Concat(softmax(Q Kᵀ / √d) V) W_O, head by head. keep: (B, Q, S) bool."""
    width = x.shape[-1]
    size = width // layer.n_heads
    projected = memory @ layer.key_value.weight.T + layer.key_value.bias
    q = x @ layer.query.weight.T + layer.query.bias
    k, v = projected[..., :width], projected[..., width:]
    heads = []
    for head in range(layer.n_heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        weights = scores.masked_fill(~keep, -math.inf).softmax(dim=-1)
        heads.append(weights @ v[..., part])
    return torch.cat(heads, dim=-1) @ layer.out.weight.T + layer.out.bias


def attention(dropout: float = 0.0) -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(D, HEADS, dropout).double()


def padding(length: int) -> Tensor:
    """The first sample is full, the others end one and two tokens early."""
    return torch.arange(length) >= length - torch.arange(B)[:, None]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_the_formula(padded: bool, causal: bool) -> None:
    layer, x = attention(), torch.randn(B, S, D, dtype=torch.float64)
    keep = torch.ones(B, S, S, dtype=torch.bool)
    if padded:
        keep &= ~padding(S)[:, None, :]
    if causal:
        keep &= torch.ones(S, S, dtype=torch.bool).tril()
    got = layer(x, x, padding(S) if padded else None, causal=causal)
    parity("self-attention", "the formula", got, formula(layer, x, x, keep), 1e-12)


@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_is_the_formula(padded: bool) -> None:
    layer = attention()
    x, memory = torch.randn(B, Q, D, dtype=torch.float64), torch.randn(B, S, D, dtype=torch.float64)
    keep = torch.ones(B, Q, S, dtype=torch.bool)
    if padded:
        keep &= ~padding(S)[:, None, :]
    got = layer(x, memory, padding(S) if padded else None)
    parity("cross-attention", "the formula", got, formula(layer, x, memory, keep), 1e-12)


def test_padded_memory_changes_nothing() -> None:
    layer, pad = attention(), padding(S)
    x, memory = torch.randn(B, Q, D, dtype=torch.float64), torch.randn(B, S, D, dtype=torch.float64)
    other = torch.where(pad[..., None], torch.randn_like(memory) * 100, memory)
    assert torch.equal(layer(x, memory, pad), layer(x, other, pad))
    assert not torch.equal(layer(x, memory), layer(x, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_of_nothing_but_padding_stays_finite(dtype: torch.dtype) -> None:
    layer = attention().to(dtype)
    memory = torch.randn(B, S, D, dtype=dtype, requires_grad=True)
    pad = torch.zeros(B, S, dtype=torch.bool)
    pad[1] = True
    y = layer(torch.randn(B, Q, D, dtype=dtype), memory, pad)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert memory.grad is not None
    assert torch.isfinite(memory.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_dropout_acts_in_training_only() -> None:
    layer, x = attention(dropout=0.5), torch.randn(B, S, D, dtype=torch.float64)
    assert not torch.equal(layer(x, x), layer(x, x))
    layer.eval()
    assert torch.equal(layer(x, x), layer(x, x))
