"""The policy plugin: its options, its numbers, its weights, its folder, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import pytest
import torch
from draccus.utils import DecodingError, ParsingError
from toy_lerobot import (
    FRONT,
    TASKS,
    VLAConfig,
    VLAPolicy,
    ours,
    same,
    toy_batch,
    toy_config,
    toy_policy,
    toy_stats,
    weights,
)
from toy_run import toy_job, toy_store

from vla.architecture import ModelConfig
from vla.checks import ConfigError, flat
from vla.config import TrainConfig
from vla.lerobot_plugin import batch as read
from vla.lerobot_plugin.pretrained import statistics_of
from vla.manifest import CheckpointError
from vla.model.text import TextTokens
from vla.policy import Policy
from vla.training import checkpoint
from vla.training.step import learning_rate

CPU = torch.device("cpu")


def parse(*arguments: str) -> VLAConfig:
    """The policy of a command line, without the rest of it, which takes LeRobot seconds to read."""
    return draccus.parse(VLAConfig, args=[f"--{argument}" for argument in ("device=cpu", *arguments)])


# --- options


def test_every_option_of_the_network_is_one_here() -> None:
    def rows(config: Any) -> dict[str, Any]:
        return flat(
            {f.name: draccus.encode(getattr(config, f.name)) for f in dataclasses.fields(ModelConfig)}
        )

    def defaults(cls: Any) -> dict[str, Any]:
        return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}

    config = parse()
    assert rows(config).keys() == rows(ModelConfig()).keys()
    assert config.architecture == ModelConfig()
    for name, default in defaults(ModelConfig).items():
        assert getattr(config, name) == default, name


def test_the_command_line_reaches_every_depth() -> None:
    config = parse(
        "size=tiny", "chunk_size=8", "image.pixels=64", "image.resampler.tokens=4", "head=flow",
        "text.encoder=minilm", "n_obs_steps=2", "optimizer_betas=[0.8, 0.9]", "max_prefix=0",
    )  # fmt: skip
    model = config.architecture
    assert (model.size, model.d_model, model.chunk_size, model.head) == ("tiny", 128, 8, "flow")
    assert (model.image.pixels, model.image.resampler.tokens, model.n_obs_steps) == (64, 4, 2)
    assert config.observation_delta_indices == [-1, 0]
    assert config.action_delta_indices == list(range(8))
    assert config.get_optimizer_preset().betas == (0.8, 0.9)
    assert parse().observation_delta_indices is None
    assert not parse().push_to_hub


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["image.pixels=60"], "policy.image.pixels: got 60, expected a multiple of patch=16"),
        (["head=nose"], "policy.head: got 'nose', expected one of l1, bins"),
        (["head=flow", "decoding=autoregressive"], "remedy: set policy.decoding=parallel"),
        (["n_action_steps=17"], "policy.n_action_steps: got 17, expected at most policy.chunk_size=16"),
        (
            ["lora.rank=4"],
            "policy.lora.rank: got 4, expected 0 .*peft.method_type=LORA.*scripts/train.py",
        ),
        (["optimizer_lr=0"], "policy.optimizer_lr: got 0"),
        (["ema_decay=1"], "policy.ema_decay: got 1"),
        (["precision=fp8"], "policy.precision: got 'fp8', expected one of auto, fp32, bf16"),
        (
            ["normalization_mapping={STATE: MEAN_STD}"],
            "policy.normalization_mapping.STATE: got 'MEAN_STD', expected IDENTITY.*policy.normalization",
        ),
    ],
)
def test_what_cannot_work_is_named_as_on_the_command_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(ParsingError, match=expected):
        parse(*arguments)


def test_lerobots_command_line_shows_the_reason() -> None:
    from lerobot.configs.train import TrainPipelineConfig

    with pytest.raises(DecodingError, match="policy.image.pixels: got 60, expected a multiple of patch=16"):
        draccus.parse(
            TrainPipelineConfig,
            args=["--dataset.repo_id=a/b", "--policy.type=vla", "--policy.image.pixels=60"],
        )


def test_a_job_comes_back_from_its_configuration() -> None:
    job = toy_job(Path("somewhere"), precision="fp32", ema_decay=0.5, betas=(0.5, 0.6))
    config = VLAConfig.of(job, toy_store().features, device="cpu")
    assert config.job(job) == job
    assert (config.n_action_steps, config.ema_decay, config.optimizer_betas) == (2, 0.5, (0.5, 0.6))
    assert config.features(10) == toy_store().features


def test_features_that_are_missing_are_named() -> None:
    from lerobot.configs import FeatureType, PolicyFeature

    config = toy_config()
    state, action = PolicyFeature(FeatureType.STATE, (2,)), PolicyFeature(FeatureType.ACTION, (2,))
    image, depth = (PolicyFeature(FeatureType.VISUAL, (n, 32, 48)) for n in (3, 1))
    full = {"observation.image": image, "observation.images.depth": depth, "observation.state": state}
    good = dataclasses.replace(config, input_features=full)
    assert good.features(10).cameras == {"image": (32, 48)}  # a name as in vla/data/lerobot_v3.py; no depth
    for missing, expected in (
        ("observation.image", "at least one 'observation.images"),
        ("observation.state", "state"),
    ):
        rest = {key: feature for key, feature in full.items() if key != missing}
        with pytest.raises(ConfigError, match=f"policy.input_features: .*{expected}"):
            dataclasses.replace(config, input_features=rest).validate_features()
    with pytest.raises(ConfigError, match="policy.output_features: .*'action'"):
        dataclasses.replace(config, output_features={"act": action}).validate_features()
    twice = {"observation.image": image, "observation.images.image": image, "observation.state": state}
    with pytest.raises(ConfigError, match="cameras of different names"):
        dataclasses.replace(config, input_features=twice).validate_features()


def test_statistics_of_a_dataset() -> None:
    stats, features, config = toy_stats(), toy_store().features, toy_config().architecture
    assert statistics_of(stats, config, features) == toy_store().statistics()
    older = {key: {n: v for n, v in row.items() if n not in ("q01", "q99")} for key, row in stats.items()}
    assert statistics_of(older, config, features)["action"].q01 == stats["action"]["min"].tolist()
    with pytest.raises(
        ConfigError, match=r"dataset_stats.observation.state: .*expected q01, q99 of 2 numbers"
    ):
        statistics_of(older, dataclasses.replace(config, normalization="quantiles"), features)
    with pytest.raises(ConfigError, match="dataset_stats.action: .*expected mean, std"):
        statistics_of(stats | {"action": {}}, config, features)
    with pytest.raises(ConfigError, match=r"dataset_stats.observation.state: got \[\]"):
        VLAPolicy(toy_config())


# --- numbers


def test_every_byte_survives_lerobots_images() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    for image in (pixels.float() / 255, pixels.to(torch.float32).div(255).double(), pixels):
        seen = read.images({FRONT: image}, {"front": FRONT}, CPU)["front"]
        assert torch.equal(seen[:, 0], pixels)
        assert seen.shape == (1, 1, 3, 16, 16)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "model", [{}, {"head": "flow"}, {"n_obs_steps": 2}, {"decoding": "autoregressive"}], ids=str
)
def test_chunks_equal_those_of_our_policy_bit_for_bit(model: dict[str, Any], n: int) -> None:
    policy = toy_policy(model).eval()
    batch = toy_batch(n, model.get("n_obs_steps", 1))
    reference = Policy(policy.model, policy.config.job(policy.base), "cpu")
    with torch.inference_mode():
        chunk = policy.predict_action_chunk(batch)
    np.testing.assert_array_equal(chunk.numpy(), reference.predict_chunk(*ours(batch)))
    assert (chunk.shape, chunk.dtype) == ((n, 4, 2), torch.float32)
    left_over = torch.rand(5, 2) - 0.5
    with torch.inference_mode():
        chunk = policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=left_over)
    prefix = left_over[:4].expand(n, 4, 2).numpy()
    expected = reference.predict_chunk(*ours(batch), prefix, np.full(n, 2))
    np.testing.assert_array_equal(chunk.numpy(), expected)
    np.testing.assert_array_equal(chunk[:, :2].numpy(), prefix[:, :2])


def test_the_loss_is_the_networks_and_falls() -> None:
    policy = toy_policy({"dropout": 0.0, "prefix_probability": 0.0}, shift=0, brightness=0.0, contrast=0.0)
    batch = toy_batch(8)
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss, numbers = policy.forward(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        policy.update()
    assert losses[-1] < losses[0] / 2
    assert set(numbers) == {"action_error"}
    text = policy.model.text.encode(policy.model.text.tokenize(batch["task"]))
    images, state = read.images(batch, policy.config.cameras, CPU), read.state(batch, 2, CPU)
    expected, _ = policy.model.loss(read.demonstrated(batch, images, state, 4, 2), text)
    torch.testing.assert_close(policy.forward(batch)[0], expected, atol=1e-6, rtol=1e-5)


def test_augmentation_and_prefixes_are_of_training_only() -> None:
    policy, batch = toy_policy(), toy_batch()
    assert policy.forward(batch)[0] != policy.forward(batch)[0]
    policy.eval()
    assert policy.forward(batch)[0] == policy.forward(batch)[0]


def test_what_a_batch_lacks_is_named() -> None:
    policy, batch = toy_policy(), toy_batch()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"action": batch["action"][:, :3]}, r"action: got \(3, 3, 2\), expected \(B, policy.chunk_size"),
        ({"observation.state": batch["observation.state"][:, :1]}, r"observation.state: got \(3, 1, 1\)"),
        ({FRONT: batch[FRONT].permute(0, 2, 3, 1)}, "observation.images.front: got"),
        ({"task": ["reach red"]}, "task: got .*3 instructions"),
    ]
    for change, expected in changes:
        with pytest.raises(ConfigError, match=expected):
            policy.forward(batch | change)
    for key in (FRONT, "observation.state", "action", "task"):
        with pytest.raises(ConfigError, match=f"^{key}: got .*--rename_map"):
            policy.forward({k: v for k, v in batch.items() if k != key})
    with pytest.raises(NotImplementedError, match="reduction: got 'none'.*remedy"):
        policy.forward(batch, reduction="none")


def test_acting_between_two_updates_does_not_stop_training() -> None:
    """As lerobot-train does with an environment: features made in inference mode cannot be trained on."""
    policy, batch = toy_policy(), toy_batch()
    with torch.inference_mode():
        policy.select_action(batch)
    policy.train()
    policy.forward(batch)[0].backward()


def test_a_text_encoder_that_trains_is_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    encode = TextTokens.encode
    monkeypatch.setattr(
        TextTokens, "encode", lambda self, words: (asked.append(len(words.x)), encode(self, words))[1]
    )
    frozen = toy_policy()
    for _ in range(2):
        frozen.forward(toy_batch())
    assert asked == [1, 1]  # two different instructions, once each
    text = dataclasses.replace(toy_config().architecture.text, frozen=False)
    policy = toy_policy({"text": text})
    asked.clear()
    for _ in range(2):
        policy.forward(toy_batch())[0].backward()
    assert asked == [3, 3]
    assert any(p.grad is not None and p.grad.any() for p in policy.model.text.encoder.parameters())
    for _ in range(2):
        policy.eval().predict_action_chunk(toy_batch())
        remembered = policy.texts.features["reach red"]
        fresh = policy.model.text.encode(policy.model.text.tokenize(["reach red"])).x[0, : len(remembered)]
        assert torch.equal(remembered, fresh)
        train(policy, 1)


def test_groups_name_what_differs_from_the_optimiser() -> None:
    policy = toy_policy({"text": dataclasses.replace(toy_config().architecture.text, frozen=False)})
    groups = policy.get_optim_params()
    assert sum(len(group["params"]) for group in groups) == len(weights(policy))
    rates = {(group.get("lr"), group.get("weight_decay")) for group in groups}
    slow = policy.config.optimizer_lr * policy.config.text.lr_multiplier
    assert rates == {(None, None), (None, 0.0), (slow, None), (slow, 0.0)}


def test_the_learning_rate_takes_our_course_but_for_its_first_step() -> None:
    config = dataclasses.replace(toy_config(), scheduler_warmup_steps=4, optimizer_lr=0.1)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = config.get_scheduler_preset().build(optimizer, 20)
    assert scheduler is not None
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [learning_rate(step, TrainConfig(lr=0.1, warmup_steps=4, steps=20)) for step in range(20)]
    np.testing.assert_allclose(rates[4:], expected[4:], rtol=1e-6)
    np.testing.assert_allclose(rates[:5], [0, *expected[:4]], rtol=1e-6)


# --- averaged weights


def train(policy: Any, steps: int, first: int = 0) -> None:
    """As LeRobot's trainer: its update is asked of the bare policy."""
    bare = getattr(policy, "module", policy)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    for step in range(first, first + steps):
        policy.train()
        policy(toy_batch(first=step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        bare.update()


def follows(policy: VLAPolicy, wrapped: Any) -> None:
    """That the average is the formula's, acts in evaluation mode and leaves the live weights as they are."""
    expected = weights(policy)
    for step in range(3):
        train(wrapped, 1, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {n: w.lerp(weights(policy)[n], 1 - decay) for n, w in expected.items()}
    live = weights(policy)
    wrapped.eval()
    averaged = weights(policy)
    assert same(averaged, expected)
    assert not same(averaged, live)
    policy.select_action(toy_batch())
    assert same(weights(policy), averaged)
    wrapped.train()
    assert same(weights(policy), live)
    wrapped.train()
    assert same(weights(policy), live)


def test_averaged_weights_act_and_live_ones_learn() -> None:
    policy = toy_policy(ema_decay=0.9)
    follows(policy, policy)


@pytest.mark.filterwarnings(
    "ignore:Grad strides do not match"
)  # with several threads; a matter of speed alone
def test_so_they_do_inside_ddp(tmp_path: Path) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        policy = toy_policy(ema_decay=0.9)
        follows(policy, DistributedDataParallel(policy, find_unused_parameters=True))
    finally:
        distributed.destroy_process_group()


def test_acting_puts_the_averaged_weights_in_place() -> None:
    policy = toy_policy(ema_decay=0.9)
    train(policy, 2)
    live = weights(policy)
    policy.select_action(toy_batch())
    assert not policy.training
    assert not same(weights(policy), live)
    policy.train()
    assert same(weights(policy), live)
    without = toy_policy(ema_decay=0.0)
    train(without, 2)
    live = weights(without)
    assert same(weights(without.eval()), live)


# --- acting


def test_a_chunk_is_played_before_the_next_is_asked_for() -> None:
    policy = toy_policy(n_action_steps=3).eval()
    chunks = [policy.predict_action_chunk(toy_batch(first=i)) for i in range(4)]
    got = [policy.select_action(toy_batch(first=i)) for i in range(4)]
    for i in range(3):
        assert torch.equal(got[i], chunks[0][:, i])
    assert torch.equal(got[3], chunks[3][:, 0])
    policy.reset()
    assert torch.equal(policy.select_action(toy_batch(first=1)), chunks[1][:, 0])


def test_history_begins_with_the_first_observation() -> None:
    policy = toy_policy({"n_obs_steps": 3}, n_action_steps=1).eval()
    seen = [toy_batch(first=i) for i in range(3)]

    def chunk(*index: int) -> torch.Tensor:
        past = {
            key: torch.stack([seen[i][key] for i in index], dim=1) for key in (FRONT, "observation.state")
        }
        return policy.predict_action_chunk(past | {"task": TASKS})

    for i, history in enumerate([(0, 0, 0), (0, 0, 1), (0, 1, 2)]):
        assert torch.equal(policy.select_action(seen[i]), chunk(*history)[:, 0])
    with pytest.raises(ConfigError, match=r"observation.state: got '1 steps', expected policy.n_obs_steps=3"):
        policy.predict_action_chunk(seen[0])


def test_what_fills_up_a_left_over_is_not_committed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    policy, batch = toy_policy().eval(), toy_batch(1)
    free = policy.predict_action_chunk(batch)
    left_over = torch.tensor([[0.5, -0.5], [0.0, 0.25], [0.0, 0.0], [0.0, 0.0]])

    def chunk(delay: int | None, rows: torch.Tensor | None) -> torch.Tensor:
        return policy.predict_action_chunk(batch, inference_delay=delay, prev_chunk_left_over=rows)

    assert torch.equal(chunk(2, left_over)[0, :2], left_over[:2])
    assert torch.equal(chunk(2, left_over[:2]), chunk(2, left_over))  # no rows of zeros behind it
    assert torch.equal(chunk(2, left_over[None]), chunk(2, left_over))
    one = torch.cat([left_over[:1], torch.zeros(3, 2)])
    assert torch.equal(chunk(2, one)[0, 0], one[0])
    assert not torch.equal(chunk(2, one)[0, 1], one[1])
    for delay, rows in ((0, left_over), (None, None), (None, left_over), (2, None), (2, torch.zeros(4, 2))):
        torch.testing.assert_close(chunk(delay, rows), free)
    assert not caplog.records
    for _ in range(3):  # longer than policy.max_prefix: as much of it as the network knows
        assert torch.equal(chunk(3, left_over), chunk(2, left_over))
    assert [r.message[:20] for r in caplog.records] == ["policy.max_prefix: g"]


@pytest.mark.parametrize("popped", [1, 2])
def test_the_action_under_way_comes_first_in_the_next_chunk(popped: int) -> None:
    """With LeRobot's own queue: it hands out what follows that action, and drops it from the answer."""
    from lerobot.policies.rtc import ActionQueue
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy, queue = toy_policy().eval(), ActionQueue(RTCConfig())
    chunk = policy.predict_action_chunk(toy_batch(1))[0]
    queue.merge(chunk, chunk, 0, 0)
    under_way = [queue.get() for _ in range(popped)][-1]
    left_over = queue.get_left_over()
    assert left_over is not None
    filled = torch.cat([left_over, torch.zeros(6, 2)])  # as its engine does
    answer = policy.predict_action_chunk(
        toy_batch(1, first=1), inference_delay=2, prev_chunk_left_over=filled
    )[0]
    assert torch.equal(answer[0], under_way)
    assert torch.equal(answer[1], left_over[0])
    policy.reset()  # it no longer knows which chunk runs
    answer = policy.predict_action_chunk(
        toy_batch(1, first=1), inference_delay=2, prev_chunk_left_over=filled
    )[0]
    assert torch.equal(answer[0], left_over[0])


def test_who_supports_real_time_chunking(caplog: pytest.LogCaptureFixture) -> None:
    from lerobot.rollout.inference.rtc import supports_rtc_inference

    assert supports_rtc_inference(toy_policy())
    with caplog.at_level(logging.WARNING):
        assert not supports_rtc_inference(toy_policy({"max_prefix": 0}))
        assert not supports_rtc_inference(toy_policy({"n_obs_steps": 2}))
    assert "policy.max_prefix is 0" in caplog.text
    assert "policy.n_obs_steps is more than 1" in caplog.text


# --- the folder


@pytest.fixture(scope="module")
def trained() -> VLAPolicy:
    policy = toy_policy(ema_decay=0.9)
    train(policy, 3)
    return policy


@pytest.fixture
def folder(trained: VLAPolicy, tmp_path: Path) -> Path:
    trained.train().save_pretrained(tmp_path / "pretrained_model")
    return tmp_path / "pretrained_model"


def test_a_folder_brings_the_policy_back(trained: VLAPolicy, folder: Path) -> None:
    loaded, batch = VLAPolicy.from_pretrained(folder), toy_batch()
    assert not loaded.training
    chunk = loaded.predict_action_chunk(batch)
    assert torch.equal(chunk, trained.predict_action_chunk(batch))
    np.testing.assert_array_equal(chunk.numpy(), Policy.load(folder, "cpu").predict_chunk(*ours(batch)))
    assert loaded.statistics == trained.statistics
    assert checkpoint.load_job(folder).train.ema_decay == 0.9


def test_going_on_takes_the_live_weights_and_beginning_anew_the_averaged(
    trained: VLAPolicy, folder: Path
) -> None:
    averaged, live = weights(trained.eval()), weights(trained.train())
    resumed = VLAPolicy.from_pretrained(
        folder, config=dataclasses.replace(toy_config(), ema_decay=0.9, updates=3)
    )
    assert same(weights(resumed), averaged)
    assert same(weights(resumed.train()), live)
    anew = VLAPolicy.from_pretrained(folder)
    assert anew.config.updates == 0
    assert same(weights(anew), averaged)
    assert same(weights(anew.train()), averaged)


def test_other_data_bring_their_own_statistics(folder: Path) -> None:
    stats = toy_stats()
    stats["action"]["max"] = stats["action"]["max"] + 1
    policy = VLAPolicy.from_pretrained(folder, dataset_stats=stats)
    assert policy.statistics["action"].max == stats["action"]["max"].tolist()
    assert torch.equal(
        policy.model.normalizer.high, torch.tensor(stats["action"]["max"], dtype=torch.float32)
    )


def test_a_folder_can_be_written_over(trained: VLAPolicy, folder: Path) -> None:
    (folder / "train_config.json").write_text("{}")
    trained.save_pretrained(folder)
    (folder / "train_config.json").write_text("{ }")  # LeRobot's, and not of the seal
    checkpoint.verify(folder)
    assert not list(folder.glob(".*"))


def test_a_tuned_text_encoder_travels_along(tmp_path: Path) -> None:
    policy = toy_policy({"text": dataclasses.replace(toy_config().architecture.text, frozen=False)})
    train(policy, 2)
    policy.save_pretrained(tmp_path / "a")
    batch = toy_batch()
    expected = policy.predict_action_chunk(batch)
    frozen = VLAPolicy.from_pretrained(tmp_path / "a")
    assert torch.equal(frozen.predict_action_chunk(batch), expected)
    config = dataclasses.replace(frozen.config, text=dataclasses.replace(frozen.config.text, frozen=True))
    VLAPolicy.from_pretrained(tmp_path / "a", config=config).save_pretrained(tmp_path / "b")
    assert torch.equal(VLAPolicy.from_pretrained(tmp_path / "b").predict_action_chunk(batch), expected)


def test_another_network_is_named(folder: Path) -> None:
    config = VLAPolicy.from_pretrained(folder).config
    for change, expected in (
        ({"chunk_size": 8}, "policy.chunk_size: got 8, expected 4, as the weights in"),
        ({"d_ff": 32}, "policy.d_ff: got 32, expected 64"),
        ({"image": dataclasses.replace(config.image, pixels=64)}, "policy.image.pixels: got 64, expected 32"),
        ({"normalization": "min_max"}, "policy.normalization: got 'min_max', expected mean_std"),
    ):
        with pytest.raises(ConfigError, match=expected + ".*remedy: leave out --policy"):
            VLAPolicy.from_pretrained(folder, config=dataclasses.replace(config, **change))
    free = VLAPolicy.from_pretrained(folder, config=dataclasses.replace(config, dropout=0.3))
    assert free.model.config.dropout == 0.3


def test_other_features_are_named(folder: Path) -> None:
    config = VLAPolicy.from_pretrained(folder).config
    inputs, outputs = config.input_features, config.output_features
    assert inputs
    assert outputs
    wide = dataclasses.replace(inputs["observation.state"], shape=(9,))
    for change, expected in (
        (
            {"input_features": {k if k != FRONT else "observation.images.top": f for k, f in inputs.items()}},
            r"policy.input_features.observation.images.front: got \['top'\], expected the cameras \['front'\]",
        ),
        (
            {"input_features": inputs | {"observation.state": wide}},
            r"policy.input_features.observation.state: got \(9,\), expected shape \(2,\)",
        ),
        (
            {"output_features": {"action": dataclasses.replace(outputs["action"], shape=(3,))}},
            "policy.output_features.action",
        ),
    ):
        with pytest.raises(ConfigError, match=expected):
            VLAPolicy.from_pretrained(folder, config=dataclasses.replace(config, **change))


def test_another_type_of_policy_is_named(folder: Path, tmp_path: Path) -> None:
    from lerobot.policies.act.configuration_act import ACTConfig

    ACTConfig(device="cpu").save_pretrained(tmp_path / "act")
    for config in (None, toy_config()):
        with pytest.raises(ConfigError, match="^type: got 'act', expected vla"):
            VLAPolicy.from_pretrained(tmp_path / "act", config=config)
    with pytest.raises(ConfigError, match="^type: got 'act'"):
        VLAPolicy.from_pretrained(folder, config=ACTConfig(device="cpu"))


def test_what_is_not_there_or_damaged_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="policy.path: got 'someone/something'.*remedy: .*go online"):
        VLAPolicy.from_pretrained("someone/something")
    with pytest.raises(FileNotFoundError, match="policy.path: .*without config.json"):
        VLAPolicy.from_pretrained(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        VLAPolicy.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"remedy: python scripts/convert.py"):
        VLAPolicy.from_pretrained(folder)


def test_another_run_counts_from_zero() -> None:
    """As --config_path=train_config.json without --resume begins it."""
    assert toy_policy(updates=500).config.updates == 0


def test_a_state_of_another_length_is_named(folder: Path) -> None:
    class Meta:
        features = {"observation.state": {"shape": (9,)}}
        fps = 10

    with pytest.raises(
        ConfigError, match=r"policy.input_features.observation.state: got \(9,\), expected shape"
    ):
        VLAPolicy.from_pretrained(folder, dataset_stats=toy_stats(), dataset_meta=Meta())


def test_gathered_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = toy_policy()
    with pytest.raises(NotImplementedError, match="FSDP.*remedy: train with DDP"):
        policy.save_pretrained(tmp_path, state_dict={})
    monkeypatch.setenv(
        "ACCELERATE_USE_FSDP", "true"
    )  # as accelerate launch --use_fsdp does: before the first step
    with pytest.raises(NotImplementedError, match="FSDP.*remedy: train with DDP"):
        toy_policy()


def test_a_hub_name_brings_every_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's cache lays it out: a snapshot of symbolic links."""
    snapshot = tmp_path / "snapshots" / "1"
    for path in (p for p in folder.rglob("*") if p.is_file()):
        blob, link = tmp_path / "blobs" / path.name, snapshot / path.relative_to(folder)
        blob = blob.with_name(f"{len(path.parts)}{path.name}")
        blob.parent.mkdir(exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(tmp_path).parts) - 1)) / "blobs" / blob.name)
    monkeypatch.setattr(
        "vla.lerobot_plugin.pretrained.snapshot_download", lambda name, **options: str(snapshot)
    )
    policy = VLAPolicy.from_pretrained("someone/something")
    policy.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["type"] == "vla"
    again = VLAPolicy.from_pretrained(tmp_path / "again")
    assert torch.equal(again.predict_action_chunk(toy_batch()), policy.predict_action_chunk(toy_batch()))
