"""Drawings of the report as inline SVG: intervals and curves, without a plotting library."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from math import ceil, floor, isfinite, log10

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 30
POINTS = 240  # longer curves are averaged down to so many


def interval(share: float | None, low: float, high: float) -> str:
    """A bar from 0 to 100 % with the confidence interval as a band and the rate as a line."""
    if share is None:
        return ""
    x, start, width = 100 * share, 100 * low, 100 * (high - low)
    ticks = "".join(f'<line class="tick" x1="{at}" x2="{at}" y1="0" y2="12"/>' for at in (25, 50, 75))
    return (
        '<svg class="interval" viewBox="0 0 100 12" preserveAspectRatio="none" role="img" '
        f'aria-label="{start:.0f} to {start + width:.0f} %">'
        f'<rect class="track" width="100" height="12" rx="1"/>{ticks}'
        f'<rect class="band" x="{start:.2f}" width="{width:.2f}" y="1.5" height="9" rx="1"/>'
        f'<line class="rate" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="12"/></svg>'
    )


def curve(
    title: str,
    points: list[tuple[float, float]],
    unit: Callable[[float], str],
    top: float = 0.0,
    logarithmic: bool = False,
) -> str:
    """A line over training steps.

    points: (step, value); unit: how a value is written; top: the axis reaches at least there;
    logarithmic: wanted, and done when the values are positive and span a decade.
    Returns "" when there are fewer than two finite points.
    """
    points = thin([point for point in points if isfinite(point[1])])
    if len(points) < 2:
        return ""
    steps, values = [point[0] for point in points], [point[1] for point in points]
    lowest, highest = min(values), max(values)
    logarithmic = logarithmic and lowest > 0 and highest / lowest > 10
    ticks = log_ticks(lowest, highest) if logarithmic else even_ticks(min(lowest, 0), max(highest, top))
    bounds = (min(lowest, ticks[0]), max(highest, ticks[-1]))
    scale: Callable[[float], float] = log10 if logarithmic else float
    first, span = steps[0], (steps[-1] - steps[0]) or 1
    foot, reach = scale(bounds[0]), (scale(bounds[1]) - scale(bounds[0])) or 1

    def x(step: float) -> float:
        return LEFT + (step - first) / span * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (scale(value) - foot) / reach * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{escape(unit(tick))}</text>'
        )
    for step in even_ticks(first, steps[-1]):
        if first <= step <= steps[-1]:
            anchor = "end" if x(step) > WIDTH - 40 else "middle"
            parts.append(
                f'<text x="{x(step):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{short(step)}</text>'
            )
    path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    parts.append(f'<polyline points="{path}"/>')
    parts.append(f'<circle cx="{x(steps[-1]):.1f}" cy="{y(values[-1]):.1f}" r="3.5"/>')
    last = escape(unit(values[-1]))
    return (
        f'<figure class="curve"><figcaption>{escape(title)} <b>{last}</b></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}, last {last}">'
        f"{''.join(parts)}</svg></figure>"
    )


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points, each the mean of its neighbours; the last stays what it is."""
    size = ceil(len(points) / POINTS)
    if size <= 1:
        return points
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    means = [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]
    return [*means[:-1], points[-1]]


def even_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from `low` to at least `high`."""
    span = (high - low) or abs(high) or 1
    rough = span / 4
    power = 10 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [step * number for number in range(floor(low / step), ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around the values, with their 3s when they are few."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    factors = (1, 3) if len(powers) <= 3 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]


def short(number: float) -> str:
    """1500 -> 1.5k; 0.00025 -> 2.5e-4."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    if 0 < abs(number) < 0.01:
        mantissa, _, exponent = f"{number:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{number:.3g}"
