"""Image tokens: every camera through one timm backbone, projected to the model's width.

    B batch   T n_obs_steps   C cameras   p pixels   V tokens per image   W backbone width   D d_model

`scratch` is timm's VisionTransformer without class token, with a convolutional stem instead of
the linear patch projection: strided 3x3 convolutions let a small ViT localise without pretraining
(Xiao et al. 2021, "Early convolutions help transformers see better"). Theirs has BatchNorm, ours
GroupNorm, which has no running statistics to go wrong under a captured CUDA graph.
timm is imported when a backbone is built: that takes six seconds.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla.config import ConfigError, ModelConfig
from vla.observation import Tokens

Augment = Callable[[Tensor], Tensor]  # (N, 3, h, w) float in [0, 1] -> the same


class ConvStem(nn.Module):
    """(N, 3, p, p) -> (N, V, W): one stride-2 3x3 convolution per halving, then a 1x1.

    Channels double up to W. Takes the arguments of timm's PatchEmbed, so that it can replace it.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        self.grid_size = (img_size // patch_size,) * 2
        self.num_patches = self.grid_size[0] ** 2
        halvings = patch_size.bit_length() - 1
        widths = [in_chans, *(max(16, embed_dim >> i) // 16 * 16 for i in reversed(range(halvings)))]
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(narrow, wide, 3, 2, 1, bias=False),
                nn.GroupNorm(wide // 16, wide),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(images.contiguous(memory_format=torch.channels_last))  # (N, W, p / patch, p / patch)
        return x.flatten(2).transpose(1, 2)  # (N, V, W)


def scratch(config: ModelConfig) -> nn.Module:
    """timm's VisionTransformer at the model size's width and depth, untrained."""
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    image = config.image
    return VisionTransformer(
        img_size=image.pixels, patch_size=image.patch, num_classes=0, class_token=False, global_pool="",
        embed_dim=config.image_width, depth=config.image_depth, num_heads=config.image_heads,
        embed_layer={"conv": ConvStem, "patch": PatchEmbed}[image.stem],
    )  # fmt: skip


def named(config: ModelConfig, pretrained: bool) -> nn.Module:
    """A backbone of timm by name. Raises ConfigError for an unknown name or unreachable weights."""
    import timm

    name, pixels = config.image.backbone, config.image.pixels
    known = timm.list_models()
    if name.split(".")[0] not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ConfigError(
            "model.image.backbone",
            name,
            "'scratch' or a timm model, such as " + ", ".join(close or known[:3]),
            "see timm.list_models()",
        )
    try:
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=pixels)
        except TypeError:  # convolutional networks take any size and no such argument
            return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:
        if not pretrained:
            raise ConfigError(
                "model.image.pixels", pixels, f"a side that {name} takes ({error})", "choose another side"
            ) from error
        raise ConfigError(
            "model.image.pretrained",
            True,
            f"weights of {name} in timm's cache or on a reachable hub ({error})",
            "connect to the hub once, copy its cache (HF_HOME) here, or set model.image.pretrained=false",
        ) from error


class Film(nn.Module):
    """The instruction scales and shifts the channels of the image tokens (Perez et al. 2018, FiLM).

    A product of words and pixels at every token, which attention alone takes long to find: held-out
    loss at the starts of episodes after 51,000 samples 0.17 to 0.19 with it, 0.38 without (README).
    """

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.text_norm = nn.LayerNorm(text_width)
        self.scale_shift = nn.Linear(text_width, 2 * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, text: Tokens) -> Tensor:
        """x: (B, V, W) image tokens, text: (B, L, text width) with padding -> (B, V, W)."""
        words = (~text.pad)[..., None].to(text.x.dtype)  # (B, L, 1)
        mean = (text.x * words).sum(1) / words.sum(1).clamp(min=1)  # (B, text width)
        scale, shift = self.scale_shift(self.text_norm(mean))[:, None].chunk(2, dim=-1)  # (B, 1, W) each
        return F.gelu(self.norm(x) * (1 + scale) + shift)


class Unconditioned(nn.Module):
    """Image tokens that do not know the instruction before the encoder."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, text: Tokens) -> Tensor:
        return x


CONDITIONINGS: dict[str, type[Film] | type[Unconditioned]] = {"film": Film, "none": Unconditioned}


class ImageTokens(nn.Module):
    """Cameras -> tokens (B, T * C * V, D). Cameras share the weights, and each has an embedding.

    pretrained: fetch the weights that the config asks for; False when a checkpoint brings them.
    """

    mean: Tensor
    std: Tensor
    backbone: Any  # of timm, whose models share names and no type

    def __init__(
        self, config: ModelConfig, cameras: list[str], text_width: int, pretrained: bool = True
    ) -> None:
        super().__init__()
        self.config, self.cameras = config.image, cameras
        if config.image.backbone == "scratch":
            self.backbone = scratch(config)
        else:
            self.backbone = named(config, pretrained and config.image.pretrained)
        self.backbone.requires_grad_(not config.image.frozen)
        self.prefix_tokens: int = getattr(self.backbone, "num_prefix_tokens", 0)
        self.channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        pretrained_cfg = getattr(self.backbone, "pretrained_cfg", None) or {}
        for name in ("mean", "std"):
            value = torch.tensor(pretrained_cfg.get(name, (0.5,) * 3)).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        width = int(self.backbone.num_features)
        self.conditioning = CONDITIONINGS[config.image.conditioning](width, text_width)
        self.projection = nn.Linear(width, config.d_model)
        self.camera = nn.Parameter(torch.empty(len(cameras), 1, config.d_model))
        steps = config.n_obs_steps
        self.time = nn.Parameter(torch.empty(steps, 1, 1, config.d_model)) if steps > 1 else None
        self.train(self.training)

    def train(self, mode: bool = True) -> ImageTokens:
        super().train(mode)
        self.backbone.train(mode and not self.config.frozen)
        return self

    def forward(self, images: dict[str, Tensor], text: Tokens, augment: Augment | None = None) -> Tensor:
        """camera -> (B, T, 3, h, w) uint8, to (B, T * C * V, D).

        text: the instruction (B, L, text width), which may condition the tokens.
        augment: applied to all images, resized and in [0, 1], before they are normalised.
        """
        steps = images[self.cameras[0]].shape[1]
        shape = (steps, len(self.cameras), -1)
        pixels = torch.stack([self.resized(images[camera]) for camera in self.cameras], dim=2)
        pixels = pixels.flatten(0, 2)  # (B * T * C, 3, p, p)
        if augment is not None:
            pixels = augment(pixels)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            grid = self.grid((pixels - self.mean) / self.std)  # (B * T * C, V, W)
        grid = grid.unflatten(0, (len(text.x), -1)).flatten(1, 2)  # (B, T * C * V, W)
        x = self.projection(self.conditioning(grid, text))  # (B, T * C * V, D)
        x = x.unflatten(1, shape) + self.camera  # (B, T, C, V, D)
        if self.time is not None:
            x = x + self.time
        return x.flatten(1, 3)  # (B, T * C * V, D)

    def resized(self, images: Tensor) -> Tensor:
        """(B, T, 3, h, w) uint8 -> (B, T, 3, p, p) float in [0, 1]."""
        side, (h, w) = self.config.pixels, images.shape[-2:]
        x = images.to(self.mean.dtype) / 255
        if (h, w) != (side, side):
            x = F.interpolate(x.flatten(0, 1), (side, side), mode="bilinear", antialias=True)
            x = x.unflatten(0, images.shape[:2])
        return x

    def grid(self, images: Tensor) -> Tensor:
        """(N, 3, p, p) normalised -> the backbone's tokens (N, V, W), class and register tokens dropped."""
        x = self.backbone.forward_features(images)
        if x.ndim == 3:
            return x[:, self.prefix_tokens :]
        return x.flatten(1, 2) if self.channels_last else x.flatten(2).transpose(1, 2)
