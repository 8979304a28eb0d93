"""The whole network: shapes, gradients, causality, padding, prefixes, learning, export."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vla.config import ConfigError, ImageConfig, ModelConfig, TextConfig
from vla.data.normalize import Statistics
from vla.model.vla import VLA, Drawn, count_parameters, parameter_groups
from vla.observation import Batch, Features, Observation, Tokens

ROOT = Path(__file__).resolve().parents[1]
B, H, A, P = 3, 6, 4, 7
CAMERAS = ("front", "wrist")
LIMIT = 3.0
WORDS = ["touch the red ball", "", "push the blue block to the left of the bowl"]


def statistics() -> Statistics:
    rng = np.random.default_rng(0)
    action = np.clip(rng.normal(0.5, 2, (1000, A)), -LIMIT, LIMIT)
    return Statistics.of({"observation.state": rng.normal(1, 2, (1000, P)), "action": action})


def build(cameras: int = 1, **options: Any) -> VLA:
    torch.manual_seed(0)
    options = {"image": ImageConfig(pixels=32, patch=8), "chunk_size": H, "max_prefix": 4} | options
    features = Features(dict.fromkeys(CAMERAS[:cameras], (32, 32)), P, A, 10)
    return VLA(ModelConfig(size="tiny", **options), features, statistics())


def draw_batch(model: VLA, padded: bool = False, size: int = B) -> Batch:
    generator = torch.Generator().manual_seed(1)
    steps = model.config.n_obs_steps
    shape = (size, steps, 3, 32, 32)
    return Batch(
        images={
            name: torch.randint(256, shape, dtype=torch.uint8, generator=generator)
            for name in model.features.cameras
        },
        state=torch.randn(size, steps, P, generator=generator),
        task=torch.arange(size) % len(WORDS),
        action=torch.randn(size, H, A, generator=generator).clamp(-LIMIT, LIMIT),
        action_is_pad=torch.arange(H) >= H - 2 * padded * torch.arange(size)[:, None],
    )


def features_of(model: VLA, batch: Batch) -> Tokens:
    return model.text.encode(model.text.tokenize(WORDS))[batch.task]


def observe(model: VLA, batch: Batch) -> Observation:
    return Observation(batch.images, batch.state, features_of(model, batch))


@pytest.fixture(scope="module", params=["film", "none"])
def model(request: pytest.FixtureRequest) -> VLA:
    return build(image=ImageConfig(pixels=32, patch=8, conditioning=request.param)).eval()


@pytest.mark.parametrize("cameras", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_obs_steps", [1, 2])
def test_shapes(cameras: int, padded: bool, n_obs_steps: int) -> None:
    model = build(cameras, n_obs_steps=n_obs_steps)
    batch = draw_batch(model, padded)
    text = features_of(model, batch)
    loss, numbers = model.loss(batch, text)
    assert loss.shape == ()
    assert loss.isfinite()
    assert all(number.shape == () and not number.requires_grad for number in numbers.values())
    memory = model.encode(Observation(batch.images, batch.state, text))
    length = n_obs_steps * cameras * 16 + 16 + n_obs_steps
    assert memory.x.shape == (B, length, 128)
    assert memory.pad.shape == (B, length)
    assert memory.pad.sum() == text.pad.sum()
    chunk = model.predict_chunk(Observation(batch.images, batch.state, text))
    assert chunk.shape == (B, H, A)
    assert chunk.dtype == torch.float32


VARIANTS = [
    {},
    {"norm": "post", "activation": "relu", "positions": "sinusoidal"},
    {"activation": "swiglu", "dropout": 0.1, "n_obs_steps": 2},
    {"image": ImageConfig(pixels=32, patch=8, stem="patch"), "text": TextConfig(frozen=False)},
    {"image": ImageConfig(pixels=32, patch=8, conditioning="none")},
    {"image": ImageConfig("vit_tiny_patch16_224", pixels=32, frozen=True)},
    {"image": ImageConfig("swin_tiny_patch4_window7_224", pixels=64)},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_trainable_parameter_gets_a_gradient(options: dict[str, Any]) -> None:
    model = build(2, prefix_probability=1.0, **options).train()  # every sample: no luck in what is reached
    batch = draw_batch(model, padded=True, size=8)
    loss, _ = model.loss(batch, features_of(model, batch))
    loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert count_parameters(model) == sum(p.numel() for p in trainable.values())
    without = [name for name, p in trainable.items() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_an_action_depends_on_no_later_one(model: VLA) -> None:
    batch = draw_batch(model)
    observation, everything = observe(model, batch), torch.ones(B, H, dtype=torch.bool)
    actions = torch.randn(B, H, A)
    before = model(observation, actions, everything)
    for t in range(H):
        other = actions.clone()
        other[:, t] += 1
        changed = (model(observation, other, everything) != before).any(dim=-1)
        assert not changed[:, :t].any()
        assert changed[:, t:].all()


def test_padding_changes_nothing(model: VLA) -> None:
    batch = draw_batch(model)
    observation = observe(model, batch)
    chunk = model.predict_chunk(observation)
    noise = torch.randn_like(observation.text.x) * 100
    noisy = torch.where(observation.text.pad[..., None], noise, observation.text.x)
    other = Observation(batch.images, batch.state, Tokens(noisy, observation.text.pad))
    torch.testing.assert_close(model.predict_chunk(other), chunk, atol=1e-6, rtol=1e-5)
    one = Observation(  # the first instruction, without the padding that the longest one made
        {name: image[:1] for name, image in batch.images.items()}, batch.state[:1],
        model.text.encode(model.text.tokenize(WORDS[:1])),
    )  # fmt: skip
    torch.testing.assert_close(model.predict_chunk(one), chunk[:1], atol=1e-5, rtol=1e-5)


def test_padded_actions_count_for_nothing(model: VLA) -> None:
    batch = draw_batch(model, padded=True)
    text = features_of(model, batch)
    loss, numbers = model.loss(batch, text)
    batch.action = torch.where(batch.action_is_pad[..., None], torch.tensor(LIMIT), batch.action)
    again, numbers_again = model.loss(batch, text)
    assert loss == again
    assert numbers == numbers_again


def test_the_instruction_image_and_state_all_matter(model: VLA) -> None:
    batch = draw_batch(model)
    observation = observe(model, batch)
    chunk = model.predict_chunk(observation)
    for name, value in (
        ("text", observation.text[[1, 2, 0]]),
        ("state", batch.state + 1),
        ("images", {"front": 255 - batch.images["front"]}),
    ):
        parts = {"images": batch.images, "state": batch.state, "text": observation.text} | {name: value}
        assert (model.predict_chunk(Observation(**parts)) - chunk).abs().amax(dim=(1, 2)).min() > 1e-4, name


def test_committed_actions_come_back_and_steer_the_rest(model: VLA) -> None:
    batch = draw_batch(model)
    observation = observe(model, batch)
    prefix, length = torch.randn(B, H, A) * 10, torch.tensor([0, 2, H])
    free, chunk = model.predict_chunk(observation), model.predict_chunk(observation, prefix, length)
    torch.testing.assert_close(chunk[0], free[0])
    assert torch.equal(chunk[1, :2], prefix[1, :2])
    assert (chunk[1, 2:] != free[1, 2:]).any(dim=-1).all()
    assert torch.equal(chunk[2], prefix[2])
    beyond = prefix.clone()
    beyond[1, 2:] = torch.nan  # nothing behind the prefix is read
    assert torch.equal(model.predict_chunk(observation, beyond, length)[1], chunk[1])


def test_predictions_stay_within_the_limits_of_the_data(model: VLA) -> None:
    batch = draw_batch(model)
    wild = build().eval()
    nn.init.normal_(wild.head.out.weight, std=100)
    chunk = wild.predict_chunk(observe(wild, batch))
    torch.testing.assert_close(chunk.abs().amax(), torch.tensor(LIMIT))


def test_prefixes_are_drawn_as_configured() -> None:
    model = build(prefix_probability=0.25).train()
    device = torch.device("cpu")
    lengths = model.draw(20_000, device).prefix_length
    shares = torch.bincount(lengths, minlength=5) / len(lengths)
    expected = torch.tensor([0.75, *[0.0625] * 4])
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
    assert model.eval().draw(100, device).prefix_length.max() == 0
    assert build(max_prefix=0).train().draw(100, device).prefix_length.max() == 0


def test_the_loss_leaves_the_prefix_out() -> None:
    model = build(prefix_probability=1.0, max_prefix=3).train()
    batch, drawn = draw_batch(model), Drawn(torch.full((B,), 3), absent=None)
    text = features_of(model, batch)
    hidden = model(
        Observation(batch.images, batch.state, text), model.normalizer.normalize(batch.action),
        model.leading(torch.full((B,), 3)),
    )  # fmt: skip
    predicted = model.normalizer.unnormalize(model.head.decode(hidden))
    expected = (predicted - batch.action)[:, 3:].abs().mean()
    torch.testing.assert_close(model.loss(batch, text, drawn=drawn)[1]["action_error"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_one_batch_is_learned_by_heart(norm: str) -> None:
    model = build(norm=norm).train()
    batch = draw_batch(model, size=4)
    text = features_of(model, batch)
    optimizer = torch.optim.AdamW(parameter_groups(model, model.config, 0.0), lr=1e-3)
    for _ in range(150):
        loss, _ = model.loss(batch, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    loss, numbers = model.loss(batch, text)
    assert loss < 0.15  # of 0.8 at the start
    chunk = model.predict_chunk(Observation(batch.images, batch.state, text))
    torch.testing.assert_close(
        (chunk - batch.action).abs().mean(), numbers["action_error"], atol=0.02, rtol=0
    )


def test_augmentation_reaches_the_images_in_training(model: VLA) -> None:
    batch = draw_batch(model)
    text = features_of(model, batch)
    plain, _ = model.loss(batch, text)
    dimmed, _ = model.loss(batch, text, augment=lambda images: images * 0.5)
    assert plain != dimmed


def test_bf16_comes_close(model: VLA) -> None:
    batch = draw_batch(model)
    observation = observe(model, batch)
    expected = model.predict_chunk(observation)
    with torch.autocast("cpu", torch.bfloat16):
        chunk = model.predict_chunk(observation)
    assert chunk.dtype == torch.float32
    torch.testing.assert_close(chunk, expected, atol=0.1, rtol=0.05)


class Exported(nn.Module):
    """The predict path with plain tensors going in."""

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        images: dict[str, Tensor],
        state: Tensor,
        text: Tensor,
        pad: Tensor,
        prefix: Tensor,
        length: Tensor,
    ) -> Tensor:
        return self.model.predict_chunk(Observation(images, state, Tokens(text, pad)), prefix, length)


@pytest.mark.slow
@pytest.mark.parametrize(("n_obs_steps", "conditioning"), [(1, "film"), (2, "film"), (1, "none")])
def test_prediction_can_be_exported(n_obs_steps: int, conditioning: str) -> None:
    image = ImageConfig(pixels=32, patch=8, conditioning=conditioning)
    model = build(2, n_obs_steps=n_obs_steps, image=image).eval()
    batch = draw_batch(model)
    seen = observe(model, batch)
    inputs = (
        seen.images, seen.state, seen.text.x, seen.text.pad, torch.randn(B, H, A), torch.tensor([0, 1, 2])
    )  # fmt: skip
    with torch.no_grad():
        program = torch.export.export(Exported(model), inputs)
        torch.testing.assert_close(program.module()(*inputs), Exported(model)(*inputs), atol=1e-6, rtol=1e-5)


def test_parameter_groups_cover_everything_once() -> None:
    image = ImageConfig(pixels=32, patch=8, lr_multiplier=0.3)
    model = build(image=image, text=TextConfig(frozen=False, lr_multiplier=0.1))
    groups = parameter_groups(model, model.config, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    listed = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    found = {names[id(p)]: (g["weight_decay"], g["lr_multiplier"]) for g in groups for p in g["params"]}
    assert found["encoder.layers.0.feed_forward.up.weight"] == (0.05, 1.0)
    assert found["encoder.layers.0.feed_forward.up.bias"] == (0.0, 1.0)
    assert found["actions.positions.table"] == (0.0, 1.0)
    assert found["tokens.image.backbone.blocks.0.attn.qkv.weight"] == (0.05, 0.3)
    assert found["tokens.image.backbone.pos_embed"] == (0.0, 0.3)
    assert found["text.encoder.embeddings.word_embeddings.weight"] == (0.0, 0.1)
    assert found["text.encoder.encoder.layer.0.attention.self.query.weight"] == (0.05, 0.1)


def test_a_frozen_text_encoder_is_not_trained(model: VLA) -> None:
    listed = {id(p) for group in parameter_groups(model, model.config, 0.05) for p in group["params"]}
    assert not listed & {id(p) for p in model.text.parameters()}


def test_training_mode_leaves_frozen_parts_in_evaluation() -> None:
    model = build(image=ImageConfig("resnet18", pixels=32, frozen=True)).train()
    assert model.encoder.training
    assert not model.text.encoder.training
    assert not model.tokens.image.backbone.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"head": "l3"}, "model.head: got 'l3', expected one of l1"),
        (lambda: {"image": ImageConfig("vit_nano", pixels=32)}, "model.image.backbone: got 'vit_nano'"),
    ],
)
def test_wrong_choices_are_explained(options: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options())


@pytest.mark.slow
def test_the_model_imports_without_timm_and_transformers() -> None:
    program = "import sys, vla.model.vla; print({'timm', 'transformers', 'lerobot'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"
