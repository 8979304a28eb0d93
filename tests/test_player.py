"""Chunks are played by consumed steps, whatever is late."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.checks import ConfigError
from vla.control.config import SCHEDULES
from vla.control.player import Player

H = 8


def player(schedule: str, n_action_steps: int = 4, max_prefix: int = 4) -> Player:
    return Player(schedule, H, n_action_steps, max_prefix)


def chunk(start: int, worth: float = 0.0) -> np.ndarray:
    """Every action says which step it is for, and of which chunk."""
    return np.stack([np.arange(start, start + H), np.full(H, worth)], axis=1).astype(np.float32)


@pytest.mark.parametrize("schedule", sorted({*SCHEDULES} - {"naive"}))
@given(delays=st.lists(st.integers(0, 12), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_every_action_is_the_one_of_its_step(schedule: str, delays: list[int]) -> None:
    """Whatever the delays, action k of the robot is some chunk's action for step k, and none is skipped."""
    p, taken, due, ask = player(schedule), [], None, None
    waiting = 0
    for delay in delays * 3:
        if ask is None and (ask := p.wish()) is not None:
            due = delay
        if ask is not None and due == 0:
            p.receive(chunk(ask.start))
            ask = None
        action = p.take()
        waiting = waiting + 1 if action is None else 0
        if action is not None:
            taken.append(action[0])
        due = max(0, due - 1) if due is not None else None
    np.testing.assert_array_equal(taken, np.arange(len(taken)))


def test_receding_plays_then_waits() -> None:
    p = player("receding", n_action_steps=3)
    wish = p.wish()
    assert wish is not None
    assert p.wish() is None  # one question at a time
    assert p.take() is None
    assert p.receive(chunk(0))
    assert [p.take() is not None for _ in range(4)] == [True, True, True, False]
    again = p.wish()
    assert again is not None
    assert again.start == 3


@pytest.mark.parametrize(("schedule", "step"), [("aligned", 6), ("naive", 4)])
def test_a_late_chunk_is_begun_at_the_present_step_or_naively_at_its_first(schedule: str, step: int) -> None:
    p = player(schedule)
    p.wish()
    p.receive(chunk(0, worth=1))
    for _ in range(4):
        p.take()
    wish = p.wish()
    assert wish is not None
    assert wish.start == 4
    p.take(), p.take()  # the answer is two steps late
    p.receive(chunk(4, worth=2))
    action = p.take()
    assert action is not None
    assert action.tolist() == [step, 2]


def test_prefix_continues_exactly_what_was_committed() -> None:
    p = player("prefix")
    p.wish()
    p.receive(chunk(0, worth=1))
    p.delays.append(2)  # an answer that took two steps: three are committed
    for _ in range(4):
        p.take()
    wish = p.wish()
    assert wish is not None
    assert wish.start == 4
    np.testing.assert_array_equal(wish.prefix, chunk(0, worth=1)[4:7])
    worth = []
    for _ in range(3):
        action = p.take()
        assert action is not None
        worth.append(action[1])
    assert p.receive(chunk(4, worth=2))  # three late, as committed
    action = p.take()
    assert action is not None
    assert [*worth, action[1]] == [1, 1, 1, 2]


def test_prefix_drops_an_answer_that_came_after_uncommitted_actions() -> None:
    p = player("prefix", max_prefix=1)
    p.wish()
    p.receive(chunk(0, worth=1))
    for _ in range(4):
        p.take()
    p.wish()
    p.take(), p.take()  # one was committed
    assert not p.receive(chunk(4, worth=2))
    assert p.late == 1
    action = p.take()
    assert action is not None
    assert action[1] == 1  # the old chunk goes on


def test_prefix_never_commits_more_than_was_trained() -> None:
    p = player("prefix", max_prefix=2)
    p.wish()
    p.receive(chunk(0))
    p.delays.append(7)
    p.take(), p.take(), p.take(), p.take()
    wish = p.wish()
    assert wish is not None
    assert len(wish.prefix) == 2


def test_ensemble_is_the_weighted_average_of_what_speaks_of_now() -> None:
    p = Player("ensemble", H, 4, 0, ensemble=0.5)
    for worth in (1.0, 2.0, 4.0):
        p.wish()
        p.receive(chunk(p.step, worth))
        action = p.take()
    assert action is not None
    weights = np.exp(-0.5 * np.arange(3))
    expected = weights @ [1.0, 2.0, 4.0] / weights.sum()
    np.testing.assert_allclose(action, [2, expected], rtol=1e-6)


def test_a_new_instruction_is_asked_for_at_once_and_stands_alone() -> None:
    p = player("ensemble")
    p.wish()
    p.receive(chunk(0, worth=1))
    p.take()
    p.wish()
    wish = p.wish(urgent=True)  # though one is under way
    assert wish is not None
    p.receive(chunk(wish.start, worth=5))
    action = p.take()
    assert action is not None
    assert action[1] == 5


def test_what_cannot_be_played() -> None:
    for wrong in (
        dict(schedule="fast"), dict(n_action_steps=9), dict(n_action_steps=0), dict(schedule="prefix", max_prefix=0),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="remedy"):
            Player(**(dict(schedule="naive", chunk_size=8, n_action_steps=4, max_prefix=4) | wrong))


def test_a_new_instruction_is_asked_for_without_a_prefix_and_its_answer_is_never_too_late() -> None:
    p = player("prefix")
    p.wish()
    p.receive(chunk(0, worth=1))
    p.take()
    wish = p.wish(urgent=True)
    assert wish is not None
    assert wish.prefix.size == 0
    p.take(), p.take()
    assert p.receive(chunk(wish.start, worth=5))
    action = p.take()
    assert action is not None
    assert action.tolist() == [3, 5]
