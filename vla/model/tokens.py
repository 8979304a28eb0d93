"""From an observation to one multimodal sequence, [image; text; state].

    B batch   T n_obs_steps   V image tokens   L text tokens   P state_dim   D d_model
    S = V + L + T, the memory length

A further modality is one more class that returns tokens, and one more row of embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla.architecture import ModelConfig
from vla.data.normalize import MixedStatistics, Normalizer, Statistics
from vla.model.image import Augment, ImageTokens
from vla.model.positions import STEPS
from vla.observation import STATE, Features, Observation, Tokens


class StateTokens(nn.Module):
    """Proprioception, normalised, through an MLP: one token per observation step."""

    def __init__(self, config: ModelConfig, state_dim: int, statistics: Statistics | MixedStatistics) -> None:
        super().__init__()
        self.normalizer = Normalizer(statistics[STATE], config.normalization)
        self.up = nn.Linear(state_dim, config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)
        steps = config.n_obs_steps
        self.time = STEPS[steps > 1](steps, config.d_model)

    def forward(self, state: Tensor, source: Tensor | None = None) -> Tensor:
        """(B, T, P) in robot units -> (B, T, D). source: see Observation."""
        return self.time(self.out(nn.functional.gelu(self.up(self.normalizer.normalize(state, source)))))


class MultimodalTokens(nn.Module):
    """The concatenated sequence; a learned vector tells each modality from the others."""

    def __init__(
        self,
        config: ModelConfig,
        features: Features,
        statistics: Statistics | MixedStatistics,
        text_width: int,
        pretrained: bool,
    ) -> None:
        super().__init__()
        self.image = ImageTokens(config, sorted(features.cameras), text_width, pretrained)
        self.words = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, config.d_model))
        self.state = StateTokens(config, features.state_dim, statistics)
        self.modality = nn.Parameter(torch.empty(3, config.d_model))

    def forward(self, observation: Observation, augment: Augment | None = None) -> Tokens:
        """-> (B, S, D) with its padding: that of the text, and the tokens of cameras that show nothing."""
        image = self.image(observation.images, observation.text, augment)  # (B, V, D)
        text = self.words(observation.text.x)  # (B, L, D)
        state = self.state(observation.state, observation.source)  # (B, T, D)
        parts = [part + self.modality[i] for i, part in enumerate((image, text, state))]
        pads = [self.unseen(image, observation.absent), observation.text.pad, no_pad(state)]
        return Tokens(torch.cat(parts, dim=1), torch.cat(pads, dim=1))

    def unseen(self, image: Tensor, absent: Tensor | None) -> Tensor:
        """The padding (B, V) of image tokens, whose order is time, camera, place."""
        if absent is None:
            return no_pad(image)
        places = no_pad(image).unflatten(1, (-1, absent.shape[1], self.image.count))  # (B, T, C, ·)
        return (places | absent[:, None, :, None]).flatten(1)


def no_pad(x: Tensor) -> Tensor:
    """(B, S, D) -> (B, S) bool, all False."""
    return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
