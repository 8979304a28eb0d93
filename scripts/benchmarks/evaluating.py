"""The evaluating half of `simulation`: the evaluator in one process and with workers, against vector environments."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Row, row, take_turns
from benchmarks.parts import Parts, of_environment

OURS, SYNC, ASYNC = "ours, one process", "SyncVectorEnv", "AsyncVectorEnv"


class Inside:
    """The slots of an evaluation in this process: what vla.evaluation.pool.Workers is to Rollouts."""

    def __init__(self, slots: int, setup: Any) -> None:
        from vla.evaluation.worker import Host
        from vla.observation import ACTION, IMAGES, STATE

        self.host = Host(replace(setup, slots=tuple(range(slots))))
        features, history = self.host.slots[0].features, setup.n_obs_steps
        self.images = {
            IMAGES + name: np.zeros((slots, history, *hw, 3), np.uint8)
            for name, hw in features.cameras.items()
        }
        self.state = np.zeros((slots, history, features.state_dim), np.float32)
        self.actions = np.zeros((slots, setup.n_action_steps, features.action_dim), np.float32)
        for number, slot in self.host.slots.items():
            slot.attach({**self.images, STATE: self.state, ACTION: self.actions}, number)

    def ask(self, command: str, wanted: dict[int, Any]) -> dict[int, Any]:
        return getattr(self.host, command)(wanted) if wanted else {}

    def close(self) -> None:
        for slot in self.host.slots.values():
            slot.close()


def evaluation(
    job: Any, setting: str, slots: int, rounds: int, counts: list[int], device: str, peers: bool
) -> list[Row]:
    """Every way to evaluate plays the same scenes; milliseconds of a step, over all that goes on at once.

    slots: environments side by side; counts: numbers of workers.
    """
    from vla.evaluation.pool import Workers

    policy, setup = random_policy(job, device), setup_of(job)
    params = {"setting": setting, "slots": slots, "n_action_steps": setup.n_action_steps}
    numbers, steps = {f"ours, {n} workers": n for n in counts}, {}
    with ExitStack() as stack:
        inside = Inside(slots, setup)
        stack.callback(inside.close)
        ways: dict[str, Callable[[], int]] = {OURS: partial(play, inside, job, policy, slots)}
        for name, n in numbers.items():
            workers = stack.enter_context(Workers(n, slots, setup))
            ways[name] = partial(play, workers, job, policy, slots)
        if peers:
            vectors = vector_envs(job, slots)
            for vector in vectors.values():
                stack.callback(vector.close)
            ways |= {name: partial(play_vector, env, job, policy, slots) for name, env in vectors.items()}

        def counted(name: str) -> None:
            steps[name] = ways[name]()

        times = take_turns({name: partial(counted, name) for name in ways}, rounds, warm=1)
        splits = {name: split(ways[name], policy) for name in (OURS, SYNC) if name in ways}
    each = {name: [sample / steps[name] for sample in samples] for name, samples in times.items()}
    rows = []
    for name, samples in each.items():
        peer = SYNC if name in (OURS, SYNC) else ASYNC
        against = {"peer": f"evaluation, {peer}", "peer_ms": each[peer]} if peers else {}
        workers = {"workers": numbers[name]} if name in numbers else {}
        rows.append(
            row(f"evaluation, {name}", params | workers, samples, 1, **against) | splits.get(name, {})
        )
    return rows


def setup_of(job: Any) -> Any:
    """What the evaluator tells its workers, for the first split."""
    from vla.evaluation.episodes import split_kwargs
    from vla.evaluation.slot import Setup

    splits = dict(list(split_kwargs(job.evaluate).items())[:1])
    n = job.evaluate.n_action_steps
    return Setup(job.env.id, job.env.kwargs, splits, (), 1, n, expert=False, films=Path("films"))


def random_policy(job: Any, device: str) -> Any:
    """A network of the job's size as a policy."""
    import torch

    from vla.data.normalize import Statistics
    from vla.environment import make_env
    from vla.model.vla import VLA
    from vla.observation import ACTION, STATE
    from vla.policy import Policy

    env, features = make_env(job.env.id, job.env.kwargs)
    env.close()
    rng = np.random.default_rng(0)
    sizes = {STATE: features.state_dim, ACTION: features.action_dim}
    statistics = Statistics.of(
        {key: rng.uniform(-1, 1, (100, n)).astype(np.float32) for key, n in sizes.items()}
    )
    torch.manual_seed(0)
    words = replace(job.model.text, encoder="scratch", frozen=False, lr_multiplier=1.0)
    model = VLA(replace(job.model, text=words), features, statistics, instructions=["press the red button"])
    return Policy(model.eval(), job, device)


def play(workers: Any, job: Any, policy: Any, slots: int) -> int:
    """An episode in every slot; the steps of all."""
    from vla.control.schedule import Receding
    from vla.evaluation.episodes import STANDARD, Episode, split_kwargs
    from vla.evaluation.rollouts import Rollouts

    split = next(iter(split_kwargs(job.evaluate)))
    schedules = [Receding(job.evaluate.n_action_steps) for _ in range(slots)]
    rollouts = Rollouts(workers, schedules, policy, Path("films"))
    episodes = [Episode(split, STANDARD, i, job.evaluate.seed + i) for i in range(slots)]
    return sum(row.steps for row in rollouts.play(episodes, progress=False))


def make_one(env_id: str, kwargs: dict[str, Any]) -> Any:
    """An environment, in whichever process."""
    from vla.environment import make_env

    return make_env(env_id, kwargs)[0]


def vector_envs(job: Any, slots: int) -> dict[str, Any]:
    """gymnasium's, in this process and in one each."""
    from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

    from vla.evaluation.episodes import split_kwargs

    kwargs = job.env.kwargs | next(iter(split_kwargs(job.evaluate).values()))
    makers = [partial(make_one, job.env.id, kwargs)] * slots
    return {SYNC: SyncVectorEnv(makers), ASYNC: AsyncVectorEnv(makers, context="spawn")}


def play_vector(env: Any, job: Any, policy: Any, slots: int) -> int:
    """The same episodes in a vector environment; the steps until each is over, which is when all stop."""
    from vla.observation import STATE, TASK, camera_keys

    observation, info = env.reset(seed=[job.evaluate.seed + i for i in range(slots)])
    tasks, over, steps = [str(task) for task in info[TASK]], np.zeros(slots, bool), 0
    while not over.all():
        images = {key.rpartition(".")[2]: observation[key][:, None] for key in camera_keys(observation)}
        chunks = policy.predict_chunk(images, observation[STATE][:, None], tasks)
        for number in range(job.evaluate.n_action_steps):
            action = np.clip(chunks[:, number], env.action_space.low, env.action_space.high)
            observation, _, terminated, truncated, _ = env.step(action)
            steps += int((~over).sum())
            over |= terminated | truncated
    return steps


def split(way: Callable[[], int], policy: Any) -> Row:
    """Milliseconds a step of every part, in a round of its own, and how often each was called."""
    with Parts().around(policy=[(policy, "predict_chunk")], **of_environment()) as parts:
        start = time.perf_counter()
        steps = way()
        seconds = time.perf_counter() - start
    return {"parts_ms": parts.per(steps, seconds), "calls": dict(parts.calls) | {"steps": steps}}
