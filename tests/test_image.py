"""Image tokens: against timm, shapes and order, conditioning, freezing, clear errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from parity import parity
from safetensors.torch import save_file
from torch import Tensor, nn

from vla.config import ConfigError, ImageConfig, ModelConfig, ResamplerConfig
from vla.model.backbone import ConvStem
from vla.model.image import ImageTokens
from vla.model.parameters import initialise_network
from vla.observation import Tokens

B, D, TEXT_WIDTH = 2, 128, 16


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


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize(("cameras", "steps"), [(1, 1), (2, 1), (2, 3)])
def test_shape_of_image_tokens(cameras: int, steps: int, patch: int, stem: str) -> None:
    tokens = image_tokens(cameras, steps, patch=patch, stem=stem)
    assert tokens(pictures(cameras, steps), words()).shape == (B, steps * cameras * (64 // patch) ** 2, D)


@pytest.mark.parametrize(
    ("name", "side", "count", "leading"),
    [
        ("vit_tiny_patch16_224", 64, 16, 1),
        ("vit_small_patch14_reg4_dinov2", 56, 16, 5),  # class and register tokens
        ("vit_tiny_r_s16_p8_224", 128, 16, 1),  # a hybrid: convolutions to strides of 8, then patches
        ("xcit_nano_12_p16_224", 64, 16, 1),  # does not say that it has a class token
        ("swin_tiny_patch4_window7_224", 64, 4, 0),
        ("resnet18", 64, 4, 0),
        ("mobilevit_xxs", 64, 4, 0),  # a hybrid that gives a map
    ],
)
def test_backbones_by_name_give_timms_features(name: str, side: int, count: int, leading: int) -> None:
    tokens = image_tokens(backbone=name, pixels=side).eval()
    images = torch.rand(B, 3, side, side)
    features = tokens.backbone.forward_features(images)  # type: ignore[operator]
    if features.ndim == 3:
        assert features.shape[1] == leading + count
        expected = features[:, leading:]
    else:
        channels = 3 if name.startswith("swin") else 1
        rows = [features.movedim(channels, 3)[:, i, j] for i in range(2) for j in range(2)]  # row by row
        expected = torch.stack(rows, dim=1)
    parity(f"image tokens, {name}", "timm's forward_features", tokens.grid(images), expected, 0)
    assert tokens.count == tokens.patches == count
    assert tokens(pictures(side=side), words()).shape == (B, count, D)
    assert tokens.mean.flatten().tolist() == pytest.approx(timm.get_pretrained_cfg(name).mean)


def test_patches_go_row_by_row() -> None:
    embed = image_tokens(stem="patch").backbone.patch_embed
    black = torch.zeros(1, 3, 64, 64)
    for k in range(16):
        image, row, column = black.clone(), 16 * (k // 4), 16 * (k % 4)
        image[..., row : row + 16, column : column + 16] = 1.0
        differs = (embed(image) - embed(black)).abs().amax(dim=2)[0] > 0
        assert differs.nonzero().flatten().tolist() == [k]


@pytest.mark.parametrize("resampled", [0, 5])
def test_tokens_are_ordered_by_time_then_camera(resampled: int) -> None:
    resampler = ResamplerConfig(tokens=resampled)
    tokens, one = (image_tokens(*sizes, resampler=resampler) for sizes in ((2, 3), (1, 1)))
    own = {n: p for n, p in tokens.state_dict().items() if n not in ("camera", "time.table")}
    one.load_state_dict(own | {"camera": torch.zeros_like(one.camera)})
    images = pictures(2, 3)
    count = resampled or 16
    assert tokens.count == one.count == count
    time: Any = tokens.time
    x = tokens(images, words()).unflatten(1, (3, 2, count))
    for t in range(3):
        for c, camera in enumerate(("front", "wrist")):
            alone = one({"front": images[camera][:, t : t + 1]}, words())
            torch.testing.assert_close(
                x[:, t, c], alone + tokens.camera[c] + time.table[t, 0], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize(
    ("name", "placed"),
    [("vit_tiny_patch16_224", True), ("swin_tiny_patch4_window7_224", False), ("resnet18", False)],
)
def test_tokens_know_their_place(name: str, placed: bool) -> None:
    tokens = image_tokens(backbone=name, pixels=128, conditioning="none")
    count, width = tokens.count, tokens.projection.in_features
    tokens.grid = lambda images: torch.zeros(B, count, width)  # type: ignore[method-assign]
    x = (tokens(pictures(side=128), words()) - tokens.camera)[0]  # (V, D)
    if placed:  # the backbone itself adds them
        assert not x.any()
        return
    side = round(count**0.5)
    for place, (row, column) in enumerate((i, j) for i in range(side) for j in range(side)):
        for i in (0, 1, D // 4 - 1):
            for offset, position in ((0, row), (D // 2, column)):
                angle = torch.tensor(position / 10000 ** (2 * i / (D / 2)), dtype=torch.float64)
                got = x[place, offset + 2 * i : offset + 2 * i + 2].double()
                torch.testing.assert_close(got, torch.stack([angle.sin(), angle.cos()]), atol=1e-6, rtol=0)


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
    before = {name: buffer.clone() for name, buffer in tokens.backbone.named_buffers()}
    tokens(pictures(), words())
    assert all(torch.equal(buffer, before[name]) for name, buffer in tokens.backbone.named_buffers())
    assert all(parameter.grad is None for parameter in tokens.backbone.parameters())
    assert tokens.projection.weight.grad is not None


def test_an_unknown_backbone_is_answered_with_close_names() -> None:
    with pytest.raises(ConfigError, match="got 'vit_tinny_patch16_224', expected .*vit_tiny_patch16_224"):
        image_tokens(backbone="vit_tinny_patch16_224")


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("resnet18.a2_in1", 64, r"image\.backbone: got 'resnet18.a2_in1', expected .*resnet18.a2_in1k"),
        ("crossvit_tiny_240", 240, r"image\.backbone: .*expected a timm model that makes one square grid"),
        ("crossvit_tiny_240", 64, r"image\.pixels: got 64, expected a side that crossvit_tiny_240 takes"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(name: str, pixels: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        image_tokens(backbone=name, pixels=pixels)


def test_a_resampler_wider_than_a_named_backbone_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="got 5, expected at most the 4 tokens that resnet18 makes of a 64 px"
    ):
        image_tokens(backbone="resnet18", resampler=ResamplerConfig(tokens=5))


def test_measuring_a_backbone_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=0)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    tokens = ImageTokens(ModelConfig(size="tiny", image=ImageConfig("resnet18", 64)), ["front"], TEXT_WIDTH)
    assert tokens.backbone.training
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), tokens.backbone.buffers(), strict=True))
    torch.manual_seed(0)
    timm.create_model("resnet18", num_classes=0)
    assert torch.equal(torch.rand(1), drawn)


def test_pretrained_weights_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the hub's cache, where a file of our own lies in the place of timm's."""
    name = "vit_tiny_patch16_224"
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    theirs = timm.create_model(name, num_classes=cfg.num_classes)
    folder = tmp_path / f"models--{str(cfg.hf_hub_id).replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(theirs.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = ModelConfig(size="tiny", image=ImageConfig(name, 64, pretrained=True))
    mine = ImageTokens(config, ["front"], TEXT_WIDTH).backbone.state_dict()
    for key, tensor in theirs.state_dict().items():
        if key not in ("pos_embed", "head.weight", "head.bias"):  # resized; and left out
            assert torch.equal(mine[key], tensor), key


def test_unreachable_weights_are_answered_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"model\.image\.pretrained: .* remedy: connect to the hub once"):
        image_tokens(backbone="vit_small_patch14_dinov2", pixels=56, pretrained=True)


def test_a_checkpoint_fetches_no_weights() -> None:
    config = ModelConfig(image=ImageConfig("vit_small_patch14_dinov2", pixels=56, pretrained=True))
    ImageTokens(config, ["front"], TEXT_WIDTH, pretrained=False)


@pytest.mark.parametrize(
    ("conditioning", "resampled", "conditioned"),
    [("film", 0, True), ("none", 0, False), ("film", 5, True), ("none", 5, True)],
)
def test_the_instruction_conditions_image_tokens_and_its_padding_does_not(
    conditioning: str, resampled: int, conditioned: bool
) -> None:
    tokens, text = image_tokens(conditioning=conditioning, resampler=ResamplerConfig(resampled)), words()
    x = tokens(pictures(), text)
    text.x[1, 2:] += 100.0  # padding
    assert torch.equal(x, tokens(pictures(), text))
    longer = Tokens(nn.functional.pad(text.x, (0, 0, 0, 3)), nn.functional.pad(text.pad, (0, 3), value=True))
    torch.testing.assert_close(x, tokens(pictures(), longer), atol=1e-6, rtol=1e-6)
    text.x[1, 0] += torch.arange(TEXT_WIDTH)
    changed = tokens(pictures(), text)
    assert torch.equal(x[0], changed[0])
    assert torch.allclose(x[1], changed[1]) is not conditioned


@pytest.mark.parametrize("resampled", [0, 5])
def test_gradient_reaches_every_parameter(resampled: int) -> None:
    tokens = image_tokens(2, 2, resampler=ResamplerConfig(resampled))
    tokens(pictures(2, 2), words()).square().mul(torch.arange(D)).sum().backward()
    for name, parameter in tokens.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_names_of_parameters_stay() -> None:
    own = [name for name, _ in image_tokens(1, 2).named_parameters() if not name.startswith("backbone.")]
    film = ["text_norm", "scale_shift", "norm"]
    modules = [*(f"conditioning.{part}" for part in film), "projection"]
    assert sorted(own) == sorted(
        ["camera", "time.table", *(f"{m}.{p}" for m in modules for p in ("weight", "bias"))]
    )
