"""Where the time of a simulation goes: a clock around the calls that make it up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PARTS = ("physics", "rendering", "policy", "judging", "environment", "writing")
LEFT_OVER = "left over"  # within none of these calls


class Parts:
    """Seconds and calls of each part; a part within another one stops the outer one's clock."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.calls: Counter[str] = Counter()
        self._inside: list[str] = []
        self._since = 0.0

    @contextmanager
    def around(self, **calls: list[tuple[Any, str]]) -> Iterator[Parts]:
        """While this lasts, have the (object, name of its function) of each part on the clock."""
        places = [(part, owner, name) for part, places in calls.items() for owner, name in places]
        originals = [(owner, name, vars(owner).get(name)) for _, owner, name in places]
        for part, owner, name in places:
            setattr(owner, name, self._timed(part, getattr(owner, name)))
        try:
            yield self
        finally:
            for owner, name, original in originals:
                if original is None:  # of its class
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)

    def per(self, items: int, seconds: float) -> dict[str, float]:
        """Milliseconds of every part in each of `items`, with what is left over of the seconds they took."""
        spent = {part: 1000 * took / items for part, took in self.seconds.items() if self.calls[part]}
        return spent | {LEFT_OVER: 1000 * (seconds - sum(self.seconds.values())) / items}

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls[part] += 1
            self._switch()
            self._inside.append(part)
            try:
                return function(*arguments, **named)
            finally:
                self._switch()
                self._inside.pop()

        return call

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now


def of_environment() -> dict[str, list[tuple[Any, str]]]:
    """The calls of every tabletop in this process, as Parts.around takes them."""
    import mujoco

    from envs.render import Cameras
    from envs.tabletop import Tabletop

    return {
        "physics": [(mujoco, "mj_step"), (mujoco, "mj_forward")],
        "rendering": [(Cameras, "picture")],
        "judging": [(Tabletop, "judge")],
        "environment": [(Tabletop, "step"), (Tabletop, "reset")],
    }
