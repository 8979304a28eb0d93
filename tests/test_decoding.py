"""Decoding: step by step with caches against whole passes without, and what the tokens carry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import parity
from torch import Tensor, nn
from toy_run import toy_model

from vla.data.normalize import DimensionStatistics, Normalizer
from vla.model.decoding import DECODINGS, Autoregressive
from vla.model.heads import HEADS
from vla.model.parameters import initialise_network
from vla.model.transformer import Decoder
from vla.observation import Tokens

B, H, S, A, D = 3, 5, 7, 2, 32


def normalizer() -> Normalizer:
    rows = torch.randn(200, A, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    return Normalizer(DimensionStatistics.of(rows.double().numpy()))


class Parts:
    """A decoder, its head and a memory, in float64."""

    def __init__(self, head: str, norm: str, decoding: str = "autoregressive") -> None:
        torch.manual_seed(0)
        config = toy_model(chunk_size=H, head=head, decoding=decoding, bins=16, dropout=0.0, norm=norm)
        self.normalizer = normalizer()
        self.actions = DECODINGS[decoding](config, self.normalizer)
        self.decoder = Decoder(2, D, norm=norm, n_heads=2, d_ff=64)
        self.head = HEADS[head](config, self.normalizer)
        for part in (self.actions, self.decoder, self.head):
            initialise_network(part)
            part.double().eval()
        x = torch.randn(B, S, D, dtype=torch.float64)
        self.memory = Tokens(x, torch.arange(S) >= S - torch.arange(B)[:, None])

    def generate(self, prefix: Tensor, length: Tensor) -> Tensor:
        committed = torch.arange(H) < length[:, None]
        known = torch.where(committed[..., None], prefix, 0)
        return self.actions.generate(self.decoder, self.head, self.memory, known, committed)

    def uncached(self, prefix: Tensor, length: Tensor) -> Tensor:
        """H whole passes over all tokens, each of which settles one more action."""
        chunk = torch.zeros(B, H, A, dtype=torch.float64)
        for t in range(H):
            given = t < length
            hidden = self.decoder(self.actions(chunk, torch.zeros(B, H, dtype=torch.bool)), self.memory)
            action = self.normalizer.clip_normalized(self.head.decode(hidden[:, t : t + 1]))[:, 0]
            chunk[:, t] = torch.where(given[:, None], prefix[:, t], action)
        return chunk


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("head", ["l1", "bins", "gmm"])
@torch.no_grad()
def test_cached_decoding_equals_uncached(head: str, norm: str) -> None:
    parts, prefix = Parts(head, norm), torch.randn(B, H, A, dtype=torch.float64)
    for length in (torch.zeros(B, dtype=torch.int64), torch.tensor([0, 2, H])):
        cached, uncached = parts.generate(prefix, length), parts.uncached(prefix, length)
        # heads answer in float32
        parity(f"autoregressive decoding, {head}", "without a cache", cached.float(), uncached.float(), 2e-6)
        for i in range(B):
            assert torch.equal(cached[i, : length[i]].double(), prefix[i, : length[i]])


@torch.no_grad()
def test_a_generated_chunk_is_what_teacher_forcing_answers_to_it() -> None:
    parts = Parts("l1", "pre")
    none = torch.zeros(B, H, dtype=torch.bool)
    chunk = parts.generate(torch.zeros(B, H, A, dtype=torch.float64), torch.zeros(B, dtype=torch.int64))
    hidden = parts.decoder(parts.actions(chunk.double(), none), parts.memory)
    answer = parts.normalizer.clip_normalized(parts.head.decode(hidden))
    torch.testing.assert_close(answer.float(), chunk.float(), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_what_is_fed_back_is_what_the_robot_is_told() -> None:
    parts, fed = Parts("l1", "pre"), []
    parts.head.out.bias.fill_(1000)  # type: ignore[union-attr]
    assert isinstance(parts.actions, Autoregressive)
    parts.actions.previous.register_forward_hook(lambda module, inputs, output: fed.append(inputs[0]))
    chunk = parts.generate(torch.zeros(B, H, A, dtype=torch.float64), torch.zeros(B, dtype=torch.int64))
    told = parts.normalizer.unnormalize(chunk)
    torch.testing.assert_close(told, parts.normalizer.high.expand(B, H, A).double())
    torch.testing.assert_close(torch.cat(fed, dim=1), chunk)


def test_a_token_carries_the_action_before_it() -> None:
    actions = Parts("l1", "pre").actions
    assert isinstance(actions, Autoregressive)
    given = torch.randn(B, H, A, dtype=torch.float64)
    x = actions(given, torch.zeros(B, H, dtype=torch.bool)) - actions.positions(H)
    torch.testing.assert_close(x[:, 0], actions.start.expand(B, -1))
    torch.testing.assert_close(x[:, 1:], actions.previous(given[:, :-1]))


def test_open_tokens_carry_nothing_and_committed_ones_their_action() -> None:
    actions = Parts("l1", "pre", "parallel").actions
    given = torch.randn(B, H, A, dtype=torch.float64)
    committed = torch.arange(H) < torch.tensor([0, 2, H])[:, None]
    x = actions(given, committed) - actions.positions(H)
    torch.testing.assert_close(x[~committed], actions.open.expand(int((~committed).sum()), -1))
    torch.testing.assert_close(x[committed], actions.committed(given[committed]))


def test_each_layer_runs_once_per_step() -> None:
    parts, lengths = Parts("l1", "pre"), []
    parts.decoder.layers[0].feed_forward.register_forward_hook(lambda m, i, o: lengths.append(o.shape[1]))
    parts.generate(torch.zeros(B, H, A, dtype=torch.float64), torch.zeros(B, dtype=torch.int64))
    assert lengths == [1] * H


def test_a_head_that_makes_the_whole_chunk_is_told_its_prefix() -> None:
    parts, told = Parts("flow", "pre", "parallel"), []
    decode = parts.head.decode

    def listening(hidden: Tensor, sample: bool = False, prefix: Any = None) -> Tensor:
        told.append(prefix)
        return decode(hidden, sample, prefix)

    parts.head.decode = listening  # type: ignore[method-assign]
    prefix, length = torch.randn(B, H, A, dtype=torch.float64), torch.tensor([0, 2, H])
    parts.generate(prefix, length)
    ((known, committed),) = told
    assert torch.equal(committed.sum(dim=1), length)
    assert torch.equal(known[committed], prefix[committed])


class Generated(nn.Module):
    """Decoding with tensors alone going in."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.actions, self.decoder, self.head = parts.actions, parts.decoder, parts.head

    def forward(self, x: Tensor, pad: Tensor, known: Tensor, committed: Tensor) -> Tensor:
        return self.actions.generate(self.decoder, self.head, Tokens(x, pad), known, committed)


@pytest.mark.parametrize(
    ("decoding", "head"),
    [("parallel", "l1"), ("parallel", "flow"), ("autoregressive", "l1"), ("autoregressive", "bins")],
)
@torch.no_grad()
def test_one_graph_without_breaks_serves_every_prefix(decoding: str, head: str) -> None:
    """What torch.compile and a captured CUDA graph need: no look at a value from Python, one shape."""
    parts, graphs = Parts(head, "pre", decoding), []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    generate = Generated(parts)
    compiled = torch.compile(generate, backend=count, fullgraph=True, dynamic=False)
    for length in (torch.zeros(B, dtype=torch.int64), torch.tensor([0, 2, H])):
        committed = torch.arange(H) < length[:, None]
        known = torch.where(committed[..., None], torch.randn(B, H, A, dtype=torch.float64), 0)
        inputs = (parts.memory.x, parts.memory.pad, known, committed)
        torch.testing.assert_close(compiled(*inputs), generate(*inputs))
    assert len(graphs) == 1


# One situation, two ways to act: a chunk is all +0.8 or all -0.8, each half the time


def one_way(decoding: str, head: str, n: int = 300) -> tuple[float, float]:
    """Train on it: the share of drawn chunks that keep to one way, and of those that go up."""
    torch.manual_seed(0)
    one = [1.0]
    limits = Normalizer(DimensionStatistics([0.0], one, [-1.0], one, one, one))
    config = toy_model(chunk_size=4, head=head, decoding=decoding, bins=21, components=2, dropout=0.0)
    parts = nn.ModuleDict(
        {
            "actions": DECODINGS[decoding](config, limits),
            "decoder": Decoder(2, D, n_heads=2, d_ff=64),
            "head": HEADS[head](config, limits),
        }
    )
    initialise_network(parts)
    actions, decoder, out = (parts[name] for name in ("actions", "decoder", "head"))
    optimizer = torch.optim.Adam(parts.parameters(), lr=3e-3)

    def memory(n: int) -> Tokens:
        return Tokens(torch.ones(n, 1, D), torch.zeros(n, 1, dtype=torch.bool))

    none = torch.zeros(128, 4, dtype=torch.bool)
    for _ in range(300):
        target = (0.8 * (torch.randint(0, 2, (128, 1, 1)) * 2.0 - 1)).expand(128, 4, 1)
        loss = out.loss(decoder(actions(target, none), memory(128)), target, none)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        nothing = torch.zeros(n, 4, dtype=torch.bool)
        up = actions.generate(decoder, out, memory(n), torch.zeros(n, 4, 1), nothing, sample=True)[..., 0] > 0
    return (up.all(dim=1) | ~up.any(dim=1)).float().mean().item(), up[:, 0].float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["bins", "gmm"])
def test_decoding_one_by_one_keeps_a_chunk_to_one_of_two_ways(head: str) -> None:
    consistent, up = one_way("autoregressive", head)
    assert consistent > 0.97
    assert 0.35 < up < 0.65
    consistent, up = one_way("parallel", head)  # each action tosses its own coin: 2 of 16 chunks
    assert consistent < 0.25
    assert 0.35 < up < 0.65
