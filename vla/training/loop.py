"""The training loop: evaluate, save, step, log, in this order, in the open."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from vla.config import Job, require
from vla.data.sources import Data, samples_of
from vla.device import resolve_device
from vla.model.vla import VLA, count_parameters
from vla.training import checkpoint
from vla.training.initialise import initialise_from
from vla.training.ranks import Ranks
from vla.training.step import TrainStep, learning_rate
from vla.training.track import Silent, Tracker

# Called with a checkpoint and the step; returns numbers to log and videos to show.
Evaluate = Callable[[Path, int], tuple[dict[str, float], list[Path]]]


def train(
    job: Job,
    store: Data,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Train a policy on a job's data (vla.data.sources) and return its last checkpoint.

    resume: go on from the newest checkpoint in <output>/checkpoints, bit for bit on the CPU. A
    finished run returns its checkpoint and does nothing else.
    Raises ConfigError when there are checkpoints and resume is False, or when they are of another
    dataset or of a job that trains otherwise (`checkpoint.require_same`), and when the data has no
    targets for model.auxiliary; FloatingPointError when
    the loss or the weights are no longer finite (the last good checkpoint is named).
    ranks: the processes that do this together, none given being this one alone; all call it alike.
    """
    ranks = ranks or Ranks(resolve_device(job.train.device))
    config, folder = job.train, Path(job.output) / "checkpoints"
    older = checkpoint.checkpoints(folder)
    require(
        resume or not older, "output", job.output, "a folder without checkpoints",
        "go on with --resume, or choose another output",
    )  # fmt: skip
    path = older[-1] if older else None
    first, state = checkpoint.load_training(path) if path else (0, {})
    statistics = store.statistics()
    if path:
        checkpoint.require_same(path, job)
        checkpoint.require_features(path, store.features)
        require(
            checkpoint.load_statistics(path) == statistics, "data.mix" if job.data.mix else "data.root",
            ", ".join(m.root for m in job.data.mix.values()) or str(job.dataset_root),
            f"the dataset that checkpoint {path.name} was trained on",
            "bring that dataset back, or choose another output",
        )  # fmt: skip
        if first >= config.steps:
            return path
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(job.seed)
    device = ranks.device
    text_folder = path / "text" if path else None  # what the run began with, wherever that came from
    model = VLA(job.model, store.features, statistics, text_folder, store.tasks).to(device)
    if config.init and not path:
        ranks.print(initialise_from(model, checkpoint.find(config.init)))
    samples = samples_of(store, job, device)
    deployed = ranks.twin(model)
    make_step = TrainStep(model, samples, job, store.tasks, ranks)
    if path:
        make_step.load_state(state)
    ranks.reseed(job.seed, first)
    ranks.print(
        f"train: {count_parameters(model) / 1e6:.1f} M trainable parameters, {len(store):,} frames of "
        f"{store.n_episodes:,} episodes, {len(store.tasks)} instructions, {ranks}, from step {first}"
    )

    def require_finite(step: int) -> None:
        """Waits for the device. Raises FloatingPointError, having written what failed into the output."""
        if failure := make_step.failure():
            at, frames = failure
            written = Path(job.output) / "diverged.json"
            if ranks.main:
                written.write_text(json.dumps({"step": at + 1, "frames": frames}) + "\n", encoding="utf-8")
            got = f"a loss or gradient that is not finite at step {at + 1}"
            raise diverged(f"{got}, of frames {few(frames)} (all in {written})", path)
        if not make_step.finite():
            raise diverged(f"weights that are not finite behind step {step}", path)

    def save(step: int) -> Path:
        require_finite(step)
        weights = make_step.average.weights if config.ema_decay else {}
        weights, training = ranks.whole(weights), ranks.whole(make_step.state())
        ranks.fill(deployed, model)
        written = [
            checkpoint.save(folder, step, job, deployed, statistics, weights, training, config.keep)
        ] if ranks.main else []  # fmt: skip
        ranks.reseed(job.seed, step)
        return ranks.gather(written)[0]

    model.train()
    with (
        closing(make_step.feed),
        closing(Tracker(job, first) if ranks.main else Silent()) as tracker,
        tqdm(
            total=config.steps,
            initial=first,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not ranks.main,
        ) as bar,
    ):

        def look(path: Path, step: int, evaluate: Evaluate) -> None:
            """Evaluate as if it had not happened: training's random numbers go on behind it."""
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                numbers, videos = evaluate(path, step)
            tracker.log(step, **numbers)
            tracker.log_videos(step, videos)

        marked, mark = time.monotonic(), first
        for step in range(first, config.steps):
            if evaluate and config.evaluate_every and step > first and step % config.evaluate_every == 0:
                path = save(step)
                look(path, step, evaluate)
                marked, mark = time.monotonic(), step
            elif step > first and step % config.save_every == 0:
                path = save(step)

            logs = (step + 1) % config.log_every == 0 or step + 1 == config.steps
            metrics = make_step(step, measure=logs)

            if logs:
                numbers = {name: value.item() for name, value in metrics.items()}
                if make_step.failure():
                    require_finite(step + 1)
                now = time.monotonic()
                rate = (step + 1 - mark) * config.batch_size / (now - marked)
                marked, mark = now, step + 1
                tracker.log(step + 1, **numbers, lr=learning_rate(step, config), samples_per_s=rate)
                bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {rate:,.0f} samples/s", refresh=False)
                bar.update(step + 1 - bar.n)
        path = save(config.steps)
        if evaluate and config.evaluate_every:
            look(path, config.steps, evaluate)
        return path


def few(numbers: list[int], most: int = 8) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def diverged(got: str, path: Path | None) -> FloatingPointError:
    return FloatingPointError(
        f"got {got}, expected finite numbers. remedy: look at those frames, lower train.lr or "
        f"train.grad_clip; last good checkpoint: {path or 'none yet'}."
    )
