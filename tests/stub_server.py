"""A policy server around a policy that is a few lines of numpy: python stub_server.py NAME [--unix=PATH] …

The same program as `python -m vla.serve`, with another way to load. NAME is hashed into the model's sha256,
so that two names are two models; a name that ends in digits after "A=" is a policy of so many actions.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from vla.observation import Features

H, A, P = 8, 7, 7


class StubPolicy:
    """Action i is the state's first number, plus i, in every joint; committed actions come back unchanged.

    The task is what it does: "sleep 0.5", "nan", "shape", "raise WORDS", or anything else for a chunk.
    """

    chunk_size, n_obs_steps, max_prefix = H, 1, 4

    def __init__(self, name: str = "stub", size: int = 32) -> None:
        self.model_sha256 = hashlib.sha256(name.encode()).hexdigest()
        found = re.search(r"A=(\d+)$", name)
        cameras = {"front": (size, size), "wrist": (size, size)}
        self.features = Features(cameras, P, int(found[1]) if found else A, 10)

    def predict_chunk(
        self, images: dict[str, np.ndarray], state: np.ndarray, tasks: Sequence[str],
        prefix: np.ndarray | None = None, prefix_length: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        assert all(image.ndim == 5 and image.flags.writeable for image in images.values())
        word, _, rest = tasks[0].partition(" ")
        if word == "sleep":
            time.sleep(float(rest))
        if word == "raise":
            raise RuntimeError(rest + "\nand more of it")
        chunk = state[:, 0, :1, None] + np.arange(H, dtype=np.float32)[None, :, None]
        chunk = np.repeat(chunk, self.features.action_dim, axis=2)
        if prefix is not None and prefix_length is not None:
            chunk[:, : prefix_length[0]] = prefix[:, : prefix_length[0]]
        if word == "nan":
            chunk[0, -1, -1] = np.nan
        return chunk[:, 1:] if word == "shape" else chunk


def load(path: str, device: str, threads: int, launch: str, dataset: str) -> Any:
    return StubPolicy(path)


if __name__ == "__main__":
    import vla.serve.__main__ as program

    program.load = load
    assert "torch" not in sys.modules
    sys.exit(program.main(sys.argv[1:]))
