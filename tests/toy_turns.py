"""The toy with three tasks in turns, which tells where its things are. Its id is `toy_turns:Turns-v0`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from toy_env import COLOURS, ToyEnv


class TurnsEnv(ToyEnv):
    """Task `seed % n_tasks`: the colour to go to."""

    n_tasks = len(COLOURS)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        assert seed is not None
        return super().reset(seed=seed, options={"task": f"reach {sorted(COLOURS)[seed % self.n_tasks]}"})

    def environment_state(self) -> np.ndarray:
        """(6,) float32: the targets by colour."""
        return np.concatenate([self.targets[colour] for colour in sorted(COLOURS)]).astype(np.float32)


if "Turns-v0" not in gym.registry:
    gym.register("Turns-v0", entry_point=TurnsEnv, max_episode_steps=30)
