"""Fusion: how images, words and state become the memory. Both take and give the one sequence.

    B batch   V image tokens   L text tokens   T state tokens   D d_model   S = V + L + T

`concat`: the encoder over the concatenated sequence (transformer.py's Encoder).
`cross`: image and state tokens ask, words answer, as in the cross-modality layers of LXMERT (Tan and
Bansal 2019), in one direction. The words reach the memory as the text encoder made them, so that the
decoder and the attention maps find the same sequence in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vla.model.transformer import DecoderLayer, Encoder, Stack
from vla.observation import Tokens


class CrossEncoder(Stack):
    """Image and state tokens attend to themselves, then to the words. `options`: see Stack, DecoderLayer."""

    def __init__(self, n_layers: int, d_model: int, n_image: int, n_state: int, **options: Any) -> None:
        super().__init__(DecoderLayer, n_layers, d_model, causal=False, **options)
        self.n_image, self.n_state = n_image, n_state

    def forward(self, tokens: Tokens) -> Tokens:
        """(B, S, D) with padding -> the same."""
        sizes = [self.n_image, tokens.x.shape[1] - self.n_image - self.n_state, self.n_state]
        image, words, state = tokens.x.split(sizes, dim=1)  # (B, V, D), (B, L, D), (B, T, D)
        pads = tokens.pad.split(sizes, dim=1)
        x, pad = torch.cat([image, state], dim=1), torch.cat([pads[0], pads[2]], dim=1)  # (B, V + T, ·)
        for layer in self.layers:
            x = self.run(layer, x, Tokens(words, pads[1]), pad)
        image, state = x.split([self.n_image, self.n_state], dim=1)
        return Tokens(self.norm(torch.cat([image, words, state], dim=1)), tokens.pad)


FUSIONS: dict[str, Callable[..., nn.Module]] = {
    "concat": lambda *sizes, n_image, n_state, **options: Encoder(*sizes, **options),
    "cross": CrossEncoder,
}
