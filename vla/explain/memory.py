"""Where each token of the memory comes from: image patches, words, state.

    T n_obs_steps   C cameras   V tokens per image   L text tokens   S = T C V + L + T

Images come first, by time, then camera in alphabetical order, then patch by patch in rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vla.explain.maps import Maps
from vla.model.vla import VLA


@dataclass(frozen=True)
class Memory:
    """The sections of one instruction's memory. words: its text tokens, without padding."""

    steps: int
    cameras: tuple[str, ...]
    tokens: int  # per image
    words: tuple[str, ...]

    @classmethod
    def of(cls, model: VLA, instruction: str) -> Memory:
        """The memory that the network makes of an instruction."""
        image = model.tokens.image
        return cls(model.config.n_obs_steps, tuple(image.cameras), image.count, words_of(model, instruction))

    @property
    def images(self) -> int:
        """Tokens of all images together."""
        return self.steps * len(self.cameras) * self.tokens

    def of_images(self, weights: Tensor) -> Tensor:
        """(..., S) -> (..., T, C, V)."""
        return weights[..., : self.images].unflatten(-1, (self.steps, len(self.cameras), self.tokens))

    def of_words(self, weights: Tensor) -> Tensor:
        """(..., S) -> (..., number of words)."""
        return weights[..., self.images : self.images + len(self.words)]

    def of_state(self, weights: Tensor) -> Tensor:
        """(..., S) -> (..., T)."""
        return weights[..., weights.shape[-1] - self.steps :]

    def patches(self, weights: Tensor, maps: Maps) -> Tensor:
        """(B, ..., S) -> (B, ..., T, C, side, side), oldest first, on the backbone's grid of patches.

        Where a resampler stands between patches and memory, each query's weight is handed on to the
        patches as its own last attention distributes it. Raises ValueError when there is no square grid.
        """
        x = self.of_images(weights)  # (B, ..., T, C, V)
        if maps.resampler is not None:
            read = maps.resampler.unflatten(1, (self.steps, len(self.cameras)))  # (B, T, C, V, patches)
            x = torch.einsum("b...tcv,btcvp->b...tcp", x, read)
        side = math.isqrt(x.shape[-1])
        if side * side != x.shape[-1]:
            raise ValueError(
                f"These image tokens lie on no square grid. got: {x.shape[-1]} tokens per image. expected: the "
                "square of a whole number. remedy: look at Memory.of_images, or choose a backbone with a grid."
            )
        return x.unflatten(-1, (side, side))


def words_of(model: VLA, instruction: str) -> tuple[str, ...]:
    """The instruction's text tokens as one can read them, special tokens included."""
    text = model.text.tokenize([instruction])
    ids = text.x[0][~text.pad[0]].tolist()
    return tuple(model.text.tokenizer.decode([i]).strip() or "(space)" for i in ids)
