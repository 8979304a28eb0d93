"""Any LeRobot policy in our evaluator: the folder `pretrained_model` of its trainer as predict_chunk.

    B batch   T n_obs_steps   H chunk_size   A action_dim   P state_dim

LeRobot's own classes and processors do the work, on the batches that its trainer would give them. Two
things are refused: a policy whose chunk depends on earlier calls, and inputs the evaluator does not have.
lerobot is imported when a policy is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla.checks import ConfigError, require
from vla.device import resolve_device
from vla.inputs import Inputs
from vla.lerobot_plugin.told import WIDTH, Sentences
from vla.observation import ACTION, ENVIRONMENT_STATE, IMAGES, STATE, TASK, Features
from vla.training.checkpoint import pretrained_folders

CONFIG, WEIGHTS, TRAINING = "config.json", "model.safetensors", "train_config.json"


class LeRobotPolicy:
    """What vla.evaluation plays: chunk_size is what one call of the policy returns, counted from now.

    Chunks depend on the observation alone. A policy that samples (Diffusion) draws from a generator that
    starts anew with every policy, so that an evaluation can be repeated.
    """

    def __init__(self, network: Any, before: Any, after: Any, features: Features, checkpoint: Path) -> None:
        self.network, self.before, self.after, self.checkpoint = network, before, after, checkpoint
        self.type: str = network.config.type
        self.calls = 0  # the seed of the next call
        self.sentences = Sentences() if network.config.env_state_feature else None
        self.inputs = Inputs(features, 1, read_history(network.config), 0, fixed_size=True)
        self.chunk_size = self._probe()

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", dataset: Path | None = None) -> LeRobotPolicy:
        """Load a `pretrained_model` folder, or the last one of a run's output folder. Needs no network.

        dataset: what it was trained on, for the frame rate, where train_config.json does not lead there.
        Raises ConfigError naming the file or field that cannot be used.
        """
        folder = find(path)
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("type")
        from draccus.utils import DraccusException
        from lerobot.configs import PreTrainedConfig
        from lerobot.policies import get_policy_class, make_pre_post_processors
        from lerobot.processor.pipeline import ProcessorMigrationError
        from lerobot.utils.import_utils import register_third_party_plugins

        if kind not in PreTrainedConfig.get_known_choices():
            register_third_party_plugins()
        known = sorted(PreTrainedConfig.get_known_choices())
        require(
            kind in known and kind != "vla", f"{CONFIG}: type", kind,
            "vla beside a manifest.json, or one of " + ", ".join(name for name in known if name != "vla"),
            "copy the whole folder, or install the plugin that this policy came with",
        )  # fmt: skip
        try:
            config = PreTrainedConfig.from_pretrained(folder, local_files_only=True)
        except (DraccusException, TypeError) as error:  # of another version of lerobot
            got = " ".join(str(error).split())[:300]
            raise ConfigError(CONFIG, got, f"fields of lerobot {version('lerobot')}", "load it with the version that "
                              "wrote it") from error  # fmt: skip
        config.device = str(resolve_device(device))
        if hasattr(config, "pretrained_backbone_weights"):  # would be downloaded, then overwritten
            config.pretrained_backbone_weights = None  # pyright: ignore[reportAttributeAccessIssue]
        features = read_features(config, read_fps(folder, dataset))
        try:
            network = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
        except (ImportError, RuntimeError) as error:  # a package that it wants; weights that do not fit
            field = f"{CONFIG}: type" if isinstance(error, ImportError) else WEIGHTS
            got, expected = (
                " ".join(str(error).split())[:300],
                f"a policy of type {kind} that lerobot can load",
            )
            raise ConfigError(
                field, got, expected, "copy the whole folder again, or do what it says"
            ) from error
        device_step = {"device_processor": {"device": config.device}}
        try:
            before, after = make_pre_post_processors(
                config, pretrained_path=str(folder), preprocessor_overrides=device_step
            )
        except (ProcessorMigrationError, OSError, ValueError) as error:
            got = " ".join(str(error).split())[:300]
            raise ConfigError(
                "processors", got, "policy_preprocessor.json and policy_postprocessor.json beside the weights",
                "copy the whole folder, or migrate it with lerobot",
            ) from error  # fmt: skip
        return cls(network, before, after, features, folder)

    @property
    def features(self) -> Features:
        return self.inputs.features

    @property
    def n_obs_steps(self) -> int:
        return self.inputs.n_obs_steps

    def require_cameras(self, got: set[str]) -> None:
        """Raise ValueError unless these are the policy's cameras: it does without none."""
        self.inputs.require_cameras(got)

    def predict_chunk(
        self, images: dict[str, np.ndarray], state: np.ndarray, tasks: Sequence[str]
    ) -> np.ndarray:
        """The next H actions for B robots at once, as vla.policy.Policy.predict_chunk says.

        images: camera -> (B, T, h, w, 3) uint8 of the trained size; state: (B, T, P) float32;
        tasks: B instructions, which only some policies read. Returns (B, H, A) float32 in robot units.
        Raises ValueError when something does not fit the policy.
        """
        self.inputs.check(images, state, tasks, None, None)
        batch: dict[str, Any] = {
            IMAGES + name: torch.from_numpy(np.ascontiguousarray(image)).permute(0, 1, 4, 2, 3).float() / 255
            for name, image in images.items()
        }
        batch[STATE] = torch.from_numpy(np.ascontiguousarray(state)).float()
        if self.sentences is not None:
            told = torch.from_numpy(self.sentences(tasks))
            batch[ENVIRONMENT_STATE] = told[:, None].repeat(1, self.n_obs_steps, 1)  # (B, T, 384)
        if self.network.config.observation_delta_indices is None:  # trained on batches without time
            batch = {key: value[:, 0] for key, value in batch.items()}
        return self._chunk(batch | {TASK: list(tasks)}).float().cpu().numpy()

    @torch.inference_mode()
    def _chunk(self, batch: dict[str, Any]) -> Tensor:
        self.network.reset()  # nothing of the call before
        cuda = [torch.cuda.current_device()] if self.network.config.device.startswith("cuda") else []
        config = self.network.config
        amp = torch.autocast(torch.device(config.device).type, enabled=config.use_amp)  # as lerobot-eval does
        with torch.random.fork_rng(devices=cuda), amp:
            torch.manual_seed(self.calls)
            chunk = self.network.predict_action_chunk(self.before(batch))
        self.calls += 1
        return self.after(chunk)

    def _probe(self) -> int:
        """H, by asking once. Raises ConfigError for a policy that needs more than one batch."""
        f, t = self.features, self.n_obs_steps
        images = {name: np.zeros((1, t, *size, 3), np.uint8) for name, size in f.cameras.items()}
        shape: tuple[int, ...] = ()
        try:
            shape = self.predict_chunk(images, np.zeros((1, t, f.state_dim), np.float32), [""]).shape
            got = f"{self.type!r}, which answers with shape {shape}"
        except (RuntimeError, LookupError, TypeError, AttributeError) as error:
            got = f"{self.type!r}, which raises {type(error).__name__}: {error}"
        if len(shape) != 3 or shape[::2] != (1, f.action_dim):
            expected = f"a policy whose predict_action_chunk turns one batch into (1, H, {f.action_dim})"
            raise ConfigError(f"{CONFIG}: type", got, expected, "evaluate it with lerobot-eval")
        self.calls = 0
        return shape[1]


def find(path: str | Path) -> Path:
    """The folder of a LeRobot policy, given itself, its step's folder, or a run's output (the last one).

    Raises ConfigError when there is none.
    """
    for folder in pretrained_folders(Path(path)):
        if (folder / CONFIG).is_file():
            require(
                (folder / WEIGHTS).is_file(), "checkpoint", f"{folder} without {WEIGHTS}", "the policy's weights",
                "merge adapters into their base first, or copy the whole folder",
            )  # fmt: skip
            return folder
    raise ConfigError(
        "checkpoint", str(path), f"a folder with {CONFIG}, or a run of lerobot-train", "correct the path"
    )


def read_features(config: Any, fps: int) -> Features:
    """What a policy of LeRobot's takes and returns, as ours name it. Raises ConfigError naming what has no place."""
    cameras = {key: (ft.shape[1], ft.shape[2]) for key, ft in config.image_features.items()}
    for key, feature in config.input_features.items():
        known = key == STATE or (key in cameras and key.startswith(IMAGES))
        if key == ENVIRONMENT_STATE:
            require(
                tuple(feature.shape) == (WIDTH,), f"{CONFIG}: input_features.{key}", tuple(feature.shape),
                f"({WIDTH},), a sentence embedding", "train on a dataset that vla.lerobot_plugin.told wrote",
            )  # fmt: skip
        elif not known:
            expected = f"{IMAGES}<camera>, {STATE} or {ENVIRONMENT_STATE}"
            raise ConfigError(
                f"{CONFIG}: input_features", key, expected, "rename it in the dataset and train again"
            )
    for key, feature in ((STATE, config.robot_state_feature), (ACTION, config.action_feature)):
        require(feature is not None, f"{CONFIG}: features", f"no {key}", key, "train with it")
    require(bool(cameras), f"{CONFIG}: input_features", "no camera", f"{IMAGES}<camera>", "train with one")
    sizes = {key.removeprefix(IMAGES): size for key, size in cameras.items()}
    return Features(sizes, config.robot_state_feature.shape[0], config.action_feature.shape[0], fps)


def read_history(config: Any) -> int:
    """T. Raises ConfigError for a policy that was trained on other frames than the last T."""
    deltas = config.observation_delta_indices
    steps = 1 if deltas is None else len(deltas)
    require(
        deltas is None or list(deltas) == list(range(1 - steps, 1)),
        f"{CONFIG}: observation_delta_indices of {config.type}", deltas, "the last frames, none left out",
        "evaluate it with lerobot-eval",
    )  # fmt: skip
    return steps


def read_fps(folder: Path, dataset: Path | None) -> int:
    """Frames a second of the dataset the policy was trained on. Raises ConfigError when it is not to be found."""
    from lerobot.utils.constants import HF_LEROBOT_HOME

    places, path = [dataset], folder / TRAINING
    if path.is_file():
        trained = json.loads(path.read_text(encoding="utf-8")).get("dataset") or {}
        root, name = trained.get("root"), trained.get("repo_id")
        places = [Path(root) if root else None, HF_LEROBOT_HOME / str(name), dataset]
    for place in places:
        if place is not None and (info := place / "meta" / "info.json").is_file():
            return json.loads(info.read_text(encoding="utf-8"))["fps"]
    got = f"no dataset at {' or '.join(str(place) for place in places if place)}"
    raise ConfigError("fps", got, "the dataset it was trained on", "name its folder by --data.root")
