"""Image augmentation on the training device: brightness, contrast, a shift by whole pixels.

What is random is drawn apart from its use, for a whole batch at once, so that a batch which is handled
in parts, or by several processes, is changed as it would be in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vla.config import DataConfig


@dataclass(frozen=True)
class Augmentation:
    """One change for each of B samples with I images; calling it applies them, sample after sample.

    moves: (2, B, I) int64, from which pixel of the padded image it begins, down and right;
    light: (2, B, I) in [-1, 1], of the ranges of brightness and contrast. None: unchanged.
    """

    moves: Tensor | None
    light: Tensor | None
    config: DataConfig

    @classmethod
    def draw(
        cls,
        samples: int,
        images: int,
        config: DataConfig,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Augmentation:
        """From torch's generator of the device when none is given."""
        shape, moves, light = (2, samples, images), None, None
        if config.shift > 0:
            moves = torch.randint(2 * config.shift + 1, shape, device=device, generator=generator)
        if config.brightness > 0 or config.contrast > 0:
            light = 2 * torch.rand(shape, device=device, generator=generator) - 1
        return cls(moves, light, config)

    def __getitem__(self, part: slice) -> Augmentation:
        """Of some of the samples."""
        moves, light = (x if x is None else x[:, part] for x in (self.moves, self.light))
        return Augmentation(moves, light, self.config)

    def __call__(self, images: Tensor) -> Tensor:
        """images (B * I, 3, h, w) float in [0, 1] -> the same shape and range."""
        if self.moves is not None:
            images = shift(images, self.moves.flatten(1), self.config.shift)
        if self.light is not None:
            brightness, contrast = self.light.flatten(1).to(images.dtype)
            images = relight(
                images, 1 + self.config.brightness * brightness, 1 + self.config.contrast * contrast
            )
        return images


def augment(images: Tensor, config: DataConfig) -> Tensor:
    """images (N, 3, h, w) float in [0, 1] -> the same shape and range, each image drawn anew."""
    return Augmentation.draw(len(images), 1, config, images.device)(images)


def shift(images: Tensor, moves: Tensor, pixels: int) -> Tensor:
    """Cut (N, 3, h, w) out of the images with `pixels` more at every edge, which is repeated.

    moves: (2, N) int64 in 0 … 2 * pixels, where the cut begins; `pixels` leaves an image in its place.
    """
    n, _, h, w = images.shape
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # a view: (N, 3, 2p + 1, 2p + 1, h, w)
    return windows[torch.arange(n, device=images.device), :, moves[0], moves[1]]


def relight(images: Tensor, bright: Tensor, contrasted: Tensor) -> Tensor:
    """Multiply each image (N, 3, h, w) by `bright` (N,), and its distance from its mean by `contrasted` (N,)."""
    bright, contrasted = bright[:, None, None, None], contrasted[:, None, None, None]  # (N, 1, 1, 1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    # bright * (mean + contrasted * (x - mean)), in one pass over the pixels
    return torch.addcmul(bright * mean * (1 - contrasted), images, bright * contrasted).clamp_(0, 1)
