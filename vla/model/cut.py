"""One dataset's policy out of a network trained on a mixture.

The mixture's network has the cameras of all its datasets and their largest state and action. States and
actions of a smaller one were padded with zeros, its missing cameras were hidden from attention: rows and
columns of the weights that only they touch can go, and what is left computes the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vla.architecture import ModelConfig
from vla.checks import require
from vla.observation import Features

ANY_LENGTH = (
    "full",
    "window",
)  # kinds of attention whose weights and buckets do not hang on the sequence's length


def bin_rows(config: ModelConfig, largest: int, own: int) -> Tensor:
    return torch.arange(largest * config.bins).view(largest, config.bins)[:own].flatten()


def component_rows(config: ModelConfig, largest: int, own: int) -> Tensor:
    """Of each component: its weight, its means, its scales."""
    rows = torch.arange(config.components * (1 + 2 * largest)).view(config.components, -1)
    weight, means, scales = rows.split([1, largest, largest], dim=1)
    return torch.cat([weight, means[:, :own], scales[:, :own]], dim=1).flatten()


def first_rows(config: ModelConfig, largest: int, own: int) -> Tensor:
    return torch.arange(own)


# Which rows of `head.out` make the first `own` of `largest` dimensions of an action.
ROWS: dict[str, Callable[[ModelConfig, int, int], Tensor]] = {
    "l1": first_rows,
    "bins": bin_rows,
    "gmm": component_rows,
    "flow": first_rows,
}


def cut(
    weights: dict[str, Tensor], config: ModelConfig, mixture: Features, own: Features
) -> dict[str, Tensor]:
    """The weights of a network for `own`, out of those of one for the mixture's features, adapters merged."""
    cameras = torch.tensor([sorted(mixture.cameras).index(name) for name in sorted(own.cameras)])
    rows = ROWS[config.head](config, mixture.action_dim, own.action_dim)
    result = dict(weights)
    for name, tensor in weights.items():
        if name == "tokens.image.camera" or name.startswith("head.out."):
            result[name] = tensor[cameras if name == "tokens.image.camera" else rows]
        elif name == "tokens.state.up.weight":
            result[name] = tensor[:, : own.state_dim]
        elif name in ("actions.committed.weight", "actions.previous.weight", "head.noisy.weight"):
            result[name] = tensor[:, : own.action_dim]
    return {name: tensor.contiguous() for name, tensor in result.items()}


def require_cuttable(config: ModelConfig, cameras: list[set[str]]) -> None:
    """Raise ConfigError unless each dataset of a mixture, with these cameras, can have a policy of its own."""
    kind = config.attention.kind
    require(
        kind in ANY_LENGTH or len(set(map(frozenset, cameras))) < 2, "model.attention.kind", kind,
        f"{' or '.join(ANY_LENGTH)} with data.mix of datasets with different cameras",
        "set model.attention.kind=full, or choose the same cameras of each",
    )  # fmt: skip
