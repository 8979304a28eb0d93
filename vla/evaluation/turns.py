"""Which episode a free slot plays next.

Environments of many tasks (`n_tasks`, vla/environment.py) spend time and memory on loading one, and a slot that
gets an episode of another split opens another environment. So a slot stays with the split and the task that it has
loaded while episodes of them are waiting. Nothing here depends on time or on the number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vla.evaluation.episodes import Episode

Place = tuple[str, int]  # split, number of the task in it


class Turns:
    """Waiting episodes. With one split and one task, they are taken in the order in which they came."""

    def __init__(self, n_tasks: dict[str, int]) -> None:
        """n_tasks: of each split's environment; 1 for one that is not named."""
        self.n_tasks, self.came = n_tasks, 0
        self.waiting: dict[Place, deque[tuple[int, Episode]]] = {}  # with what number each came; never empty

    def __len__(self) -> int:
        return sum(len(episodes) for episodes in self.waiting.values())

    def place(self, episode: Episode) -> Place:
        return episode.split, episode.seed % self.n_tasks.get(episode.split, 1)

    def extend(self, episodes: Sequence[Episode]) -> None:
        for number, episode in enumerate(episodes, self.came):
            self.waiting.setdefault(self.place(episode), deque()).append((number, episode))
        self.came += len(episodes)

    def take(self, last: Place | None) -> Episode:
        """The next episode for a slot that played `last`; there must be one.

        A slot that has played nothing takes the one that came first. One whose task has none left helps where most
        are waiting, in its own split if it can: those would be the last to end.
        """

        def first(place: Place) -> int:
            return self.waiting[place][0][0]

        if last is None:
            place = min(self.waiting, key=first)
        elif last in self.waiting:
            place = last
        else:
            near = [place for place in self.waiting if place[0] == last[0]] or list(self.waiting)
            place = max(near, key=lambda place: (len(self.waiting[place]), -first(place)))
        episodes = self.waiting[place]
        _, episode = episodes.popleft()
        if not episodes:
            del self.waiting[place]
        return episode
