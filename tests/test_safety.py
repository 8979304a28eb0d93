"""For any target whatsoever, every command is finite and legal."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.checks import ConfigError
from vla.control.config import LimitsConfig
from vla.control.safety import Audit, Limiter, Limits, nowhere

DT = 0.01
TWO = LimitsConfig((-1.0, -0.5), (1.0, 0.5), (2.0, 1.0), (15.0, 8.0), (600.0, 300.0))
BOXED = dataclasses.replace(TWO, workspace_lower=(-0.8, -0.6, -0.1), workspace_upper=(0.8, 0.6, 0.9))


def bent(joints: np.ndarray) -> np.ndarray:
    """A hand whose way between two allowed poses may leave the box."""
    x, y = joints.T
    return np.stack([np.sin(1.2 * x), x * y + 0.5 * y, x**2], axis=1)


CASES = [(TWO, nowhere), (BOXED, bent)]
any_number = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.floats(-1.5, 1.5), st.sampled_from([1.0, -1.0, 0.5, -0.5])
)  # fmt: skip
vector = st.lists(any_number, min_size=2, max_size=2).map(np.array)


def play(
    limiter: Limiter, audit: Audit, target: np.ndarray | None, velocity: np.ndarray | None, ticks: int
) -> None:
    for _ in range(ticks):
        command = limiter.step(target, velocity)
        assert np.isfinite(command).all()
        assert audit.check(command), command


@pytest.mark.parametrize("case", [0, 1], ids=["joints", "workspace"])
@given(orders=st.lists(st.tuples(st.none() | vector, st.none() | vector, st.integers(1, 30)), max_size=30))
@settings(max_examples=60, deadline=None)
def test_every_command_is_legal_for_any_targets(case: int, orders: list) -> None:
    config, position = CASES[case]
    limits = Limits(config, position)
    limiter, audit = Limiter(limits, DT), Audit(limits, DT)
    limiter.reset(np.zeros(2))
    audit.reset(np.zeros(2))
    for target, velocity, ticks in orders:
        play(limiter, audit, target, velocity, ticks)


@pytest.mark.parametrize("case", [0, 1], ids=["joints", "workspace"])
def test_every_command_is_legal_under_noise(case: int) -> None:
    """Targets that jump at every tick, between and beyond the limits, for long."""
    config, position = CASES[case]
    limits = Limits(config, position)
    limiter, audit, rng = Limiter(limits, DT), Audit(limits, DT), np.random.default_rng(case)
    limiter.reset(np.zeros(2))
    audit.reset(np.zeros(2))
    for _ in range(4000):
        scale = 10 ** rng.uniform(-2, 1)
        play(limiter, audit, rng.normal(size=2) * scale, rng.normal(size=2) * 10 * scale, 1)
    assert limiter.clamped > 1000


def test_reaches_a_target_and_rests_there() -> None:
    limiter, target = Limiter(Limits(TWO), DT), np.array([0.7, -0.4])
    limiter.reset(np.zeros(2))
    for _ in range(200):
        command = limiter.step(target)
    np.testing.assert_allclose(command, target, atol=1e-9)
    assert limiter.at_rest
    assert (limiter.clamped, limiter.braked) == (0, 0)


def test_follows_a_moving_target_without_lag() -> None:
    limiter = Limiter(Limits(TWO), DT)
    limiter.reset(np.zeros(2))
    velocity = np.array([0.4, -0.2])
    for tick in range(1, 101):
        command = limiter.step(velocity * tick * DT, velocity)
    np.testing.assert_allclose(command, velocity, atol=1e-6)


def test_stops_soon_and_stays() -> None:
    limiter = Limiter(Limits(TWO), DT)
    limiter.reset(np.zeros(2))
    for _ in range(30):
        limiter.step(np.array([1.0, 0.5]))
    moving = limiter.command
    stopped = [limiter.step(None) for _ in range(60)]
    assert limiter.at_rest
    assert (stopped[-1] > moving).all()  # it came to rest behind where it was, not by a jump
    np.testing.assert_array_equal(stopped[-1], stopped[-10])


def test_a_target_outside_is_cut_and_counted() -> None:
    limiter = Limiter(Limits(BOXED, bent), DT)
    limiter.reset(np.zeros(2))
    for _ in range(300):
        command = limiter.step(np.array([3.0, 0.0]))
    assert limiter.clamped == 300
    assert (
        0.7 < np.sin(1.2 * command[0]) <= 0.8 + 1e-6
    )  # the wall of the workspace, not the joint's limit of 1


def test_the_workspace_is_guarded_on_the_way_too() -> None:
    """Both ends are allowed, the straight way between them is not: the arm stops before it leaves."""
    config = dataclasses.replace(TWO, workspace_lower=(-9.0, -9.0, 0.2), workspace_upper=(9.0, 9.0, 9.0))
    limits = Limits(config, bent)  # z = x² must stay above 0.2
    limiter, audit = Limiter(limits, DT), Audit(limits, DT)
    limiter.reset(np.array([-0.8, 0.0]))
    audit.reset(np.array([-0.8, 0.0]))
    play(limiter, audit, np.array([0.8, 0.0]), None, 300)
    assert -0.8 < limiter.command[0] <= -np.sqrt(0.2) + 1e-6
    assert limiter.braked > 0


@pytest.mark.parametrize("joints", [[1.01, 0.0], [np.nan, 0.0], [0.0, -np.inf]])
def test_a_pose_outside_is_no_beginning(joints: list[float]) -> None:
    with pytest.raises(ValueError, match=r"(?s)got: .*expected: .*remedy: "):
        Limiter(Limits(TWO), DT).reset(np.array(joints))


@pytest.mark.parametrize(
    ("commands", "what"),
    [
        ([[0.0, 0.0], [0.03, 0.0]], "velocity"),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.009]], "acceleration"),
        ([[0.99, 0.0], [1.1, 0.0]], "position"),
        ([[0.0, 0.0], [np.nan, 0.0]], "finite"),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0007], [0.0, 0.0014], [0.0, 0.0014]], "jerk"),
    ],
)
def test_the_audit_sees_what_is_illegal(commands: list[list[float]], what: str) -> None:
    audit = Audit(Limits(TWO), DT)
    audit.reset(np.array(commands[0]))
    verdicts = [audit.check(np.array(command)) for command in commands]
    assert not verdicts[-1], what
    assert audit.illegal >= 1


def test_limits_that_cannot_be() -> None:
    for wrong in (
        {"lower": (2.0, -0.5)}, {"velocity": (2.0,)}, {"jerk": (0.0, 1.0)}, {"upper": (float("nan"), 1.0)},
        {"workspace_lower": (0.0, 0.0, 0.0)}, {"acceleration": (float("inf"), 1.0)},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"limits\.\w+: got .*, expected .* remedy: "):
            dataclasses.replace(TWO, **wrong)


def test_a_planner_that_errs_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trajectories that jump, or hide one later on: no illegal command comes of them."""
    honest = Limiter._at
    limits = Limits(TWO)
    limiter, audit = Limiter(limits, DT), Audit(limits, DT)
    limiter.reset(np.zeros(2))
    audit.reset(np.zeros(2))
    play(limiter, audit, np.array([0.5, 0.3]), None, 20)
    for wrong_at in (DT, 3 * DT):

        def wrong(trajectory: Any, time: float, wrong_at: float = wrong_at) -> Any:
            motion = honest(trajectory, time)
            return dataclasses.replace(motion, p=motion.p + 0.01) if time == wrong_at else motion

        monkeypatch.setattr(Limiter, "_at", staticmethod(wrong))
        play(limiter, audit, np.array([0.9, 0.4]), None, 5)
        assert limiter.braked > 0
        limiter.braked = 0


@pytest.mark.parametrize("hand", [lambda joints: np.full((len(joints), 3), np.nan), lambda joints: 1 / 0])
def test_a_hand_that_cannot_be_found_is_nowhere_allowed(hand: Any) -> None:
    limits = Limits(BOXED, bent)
    limiter, audit = Limiter(limits, DT), Audit(limits, DT)
    limiter.reset(np.zeros(2))
    audit.reset(np.zeros(2))
    play(limiter, audit, np.array([0.5, 0.3]), None, 20)
    limits.position = hand
    for _ in range(100):
        assert np.isfinite(limiter.step(np.array([-0.5, 0.3]))).all()
    assert limiter.at_rest
    assert limiter.braked == 100


def test_limits_whose_stop_takes_too_many_ticks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"limits\.acceleration: .*200 ticks"):
        Limiter(Limits(dataclasses.replace(TWO, acceleration=(0.5, 0.5))), DT)
