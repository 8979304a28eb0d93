"""`--env.type=tabletop`: every skill is a suite of LeRobot's, and the splits are its tasks.

Importing this module imports lerobot, and not MuJoCo: a configuration does, when it is made. A wrong one raises
draccus.ParsingError, as draccus puts one that says nothing in the place of a ValueError.
"""

from __future__ import annotations

import inspect
import multiprocessing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from draccus import ParsingError
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end

from envs import splits
from vla.observation import ACTION, IMAGES, IS_SUCCESS, STATE

FPS = 10
# What LeRobot's asynchronous environments import, each in a process of its own: seconds for every one of them,
# unless the process that they are forked from has it already.
PRELOADED = ["__main__", "lerobot.scripts.lerobot_eval", __name__]
FLAGS = {"skills": "--env.task", "split": "--env.splits"}  # arguments of Tabletop's that have their own


@EnvConfig.register_subclass("tabletop")
@dataclass
class TabletopEnv(EnvConfig):
    """The tabletop as `lerobot-eval` and `lerobot-train` make it.

    features and features_map follow from the others. Raises draccus.ParsingError for a wrong choice.
    """

    task: str | None = None  # skills, comma-separated, each a suite; none given: all seven
    fps: int = FPS  # the tabletop's, not to be changed
    splits: list[str] = field(default_factory=lambda: ["L0"])  # a task's id is its place in this list
    kwargs: dict[str, Any] = field(default_factory=dict)  # of Tabletop, as the demonstrations had them

    def __post_init__(self) -> None:
        for name, expected, why in (
            ("fps", FPS, "the rate of the tabletop's control"),
            ("max_parallel_tasks", 1, "tasks played at once would share one policy's queue of actions"),
        ):
            if getattr(self, name) != expected:
                raise ParsingError(
                    f"env.{name}: got {getattr(self, name)}, expected {expected} ({why}). "
                    f"remedy: leave out --env.{name}."
                )
        skill, tasks = next(iter(self.suites().items()))
        env = self._look(skill, next(iter(tasks.values())))
        seen: Any = env.observation_space
        spaces = {**seen.spaces, ACTION: env.action_space}
        # Under the policy's own names, the only ones under which LeRobot's recording finds pictures.
        self.features = {name: feature(name, space) for name, space in spaces.items()}
        self.features_map = {name: name for name in spaces}

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return dict(self.kwargs)

    def suites(self) -> dict[str, dict[int, str]]:
        """Skill -> id of a task -> its split. Raises ParsingError for an unknown name, or when nothing is left."""
        from envs.tasks import SKILLS

        given = list(SKILLS) if self.task is None else [name.strip() for name in self.task.split(",")]
        for name, got, allowed in (("task", given, list(SKILLS)), ("splits", self.splits, splits.SPLITS)):
            if not got or len(set(got)) < len(got) or not set(got) <= set(allowed):
                raise ParsingError(
                    f"env.{name}: got {got}, expected some of {', '.join(allowed)}, each once. "
                    f"remedy: correct --env.{name}."
                )
        able = {split: splits.SKILLS_OF_SPLIT.get(split, tuple(SKILLS)) for split in self.splits}
        suites = {
            skill: {number: split for number, split in enumerate(self.splits) if skill in able[split]}
            for skill in given
        }
        if not any(suites.values()):
            some = sorted({skill for skills in able.values() for skill in skills})
            raise ParsingError(
                f"env.splits: got {self.splits} for {given}, expected one that these skills have. remedy: "
                f"add another to --env.splits, or one of {', '.join(some)} to --env.task."
            )
        return {skill: tasks for skill, tasks in suites.items() if tasks}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """Suite -> id of a task -> n_envs environments. An episode that has ended stands still, as in LeRobot's
        own suites, until a reset with LeRobot's NEW_ROLLOUT_OPTION.
        """
        apart = use_async_envs and n_envs > 1
        if apart:
            multiprocessing.set_forkserver_preload(PRELOADED)
        envs: dict[str, dict[int, Any]] = {}
        for skill, tasks in self.suites().items():
            for number, split in tasks.items():
                makers = [partial(TabletopTask, skill, split, self.gym_kwargs)] * n_envs
                if apart:
                    one = makers[0]()
                    vector = _LazyAsyncVectorEnv(
                        makers, one.observation_space, one.action_space, one.metadata
                    )
                else:
                    frozen = [freeze_after_episode_end(maker) for maker in makers]
                    mode = gym.vector.AutoresetMode.NEXT_STEP
                    vector = gym.vector.SyncVectorEnv(frozen, autoreset_mode=mode)
                envs.setdefault(skill, {})[number] = vector
        return envs

    def _look(self, skill: str, split: str) -> gym.Env[dict[str, Any], np.ndarray]:
        """A tabletop with these arguments, which takes milliseconds as long as it renders nothing."""
        from envs.tabletop import Tabletop

        known = [
            name for name in inspect.signature(Tabletop).parameters if name not in ("render_mode", *FLAGS)
        ]
        for name in self.kwargs:
            if name not in known:
                remedy = f"use {FLAGS[name]}" if name in FLAGS else "correct --env.kwargs"
                raise ParsingError(
                    f"env.kwargs: got {name!r}, expected some of {', '.join(known)}. remedy: {remedy}."
                )
        try:
            return Tabletop(skills=[skill], split=split, **self.kwargs)
        except ValueError as error:
            raise ParsingError(f"env.kwargs: {error}") from None
        except (TypeError, AttributeError) as error:  # a value of another type
            raise ParsingError(
                f"env.kwargs: got {self.kwargs} ({error}), expected values as in configs/*.yaml. "
                "remedy: correct --env.kwargs."
            ) from None


def feature(name: str, space: gym.Space[Any]) -> PolicyFeature:
    """What LeRobot says of an observation or of the action; pictures are (height, width, 3)."""
    types = {ACTION: FeatureType.ACTION, STATE: FeatureType.STATE}
    return PolicyFeature(types.get(name, FeatureType.VISUAL), tuple(space.shape or ()))


class TabletopTask(gym.Wrapper[dict[str, Any], np.ndarray, dict[str, Any], np.ndarray]):
    """One skill in one split, with the names that LeRobot's rollouts ask for.

    Observations: "pixels" -> camera -> (pixels, pixels, 3) uint8, "agent_pos" (P,) float32, from which LeRobot
    makes observation.state, and the same again as "observation.state", the name that its recording looks for.
    """

    def __init__(self, skill: str, split: str, kwargs: dict[str, Any]) -> None:
        super().__init__(
            gym.make("envs:Tabletop-v0", disable_env_checker=True, skills=[skill], split=split, **kwargs)
        )
        self.task = f"{skill}/{split}"
        inner: Any = self.env.observation_space
        self.observation_space = gym.spaces.Dict(arrange(inner.spaces, gym.spaces.Dict))

    @property
    def task_description(self) -> str:
        """The instruction, which changes on the way where two follow each other."""
        return self.env.unwrapped.task  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _max_episode_steps(self) -> int:
        """Of this episode, which has begun, and so of all of its task."""
        return self.env.unwrapped.limit  # pyright: ignore[reportAttributeAccessIssue]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return arrange(observation), {IS_SUCCESS: info[IS_SUCCESS]}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return arrange(observation), float(reward), terminated, truncated, {IS_SUCCESS: info[IS_SUCCESS]}


def arrange(flat: dict[str, Any], nest: Any = dict) -> dict[str, Any]:
    """Our flat names -> the names of LeRobot's rollouts; of observations, or of spaces with nest=spaces.Dict."""
    pixels = {name.removeprefix(IMAGES): value for name, value in flat.items() if name.startswith(IMAGES)}
    return {"pixels": nest(pixels), "agent_pos": flat[STATE], STATE: flat[STATE]}
