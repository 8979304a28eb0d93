"""Decoding: from the memory to a chunk of actions, all at once or each from the ones before it.

    B batch   H chunk_size   A action_dim   D d_model   S memory length

Both can continue actions that are committed to the robot (a prefix): `parallel` carries them in the first
action tokens, `autoregressive` reads them like its own. Actions are normalised here. All shapes are
static, so that either can be compiled, captured in a CUDA graph and exported; the H steps of the
autoregressive one are unrolled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla.architecture import ModelConfig
from vla.data.normalize import Normalizer
from vla.model.heads import Head
from vla.model.positions import POSITIONS
from vla.model.transformer import Decoder
from vla.observation import Tokens


class Parallel(nn.Module):
    """H open tokens, of which the first ones may carry committed actions; one pass gives all actions.

    drawn_prefix: how many at most, at random, in training; longest_prefix: how many it can then continue.
    """

    def __init__(self, config: ModelConfig, normalizer: Normalizer) -> None:
        super().__init__()
        self.drawn_prefix = self.longest_prefix = config.max_prefix
        self.open = nn.Parameter(torch.empty(config.d_model))
        self.committed = nn.Linear(normalizer.size, config.d_model)
        self.committed.requires_grad_(config.max_prefix > 0)
        self.positions = POSITIONS[config.positions](config.chunk_size, config.d_model)

    def forward(self, actions: Tensor, committed: Tensor) -> Tensor:
        """The decoder's input (B, H, D). actions: (B, H, A), read where committed (B, H) is True."""
        x = torch.where(committed[..., None], self.committed(actions), self.open)
        return x + self.positions(actions.shape[1])

    def generate(
        self,
        decoder: Decoder,
        head: Head,
        memory: Tokens,
        actions: Tensor,
        committed: Tensor,
        sample: bool = False,
    ) -> Tensor:
        """The chunk (B, H, A), float32. actions: (B, H, A), of which the committed ones are followed."""
        return head.decode(decoder(self(actions, committed), memory), sample, (actions, committed))


class Autoregressive(nn.Module):
    """Action token t carries action t - 1, token 0 a start symbol; its output is action t.

    In training the actions are the demonstrated ones (teacher forcing), so that one causal pass learns
    all steps, and to continue a prefix of any length: none need be drawn.
    Feeding an action back invites copying it (README): compare with `parallel`.
    """

    drawn_prefix = 0

    def __init__(self, config: ModelConfig, normalizer: Normalizer) -> None:
        super().__init__()
        self.normalizer, self.longest_prefix = normalizer, config.chunk_size
        self.start = nn.Parameter(torch.empty(config.d_model))
        self.previous = nn.Linear(normalizer.size, config.d_model)
        self.positions = POSITIONS[config.positions](config.chunk_size, config.d_model)

    def forward(self, actions: Tensor, committed: Tensor) -> Tensor:
        """The decoder's input (B, H, D). actions: (B, H, A), of which the last is not read."""
        start = self.start.expand(len(actions), 1, -1)  # (B, 1, D)
        x = torch.cat([start, self.previous(actions[:, :-1]).to(start.dtype)], dim=1)  # (B, H, D)
        return x + self.positions(actions.shape[1])

    def generate(
        self,
        decoder: Decoder,
        head: Head,
        memory: Tokens,
        actions: Tensor,
        committed: Tensor,
        sample: bool = False,
    ) -> Tensor:
        """As `Parallel.generate`, step by step; keys and values of earlier steps are kept, not recomputed.

        What is fed back is what the robot will be told: inside the limits of the data.
        """
        length = actions.shape[1]
        positions, caches = self.positions(length), decoder.caches(memory, length)
        x = self.start.expand(len(actions), 1, -1)  # (B, 1, D)
        chunk = []
        for t in range(length):
            hidden = decoder.step(x + positions[t], t, caches, memory.pad)  # (B, 1, D)
            action = self.normalizer.clip_normalized(head.decode(hidden, sample))  # (B, 1, A)
            chunk.append(torch.where(committed[:, t, None, None], actions[:, t : t + 1], action))
            x = self.previous(chunk[-1])
        return torch.cat(chunk, dim=1)


DECODINGS: dict[str, type[Parallel] | type[Autoregressive]] = {
    "parallel": Parallel,
    "autoregressive": Autoregressive,
}
