"""What tests/test_ranks_slow.py starts under torchrun: runs of the toy job, one after the other, in as many
processes as the launcher makes.

    torchrun --nproc-per-node=2 tests/ranked.py '[{"output": "a", "text": "folder", "train": {"steps": 4}}]'

text: a text encoder, the same for all, as its name is part of the job; model, train: options; frozen: whether
the text encoder is; after: a checkpoint of another run, "output/step", to go on from.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from toy_run import toy_job, toy_model, toy_store

from vla.config import Job, TextConfig
from vla.training.loop import train
from vla.training.ranks import Ranks, start

PLAIN = {"dropout": 0.0, "head": "bins", "bins": 16}
STEPS = {"steps": 20, "save_every": 10, "keep": 5}


def job_of(run: dict[str, Any]) -> Job:
    text = TextConfig(encoder=run["text"], frozen=run.get("frozen", True))
    model = toy_model(**PLAIN | {"text": text} | run.get("model", {}))
    return toy_job(Path(run["output"]), model, **STEPS | run.get("train", {}))


def begin_after(run: dict[str, Any]) -> None:
    """Copy the checkpoint that a run goes on from, and the metrics, into its output."""
    if "after" in run:
        source, step = Path(run["after"]).parent, Path(run["after"]).name
        output = Path(run["output"])
        shutil.copytree(source / "checkpoints" / step, output / "checkpoints" / step)
        shutil.copy(source / "metrics.jsonl", output)


def play(run: dict[str, Any], ranks: Ranks | None = None) -> Path:
    if ranks is None or ranks.main:
        begin_after(run)
    if ranks is not None:
        ranks.wait()
    return train(job_of(run), toy_store(), "after" in run or "resume" in run, ranks=ranks)


def main(runs: list[dict[str, Any]]) -> None:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # g++ takes minutes
    jobs = [job_of(run) for run in runs]
    ranks = start(jobs[0].train.device, jobs[0].train)
    with ranks.together("ranked", lambda: "resume"):
        for run in runs:
            play(run, ranks)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"ranked: {error}")
