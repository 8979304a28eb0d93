"""Gymnasium environments by their id, for recording and for evaluation alike."""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

from vla.observation import Features


def enable_images(env: Any, enabled: bool) -> None:
    """Have an environment render, or not, where it offers the choice (`images_enabled`)."""
    if hasattr(env.unwrapped, "images_enabled"):
        env.unwrapped.images_enabled = enabled


def enable_last_images(env: Any, enabled: bool) -> None:
    """Have an environment render the observation that ends an episode, which no policy is shown, or not, where
    it offers the choice (`images_at_end`).
    """
    if hasattr(env.unwrapped, "images_at_end"):
        env.unwrapped.images_at_end = enabled


def n_tasks(env: Any) -> int:
    """How many tasks an environment plays in turns: a scene's is number `seed % n_tasks`. 1 where it does not say."""
    return int(getattr(env.unwrapped, "n_tasks", 1))


def make_env(env_id: str, kwargs: dict[str, Any], render: bool = False) -> tuple[gym.Env, Features]:
    """Make an environment by its id (`module:Id-v0`), and read its sizes and control rate.

    render: let it render pictures for films, where it says it can.
    Raises ValueError when the id names nothing, when an argument is not the environment's, when
    its spaces are not the ones policies know, or when it does not say its control rate.
    """
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        creator = gym.spec(name).entry_point
    except (ModuleNotFoundError, gym.error.UnregisteredEnv) as error:
        raise ValueError(
            f"env.id: got {env_id!r} ({str(error).splitlines()[0]}), expected 'module:Id-v0', where "
            "importing the module registers the environment. remedy: check the spelling, and that the module "
            "is on the PYTHONPATH."
        ) from None
    if isinstance(creator, str):
        creator = load_env_creator(creator)
    metadata = getattr(creator, "metadata", None)
    if render and isinstance(metadata, dict) and "rgb_array" in metadata.get("render_modes", ()):
        kwargs = {"render_mode": "rgb_array", **kwargs}
    try:
        env = gym.make(name, disable_env_checker=True, **kwargs)
    except TypeError as error:
        if not any(text in str(error) for text in ("unexpected keyword argument", "takes no arguments")):
            raise  # the environment's own mistake, which its traceback explains
        raise ValueError(
            f"{env_id} does not take these arguments. got: {kwargs} ({error}). "
            "expected: arguments of the environment. remedy: correct env.kwargs or evaluate.splits."
        ) from None
    try:
        fps = env.metadata.get("render_fps")
        if not fps:
            raise ValueError(
                f"{env_id} does not say its control rate. got: metadata {env.metadata}. "
                "expected: metadata['render_fps']. remedy: set it on the environment's class."
            )
        return env, Features.of_spaces(env.observation_space, env.action_space, int(fps))
    except ValueError:
        env.close()
        raise
