"""The networks as functions of plain tensors, and what torch.export makes of them.

    B batch            T n_obs_steps      C cameras      L text tokens, W their width
    H chunk_size       A action_dim       P state_dim    h, w the cameras' own sizes

B and L stay free. The policy is traced in torch.export's strict mode, from its byte code: otherwise
len(tensor), of which the network has several, would fix B to the example's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vla.model.vla import VLA
from vla.observation import Observation, Tokens

CAMERA = "images."  # before a camera's name, as the graph's input
BATCH = 1024  # at most


class PolicyGraph(nn.Module):
    """VLA.predict_chunk from tensors. absent (B, C) is an input of policies trained with camera_dropout only."""

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model, self.cameras = model, sorted(model.features.cameras)

    def forward(
        self, images: Sequence[Tensor], state: Tensor, text: Tensor, text_pad: Tensor,
        prefix: Tensor, prefix_length: Tensor, absent: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """images: (B, T, h, w, 3) uint8 each, by name; state: (B, T, P); text: (B, L, W) with padding
        (B, L); prefix: (B, H, A) robot units; prefix_length: (B,) int64 -> (B, H, A) robot units.
        """
        cameras = {name: x.permute(0, 1, 4, 2, 3) for name, x in zip(self.cameras, images, strict=True)}
        observation = Observation(cameras, state, Tokens(text, text_pad), absent)
        return self.model.predict_chunk(observation, prefix, prefix_length)


class TextGraph(nn.Module):
    """TextTokens.encode for one instruction: ids (1, L) int64, pad (1, L) -> features (1, L, W)."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, pad: Tensor) -> Tensor:
        return self.encoder(input_ids=ids, attention_mask=(~pad).long()).last_hidden_state


def input_names(model: VLA) -> list[str]:
    """The policy graph's inputs in order; `absent` where training dropped cameras."""
    images = [CAMERA + name for name in sorted(model.features.cameras)]
    absent = ["absent"] if model.config.camera_dropout else []
    return [*images, "state", "text", "text_pad", "prefix", "prefix_length", *absent]


def trace_policy(model: VLA) -> ExportedProgram:
    """The policy as a graph whose B and L are free. Raises whatever torch.export does."""
    config, features, b, words = model.config, model.features, 3, 16
    names, steps, device = sorted(features.cameras), config.n_obs_steps, torch.device("cpu")
    example: list[Any] = [
        [torch.zeros(b, steps, *features.cameras[name], 3, dtype=torch.uint8) for name in names],
        torch.zeros(b, steps, features.state_dim),
        torch.zeros(b, words, model.text.width),
        torch.zeros(b, words, dtype=torch.bool),
        torch.zeros(b, config.chunk_size, features.action_dim),
        torch.zeros(b, dtype=torch.int64),
    ]
    batch, length = Dim("batch", min=1, max=BATCH), Dim("words", min=1, max=config.text.max_tokens)
    free: list[Any] = [
        [{0: batch}] * len(names), {0: batch}, {0: batch, 1: length}, {0: batch, 1: length},
        {0: batch}, {0: batch},
    ]  # fmt: skip
    if config.camera_dropout:
        example.append(torch.zeros(b, len(names), dtype=torch.bool, device=device))
        free.append({0: batch})
    return trace(PolicyGraph(model), tuple(example), tuple(free), strict=True)


def trace_text(model: VLA) -> ExportedProgram:
    """The text encoder for one instruction of any length."""
    words = min(16, model.config.text.max_tokens)
    pad = torch.zeros(1, words, dtype=torch.bool)
    pad[0, words - words // 4 :] = True
    length = Dim("words", min=1, max=model.config.text.max_tokens)
    example = (torch.zeros(1, words, dtype=torch.int64), pad)
    return trace(TextGraph(model.text.encoder), example, ({1: length}, {1: length}), strict=False)


def trace(graph: nn.Module, example: tuple, free: tuple, strict: bool) -> ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own deprecations
        return torch.export.export(graph.eval(), example, dynamic_shapes=free, strict=strict)
