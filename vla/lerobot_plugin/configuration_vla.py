"""`--policy.type=vla`: the options of the network and of its training, by the names they have here.

Every field of `ModelConfig` is one of VLAConfig, derived from it, so that a new option of the network
is an option of LeRobot's commands by itself: `--policy.head=flow --policy.image.pixels=64`.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import draccus
from draccus.utils import ParsingError
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamWConfig, LRSchedulerConfig
from lerobot.optim.schedulers import CosineAnnealingWithWarmupSchedulerConfig

from vla.architecture import ModelConfig
from vla.checks import ConfigError, require
from vla.config import DataConfig, EvaluateConfig, Job, TrainConfig, decode
from vla.observation import ACTION, IMAGES, STATE, Features

# A field of a job (config.yaml) -> the field here; those of the network keep their names.
NAMES = {
    "train.lr": "optimizer_lr",
    "train.weight_decay": "optimizer_weight_decay",
    "train.betas": "optimizer_betas",
    "train.grad_clip": "optimizer_grad_clip_norm",
    "train.warmup_steps": "scheduler_warmup_steps",
    "train.ema_decay": "ema_decay",
    "train.precision": "precision",
    "data.brightness": "brightness",
    "data.contrast": "contrast",
    "data.shift": "shift",
    "evaluate.n_action_steps": "n_action_steps",
}


def unchecked(cls: type, without: tuple[str, ...] = ()) -> Any:
    """A configuration's fields as a dataclass that checks nothing: `architecture` does, naming policy.x.

    It keeps module and name of the original, so that --help finds the comments beside the fields.
    """
    hints, rows = get_type_hints(cls), []
    for f in fields(cls):
        kind = hints[f.name]
        if is_dataclass(kind):
            kind = unchecked(kind)  # pyright: ignore[reportArgumentType]
            default = field(default_factory=kind)
        else:
            default = field(default=f.default)
        if f.name not in without:
            rows.append((f.name, kind, default))
    return make_dataclass(cls.__name__, rows, module=cls.__module__)


if TYPE_CHECKING:
    Network = ModelConfig
else:
    Network = unchecked(ModelConfig, without=("n_obs_steps",))  # which is a field of LeRobot's


def identity() -> dict[str, NormalizationMode]:
    return dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)


@PreTrainedConfig.register_subclass("vla")
@dataclass  # pyright: ignore[reportGeneralTypeIssues]
class VLAConfig(Network, PreTrainedConfig):
    """A network and how LeRobot's trainer trains it. Defaults are those of scripts/train.py.

    Raises ParsingError naming policy.<field> for what cannot work: of a ValueError LeRobot's command
    line says only that the class could not be instantiated.
    """

    n_action_steps: int = EvaluateConfig.n_action_steps  # executed of each chunk before replanning
    precision: str = TrainConfig.precision  # auto: bf16 where the hardware multiplies it | fp32 | bf16
    ema_decay: float = TrainConfig.ema_decay  # of the averaged weights, which act; 0: no average
    optimizer_lr: float = TrainConfig.lr
    optimizer_weight_decay: float = TrainConfig.weight_decay  # of matrices only
    optimizer_betas: tuple[float, float] = TrainConfig.betas
    optimizer_grad_clip_norm: float = TrainConfig.grad_clip
    scheduler_warmup_steps: int = TrainConfig.warmup_steps  # then half a cosine to zero at the last step
    brightness: float = DataConfig.brightness  # augmentation: factor drawn in [1 - b, 1 + b]
    contrast: float = DataConfig.contrast
    shift: int = DataConfig.shift  # augmentation: at most so many pixels
    # Kept by training, in train_config.json only: --resume goes on from there, --policy.path begins anew.
    updates: int = 0
    # The network normalises by itself (policy.normalization), so that its weights mean the same everywhere.
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=identity)
    push_to_hub: bool = False  # LeRobot's default is true, and then wants policy.repo_id

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self._check()
        except ConfigError as error:
            raise ParsingError(str(error)) from None

    def _check(self) -> None:
        for name, mode in self.normalization_mapping.items():
            require(
                mode == NormalizationMode.IDENTITY, f"policy.normalization_mapping.{name}", mode.value,
                "IDENTITY, as the network normalises by itself", "choose how by policy.normalization",
            )  # fmt: skip
        require(
            self.lora.rank == 0, "policy.lora.rank", self.lora.rank, "0 in LeRobot's trainer",
            "use LeRobot's own --peft.method_type=LORA, or scripts/train.py --model.lora.rank=8",
        )  # fmt: skip
        require(
            self.auxiliary == 0, "policy.auxiliary", self.auxiliary, "0 in LeRobot's trainer",
            f"use scripts/train.py --model.auxiliary={self.auxiliary}, and convert its checkpoint",
        )  # fmt: skip
        # Frozen image weights need a checkpoint, which is known only later: the policy checks that.
        self.job(Job(train=TrainConfig(init="any")))

    @classmethod
    def of(cls, job: Job, features: Features, **options: Any) -> VLAConfig:
        """The configuration of a checkpoint of this project; options: LeRobot's own fields."""
        network = draccus.encode(job.model.deployed)
        own = {theirs: _get(job, ours) for ours, theirs in NAMES.items()}
        steps = network.pop("n_obs_steps")
        plain = draccus.decode(Network, network)
        shapes = {f"{IMAGES}{name}": (3, *size) for name, size in features.cameras.items()}
        inputs = {key: PolicyFeature(FeatureType.VISUAL, shape) for key, shape in shapes.items()}
        inputs |= {STATE: PolicyFeature(FeatureType.STATE, (features.state_dim,))}
        outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (features.action_dim,))}
        values = {f.name: getattr(plain, f.name) for f in fields(plain)}
        return cls(
            n_obs_steps=steps, input_features=inputs, output_features=outputs, **own, **values, **options
        )

    @property
    def architecture(self) -> ModelConfig:
        """The network's configuration, checked and complete. Raises ConfigError."""
        tree = {f.name: draccus.encode(getattr(self, f.name)) for f in fields(ModelConfig)}
        try:
            return decode(ModelConfig, tree)
        except ConfigError as error:
            raise _renamed(error) from None

    def job(self, base: Job) -> Job:
        """`base` with what is configured here: what a checkpoint keeps as config.yaml. Raises ConfigError."""
        sections: dict[str, Any] = {}
        try:
            for ours, theirs in NAMES.items():
                section, _, name = ours.partition(".")
                changed = sections.get(section, getattr(base, section))
                sections[section] = replace(changed, **{name: getattr(self, theirs)})
            return replace(base, model=self.architecture, **sections)
        except ConfigError as error:
            raise _renamed(error) from None

    @property
    def cameras(self) -> dict[str, str]:
        """Camera name -> key of its colour images; depth maps, of one channel, are not among them."""
        keys = sorted(
            key for key, feature in self.image_features.items() if 3 in feature.shape[:1] + feature.shape[2:]
        )
        return {key.removeprefix(IMAGES).removeprefix("observation."): key for key in keys}

    def features(self, fps: int) -> Features:
        """What the network takes its sizes from, at `fps` observations a second."""
        self.validate_features()
        shapes = {name: self.image_features[key].shape for name, key in self.cameras.items()}
        sizes = {name: (s[1], s[2]) if s[0] == 3 else (s[0], s[1]) for name, s in shapes.items()}
        state, action = self.robot_state_feature, self.action_feature
        assert state is not None  # validate_features saw them
        assert action is not None
        return Features(sizes, state.shape[0], action.shape[0], fps)

    def validate_features(self) -> None:
        """Raise ConfigError unless there are colour cameras of different names, a state and an action."""
        inputs, outputs = self.input_features or {}, self.output_features or {}
        left = sorted(set(self.image_features) - set(self.cameras.values()))
        require(
            bool(self.cameras), "policy.input_features", sorted(inputs),
            f"at least one '{IMAGES}<camera>' of 3 channels",
            "use a dataset with a colour camera",
        )  # fmt: skip
        colliding = [key for key in left if self.image_features[key].shape[0] == 3]
        require(not colliding, "policy.input_features", colliding, "cameras of different names", "rename one")
        if left:
            logging.warning(f"policy.input_features: {left} are not read, they have no 3 channels")
        for what, feature, keys in (
            (STATE, self.robot_state_feature, inputs),
            (ACTION, self.action_feature, outputs),
        ):
            fits = feature is not None and len(feature.shape) == 1
            where = "input" if what == STATE else "output"
            require(
                fits, f"policy.{where}_features", sorted(keys), f"'{what}' of shape (D,) among them",
                "rename or add the column when recording the data",
            )  # fmt: skip

    @property
    def observation_delta_indices(self) -> list[int] | None:
        return None if self.n_obs_steps == 1 else list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr, betas=self.optimizer_betas, weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )  # fmt: skip

    def get_scheduler_preset(self) -> LRSchedulerConfig:
        """As `vla.training.step.learning_rate`, but that LeRobot's warm-up begins at 0: one step later."""
        return CosineAnnealingWithWarmupSchedulerConfig(num_warmup_steps=self.scheduler_warmup_steps)

    def _save_pretrained(self, save_directory: Path) -> None:
        """config.json, which says nothing of the run: who loads it by --policy.path begins another one."""
        begun = copy.copy(self)
        begun.updates = 0
        super(VLAConfig, begun)._save_pretrained(save_directory)


def _get(job: Job, name: str) -> Any:
    section, _, field_name = name.partition(".")
    return getattr(getattr(job, section), field_name)


def _renamed(error: ConfigError) -> ConfigError:
    """The same error in the words of LeRobot's command line."""
    name, got, expected, remedy = error.parts
    if name in {f.name for f in fields(ModelConfig)}:  # of the type of a value
        name = f"model.{name}"
    texts = []
    for text in (name, expected, remedy):
        for ours, theirs in (NAMES | {"train.init": "path"}).items():
            text = text.replace(ours, f"policy.{theirs}")
        texts.append(text.replace("model.", "policy."))
    return ConfigError(texts[0], got, texts[1], texts[2])
