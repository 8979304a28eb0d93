"""One of Meta-World's simulations as it should be used: seeded, seen by its expert, nothing of the scene before.

Metaworld (metaworld.py) and MetaworldRobot (metaworld_robot.py) play it. What it takes care of:

- `reset(seed=)` does not seed; `seed` does, where scenes are neither frozen nor drawn from numpy's global state.
- A goal is hidden from observations unless asked for; the experts need it.
- After a reset, bodies and sites that the task has moved are still drawn, and partly observed, where they were.
- It warns of its own gains, and raises after 500 steps.
"""

from __future__ import annotations

import warnings
from typing import Any

import mujoco
import numpy as np

OBJECTS = (slice(4, 7), slice(11, 14))  # positions of the first and the second thing in an observation


class MetaworldScene:
    """A task's simulation and its scripted expert. Loading one takes 0.2 to 0.5 s and 100 MB.

    env: Meta-World's environment; observation: (39,) float64, what its expert sees; success: of the last step.
    """

    def __init__(self, task: str) -> None:
        """Raises ValueError for a task that there is not, ModuleNotFoundError without Meta-World."""
        with warnings.catch_warnings():  # deprecated ways of its dependencies
            warnings.simplefilter("ignore")
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP

            if task not in ALL_V3_ENVIRONMENTS:
                some = ", ".join(sorted(ALL_V3_ENVIRONMENTS)[:5])
                raise ValueError(f"task: got {task!r}, expected one of {some}, … remedy: correct task.")
            self.env: Any = ALL_V3_ENVIRONMENTS[task]()
            self.expert = ENV_POLICY_MAP[task]()
        self.task = task
        self.env._set_task_called, self.env._partially_observable = True, False  # the expert sees the goal
        del self.env.sawyer_observation_space  # it was made for one that does not
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True
        self.success = False

    @property
    def model(self) -> mujoco.MjModel:
        return self.env.model

    @property
    def data(self) -> mujoco.MjData:
        return self.env.data

    def reset(self, seed: int) -> None:
        """A scene that the seed alone decides."""
        self.env.seed(seed)
        self.env.reset()
        # Poses and sites first, then what the expert sees: after a reset they are those of the scene before. The
        # solver's start stays as it was, so that the motion is Meta-World's own to the last bit.
        start = self.data.qacc_warmstart.copy()
        mujoco.mj_forward(self.model, self.data)
        self.data.qacc_warmstart[:] = start
        self.env._prev_obs = self.env._get_curr_obs_combined_no_goal()
        self.observation, self.success = self.env._get_obs(), False

    def step(self, action: np.ndarray) -> None:
        """One frame of 12.5 ms. action: (4,), finite; all four are clipped."""
        self.env.curr_path_length = 0  # it would raise after 500
        self.observation, _, _, _, info = self.env.step(np.clip(action, -1.0, 1.0))
        self.success = bool(info["success"])

    def expert_action(self) -> np.ndarray:
        """(4,) float32 in [-1, 1]: what the expert would do now; it asks for up to 25. Privileged."""
        with warnings.catch_warnings():  # it says that its gains may be too high
            warnings.simplefilter("ignore")
            return np.clip(self.expert.get_action(self.observation), -1, 1).astype(np.float32)

    def things(self) -> np.ndarray:
        """(9,) float32 in metres: the first thing, the second (zeros where there is none), the goal. Privileged."""
        parts = [self.observation[part] for part in OBJECTS]
        return np.concatenate([*parts, self.env._target_pos]).astype(np.float32)
