"""One environment slot of an evaluation: episodes begin, advance and end in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.environment import enable_images, enable_last_images, make_env, n_tasks
from vla.evaluation.episodes import Episode
from vla.evaluation.video import Film
from vla.observation import ACTION, IMAGES, IS_SUCCESS, STATE, TASK, Features


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know before the first command."""

    env_id: str
    env_kwargs: dict[str, Any]
    splits: dict[str, dict[str, Any]]
    slots: tuple[int, ...]  # the rows of the shared memory that are this worker's
    n_obs_steps: int
    n_action_steps: int
    expert: bool  # the environment's own expert acts
    films: Path  # folder


@dataclass(frozen=True)
class Sight:
    """What an episode shows when it begins."""

    task: str
    skill: str
    alternatives: list[str]


@dataclass(frozen=True)
class Progress:
    """Where an episode stands after some steps."""

    task: str
    steps: int
    done: bool
    success: bool
    film: Path | None


class Unsuitable(ValueError):
    """An environment that does not follow the protocol: got, expected, remedy."""

    def __init__(self, got: str, expected: str, remedy: str) -> None:
        super().__init__(
            f"The environment cannot be evaluated. got: {got}. expected: {expected}. remedy: {remedy}."
        )


class Slot:
    """One environment and its row in the shared memory. Other splits' episodes get a fresh environment."""

    def __init__(self, setup: Setup, split: str) -> None:
        self.setup = setup
        self.env: Any = None  # a gym.Env; its spaces and its expert are beyond that type
        self.film: Film | None = None
        self.features = self._open(split)

    def close(self) -> None:
        if self.env is not None:
            self.env.close()

    def _open(self, split: str) -> Features:
        self.close()
        self.split = split
        kwargs = {**self.setup.env_kwargs, **self.setup.splits[split]}
        self.env, features = make_env(self.setup.env_id, kwargs, render=True)
        self.fps, self.n_tasks = features.fps, n_tasks(self.env)
        if self.setup.expert and not hasattr(self.env.unwrapped, "expert_action"):
            expected = "a method expert_action() -> (A,) float32"
            raise Unsuitable("no expert", expected, "write one, or evaluate a checkpoint instead")
        return features

    def attach(self, arrays: dict[str, np.ndarray], row: int) -> None:
        """arrays: the shared memory of pool.py; row: this slot's."""
        self.images = {name: array[row] for name, array in arrays.items() if name.startswith(IMAGES)}
        self.state, self.actions = arrays[STATE][row], arrays[ACTION][row]

    def begin(self, episode: Episode) -> Sight:
        """Reset to an episode; the history is its first observation, repeated.

        There is a picture in it only if the policy or a film shows it: an expert looks at none.
        """
        if episode.split != self.split:
            self._open(episode.split)
        by_camera = episode.film and self.env.render_mode != "rgb_array"
        enable_images(self.env, by_camera or not self.setup.expert)
        options = {} if episode.task is None else {"task": episode.task}
        assert self.env is not None
        observation, info = self.env.reset(seed=episode.seed, options=options)
        for name, history in self.images.items():
            put(name, observation[name], history)
        put(STATE, observation[STATE], self.state)
        for key in (TASK, IS_SUCCESS):
            if key not in info:
                got, expected = f"info with {sorted(info)}", f"info[{TASK!r}] and info[{IS_SUCCESS!r}]"
                raise Unsuitable(got, expected, "add them to the info of reset and step")
        self.steps, self.task = 0, str(info[TASK])
        if episode.film:
            name = re.sub(r"[^\w.-]+", "_", episode.name)
            self.film = Film(self.setup.films / f"{name}.mp4", self.fps)
            self._picture(observation)
        enable_last_images(self.env, self._filmed_by_camera)
        others = [str(text) for text in info.get("alternatives", ())]
        return Sight(self.task, str(info.get("skill", "")), others)

    def advance(self) -> Progress:
        """Execute the planned actions; an episode ends with its first success, or as the environment says.

        Pictures are made only for steps that the policy or the film will show.
        """
        env, done, success = self.env, False, False
        assert env is not None
        unseen = self.setup.n_action_steps - (0 if self.setup.expert else self.setup.n_obs_steps)
        filmed_by_camera = self._filmed_by_camera
        low, high = env.action_space.low, env.action_space.high
        for number in range(self.setup.n_action_steps):
            seen = number >= unseen or filmed_by_camera
            enable_images(self.env, seen)
            action = env.unwrapped.expert_action() if self.setup.expert else self.actions[number]
            observation, _, terminated, truncated, info = env.step(np.clip(action, low, high))
            self.steps += 1
            self.task, success = str(info[TASK]), bool(info[IS_SUCCESS])
            self._remember(STATE, observation[STATE], self.state)
            if seen:
                for name, history in self.images.items():
                    self._remember(name, observation[name], history)
            if self.film is not None:
                self._picture(observation)
            done = success or bool(terminated) or bool(truncated)
            if done:
                break
        return Progress(self.task, self.steps, done, success, self.end() if done else None)

    def end(self) -> Path | None:
        """Close the episode's film, if there is one."""
        film, self.film = self.film, None
        return film.close() if film is not None else None

    @property
    def _filmed_by_camera(self) -> bool:
        """Whether the film shows what the policy sees, since the environment has nothing better."""
        return self.film is not None and self.env.render_mode != "rgb_array"

    def _picture(self, observation: dict[str, np.ndarray]) -> None:
        env, film = self.env, self.film
        assert env is not None
        assert film is not None
        picture: Any = env.render() if env.render_mode == "rgb_array" else observation[min(self.images)]
        film.add(np.asarray(picture))

    @staticmethod
    def _remember(key: str, newest: Any, history: np.ndarray) -> None:
        """history: (T, ...), oldest first."""
        if len(history) > 1:
            history[:-1] = history[1:].copy()
        put(key, newest, history[-1:])


def put(key: str, value: Any, target: np.ndarray) -> None:
    """Write an observation (...) into every row of target (T, ...).

    Raises Unsuitable for another shape or type: float images in [0, 1] would silently turn black.
    """
    value = np.asarray(value)
    casting = "safe" if target.dtype == np.uint8 else "same_kind"
    if value.shape != target.shape[1:] or not np.can_cast(value.dtype, target.dtype, casting):
        got = f"observation[{key!r}] of shape {value.shape}, {value.dtype}"
        expected = f"shape {target.shape[1:]}, {target.dtype}, as the observation space says"
        raise Unsuitable(got, expected, "convert it in a wrapper")
    np.copyto(target, value, casting=casting)
