"""A policy server whose policy swings all joints slowly for ever: python walking_server.py NAME [--port=0 …]

The same program as `python -m vla.serve`, with another way to load. The instruction is what it does:

    swing            anything else, too
    far              targets far beyond every limit
    sleep 0.5        swing, so many seconds late
    raise            the policy fails
    nan 2            the first 2 answers are not finite (inf: not finite either, shape: a step too few), then it swings
    wire-nan 2       as before, but a server without checks sends them (wire-inf, wire-shape, wire-model)
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from vla.observation import Features
from vla.serve.wire import AnyMessage, Chunk, encode

H, FPS, SPEED, REACH = 8, 10, 1.0, 0.3  # steps, a second, rad/s of the phase, radians
MOST = 0.04  # radians a step
BAD = ("nan", "inf", "shape", "model")


class WalkingPolicy:
    """The first two joints turn around a circle, from which the phase is read; the others follow them."""

    n_obs_steps, max_prefix, chunk_size = 1, 4, H

    def __init__(self, name: str, n: int = 7) -> None:
        self.model_sha256 = hashlib.sha256(name.encode()).hexdigest()
        self.features = Features({"front": (32, 32), "wrist": (32, 32)}, n, n, FPS)
        self.answers, self.task = Counter[str](), ""  # by instruction; the last one

    def predict_chunk(
        self, images: dict[str, np.ndarray], state: np.ndarray, tasks: Sequence[str],
        prefix: np.ndarray | None = None, prefix_length: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        word, _, number = tasks[0].partition(" ")
        self.answers[tasks[0]] += 1
        self.task = tasks[0]
        if word == "sleep":
            time.sleep(float(number))
        if word == "raise":
            raise RuntimeError("the policy was to fail")
        d = 0 if prefix is None or prefix_length is None else int(prefix_length[0])
        chunk = np.zeros((1, H, self.features.action_dim), np.float32)
        if prefix is not None:
            chunk[:, :d] = prefix[:, :d]
        at = chunk[0, d - 1] if d else state[0, -1]
        for i in range(d, H):
            at = np.full_like(at, 9.0) if word == "far" else swing(at)
            chunk[0, i] = at
        bad = word if word in BAD and self.answers[tasks[0]] <= int(number) else ""
        if bad in ("nan", "inf"):
            chunk[0, -1, -1] = float(bad)
        return chunk[:, 1:] if bad == "shape" else chunk


def swing(at: np.ndarray) -> np.ndarray:
    """One step on, from wherever the joints (J,) are."""
    phase = np.arctan2(at[1], at[0]) + SPEED / FPS
    goal = REACH * np.cos(phase - np.arange(len(at)) * np.pi / 2)
    return at + np.clip(goal - at, -MOST, MOST)


def liar(policy: WalkingPolicy) -> Any:
    """An `encode` that answers "wire-…" with what no honest server sends."""

    def lie(message: AnyMessage) -> bytes:
        word, _, number = policy.task.partition(" ")
        kind = word.removeprefix("wire-")
        if not (isinstance(message, Chunk) and word != kind and policy.answers[policy.task] <= int(number)):
            return encode(message)
        fields = {"type": "Chunk"} | {name: getattr(message, name) for name in message.__struct_fields__}
        if kind == "shape":
            fields["actions"] = message.actions[:-4]
        elif kind == "model":
            fields["model"] = "0" * 64
        else:
            fields["actions"] = message.actions[:-4] + np.float32(kind).tobytes()
        return msgspec.msgpack.encode(fields)

    return lie


def load(path: str, device: str, threads: int, launch: str, dataset: str) -> Any:
    import vla.serve.server as server

    policy = WalkingPolicy(path)
    server.encode = liar(policy)
    return policy


if __name__ == "__main__":
    import vla.serve.__main__ as program

    program.load = load
    assert "torch" not in sys.modules
    sys.exit(program.main(sys.argv[1:]))
