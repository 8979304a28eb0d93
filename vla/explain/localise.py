"""Whether attention lies on the thing that the instruction names, against what chance would give.

For environments that can say what each pixel shows: `segmentation(camera) -> (h, w)`, the index of an
item or -1; `goal.target`, the index of the one that is named; `rivals`, those of the others of its kind.
The measures, for every map:

    peak_on_target   the strongest patch overlaps the named item
    peak_on_others   it overlaps another item of the same kind: the mean over those, to compare with the former
    chance           share of patches that overlap the named item: a peak thrown at random
    chance_swapped   peaks of the other scenes' maps laid over this scene: knows where items tend to stand
    most_attended    of the items, the named one has the most attention per pixel (chance: most_chance)
    follows          with another instruction in the same scene, the item first named loses attention (chance ½)

The best single head is chosen on scenes of its own, so that its number is not the best of many dice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vla.explain.episode import Look, play
from vla.policy import Policy
from vla.rates import wilson

IN_VIEW = 0.9  # of the item's first pixels: a later look counts while the hand does not cover it


@dataclass(frozen=True)
class Sighting:
    """One look, and where the items were. maps: name -> (C, side, side); pixels: (C, h, w) bool of the named
    item first, then of its rivals.
    """

    maps: dict[str, np.ndarray]
    pixels: list[np.ndarray]
    alternative: dict[str, np.ndarray] | None = None  # the maps under another instruction

    def cover(self, item: int) -> np.ndarray:
        """Which patches an item overlaps, (C, side, side) bool."""
        pixels, shape = self.pixels[item], self.maps["average"].shape
        camera, y, x = np.nonzero(pixels)
        cover = np.zeros(shape, bool)
        cover[camera, y * shape[1] // pixels.shape[1], x * shape[2] // pixels.shape[2]] = True
        return cover

    def density(self, item: int, weights: np.ndarray) -> float:
        """Mean attention of an item's pixels, a patch's being spread evenly over its pixels."""
        pixels, (_, rows, columns) = self.pixels[item], weights.shape
        camera, y, x = np.nonzero(pixels)
        patch = weights[camera, y * rows // pixels.shape[1], x * columns // pixels.shape[2]]
        return float(patch.mean()) if len(patch) else 0.0


def maps_of(look: Look) -> dict[str, np.ndarray]:
    """Every map to be judged, each a mean over the action tokens: (C, side, side)."""
    views: dict[str, Tensor] = {"average": look.maps.average}
    if look.maps.encoder is not None:
        views["rollout"] = look.maps.rollout
    views |= look.maps.heads
    return {name: look.patches(weights.mean(dim=1)) for name, weights in views.items()}


def sightings(policy: Policy, env: Any, seed: int) -> Iterator[Sighting]:
    """The first look at a scene, and the later ones while the named item is in full view.

    The first carries the maps under another instruction, where the scene has one.
    """
    world, first = env.unwrapped, None
    _, info = env.reset(seed=seed)
    other, target = next(iter(info.get("alternatives", ())), None), world.goal.target
    alternative = None
    if other is not None:
        seen = next(play(policy, env, seed, other))
        alternative = maps_of(seen) if world.goal.target != target else None
    for number, seen in enumerate(play(policy, env, seed)):
        shown = np.stack([world.segmentation(camera) for camera in sorted(seen.images)])  # (C, h, w)
        pixels = [shown == item for item in (target, *world.rivals)]
        visible = int(pixels[0].sum())
        first = visible if first is None else first
        if first == 0 or world.goal.target != target:  # a chain of instructions has gone on
            return
        if visible >= IN_VIEW * first:
            yield Sighting(maps_of(seen), pixels, None if number else alternative)


def measure(looks: list[Sighting], name: str) -> dict[str, Any]:
    """All numbers of one map over some looks, each of another scene."""
    covers = np.stack([s.cover(0).ravel() for s in looks])  # (n, patches)
    peaks = [int(s.maps[name].argmax()) for s in looks]
    on_target = covers[:, peaks]  # (n, n): scene, whose peak
    others = [(s, peak) for s, peak in zip(looks, peaks, strict=True) if len(s.pixels) > 1]
    on_others = [
        np.mean([s.cover(item).ravel()[peak] for item in range(1, len(s.pixels))]) for s, peak in others
    ]
    densities = [[s.density(item, s.maps[name]) for item in range(len(s.pixels))] for s in looks]
    most = [named > max(rivals, default=-1.0) for named, *rivals in densities]
    pairs = [
        s.density(0, s.maps[name]) > s.density(0, s.alternative[name])
        for s in looks
        if s.alternative is not None
    ]
    apart = ~np.eye(len(looks), dtype=bool)
    return {
        "peak_on_target": share(on_target.diagonal()),
        "peak_on_others": float(np.mean(on_others)) if on_others else None,
        "chance": float(covers.mean()),
        "chance_swapped": float(on_target[apart].mean()) if len(looks) > 1 else None,
        "most_attended": share(most),
        "most_chance": float(np.mean([1 / len(s.pixels) for s in looks])),
        "follows": share(pairs),
    }


def share(outcomes: Any) -> dict[str, Any]:
    """A rate with its Wilson interval."""
    n, won = len(outcomes), int(np.sum(outcomes))
    return {"rate": won / n if n else None, "n": n, "wilson_95": list(wilson(won, n))}


def localise(policy: Policy, env: Any, seed: int, episodes: int) -> dict[str, Any]:
    """Judge every map on `episodes` scenes from `seed` on; the next `episodes` scenes choose the best head.

    Raises ValueError for an environment that does not say what its pixels show.
    """
    if not hasattr(env.unwrapped, "segmentation"):
        raise ValueError(
            f"The environment cannot say where the named object is. got: {type(env.unwrapped).__name__} without "
            "segmentation. expected: segmentation(camera) -> (h, w) item indices, goal.target and rivals. remedy: use "
            "envs:Tabletop-v0, or add them to the environment."
        )
    played = [list(sightings(policy, env, seed + i)) for i in range(2 * episodes)]
    judged, others = [[looks for looks in part if looks] for part in (played[:episodes], played[episodes:])]
    if not judged or not others:
        raise ValueError(
            "No scene shows its named object. got: 0 visible. expected: 1 or more. remedy: add a camera that sees it."
        )
    names = list(judged[0][0].maps)
    heads = [name for name in names if name not in ("average", "rollout")]
    chooser = [looks[0] for looks in others]
    rates = {name: measure(chooser, name)["peak_on_target"]["rate"] for name in heads}
    best = max(heads, key=rates.__getitem__)
    second = [looks[1] for looks in judged if len(looks) > 1]
    chosen = [name for name in ("average", "rollout") if name in names] + [best]
    return {
        "scenes": len(judged),
        "patches": list(judged[0][0].maps["average"].shape),
        "best_head": {"name": best, "rate_where_chosen": rates[best], "scenes_where_chosen": len(others)},
        "first_look": {name: measure([looks[0] for looks in judged], name) for name in chosen},
        "second_look": {name: measure(second, name) for name in chosen} if second else {},
        "every_head": {
            name: measure([looks[0] for looks in judged], name)["peak_on_target"] for name in heads
        },
    }
