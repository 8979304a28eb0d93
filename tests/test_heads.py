"""Heads: each loss against an independent reference, padding, and what a bimodal problem makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn import functional as F

from vla.architecture import ModelConfig
from vla.data.normalize import DimensionStatistics, Normalizer
from vla.model.heads import HEADS, GMMHead, draw
from vla.model.parameters import initialise_network

B, H, D, A = 3, 5, 16, 4
NAMES = sorted(HEADS)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def normalizer(action_dim: int = A) -> Normalizer:
    """Limits that differ by dimension, of which the last never moves."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 3, (200, action_dim)) * np.arange(1, action_dim + 1)
    actions[:, -1] = 0.3
    return Normalizer(DimensionStatistics.of(actions))


def build(name: str, chunk_size: int = H, limits: Normalizer | None = None, **options: Any) -> Any:
    sizes = {"d_model": D, "n_heads": 2, "d_ff": 2 * D, "max_prefix": 0, "bins": 11, "components": 3}
    config = ModelConfig(size="tiny", chunk_size=chunk_size, **(sizes | options))
    head = HEADS[name](config, limits or normalizer())
    initialise_network(head)
    return head


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """hidden, target, ignore: samples of 5, 3 and 1 actions."""
    ignore = torch.arange(H) >= torch.tensor([5, 3, 1])[:, None]
    return torch.randn(B, H, D), torch.randn(B, H, A), ignore


def kept(cost: Tensor, ignore: Tensor) -> Tensor:
    """The mean of cost (B, H), entry by entry."""
    entries = [cost[b, t] for b in range(len(cost)) for t in range(cost.shape[1]) if not ignore[b, t]]
    return torch.stack(entries).mean()


# Every head


@pytest.mark.parametrize("name", NAMES)
def test_ignored_actions_get_no_gradient(name: str) -> None:
    hidden, target, ignore = tensors()
    hidden.requires_grad_()
    build(name).loss(hidden, target, ignore).backward()
    assert hidden.grad is not None
    assert torch.equal((hidden.grad != 0).any(dim=-1), ~ignore)


@pytest.mark.parametrize("name", NAMES)
def test_ignored_targets_do_not_count(name: str) -> None:
    hidden, target, ignore = tensors()
    head, losses = build(name), []
    for filler in (0.0, 7.0):
        torch.manual_seed(1)
        losses.append(head.loss(hidden, torch.where(ignore[..., None], filler, target), ignore))
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_nothing_but_padding_costs_nothing(name: str) -> None:
    hidden, target, ignore = tensors()
    hidden.requires_grad_()
    loss = build(name).loss(hidden, target, torch.ones_like(ignore))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_actions_are_float32_under_autocast(name: str, sample: bool) -> None:
    hidden, target, ignore = tensors()
    head = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        actions, loss = head.decode(hidden, sample), head.loss(hidden, target, ignore)
    assert actions.shape == (B, H, A)
    assert actions.dtype == loss.dtype == torch.float32
    assert torch.isfinite(actions).all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_the_loss_by_bf16s_precision_only(name: str) -> None:
    hidden, target, ignore = tensors()
    head, losses = build(name), []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(head.loss(hidden, target, ignore))
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    head = build(name)
    head.loss(*tensors()).backward()
    dead = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("name", NAMES)
def test_decoding_repeats_and_sampling_does_not(name: str) -> None:
    hidden = tensors()[0]
    head = build(name)
    assert torch.equal(head.decode(hidden), head.decode(hidden))
    assert torch.equal(head.decode(hidden, True), head.decode(hidden, True)) == (name == "l1")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_brings_the_same_actions_back(name: str) -> None:
    hidden = tensors()[0]
    head = build(name)
    torch.rand(7)  # whatever else was drawn in between
    other = build(name)
    assert name == "l1" or not torch.equal(other.decode(hidden), head.decode(hidden))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.decode(hidden), head.decode(hidden))


def test_l1_is_the_mean_absolute_error_of_what_counts() -> None:
    hidden, target, ignore = tensors()
    head = build("l1")
    cost = (hidden @ head.out.weight.T + head.out.bias - target).abs().mean(dim=2)
    torch.testing.assert_close(head.loss(hidden, target, ignore), kept(cost, ignore))


def test_the_parameters_of_l1_keep_their_names() -> None:
    assert sorted(build("l1").state_dict()) == ["out.bias", "out.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_action_t_depends_on_no_later_token(name: str) -> None:
    hidden = tensors()[0]
    head = build(name, bins=10_000)
    before = head.decode(hidden)
    for t in range(H):
        other = hidden.clone()
        other[:, t] += 1
        changed = (head.decode(other) != before).any(dim=-1)  # (B, H)
        assert not changed[:, :t].any()
        assert changed[:, t].all()


@pytest.mark.parametrize("name", ["l1", "bins", "gmm"])
def test_these_heads_act_token_by_token(name: str) -> None:
    hidden = tensors()[0]
    head = build(name)
    one_by_one = torch.cat([head.decode(hidden[:, t : t + 1]) for t in range(H)], dim=1)
    torch.testing.assert_close(head.decode(hidden), one_by_one)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_exports(name: str) -> None:
    class Decode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = build(name, flow_steps=3).eval()

        def forward(self, hidden: Tensor) -> Tensor:
            return self.head.decode(hidden)

    module, hidden = Decode(), tensors()[0]
    program = torch.export.export(module, (hidden,))
    torch.testing.assert_close(program.module()(hidden), module(hidden))


def fit(head: nn.Module, hidden: Tensor, target: Any, steps: int, lr: float = 3e-3) -> list[float]:
    """Losses of training on `target()` with Adam and a cosine."""
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        wanted = target()
        loss = head.loss(hidden, wanted, torch.zeros_like(wanted[..., 0], dtype=torch.bool))  # type: ignore
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_overfitted(name: str) -> None:
    hidden = torch.randn(4, H, 32)
    limits = normalizer()
    target = torch.rand(4, H, A) * (limits.high - limits.low) + limits.low
    target = limits.normalize(target)
    head = build(name, d_model=32, bins=64, components=2)
    fit(head, hidden, lambda: target, steps=1500, lr=1e-2)
    # half a bin of a spread of ±1.7; a straight path to one target is followed by Euler's method
    error = {"l1": 0.02, "bins": 1.75 / 64, "gmm": 0.02, "flow": 0.1}[name]
    assert (head.eval().decode(hidden) - target).abs().max() < error


# Bins


def test_bins_cost_the_cross_entropy_of_the_right_bin() -> None:
    hidden, target, ignore = tensors()
    head, limits = build("bins"), normalizer()
    logits = (hidden @ head.out.weight.T + head.out.bias).view(B, H, A, 11)
    low, high = limits.normalize(limits.low), limits.normalize(limits.high)
    cost = torch.zeros(B, H)
    for b, t, a in np.ndindex(B, H, A):
        edges = np.linspace(low[a].item(), high[a].item(), 12)
        index = int(np.clip(np.searchsorted(edges, target[b, t, a].item()) - 1, 0, 10))
        index = 0 if a == A - 1 else index  # the dimension that never moves
        cost[b, t] += F.cross_entropy(logits[b, t, a], torch.tensor(index)) / A
    torch.testing.assert_close(head.loss(hidden, target, ignore), kept(cost, ignore))


def test_bins_are_centred_between_the_limits() -> None:
    head, limits = build("bins"), normalizer()
    every = torch.arange(11).expand(A, 11).T[None]  # (1, 11, A)
    centres = limits.unnormalize(head.centre(every))[0]  # (11, A)
    edges = torch.from_numpy(np.linspace(limits.low.numpy(), limits.high.numpy(), 12))
    torch.testing.assert_close(centres, (edges[1:] + edges[:-1]) / 2)
    assert torch.equal(head.index(head.centre(every))[..., :-1], every[..., :-1])


@pytest.mark.parametrize("sample", [False, True])
def test_bins_stay_inside_the_limits(sample: bool) -> None:
    head, limits = build("bins"), normalizer()
    actions = limits.unnormalize(head.decode(torch.randn(64, H, D) * 100, sample))
    assert torch.equal(actions, limits.clip(actions))
    assert (actions[..., -1] == limits.low[-1]).all()


def test_targets_beyond_the_limits_fall_into_the_outermost_bins() -> None:
    head = build("bins")
    far = torch.tensor([-100.0, 100.0]).view(1, 2, 1).expand(1, 2, A)
    assert head.index(far)[0, :, 0].tolist() == [0, 10]


def test_draws_follow_the_logits() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, -torch.inf])
    counts = torch.bincount(draw(logits.expand(20_000, 4)), minlength=4)
    expected = 20_000 * logits.softmax(dim=0)
    assert counts[3] == 0
    assert ((counts - expected).abs() <= 4 * expected.sqrt()).all()


# Mixture


def reference_mixture(head: GMMHead, hidden: Tensor) -> MixtureSameFamily:
    out = (hidden.double() @ head.out.weight.double().T + head.out.bias.double()).view(B, H, 3, 1 + 2 * A)
    logits, means, scales = out[..., 0], out[..., 1 : 1 + A], out[..., 1 + A :]
    components = Independent(Normal(means, scales.exp().log1p() + head.floor), 1)
    return MixtureSameFamily(Categorical(logits=logits), components)


def test_the_mixture_costs_its_negative_log_likelihood() -> None:
    hidden, target, ignore = tensors()
    head = build("gmm")
    cost = -reference_mixture(head, hidden).log_prob(target.double()) / A
    torch.testing.assert_close(head.loss(hidden, target, ignore), kept(cost, ignore).float())


def test_the_mixture_survives_what_underflows() -> None:
    hidden, target, ignore = tensors()
    head = build("gmm")
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(hidden * 20, target + 1000, ignore)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_a_value_that_repeats_cannot_buy_endless_likelihood() -> None:
    head = build("gmm")
    with torch.no_grad():
        head.out.weight.zero_()
        head.out.bias.view(3, -1)[:, 1 + A :] = -1e4  # softplus of it is 0
    loss = head.loss(*[torch.zeros(1, 1, n) for n in (D, A)], torch.zeros(1, 1, dtype=torch.bool))
    expected = np.log(head.floor * np.sqrt(2 * np.pi))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_decoding_takes_the_heaviest_component_not_the_highest_peak() -> None:
    head = build("gmm")
    with torch.no_grad():
        head.out.weight.zero_()
        parts = head.out.bias.view(3, 1 + 2 * A)
        parts[:, 0] = torch.tensor([0.6, 0.3, 0.1]).log()
        parts[:, 1 : 1 + A] = torch.tensor([1.0, 2.0, 3.0])[:, None]
        parts[:, 1 + A :] = torch.tensor([1.0, -9.0, -9.0])[:, None]
    hidden = torch.zeros(1, 1, D)
    assert (head.decode(hidden) == 1).all()
    drawn = head.decode(hidden.expand(20_000, 1, D), sample=True)[:, 0]  # (N, A)
    reference = reference_mixture(head, torch.zeros(B, H, D))
    torch.testing.assert_close(drawn.mean(0).double(), reference.mean[0, 0], atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.var(0).double(), reference.variance[0, 0], atol=0.1, rtol=0)


# Flow


def test_the_flow_costs_the_error_of_its_velocity() -> None:
    hidden, target, ignore = tensors()
    head = build("flow")
    torch.manual_seed(5)
    loss = head.loss(hidden, target, ignore)
    torch.manual_seed(5)
    noise, time = torch.randn_like(target), torch.rand(B, H, 1)
    cost = torch.zeros(B, H)
    for b in range(B):
        n = int((~ignore[b]).sum())  # padding is behind the end, so it may as well not be there
        t, x0, x1 = time[b : b + 1, :n], noise[b : b + 1, :n], target[b : b + 1, :n]
        got = head.velocity(hidden[b : b + 1, :n], (1 - t) * x0 + t * x1, t)
        cost[b, :n] = (got - (x1 - x0)).square().mean(dim=2)[0]
    torch.testing.assert_close(loss, kept(cost, ignore))


def test_a_prefix_is_shown_as_it_is() -> None:
    hidden, target, _ = tensors()
    head, seen = build("flow"), {}
    ignore = torch.arange(H) < torch.tensor([0, 2, 4])[:, None]
    real = head.velocity
    head.velocity = lambda hidden, x, time: seen.update(x=x, time=time) or real(hidden, x, time)
    head.loss(hidden, target, ignore)
    assert torch.equal(seen["x"][ignore], target[ignore])
    assert torch.equal((seen["time"] == 1)[..., 0], ignore)
    assert not (seen["x"] == target)[~ignore].any()
    path = []
    head.velocity = lambda hidden, x, time: path.append((x, time)) or real(hidden, x, time)
    chunk = head.decode(hidden, prefix=(target, ignore))
    assert all(torch.equal(x[ignore], target[ignore]) for x in (*(x for x, _ in path), chunk))
    assert all((time[ignore] == 1).all() for _, time in path)
    assert torch.equal(path[0][0][~ignore], head.noise.expand(B, H, A)[~ignore])
    head.velocity = real
    assert torch.equal(head.decode(hidden, prefix=(target, torch.zeros_like(ignore))), head.decode(hidden))
    continued = (chunk != head.decode(hidden)).all(dim=2)  # whatever comes behind a prefix
    assert torch.equal(continued, ignore.any(dim=1, keepdim=True).expand(B, H))


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_follows_a_straight_path_to_its_end(steps: int) -> None:
    _, target, _ = tensors()
    head = build("flow", flow_steps=steps)
    calls = []

    def velocity(hidden: Tensor, x: Tensor, time: Tensor) -> Tensor:
        calls.append(time[0, :, 0])
        return torch.where(time < 1, (target - x) / (1 - time), 1e3)  # behind the end: never followed

    head.velocity = velocity
    for sample in (False, True):
        torch.testing.assert_close(head.decode(torch.zeros(B, H, D), sample), target)
    lag = max(1, round(0.2 * steps))
    assert len(calls) == 2 * (steps + lag * (H - 1))
    for i, time in enumerate(calls[: len(calls) // 2]):  # each action is a fifth behind the one before
        expected = [min(max((i - t * lag) / steps, 0), 1) for t in range(H)]
        assert time.tolist() == pytest.approx(expected)


def test_the_velocity_depends_on_nothing_later() -> None:
    hidden, x, _ = tensors()
    head, time = build("flow"), torch.rand(B, H, 1)
    inputs = [hidden, x, time]
    before = head.velocity(*inputs)
    for i, t in np.ndindex(3, H):
        other = [tensor.clone() for tensor in inputs]
        other[i][:, t] += 0.5
        changed = (head.velocity(*other) != before).any(dim=-1)  # (B, H)
        assert not changed[:, :t].any()
        assert changed[:, t].all()
        assert changed[:, t:].any(dim=0).all()


# One situation, two ways to act: all of the chunk +0.8 or all of it -0.8, each half the time

MODE, DRAWS = 0.8, 1000


def bimodal(name: str, chunk_size: int, action_dim: int, steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Train on it: what comes out (H, A), and DRAWS samples (N, H, A)."""
    one = [1.0] * action_dim
    limits = Normalizer(DimensionStatistics([0.0] * action_dim, one, [-1.0] * action_dim, one, one, one))
    head = build(name, chunk_size, limits, d_model=32, bins=41, **options)
    hidden = torch.randn(1, chunk_size, 32)

    def target() -> Tensor:
        sign = torch.randint(0, 2, (128, 1, 1)) * 2.0 - 1
        return (sign * MODE).expand(128, chunk_size, action_dim)

    fit(head, hidden.expand(128, -1, -1), target, steps)
    with torch.no_grad():
        return head.eval().decode(hidden)[0], head.decode(hidden.expand(DRAWS, -1, -1), sample=True)


def near(actions: Tensor) -> Tensor:
    """(..., H, A) -> (...) bool: all of the chunk near the same mode."""
    return torch.minimum((actions - MODE).abs(), (actions + MODE).abs()).amax((-2, -1)) < 0.2


def both_ways(actions: Tensor) -> bool:
    """Whether + has half of the draws, within four standard deviations of a fair coin."""
    share = (actions[:, 0, 0] > 0).double().mean().item()
    return abs(share - 0.5) < 4 * 0.5 / DRAWS**0.5


def same_sign(actions: Tensor) -> Tensor:
    """(N, H, A) -> (N) bool."""
    return (actions > 0).flatten(1).float().mean(dim=1).remainder(1) == 0


def test_l1_ends_between_two_modes() -> None:
    action, _ = bimodal("l1", 1, 2, steps=300)
    assert not near(action)
    assert (action.abs() < MODE - 0.2).all()


def test_bins_find_both_modes() -> None:
    action, draws = bimodal("bins", 1, 1, steps=300)
    assert near(action)
    assert near(draws).float().mean() > 0.98
    assert both_ways(draws)


def test_bins_draw_the_dimensions_of_an_action_apart() -> None:
    _, draws = bimodal("bins", 1, 2, steps=300)
    assert 0.4 < same_sign(draws).float().mean() < 0.6


def test_the_mixture_finds_both_modes() -> None:
    action, draws = bimodal("gmm", 1, 2, steps=300)
    assert near(action)
    assert near(draws).float().mean() > 0.98
    assert both_ways(draws)
    assert same_sign(draws).all()


@pytest.mark.slow
def test_the_flow_finds_both_modes_and_keeps_to_one() -> None:
    action, draws = bimodal("flow", 4, 2, steps=1000)
    assert near(action)
    assert near(draws).float().mean() > 0.95
    assert both_ways(draws)
    assert same_sign(draws).float().mean() > 0.98
