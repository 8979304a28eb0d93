"""Resampler: each image's tokens, read by a fixed number of learned queries that replace them.

    B batch   I images (steps times cameras)   V tokens of an image   N queries   D d_model

The Perceiver resampler (Jaegle et al. 2021, "Perceiver"; Alayrac et al. 2022, "Flamingo", section
3.1). What departs from it: the instruction shifts the queries, so that they can ask for what it
names; they read the image only, not themselves too; and every image is read on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla.architecture import ModelConfig
from vla.checks import require
from vla.model.attention import MultiHeadAttention
from vla.model.transformer import FEED_FORWARDS, PreNorm


class AllTokens(nn.Module):
    """The image tokens as they are. patches: how many an image has."""

    def __init__(self, config: ModelConfig, text_width: int, patches: int) -> None:
        super().__init__()
        self.count = patches
        self.layers = nn.ModuleList()

    def forward(self, images: Tensor, instruction: Tensor) -> Tensor:
        return images


class ResamplerLayer(nn.Module):
    """Cross-attention of the queries to one image, feed-forward; pre-norm whatever the trunk's norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config.d_model, config.n_heads, config.dropout)
        self.feed_forward = FEED_FORWARDS[config.activation](config.d_model, config.d_ff, config.dropout)
        self.around_attention = PreNorm(config.d_model, config.dropout)
        self.around_feed_forward = PreNorm(config.d_model, config.dropout)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """queries: (B * I, N, D), image: (B * I, V, D) -> (B * I, N, D)."""
        x = self.around_attention(queries, lambda x: self.attention(x, image))
        return self.around_feed_forward(x, self.feed_forward)


class Resampler(nn.Module):
    """N queries, shifted by the instruction, through layers that read one image each.

    patches: V. Raises ConfigError when more tokens are asked for than the image has.
    """

    def __init__(self, config: ModelConfig, text_width: int, patches: int) -> None:
        super().__init__()
        self.count, side = config.image.resampler.tokens, config.image.pixels
        require(
            self.count <= patches, "model.image.resampler.tokens", self.count,
            f"at most the {patches} tokens that {config.image.backbone} makes of a {side} px image",
            "take fewer, or larger images",
        )  # fmt: skip
        self.queries = nn.Parameter(torch.empty(self.count, config.d_model))
        self.instruction = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, config.d_model))
        self.image_norm = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.image.resampler.layers))
        self.norm = PreNorm.final(config.d_model)

    def forward(self, images: Tensor, instruction: Tensor) -> Tensor:
        """images: (B, I, V, D), instruction: (B, text width), its mean features -> (B, I, N, D)."""
        shift = self.instruction(instruction)[:, None, None]  # (B, 1, 1, D)
        x = (self.queries + shift).expand(-1, images.shape[1], -1, -1).flatten(0, 1)  # (B * I, N, D)
        memory = self.image_norm(images).flatten(0, 1)  # (B * I, V, D)
        for layer in self.layers:
            x = layer(x, memory)
        return self.norm(x).unflatten(0, images.shape[:2])  # (B, I, N, D)


# Whether an image is resampled -> how its tokens go on.
RESAMPLERS: dict[bool, type[AllTokens] | type[Resampler]] = {False: AllTokens, True: Resampler}
