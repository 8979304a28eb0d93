"""Every option of the network, held to the same six promises: it builds, a gradient reaches every
parameter, no action depends on a later one, padding changes nothing, a checkpoint brings it back, and
torch.export takes its prediction.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_env import COLOURS, PHRASINGS
from toy_run import text_folder, toy_job, toy_model

from vla.config import AttentionConfig, ImageConfig, LoraConfig, ModelConfig, ResamplerConfig, TextConfig
from vla.data.normalize import Statistics
from vla.model.vla import VLA, Drawn
from vla.observation import Batch, Features, Observation, Tokens
from vla.training import checkpoint

B, H, A, P = 4, 4, 2, 3
CAMERAS = ("front", "wrist")
WORDS = [words.format(colour) for words in PHRASINGS for colour in COLOURS][:B]  # of 2 and 5 words
FEATURES = Features(dict.fromkeys(CAMERAS, (32, 32)), P, A, 10)


def image(**options: Any) -> ImageConfig:
    return ImageConfig(**{"pixels": 32, "patch": 8} | options)


def lora(*parts: str) -> dict[str, Any]:
    return {"lora": LoraConfig(rank=2, on=parts)}


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "norm post": {"norm": "post"},
    "relu": {"activation": "relu"},
    "swiglu": {"activation": "swiglu"},
    "dropout": {"dropout": 0.1},
    "sinusoidal positions": {"positions": "sinusoidal"},
    "min-max normalisation": {"normalization": "min_max"},
    "quantile normalisation": {"normalization": "quantiles"},
    "history": {"n_obs_steps": 2},
    "camera dropout": {"camera_dropout": 0.5},
    "cross fusion": {"fusion": "cross"},
    "cross fusion, post, history": {"fusion": "cross", "norm": "post", "n_obs_steps": 2},
    "autoregressive l1": {"decoding": "autoregressive"},
    "autoregressive bins": {"decoding": "autoregressive", "head": "bins", "bins": 16},
    "autoregressive gmm": {"decoding": "autoregressive", "head": "gmm", "components": 2},
    "autoregressive post": {"decoding": "autoregressive", "norm": "post", "positions": "sinusoidal"},
    "parallel bins": {"head": "bins", "bins": 16},
    "parallel gmm": {"head": "gmm", "components": 2},
    "flow": {"head": "flow", "flow_steps": 3},
    "window": {"attention": AttentionConfig("window", window=5)},
    "linformer": {"attention": AttentionConfig("linformer", rank=8)},
    "lsh": {"attention": AttentionConfig("lsh", chunk=8)},
    "window in cross fusion": {"attention": AttentionConfig("window", window=5), "fusion": "cross"},
    "linformer in cross fusion": {"attention": AttentionConfig("linformer", rank=8), "fusion": "cross"},
    "checkpointing": {"checkpointing": True, "dropout": 0.1},
    "chunked feed-forward": {"feed_forward_chunks": 3},
    "no conditioning": {"image": image(conditioning="none")},
    "patch stem": {"image": image(stem="patch")},
    "resampler": {"image": image(resampler=ResamplerConfig(tokens=5))},
    "resampler, no conditioning": {
        "image": image(conditioning="none", resampler=ResamplerConfig(tokens=5, layers=1))
    },
    "vit by name": {"image": image(backbone="vit_tiny_patch16_224")},
    "swin, frozen": {"image": image(backbone="swin_tiny_patch4_window7_224", pixels=64, frozen=True)},
    "text tuned": {"text": TextConfig(encoder=text_folder(), frozen=False)},
    "text from scratch": {"text": TextConfig("scratch", frozen=False, width=16, layers=1, heads=2)},
    "lora on text": lora("text"),
    "lora on everything": lora("text", "image", "trunk"),
    "lora on linformer": lora("trunk") | {"attention": AttentionConfig("linformer", rank=8)},
    "lsh in cross fusion": {"attention": AttentionConfig("lsh", chunk=8), "fusion": "cross"},
    "resampler, history": {"image": image(resampler=ResamplerConfig(tokens=5)), "n_obs_steps": 3},
    "no prefixes": {"max_prefix": 0},
    "hybrid by name": {"image": image(backbone="vit_tiny_r_s16_p8_224", pixels=64)},
}
# What these change is not the answer to an observation.
SAME_ANSWER = (
    "dropout",
    "camera dropout",
    "checkpointing",
    "chunked feed-forward",
    "text tuned",
    "no prefixes",
)
every_option = pytest.mark.parametrize("name", OPTIONS)


def config(name: str, **more: Any) -> ModelConfig:
    return toy_model(**{"image": image(), "chunk_size": H, "dropout": 0.0} | OPTIONS[name] | more)


@functools.cache
def statistics() -> Statistics:
    rng = np.random.default_rng(0)
    action = np.clip(rng.normal(0.5, 2, (1000, A)), -3, 3)
    return Statistics.of({"observation.state": rng.normal(1, 2, (1000, P)), "action": action})


def build(name: str, **more: Any) -> VLA:
    torch.manual_seed(0)
    model = VLA(config(name, **more), FEATURES, statistics(), instructions=WORDS)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # begins at zero, where an adapter does nothing and A gets no gradient
            nn.init.normal_(parameter, std=0.1)
    return model


@functools.cache
def built(name: str) -> VLA:
    return build(name).eval()


def draw_batch(model: VLA) -> Batch:
    generator = torch.Generator().manual_seed(1)
    shape = (B, model.config.n_obs_steps, 3, 32, 32)
    return Batch(
        images={c: torch.randint(256, shape, dtype=torch.uint8, generator=generator) for c in CAMERAS},
        state=torch.randn(B, model.config.n_obs_steps, P, generator=generator),
        task=torch.arange(B),
        action=torch.randn(B, H, A, generator=generator).clamp(-3, 3),
        action_is_pad=torch.arange(H) >= H - (torch.arange(B) % 2)[:, None],
    )


def encode(model: VLA) -> Tokens:
    return model.text.encode(model.text.tokenize(WORDS))


def observe(model: VLA, absent: Tensor | None = None) -> Observation:
    batch = draw_batch(model)
    with torch.no_grad():
        return Observation(batch.images, batch.state, encode(model), absent)


@every_option
def test_it_builds_and_predicts_within_limits(name: str) -> None:
    model = built(name)
    chunk = model.predict_chunk(observe(model))
    assert chunk.shape == (B, H, A)
    assert chunk.dtype == torch.float32
    assert chunk.isfinite().all()
    assert chunk.abs().max() <= 3
    assert torch.equal(chunk, model.predict_chunk(observe(model)))  # deterministic
    drawn = [model.predict_chunk(observe(model), sample=True) for _ in range(2)]
    assert drawn[0].abs().max() <= 3
    assert torch.equal(*drawn) == (model.config.head == "l1")


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "default"])
def test_it_is_not_the_default(name: str) -> None:
    """With the default's weights wherever names and shapes agree: what is left is what the option does."""
    model, default = build(name).eval(), built("default").state_dict()
    state = model.state_dict()
    shared = {n: t for n, t in default.items() if n in state and state[n].shape == t.shape}
    assert len(shared) > 10
    model.load_state_dict(shared, strict=False)
    if model.config.n_obs_steps == 1:
        answers = [each.predict_chunk(observe(each)) for each in (model, built("default"))]
        assert torch.allclose(*answers) == (name in SAME_ANSWER)


@pytest.mark.parametrize("name", ["dropout", "camera dropout", "checkpointing", "chunked feed-forward"])
def test_what_options_of_training_do(name: str) -> None:
    """Dropout and absent cameras change the loss; the others how often, and on how much, a layer runs."""
    losses, lengths = [], []
    for option in ("default", name):
        model = build(option).train()
        model.encoder.get_submodule("layers.0.feed_forward.up").register_forward_hook(
            lambda module, inputs, output: lengths.append(output.shape[1])
        )
        torch.manual_seed(1)
        loss, _ = model.loss(draw_batch(model), encode(model))
        loss.backward()
        losses.append(loss.item())
    (whole, *rest) = lengths
    if name == "chunked feed-forward":
        assert len(rest) == 3
        assert sum(rest) == whole
    else:
        assert rest == [whole] * (1 + (name == "checkpointing"))
    assert (losses[0] != pytest.approx(losses[1], rel=1e-5)) == ("dropout" in name or name == "checkpointing")


def test_cameras_are_dropped_one_at_a_time_and_unseen() -> None:
    model = build("camera dropout", prefix_probability=0.0).train()
    absent = model.draw(2000, torch.device("cpu")).absent
    assert absent is not None
    assert absent.sum(dim=1).max() == 1
    assert absent.float().mean(dim=0).tolist() == pytest.approx([0.25, 0.25], abs=0.05)
    batch, other = draw_batch(model), draw_batch(model)
    other.images["wrist"] = 255 - other.images["wrist"]
    losses = []
    for hidden in ([[False, True]] * B, [[False, False]] * B):
        drawn = Drawn(torch.zeros(B, dtype=torch.int64), torch.tensor(hidden))
        losses.append([model.loss(each, encode(model), drawn=drawn)[0].item() for each in (batch, other)])
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-5)
    assert losses[1][0] != pytest.approx(losses[1][1], rel=1e-5)
    assert build("camera dropout").eval().draw(B, torch.device("cpu")).absent is None


@every_option
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    model = build(name, prefix_probability=1.0).train()
    for _ in range(3):  # several draws of prefixes and of absent cameras
        loss, _ = model.loss(draw_batch(model), encode(model))
        assert loss.isfinite()
        loss.backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_option
def test_no_action_depends_on_a_later_one(name: str) -> None:
    model = built(name)
    observation, given = observe(model), torch.ones(B, H, dtype=torch.bool)
    actions = torch.randn(B, H, A, generator=torch.Generator().manual_seed(2))

    def outputs(actions: Tensor) -> Tensor:
        return model(observation, actions, given)

    before = outputs(actions)
    sees_itself = int(model.config.decoding == "autoregressive")  # action t is what token t + 1 carries
    for t in range(H - sees_itself):
        other = actions.clone()
        other[:, t] += 1
        changed = (outputs(other) != before).any(dim=-1)  # (B, H)
        assert not changed[:, : t + sees_itself].any()
        assert changed[:, t + sees_itself :].all()
    noisy = before.clone()
    noisy[:, 2] += 1  # nor does the head look ahead
    assert torch.equal(model.head.decode(noisy)[:, :2], model.head.decode(before)[:, :2])


@every_option
def test_padding_changes_nothing(name: str) -> None:
    model = built(name)
    seen = observe(model)
    chunk = model.predict_chunk(seen)
    noise = torch.randn_like(seen.text.x) * 100
    other = Tokens(torch.where(seen.text.pad[..., None], noise, seen.text.x), seen.text.pad)
    more = Tokens(
        torch.cat([other.x, noise], dim=1), torch.cat([other.pad, torch.ones_like(other.pad)], dim=1)
    )
    for text in (other, more):  # what stands in it, and how much there is
        again = model.predict_chunk(Observation(seen.images, seen.state, text))
        torch.testing.assert_close(again, chunk, atol=2e-5, rtol=1e-5)


@every_option
def test_a_camera_that_is_not_there_changes_nothing(name: str) -> None:
    model = built(name)
    absent = torch.tensor([[False, True]]).expand(B, -1)
    seen, blank = observe(model, absent), observe(model, absent)
    blank.images["wrist"] = 255 - blank.images["wrist"]
    torch.testing.assert_close(model.predict_chunk(seen), model.predict_chunk(blank), atol=2e-5, rtol=1e-5)
    blank.images["front"] = 255 - blank.images["front"]
    assert not torch.allclose(model.predict_chunk(seen), model.predict_chunk(blank), atol=1e-4)


@every_option
def test_a_prefix_comes_back_and_steers_the_rest(name: str) -> None:
    model = built(name)
    seen, prefix = observe(model), torch.randn(B, H, A, generator=torch.Generator().manual_seed(3))
    length = torch.tensor([0, 1, 2, H])
    free, chunk = model.predict_chunk(seen), model.predict_chunk(seen, prefix, length)
    torch.testing.assert_close(chunk[0], free[0])
    for i in range(B):
        assert torch.equal(chunk[i, : length[i]], prefix[i, : length[i]])
    prefix[2, 2:] = torch.nan  # nothing behind the prefix is read
    torch.testing.assert_close(model.predict_chunk(seen, prefix, length)[2], chunk[2])
    hidden = [
        model(seen, torch.zeros(B, H, A) + value, model.leading(torch.full((B,), 2))) for value in (0, 1)
    ]
    assert (hidden[0] != hidden[1]).any(dim=-1)[:, 2:].all()


@every_option
def test_a_checkpoint_brings_it_back(name: str, tmp_path: Path) -> None:
    model = built(name)
    job = toy_job(tmp_path, model.config, init="a checkpoint whose weights the adapters adapt")
    path = checkpoint.save(tmp_path, 1, job, model, statistics(), {}, {}, keep=1)
    loaded, _, _ = checkpoint.load_model(path)
    seen = observe(model)
    again = loaded.predict_chunk(Observation(seen.images, seen.state, encode(loaded)))
    torch.testing.assert_close(again, model.predict_chunk(seen), atol=1e-5, rtol=1e-5)


class Exported(nn.Module):
    """The predict path with plain tensors going in."""

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: dict[str, Tensor], state: Tensor, text: Tensor, pad: Tensor, prefix: Tensor, n: Tensor
    ) -> Tensor:
        return self.model.predict_chunk(Observation(images, state, Tokens(text, pad)), prefix, n)


@pytest.mark.slow
@every_option
def test_torch_exports_its_prediction(name: str) -> None:
    model = built(name)
    seen = observe(model)
    prefix, length = torch.randn(B, H, A), torch.tensor([0, 1, 2, 0])
    inputs = (seen.images, seen.state, seen.text.x, seen.text.pad, prefix, length)
    with torch.no_grad():
        program = torch.export.export(Exported(model), inputs)
        torch.testing.assert_close(program.module()(*inputs), Exported(model)(*inputs), atol=1e-5, rtol=1e-5)
