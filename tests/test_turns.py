"""Which episode a free slot plays next: in order for one task, else that of the task it has loaded."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from toy_env import ToyEnv

from vla.config import EnvConfig, EvaluateConfig, Job
from vla.evaluation import evaluate
from vla.evaluation.episodes import STANDARD, Episode
from vla.evaluation.turns import Turns


def episodes(split: str, numbers: range) -> list[Episode]:
    return [Episode(split, STANDARD, number, 100 + number) for number in numbers]


def turns(n_tasks: dict[str, int], *parts: list[Episode]) -> Turns:
    made = Turns(n_tasks)
    for part in parts:
        made.extend(part)
    return made


def taken(made: Turns, last: tuple[str, int] | None, count: int) -> list[tuple[str, int]]:
    """Split and number of what one slot takes, one after the other."""
    found = []
    for _ in range(count):
        episode = made.take(last)
        last = made.place(episode)
        found.append((episode.split, episode.index))
    return found


@pytest.mark.parametrize("n_tasks", [{}, {"a": 1}])
def test_one_task_is_played_in_the_order_in_which_it_came(n_tasks):
    made = turns(n_tasks, episodes("a", range(5)), episodes("a", range(5, 9)))
    assert len(made) == 9
    first, *others = (made.take(last) for last in (None, ("a", 0), None, ("a", 0), ("b", 0), ("a", 3)))
    assert [first.index, *(episode.index for episode in others)] == [0, 1, 2, 3, 4, 5]
    assert len(made) == 3


def test_a_slot_stays_with_its_task():
    made = turns({"a": 4}, episodes("a", range(12)))
    assert taken(made, None, 3) == [("a", 0), ("a", 4), ("a", 8)]
    assert taken(made, None, 3) == [("a", 1), ("a", 5), ("a", 9)]  # another one takes another task


def test_a_slot_without_own_episodes_helps_where_most_are_waiting():
    made = turns({"a": 4}, episodes("a", range(12)))
    taken(made, None, 3)
    taken(made, ("a", 1), 1)
    assert taken(made, ("a", 0), 3) == [("a", 2), ("a", 6), ("a", 10)]  # of 2 and 3, the first
    assert taken(made, ("a", 2), 2) == [("a", 3), ("a", 7)]
    assert taken(made, ("a", 0), 1) == [("a", 5)]  # two are left of task 1, one of task 3


def test_a_slot_stays_with_its_split_while_it_can():
    made = turns({"a": 2, "b": 3}, episodes("a", range(4)), episodes("b", range(9)))
    assert taken(made, ("a", 1), 4) == [("a", 1), ("a", 3), ("a", 0), ("a", 2)]
    assert taken(made, ("a", 0), 2) == [("b", 0), ("b", 3)]
    assert made.place(Episode("b", STANDARD, 0, 5)) == ("b", 2)  # of its own split's number


class Many(ToyEnv):
    """The toy as three tasks; it writes down which seeds each of its instances played."""

    made = 0

    def __init__(self, log: str, n_tasks: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        Many.made += 1
        self.n_tasks, self.log, self.number = n_tasks, Path(log), Many.made

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        assert seed is not None
        with self.log.open("a") as file:
            file.write(f"{self.number} {seed % self.n_tasks}\n")
        return super().reset(seed=seed, options=options)


if "Many-v0" not in gym.registry:
    gym.register("Many-v0", entry_point=Many, max_episode_steps=30)


def test_the_slots_of_an_evaluation_load_few_tasks(tmp_path):
    log = tmp_path / "log"
    job = Job(
        env=EnvConfig(f"{__name__}:Many-v0", {"log": str(log)}),
        evaluate=EvaluateConfig(episodes=14, slots=3, workers=1, n_action_steps=3, videos=0, controls=False),
    )
    expected = evaluate(None, replace(job, env=EnvConfig("toy_env:Toy-v0")), progress=False)  # in order
    played = evaluate(None, job, progress=False)
    assert played.rows == expected.rows
    lines = [tuple(line.split()) for line in log.read_text().splitlines()]
    tasks = {number: [task for n, task in lines if n == number] for number, _ in lines}
    switches = sum(a != b for played in tasks.values() for a, b in itertools.pairwise(played))
    assert len(lines) == 14
    assert switches <= 1  # of 14 episodes, 5, 5 and 4 of a task: at most one slot helps another
