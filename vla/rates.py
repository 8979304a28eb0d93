"""Shares of successes, with the interval that n allows."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95 % by default; (0, 1) when nothing was tried.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def rate(outcomes: Iterable[bool]) -> dict[str, Any]:
    """success_rate (None when nothing was tried), n_episodes and wilson_95 of some outcomes."""
    outcomes = [bool(outcome) for outcome in outcomes]
    won, n = sum(outcomes), len(outcomes)
    return {"success_rate": won / n if n else None, "n_episodes": n, "wilson_95": list(wilson(won, n))}
