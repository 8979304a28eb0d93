"""What the loop took: samples in milliseconds, and what is said about them."""

from __future__ import annotations

import numpy as np
import pytest

from vla.control.stats import SERIES, Stats, summary


def test_percentiles_of_all_and_of_the_last() -> None:
    stats = Stats()
    for i in range(1000):
        stats.add("lateness", i / 1000)
    assert stats.recent("lateness", 10) == pytest.approx(
        {"n": 10, "p50": 994.5, "p99": 998.91, "p999": 998.991, "max": 999}, abs=1e-3
    )
    whole = stats.summary()
    assert whole["lateness_ms"] == pytest.approx(
        {"n": 1000, "p50": 499.5, "p99": 989.01, "p999": 998.001, "max": 999}, abs=1e-3
    )
    assert whole["duration_ms"] == {}
    assert whole["missed"] == 0
    np.testing.assert_allclose(stats.arrays()["lateness"], np.arange(1000), rtol=1e-6)
    assert set(stats.arrays()) == set(SERIES)


def test_nothing_yet() -> None:
    assert Stats().recent("latency", 5) == {}
    assert summary(np.zeros(0)) == {}


def test_an_hour_is_small() -> None:
    stats = Stats()
    for series in stats.samples.values():
        assert series.itemsize * 100 * 3600 <= 1.5e6


def test_a_series_that_is_none_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        Stats().add("speed", 1.0)
