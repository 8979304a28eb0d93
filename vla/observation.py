"""The words every part shares, from the dataset on disk to the robot.

Keys are LeRobot's, verbatim. Shapes, everywhere in this project:

    B batch            T n_obs_steps (history)      C cameras
    H chunk_size       A action_dim                 P state_dim
    L text tokens      D d_model                    S memory length

This module imports neither torch nor anything of vla, so that environments and robot
controllers can use it on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = "observation.images."
STATE = "observation.state"
ENVIRONMENT_STATE = "observation.environment_state"  # LeRobot's name; here never an input
ACTION = "action"
ACTION_IS_PAD = "action_is_pad"
TASK = "task"
IS_SUCCESS = "is_success"


def camera_keys(keys: Any) -> list[str]:
    """The keys that hold images, in alphabetical order (the order the model sees cameras in)."""
    return sorted(key for key in keys if key.startswith(IMAGES))


@dataclass(frozen=True)
class Features:
    """What a dataset or an environment delivers; the model takes its sizes from here.

    cameras: name without prefix -> (height, width) in pixels; fps: observations a second.
    """

    cameras: dict[str, tuple[int, int]]
    state_dim: int
    action_dim: int
    fps: int

    @classmethod
    def of_json(cls, sizes: dict[str, Any]) -> Features:
        """The inverse of dataclasses.asdict, for which JSON has no tuples."""
        cameras = {name: tuple(size) for name, size in sizes["cameras"].items()}
        return cls(cameras, sizes["state_dim"], sizes["action_dim"], sizes["fps"])

    @classmethod
    def of_spaces(cls, observation_space: Any, action_space: Any, fps: int) -> Features:
        """Read the sizes from a gymnasium environment's spaces.

        Raises ValueError when the observation is not a Dict with LeRobot's keys, images of
        (height, width, 3) uint8 and a one-dimensional state.
        """
        spaces: Mapping[str, Any] = getattr(observation_space, "spaces", {})
        keys = camera_keys(spaces)
        vectors = [getattr(space, "shape", None) or () for space in (spaces.get(STATE), action_space)]
        if (
            not keys
            or not all(map(is_picture, (spaces[key] for key in keys)))
            or [*map(len, vectors)] != [1, 1]
        ):
            seen = {key: str(spaces[key]) for key in [*keys, STATE] if key in spaces}
            raise ValueError(
                f"The environment's spaces do not fit. got: observation {seen} among {sorted(spaces)}, "
                f"action {action_space}. expected: at least one '{IMAGES}<camera>' of (height, width, 3) "
                f"uint8, '{STATE}' and actions as one-dimensional Boxes. "
                "remedy: rename, convert or flatten them in a wrapper."
            )
        cameras = {key.removeprefix(IMAGES): tuple(spaces[key].shape[:2]) for key in keys}
        return cls(cameras, spaces[STATE].shape[0], action_space.shape[0], fps)

    def require(self, other: Features, what: str, closed_loop: bool = False) -> None:
        """Raise ValueError unless `other` can stand in for these features (fps may differ).

        closed_loop: `other` is what a policy with these features acts in. It may show more cameras
        than the policy looks at, but must run at its rate, or every action would mean another motion.
        """
        for name in ("cameras", "state_dim", "action_dim", *(["fps"] if closed_loop else [])):
            expected, got = getattr(self, name), getattr(other, name)
            if name == "cameras":  # resolutions may differ, the model resizes; names may not
                expected, got = sorted(expected), sorted(got)
            if expected != got and not (closed_loop and name == "cameras" and set(expected) <= set(got)):
                raise ValueError(
                    f"{what} does not fit: {name}. got: {got}. expected: {expected}. "
                    "remedy: use the data, environment and checkpoint that belong together."
                )


def is_picture(space: Any) -> bool:
    """Whether a gymnasium space holds images of (height, width, 3) uint8."""
    shape = getattr(space, "shape", None) or ()
    return len(shape) == 3 and shape[2] == 3 and str(getattr(space, "dtype", "")) == "uint8"


@dataclass
class Tokens:
    """A sequence and its padding, which never travel apart.

    x: (B, S, D) float; pad: (B, S) bool, True where a token is to be ignored.
    """

    x: Tensor
    pad: Tensor

    def __getitem__(self, index: Any) -> Tokens:
        """Select along the batch axis."""
        return Tokens(self.x[index], self.pad[index])


@dataclass
class Observation:
    """What the model sees; nothing else reaches it.

    images: camera -> (B, T, 3, h, w) uint8; state: (B, T, P) float32 in robot units;
    text: the instruction's features from the text encoder, (B, L, text width), with padding;
    absent: (B, C) bool, True where a camera (in alphabetical order) shows nothing; None: all are there;
    source: (B,) int64, the dataset each sample is of, in training on several; None: there is one.
    """

    images: dict[str, Tensor]
    state: Tensor
    text: Tokens
    absent: Tensor | None = None
    source: Tensor | None = None


@dataclass
class Batch:
    """One training batch, on the training device.

    images: camera -> (B, T, 3, h, w) uint8; state: (B, T, P); task: (B,) int64, an index into
    the dataset's list of instructions; action: (B, H, A) in robot units;
    action_is_pad: (B, H) bool, True behind the episode's end.
    Of several datasets only: absent (B, C) bool, cameras that the sample's dataset lacks, in
    alphabetical order; source (B,) int64, which dataset it is of. Sizes P and A are then the largest.
    environment_state: (B, K) float32, what only a simulator knows (where things are) at the newest observation;
    a target of training, never an input; None where the dataset has none.
    """

    images: dict[str, Tensor]
    state: Tensor
    task: Tensor
    action: Tensor
    action_is_pad: Tensor
    absent: Tensor | None = None
    source: Tensor | None = None
    environment_state: Tensor | None = None

    def __getitem__(self, part: slice) -> Batch:
        """Some of the samples, without a copy."""
        return self.map(lambda x: x[part])

    def copy_(self, other: Batch) -> None:
        """Take over the content of another batch of the same shapes, without waiting for the device."""
        for name, image in self.images.items():
            image.copy_(other.images[name], non_blocking=True)
        for mine, theirs in zip(self._vectors(), other._vectors(), strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs, non_blocking=True)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed."""
        return Batch(
            {name: change(x) for name, x in self.images.items()},
            *(None if x is None else change(x) for x in self._vectors()),  # pyright: ignore[reportArgumentType]
        )

    def _vectors(self) -> tuple[Tensor | None, ...]:
        """All but the images."""
        rest = self.absent, self.source, self.environment_state
        return self.state, self.task, self.action, self.action_is_pad, *rest
