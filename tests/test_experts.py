"""The experts: success over scenes, clean and with noise; clean labels in range."""

from __future__ import annotations

import numpy as np
import pytest

from envs.tabletop import Tabletop
from envs.tasks import SKILLS


def success_rate(skill: str, episodes: int, noise: float, split: str = "train") -> float:
    """Share of scenes solved with N(0, noise) added to the executed actions."""
    env = Tabletop(skills=[skill], split=split, cameras=["front"], pixels=16)
    env.images_enabled = False
    solved = 0
    for seed in range(episodes):
        env.reset(seed=seed)
        rng, over = np.random.default_rng(seed), False
        while not over:
            action = env.expert_action()
            assert action.shape == (5,)
            assert action.dtype == np.float32
            assert np.abs(action).max() <= 1
            *_, terminated, truncated, info = env.step(action + rng.normal(0, noise, 5))
            over = terminated or truncated
        solved += info["is_success"]
    return solved / episodes


@pytest.mark.parametrize("skill", list(SKILLS))
def test_experts_solve_twenty_scenes(skill: str) -> None:
    assert success_rate(skill, 20, 0.0) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "least"), [(0.0, 0.99), (0.2, 0.95)])
@pytest.mark.parametrize("skill", list(SKILLS))
def test_experts_solve_a_hundred_scenes(skill: str, noise: float, least: float) -> None:
    assert success_rate(skill, 100, noise) >= least


@pytest.mark.slow
@pytest.mark.parametrize("split", ["L1", "L3"])
def test_experts_solve_what_training_never_shows(split: str) -> None:
    for skill in ("push", "put") if split == "L1" else SKILLS:
        assert success_rate(skill, 30, 0.0, split) >= 0.96


def test_experts_are_stateless() -> None:
    """Asked twice, or after a question about another goal, they say the same."""
    env = Tabletop(skills=["put"], cameras=["front"], pixels=16)
    env.images_enabled = False
    _, info = env.reset(seed=3)
    for _ in range(15):
        action = env.expert_action()
        for other in info["alternatives"][:4]:
            assert env.expert_action(other).shape == (5,)
        assert np.array_equal(env.expert_action(), action)
        env.step(action)


def test_expert_for_another_instruction_is_its_expert() -> None:
    """What relabelling a frame needs: the other goal's action in this very state."""
    env = Tabletop(skills=["press"], cameras=["front"], pixels=16)
    env.images_enabled = False
    _, info = env.reset(seed=4)
    other = info["alternatives"][0]
    relabelled = env.expert_action(other)
    assert not np.allclose(relabelled, env.expert_action())
    env.reset(seed=4, options={"task": other})
    assert np.array_equal(env.expert_action(), relabelled)
