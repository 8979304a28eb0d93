"""What recording and evaluation render, by counting pictures; and the simulation benchmark's clock and rows."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from load_script import SCRIPTS

from envs.render import Cameras
from vla.config import EnvConfig, EvaluateConfig, Job, RecordConfig
from vla.control.schedule import Receding
from vla.data.demonstrate import make_environment, record_episode
from vla.environment import make_env
from vla.evaluation.episodes import STANDARD, Episode, Row
from vla.evaluation.rollouts import Rollouts

if str(SCRIPTS) not in sys.path:
    sys.path.append(str(SCRIPTS))

from benchmarks import evaluating, simulation  # pyright: ignore[reportMissingImports]
from benchmarks.common import Options  # pyright: ignore[reportMissingImports]
from benchmarks.parts import LEFT_OVER, Parts, of_environment  # pyright: ignore[reportMissingImports]
from benchmarks.workloads import QUICK  # pyright: ignore[reportMissingImports]

SLOTS, EACH = 3, 2  # environments side by side, episodes of each
TABLE = EnvConfig("envs:Tabletop-v0", {"pixels": 16, "commanded": False, "skills": ["press"], "row": 0.03})


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each camera was rendered, in this process."""
    taken: Counter[str] = Counter()
    original = Cameras.picture

    def picture(self: Cameras, data: Any, camera: str, pixels: int) -> np.ndarray:
        taken[camera] += 1
        return original(self, data, camera, pixels)

    monkeypatch.setattr(Cameras, "picture", picture)
    return taken


class Dips:
    """Moves down and up at random, so that some episodes end early, in the middle of a chunk and with it."""

    n_obs_steps, chunk_size = 1, 4

    def __init__(self) -> None:
        env, self.features = make_env(TABLE.id, TABLE.kwargs)
        env.close()
        self.calls, self.rng = 0, np.random.default_rng(0)
        self.seen: list[np.ndarray] = []

    def predict_chunk(self, images: dict[str, np.ndarray], state: np.ndarray, tasks: list[str]) -> np.ndarray:
        self.calls += 1
        self.seen.append(images["wrist"].copy())
        chunk = self.rng.uniform(-1, 1, (len(tasks), self.chunk_size, 5)).astype(np.float32)
        chunk[..., 2] = -0.7 if self.calls % 9 < 7 else 1.0
        return chunk


def played(film: bool = False, folder: Path = Path("unused")) -> tuple[list[Row], Dips]:
    """Rows of an evaluation in this process, and its policy."""
    job = Job(env=TABLE, evaluate=EvaluateConfig(n_action_steps=4))
    setup, policy = evaluating.setup_of(job), Dips()
    setup.splits["default"]["max_steps"] = 24
    inside = evaluating.Inside(SLOTS, replace(setup, films=folder))
    rollouts = Rollouts(inside, [Receding(4) for _ in range(SLOTS)], policy, folder)
    episodes = [Episode("default", STANDARD, i, 100 + i, film=film) for i in range(SLOTS * EACH)]
    rows = rollouts.play(episodes, progress=False)
    inside.close()
    return rows, policy


def test_an_evaluation_renders_once_for_each_answer_of_the_policy(pictures: Counter[str]) -> None:
    """For each camera, and not for the steps in between, nor for what an episode's last step shows."""
    rows, policy = played()
    steps = [row.steps for row in rows]
    assert sum(1 for n in steps if n == 24) > 0, "the time was over"
    assert sum(1 for n in steps if n % 4) > 0, "ended within a chunk"
    answers = sum(-(-n // 4) for n in steps)
    assert pictures == {"front": answers, "wrist": answers}
    assert answers < sum(steps) / 3
    for slot in range(SLOTS):  # and what the policy is shown is new
        shown = [images[slot] for images in policy.seen[: min(steps) // 4]]
        assert all(not np.array_equal(a, b) for a, b in pairwise(shown))


def test_a_film_adds_a_picture_of_every_step_and_no_other(pictures: Counter[str], tmp_path: Path) -> None:
    rows, _ = played(film=True, folder=tmp_path)
    answers = sum(-(-row.steps // 4) for row in rows)
    assert pictures == {"front": answers, "wrist": answers, "view": sum(1 + row.steps for row in rows)}


@pytest.mark.parametrize("lead_in", [0, 6])
@pytest.mark.parametrize("instructions", [1, 3])
def test_recording_renders_every_frame_once_and_nothing_else(
    pictures: Counter[str], lead_in: int, instructions: int
) -> None:
    record = RecordConfig(episodes=6, noise=0.0, lead_in=lead_in, instructions_per_scene=instructions)
    env, _ = make_environment(TABLE, lead_in)
    for index in range(6):
        pictures.clear()
        frames, recorded = record_episode(env, TABLE, record, index)
        assert recorded.attempts == 1
        assert pictures == {"front": len(frames), "wrist": len(frames)}
        for key in ("observation.images.front", "observation.images.wrist"):
            assert len({frame[key].tobytes() for frame in frames}) == len(frames), "one shown twice"
    env.close()


def test_a_part_within_another_stops_the_outer_clock() -> None:
    class Thing:
        def outer(self) -> int:
            time.sleep(0.02)
            return self.inner() + self.inner()

        def inner(self) -> int:
            time.sleep(0.01)
            return 1

    thing, parts = Thing(), Parts()
    start = time.perf_counter()
    with parts.around(physics=[(Thing, "inner")], policy=[(thing, "outer")]):
        assert thing.outer() == 2
    wall = time.perf_counter() - start
    assert "outer" not in vars(thing)
    assert thing.inner() == 1
    assert parts.calls == {"physics": 2, "policy": 1}
    assert parts.seconds["physics"] >= 0.02
    assert parts.seconds["policy"] >= 0.02
    total = sum(parts.seconds.values())
    assert total < wall, "no second is counted twice"
    per = parts.per(2, total + 1.0)
    assert set(per) == {"physics", "policy", LEFT_OVER}
    assert per[LEFT_OVER] == pytest.approx(500.0)
    assert sum(per.values()) == pytest.approx(500 * (total + 1.0))


def test_the_environments_parts_are_found_and_put_back() -> None:
    env, _ = make_env(TABLE.id, TABLE.kwargs)
    before = Cameras.picture
    with Parts().around(**of_environment()) as parts:
        env.reset(seed=0)
        env.step(np.zeros(5, np.float32))
    assert Cameras.picture is before
    assert parts.calls["rendering"] == 4
    assert parts.calls["environment"] == 2
    assert parts.calls["judging"] == 1
    assert parts.calls["physics"] > 10
    env.close()


def test_a_vector_environment_plays_the_same_episodes(pictures: Counter[str]) -> None:
    """And renders every step, which is what it is measured for."""
    import gymnasium as gym

    job = Job(env=TABLE, evaluate=EvaluateConfig(n_action_steps=4))
    maker = lambda: make_env(TABLE.id, TABLE.kwargs | {"max_steps": 8})[0]  # noqa: E731
    env = gym.vector.SyncVectorEnv([maker, maker])
    policy = Dips()
    steps = evaluating.play_vector(env, job, policy, 2)
    env.close()
    assert steps == 16
    assert policy.calls == 2
    assert pictures == {"front": 2 * 9, "wrist": 2 * 9}


@pytest.mark.slow
def test_simulation_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small network and short episodes to evaluate; the script around it is test_benchmark.py's."""
    job_of = simulation.job_of

    def small(setting: str) -> Any:
        job = job_of(setting)
        return replace(job, env=replace(job.env, kwargs=job.env.kwargs | {"pixels": 32}), model=QUICK)

    def evaluation(job: Any, *rest: Any) -> Any:
        kwargs = job.env.kwargs | {"max_steps": 2 * job.evaluate.n_action_steps}
        return evaluating.evaluation(replace(job, env=replace(job.env, kwargs=kwargs)), *rest)

    monkeypatch.setattr(simulation, "job_of", small)
    monkeypatch.setattr(simulation, "evaluation", evaluation)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    threads = torch.get_num_threads()
    try:
        rows = simulation.run(Options(True, "cpu", tmp_path, True))
    finally:
        torch.set_num_threads(threads)
    assert {row["params"]["setting"] for row in rows} == set(simulation.CONFIGS)
    assert all(row["name"] in simulation.table(rows) for row in rows)
    by_name: dict[str, Any] = {row["name"]: row for row in rows if row["params"]["setting"] == "tabletop"}
    assert set(by_name) == {
        "mujoco.Renderer", "Cameras.picture", "Tabletop's observation", "recording", "evaluation, ours, one process",
        "evaluation, ours, 1 workers", "evaluation, SyncVectorEnv", "evaluation, AsyncVectorEnv",
        "experts, 1 processes",
    }  # fmt: skip
    ours = by_name["evaluation, ours, one process"]
    calls = ours["calls"]
    assert calls["rendering"] == 2 * calls["policy"] * ours["params"]["slots"]
    assert sum(ours["parts_ms"].values()) > 0
    recorded = by_name["recording"]["calls"]
    assert recorded["rendering"] == 2 * recorded["frames"]
    written = [row for row in rows if row["name"] == "recording" and row["params"]["written"]]
    assert len(written) == 1
    assert written[0]["parts_ms"]["writing"] > 0
