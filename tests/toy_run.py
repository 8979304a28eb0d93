"""Tiny training runs on the toy environment, for the tests of training, checkpoints and policies.

The text encoder is a BERT of one layer with random weights and a dozen words, so that a
checkpoint is small and a run of four steps takes a second.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from toy_env import COLOURS, PHRASINGS, ToyEnv

from vla.config import (
    DataConfig,
    EnvConfig,
    EvaluateConfig,
    ImageConfig,
    Job,
    ModelConfig,
    TextConfig,
    TrainConfig,
)
from vla.data.demonstrate import demonstrate
from vla.data.frames import Episode, FrameStore
from vla.data.samples import Samples
from vla.model.text import quietly
from vla.model.vla import VLA
from vla.observation import ACTION, STATE, TASK
from vla.training.step import TrainStep


@functools.cache
def text_folder() -> str:
    """A text encoder in transformers' format that knows the toy's words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tempfile.mkdtemp(prefix="vla-tests-text-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    words = [
        "[PAD]",
        "[UNK]",
        *sorted({word for p in PHRASINGS for word in p.replace("{}", "").split()}),
        *COLOURS,
    ]
    words = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes))
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():  # of our own drawing: golden numbers hang on them
        nn.init.normal_(parameter, std=0.3, generator=generator)
    with quietly():
        encoder.save_pretrained(folder)
    return folder


@functools.cache
def toy_store(episodes: int = 6) -> FrameStore:
    """Demonstrations in the toy environment."""
    env, recorded = ToyEnv(), []
    for seed in range(episodes):
        frames, _ = demonstrate(env, seed, noise=0.0, tail_steps=0)
        assert frames is not None
        columns = {
            key: np.stack([f[key] for f in frames]) for key in ("observation.images.front", STATE, ACTION)
        }
        images = {"front": columns["observation.images.front"]}
        recorded.append(Episode(images, columns[STATE], columns[ACTION], str(frames[0][TASK])))
    return FrameStore.of_episodes(recorded, fps=10)


def toy_model(**options: Any) -> ModelConfig:
    """A network of a few ten thousand parameters, with everything random that training has."""
    sizes = {"d_model": 32, "n_heads": 2, "d_ff": 64, "n_encoder_layers": 1, "n_decoder_layers": 1}
    sizes |= {"image_width": 32, "image_depth": 1, "image_heads": 2}
    defaults = {"chunk_size": 4, "max_prefix": 2, "prefix_probability": 0.5, "dropout": 0.1}
    image, text = ImageConfig(pixels=32, patch=16), TextConfig(encoder=text_folder())
    return ModelConfig(size="tiny", **{**sizes, **defaults, "image": image, "text": text, **options})


def toy_job(
    output: Path, model: ModelConfig | None = None, data: DataConfig | None = None, **train: Any
) -> Job:
    options = {"steps": 4, "batch_size": 8, "lr": 1e-3, "warmup_steps": 2, "log_every": 1, "save_every": 1000}
    options |= {"ema_decay": 0.9, "precision": "fp32", "device": "cpu", "threads": 1, "wandb": "disabled"}
    return Job(
        output=str(output),
        env=EnvConfig("toy_env:Toy-v0"),
        data=data or DataConfig(),
        model=model or toy_model(),
        train=TrainConfig(**{**options, **train}),
        evaluate=EvaluateConfig(n_action_steps=2, workers=1, slots=2, videos=2, device="cpu"),
    )


def toy_step(job: Job, store: FrameStore | None = None) -> TrainStep:
    """What the loop makes before its first step."""
    store = store or toy_store()
    torch.manual_seed(job.seed)
    model = VLA(job.model, store.features, store.statistics()).train()
    samples = Samples(store, job.model.chunk_size, job.model.n_obs_steps, start_share=job.data.start_share)
    return TrainStep(model, samples, job, store.tasks)


def metrics(job: Job) -> list[dict[str, Any]]:
    """The rows of a run, without its clock."""
    rows = [json.loads(row) for row in (Path(job.output) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_s")} for row in rows]
