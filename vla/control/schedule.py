"""How a predicted chunk becomes actions: when to ask the policy again, and what to execute until then.

One schedule serves one episode at a time. Every schedule has `replan_every` (control steps
between two policy calls), `reset()`, to be called when an episode begins, and
`plan(chunk (H, A)) -> (replan_every, A)`, to be called with every new chunk. Units are the
robot's throughout. This module imports numpy alone, so that a robot controller can.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from vla.config import EvaluateConfig


class Schedule(Protocol):
    """What an evaluator or a control loop needs to know about a way to execute chunks."""

    replan_every: int

    def reset(self) -> None: ...

    def plan(self, chunk: np.ndarray) -> np.ndarray: ...


class Receding:
    """Execute the first `n_action_steps` of each chunk, then look again."""

    def __init__(self, n_action_steps: int) -> None:
        self.replan_every = n_action_steps

    def reset(self) -> None:
        """Chunks stand alone here: nothing to forget."""

    def plan(self, chunk: np.ndarray) -> np.ndarray:
        """chunk: (H, A) -> its first n_action_steps actions. Raises ValueError when H is smaller."""
        if len(chunk) < self.replan_every:
            raise ValueError(
                f"n_action_steps: got {self.replan_every}, expected at most the chunk's {len(chunk)}. "
                "remedy: lower n_action_steps or train with a larger chunk_size."
            )
        return chunk[: self.replan_every]


class Ensemble:
    """Temporal ensembling: predict a chunk every step, execute the average of all that speak of now.

    With predictions of the present action ordered from the oldest (i = 0) to the newest, the
    weights are exp(-coefficient * i), normalised: the smaller the coefficient, the sooner new
    observations count. Zhao et al., "Learning Fine-Grained Bimanual Manipulation with Low-Cost
    Hardware", 2023, section IV-A.
    """

    replan_every = 1

    def __init__(self, coefficient: float, chunk_size: int) -> None:
        self.weights = np.exp(-coefficient * np.arange(chunk_size))
        self.chunks: deque[np.ndarray] = deque(maxlen=chunk_size)  # oldest first

    def reset(self) -> None:
        """Forget the episode before."""
        self.chunks.clear()

    def plan(self, chunk: np.ndarray) -> np.ndarray:
        """chunk: (H, A), of this step -> (1, A)."""
        self.chunks.append(np.asarray(chunk, np.float64))
        ages = range(len(self.chunks) - 1, -1, -1)
        present = np.stack([old[age] for age, old in zip(ages, self.chunks, strict=True)])  # (n, A)
        weights = self.weights[: len(present)]
        return (weights @ present / weights.sum()).astype(np.float32)[None]


def make_schedule(config: EvaluateConfig, chunk_size: int) -> Schedule:
    """The schedule an evaluation's configuration asks for: a new one for every episode slot."""
    if config.ensemble > 0:
        return Ensemble(config.ensemble, chunk_size)
    return Receding(config.n_action_steps)
