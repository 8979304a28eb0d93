"""LeRobot's training loop, step by step: what lerobot-train of 0.6.1 makes and calls, with the network behind it.

Its dataset, sampler, loader, processors, optimiser, scheduler, accelerator and `update_policy`, made as its
`train` makes them; only logging, checkpoints and evaluation are left out. Importing this imports lerobot.
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import EpisodeAwareSampler
from lerobot.datasets.factory import make_train_eval_datasets
from lerobot.optim.factory import make_optimizer_and_scheduler
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.scripts.lerobot_train import _dataloader_worker_kwargs, update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from lerobot.utils.utils import cycle

from vla.config import Job
from vla.lerobot_plugin.configuration_vla import VLAConfig
from vla.observation import Features

IDLE_S = 0.3  # of workers that no longer work
METERS = ("loss", "grad_norm", "lr", "update_s", "dataloading_s", "gpu_mem_gb")


class LeRobotLoop:
    """The loop with the job's network, batch and precision, on the LeRobotDataset in `root`.

    workers: processes that decode ahead. `pause` and `resume` surround what is not measured, so that
    they neither disturb others nor have worked ahead meanwhile.
    """

    def __init__(self, root: Path, job: Job, features: Features, device: str, workers: int) -> None:
        policy_config = VLAConfig.of(job, features, device=device)
        config = TrainPipelineConfig(
            # Bytes travel from the workers, not floats: the faster of its settings.
            dataset=DatasetConfig(f"local/{root.name}", root=str(root), return_uint8=True),
            policy=policy_config, batch_size=job.train.batch_size, num_workers=workers, steps=job.train.steps,
            seed=job.seed, save_checkpoint=False,
        )  # fmt: skip
        config.optimizer = policy_config.get_optimizer_preset()
        config.scheduler = policy_config.get_scheduler_preset()
        self.accelerator = Accelerator(
            step_scheduler_with_optimizer=False, cpu=device == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )  # fmt: skip
        dataset, _ = make_train_eval_datasets(config)
        policy = make_policy(cfg=policy_config, ds_meta=dataset.meta)
        self.preprocessor, _ = make_pre_post_processors(policy_config, dataset_stats=dataset.meta.stats)
        optimizer, scheduler = make_optimizer_and_scheduler(config, policy)
        sampler = EpisodeAwareSampler(
            dataset.meta.episodes["dataset_from_index"], dataset.meta.episodes["dataset_to_index"],
            episode_indices_to_use=dataset.episodes, shuffle=True, seed=job.seed,
            absolute_to_relative_idx=dataset.absolute_to_relative_idx,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=config.batch_size, num_workers=workers, sampler=sampler,
            pin_memory=device != "cpu", drop_last=False, **_dataloader_worker_kwargs(config),
        )  # fmt: skip
        self.policy, self.optimizer, loader, self.scheduler = self.accelerator.prepare(
            policy, optimizer, loader, scheduler
        )
        self.cameras, self.clip = dataset.meta.camera_keys, config.optimizer.grad_clip_norm
        self.tracker = MetricsTracker(
            config.batch_size, dataset.num_frames, dataset.num_episodes,
            {name: AverageMeter(name, ":.3f") for name in METERS}, accelerator=self.accelerator,
        )  # fmt: skip
        self.ahead = workers * config.prefetch_factor + 1  # batches that may lie ready
        before = set(multiprocessing.active_children())
        self.batches = cycle(loader)
        self.policy.train()
        self.step()  # starts the workers
        self.workers = [p for p in multiprocessing.active_children() if p not in before] if workers else []

    def step(self) -> None:
        """One turn of its loop: the next batch, processed, and an update."""
        batch: dict[str, Any] = next(self.batches)
        for key in self.cameras:
            if batch[key].dtype == torch.uint8:
                batch[key] = batch[key].float() / 255
        self.tracker, _ = update_policy(
            self.tracker, self.policy, self.preprocessor(batch), self.optimizer, self.clip, self.accelerator,
            lr_scheduler=self.scheduler,
        )  # fmt: skip

    def resume(self) -> None:
        """Use up what the workers had prepared: then they are as far ahead as in a long run."""
        for _ in range(self.ahead if self.workers else 0):
            self.step()

    def pause(self) -> None:
        """Wait until the workers have prepared all that they may, and stand still."""
        while (before := self._worked()) >= 0:
            time.sleep(IDLE_S)
            if self._worked() == before:
                return

    def close(self) -> None:
        """End the workers."""
        self.batches = iter(())
        for worker in self.workers:
            worker.terminate()

    def _worked(self) -> int:
        """Ticks of processor time that the workers have used."""
        stats = [Path(f"/proc/{worker.pid}/stat").read_text() for worker in self.workers]
        return sum(sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats)
