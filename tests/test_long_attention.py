"""Attention for long sequences against written formulas, torch's FlexAttention and transformers' Reformer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from parity import parity
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from vla.architecture import AttentionConfig
from vla.model import long_attention
from vla.model.attention import MultiHeadAttention
from vla.model.long_attention import ATTENTIONS, LSHAttention
from vla.model.parameters import initialise_network

B, D, HEADS, LENGTH = 3, 16, 4, 40
SMALL: dict[str, Any] = dict(window=3, rank=6, chunk=4, hashes=3)
KINDS = ("full", "window", "linformer", "lsh")
LONG = ("window", "linformer", "lsh")


def attention(kind: str, length: int = LENGTH, dropout: float = 0.0, **config: int) -> MultiHeadAttention:
    torch.manual_seed(0)
    layer = ATTENTIONS[kind](D, HEADS, dropout, AttentionConfig(kind=kind, **SMALL | config), length)
    initialise_network(layer)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):  # begins at 0, where it could be forgotten unseen
            nn.init.normal_(parameter)
    return layer.double()


def tokens(length: int) -> Tensor:
    return torch.randn(B, length, D, dtype=torch.float64)


def padding(length: int) -> Tensor:
    """None in the first sample, some in the middle and at the end of the second, at the start of the third."""
    pad = torch.zeros(B, length, dtype=torch.bool)
    pad[1, length // 4 : length // 2] = True
    pad[1, -2:] = True
    pad[2, : length // 3] = True
    return pad


def heads(layer: MultiHeadAttention, x: Tensor, linear: nn.Linear) -> Tensor:
    """x W + b by heads, written out: (B, S, D) -> (B, n, S, d)."""
    y = x @ linear.weight.T + linear.bias
    return torch.stack(y.split(y.shape[-1] // layer.n_heads, dim=-1), dim=1)


def answer(layer: MultiHeadAttention, scores: Tensor, keep: Tensor, v: Tensor) -> Tensor:
    """Concat(softmax(scores) V) W_O; keep: what may be attended to."""
    y = scores.masked_fill(~keep, -torch.inf).softmax(dim=-1) @ v
    return torch.cat(y.unbind(dim=1), dim=-1) @ layer.out.weight.T + layer.out.bias


def projected(layer: MultiHeadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of all heads."""
    q = heads(layer, x, layer.query)
    k, v = (x @ layer.key_value.weight.T + layer.key_value.bias).chunk(2, dim=-1)
    k, v = (torch.stack(t.split(D // HEADS, dim=-1), dim=1) for t in (k, v))
    return q, k, v


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 9, 24, 40])
@pytest.mark.parametrize("padded", [False, True])
def test_window_is_full_attention_within_a_band(length: int, padded: bool) -> None:
    layer, x = attention("window"), tokens(length)
    pad = padding(length) if padded else None
    count = torch.zeros(B, length, dtype=torch.bool) if pad is None else pad
    place = (~count).cumsum(dim=1)  # among the tokens that count
    near = (place[:, :, None] - place[:, None, :]).abs() <= SMALL["window"]
    keep = near & ~count[:, None, :] | torch.eye(length, dtype=torch.bool)
    q, k, v = projected(layer, x)
    expected = answer(layer, q @ k.mT / (D // HEADS) ** 0.5, keep[:, None], v)
    got = layer(x, x, pad)
    parity("window attention", "the formula within a band", got[~count], expected[~count], 1e-12)


def test_window_is_flex_attention_with_the_same_band() -> None:
    layer, x = attention("window"), tokens(LENGTH)
    band = create_block_mask(
        lambda b, h, i, j: (i - j).abs() <= SMALL["window"], None, None, LENGTH, LENGTH, device="cpu"
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        y = flex_attention(*projected(layer, x), block_mask=band)
        assert isinstance(y, Tensor)
        expected = layer.out(torch.cat(y.unbind(dim=1), dim=-1))
        parity("window attention", "FlexAttention", layer(x, x), expected, 1e-12)


@pytest.mark.parametrize("length", [1, 7, LENGTH])
@pytest.mark.parametrize("padded", [False, True])
def test_linformer_is_its_formula(length: int, padded: bool) -> None:
    layer, x = attention("linformer"), tokens(length)
    pad = padding(length) if padded else torch.zeros(B, length, dtype=torch.bool)
    e, f = (layer.get_parameter(f"{name}.weight").detach() for name in ("keys", "values"))
    got = layer(x, x, pad if padded else None)
    for sample in range(B):
        real = x[sample : sample + 1, ~pad[sample]]
        q, k, v = projected(layer, real)
        k, v = e[:, : real.shape[1]] @ k, f[:, : real.shape[1]] @ v
        every = torch.ones(1, dtype=torch.bool)
        expected = answer(layer, q @ k.mT / (D // HEADS) ** 0.5, every, v)
        parity("linformer attention", "the formula", got[sample, ~pad[sample]], expected[0], 1e-12)


def meetings(layer: LSHAttention, q: Tensor) -> Tensor:
    """Which tokens some round of hashing brings together, token by token: q (n, S, d) -> (n, S, S) bool."""
    n, length, _ = q.shape
    met = torch.zeros(n, length, length, dtype=torch.bool)
    for head in range(n):
        for turn in range(layer.rotations.shape[2]):
            along = q[head] @ layer.rotations[head, :, turn]
            bucket = torch.cat([along, -along], dim=-1).argmax(dim=-1).tolist()
            ordered = sorted(range(length), key=lambda token: (bucket[token], token))
            chunk = {token: place // layer.chunk for place, token in enumerate(ordered)}
            for i in range(length):
                for j in range(length):
                    met[head, i, j] |= chunk[i] - chunk[j] in (0, 1)
    return met


@pytest.mark.parametrize("hashes", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 21, 40])
@pytest.mark.parametrize("padded", [False, True])
def test_lsh_is_shared_qk_attention_among_those_that_met(hashes: int, length: int, padded: bool) -> None:
    layer, x = attention("lsh", hashes=hashes), tokens(length)
    assert isinstance(layer, LSHAttention)
    pad = padding(length) if padded else torch.zeros(B, length, dtype=torch.bool)
    got = layer(x, x, pad if padded else None)
    for sample in range(B):
        real = x[sample : sample + 1, ~pad[sample]]
        q, v = heads(layer, real, layer.query), heads(layer, real, layer.value)
        keep = meetings(layer, q[0]) & ~torch.eye(real.shape[1], dtype=torch.bool)
        keep |= torch.eye(real.shape[1], dtype=torch.bool) & ~keep.any(dim=-1, keepdim=True)
        scores = q @ (q / q.norm(dim=-1, keepdim=True)).mT
        expected = answer(layer, scores, keep[None], v)
        reference = "the formula over the pairs that met"
        parity("lsh attention", reference, got[sample, ~pad[sample]], expected[0], 1e-12)


def test_lsh_in_one_chunk_is_full_shared_qk_attention() -> None:
    layer, x = attention("lsh", chunk=LENGTH), tokens(LENGTH)
    q, v = heads(layer, x, layer.query), heads(layer, x, layer.get_submodule("value"))  # type: ignore[arg-type]
    others = ~torch.eye(LENGTH, dtype=torch.bool)
    expected = answer(layer, q @ (q / q.norm(dim=-1, keepdim=True)).mT, others, v)
    torch.testing.assert_close(layer(x, x), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("hashes", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_lsh_is_the_reformer_of_transformers(
    hashes: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no first chunk looks back to a last one; and it counts pairs as often as they meet."""
    monkeypatch.setattr(long_attention, "times_met", lambda order, chunk, w: torch.ones(()))
    layer, x = attention("lsh", hashes=hashes), tokens(LENGTH)
    assert isinstance(layer, LSHAttention)
    reference = LSHSelfAttention(
        ReformerConfig(
            attn_layers=["lsh"], hidden_size=D, num_attention_heads=HEADS, attention_head_size=D // HEADS,
            lsh_attn_chunk_length=SMALL["chunk"], num_hashes=hashes, hash_seed=7,
            num_buckets=2 * LENGTH // SMALL["chunk"], is_decoder=False,
        )
    )  # fmt: skip
    reference = reference.double().eval()
    torch.manual_seed(7)
    with torch.no_grad():
        layer.rotations.copy_(torch.randn(layer.rotations.shape, dtype=torch.float64))
        reference.query_key.weight.copy_(layer.query.weight)
        reference.value.weight.copy_(layer.value.weight)
        layer.query.bias.zero_()  # the reference has none
        layer.value.bias.zero_()
        layer.out.weight.copy_(torch.eye(D))
        layer.out.bias.zero_()
    real = torch.ones(B, LENGTH, dtype=torch.bool)
    if padded:
        real[1, -9:] = False
    result = reference(x, attention_mask=real)
    got, expected = layer(x, x, ~real), result.hidden_states

    order = result.buckets.argsort(dim=-1, stable=True)  # (B, n, R, S)
    first = torch.zeros(B, HEADS, LENGTH, dtype=torch.bool)
    first.scatter_(2, order[..., : SMALL["chunk"]].flatten(2), True)
    same = (~first & real[:, None]).transpose(1, 2)  # (B, S, n)
    assert same.float().mean() > 0.6
    got, expected = (t.unflatten(-1, (HEADS, -1)) for t in (got, expected))
    parity("lsh attention", "transformers' Reformer", got[same], expected[same], 2e-5)  # its norms add 1e-6
    if hashes == 1 and not padded:
        assert not torch.allclose(got[~same], expected[~same], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_amount_of_padding_nor_its_content_changes_a_token(kind: str) -> None:
    layer, x = attention(kind), tokens(17)
    expected = layer(x, x)
    for length, where in (
        (18, [4]),
        (30, [0, 1, *range(6, 14), 25, 28, 29]),
        (LENGTH, list(range(17, LENGTH))),
    ):
        pad = torch.zeros(B, length, dtype=torch.bool)
        pad[:, where] = True
        y = torch.randn(B, length, D, dtype=torch.float64) * 100
        y[~pad] = x.flatten(0, 1)
        got = layer(y, y, pad)
        torch.testing.assert_close(got[~pad], expected.flatten(0, 1), atol=1e-12, rtol=1e-10)
        y[pad] *= -3
        assert torch.equal(layer(y, y, pad)[~pad], got[~pad])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_every_parameter(kind: str) -> None:
    layer, x = attention(kind), tokens(LENGTH).requires_grad_()
    layer(x, x, padding(LENGTH)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]
        if kind in ("full", "window", "linformer") and name == "key_value.bias":
            rows = rows[D if kind != "linformer" else 0 :]  # softmax does not see what all keys share
        assert (rows.abs().amax(dim=1) > 1e-9).all(), name
    assert x.grad is not None
    assert (x.grad[~padding(LENGTH)].abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_of_nothing_but_padding_stays_finite(kind: str, dtype: torch.dtype) -> None:
    layer, x = attention(kind).to(dtype), tokens(11).to(dtype).requires_grad_()
    pad = padding(11)
    pad[0] = True
    y = layer(x, x, pad)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_is_near(kind: str) -> None:
    layer, x, pad = attention(kind, chunk=LENGTH).float(), tokens(LENGTH).float(), padding(LENGTH)
    expected = layer(x, x, pad)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, x, pad)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got[~pad].float(), expected[~pad], atol=0.1, rtol=0.05)
    got.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


class SelfAttention(nn.Module):
    """As the encoder calls it."""

    def __init__(self, attention: MultiHeadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.attention(x, x, pad)


@pytest.mark.parametrize("kind", KINDS)
def test_exports_with_any_batch_and_repeats_itself(kind: str) -> None:
    model = SelfAttention(attention(kind, dropout=0.5)).eval()
    x, pad = tokens(22), padding(22)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x, pad), dynamic_shapes=({0: batch}, {0: batch})).module()
    for other in (pad, pad.roll(3, dims=1), torch.zeros_like(pad)):
        y, other = torch.cat([x, x * 2]), torch.cat([other, pad])
        torch.testing.assert_close(program(y, other), model(y, other), atol=1e-12, rtol=1e-10)
    assert torch.equal(model(x, pad), model(x, pad))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only(kind: str) -> None:
    layer, x = attention(kind, dropout=0.5), tokens(22)
    assert not torch.equal(layer(x, x), layer(x, x))
    layer.eval()
    expected = layer(x, x)
    assert torch.equal(layer(x, x), expected)
    alone = x[1:2]
    torch.testing.assert_close(layer(alone, alone), expected[1:2], atol=1e-12, rtol=1e-10)


def test_lsh_hashes_alike_after_a_checkpoint() -> None:
    first = attention("lsh")
    other = ATTENTIONS["lsh"](D, HEADS, 0.0, AttentionConfig(kind="lsh", **SMALL), LENGTH).double()
    x = tokens(LENGTH)
    assert "rotations" in first.state_dict()
    assert "rotations" not in dict(first.named_parameters())
    assert not torch.allclose(first(x, x), other(x, x))
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(x, x), other(x, x))


@pytest.mark.parametrize("kind", LONG)
def test_what_they_cannot_do_is_refused(kind: str) -> None:
    layer, x = attention(kind), tokens(8)
    for wrong in (
        lambda: layer(x, tokens(8)),
        lambda: layer(x, x, causal=True),
        lambda: attention(kind, length=7)(x, x),
    ):
        with pytest.raises(ValueError, match=f"kind={kind}: got .* expected .* remedy: set .*kind=full"):
            wrong()


def test_full_is_multi_head_attention() -> None:
    layer, x = attention("full"), tokens(9)
    assert torch.equal(MultiHeadAttention.forward(layer, x, x), layer(x, x))
