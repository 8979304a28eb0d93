"""The network as LeRobot's trainer, evaluator and rollout call it.

    B batch   T n_obs_steps   H chunk_size   A action_dim   P state_dim   L length of a left-over

Images arrive as LeRobot makes them, float (B, [T,] 3, h, w) in [0, 1], and are rounded back to the
bytes they were; states and actions are in robot units on both sides, as the network normalises by
itself. The averaged weights act (evaluation mode), the live ones learn (training mode).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import PreTrainedPolicy
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla.checks import ConfigError, require
from vla.config import Job
from vla.data.augment import augment
from vla.data.normalize import Statistics
from vla.device import autocast
from vla.lerobot_plugin import batch as read
from vla.lerobot_plugin import pretrained
from vla.lerobot_plugin.averaged import Averaged
from vla.lerobot_plugin.configuration_vla import VLAConfig
from vla.model.lora import PARTS, READ_IN_PART, is_adapted, is_linear
from vla.model.parameters import trains
from vla.model.text import TextCache
from vla.model.vla import VLA, parameter_groups
from vla.observation import STATE, Features, Observation, Tokens
from vla.training import checkpoint

MEASURE_EVERY = 10  # updates between two measurements of the error, for which the head must decode


class VLAPolicy(PreTrainedPolicy):
    """A `vla.model.vla.VLA` behind LeRobot's contract.

    dataset_stats, dataset_meta: of the LeRobotDataset that it learns from. folder: a pretrained_model
    whose weights it begins with; see `from_pretrained`.
    Raises ConfigError naming the field when configuration, data and weights do not fit each other.
    """

    config_class = VLAConfig  # pyright: ignore[reportAssignmentType]
    name = "vla"  # pyright: ignore[reportAssignmentType]
    config: VLAConfig

    def __init__(
        self,
        config: VLAConfig,
        dataset_stats: Any = None,
        dataset_meta: Any = None,
        folder: Path | None = None,
    ) -> None:
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # LeRobot would tell at the first save
            raise pretrained.sharded()
        super().__init__(config)
        if folder is None:
            config.updates = 0  # a run's train_config.json may begin another run
        saved = None if folder is None else checkpoint.load_features(folder)
        features = config.features(int(getattr(dataset_meta, "fps", saved.fps if saved else 0)))
        if saved and folder:
            self.statistics = Statistics.load(folder / "statistics.json")
            pretrained.warn_of_another_rate(features, saved)
            pretrained.require_sizes(dataset_meta, saved)
        if dataset_stats or not saved:
            self.statistics = pretrained.statistics_of(dataset_stats, config.architecture, features)
        self.text_folder: Path | None = None  # where this text encoder lies as files
        if folder:
            self._rebuild(folder, features)
        else:
            self.base = config.job(Job())
            self.model = VLA(
                self.base.model, features, self.statistics, None, pretrained.instructions(dataset_meta)
            )
        average = config.ema_decay and not config.use_peft
        self.averaged = Averaged(self.model, config.ema_decay) if average else None
        if folder and average and config.updates and (folder / pretrained.LIVE).is_file():
            self.model.load_state_dict(load_file(folder / pretrained.LIVE), strict=False)
        self.texts = TextCache(self.model.text)
        self.measured: dict[str, float] = {}
        self.warned = False
        self.reset()

    def _rebuild(self, folder: Path, features: Features) -> None:
        job = checkpoint.load_job(folder)
        tuned = not job.model.text.frozen or is_adapted(job.model, "text")
        self.text_folder = None if tuned else folder / "text"
        init = job.train.init or (folder.name if self.config.image.frozen else "")
        self.base = self.config.job(replace(job, train=replace(job.train, init=init)))
        self.model = checkpoint.rebuild(folder, job, self.base.model, features, self.statistics)

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None,
        force_download: bool = False, resume_download: bool | None = None, proxies: dict[str, str] | None = None,
        token: str | bool | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
        revision: str | None = None, strict: bool = True, **kwargs: Any,
    ) -> VLAPolicy:  # fmt: skip
        """Load a folder pretrained_model, or a hub repository of one, in evaluation mode.

        config: what differs from the checkpoint's own; kwargs: dataset_stats and dataset_meta of other
        data, whose statistics then count. Weights are always read strictly; resume_download and
        proxies are of an older hub and do nothing.
        Raises CheckpointError when it is damaged, ConfigError when it is of another type or network.
        """
        folder = pretrained.fetch(
            pretrained_name_or_path, force_download=force_download, token=token, cache_dir=cache_dir,
            local_files_only=local_files_only, revision=revision,
        )  # fmt: skip
        own = pretrained.read_config(folder) if config is None else config
        if not isinstance(own, VLAConfig):
            raise ConfigError("type", own.type, "vla", "load it by --policy.path, which finds its class")
        pretrained.require_fit(folder, own)
        policy = cls(own, folder=folder, **kwargs)
        policy.to(own.device)
        return policy.eval()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the folder described in pretrained.py, all but what LeRobot adds itself."""
        if state_dict is not None:
            raise pretrained.sharded()
        self.config._save_pretrained(save_directory)
        part = save_directory / ".partial"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        deployed, live = self.averaged.weights() if self.averaged else ({}, {})
        known = self.text_folder if self.text_folder and self.text_folder.is_dir() else None
        checkpoint.write(part, self.config.job(self.base), self.model, self.statistics, deployed, known)
        if live:
            save_file({n: t.detach().cpu().contiguous() for n, t in live.items()}, part / pretrained.LIVE)
        checkpoint.write_manifest(part, self.config.updates)
        pretrained.replace_sealed(part, save_directory)
        if not trains(self.model.text.encoder):
            self.text_folder = save_directory / "text"

    def train(self, mode: bool = True) -> VLAPolicy:
        """Training mode puts the live weights in place, evaluation mode the averaged ones."""
        if self.averaged is not None:
            self.averaged.place(live=mode)
        if mode != self.training and trains(self.model.text.encoder):  # its features are of older weights
            self.texts = TextCache(self.model.text)
        super().train(mode)
        return self

    def update(self) -> None:
        """LeRobot's trainer calls it after each optimiser step: one more into the average."""
        if self.averaged is not None:
            self.averaged.update(self.config.updates)
        self.config.updates += 1

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # --- training

    def get_optim_params(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Groups for AdamW. Norms, biases and embeddings do not decay; the configured multipliers hold.

        A group names only what differs from the optimiser's own lr and weight_decay.
        """
        groups = []
        for group in parameter_groups(self.model, self.config.architecture, 1.0):
            entry: dict[str, Any] = {"params": group["params"]}
            if group["lr_multiplier"] != 1:
                entry["lr"] = self.config.optimizer_lr * group["lr_multiplier"]
            if group["weight_decay"] == 0:
                entry["weight_decay"] = 0.0
            groups.append(entry)
        return groups

    def _get_default_peft_targets(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """--peft.method_type=LORA adapts the linear layers of encoder and decoder."""
        parts = tuple(f"model.{part}." for part in PARTS["trunk"])
        names = [n for n, module in self.named_modules() if n.startswith(parts) and is_linear(module)]
        return {"target_modules": [n for n in names if not n.endswith(READ_IN_PART)]}

    def _validate_peft_config(self, peft_config: Any) -> None:
        """LeRobot keeps the adapters alone: an average has no place there, and what they adapt acts."""
        super()._validate_peft_config(peft_config)
        self.eval()
        self.averaged = None

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """The head's loss over a batch of LeRobot's dataset, and the last action_error in robot units.

        batch: images and state as its delta indices give them, action (B, H, A), action_is_pad (B, H),
        task: B instructions. Raises ConfigError naming what does not fit.
        """
        if reduction != "mean":
            raise NotImplementedError(
                f"reduction: got {reduction!r}, expected 'mean': the heads give one loss per batch. remedy: leave out "
                "--sample_weighting, which asks for one per sample."
            )
        images, state = self._read(batch)
        data = read.demonstrated(batch, images, state, self.config.chunk_size, self.model.features.action_dim)
        text = self._text(read.tasks(batch, len(state)))
        change = partial(augment, config=self.base.data) if self.training else None
        measure = not (self.training and self.measured) or self.config.updates % MEASURE_EVERY == 0
        with autocast(self._device, self.config.precision):
            loss, metrics = self.model.loss(data, text, change, measure)
        if measure:
            self.measured = {name: float(value) for name, value in metrics.items()}
        return loss, self.measured

    # --- acting

    def reset(self) -> None:
        """Forget what was seen and planned: a new episode begins."""
        self.queue: deque[Tensor] = deque()
        self.running: Tensor | None = None  # the last chunk (H, A) of predict_action_chunk
        self.history: deque[tuple[dict[str, Tensor], Tensor]] = deque(maxlen=self.config.n_obs_steps)

    def supports_rtc(self) -> bool:
        """Whether a chunk can continue the actions that run meanwhile (--inference.type=rtc)."""
        reasons = []
        if self.model.actions.longest_prefix == 0:
            reasons.append("policy.max_prefix is 0, it was trained without committed prefixes")
        if self.config.n_obs_steps > 1:
            reasons.append("policy.n_obs_steps is more than 1, rtc shows one observation")
        if reasons:
            logging.warning(f"This policy does not support real-time chunking: {'; '.join(reasons)}")
        return not reasons

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action (B, A) in robot units; every n_action_steps calls it predicts a chunk.

        batch: one observation, without T. History before the first one repeats it, as in training.
        """
        # While actions are left only history needs to look; this runs at every control step.
        if self.config.n_obs_steps > 1 or not self.queue:
            seen = self._read(batch)
            self.history.extend([seen] * (1 if self.history else self.config.n_obs_steps))
        if not self.queue:
            images = {
                name: torch.cat([past[name] for past, _ in self.history], dim=1)
                for name in self.history[0][0]
            }
            state = torch.cat([past for _, past in self.history], dim=1)
            chunk = self._predict(images, state, read.tasks(batch, len(state)))
            self.queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        return self.queue.popleft()

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Any], inference_delay: int | None = None, prev_chunk_left_over: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The next chunk (B, H, A) in robot units, float32.

        prev_chunk_left_over: (L, A) or (B, L, A), what is left of the running chunk, of which the first
        inference_delay actions will be executed meanwhile; they come back in their places and the rest
        continues them. LeRobot fills it up with rows of zeros, which are not actions.
        """
        images, state = self._read(batch)
        prefix = length = None
        if inference_delay and prev_chunk_left_over is not None:
            longest = self.model.actions.longest_prefix
            if inference_delay > longest and not self.warned:
                self.warned = True
                logging.warning(
                    f"policy.max_prefix: got an inference delay of {inference_delay} steps, expected at most "
                    f"{longest}: a chunk continues fewer actions than run meanwhile. remedy: train with a "
                    "longer --policy.max_prefix."
                )
            prefix, length = read.committed(
                prev_chunk_left_over, inference_delay, longest, state, self.config.chunk_size, self.running
            )
        chunk = self._predict(images, state, read.tasks(batch, len(state)), prefix, length)
        self.running = chunk[0].clone()
        return chunk

    def _predict(
        self, images: dict[str, Tensor], state: Tensor, tasks: list[str],
        prefix: Tensor | None = None, length: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if self.training:
            self.eval()
        steps = self.config.n_obs_steps
        seen = state.shape[1]
        require(seen == steps, STATE, f"{seen} steps", f"policy.n_obs_steps={steps}", "use select_action")
        observation = Observation(images, state, self._text(tasks))
        with autocast(self._device, self.config.precision):
            return self.model.predict_chunk(observation, prefix, length).float()

    def _read(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """camera -> (B, T, 3, h, w) uint8, and the state (B, T, P)."""
        images = read.images(batch, self.config.cameras, self._device)
        return images, read.state(batch, self.model.features.state_dim, self._device)

    def _text(self, tasks: list[str]) -> Tokens:
        """The features of the instructions, each computed once while the encoder does not change."""
        text = self.model.text
        if self.training and trains(text.encoder):
            return text.encode(text.tokenize(tasks))
        tokens = self.texts(tasks)
        return Tokens(tokens.x.to(self._device), tokens.pad.to(self._device))
