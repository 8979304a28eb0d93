"""Backbones of timm: one from scratch at the model's size, or any by name.

    N images   p pixels   V tokens per image   W backbone width   D d_model

`scratch` is timm's VisionTransformer without class token, with a convolutional stem instead of
the linear patch projection: strided 3x3 convolutions let a small ViT localise without pretraining
(Xiao et al. 2021, "Early convolutions help transformers see better"). Theirs has BatchNorm, ours
GroupNorm, which has no running statistics to go wrong under a captured CUDA graph.
timm is imported when a backbone is built: that takes six seconds.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vla.architecture import ImageConfig, ModelConfig
from vla.checks import ConfigError, require
from vla.model.positions import SinusoidalPositions


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


def scratch(config: ModelConfig, pretrained: bool) -> nn.Module:
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
    models = timm.list_models()
    known = [*models, *timm.list_models(pretrained=True)]  # the second ones carry the tag of their weights
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) if name not in known else []
    require(
        name in known, "model.image.backbone", name,
        "'scratch' or a timm model, such as " + ", ".join(close or models[:3]), "see timm.list_models()",
    )  # fmt: skip
    try:
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=pixels)
        except TypeError:  # convolutional networks take any size and no such argument
            return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:
        if not pretrained:
            raise unfit(config.image, error) from error
        raise ConfigError(
            "model.image.pretrained",
            True,
            f"weights of {name} in timm's cache or on a reachable hub ({error})",
            "connect to the hub once, copy its cache (HF_HOME) here, or set model.image.pretrained=false",
        ) from error


# Whether the configuration names a backbone -> who builds it.
BACKBONES: dict[bool, Callable[[ModelConfig, bool], nn.Module]] = {False: scratch, True: named}


def unfit(config: ImageConfig, error: Exception) -> ConfigError:
    return ConfigError(
        "model.image.pixels",
        config.pixels,
        f"a side that {config.backbone} takes ({error})",
        "choose another side",
    )


def sequence(backbone: Any, features: Tensor) -> Tensor:
    """What forward_features gives, (N, tokens, W), (N, W, h, w) or (N, h, w, W) -> (N, tokens, W)."""
    if features.ndim == 3:
        return features
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        return features.flatten(1, 2)
    return features.flatten(2).transpose(1, 2)


@torch.no_grad()
def measure(backbone: Any, config: ImageConfig) -> tuple[int, int]:
    """How many tokens of an image come before its patches, and how many patches it has.

    Most transformers of timm say how many class and register tokens they put first; of the others
    (CaiT, XCiT, TNT) it is what is left over a square, as images are square. Raises ConfigError
    when the backbone takes no such images or gives no square grid.
    """
    training = backbone.training
    try:
        features = backbone.eval().forward_features(torch.zeros(1, 3, config.pixels, config.pixels))
    except Exception as error:
        raise unfit(config, error) from error
    backbone.train(training)
    one = isinstance(features, Tensor) and features.ndim in (3, 4)
    tokens = sequence(backbone, features).shape[1] if one else 0
    leading = getattr(backbone, "num_prefix_tokens", None)
    leading = tokens - math.isqrt(tokens) ** 2 if leading is None else leading
    side = math.isqrt(max(0, tokens - leading))
    require(
        tokens - leading == side**2 > 0, "model.image.backbone", config.backbone,
        "a timm model that makes one square grid of tokens", "take a ViT, a Swin or a convolutional network",
    )  # fmt: skip
    return leading, side**2


class GridPositions(nn.Module):
    """Sinusoids of row and column, half the width each (Carion et al. 2020, DETR), added to the tokens.

    For backbones without an embedding of position (Swin, convolutional networks): attention behind
    them could not tell where in the image a token lies.
    """

    table: Tensor

    def __init__(self, patches: int, d_model: int) -> None:
        super().__init__()
        side, half = math.isqrt(patches), d_model // 2
        rows = SinusoidalPositions(side, half).table[:, None].expand(-1, side, -1)  # (side, side, D / 2)
        columns = SinusoidalPositions(side, d_model - half).table[None].expand(side, -1, -1)
        table = torch.cat([rows, columns], dim=2).flatten(0, 1)  # (V, D)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., V, D) -> the same."""
        return x + self.table


class Placed(nn.Module):
    """For tokens that carry their position already."""

    def __init__(self, patches: int, d_model: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


# Whether a backbone embeds positions itself -> what the tokens get.
PLACES: dict[bool, type[GridPositions] | type[Placed]] = {False: GridPositions, True: Placed}
