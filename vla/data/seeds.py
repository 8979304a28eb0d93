"""Which scene is played at each attempt at an episode, and which episodes a shard holds.

Episode i first tries the scene `record.seed + i // instructions_per_scene`, told the
scene's own instruction or, by i modulo that number, one of its alternatives. Attempt a > 0 takes
RETRIES + (record.seed + i) * ATTEMPTS + a, unique to (i, a) and far above the seeds of
evaluation. So the dataset does not depend on the number of workers nor on interruptions.

Of an environment that plays n tasks in turns (`n_tasks`), seeds that leave the same remainder by n
are scenes of one task. All attempts at an episode are at the same task (the numbers above times n,
plus that remainder), noise is spread over the
episodes of each task, and episodes are recorded task after task, because loading one takes long.
"""

from __future__ import annotations

from vla.config import RecordConfig, require

ATTEMPTS = 20  # per episode; an expert that fails more often is broken
RETRIES = 2**30


def require_seeds(record: RecordConfig, tasks: int = 1) -> None:
    """Raise ConfigError unless every attempt of `record` has a seed of 31 bits, `tasks` being played in turns."""
    most = RETRIES // 32 // tasks
    require(
        0 <= record.seed <= most - record.episodes,
        "record.seed",
        record.seed,
        f"0 ≤ seed ≤ {most} - episodes",
    )


def attempt_seed(record: RecordConfig, index: int, attempt: int, tasks: int = 1) -> int:
    """tasks: how many are played in turns; here as below."""
    first = record.seed + index // record.instructions_per_scene
    if attempt == 0:
        return first
    above = -(-RETRIES // tasks) * tasks  # the first multiple that is no seed of evaluation
    return above + ((record.seed + index) * ATTEMPTS + attempt) * tasks + first % tasks


def carries_noise(record: RecordConfig, index: int, tasks: int = 1) -> bool:
    """Spreads the share `noise_episodes` evenly over the episodes of each task, by index alone."""
    share = record.noise_episodes if record.noise > 0 else 0.0
    turn = index // record.instructions_per_scene // tasks
    return int((turn + 1) * share) > int(turn * share)


def shard_episodes(record: RecordConfig, shard: int, tasks: int = 1) -> list[int]:
    """The episodes of a shard: task after task, in each by their number."""
    order = sorted(range(record.episodes), key=lambda index: attempt_seed(record, index, 0) % tasks)
    start = shard * record.shard_episodes
    return order[start : start + record.shard_episodes]
