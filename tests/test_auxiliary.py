"""The training-only loss on where things are: what it teaches, what it weighs, and that nobody runs it to act."""

from __future__ import annotations

import functools
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_without_gpu import CUDA, NoHost, backward_of, fake_cuda, to_cuda
from safetensors.torch import load_file
from torch import nn
from toy_run import metrics, toy_job, toy_model, toy_step, toy_store

from vla.config import ConfigError, DataConfig, ImageConfig, Job, LoraConfig, MixConfig, ModelConfig
from vla.data.frames import FrameStore
from vla.data.samples import Samples
from vla.model.auxiliary import PositionHead
from vla.model.parameters import parameter_groups
from vla.model.vla import VLA, count_parameters
from vla.observation import ENVIRONMENT_STATE, Batch, Observation, Tokens
from vla.policy import Policy
from vla.training import checkpoint
from vla.training.initialise import initialise_from
from vla.training.loop import train
from vla.training.step import TrainStep

K = 7  # a thing, one that no scene has, and one number more
EXACT = {"dropout": 0.0}


@functools.cache
def placed_store() -> FrameStore:
    """The toy's demonstrations, and where invented things are in metres."""
    store = toy_store()
    rng = np.random.default_rng(0)
    thing, missing = rng.normal(0.5, 0.1, (len(store), 3)), np.zeros((len(store), 3))
    state = np.concatenate([thing, missing, store.state[:, :1]], axis=1).astype(np.float32)
    return replace(store, environment_state=state)


def aux_model(**options: Any) -> ModelConfig:
    return toy_model(**{"auxiliary": 0.3, **options})


def aux_step(model: ModelConfig | None = None, **train: Any) -> TrainStep:
    return toy_step(toy_job(Path(), model or aux_model(), **train), placed_store())


def network(config: ModelConfig, seed: int = 0) -> VLA:
    torch.manual_seed(seed)
    return VLA(config, placed_store().features, placed_store().statistics())


def batch_of(model: VLA, index: list[int]) -> tuple[Batch, Tokens]:
    store = placed_store()
    batch = Samples(store, model.config.chunk_size, model.config.n_obs_steps).batch(torch.tensor(index))
    return batch, model.text.encode(model.text.tokenize(store.tasks))[batch.task]


def head_of(model: VLA) -> PositionHead:
    assert model.auxiliary is not None
    return model.auxiliary


# What it is


def test_without_a_weight_there_is_no_head() -> None:
    plain, model = network(toy_model()), network(aux_model())
    assert plain.auxiliary is None
    others = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith("auxiliary.")
    }
    assert plain.state_dict().keys() == others.keys()  # and they begin as without it
    assert all(torch.equal(tensor, others[name]) for name, tensor in plain.state_dict().items())
    batch, text = batch_of(plain, [0, 5])
    blind = replace(batch, environment_state=None)
    losses = [plain.eval().loss(each, text) for each in (batch, blind)]
    assert torch.equal(losses[0][0], losses[1][0])
    assert [sorted(numbers) for _, numbers in losses] == [["action_error"]] * 2


def test_the_loss_is_the_sum() -> None:
    plain, model = network(toy_model()).eval(), network(aux_model()).eval()
    batch, text = batch_of(model, [0, 5, 11])
    memory = model.encode(Observation(batch.images, batch.state, text))
    assert batch.environment_state is not None
    error, metres = head_of(model).loss(memory, batch.environment_state, batch.action_is_pad)
    loss, numbers = model.loss(batch, text)
    without, less = plain.loss(batch, text)
    torch.testing.assert_close(loss, without + 0.3 * error)
    assert torch.equal(numbers["position_error"], metres)
    assert torch.equal(numbers["action_error"], less["action_error"])
    assert not metres.requires_grad
    assert model.loss(batch, text, measure=False)[1] == {}


def test_its_size_is_that_of_the_data() -> None:
    model = network(aux_model())
    head, d = head_of(model), model.config.d_model
    assert head.queries.shape == (3, d)  # of three numbers each, the last of one
    memory = Tokens(torch.randn(2, 9, d), torch.zeros(2, 9, dtype=torch.bool))
    assert head(memory).shape == (2, K)
    own = 3 * d + 4 * (d * d + d) + 3 * d * K + K
    assert count_parameters(model) == count_parameters(network(toy_model())) + own


def test_padded_tokens_are_not_read() -> None:
    head = head_of(network(aux_model()))
    x, pad = torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.bool)
    pad[0, 4:6] = True
    expected = head(Tokens(x, pad))
    x[0, 4:6] = 100.0
    torch.testing.assert_close(head(Tokens(x, pad)), expected)
    x[1, 4:6] = 100.0  # which are not padding
    assert not torch.allclose(head(Tokens(x, pad))[1], expected[1])


def test_what_never_changes_is_no_part_of_the_error() -> None:
    """A head that answers the mean has the spread of the rest as its error, in normalised units and in metres."""
    head = head_of(network(aux_model()))
    nn.init.zeros_(head.out.weight)
    with torch.no_grad():
        head.out.bias.copy_(torch.tensor([0, 0, 0, 5.0, -5.0, 5.0, 0]))  # wrong about what is not there
    store = placed_store()
    assert store.environment_state is not None
    state = torch.from_numpy(store.environment_state)
    memory = Tokens(torch.randn(len(state), 5, 32), torch.zeros(len(state), 5, dtype=torch.bool))
    error, metres = head.loss(memory, state, torch.zeros(len(state), 4, dtype=torch.bool))
    real = state[:, [0, 1, 2, 6]].double()
    apart = (real - real.mean(0)).abs()
    assert metres.item() == pytest.approx(apart.mean().item(), rel=1e-5)
    assert error.item() == pytest.approx((apart / real.std(0, correction=0)).mean().item(), rel=1e-5)


def test_samples_weigh_as_many_actions_as_they_hold() -> None:
    head = head_of(network(aux_model()))
    memory = Tokens(torch.randn(3, 5, 32), torch.zeros(3, 5, dtype=torch.bool))
    state, ignore = torch.randn(3, K), torch.zeros(3, 4, dtype=torch.bool)
    ignore[1, 1:], ignore[2] = True, True
    each = [head.loss(memory[[i]], state[[i]], torch.zeros(1, 4, dtype=torch.bool)) for i in range(3)]
    for got, (first, second, _) in zip(
        head.loss(memory, state, ignore), zip(*each, strict=True), strict=True
    ):
        torch.testing.assert_close(got, (4 * first + second) / 5)
    nothing = head.loss(memory, state, torch.ones(3, 4, dtype=torch.bool))
    assert [x.item() for x in nothing] == [0, 0]


@pytest.mark.parametrize("normalization", ["mean_std", "min_max", "quantiles"])
def test_a_missing_thing_gives_no_nan(normalization: str) -> None:
    step = aux_step(aux_model(normalization=normalization))
    for i in range(2):
        assert all(math.isfinite(x.item()) for x in step(i).values())
    assert step.finite()


# What it teaches


def dots(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 32, 32, 3) of a dot, and where it is in metres (n, 3); its height never changes."""
    at = np.random.default_rng(seed).uniform(4, 28, (n, 2))
    y, x = np.mgrid[:32, :32]
    shown = np.hypot(x - at[:, 0, None, None], y - at[:, 1, None, None]) < 3  # (n, 32, 32)
    images = np.where(shown[..., None], np.uint8(220), np.uint8(30)).repeat(3, axis=3)
    return images, np.column_stack([at / 40, np.full(n, 0.02)]).astype(np.float32)


def dot_store(n: int, seed: int) -> FrameStore:
    """Of episodes of one frame, whose actions and states say nothing."""
    images, places = dots(n, seed)
    index, nothing = np.arange(n), np.zeros((n, 2), np.float32)
    return FrameStore(
        {"front": images}, nothing, nothing, index, index, np.zeros(n, np.int64), ["reach red"], 10,
        environment_state=places,
    )  # fmt: skip


def test_it_finds_a_dot() -> None:
    image = ImageConfig(pixels=32, patch=8, conditioning="none")
    model = aux_model(auxiliary=1.0, image=image, **EXACT)
    job = toy_job(Path(), model, DataConfig(shift=0), steps=200, batch_size=32, lr=3e-3, warmup_steps=20)
    step = toy_step(job, dot_store(1024, 0))
    for i in range(200):
        step(i, measure=False)
    seen = Samples(dot_store(256, 1), model.chunk_size).batch(torch.arange(256))  # never before
    network = step.model.eval()
    text = network.text.encode(network.text.tokenize(["reach red"]))[seen.task]
    with torch.no_grad():
        error = network.loss(seen, text)[1]["position_error"].item()
    places = dots(256, 1)[1][:, :2]
    spread = float(np.abs(places - places.mean(0)).mean())
    print(f"position error {1000 * error:.0f} mm, the mean's {1000 * spread:.0f} mm")
    assert error < 0.4 * spread


def test_its_gradient_reaches_every_image_token_and_pixel() -> None:
    model = network(aux_model(image=ImageConfig(pixels=32, patch=8), **EXACT))
    batch, text = batch_of(model, [0, 5])
    tokens: list[torch.Tensor] = []
    model.tokens.image.register_forward_hook(lambda _, __, x: (x.retain_grad(), tokens.append(x))[0])
    memory = model.encode(Observation(batch.images, batch.state, text))
    assert batch.environment_state is not None
    head_of(model).loss(memory, batch.environment_state, batch.action_is_pad)[0].backward()
    [image] = tokens
    assert image.shape == (2, 16, 32)
    assert image.grad is not None
    assert (image.grad.abs().amax(dim=2) > 0).all()
    without = [
        name for name, p in model.named_parameters()
        if name.startswith(("tokens.image", "encoder", "auxiliary")) and (p.grad is None or not p.grad.any())
    ]  # fmt: skip
    assert without == []
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith(("decoder", "head")))


def test_beside_adapters_it_trains() -> None:
    model = aux_model(lora=LoraConfig(rank=2, on=("trunk", "image")))
    step = toy_step(toy_job(Path(), model, init="somewhere"), placed_store())
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step(0)
    moved = {name for name, p in step.model.named_parameters() if not torch.equal(p, before[name])}
    own = {name for name in before if name.startswith("auxiliary.")}
    assert own <= moved
    assert not any("lora" in name for name in own)


def test_its_queries_do_not_decay_and_its_matrices_do() -> None:
    model = network(aux_model())
    decays = {
        id(p): g["weight_decay"] for g in parameter_groups(model, model.config, 0.1) for p in g["params"]
    }
    own = {name: decays[id(p)] for name, p in head_of(model).named_parameters()}
    assert {name for name, decay in own.items() if decay} == {
        "attention.query.weight", "attention.key_value.weight", "attention.out.weight", "out.weight",
    }  # fmt: skip


# How it trains


@pytest.mark.parametrize(
    ("options", "flags", "rel"),
    [({}, {"accumulate": 4}, 1e-6), ({"checkpointing": True}, {}, 1e-6), ({}, {"precision": "bf16"}, 3e-2)],
    ids=str,
)
def test_flags_change_nothing(options: dict[str, Any], flags: dict[str, Any], rel: float) -> None:
    exact = {**EXACT, "prefix_probability": 0.9}
    plain, flagged = aux_step(aux_model(**exact)), aux_step(aux_model(**exact, **options), **flags)
    ends = placed_store().last[[0, -1]].tolist()  # hold one action, and none where that is given
    index = torch.tensor([0, 1, 2, 3, *ends, *ends])
    for step in (plain, flagged):
        step.feed.samples.draw = lambda *_: index  # pyright: ignore[reportAttributeAccessIssue]
    expected, got = plain(0), flagged(0)
    for name in ("loss", "action_error", "position_error", "grad_norm"):
        assert got[name].item() == pytest.approx(expected[name].item(), rel=rel), name
    if rel < 1e-3:
        for (name, mine), other in zip(
            flagged.model.named_parameters(), plain.model.parameters(), strict=True
        ):
            if other.grad is not None:
                torch.testing.assert_close(mine.grad, other.grad, atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_nothing_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    job = toy_job(Path(), aux_model(checkpointing=True), precision="bf16", capture=False, accumulate=2)
    store = placed_store()
    model = network(job.model).train()
    with fake_cuda(monkeypatch) as mode:
        to_cuda(model, mode)
        monkeypatch.setattr(torch.Tensor, "backward", backward_of(model))
        step = TrainStep(model, Samples(store, 4, 1, CUDA, 0.3), job, store.tasks)
        step(0)
        with NoHost():
            numbers = step(1)
    assert "position_error" in numbers
    assert {value.device for value in numbers.values()} == {CUDA}


# That it is no part of the policy


def test_acting_never_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(aux_model()).eval()
    batch, text = batch_of(model, [0, 5])
    observation = Observation(batch.images, batch.state, text)
    expected = model.predict_chunk(observation)
    for parameter in head_of(model).parameters():
        nn.init.normal_(parameter)
    monkeypatch.setattr(PositionHead, "forward", lambda *_: pytest.fail("it was asked"))
    assert torch.equal(model.predict_chunk(observation), expected)
    assert torch.equal(
        model(observation, batch.action, torch.ones(2, 4, dtype=torch.bool)),
        model.decoder(
            model.actions(batch.action, torch.ones(2, 4, dtype=torch.bool)), model.encode(observation)
        ),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = toy_job(tmp_path_factory.mktemp("placed") / "run", aux_model(), steps=4, save_every=2, keep=5)
    train(job, placed_store())
    return job


def test_a_checkpoint_deploys_none_of_it(run: Job) -> None:
    path = checkpoint.find(run.output)
    assert not [name for name in load_file(path / "model.safetensors") if name.startswith("auxiliary")]
    assert "weights.auxiliary.queries" in load_file(path / "training.safetensors")
    policy = Policy.load(path, "cpu")
    assert policy.model.auxiliary is None
    assert policy.job.model.auxiliary == 0.3  # what it was trained with
    assert ENVIRONMENT_STATE in checkpoint.load_statistics(path).by_key  # pyright: ignore[reportAttributeAccessIssue]
    images, state = {"front": toy_store().images["front"][:1, None]}, toy_store().state[:1, None]
    chunk = policy.predict_chunk(images, state, ["reach red"])
    live = network(run.model)
    live.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    np.testing.assert_array_equal(Policy(live, run, "cpu").predict_chunk(images, state, ["reach red"]), chunk)


def test_a_resumed_run_equals_an_uninterrupted_one(run: Job, tmp_path: Path) -> None:
    job = replace(run, output=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    shutil.copy(Path(run.output) / "metrics.jsonl", tmp_path / "run")
    name = "checkpoints/step_00000002"
    shutil.copytree(Path(run.output) / name, tmp_path / "run" / name)
    mine, theirs = (
        load_file(p / "training.safetensors")
        for p in (train(job, placed_store(), resume=True), checkpoint.find(run.output))
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert metrics(job) == metrics(run)
    assert "position_error" in metrics(run)[0]
    with pytest.raises(
        ConfigError, match=r"model.auxiliary: got '0.0', expected 0.3 as in checkpoint step_0"
    ):
        train(replace(job, model=toy_model()), placed_store(), resume=True)


def test_weights_go_to_networks_with_the_head_and_without(run: Job) -> None:
    path = checkpoint.find(run.output)
    taken = [initialise_from(network(config, seed=1), path) for config in (toy_model(), aux_model())]
    assert [report.unused + list(report.reshaped) for report in taken] == [[], []]
    assert taken[0].missing == []
    assert taken[1].missing
    assert all(name.startswith("auxiliary.") for name in taken[1].missing)


@pytest.mark.slow
def test_lerobots_commands_take_what_it_taught(run: Job, tmp_path: Path) -> None:
    from draccus.utils import ParsingError
    from toy_lerobot import VLAPolicy, ours, toy_batch, toy_config

    from vla.lerobot_plugin import convert

    source, batch = checkpoint.find(run.output), toy_batch()
    policy = VLAPolicy.from_pretrained(convert.to_lerobot(source, tmp_path / "there"))
    assert policy.config.auxiliary == 0  # pyright: ignore[reportAttributeAccessIssue]
    expected = Policy.load(source, "cpu").predict_chunk(*ours(batch))
    np.testing.assert_array_equal(policy.predict_action_chunk(batch).numpy(), expected)
    assert math.isfinite(policy.forward(batch)[0].item())  # it trains on, without
    with pytest.raises(ParsingError, match=r"policy.auxiliary: got 0.5, expected 0 in LeRobot's trainer"):
        toy_config(auxiliary=0.5)


# What is refused


def test_what_cannot_work_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.auxiliary: got -1, expected 0 or more"):
        aux_model(auxiliary=-1)
    job = toy_job(tmp_path / "run", aux_model())
    with pytest.raises(
        ConfigError, match=r"auxiliary: got 0.3, expected 0 with data .*record.environment_state=true"
    ):
        train(job, toy_store())
    still = replace(placed_store(), environment_state=np.ones((len(toy_store()), 3), np.float32))
    with pytest.raises(ConfigError, match=r"got 0.3, expected 0 with data whose .* never changes"):
        train(job, still)
    for data in (DataConfig(stream=True), DataConfig(mix={"a": MixConfig("a")})):
        with pytest.raises(
            ConfigError, match=r"got 0.3, expected 0 with data.stream or data.mix.*one dataset"
        ):
            replace(job, data=data)
    assert not (tmp_path / "run").exists()
