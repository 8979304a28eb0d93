"""A controller, a simulated robot and a policy in one process and in virtual time: exact delays, no luck.

For sweeps and tests. A robot for this has `now`, `advance(dt)`, `reset(seed)` and success in its reports,
as simulated robots have in lockstep (realtime=False).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vla.control.config import LoopConfig
from vla.control.controller import Controller
from vla.control.safety import Limits
from vla.control.states import State
from vla.serve.wire import VERSION, Hello


class ChunkPolicy(Protocol):
    """vla.policy.Policy, an export, or anything of the same shape."""

    features: Any
    chunk_size: int
    n_obs_steps: int
    max_prefix: int

    def predict_chunk(
        self, images: dict[str, np.ndarray], state: np.ndarray, tasks: list[str],
        prefix: np.ndarray | None = None, prefix_length: np.ndarray | None = None,
    ) -> np.ndarray: ...  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a Link's poll gives."""

    kind: str
    seq: int
    actions: np.ndarray
    reason: str = ""


class DelayedLink:
    """Answers exactly `delay` seconds of virtual time after it was asked; the newest question wins."""

    connected, changed, error = True, False, None

    def __init__(self, policy: Any, delay: float = 0.0) -> None:
        self.policy, self.delay, self.now = policy, delay, 0.0
        f = policy.features
        self.hello = Hello(
            VERSION, "0" * 64, f.cameras, f.state_dim, f.action_dim, f.fps, policy.chunk_size, policy.n_obs_steps,
            policy.max_prefix,
        )  # fmt: skip
        self.under_way: tuple[float, dict[str, Any]] | None = None

    @property
    def heard(self) -> float:
        return self.now

    def ask(self, **question: Any) -> None:
        self.under_way = (self.now + self.delay, question)

    def poll(self) -> list[Answer]:
        if self.under_way is None or self.under_way[0] > self.now + 1e-9:
            return []
        (_, question), self.under_way = self.under_way, None
        committed = question["prefix"]
        prefix = length = None
        if len(committed):
            prefix = np.zeros((1, self.policy.chunk_size, self.hello.action_dim), np.float32)
            prefix[0, : len(committed)], length = committed, np.array([len(committed)])
        images = {name: frames[None] for name, frames in question["images"].items()}
        chunk = self.policy.predict_chunk(
            images, question["state"][None], [question["task"]], prefix, length
        )[0]
        return [Answer("chunk", question["seq"], chunk)]


@dataclass(frozen=True)
class Outcome:
    """One episode. jumps: distances (L2) of consecutive actions; illegal: commands; seconds: virtual."""

    success: bool
    seconds: float
    steps: int
    held: float  # seconds in HOLD, after the first action
    illegal: int
    jumps: list[float]


def play(
    robot: Any, policy: Any, limits: Limits, config: LoopConfig, seed: int, delay: float, misled: float = 0.0
) -> Outcome:  # fmt: skip
    """One scene with its own instruction, until success, failure, or half more than its time.

    misled: so many seconds of another instruction that is valid in the scene come first.
    """
    scene = robot.reset(seed=seed)
    link = DelayedLink(policy, delay)
    controller = Controller(robot, limits, config, link)
    controller.instruct(scene["alternatives"][0] if misled > 0 else scene["task"])
    dt, began, held = 1 / config.rate, robot.now, 0.0
    actions: list[np.ndarray] = []
    reading = robot.observe()
    while not (reading.report["success"] or reading.report["failure"]):
        if robot.now - began > 1.5 * scene["limit_s"]:
            break
        link.now = robot.now
        if robot.now - began >= misled:
            controller.instruct(scene["task"])
        command = controller.tick(robot.now, reading)
        if command is not None:
            robot.send(command)
        if controller.step is not None:
            actions.append(controller.step.action)
        held += dt * (controller.state is State.HOLD and bool(actions))
        robot.advance(dt)
        reading = robot.observe()
    jumps = np.linalg.norm(np.diff(np.array(actions), axis=0), axis=-1).tolist() if len(actions) > 1 else []
    seconds = round(robot.now - began, 3)
    return Outcome(
        bool(reading.report["success"]), seconds, len(actions), held, controller.audit.illegal, jumps
    )
