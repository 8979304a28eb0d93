"""Toy policies as LeRobot sees them, for the tests of the plugin. Importing this imports lerobot."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from toy_run import toy_job, toy_model, toy_store

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of importing lerobot are not ours
    from vla.lerobot_plugin.configuration_vla import VLAConfig
    from vla.lerobot_plugin.modeling_vla import VLAPolicy

FRONT = "observation.images.front"
TASKS = ["reach red", "go to the blue target", "reach red"]


def toy_config(model: dict[str, Any] | None = None, **options: Any) -> VLAConfig:
    """model: options of toy_model; options: fields of the policy's own."""
    job = toy_job(Path(), toy_model(**model or {}))
    config = VLAConfig.of(job, toy_store().features, device="cpu")
    return dataclasses.replace(config, **options)


def toy_stats() -> dict[str, dict[str, np.ndarray]]:
    """As LeRobot's dataset.meta.stats."""
    rows = toy_store().statistics().by_key
    return {key: {n: np.array(v) for n, v in dataclasses.asdict(row).items()} for key, row in rows.items()}


def toy_policy(model: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> VLAPolicy:
    """A fresh one, in training mode, its weights drawn anew."""
    torch.manual_seed(seed)
    return VLAPolicy(toy_config(model, **options), dataset_stats=toy_stats())


def toy_batch(n: int = 3, steps: int = 1, chunk_size: int = 4, first: int = 0) -> dict[str, Any]:
    """As LeRobot's loader and preprocessor give it: images as float, channels first."""
    store = toy_store()
    index = first + np.arange(n)[:, None] * 5 + np.arange(steps)
    images = torch.from_numpy(store.images["front"][index]).permute(0, 1, 4, 2, 3).contiguous().float() / 255
    batch: dict[str, Any] = {FRONT: images, "observation.state": torch.from_numpy(store.state[index])}
    if steps == 1:
        batch = {key: x[:, 0] for key, x in batch.items()}
    ahead = np.minimum(index[:, -1:] + np.arange(chunk_size), len(store) - 1)
    batch["action"] = torch.from_numpy(store.action[ahead])
    batch["action_is_pad"] = torch.zeros(n, chunk_size, dtype=torch.bool)
    batch["action_is_pad"][-1, -1] = True
    batch["task"] = [TASKS[i % 3] for i in range(n)]
    return batch


def ours(batch: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """The same observation for Policy.predict_chunk."""
    image, state = batch[FRONT], batch["observation.state"]
    image, state = (x if state.ndim == 3 else x[:, None] for x in (image, state))
    pixels = (image * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
    return {"front": pixels}, state.numpy(), batch["task"]


def weights(policy: VLAPolicy) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in policy.model.named_parameters() if p.requires_grad}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
