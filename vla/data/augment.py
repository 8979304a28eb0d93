"""Image augmentation on the training device: brightness, contrast, a shift by whole pixels.

Random numbers come from torch's global generator of the device, so that a captured CUDA
graph draws new ones at every replay and a resumed run continues the same sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vla.config import DataConfig


def augment(images: Tensor, config: DataConfig) -> Tensor:
    """images (N, 3, h, w) float in [0, 1] -> the same shape and range, each image drawn anew."""
    if config.shift > 0:
        images = shift(images, config.shift)
    if config.brightness > 0 or config.contrast > 0:
        images = relight(images, config.brightness, config.contrast)
    return images


def shift(images: Tensor, pixels: int) -> Tensor:
    """Move every image by whole pixels in [-pixels, pixels]; the edge is repeated."""
    n, _, h, w = images.shape
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # a view: (N, 3, 2p + 1, 2p + 1, h, w)
    dy, dx = torch.randint(2 * pixels + 1, (2, n), device=images.device)
    return windows[torch.arange(n, device=images.device), :, dy, dx]


def relight(images: Tensor, brightness: float, contrast: float) -> Tensor:
    """Scale each image by a factor in [1 - b, 1 + b], and its distance from its mean likewise."""
    noise = 2 * torch.rand(2, len(images), 1, 1, 1, dtype=images.dtype, device=images.device) - 1
    bright, contrasted = 1 + brightness * noise[0], 1 + contrast * noise[1]
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    # bright * (mean + contrasted * (x - mean)), in one pass over the pixels
    return torch.addcmul(bright * mean * (1 - contrasted), images, bright * contrasted).clamp_(0, 1)
