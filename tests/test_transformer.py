"""Encoder and decoder against torch.nn's layers, positions against their formula, deep stacks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from vla.model.attention import MultiHeadAttention
from vla.model.parameters import count_parameters, initialise_network
from vla.model.transformer import (
    FEED_FORWARDS,
    POSITIONS,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    PostNorm,
    PreNorm,
)
from vla.observation import Tokens

B, H, S, D, HEADS, FF = 3, 5, 7, 16, 4, 24


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def copy_attention(ours: MultiHeadAttention, theirs: nn.MultiheadAttention) -> None:
    for mine, name in ((ours.query, slice(0, D)), (ours.key_value, slice(D, None))):
        mine.weight.copy_(theirs.in_proj_weight[name])
        mine.bias.copy_(theirs.in_proj_bias[name])
    ours.out.load_state_dict(theirs.out_proj.state_dict())


@torch.no_grad()
def copy_layer(
    ours: EncoderLayer | DecoderLayer, theirs: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
) -> None:
    """Give our layer the weights of torch's, whose norms are drawn too, lest they pass unnoticed."""
    for norm in theirs.modules():
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    copy_attention(ours.attention, theirs.self_attn)
    around: list[PreNorm | PostNorm] = [ours.around_attention]
    if isinstance(ours, DecoderLayer) and isinstance(theirs, nn.TransformerDecoderLayer):
        copy_attention(ours.cross_attention, theirs.multihead_attn)
        around.append(ours.around_cross_attention)
    assert isinstance(ours.feed_forward, FeedForward)
    ours.feed_forward.up.load_state_dict(theirs.linear1.state_dict())
    ours.feed_forward.out.load_state_dict(theirs.linear2.state_dict())
    for i, mine in enumerate([*around, ours.around_feed_forward], start=1):
        mine.norm.load_state_dict(getattr(theirs, f"norm{i}").state_dict())


def padded(length: int = S) -> Tokens:
    x = torch.randn(B, length, D, dtype=torch.float64)
    return Tokens(x, torch.arange(length) >= length - torch.arange(B)[:, None])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_encoder_layer_equals_torch(norm: str, activation: str) -> None:
    theirs = nn.TransformerEncoderLayer(
        D, HEADS, FF, 0.0, activation, batch_first=True, norm_first=norm == "pre", dtype=torch.float64
    )
    ours = EncoderLayer(D, HEADS, FF, norm=norm, activation=activation).double()
    copy_layer(ours, theirs)
    tokens = padded()
    got, expected = ours(tokens).x, theirs(tokens.x, src_key_padding_mask=tokens.pad)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_decoder_layer_equals_torch(norm: str, activation: str) -> None:
    theirs = nn.TransformerDecoderLayer(
        D, HEADS, FF, 0.0, activation, batch_first=True, norm_first=norm == "pre", dtype=torch.float64
    )
    ours = DecoderLayer(D, HEADS, FF, norm=norm, activation=activation).double()
    copy_layer(ours, theirs)
    x, memory = torch.randn(B, H, D, dtype=torch.float64), padded()
    future = torch.ones(H, H, dtype=torch.bool).triu(1)
    expected = theirs(x, memory.x, tgt_mask=future, memory_key_padding_mask=memory.pad)
    torch.testing.assert_close(ours(x, memory), expected, atol=1e-12, rtol=1e-10)


def stack(kind: type[Encoder] | type[Decoder], norm: str, n_layers: int = 2, **options: str) -> nn.Module:
    model = kind(n_layers, D, norm=norm, n_heads=HEADS, d_ff=FF, **options)
    initialise_network(model)
    return model.double()


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_encoder_ignores_padding(norm: str) -> None:
    encoder, tokens = stack(Encoder, norm), padded()
    together = encoder(tokens).x
    for i in range(B):
        length = S - i
        alone = encoder(Tokens(tokens.x[i : i + 1, :length], tokens.pad[i : i + 1, :length])).x[0]
        torch.testing.assert_close(together[i, :length], alone, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_decoder_output_depends_on_no_later_token(norm: str, activation: str) -> None:
    decoder, memory = stack(Decoder, norm, activation=activation), padded()
    x = torch.randn(B, H, D, dtype=torch.float64)
    before = decoder(x, memory)
    for t in range(H):
        other = x.clone()
        other[:, t] += 1
        changed = (decoder(other, memory) != before).any(dim=-1)  # (B, H)
        assert not changed[:, :t].any()
        assert changed[:, t:].all()


def test_every_stack_ends_on_a_norm() -> None:
    tokens = padded()
    tokens.x = tokens.x * 100
    for norm in ("pre", "post"):
        x = stack(Encoder, norm)(tokens).x
        torch.testing.assert_close(x.mean(dim=-1), torch.zeros(B, S, dtype=torch.float64))
        spread = x.std(dim=-1, correction=0)
        torch.testing.assert_close(spread, torch.ones_like(spread), atol=1e-4, rtol=0)


def test_swiglu_costs_what_gelu_costs() -> None:
    gelu, swiglu = (count_parameters(FEED_FORWARDS[name](128, 384, 0.0)) for name in ("gelu", "swiglu"))
    assert abs(swiglu / gelu - 1) < 0.02


@pytest.mark.parametrize("width", [16, 7])
def test_sinusoidal_positions_are_the_formula_at_any_length(width: int) -> None:
    positions = POSITIONS["sinusoidal"](8, width)
    for length in (5, 8, 2000):
        table = positions(length)
        assert table.shape == (length, width)
        for p in {0, 1, length // 2, length - 1}:
            for i in range(width):
                angle = p / 10_000 ** (i // 2 * 2 / width)
                assert table[p, i].item() == pytest.approx(
                    math.cos(angle) if i % 2 else math.sin(angle), abs=1e-6
                )


def test_learned_positions_end_where_training_did() -> None:
    positions = POSITIONS["learned"](8, D)
    initialise_network(positions)
    assert positions(5).shape == (5, D)
    with pytest.raises(ValueError, match="got: a sequence of 9"):
        positions(9)


def train_deep(norm: str, n_layers: int) -> list[Tensor]:
    """Losses of 20 steps of regressing random targets through an encoder and a decoder."""
    parts = nn.ModuleList(kind(n_layers, 32, norm=norm, n_heads=4, d_ff=64) for kind in (Encoder, Decoder))
    initialise_network(parts)
    encoder, decoder = parts
    tokens = Tokens(torch.randn(4, 6, 32), torch.zeros(4, 6, dtype=torch.bool))
    x, target = torch.randn(4, 5, 32), torch.randn(4, 5, 32)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=3e-4)
    losses = []
    for _ in range(20):
        loss = (decoder(x, encoder(tokens)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms = [p.grad.norm() for p in parts.parameters() if p.grad is not None and p.ndim == 2]
        assert torch.isfinite(torch.stack(norms)).all()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_hundred_layers_train(norm: str) -> None:
    losses = torch.stack(train_deep(norm, 100))
    assert torch.isfinite(losses).all()
    assert losses[-1] < 0.2 * losses[0]  # without scaled branches: 0.45 (pre) and 0.76 (post)
