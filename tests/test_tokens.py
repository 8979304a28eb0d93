"""State tokens: normalised, one per observation step."""

from __future__ import annotations

import numpy as np
import torch

from vla.config import ModelConfig
from vla.data.normalize import Statistics
from vla.model.parameters import initialise_network
from vla.model.tokens import StateTokens

D = 128


def test_state_tokens_are_normalised_one_per_step() -> None:
    rows = np.random.default_rng(0).normal(5, 3, (1000, 4))
    statistics = Statistics.of({"observation.state": rows})
    state = StateTokens(ModelConfig(size="tiny", n_obs_steps=3), 4, statistics)
    initialise_network(state)
    x = torch.tensor(rows[:6], dtype=torch.float32).view(2, 3, 4)
    assert state(x).shape == (2, 3, D)
    unit = StateTokens(
        ModelConfig(size="tiny", n_obs_steps=3), 4, Statistics.of({"observation.state": (rows - 5) / 3})
    )
    unit.load_state_dict(state.state_dict())
    torch.testing.assert_close(state(x), unit((x - 5) / 3), atol=1e-5, rtol=1e-5)
