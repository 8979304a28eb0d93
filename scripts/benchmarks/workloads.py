"""What training is measured on: demonstrations made on the spot, and networks that learn from them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vla.architecture import ModelConfig, TextConfig
from vla.config import Job
from vla.data.frames import Episode, FrameStore
from vla.data.samples import Samples
from vla.model.text import MINILM_PACKAGE, TextTokens
from vla.model.vla import VLA
from vla.observation import ACTION, IMAGES, STATE, TASK, Features
from vla.training.step import TrainStep

FPS, LENGTH = 10, 100  # frames a second, and of an episode
STATES, ACTIONS = 7, 5
INSTRUCTIONS = [f"press the {colour} button" for colour in ("red", "green", "blue", "yellow")]
STEPS = 100_000  # of the schedule; no benchmark makes as many
NETWORK = dict(d_model=32, n_heads=2, d_ff=64, n_encoder_layers=1, n_decoder_layers=1, image_width=32,
               image_depth=1, image_heads=2)  # fmt: skip
QUICK = ModelConfig(size="tiny", chunk_size=8, max_prefix=4, **NETWORK)  # what --quick trains, at 32 px


def demonstrations(episodes: int, pixels: int, length: int = LENGTH) -> list[Episode]:
    """Smooth pictures that drift, as a camera's do: noise would take a video decoder much longer."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(episodes):
        coarse = torch.rand(2, 3, 6, 6, generator=generator)
        ends = F.interpolate(coarse, (pixels, pixels), mode="bicubic").clamp(0, 1)  # (2, 3, p, p)
        share = torch.linspace(0, 1, length)[:, None, None, None]
        images = torch.lerp(ends[:1], ends[1:], share).permute(0, 2, 3, 1)  # (n, p, p, 3)
        path = [rng.normal(size=(length, n)).cumsum(axis=0).astype(np.float32) for n in (STATES, ACTIONS)]
        pictures = {"front": (255 * images).to(torch.uint8).numpy()}
        made.append(Episode(pictures, *path, INSTRUCTIONS[number % len(INSTRUCTIONS)]))
    return made


def write_dataset(root: Path, episodes: list[Episode]) -> None:
    """The episodes as a LeRobotDataset with this project's video settings (H.264, lossless). Needs lerobot."""
    from vla.data.lerobot_writer import create_dataset, dataset_features

    first = episodes[0]
    sizes = {name: (x.shape[1], x.shape[2]) for name, x in first.images.items()}
    columns = dataset_features(Features(sizes, STATES, ACTIONS, FPS))
    dataset = create_dataset(root, root.name, FPS, columns, "h264", len(episodes))
    for episode in episodes:
        for i in range(len(episode.state)):
            frame: dict[str, Any] = {IMAGES + name: x[i] for name, x in episode.images.items()}
            dataset.add_frame(
                frame | {STATE: episode.state[i], ACTION: episode.action[i], TASK: episode.task}
            )
        dataset.save_episode()
    dataset.finalize()


def text_config(folder: Path) -> TextConfig:
    """MiniLM where its package is installed; else a BERT of its width with random weights, written to `folder`.

    Both are frozen: every instruction is encoded once, and no step notices which of them it was.
    """
    if find_spec(MINILM_PACKAGE):
        return TextConfig()
    own = TextConfig(encoder="scratch", frozen=False, width=384, heads=6)
    TextTokens(own, None, INSTRUCTIONS).save(folder)
    return TextConfig(encoder=str(folder))


def with_text(model: ModelConfig, folder: Path) -> ModelConfig:
    return replace(model, text=text_config(folder))


def make_step(job: Job, store: FrameStore, device: str) -> TrainStep:
    """What the training loop makes before its first step, the network in training mode."""
    torch.manual_seed(job.seed)
    model = VLA(job.model, store.features, store.statistics(), None, store.tasks).to(device).train()
    samples = Samples(store, job.model.chunk_size, job.model.n_obs_steps, device, job.data.start_share)
    job = replace(job, train=replace(job.train, steps=STEPS))
    return TrainStep(model, samples, job, store.tasks)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines of others."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
