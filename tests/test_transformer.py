"""Encoder and decoder against torch.nn's layers, positions against their formula, deep stacks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parity import parity
from torch import Tensor, nn

from vla.model.attention import MultiHeadAttention
from vla.model.fusion import CrossEncoder
from vla.model.parameters import count_parameters, initialise_network
from vla.model.positions import POSITIONS
from vla.model.transformer import (
    FEED_FORWARDS,
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
    parity(f"encoder layer, {norm}-norm", "torch.nn.TransformerEncoderLayer", got, expected, 1e-12)


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
    reference = "torch.nn.TransformerDecoderLayer"
    parity(f"decoder layer, {norm}-norm", reference, ours(x, memory), expected, 1e-12)


def stack(kind: type[Encoder] | type[Decoder], norm: str, n_layers: int = 2, **options: Any) -> Any:
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


def test_swiglu_is_its_formula() -> None:
    """W_2 (silu(W_1 x) · W_3 x), Shazeer 2020."""
    layer: Any = FEED_FORWARDS["swiglu"](D, FF, 0.0).double()
    x = torch.randn(B, S, D, dtype=torch.float64)
    w1, w3 = layer.up.weight.chunk(2)
    b1, b3 = layer.up.bias.chunk(2)
    gate = x @ w1.T + b1
    expected = (gate / (1 + (-gate).exp()) * (x @ w3.T + b3)) @ layer.out.weight.T + layer.out.bias
    parity("SwiGLU", "the formula", layer(x), expected, 1e-12)


def test_swiglu_costs_what_gelu_costs() -> None:
    gelu, swiglu = (count_parameters(FEED_FORWARDS[name](128, 384, 0.0)) for name in ("gelu", "swiglu"))
    assert abs(swiglu / gelu - 1) < 0.02


@pytest.mark.parametrize("width", [16, 7])
def test_sinusoidal_positions_are_the_formula_at_any_length(width: int) -> None:
    positions = POSITIONS["sinusoidal"](8, width)
    for length in (5, 8, 2000):
        angles = [[p / 10_000 ** (i // 2 * 2 / width) for i in range(width)] for p in range(length)]
        formula = [[math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(row)] for row in angles]
        table, expected = positions(length), torch.tensor(formula, dtype=torch.float64)
        parity("sinusoidal positions, held in float32", "the formula", table.double(), expected, 1e-6)


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


# Memory: the same numbers for less of it


def run_stack(kind: type[Encoder] | type[Decoder], x: Tensor, dropout: float, **options: Any) -> list[Tensor]:
    """Output and gradients of two layers, the same at every call."""
    torch.manual_seed(1)
    model = kind(2, D, n_heads=HEADS, d_ff=FF, dropout=dropout, **options).double()
    initialise_network(model)
    x, memory = x.clone().requires_grad_(), padded()
    torch.manual_seed(2)
    y = model(Tokens(x, memory.pad)).x if kind is Encoder else model(x, memory)
    y.square().sum().backward()
    return [y, *[p.grad for p in (x, *model.parameters()) if p.grad is not None]]


@pytest.mark.parametrize("kind", [Encoder, Decoder])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_checkpointing_changes_no_number(kind: type[Encoder] | type[Decoder], norm: str) -> None:
    x = torch.randn(B, S, D, dtype=torch.float64)
    plain, again = (run_stack(kind, x, 0.1, norm=norm, checkpointing=kept) for kept in (False, True))
    assert len(plain) == len(again) > 20
    for a, b in zip(plain, again, strict=True):
        parity("checkpointing, outputs and gradients", "without it", b, a, 1e-12)


@pytest.mark.parametrize("kind", [Encoder, Decoder])
def test_checkpointing_is_handed_tensors(
    kind: type[Encoder] | type[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps the random state of the GPUs on which it finds its arguments, and looks into no Tokens."""
    handed: list[Any] = []

    def checkpoint(layer: Any, *inputs: Any, use_reentrant: bool) -> Any:
        handed.extend(inputs)
        return layer(*inputs)

    monkeypatch.setattr("vla.model.transformer.checkpoint", checkpoint)
    run_stack(kind, torch.randn(B, S, D, dtype=torch.float64), 0.1, checkpointing=True)
    assert len(handed) == 2 * (2 if kind is Encoder else 3)
    assert all(isinstance(x, torch.Tensor) for x in handed)


@pytest.mark.parametrize("kind", [Encoder, Decoder])
@pytest.mark.parametrize("chunks", [2, 3, 100])
def test_chunked_feed_forward_changes_no_number(kind: type[Encoder] | type[Decoder], chunks: int) -> None:
    x = torch.randn(B, S, D, dtype=torch.float64)
    plain, chunked = (run_stack(kind, x, 0.0, chunks=parts) for parts in (1, chunks))
    assert len(plain) == len(chunked) > 20
    for a, b in zip(plain, chunked, strict=True):
        parity("chunked feed-forward, outputs and gradients", "at once", b, a, 1e-12)


def test_checkpointed_layers_run_twice_and_chunked_ones_in_parts() -> None:
    calls: list[torch.Size] = []
    encoder = Encoder(1, D, n_heads=HEADS, d_ff=FF, checkpointing=True, chunks=3)
    encoder.layers[0].feed_forward.register_forward_hook(lambda m, i, o: calls.append(o.shape))
    x = torch.randn(B, S, D, requires_grad=True)
    y = encoder(Tokens(x, torch.zeros(B, S, dtype=torch.bool))).x
    assert [shape[1] for shape in calls] == [3, 3, 1]
    y.sum().backward()
    assert len(calls) > 3  # going backward stops as soon as all is there again


# Step by step


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_cached_steps_equal_one_pass(norm: str, activation: str) -> None:
    decoder, memory = stack(Decoder, norm, 3, activation=activation), padded()
    x = torch.randn(B, H, D, dtype=torch.float64)
    caches = decoder.caches(memory, H)
    steps = [decoder.step(x[:, t : t + 1], t, caches, memory.pad) for t in range(H)]
    parity(
        "decoder with kept keys and values", "one pass", torch.cat(steps, dim=1), decoder(x, memory), 1e-12
    )


# Cross fusion


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_cross_fusion_equals_torchs_layers(norm: str) -> None:
    image, words, state = 4, 3, 2
    x = torch.randn(B, image + words + state, D, dtype=torch.float64)
    pad = torch.zeros(B, image + words + state, dtype=torch.bool)
    pad[1, 1] = pad[2, image + 1 : image + words] = True
    fusion = CrossEncoder(2, D, image, state, norm=norm, n_heads=HEADS, d_ff=FF, activation="relu")
    fusion = fusion.double()
    initialise_network(fusion)
    asks = [*range(image), *range(image + words, image + words + state)]
    y, text = x[:, asks], x[:, image : image + words]
    for layer in fusion.layers:
        theirs = nn.TransformerDecoderLayer(
            D, HEADS, FF, 0.0, batch_first=True, norm_first=norm == "pre", dtype=torch.float64
        )
        initialise_network(theirs)
        copy_layer(layer, theirs)
        y = theirs(
            y,
            text,
            tgt_key_padding_mask=pad[:, asks],
            memory_key_padding_mask=pad[:, image : image + words],
        )
    expected = torch.cat([y[:, :image], text, y[:, image:]], dim=1)
    got = fusion(Tokens(x, pad))
    reference = "torch.nn.TransformerDecoderLayer"
    parity("cross fusion", reference, got.x, fusion.norm(expected), 1e-12)
    assert torch.equal(got.pad, pad)
