"""Chunks that arrive late, played without a jump: what to ask for, and which action is next.

Actions are counted by the steps that were consumed, never by estimated time: an estimate that is
wrong by one step moves the whole chunk. Five ways, by name:

    receding   plays n_action_steps, then stands and waits for the next chunk
    naive      asks after n_action_steps while it plays on, and begins the new chunk when it is there, though it
               was meant to begin earlier: what clients do that do not count. For comparison
    aligned    the same, but jumps into the new chunk at the present step
    ensemble   asks all the time, plays the average of all chunks that speak of the present step
    prefix     asks in time, tells the policy which actions will run meanwhile, continues exactly those:
               real-time chunking by a committed prefix

    H chunk_size   A action_dim   d steps committed
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from vla.checks import one_of, require
from vla.control.config import SCHEDULES

REMEMBERED = 10  # answers, of which the slowest decides how much is committed


@dataclass(frozen=True)
class Wish:
    """What the policy is to be asked: a chunk from step `start` on, of which prefix (d, A) is settled.

    anew: under another instruction. Then there is no prefix: in training prefixes agree with their
    instruction, and one that does not leads the policy on to where it began to go (README).
    """

    start: int
    prefix: np.ndarray
    anew: bool = False


class Player:
    """One robot's chunks. `step` counts the actions that were consumed."""

    def __init__(
        self, schedule: str, chunk_size: int, n_action_steps: int, max_prefix: int, ensemble: float = 0.1
    ) -> None:
        """ensemble: chunks are weighted by exp(-ensemble * i), i = 0 the oldest (Zhao et al. 2023, IV-A)."""
        one_of("control.schedule", schedule, SCHEDULES)
        require(
            0 < n_action_steps <= chunk_size, "control.n_action_steps", n_action_steps,
            f"1 to the policy's chunk_size={chunk_size}",
        )  # fmt: skip
        require(
            schedule != "prefix" or max_prefix > 0, "control.schedule", schedule,
            "a policy trained with model.max_prefix > 0", "train one, or use schedule: naive",
        )  # fmt: skip
        self.schedule, self.chunk_size, self.n_action_steps = schedule, chunk_size, n_action_steps
        self.max_prefix, self.coefficient = max_prefix, ensemble
        self.delays: deque[int] = deque([0], maxlen=REMEMBERED)  # of answers, in steps
        self.step = self.late = 0
        self.reset()

    def reset(self) -> None:
        """Forget all chunks; what is on its way will be too late. The count of steps goes on."""
        self.chunks: deque[tuple[int, np.ndarray]] = deque(
            maxlen=self.chunk_size
        )  # (start, (H, A)), oldest first
        self.asked: Wish | None = None

    @property
    def left(self) -> int:
        """Actions still to be played."""
        return max((start + len(chunk) - self.step for start, chunk in self.chunks), default=0)

    def wish(self, urgent: bool = False) -> Wish | None:
        """What to ask for before this step's action is taken; None while there is no need.

        urgent: ask now, as when the instruction has changed; the answer under way is then not waited for.
        """
        if self.asked is not None and not urgent:
            return None
        played = self.step - self.chunks[-1][0] if self.chunks else self.chunk_size
        commit = self._commit() if self.schedule == "prefix" and not urgent else 0
        due = {
            "receding": self.left == 0,
            "naive": played >= self.n_action_steps,
            "aligned": played >= self.n_action_steps,
            "ensemble": True,
            "prefix": played >= self.n_action_steps or self.left <= commit,
        }[self.schedule]
        if not (due or urgent):
            return None
        prefix = np.zeros((0, 0), np.float32)
        if commit and self.left:
            start, chunk = self.chunks[-1]
            prefix = chunk[self.step - start : self.step - start + commit]
        self.asked = Wish(self.step, prefix, urgent)
        return self.asked

    def forget(self) -> None:
        """The answer asked for will not come."""
        self.asked = None

    def receive(self, chunk: np.ndarray, waited: int = 0) -> bool:
        """Take the answer (H, A) to the last wish; False when it came too late to be continued.

        waited: how many steps it took, consumed or not, for what is committed next time.
        """
        wish, self.asked = self.asked, None
        assert wish is not None, "nothing was asked"
        late = self.step - wish.start
        self.delays.append(max(late, waited))
        committed = self.schedule != "prefix" or wish.anew or late <= len(wish.prefix)
        if not committed or late >= len(chunk):
            self.late += 1
            return False
        if self.schedule == "receding":
            chunk = chunk[: self.n_action_steps]
        if wish.anew or self.schedule != "ensemble":
            self.chunks.clear()
        self.chunks.append((self.step if self.schedule == "naive" else wish.start, chunk))
        return True

    def take(self) -> np.ndarray | None:
        """The action (A,) of this step, which is thereby consumed; None when there is none."""
        present = [chunk[self.step - start] for start, chunk in self.chunks if self.step - start < len(chunk)]
        if not present:
            return None
        self.step += 1
        weights = np.exp(-self.coefficient * np.arange(len(present)))
        return np.average(present, axis=0, weights=weights).astype(np.float32)

    def _commit(self) -> int:
        """How many steps the answer may take: as many as the slowest of the last ones, and one in reserve."""
        return min(max(self.delays) + 1, self.max_prefix, self.left)
