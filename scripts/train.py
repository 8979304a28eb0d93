"""Train a policy on demonstrations.

    python scripts/train.py [CONFIG] [--train.steps=100 …] [--resume]

--resume goes on from the newest checkpoint of the same output.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vla.config import Job, load
from vla.system import require_writable

if TYPE_CHECKING:
    from vla.training.ranks import Ranks

OTHER_SCENES = 10_000_000  # a curve that one looks at while tuning must not come from the final scenes


def main(job: Job, resume: bool = False) -> Path:
    """Train as `job` says; returns the last checkpoint's folder."""
    from vla.training import checkpoint
    from vla.training.ranks import start

    require_writable(job.output)
    ranks = start(job.train.device, job.train)

    def remedy() -> str:
        written = checkpoint.checkpoints(Path(job.output) / "checkpoints")
        return f"the same command with --resume goes on from {written[-1] if written else 'the beginning'}"

    with ranks.together("train", remedy):
        return train_on(ranks, job, resume)


def train_on(ranks: Ranks, job: Job, resume: bool) -> Path:
    """What `main` does, on each of the ranks."""
    from vla.data.sources import features_for, open_data
    from vla.model.lora import require_adapters
    from vla.training import checkpoint
    from vla.training.loop import train

    begin = checkpoint.checkpoints(Path(job.output) / "checkpoints") if resume else []
    if resume and not begin:
        ranks.print(f"train: nothing to resume in {job.output}, beginning")
    if job.train.init and not begin:
        try:
            checkpoint.verify(checkpoint.find(job.train.init))
        except checkpoint.CheckpointError as error:
            raise ValueError(f"train.init: {error}") from error
    require_adapters(job.model.lora)
    store = open_data(job)
    if not job.train.evaluate_every:
        return train(job, store, resume, ranks=ranks)
    from vla.environment import make_env

    env, features = make_env(job.env.id, job.env.kwargs)  # may not fit: find out now, not in an hour
    env.close()
    features_for(store, job.evaluate.dataset).require(
        features, f"The environment {job.env.id}", closed_loop=True
    )
    return train(job, store, resume, evaluation_of(job, ranks), ranks)


def evaluation_of(job: Job, ranks: Ranks | None = None):
    """What the loop calls every `train.evaluate_every` steps: a short closed-loop evaluation."""
    from dataclasses import replace

    from vla.evaluation import evaluate
    from vla.policy import Policy

    def run(checkpoint: Path, step: int) -> tuple[dict[str, float], list[Path]]:
        folder = Path(job.output) / "evaluations" / f"step_{step:08d}"
        first = dict(list(job.evaluate.splits.items())[:1])
        short = replace(
            job.evaluate, episodes=job.train.evaluate_episodes, splits=first, controls=False, videos=2,
            seed=job.evaluate.seed + OTHER_SCENES,
        )  # fmt: skip
        device = str(ranks.device) if ranks else job.train.device
        policy = Policy.load(checkpoint, device, job.evaluate.launch, job.evaluate.dataset)
        result = evaluate(
            policy, replace(job, output=str(folder), evaluate=short), progress=False, ranks=ranks
        )
        return {"success": result.success_rate}, sorted(folder.rglob("*.mp4"))

    return run


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    try:
        last = main(load(Job, arguments), resume="--resume" in sys.argv)
        if os.environ.get("RANK", "0") == "0":
            print(f"checkpoint: {last}")
    except (
        ValueError,
        RuntimeError,
        FileNotFoundError,
        FloatingPointError,
    ) as error:  # ConfigError is a ValueError
        sys.exit(f"train: {error}")
    except KeyboardInterrupt:
        sys.exit("train: interrupted. The same command with --resume goes on from the last checkpoint.")
