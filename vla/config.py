"""The configuration of every job: frozen dataclasses, a YAML file, and --a.b=c.

One file in configs/ describes one result from recording to evaluation (`Job`); each script
reads the same file and uses its part of it. Sizes that the data knows (cameras, state and
action dimensions) are not configured. This module imports neither torch nor lerobot.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla import __version__
from vla.architecture import (
    SIZES,
    AttentionConfig,
    ImageConfig,
    LoraConfig,
    ModelConfig,
    ResamplerConfig,
    TextConfig,
)
from vla.checks import ConfigError, apply_arguments, check, one_of, read_yaml, require

__all__ = [
    "SIZES", "AttentionConfig", "ConfigError", "DataConfig", "EnvConfig", "EvaluateConfig", "ImageConfig",
    "Job", "LoraConfig", "MixConfig", "ModelConfig", "RecordConfig", "ResamplerConfig", "TextConfig", "TrainConfig",
    "dump", "load", "one_of", "require", "untrained",
]  # fmt: skip


@dataclass(frozen=True)
class EnvConfig:
    """A gymnasium environment: `module:Id-v0` and the keyword arguments of its constructor."""

    id: str = "envs:Tabletop-v0"
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordConfig:
    """Demonstrations by the environment's own expert."""

    episodes: int = 200
    noise: float = 0.2  # standard deviation added to the executed action; labels stay clean
    noise_episodes: float = 0.5  # share of episodes that carry the noise
    lead_in: int = 0  # at most so many steps of random motion before the recording of an episode starts
    instructions_per_scene: int = 1  # episodes that share a scene, each with another of its instructions
    tail_steps: int = 3  # steps kept after the first success, where the environment goes on
    workers: int = 0  # 0: one per core
    seed: int = 0  # scene of the first episode; evaluation starts elsewhere
    shard_episodes: int = 100  # what a kill can cost
    # lerobot: a LeRobotDataset v3.0. frames: training's own arrays (vla.data.frames), which need no package but
    # numpy and no decoding, and 3 bytes for each pixel of each frame.
    format: str = "lerobot"
    vcodec: str = "h264"  # lossless 4:4:4; libsvtav1 is smaller, slower, and blurs colour
    # Record what only the simulator knows (positions of things) as observation.environment_state: a target for
    # model.auxiliary. LeRobot's own policies would take a column of that name as an input.
    environment_state: bool = False

    def __post_init__(self) -> None:
        require(self.episodes > 0, "record.episodes", self.episodes, "a positive number")
        require(self.noise >= 0, "record.noise", self.noise, "0 or more")
        require(
            0 <= self.noise_episodes <= 1, "record.noise_episodes", self.noise_episodes, "a share in [0, 1]"
        )
        for name in ("lead_in", "tail_steps", "workers", "seed"):
            require(getattr(self, name) >= 0, f"record.{name}", getattr(self, name), "0 or more")
        require(
            self.instructions_per_scene > 0,
            "record.instructions_per_scene",
            self.instructions_per_scene,
            "1 or more",
        )
        require(self.shard_episodes > 0, "record.shard_episodes", self.shard_episodes, "a positive number")
        one_of("record.format", self.format, ("lerobot", "frames"))


@dataclass(frozen=True)
class MixConfig:
    """One dataset of a mixture."""

    root: str = ""
    repo_id: str = ""  # as in DataConfig
    weight: float = 1.0  # its share of the samples is this over the sum of all
    cameras: tuple[str, ...] = ()  # empty: all


@dataclass(frozen=True)
class DataConfig:
    """Which LeRobotDataset to train on, or which ones, and how their frames are augmented."""

    root: str = ""  # a dataset's folder; empty: <output>/dataset, where record.py writes
    repo_id: str = ""  # a hub name, downloaded by lerobot when root does not exist
    cameras: tuple[str, ...] = ()  # empty: all
    mix: dict[str, MixConfig] = field(default_factory=dict)  # several by name, in place of root
    stream: bool = False  # decode while training, in place of a frame store: for data larger than memory
    cache_mb: float = 4096  # decoded frames in memory when streaming, of all datasets together
    start_share: float = 0.0  # of samples from the first frames of episodes, where the instruction decides
    brightness: float = 0.1  # augmentation: factor drawn in [1 - b, 1 + b]
    contrast: float = 0.1
    shift: int = 2  # augmentation: at most so many pixels; large ones destroy absolute position

    def __post_init__(self) -> None:
        require(0 <= self.start_share <= 1, "data.start_share", self.start_share, "a share in [0, 1]")
        require(self.cache_mb > 0, "data.cache_mb", self.cache_mb, "a positive number")
        for name in ("root", "repo_id", "cameras"):
            given = getattr(self, name)
            require(
                not (self.mix and given), f"data.{name}", given, "nothing beside data.mix",
                f"set data.mix.<name>.{name} of each dataset",
            )  # fmt: skip
        for name, member in self.mix.items():
            require(bool(member.root), f"data.mix.{name}.root", member.root, "a dataset's folder")
            require(
                0 < member.weight < math.inf, f"data.mix.{name}.weight", member.weight, "a positive number"
            )
            require(name.isidentifier(), "data.mix", name, "names of letters, digits and _")


@dataclass(frozen=True)
class TrainConfig:
    """Behaviour cloning: AdamW, warm-up and cosine, clipping, EMA."""

    steps: int = 20_000
    batch_size: int = 64
    lr: float = 3e-4
    init: str = ""  # a checkpoint of this project whose weights to begin with, as far as they fit
    warmup_steps: int = 200
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    ema_decay: float = 0.999  # 0: no average
    precision: str = "auto"  # auto: bf16 where the device multiplies it in hardware | fp32 | bf16
    accumulate: int = 1  # parts that a batch is handled in, one after the other: less memory, the same result
    compile: bool = False
    capture: bool = True  # on a GPU, the whole step as one CUDA graph
    device: str = "auto"  # auto | cpu | cuda | cuda:1 ...
    threads: int = 0  # CPU threads of torch; 0: its own choice
    log_every: int = 50
    save_every: int = 1000
    keep: int = 2  # checkpoints kept, the newest
    evaluate_every: int = 0  # 0: not during training
    evaluate_episodes: int = 20
    wandb: str = "auto"  # auto: online with a key, else offline | online | offline | disabled
    wandb_project: str = "vla"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep",
                     "evaluate_episodes"):  # fmt: skip
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "a positive number")
        require(
            self.batch_size % self.accumulate == 0, "train.accumulate", self.accumulate,
            f"a divisor of train.batch_size={self.batch_size}",
        )  # fmt: skip
        require(self.lr > 0, "train.lr", self.lr, "a positive number")
        for name in ("warmup_steps", "weight_decay"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        require(
            self.grad_clip > 0, "train.grad_clip", self.grad_clip, "a positive number", "use .inf for none"
        )
        require(all(0 <= b < 1 for b in self.betas), "train.betas", self.betas, "two decays in [0, 1)")
        one_of("train.precision", self.precision, ("auto", "fp32", "bf16"))
        one_of("train.wandb", self.wandb, ("auto", "online", "offline", "disabled"))
        require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "a decay in [0, 1)")


@dataclass(frozen=True)
class EvaluateConfig:
    """Closed-loop evaluation on seeds that no demonstration used."""

    episodes: int = 100  # per split
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> extra env kwargs
    controls: bool = True  # counterfactual pairs, shuffled and blank instructions (first split)
    n_action_steps: int = 8  # executed of each chunk before replanning
    without: tuple[str, ...] = ()  # cameras that the policy is not shown; see model.camera_dropout
    ensemble: float = 0.0  # > 0: temporal ensembling, weights exp(-ensemble * i), i = 0 the oldest
    seed: int = 1_000_000
    workers: int = 0  # 0: one per core
    slots: int = 32  # environments stepped side by side; part of the result, unlike workers
    videos: int = 8  # episodes filmed per split
    device: str = "auto"
    dataset: str = ""  # of a mixture (data.mix), whose robot is evaluated
    launch: str = (
        "graph"  # on a GPU: graph | eager | compiled, which pays in long evaluations | auto: compiled
    )

    def __post_init__(self) -> None:
        for name in ("episodes", "n_action_steps", "slots"):
            require(getattr(self, name) > 0, f"evaluate.{name}", getattr(self, name), "a positive number")
        for name in ("workers", "videos", "seed"):
            require(getattr(self, name) >= 0, f"evaluate.{name}", getattr(self, name), "0 or more")
        one_of("evaluate.launch", self.launch, ("auto", "eager", "graph", "compiled"))
        require(self.ensemble >= 0, "evaluate.ensemble", self.ensemble, "0 or more")


@dataclass(frozen=True)
class Job:
    """One result, from recording to evaluation; every script reads the part it needs."""

    output: str = "outputs/run"
    seed: int = 0
    env: EnvConfig = field(default_factory=EnvConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        recorded = self.record.seed + self.record.episodes
        require(
            recorded <= self.evaluate.seed, "evaluate.seed", self.evaluate.seed,
            f"record.seed + record.episodes = {recorded} or more",
            "demonstrations and evaluation must not share scenes",
        )  # fmt: skip
        played = self.evaluate.seed + self.evaluate.episodes
        require(played <= 2**30, "evaluate.seed", self.evaluate.seed, "seed + episodes of 2**30 at most")
        require(
            self.evaluate.n_action_steps <= self.model.chunk_size, "evaluate.n_action_steps",
            self.evaluate.n_action_steps, f"at most model.chunk_size={self.model.chunk_size}",
        )  # fmt: skip
        streamed = self.data.stream and not self.data.mix
        require(
            not streamed or self.record.format == "lerobot", "data.stream", True,
            f"false with record.format={self.record.format}, whose frames are decoded already",
        )  # fmt: skip
        require(
            self.model.auxiliary == 0 or not (self.data.stream or self.data.mix), "model.auxiliary",
            self.model.auxiliary, "0 with data.stream or data.mix, whose batches hold no environment_state",
            "train on the frame store of one dataset, or set model.auxiliary=0",
        )  # fmt: skip
        image = self.model.image
        require(
            not image.frozen or image.pretrained or bool(self.train.init), "model.image.frozen", True,
            "weights that were trained", "set model.image.pretrained=true, or train.init to a checkpoint",
        )  # fmt: skip
        lora = self.model.lora
        random = untrained(self.model) & set(lora.on) if lora.rank and not self.train.init else set()
        require(
            not random, "model.lora.on", list(lora.on), f"train.init for adapters on {', '.join(sorted(random))}",
            "adapt only what was trained: set train.init to a checkpoint, or adapt pretrained encoders",
        )  # fmt: skip

    @property
    def dataset_root(self) -> Path:
        return Path(self.data.root) if self.data.root else Path(self.output) / "dataset"


def untrained(model: ModelConfig) -> set[str]:
    """The parts (of model.lora.on) that begin with random weights unless train.init brings others."""
    begins = {"text": model.text.encoder == "scratch", "image": not model.image.pretrained, "trunk": True}
    return {part for part, random in begins.items() if random}


def load[T](cls: type[T], argv: list[str] | None = None, path: str | Path | None = None) -> T:
    """Read a configuration from a YAML file and the command line, which wins.

    argv: arguments without the program's name, `--a.b=c` each; a first argument that does not
    begin with a dash is the YAML file. Ends the program with one line when either is wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        path = argv.pop(0)
    if {"-h", "--help"} & set(argv):
        import draccus

        draccus.parse(cls, args=["--help"])  # prints all fields and ends the program
    try:
        tree = {} if path is None else read_yaml(Path(path))
        check(tree, cls)
        apply_arguments(tree, argv, cls)
        return decode(cls, tree)
    except ConfigError as error:
        raise SystemExit(f"config: {' '.join(str(error).split())}") from None


def decode[T](cls: type[T], tree: Any) -> T:
    """A configuration from what YAML holds. Raises ConfigError when it does not fit."""
    import draccus  # what makes its configuration in Python does without

    check(tree, cls)
    try:
        return draccus.decode(cls, tree)
    except (ConfigError, draccus.utils.DecodingError, draccus.utils.ParsingError) as error:
        cause: BaseException = error
        while not isinstance(cause, ConfigError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        raise ConfigError("file", str(error), "fields that fit", "see configs/ for examples") from None


def dump(config: Any) -> str:
    """The configuration as YAML, as `load` reads it."""
    import draccus

    return f"# vla {__version__}\n{draccus.dump(config)}"
