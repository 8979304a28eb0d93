"""How far actions jump where one chunk ends and the next begins.

    python scripts/seams.py CHECKPOINT [--episodes=300] [--delay=2] [--results=results/seams.json]

Plays unseen scenes with a policy that answers `delay` control steps late, as on a robot: the next chunk is
asked for while the last one still runs. With a committed prefix the policy is told the actions that will run
meanwhile; without one it only sees the same observation. Distances are between consecutive actions (L2, in
the action's units): at the seam with a prefix, one step before and after it, at the seam without a prefix,
and inside all chunks that are played.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vla.checks import require
from vla.environment import make_env
from vla.evaluation.episodes import split_kwargs
from vla.observation import IMAGES, IS_SUCCESS, STATE, TASK
from vla.policy import Policy
from vla.provenance import machine, portable, versions
from vla.rates import rate
from vla.system import require_writable, sha256


def main(policy: Policy, episodes: int, delay: int) -> dict[str, Any]:
    """Distances of all seams and of all steps inside chunks, and the success, over unseen scenes."""
    job, size = policy.job, policy.chunk_size
    every = job.evaluate.n_action_steps
    require(episodes > 0, "episodes", episodes, "1 or more")
    require(policy.n_obs_steps == 1, "n_obs_steps", policy.n_obs_steps, "a policy without history")
    longest = min(job.model.max_prefix, size - 2 - every, every - 1)
    require(
        0 < delay <= longest, "delay", delay, f"1 … {longest}, below n_action_steps={every}, not above "
        f"max_prefix={job.model.max_prefix}, and two steps before the end of the chunk of {size}",
    )  # fmt: skip
    first_split = next(iter(split_kwargs(job.evaluate).values()))
    env, features = make_env(job.env.id, {**job.env.kwargs, **first_split})
    policy.features.require(features, "The environment", closed_loop=True)
    names = ("seam with prefix", "beside the seam", "seam without prefix", "inside chunks")
    steps: dict[str, list[float]] = {name: [] for name in names}
    won = [play(env, policy, job.evaluate.seed + i, every, delay, steps) for i in range(episodes)]
    env.close()
    return {
        "checkpoint": policy.checkpoint.name if policy.checkpoint else None,
        "sha256": sha256(policy.checkpoint / "model.safetensors") if policy.checkpoint else None,
        "environment": {"id": job.env.id, "kwargs": portable(job.env.kwargs | first_split)},
        "seed": job.evaluate.seed,
        "delay_steps": delay,
        "n_action_steps": every,
        "success": rate(won),
        "distance": {name: describe(values) for name, values in steps.items()},
        "machine": machine(),
        "versions": versions(),
    }


def play(env: Any, policy: Policy, seed: int, every: int, delay: int, steps: dict[str, list[float]]) -> bool:
    """One episode; adds its distances to `steps`. Chunks follow each other by committed prefix."""
    observation, info = env.reset(seed=seed)
    chunk, t, over = ask(policy, observation, info[TASK]), 0, False
    while not over:
        if t == every:  # ask now; what runs until the answer is there is committed
            committed = chunk[t : t + delay]
            following = ask(policy, observation, info[TASK], committed)
            alone = ask(policy, observation, info[TASK])
            steps["seam with prefix"].append(jump(committed[-1], following[delay]))
            steps["seam without prefix"].append(jump(committed[-1], alone[delay]))
            steps["beside the seam"].append(jump(following[delay], following[delay + 1]))
            steps["beside the seam"].append(jump(chunk[t + delay - 2], committed[-1]))
            chunk, t = following, 0
        if t >= delay:
            steps["inside chunks"].append(jump(chunk[t], chunk[t + 1]))
        observation, _, terminated, truncated, info = env.step(chunk[t])
        over, t = terminated or truncated, t + 1
    return bool(info[IS_SUCCESS])


def ask(policy: Policy, observation: Any, task: str, committed: np.ndarray | None = None) -> np.ndarray:
    """The next chunk (H, A), continuing `committed` (d, A) where given."""
    images = {name: observation[IMAGES + name][None, None] for name in policy.features.cameras}
    prefix = length = None
    if committed is not None:
        prefix = np.zeros((1, policy.chunk_size, committed.shape[1]), np.float32)
        prefix[0, : len(committed)], length = committed, np.array([len(committed)])
    return policy.predict_chunk(images, observation[STATE][None, None], [task], prefix, length)[0]


def jump(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two actions (A,)."""
    return float(np.linalg.norm(b - a))


def describe(values: list[float]) -> dict[str, float]:
    """How many, their mean and quantiles. Raises ValueError when there are none."""
    if not values:
        raise ValueError(
            "There is no seam to measure. got: episodes that end within one chunk. expected: longer ones. remedy: "
            "play more episodes, or a harder task."
        )
    q = np.quantile(values, (0.5, 0.95))
    return {"n": len(values), "mean": float(np.mean(values)), "median": float(q[0]), "p95": float(q[1])}


def table(result: dict[str, Any]) -> str:
    lines = ["| distance of consecutive actions | n | mean | median | p95 |", "|---|---|---|---|---|"]
    for name, d in result["distance"].items():
        lines.append(f"| {name} | {d['n']} | {d['mean']:.3f} | {d['median']:.3f} | {d['p95']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--delay", type=int, default=2, help="control steps that an answer takes")
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    try:
        if arguments.results:
            require_writable(arguments.results.parent)
        result = main(Policy.load(arguments.checkpoint), arguments.episodes, arguments.delay)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"seams: {error}")
    print(table(result))
    print(f"success {result['success']['success_rate']:.0%} of {arguments.episodes} scenes")
    if arguments.results:
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
