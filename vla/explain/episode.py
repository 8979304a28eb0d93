"""One episode in closed loop, in which every look of the policy leaves its attention maps behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from vla.control.schedule import make_schedule
from vla.explain.maps import Maps, recording
from vla.explain.memory import Memory
from vla.observation import IMAGES, IS_SUCCESS, STATE, TASK
from vla.policy import Policy


@dataclass
class Look:
    """One observation, the chunk it led to, and where each of its actions looked.

    images: camera -> (T, h, w, 3) uint8, oldest first; chunk: (H, A) in robot units; maps: of B = 1.
    after: one {camera: (h, w, 3)} for each action that was executed before the next look.
    """

    step: int
    task: str
    images: dict[str, np.ndarray]
    chunk: np.ndarray
    maps: Maps
    memory: Memory
    after: list[dict[str, np.ndarray]] = field(default_factory=list)
    success: bool = False  # of the last of those actions

    def patches(self, weights: Tensor) -> np.ndarray:
        """(1, ..., S) -> (..., C, side, side): the share of all attention on the newest image's patches."""
        return self.memory.patches(weights, self.maps)[0, ..., -1, :, :, :].numpy()

    def shares(self, weights: Tensor) -> dict[str, np.ndarray]:
        """(1, ..., S) -> how much of the attention goes to all images, to all words and to the state, (...)."""
        parts = {
            "pictures": self.memory.of_images(weights).sum((-3, -2, -1)),
            "words": self.memory.of_words(weights).sum(-1),
            "state": self.memory.of_state(weights).sum(-1),
        }
        return {name: part[0].numpy() for name, part in parts.items()}


def look(policy: Policy, observations: deque[dict[str, Any]], task: str, step: int) -> Look:
    """Predict a chunk from the newest observations (T of them), and record its attention."""
    cameras = sorted(policy.features.cameras)
    images = {name: np.stack([o[IMAGES + name] for o in observations]) for name in cameras}
    state = np.stack([o[STATE] for o in observations])
    with recording(policy.model) as record:
        chunk = policy.predict_chunk({n: i[None] for n, i in images.items()}, state[None], [task])[0]
    return Look(step, task, images, chunk, record.maps(), Memory.of(policy.model, task))


def play(policy: Policy, env: Any, seed: int, task: str | None = None) -> Iterator[Look]:
    """Play one episode as the checkpoint's own schedule plays it; yields every look before it is acted on.

    While a look is out, the environment still is in the state that was looked at. task: an instruction
    for the scene instead of its own.
    """
    schedule = make_schedule(policy.job.evaluate, policy.chunk_size)
    schedule.reset()
    observation, info = env.reset(seed=seed, options={} if task is None else {"task": task})
    observations = deque([observation] * policy.n_obs_steps, maxlen=policy.n_obs_steps)
    low, high = env.action_space.low, env.action_space.high
    step, over = 0, False
    while not over:
        seen = look(policy, observations, str(info[TASK]), step)
        yield seen
        for action in schedule.plan(seen.chunk):
            observation, _, terminated, truncated, info = env.step(np.clip(action, low, high))
            observations.append(observation)
            seen.after.append({name: observation[IMAGES + name] for name in seen.images})
            seen.success = bool(info[IS_SUCCESS])
            step += 1
            over = seen.success or bool(terminated) or bool(truncated)
            if over:
                break
