"""What the network takes, from a batch as LeRobot's dataset, environments and robots make it.

    B batch   T n_obs_steps   H chunk_size   A action_dim   P state_dim   L length of a left-over

Every function raises ConfigError naming the key that does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vla.checks import ConfigError, require
from vla.observation import ACTION, ACTION_IS_PAD, STATE, TASK, Batch

Keys = Mapping[str, Any]


def images(batch: Keys, cameras: Mapping[str, str], device: torch.device) -> dict[str, Tensor]:
    """camera -> (B, T, 3, h, w) uint8.

    cameras: name -> key, of (B, [T,] 3, h, w), uint8 or float in [0, 1], which LeRobot made of bytes
    and is rounded back to them.
    """
    found = {}
    for name, key in cameras.items():
        image = _present(batch, key).to(device)
        image = image[:, None] if image.ndim == 4 else image
        fits = image.ndim == 5 and image.shape[2] == 3
        require(fits, key, tuple(image.shape), "(B, 3, h, w) or (B, T, 3, h, w)", "see policy.input_features")
        if image.dtype != torch.uint8:
            image = (image * 255).round_().clamp_(0, 255).to(torch.uint8)
        # Colours last in memory, as our own readers give them: convolutions of another layout end in other bits.
        found[name] = image.movedim(2, -1).contiguous().movedim(-1, 2)
    return found


def state(batch: Keys, size: int, device: torch.device) -> Tensor:
    """(B, T, P) float32 of (B, [T,] P), in robot units; size: P."""
    found = _present(batch, STATE).to(device).float()
    found = found[:, None] if found.ndim == 2 else found
    fits = found.ndim == 3 and found.shape[2] == size
    require(
        fits, STATE, tuple(found.shape), f"(B, {size}) or (B, T, {size})",
        "use the data, or the arguments of the environment (--env.kwargs), that it was trained with",
    )  # fmt: skip
    return found


def tasks(batch: Keys, b: int) -> list[str]:
    """B instructions; one alone counts for all."""
    found: Any = _present(batch, TASK)
    found = [found] * b if isinstance(found, str) else [str(each) for each in found]
    require(len(found) == b, TASK, found, f"{b} instructions, one per sample", "pass a list of as many")
    return found


def demonstrated(
    batch: Keys, pictures: dict[str, Tensor], states: Tensor, chunk_size: int, action_dim: int
) -> Batch:
    """The training batch; its instructions travel as text, so that `task` says nothing."""
    b, device = len(states), states.device
    action = _present(batch, ACTION).to(device).float()
    require(
        action.shape == (b, chunk_size, action_dim), ACTION, tuple(action.shape),
        f"(B, policy.chunk_size, action_dim) = {(b, chunk_size, action_dim)}",
        "load data by this policy's own action_delta_indices",
    )  # fmt: skip
    is_pad = batch.get(ACTION_IS_PAD)
    is_pad = torch.zeros(b, chunk_size, dtype=torch.bool) if is_pad is None else is_pad
    nothing = torch.zeros(b, dtype=torch.int64, device=device)
    return Batch(pictures, states, nothing, action, is_pad.to(device))


def committed(
    left_over: Tensor,
    delay: int,
    longest: int,
    states: Tensor,
    chunk_size: int,
    running: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The prefix (B, H, A) in robot units, and how much of it counts, (B,) int64.

    left_over: (L, A) or (B, L, A), the rest of the running chunk, of which `delay` actions are executed
    before the answer is there. LeRobot fills it up with rows of zeros, which are not actions.
    running: (H, A), the chunk that runs. LeRobot drops `delay` actions of the answer, the first of which is
    the one of the observation; that one is under way already, and its left-over begins behind it. Where
    the left-over is the end of the running chunk, the prefix therefore begins one action earlier.
    """
    b = len(states)
    left_over = left_over.to(states.device).float()
    left_over = left_over.expand(b, *left_over.shape[-2:])  # (B, L, A)
    rows = (left_over != 0).any(dim=2).any(dim=0).nonzero()
    left_over = left_over[:, : int(rows.max()) + 1 if len(rows) else 0]
    if running is not None and b == 1:
        left_over = _with_the_one_under_way(left_over[0], running)[None]
    length = min(delay, longest, left_over.shape[1])
    prefix = left_over.new_zeros(b, chunk_size, left_over.shape[2])
    prefix[:, :length] = left_over[:, :length]
    return prefix, torch.full((b,), length, dtype=torch.int64, device=states.device)


def _with_the_one_under_way(left_over: Tensor, running: Tensor) -> Tensor:
    """left_over (L, A), begun one action earlier where `running` (H, A) has it; (L + 1, A) then.

    It is the end of `running`, unless LeRobot has cut it (rtc.execution_horizon).
    """
    n = len(left_over)
    for start in range(len(running) - n if n else 0, 0, -1):
        if torch.equal(running[start : start + n], left_over):
            return running[start - 1 : start + n]
    return left_over


def _present(batch: Keys, key: str) -> Any:
    if key not in batch:
        raise ConfigError(
            key, sorted(batch), "this key in the batch", "rename the data's keys with --rename_map"
        )
    return batch[key]
