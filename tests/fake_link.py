"""A policy without a network for tests of the controller: answers after a delay, in the test's own time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.control.robot import Reading, Robot
from vla.observation import Features
from vla.serve.wire import Hello

FPS, CHUNK = 10, 8


@dataclass
class Reply:
    """As vla.serve.client gives it."""

    kind: str
    seq: int
    actions: np.ndarray | None = None
    reason: str = ""


class PlaneArm(Robot):
    """Two joints that are x and y of the hand; an action is the next position of both. Follows at once."""

    features = Features({"front": (4, 4)}, 2, 2, FPS)
    joints = ("x", "y")

    def __init__(self) -> None:
        self.at, self.pictures, self.moving_picture = np.zeros(2), 0, True
        self.sent: list[np.ndarray] = []

    def connect(self) -> None: ...

    def disconnect(self) -> None: ...

    def observe(self) -> Reading:
        return self.look(0.0)

    def look(self, now: float) -> Reading:
        """The reading of a moment; the picture changes with every look."""
        self.pictures += self.moving_picture
        picture = np.full((4, 4, 3), self.pictures % 251, np.uint8)
        return Reading({"front": picture}, {"front": now}, self.at.astype(np.float32), self.at.copy(), now)

    def send(self, command: np.ndarray) -> None:
        self.sent.append(command)
        self.at = np.array(command)

    def position(self, joints: np.ndarray) -> np.ndarray:
        return np.concatenate([joints, np.zeros((len(joints), 1))], axis=1)


class FakeLink:
    """Answers questions `delay` seconds later with policy(question) -> (H, 2); `now` is set by the test."""

    def __init__(
        self, policy: Callable[[dict[str, Any]], np.ndarray], delay: float = 0.0, max_prefix: int = 4
    ) -> None:
        self.policy, self.delay, self.now = policy, delay, 0.0
        self.hello: Hello | None = Hello(1, "f" * 64, {"front": (4, 4)}, 2, 2, FPS, CHUNK, 1, max_prefix)
        self.error: str | None = None
        self.connected, self.changed, self.silent_since = True, False, float("inf")
        self.asked: list[dict[str, Any]] = []
        self.under_way: list[tuple[float, dict[str, Any]]] = []

    @property
    def heard(self) -> float:
        return min(self.now, self.silent_since)

    def ask(self, **question: Any) -> None:
        self.asked.append(question)
        self.under_way = [(self.now + self.delay, question)]  # the newest wins

    def poll(self) -> list[Any]:
        ready = [question for due, question in self.under_way if due <= self.now + 1e-9]
        self.under_way = [(due, question) for due, question in self.under_way if due > self.now + 1e-9]
        return [self.answer(question) for question in ready]

    def answer(self, question: dict[str, Any]) -> Reply:
        return Reply("chunk", question["seq"], np.asarray(self.policy(question), np.float32))
