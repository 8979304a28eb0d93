"""One evaluation from a policy and a job; see `evaluate`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vla.config import Job, require
from vla.control.schedule import Receding, make_schedule
from vla.evaluation import episodes as plan
from vla.evaluation.episodes import Row
from vla.evaluation.kept import Kept, remove_kept
from vla.evaluation.pool import Workers
from vla.evaluation.rollouts import ChunkPolicy, Clock, Rollouts
from vla.evaluation.slot import Setup
from vla.evaluation.summary import summarise
from vla.evaluation.video import VIDEOS
from vla.observation import Features
from vla.provenance import machine, portable, versions
from vla.system import cores, sha256
from vla.training.ranks import Ranks

RESULT = "evaluation.json"
WEIGHTS = ("model.safetensors", "policy.onnx", "policy.pt2")  # of checkpoints and of exports


@dataclass(frozen=True)
class Evaluation:
    """The episodes of an evaluation and what they were played with."""

    rows: list[Row]
    clock: Clock
    job: Job
    features: Features
    checkpoint: Path | None
    expert: bool
    workers: int
    policy_type: str = "vla"  # of LeRobot's policies, theirs

    @property
    def summary(self) -> dict[str, Any]:
        """The rates; see summary.py."""
        return summarise(self.rows)

    @property
    def success_rate(self) -> float:
        """Of the first split's standard episodes, like the two below."""
        return self.summary["success_rate"]

    @property
    def n_episodes(self) -> int:
        return self.summary["n_episodes"]

    @property
    def wilson_95(self) -> tuple[float, float]:
        low, high = self.summary["wilson_95"]
        return low, high

    def as_dict(self, folder: Path) -> dict[str, Any]:
        """Everything evaluation.json holds. Paths are relative to `folder`, its place."""
        clock = self.clock
        return self.summary | {
            "played_by": "expert" if self.expert else "policy",
            "checkpoint": self._checkpoint(folder),
            "environment": self.job.env.id,
            "fps": self.features.fps,
            "time": asdict(clock)
            | {
                "env_steps_per_s": clock.env_steps / clock.wall_s,
                "env_share": clock.env_s / clock.wall_s,
                "policy_share": clock.policy_s / clock.wall_s,
                "workers": self.workers,
            },
            "machine": machine(),
            "versions": versions(),
            "config": portable(asdict(self.job)),
            "episodes": [row.as_dict() for row in self.rows],
        }

    def save(self, folder: Path) -> Path:
        """Write evaluation.json into `folder`, in one piece, and remove the rows that were kept there on the way."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RESULT
        partial = path.with_suffix(".json.partial")
        text = json.dumps(self.as_dict(folder), indent=1, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
        remove_kept(folder)
        return path

    def _checkpoint(self, folder: Path) -> dict[str, Any] | None:
        if self.checkpoint is None:
            return None
        below = self.checkpoint.resolve().is_relative_to(folder.resolve())
        name = (
            os.path.relpath(self.checkpoint.resolve(), folder.resolve())
            if below
            else portable(self.checkpoint)
        )
        return {"type": self.policy_type, "path": name, "sha256": weights_of(self.checkpoint)}


def weights_of(checkpoint: Path) -> str | None:
    """The sha256 of the weights in a folder."""
    weights = next((path for file in WEIGHTS if (path := checkpoint / file).is_file()), None)
    return sha256(weights) if weights else None


def player_of(policy: ChunkPolicy | None) -> str:
    """What tells this policy from all others: its weights; its class, where it came from no folder."""
    checkpoint = getattr(policy, "checkpoint", None)
    if policy is None:
        return "expert"
    return (
        weights_of(checkpoint) if checkpoint else None
    ) or f"{type(policy).__module__}.{type(policy).__qualname__}"


def evaluate(
    policy: ChunkPolicy | None,
    job: Job,
    *,
    progress: bool = True,
    ranks: Ranks | None = None,
    keep: bool = False,
) -> Evaluation:
    """Play the job's episodes in closed loop and count successes.

    policy: None has the environment's own expert play through the same machinery.
    Films, job.evaluate.videos of each split, go to <job.output>/videos, in the place of those that
    the evaluation.json there lists.
    keep: write the rows of finished episodes to <job.output>/evaluation.partial.jsonl at once, and begin with
    those that a killed evaluation of the same job, weights and versions left there; `save` removes them. The time
    is that of all parts. An episode played by the second part has other neighbours in the policy's batch than in
    an uninterrupted evaluation, which can change the last bits of a prediction, and with them a result; failures
    are filmed (film_failures) anew. Without it nothing is written but films.
    ranks: the processes that do this together, each in slots of its own; all call it alike, and get all
    rows. An episode's result then depends on their number in the last bits, as it does on the slots.
    Raises ValueError, before anything is played or removed, when the environment of a split is not
    to be found or does not fit the policy; EnvironmentCrash when it fails on the way.
    """
    config, folder, ranks = job.evaluate, Path(job.output), ranks or Ranks()
    if policy is not None:
        require(
            set(config.without) < set(policy.features.cameras) or not config.without,
            "evaluate.without", list(config.without), f"some of {sorted(policy.features.cameras)}, not all",
        )  # fmt: skip
    start = time.perf_counter()
    todo = plan.standard_episodes(config)
    mine = ranks.mine(todo)
    n_slots = max(1, min(config.slots, len(mine)))  # of a second part too: the same batch
    kept = Kept(folder, job, player_of(policy), ranks) if keep else None
    there = {row.episode: row for row in kept.rows} if kept else {}
    schedules = [
        Receding(config.n_action_steps) if policy is None else make_schedule(config, policy.chunk_size)
        for _ in range(n_slots)
    ]
    setup = Setup(
        env_id=job.env.id,
        env_kwargs=job.env.kwargs,
        splits=plan.split_kwargs(config),
        slots=(),
        n_obs_steps=policy.n_obs_steps if policy else 1,
        n_action_steps=schedules[0].replan_every,
        expert=policy is None,
        films=folder / VIDEOS,
    )

    def controls(rows: list[Row]) -> list[plan.Episode]:
        begun = in_order([*there.values(), *ranks.gather(rows)], todo)
        todo.extend(plan.control_episodes(begun, film=config.videos // 2, policy_reads=policy is not None))
        return missing(todo[len(begun) :])

    def missing(episodes: list[plan.Episode]) -> list[plan.Episode]:
        return ranks.mine([episode for episode in episodes if episode not in there])

    def finished(row: Row) -> None:
        if kept:
            kept.add(row, replace(rollouts.clock, wall_s=time.perf_counter() - start))

    with Workers(config.workers or max(1, cores() // ranks.beside), n_slots, setup) as workers:
        if policy is not None:
            policy.features.require(workers.features, f"The environment {job.env.id}", closed_loop=True)
        if ranks.main:
            remove_films(folder, but=kept.films if kept else set())
        if kept:
            kept.begin(len(todo))
        ranks.wait()
        rollouts = Rollouts(workers, schedules, policy, folder, config.without, workers.n_tasks)
        more = controls if config.controls else None
        rows = rollouts.play(missing(todo), more, progress and ranks.main, finished)
        rows = in_order([*there.values(), *ranks.gather(rows)], todo)
        film_failures(rollouts, rows, config.videos // 2, ranks)
    rollouts.clock.wall_s = time.perf_counter() - start
    clock, n_workers = Clock.of(ranks.gather([rollouts.clock])), sum(ranks.gather([workers.n]))
    if kept and kept.clock:
        clock = Clock.after([kept.clock, clock])
    checkpoint = getattr(policy, "checkpoint", None)
    kind = getattr(policy, "type", "vla")
    return Evaluation(rows, clock, job, workers.features, checkpoint, policy is None, n_workers, kind)


def in_order(rows: list[Row], episodes: list[plan.Episode]) -> list[Row]:
    """The rows in the order of their episodes, whoever played them."""
    played = {row.episode: row for row in rows}
    return [played[episode] for episode in episodes]


def remove_films(folder: Path, but: set[str]) -> None:
    """Remove the films of the evaluation whose result lies in `folder`, and nobody else's, nor those of `but`."""
    try:
        rows = json.loads((folder / RESULT).read_text(encoding="utf-8"))["episodes"]
        films = [Path(row["video"]).name for row in rows if row["video"]]
    except (OSError, ValueError, KeyError, TypeError):
        return  # none there, or none of ours
    for film in set(films) - but:
        (folder / VIDEOS / film).unlink(missing_ok=True)


def film_failures(rollouts: Rollouts, rows: list[Row], count: int, ranks: Ranks) -> None:
    """Play some failed episodes again, filmed. A film is kept where the failure repeats itself:
    a batch of other neighbours can change the last bits of a prediction, and with them the end.
    """
    originals = {row.scene: row for row in rows if row.episode.control == plan.STANDARD}
    again = rollouts.play(ranks.mine(plan.failures_to_film(rows, count)), progress=False)
    for row in ranks.gather(again):
        if not row.success:
            originals[row.scene].video = row.video
        elif ranks.main and row.video:
            (rollouts.folder / row.video).unlink(missing_ok=True)
