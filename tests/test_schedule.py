import numpy as np
import pytest

from vla.config import EvaluateConfig
from vla.control.schedule import Ensemble, Receding, make_schedule

H, A = 5, 3


def chunks(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, H, A)).astype(np.float32)


def test_receding_executes_the_first_actions():
    schedule, (chunk,) = Receding(2), chunks(1)
    assert schedule.replan_every == 2
    np.testing.assert_array_equal(schedule.plan(chunk), chunk[:2])
    with pytest.raises(ValueError, match="got 6, expected at most the chunk's 5"):
        Receding(6).plan(chunk)


@pytest.mark.parametrize("coefficient", [0.01, 0.5])
def test_ensemble_equals_its_offline_formula(coefficient):
    """Over a whole episode at once: all predictions in a (made at, valid at) table, as the paper has it."""
    n = 3 * H
    predicted = chunks(n)
    table = np.full((n, n + H, A), np.nan)
    for made, chunk in enumerate(predicted):
        table[made, made : made + H] = chunk
    schedule = Ensemble(coefficient, H)
    for now, chunk in enumerate(predicted):
        column = table[: now + 1, now]
        column = column[~np.isnan(column).any(1)]  # oldest first
        weights = np.exp(-coefficient * np.arange(len(column)))
        expected = (column * (weights / weights.sum())[:, None]).sum(0)
        np.testing.assert_allclose(schedule.plan(chunk), expected[None], rtol=1e-5, atol=1e-6)


def test_ensemble_favours_the_oldest_prediction():
    schedule = Ensemble(1.0, 2)
    schedule.plan(np.array([[0.0], [1.0]]))
    np.testing.assert_allclose(schedule.plan(np.zeros((2, 1))), [[1 / (1 + np.exp(-1))]], rtol=1e-6)


def test_ensemble_forgets_the_episode_before():
    first, second = chunks(2)
    schedule = Ensemble(0.1, H)
    schedule.plan(first)
    schedule.reset()
    np.testing.assert_allclose(schedule.plan(second), second[:1], rtol=1e-6)


def test_make_schedule_follows_the_configuration():
    assert make_schedule(EvaluateConfig(n_action_steps=4), 8).replan_every == 4
    assert isinstance(make_schedule(EvaluateConfig(ensemble=0.01), 8), Ensemble)
