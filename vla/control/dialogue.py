"""The controller's talk with the policy: what it is asked, and which of its answers still count."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vla.control.config import LoopConfig
from vla.control.player import Player
from vla.control.robot import Reading
from vla.observation import Features
from vla.serve.wire import Hello

ROUNDING = 1e-6  # of a step


class Link(Protocol):
    """The way to the policy; nothing here waits. vla.serve.client.Client is one.

    hello: what the server said it is, None while there is none; heard: when something last came
    (monotonic seconds); changed: it came back as another policy; error: why there is no connection.
    """

    @property
    def hello(self) -> Hello | None: ...
    @property
    def connected(self) -> bool: ...
    @property
    def heard(self) -> float: ...
    @property
    def changed(self) -> bool: ...
    @property
    def error(self) -> str | None: ...

    def ask(
        self,
        *,
        episode: int,
        seq: int,
        start: int,
        captured_ns: int,
        task: str,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        prefix: np.ndarray,
    ) -> None:
        """images: camera -> (T, h, w, 3) uint8; state: (T, P); prefix: (d, A). The newest question wins."""

    def poll(self) -> list[Any]:
        """What came since the last time: objects with kind (chunk | refused | lost), seq, actions, reason."""
        ...  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A question under way: its number, when its observation was seen, when it was asked, under which instruction."""

    seq: int
    captured: float
    asked: float
    task: str


class Dialogue:
    """Questions and answers of one controller. `player` is None until the server has introduced itself.

    episode: sent along; refused: answers in a row that could not be used; refusals: all of them.
    """

    def __init__(self, link: Link, config: LoopConfig, features: Features) -> None:
        self.link, self.config, self.features = link, config, features
        self.player: Player | None = None
        self.asked: Asked | None = None
        self.history: deque[Reading] = deque(maxlen=1)  # of the policy steps before, oldest first
        self.playing = ""  # the instruction of the chunks that are played
        self.episode = self.seq = self.refused = self.refusals = 0
        self.why = ""  # the last answer could not be used
        self._fresh: float | None = None  # capture time of the newest chunk, until its first action is taken

    def meet(self) -> None:
        """Make the player for the policy that answers, if it has introduced itself.

        Raises ValueError when robot, policy and loop do not fit each other.
        """
        hello, mine = self.link.hello, self.features
        if hello is None or self.player is not None:
            return
        for name, got, expected in (
            ("state_dim", mine.state_dim, hello.state_dim),
            ("action_dim", mine.action_dim, hello.action_dim),
            ("fps", mine.fps, hello.fps),
            ("cameras", sorted(set(mine.cameras) & set(hello.cameras)), sorted(hello.cameras)),
        ):
            if got != expected:
                raise ValueError(
                    f"robot and policy do not fit: {name}. got: {got}. expected: {expected}. "
                    "remedy: use the checkpoint that was trained for this robot."
                )
        size = hello.chunk_size
        steps = self.config.n_action_steps or max(1, size // 2)
        self.player = Player(self.config.schedule, size, steps, hello.max_prefix, self.config.ensemble)
        self.history = deque(maxlen=hello.n_obs_steps)

    def listen(self, now: float, task: str) -> None:
        """Take the answers. Only that to the question under way counts, and only if it is about `task`."""
        for reply in self.link.poll():
            if self.asked is None or self.player is None or reply.seq != self.asked.seq:
                continue
            asked, self.asked = self.asked, None
            if reply.kind != "chunk" or asked.task != task:
                self.refused += reply.kind == "refused"
                self.refusals += reply.kind == "refused"
                self.why = reply.reason
                self.player.forget()
                continue
            self.refused = 0
            waited = math.ceil((now - asked.asked) * self.features.fps - ROUNDING)
            if self.player.receive(reply.actions, waited):
                self._fresh, self.playing = asked.captured, task

    def ask(self, now: float, reading: Reading, task: str) -> None:
        """Ask for the chunk that is due; at once when the instruction has changed."""
        player, hello = self.player, self.link.hello
        if player is None or hello is None:
            return
        about = self.asked.task if self.asked else self.playing
        wish = player.wish(urgent=about != task)
        if wish is None:
            return
        past, n = [*self.history, reading], hello.n_obs_steps
        frames = [past[max(0, len(past) - n + i)] for i in range(n)]
        captured = min([reading.stamp, *(reading.stamps[name] for name in hello.cameras)])
        self.seq += 1
        self.asked = Asked(self.seq, captured, now, task)
        self.link.ask(
            episode=self.episode, seq=self.seq, start=wish.start, captured_ns=int(captured * 1e9), task=task,
            images={name: np.stack([frame.images[name] for frame in frames]) for name in hello.cameras},
            state=np.stack([frame.state for frame in frames]), prefix=wish.prefix,
        )  # fmt: skip

    def take(self, reading: Reading) -> tuple[np.ndarray | None, float | None]:
        """The action (A,) of this step, and when its chunk's observation was seen if it is the chunk's first."""
        action = self.player.take() if self.player is not None else None
        if action is None:
            return None, None
        self.history.append(reading)
        captured, self._fresh = self._fresh, None
        return action, captured

    def forget(self) -> None:
        """No chunk of before counts any more, here or on its way."""
        self.asked = self._fresh = None
        self.history.clear()
        if self.player is not None:
            self.player.reset()
