"""Image, text and state tokens: against timm and transformers, shapes, freezing, clear errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from toy_run import text_folder
from transformers import BertModel

from vla.config import ConfigError, ImageConfig, ModelConfig, TextConfig
from vla.data.normalize import Statistics
from vla.model import text as text_module
from vla.model.image import ConvStem, ImageTokens
from vla.model.parameters import initialise_network
from vla.model.text import TextCache, TextTokens, minilm
from vla.model.tokens import StateTokens
from vla.observation import Tokens

B, D, TEXT_WIDTH = 2, 128, 16
INSTRUCTIONS = ["touch the red ball", "", "push the blue block to the left of the bowl"]


def image_tokens(cameras: int = 1, n_obs_steps: int = 1, **image: object) -> ImageTokens:
    torch.manual_seed(0)
    config = ModelConfig(size="tiny", n_obs_steps=n_obs_steps, image=replace(ImageConfig(pixels=64), **image))
    tokens = ImageTokens(config, ["front", "wrist"][:cameras], TEXT_WIDTH)
    initialise_network(tokens)
    return tokens


def pictures(cameras: int = 1, steps: int = 1, side: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (B, steps, 3, side, side)
    return {
        name: torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        for name in ["front", "wrist"][:cameras]
    }


def words() -> Tokens:
    """Features of two instructions, the second one shorter."""
    x = torch.randn(B, 4, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    return Tokens(x, torch.tensor([[False] * 4, [False, False, True, True]]))


@pytest.fixture(scope="module")
def text() -> TextTokens:
    return TextTokens(TextConfig())


# Images


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize(("cameras", "steps"), [(1, 1), (2, 1), (2, 3)])
def test_shape_of_image_tokens(cameras: int, steps: int, patch: int, stem: str) -> None:
    tokens = image_tokens(cameras, steps, patch=patch, stem=stem)
    assert tokens(pictures(cameras, steps), words()).shape == (B, steps * cameras * (64 // patch) ** 2, D)


@pytest.mark.parametrize(
    ("name", "side", "count"),
    [
        ("vit_tiny_patch16_224", 64, 16),
        ("vit_small_patch14_reg4_dinov2", 56, 16),  # class and register tokens
        ("swin_tiny_patch4_window7_224", 64, 4),
        ("resnet18", 64, 4),
    ],
)
def test_backbones_by_name_give_timms_features(name: str, side: int, count: int) -> None:
    tokens = image_tokens(backbone=name, pixels=side).eval()
    images = torch.rand(B, 3, side, side)
    features = tokens.backbone.forward_features(images)  # type: ignore[operator]
    if name.startswith("vit"):
        expected = features[:, tokens.backbone.num_prefix_tokens :]  # type: ignore[misc]
    elif name.startswith("swin"):
        expected = features.reshape(B, count, -1)
    else:
        expected = features.permute(0, 2, 3, 1).reshape(B, count, -1)
    assert torch.equal(tokens.grid(images), expected)
    assert tokens(pictures(side=side), words()).shape == (B, count, D)
    assert tokens.mean.flatten().tolist() == pytest.approx(timm.get_pretrained_cfg(name).mean)


def test_pixels_reach_the_backbone_as_it_was_trained() -> None:
    tokens = image_tokens(backbone="vit_small_patch14_dinov2", pixels=56)
    seen: list[Tensor] = []
    tokens.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens.grid = lambda images: seen.append(images) or torch.zeros(B, 1, 384)  # type: ignore[method-assign,func-returns-value]
    images = pictures(side=56)
    tokens(images, words())
    x = images["front"][:, 0].double() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (x - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(seen[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_images_of_another_size_are_resized() -> None:
    tokens = image_tokens(2)
    images = pictures(2) | {"wrist": torch.full((B, 1, 3, 96, 48), 77, dtype=torch.uint8)}
    small = pictures(2) | {"wrist": torch.full((B, 1, 3, 64, 64), 77, dtype=torch.uint8)}
    torch.testing.assert_close(tokens(images, words()), tokens(small, words()))


def test_cameras_share_weights_and_are_told_apart() -> None:
    tokens, images = image_tokens(2), pictures()["front"]
    front, wrist = tokens({"front": images, "wrist": images}, words()).chunk(2, dim=1)
    difference = tokens.camera[1] - tokens.camera[0]
    torch.testing.assert_close(wrist - front, difference.expand_as(front), atol=1e-5, rtol=1e-5)
    assert difference.abs().min() > 0


def test_augmentation_sees_images_in_zero_to_one() -> None:
    tokens, seen = image_tokens(2), []

    def augment(images: Tensor) -> Tensor:
        seen.append(images)
        return images * 0

    black = {name: torch.zeros_like(image) for name, image in pictures(2).items()}
    assert torch.equal(tokens(pictures(2), words(), augment), tokens(black, words()))
    assert seen[0].shape == (2 * B, 3, 64, 64)
    torch.testing.assert_close(seen[0][0], pictures(2)["front"][0, 0] / 255)
    torch.testing.assert_close(seen[0][1], pictures(2)["wrist"][0, 0] / 255)


def test_the_stem_has_no_running_statistics() -> None:
    tokens = image_tokens()
    assert any(isinstance(module, ConvStem) for module in tokens.modules())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in tokens.modules())


def test_a_frozen_backbone_stays_as_it_is() -> None:
    tokens = image_tokens(backbone="resnet18", frozen=True).train()
    assert not tokens.backbone.training
    tokens(pictures(), words()).sum().backward()
    assert all(parameter.grad is None for parameter in tokens.backbone.parameters())
    assert tokens.projection.weight.grad is not None


def test_an_unknown_backbone_is_answered_with_close_names() -> None:
    with pytest.raises(ConfigError, match="got 'vit_tinny_patch16_224', expected .*vit_tiny_patch16_224"):
        image_tokens(backbone="vit_tinny_patch16_224")


def test_unreachable_weights_are_answered_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"model\.image\.pretrained: .* remedy: connect to the hub once"):
        image_tokens(backbone="vit_small_patch14_dinov2", pixels=56, pretrained=True)


def test_a_checkpoint_fetches_no_weights() -> None:
    config = ModelConfig(image=ImageConfig("vit_small_patch14_dinov2", pixels=56, pretrained=True))
    ImageTokens(config, ["front"], TEXT_WIDTH, pretrained=False)


def test_the_instruction_conditions_image_tokens_and_its_padding_does_not() -> None:
    tokens, text = image_tokens(), words()
    x = tokens(pictures(), text)
    text.x[1, 2:] += 100.0  # padding
    assert torch.equal(x, tokens(pictures(), text))
    text.x[1, 0] += 1.0
    changed = tokens(pictures(), text)
    assert torch.equal(x[0], changed[0])
    assert not torch.allclose(x[1], changed[1])
    plain = image_tokens(conditioning="none")
    assert torch.equal(plain(pictures(), words()), plain(pictures(), text))


# Text


def test_text_features_are_berts_hidden_states(text: TextTokens) -> None:
    bert = BertModel.from_pretrained(minilm())
    bert.eval()
    words = text.tokenize(INSTRUCTIONS)
    with torch.no_grad():
        expected = bert(input_ids=words.x, attention_mask=(~words.pad).long()).last_hidden_state
    tokens = text.encode(words)
    assert torch.equal(tokens.x, expected)
    assert torch.equal(tokens.pad, words.pad)


def test_tokens_are_padded_to_a_multiple_of_eight(text: TextTokens) -> None:
    words = text.tokenize(INSTRUCTIONS)
    assert words.x.shape == words.pad.shape == (3, 16)
    assert (~words.pad).sum(dim=1).tolist() == [6, 2, 12]  # with [CLS] and [SEP]
    assert text.tokenizer.decode(words.x[0, 1:5]) == INSTRUCTIONS[0]


def test_an_instruction_of_no_tokens_becomes_one_that_ends_it() -> None:
    text = TextTokens(TextConfig(encoder=text_folder()))  # like GPT-2's, its tokenizer adds nothing
    words = text.tokenize(["", "go to the red target"])
    assert (~words.pad).sum(1).tolist() == [1, 5]
    assert words.x[0, 0] == text.tokenizer.pad_token_id  # it has no token for the end
    assert text.encode(words).x.isfinite().all()
    text.tokenizer.eos_token = "reach"
    assert text.tokenize([""]).x[0, 0] == text.tokenizer.convert_tokens_to_ids("reach")


def test_a_long_instruction_is_never_cut(text: TextTokens) -> None:
    with pytest.raises(ConfigError, match="got 32, expected at least 42 for 'go go.*remedy: raise"):
        text.tokenize(["touch it", " ".join(["go"] * 40)])


def test_frozen_text_takes_no_gradient_and_no_dropout(text: TextTokens) -> None:
    text.train()
    words = text.tokenize(INSTRUCTIONS)
    tokens = text.encode(words)
    assert not tokens.x.requires_grad
    assert torch.equal(tokens.x, text.encode(words).x)
    assert not any(parameter.requires_grad for parameter in text.parameters())


def test_text_can_be_tuned() -> None:
    text = TextTokens(TextConfig(frozen=False)).train()
    assert text.encoder.training
    text.encode(text.tokenize(INSTRUCTIONS)).x.square().sum().backward()
    trainable = [parameter for parameter in text.parameters() if parameter.requires_grad]
    assert len(trainable) > 90
    assert all(parameter.grad is not None for parameter in trainable)


def test_a_saved_encoder_is_the_same_without_its_package(
    text: TextTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text.save(tmp_path)
    monkeypatch.setattr(text_module, "MINILM_PACKAGE", "not_installed_here")
    copy = TextTokens(TextConfig(), tmp_path)
    words = text.tokenize(INSTRUCTIONS)
    assert torch.equal(copy.tokenize(INSTRUCTIONS).x, words.x)
    assert torch.equal(copy.encode(words).x, text.encode(words).x)


def test_minilm_comes_from_the_hub_when_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MINILM_PACKAGE", "not_installed_here")
    assert minilm() == "sentence-transformers/all-MiniLM-L6-v2"
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded.*remedy: install"):
        TextTokens(TextConfig())


def test_altered_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"got: sha256 53aa5117.*remedy: reinstall"):
        minilm()


def test_the_cache_returns_what_the_encoder_does(text: TextTokens) -> None:
    cache = TextCache(text)
    tokens, expected = cache(INSTRUCTIONS), text.encode(text.tokenize(INSTRUCTIONS))
    assert torch.equal(tokens.pad, expected.pad)
    torch.testing.assert_close(tokens.x[~tokens.pad], expected.x[~expected.pad], atol=1e-5, rtol=1e-4)
    alone = cache(INSTRUCTIONS[:1])
    assert alone.x.shape[1] == 8
    assert torch.equal(alone.x[0, :6], tokens.x[0, :6])  # whoever else is asked for


# State


def test_state_tokens_are_normalised_one_per_step() -> None:
    rows = np.random.default_rng(0).normal(5, 3, (1000, 4))
    statistics = Statistics.of({"observation.state": rows})
    state = StateTokens(ModelConfig(size="tiny", n_obs_steps=3), 4, statistics)
    initialise_network(state)
    x = torch.tensor(rows[:6], dtype=torch.float32).view(2, 3, 4)
    assert state(x).shape == (2, 3, D)
    unit = StateTokens(
        ModelConfig(size="tiny", n_obs_steps=3), 4, Statistics.of({"observation.state": (rows - 5) / 3})
    )
    unit.load_state_dict(state.state_dict())
    torch.testing.assert_close(state(x), unit((x - 5) / 3), atol=1e-5, rtol=1e-5)
