"""Heads: the loss by its definition, and what padding may do to it."""

from __future__ import annotations

import torch

from vla.model.heads import HEADS

B, H, D, A = 3, 5, 16, 4


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ignore = torch.arange(H) >= torch.tensor([5, 3, 1])[:, None]
    return torch.randn(B, H, D), torch.randn(B, H, A), ignore


def test_l1_is_the_mean_absolute_error_of_what_counts() -> None:
    hidden, target, ignore = tensors()
    head = HEADS["l1"](D, A)
    error = (head.decode(hidden) - target).abs()
    expected = torch.cat([error[b, t] for b in range(B) for t in range(H) if not ignore[b, t]]).mean()
    torch.testing.assert_close(head.loss(hidden, target, ignore), expected)


def test_ignored_actions_get_no_gradient() -> None:
    hidden, target, ignore = tensors()
    hidden.requires_grad_()
    HEADS["l1"](D, A).loss(hidden, target, ignore).backward()
    assert hidden.grad is not None
    assert torch.equal((hidden.grad != 0).any(dim=-1), ~ignore)


def test_a_batch_of_nothing_but_padding_costs_nothing() -> None:
    hidden, target, ignore = tensors()
    assert HEADS["l1"](D, A).loss(hidden, target, torch.ones_like(ignore)).item() == 0


def test_actions_are_float32_under_autocast() -> None:
    hidden, _, _ = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        actions = HEADS["l1"](D, A).decode(hidden)
    assert actions.shape == (B, H, A)
    assert actions.dtype == torch.float32
