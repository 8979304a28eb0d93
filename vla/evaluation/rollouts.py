"""Closed-loop rollouts: a policy in many environments at once, one batched call for all of them.

The slots go in lockstep, and the batch is always as large as there are slots, a slot without an
episode being filled with what it showed last. So the result depends on the number of slots, in
the last bits, and not at all on the number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from vla.control.schedule import Schedule
from vla.evaluation.episodes import STANDARD, Episode, Row
from vla.evaluation.pool import Workers
from vla.evaluation.turns import Place, Turns
from vla.observation import IMAGES, Features


class ChunkPolicy(Protocol):
    """What is evaluated: vla.policy.Policy, or anything of the same shape.

    predict_chunk(images: camera -> (B, T, h, w, 3) uint8, state: (B, T, P) float32,
    tasks: B instructions) -> (B, H, A) float32, all in robot units; T = n_obs_steps, H = chunk_size.
    """

    @property
    def features(self) -> Features: ...

    @property
    def n_obs_steps(self) -> int: ...

    @property
    def chunk_size(self) -> int: ...

    def predict_chunk(
        self, images: dict[str, np.ndarray], state: np.ndarray, tasks: list[str]
    ) -> np.ndarray: ...


@dataclass
class Clock:
    """Where the time went, in wall seconds. parts: how often the evaluation was begun; > 1 when it was killed."""

    wall_s: float = 0.0
    env_s: float = 0.0
    policy_s: float = 0.0
    env_steps: int = 0
    policy_calls: int = 0
    parts: int = 1

    @classmethod
    def of(cls, clocks: list[Clock]) -> Clock:
        """Of several processes side by side: seconds are the mean, counts the sum."""
        wall, env, policy = (
            sum(getattr(clock, name) for clock in clocks) / len(clocks)
            for name in ("wall_s", "env_s", "policy_s")
        )
        steps, calls = sum(c.env_steps for c in clocks), sum(c.policy_calls for c in clocks)
        return cls(wall, env, policy, steps, calls)

    @classmethod
    def after(cls, clocks: list[Clock]) -> Clock:
        """Of parts of one evaluation, one after the other: all are summed."""
        return cls(*(sum(getattr(clock, field.name) for clock in clocks) for field in fields(cls)))


class Rollouts:
    """Plays episodes in the slots of `workers`. Without a policy the environment's expert plays.

    without: cameras that the policy is not shown; n_tasks: of each split's environment, see turns.py.
    """

    def __init__(
        self,
        workers: Workers,
        schedules: Sequence[Schedule],
        policy: ChunkPolicy | None,
        folder: Path,
        without: Sequence[str] = (),
        n_tasks: dict[str, int] | None = None,
    ) -> None:
        self.workers, self.schedules, self.policy, self.folder = workers, schedules, policy, folder
        wanted = policy.features.cameras if policy else {}  # the environment may show more
        self.cameras = sorted(set(wanted) - set(without))
        self.texts = [""] * len(schedules)  # what the policy is told, by slot
        self.active: dict[int, Row] = {}
        self.n_tasks, self.last = n_tasks or {}, dict[int, Place]()  # what each slot has loaded
        self.clock = Clock()

    def play(self, episodes: list[Episode], more: Callable[[list[Row]], list[Episode]] | None = None,
             progress: bool = True, finished: Callable[[Row], None] | None = None) -> list[Row]:  # fmt: skip
        """Play all episodes; a row each, in the order in which they began, which is that of turns.py.

        more: called once, when all have begun: further episodes that depend on what those showed.
        finished: called with every row as soon as its episode has ended.
        """
        queue, rows = Turns(self.n_tasks), []
        queue.extend(episodes)
        bar = tqdm(total=len(queue), unit="episode", disable=not progress, desc="evaluate")
        while queue or self.active or more:
            if not queue and more is not None:
                queue.extend(more(rows))
                more, bar.total = None, len(rows) + len(queue)
            rows += self._begin(queue)
            if not self.active:
                continue
            ended = self._predict() if self.policy is not None else []
            ended += self._advance()
            if finished is not None:
                for row in ended:
                    finished(row)
            bar.update(len(ended))
            if ended:
                done = [row.success for row in rows if row.done and row.episode.control == STANDARD]
                bar.set_postfix(success=f"{np.mean(done):.0%}" if done else "-")
        bar.close()
        return rows

    def _begin(self, queue: Turns) -> list[Row]:
        """Every free slot takes an episode, those first that can stay with their task."""
        free = [slot for slot in range(len(self.schedules)) if slot not in self.active]
        free.sort(key=lambda slot: self.last.get(slot) not in queue.waiting)
        started = {slot: queue.take(self.last.get(slot)) for slot in free[: len(queue)]}
        self.last |= {slot: queue.place(episode) for slot, episode in started.items()}
        sights = self._ask("begin", started)
        for slot, episode in started.items():
            sight = sights[slot]
            self.texts[slot] = sight.task if episode.text is None else episode.text
            self.active[slot] = Row(episode, sight.task, self.texts[slot], sight.skill, sight.alternatives)
            self.schedules[slot].reset()
        return [self.active[slot] for slot in started]

    def _predict(self) -> list[Row]:
        """Ask the policy for all slots. Where it answers with NaN, the episode ends before the environment
        sees it.
        """
        assert self.policy is not None
        start = time.perf_counter()
        images = {name: np.array(self.workers.images[IMAGES + name]) for name in self.cameras}
        chunks = np.asarray(self.policy.predict_chunk(images, np.array(self.workers.state), list(self.texts)))
        expected = (len(self.schedules), self.policy.chunk_size, self.workers.actions.shape[-1])
        if chunks.shape != expected:
            raise ValueError(
                f"predict_chunk: got shape {chunks.shape}, expected {expected} "
                "(slots, chunk_size, action_dim). remedy: return one chunk for every observation."
            )
        sound = [bool(np.isfinite(chunk).all()) for chunk in chunks]
        for slot in self.active:
            if sound[slot]:
                self.workers.actions[slot] = self.schedules[slot].plan(chunks[slot])
        self.clock.policy_s += time.perf_counter() - start
        self.clock.policy_calls += 1
        broken = [slot for slot in self.active if not sound[slot]]
        films = self._ask("end", dict.fromkeys(broken))
        for slot in broken:
            self.active[slot].non_finite = True
        return [self._finish(slot, films[slot]) for slot in broken]

    def _advance(self) -> list[Row]:
        """Execute what was planned."""
        ended = []
        for slot, progress in self._ask("advance", dict.fromkeys(self.active)).items():
            row = self.active[slot]
            self.clock.env_steps += progress.steps - row.steps
            row.steps, row.success = progress.steps, progress.success
            if row.episode.text is None:  # the instruction may change on the way
                self.texts[slot] = progress.task
            if progress.done:
                ended.append(self._finish(slot, progress.film))
        return ended

    def _finish(self, slot: int, film: Path | None) -> Row:
        row = self.active.pop(slot)
        row.done = True
        if film is not None:
            row.video = film.relative_to(self.folder).as_posix()
        return row

    def _ask(self, command: str, wanted: dict) -> dict:
        start = time.perf_counter()
        answers = self.workers.ask(command, wanted)
        self.clock.env_s += time.perf_counter() - start
        return answers
