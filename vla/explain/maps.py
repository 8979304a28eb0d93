"""Attention maps of a decision, taken beside the fused kernel that makes it.

    B batch   n heads   H action tokens   S memory length   d head width

`recording` listens where queries and keys already lie by heads, MultiHeadAttention.attend, so that
one pass over the chunk and cached decoding step by step are seen alike, and what the network
computes is left as it is. Action t of an autoregressive network asks after having read the actions
before it, so its maps are those of the chunk that was really predicted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vla.model.attention import MultiHeadAttention, keep_mask
from vla.model.vla import VLA


@dataclass
class Maps:
    """Where every action token looks in the memory; rows over S sum to 1, padded tokens get 0.

    cross: (B, layers, n, H, S), the decoder's attention to the memory. encoder: (B, layers, S, S),
    its self-attention averaged over heads, or None where the encoder does not make such maps.
    resampler: (B, images, queries, patches), from each image's queries to its patches, or None.
    """

    cross: Tensor
    encoder: Tensor | None = None
    resampler: Tensor | None = None

    @property
    def average(self) -> Tensor:
        """Mean over the decoder's layers and heads, (B, H, S)."""
        return self.cross.mean(dim=(1, 2))

    @property
    def heads(self) -> dict[str, Tensor]:
        """Every map of its own, (B, H, S), named as people count."""
        layers, heads = self.cross.shape[1:3]
        return {
            f"layer {layer + 1} head {head + 1}": self.cross[:, layer, head]
            for layer in range(layers)
            for head in range(heads)
        }

    @property
    def rollout(self) -> Tensor:
        """`average`, traced back through the encoder to its input tokens, (B, H, S).

        Abnar & Zuidema 2020, "Quantifying attention flow in transformers": each encoder layer counts
        as (A + I) / 2, the half being its residual connection, and the layers are multiplied.
        Raises ValueError when the encoder's attention is not a full map over the memory.
        """
        if self.encoder is None:
            raise ValueError(
                "There is no attention rollout for this network. got: an encoder whose attention is not one map "
                "over the whole sequence. expected: model.attention.kind=full and model.fusion=concat. remedy: look "
                "at the decoder's maps, which every network has, or train with those."
            )
        return self.average @ rolled(self.encoder)


def rolled(layers: Tensor) -> Tensor:
    """Self-attention maps (B, layers, S, S), first layer first -> their rollout (B, S, S)."""
    eye = torch.eye(layers.shape[-1], dtype=layers.dtype, device=layers.device)
    flow = eye.expand(len(layers), -1, -1)
    for layer in layers.unbind(1):
        flow = (0.5 * (layer + eye)) @ flow
    return flow


@dataclass
class Recording:
    """What the attention modules were asked, in the order of the calls: (B, n, Q, S) on the CPU each."""

    calls: dict[MultiHeadAttention, list[Tensor]] = field(default_factory=dict)
    cross: list[MultiHeadAttention] = field(default_factory=list)
    encoder: list[MultiHeadAttention] = field(default_factory=list)
    resampler: list[MultiHeadAttention] = field(default_factory=list)
    chunk_size: int = 0

    def maps(self) -> Maps:
        """The maps of the one chunk that was predicted.

        Raises ValueError when there was none, or more than one.
        """
        asked = [torch.cat(self.calls[module], dim=2) for module in self.cross if self.calls[module]]
        got = asked[0].shape[2] if asked else 0
        if got != self.chunk_size:
            raise ValueError(
                f"The maps are not those of one chunk. got: {got} action tokens. expected: {self.chunk_size}. "
                "remedy: predict exactly one chunk while recording."
            )
        cross = torch.stack(asked, dim=1)  # (B, layers, n, H, S)
        encoder = [self.calls[module][0].mean(dim=1) for module in self.encoder]  # (B, S, S) each
        resampler = None
        if self.resampler:  # the last layer's, of all images
            weights = self.calls[self.resampler[-1]][0].mean(dim=1)  # (B * images, queries, patches)
            resampler = weights.unflatten(0, (len(cross), -1))
        return Maps(cross, torch.stack(encoder, dim=1) if encoder else None, resampler)


def layers_of(stack: Any) -> list[Any]:
    """The layers of a stack, whose attention modules torch gives no types."""
    return list(stack.layers)


@contextlib.contextmanager
def recording(model: VLA) -> Iterator[Recording]:
    """Record the attention of everything that the network predicts inside the `with`."""
    record = Recording(chunk_size=model.config.chunk_size)
    decoder, encoder, resampler = model.decoder, model.encoder, model.tokens.image.resampler
    record.cross = [layer.cross_attention for layer in layers_of(decoder)]
    if model.config.attention.kind == "full" and model.config.fusion == "concat":
        record.encoder = [layer.attention for layer in layers_of(encoder)]
    record.resampler = [layer.attention for layer in layers_of(resampler)]
    for module in (*record.cross, *record.encoder, *record.resampler):
        record.calls[module] = []
        module.attend = listening(module.attend, record.calls[module])  # on the instance: hides the class's
    try:
        yield record
    finally:
        for module in record.calls:
            del module.attend


def listening(attend: Callable[..., Tensor], calls: list[Tensor]) -> Callable[..., Tensor]:
    """`attend`, which also notes its weights."""

    def wrapped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, causal: bool) -> Tensor:
        calls.append(weights(q, k, pad, causal).cpu())
        return attend(q, k, v, pad, causal)

    return wrapped


@torch.no_grad()
def weights(q: Tensor, k: Tensor, pad: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(Q Kᵀ / √d) by heads: q (B, n, Q, d), k (B, n, S, d) -> (B, n, Q, S) float32."""
    with torch.autocast(q.device.type, enabled=False):
        scores = q.float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5  # (B, n, Q, S)
        none = torch.zeros(len(k), k.shape[2], dtype=torch.bool, device=k.device)
        keep = keep_mask(none if pad is None else pad, q.shape[2], causal)
        assert keep is not None
        return scores.masked_fill(~keep, -torch.inf).softmax(dim=-1)
