"""Which frame of a dataset is drawn when, if only a window of it can be held: a shuffle without a list.

    N frames of the dataset   E episodes   G positions in a block   R = 16 blocks in the window

The episodes of one pass, shuffled, lie behind those of the pass before: position p of this endless row
is a frame. It is drawn at the time p / G + R u, in blocks, with u uniform in [0, 1): each frame exactly
once a pass, up to R blocks behind its place, beside frames from all over the window. Everything follows
from (seed, block), so that a run can go on at any place without the draws before it.
"""

from __future__ import annotations

import functools

import numpy as np

RESIDENCE = 16  # R


class Order:
    """lengths: (E,) of the episodes; shown: (E,) how many frames of each count as its start."""

    def __init__(self, lengths: np.ndarray, shown: np.ndarray, block: int, seed: int) -> None:
        self.lengths, self.shown, self.block, self.seed = lengths, shown, block, seed
        self.first = np.cumsum(lengths) - lengths  # (E,) frame that each episode begins with
        self.size, self.starts = int(lengths.sum()), int(shown.sum())  # of a pass
        self._pass = functools.lru_cache(8)(self._shuffled)

    def drawn(self, block: int) -> np.ndarray:
        """The positions drawn at times [block, block + 1), in their order; all before (block + 1) * G."""
        earliest = max(0, block - RESIDENCE)
        late = [
            np.random.default_rng([self.seed, 1, b]).random(self.block) for b in range(earliest, block + 1)
        ]
        place = np.arange(earliest * self.block, (block + 1) * self.block)
        when = place / self.block + RESIDENCE * np.concatenate(late)
        inside = np.flatnonzero(np.floor(when) == block)
        return place[inside[np.argsort(when[inside], kind="stable")]]

    def window(self, block: int) -> tuple[int, int]:
        """First and last + 1 position that may be drawn in a block."""
        return max(0, block - RESIDENCE) * self.block, (block + 1) * self.block

    def frames(self, positions: np.ndarray) -> np.ndarray:
        """The frames (n,) at positions (n,)."""
        frames = np.empty(len(positions), np.int64)
        for p in np.unique(positions // self.size):
            rows = np.flatnonzero(positions // self.size == p)
            place = positions[rows] % self.size
            order, begins, _ = self._pass(int(p))
            k = np.searchsorted(begins, place, "right") - 1
            frames[rows] = self.first[order[k]] + place - begins[k]
        return frames

    def episode(self, k: int) -> tuple[int, int]:
        """The k-th episode of the endless row and its first position."""
        p, k = divmod(k, len(self.lengths))
        order, begins, _ = self._pass(p)
        return int(order[k]), p * self.size + int(begins[k])

    def episode_at(self, position: int) -> int:
        """Which episode of the endless row lies at a position: the inverse of `episode`."""
        p, place = divmod(position, self.size)
        return p * len(self.lengths) + int(np.searchsorted(self._pass(p)[1], place, "right")) - 1

    def starts_before(self, position: int) -> int:
        """How many frames that begin an episode lie before a position."""
        p, place = divmod(position, self.size)
        order, begins, counts = self._pass(p)
        k = int(np.searchsorted(begins, place, "right")) - 1
        return p * self.starts + int(counts[k]) + min(place - int(begins[k]), int(self.shown[order[k]]))

    def starts_at(self, numbers: np.ndarray) -> np.ndarray:
        """The positions of the numbers-th (n,) frames that begin an episode."""
        positions = np.empty(len(numbers), np.int64)
        for i, number in enumerate(numbers.tolist()):
            p, number = divmod(number, self.starts)
            _, begins, counts = self._pass(p)
            k = int(np.searchsorted(counts, number, "right")) - 1
            positions[i] = p * self.size + begins[k] + number - counts[k]
        return positions

    def _shuffled(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a pass: its episodes in order, the place where each begins, the starts before each, all (E,)."""
        order = np.random.default_rng([self.seed, 0, number]).permutation(len(self.lengths))
        lengths, shown = self.lengths[order], self.shown[order]
        return order, np.cumsum(lengths) - lengths, np.cumsum(shown) - shown
