"""Datasets both ways: what LeRobot writes or edits trains here, what this project writes opens in its tools."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from load_script import load_script
from test_collect import PICTURES, smooth
from test_collect import write as write_journal
from toy_run import toy_job, toy_model

from vla.config import DataConfig, EnvConfig, RecordConfig
from vla.data.collect import collect
from vla.data.demonstrate import make_environment, merge_shards, write_shard
from vla.data.frames import FrameStore
from vla.data.lerobot_v3 import DatasetFolder
from vla.data.normalize import MODES, Statistics
from vla.data.samples import Samples
from vla.observation import ACTION, IMAGES, STATE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of lerobot and its dependencies

CHUNK, HISTORY = 5, 2
FRONT, WRIST = IMAGES + "front", IMAGES + "wrist"
SQUARE, WIDE = (64, 64), (64, 96)


@dataclass(frozen=True)
class Storage:
    """A dataset to write: camera key -> (dtype, size); depth cameras; codec and create()'s own options."""

    fps: int
    cameras: dict[str, tuple[str, tuple[int, int]]]
    depth: tuple[str, ...] = ()
    codec: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)  # other columns: key -> dtype
    state_dim: int = 3
    lengths: tuple[int, ...] = (4, 7, 3, 5)
    task_per_frame: bool = False


STORAGES = {
    "av1": Storage(  # LeRobot's own settings: PNG files first, AV1 afterwards
        30, {FRONT: ("video", SQUARE), WRIST: ("video", WIDE)}, options={"video_files_size_in_mb": 0.004}
    ),
    "h264": Storage(  # frames come out of the decoder in another order than they lie in the file
        50, {FRONT: ("video", SQUARE)}, codec={"vcodec": "h264", "g": 12, "extra_options": {"bf": "3"}},
        options={"streaming_encoding": True},
    ),
    "hevc": Storage(  # a file an episode: with several in one, LeRobot 0.6.1 fails to seek in what it wrote
        15, {FRONT: ("video", SQUARE)}, codec={"vcodec": "hevc"}, options={"video_files_size_in_mb": 0.0001},
    ),
    "libaom": Storage(
        10, {FRONT: ("video", SQUARE)}, codec={"vcodec": "libaom-av1", "extra_options": {"cpu-used": "8"}}
    ),
    "images": Storage(
        10, {FRONT: ("image", SQUARE), WRIST: ("image", WIDE)}, task_per_frame=True,
        options={"data_files_size_in_mb": 0.004, "use_videos": False},
    ),
    "mixed": Storage(
        15,
        {FRONT: ("video", SQUARE), WRIST: ("image", WIDE), "observation.images.depth": ("video", SQUARE),
         "observation.images.range": ("image", SQUARE)},
        depth=("observation.images.depth", "observation.images.range"),
    ),
    "no camera name": Storage(
        10, {"observation.image": ("image", SQUARE)},
        extra={"next.reward": "float32", "next.done": "bool", "note": "string"},
    ),
    "one number": Storage(10, {FRONT: ("image", SQUARE)}, state_dim=1),
    "long episodes": Storage(10, {FRONT: ("image", (8, 8))}, lengths=(300, 200, 100)),
}  # fmt: skip


def picture(rng: np.random.Generator, i: int, size: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) uint8: gradients, and a square whose place and colour tell the frame."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([3 * x, 3 * y, np.full(size, 37 * i)], axis=2).astype(np.uint8)
    image[4:20, 2 * (i % 20) : 2 * (i % 20) + 16] = rng.integers(0, 255, 3)
    return image


def write(root: Path, storage: Storage) -> Path:
    """The dataset, through LeRobot's API."""
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    features: dict[str, Any] = {}
    for key, (dtype, size) in storage.cameras.items():
        channels = 1 if key in storage.depth else 3
        features[key] = {"dtype": dtype, "shape": (*size, channels), "names": ["height", "width", "channels"]}
        if key in storage.depth:
            features[key]["info"] = {"is_depth_map": True}
    features[STATE] = {"dtype": "float32", "shape": (storage.state_dim,), "names": None}
    features[ACTION] = {"dtype": "float32", "shape": (2,), "names": ["left", "right"]}
    features |= {key: {"dtype": dtype, "shape": (1,), "names": None} for key, dtype in storage.extra.items()}
    encoder = RGBEncoderConfig(**storage.codec)
    dataset = LeRobotDataset.create(
        "local/test", storage.fps, features, root=root, video_backend="pyav", rgb_encoder=encoder,
        **storage.options,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    others = {"float32": np.zeros(1, np.float32), "bool": np.zeros(1, bool), "string": "words"}
    for episode, length in enumerate(storage.lengths):
        for i in range(length):
            frame: dict[str, Any] = {key: others[dtype] for key, dtype in storage.extra.items()}
            for key, (_, size) in storage.cameras.items():
                depth = rng.integers(100, 3000, (*size, 1), np.uint16)
                frame[key] = depth if key in storage.depth else picture(rng, 10 * episode + i, size)
            frame[STATE] = (rng.uniform(-1, 1, storage.state_dim) + episode).astype(np.float32)
            frame[ACTION] = (rng.uniform(-1, 1, 2) + episode).astype(np.float32)
            told = i // 2 if storage.task_per_frame else episode
            dataset.add_frame(frame | {"task": f"go to target {told % 3}"})
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    return root


def demonstrated(root: Path) -> Path:
    """By vla/data/demonstrate.py, as record.py's workers write and join it: two shards of the toy."""
    env, features = make_environment(EnvConfig("toy_env:Toy-v0", {"cameras": ["front", "wrist"]}))
    record = RecordConfig(episodes=4, shard_episodes=2)
    parts = root.with_name(root.name + ".parts")
    parts.mkdir()
    _, report = multiprocessing.Pipe()
    for shard in range(2):
        write_shard(env, features, EnvConfig("toy_env:Toy-v0"), record, shard, parts, report)
    merge_shards(parts, 2, root)
    return root


def collected(root: Path) -> Path:
    """By vla/data/collect.py: three episodes of live control, with the column `intervention`."""
    session = root.with_name(root.name + ".session")
    for episode in range(3):
        frames = [smooth(10 * episode + i, task=f"go {episode % 2}") for i in range(4 + episode)]
        write_journal(session, episode, frames, cameras=dict(PICTURES.cameras))
    collect(session, root)
    return root


OURS: dict[str, Callable[[Path], Path]] = {"demonstrated": demonstrated, "collected": collected}
MADE: dict[str, Path] = {}


@pytest.fixture
def dataset(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: a copy, to be spoilt, of the dataset of a name in STORAGES or OURS, each written once."""
    monkeypatch.setenv("SVT_LOG", "1")

    def copy(name: str) -> Path:
        folder = tmp_path_factory.mktemp("dataset")
        if name not in MADE:
            made = folder / "original"
            MADE[name] = write(made, STORAGES[name]) if name in STORAGES else OURS[name](made)
        shutil.copytree(MADE[name], folder / "copy")
        return folder / "copy"

    return copy


def items_equal(root: Path) -> FrameStore:
    """Assert that every item of the store is LeRobotDataset's own, and return the store."""
    from lerobot.datasets import LeRobotDataset

    folder, store = DatasetFolder.open(root), FrameStore.open_or_build(root)
    ahead, seen = ([i / folder.fps for i in steps] for steps in (range(CHUNK), range(1 - HISTORY, 1)))
    deltas = {ACTION: ahead} | dict.fromkeys((STATE, *folder.cameras.values()), seen)
    # The pyav decoder, which is ours; torchcodec's colour conversion may differ in the last bit.
    theirs = LeRobotDataset("local/test", root=root, delta_timestamps=deltas, video_backend="pyav")
    batch = Samples(store, CHUNK, HISTORY).batch(torch.arange(len(store)))
    assert len(theirs) == len(store)
    assert theirs.num_episodes == store.n_episodes
    assert store.fps == theirs.fps
    for i in range(len(store)):
        item = theirs[i]
        for name, key in folder.cameras.items():
            assert torch.equal(batch.images[name][i], (item[key] * 255).round().to(torch.uint8)), (name, i)
        assert torch.equal(batch.state[i], item[STATE].reshape(HISTORY, -1))  # theirs drops a width of 1
        assert torch.equal(batch.action[i], item[ACTION])
        assert torch.equal(batch.action_is_pad[i], item["action_is_pad"])
        assert store.tasks[int(batch.task[i])] == item["task"]
    return store


# Theirs, here


@pytest.mark.parametrize("name", [name for name in STORAGES if name != "long episodes"])
def test_what_lerobot_writes_trains_here(name: str, dataset: Any, tmp_path: Path) -> None:
    root, storage = dataset(name), STORAGES[name]
    store = items_equal(root)
    sizes = {key: size for key, (_, size) in storage.cameras.items() if key not in storage.depth}
    assert store.features.cameras == {key.rpartition(".")[2]: size for key, size in sizes.items()}
    assert (store.fps, store.features.state_dim) == (storage.fps, storage.state_dim)
    starts = np.flatnonzero(store.first == np.arange(len(store)))
    assert np.diff([*starts, len(store)]).tolist() == list(storage.lengths)
    for start, length in zip(starts, storage.lengths, strict=True):
        told = [store.tasks[i] for i in store.task[start : start + length]]
        assert (len(set(told)) > 1) == (storage.task_per_frame and length > 2)
    if name in ("av1", "images"):
        assert len(list(root.rglob("file-001.*"))) > 0  # more than one file is read
    job = toy_job(tmp_path / "run", data=DataConfig(root=str(root)), steps=2)
    assert (load_script("train").main(job) / "manifest.json").is_file()


def test_statistics_are_lerobots_but_for_its_quantiles(dataset: Any) -> None:
    """Its mean, std, min and max are the data's. Its quantiles are means over episodes, by their lengths, of
    each episode's own quantile, which is further inside than the data's wherever episodes differ."""
    root = dataset("long episodes")
    store, theirs = FrameStore.open_or_build(root), json.loads((root / "meta" / "stats.json").read_text())
    for key, x in ((STATE, store.state), (ACTION, store.action)):
        ours = store.statistics()[key]
        for name in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(getattr(ours, name), theirs[key][name], rtol=1e-5, err_msg=name)
        episodes = np.split(x, np.flatnonzero(np.diff(store.first)) + 1)
        for name, q in (("q01", 0.01), ("q99", 0.99)):
            of_episodes = np.stack([np.quantile(part, q, axis=0) for part in episodes])
            mean = np.average(of_episodes, axis=0, weights=[len(part) for part in episodes])
            spread = np.ptp(x, axis=0).max()
            np.testing.assert_allclose(
                theirs[key][name], mean, atol=0.02 * spread
            )  # its histogram does not interpolate
            assert np.abs(getattr(ours, name) - mean).min() > 0.05 * spread
            np.testing.assert_allclose(getattr(ours, name), np.quantile(x, q, axis=0), rtol=1e-6)


@pytest.mark.parametrize("normalization", MODES)
def test_datasets_of_writers_without_quantiles_train_here(
    normalization: str, dataset: Any, tmp_path: Path
) -> None:
    root = dataset("images")
    path = root / "meta" / "stats.json"
    expected = FrameStore.open_or_build(root).statistics()
    stats = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: {k: v for k, v in s.items() if k[0] != "q"} for key, s in stats.items()})
    )
    assert FrameStore.open_or_build(root).statistics() == expected
    path.unlink()
    model = toy_model(normalization=normalization)
    job = toy_job(tmp_path, model, DataConfig(root=str(root)), steps=2)
    checkpoint = load_script("train").main(job)
    assert Statistics.load(checkpoint / "statistics.json") == expected


# LeRobot's tools, on what either wrote


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """lerobot-edit-dataset in this process: starting it takes ten seconds of a core."""
    from lerobot.scripts import lerobot_edit_dataset as script

    monkeypatch.setattr(script, "init_logging", lambda: None)  # pytest's handlers stay

    def run(operation: str, root: Path | None = None, new_root: Path | None = None, **options: Any) -> None:
        arguments = [f"--operation.type={operation}"]
        arguments += ["--repo_id=local/test", f"--root={root}"] if root else []
        arguments += ["--new_repo_id=local/new", f"--new_root={new_root}"] if new_root else []
        arguments += [f"--operation.{name}={json.dumps(value)}" for name, value in options.items()]
        monkeypatch.setattr(sys, "argv", ["lerobot-edit-dataset", *arguments])
        script.main()

    return run


def assert_episodes(
    store: FrameStore, source: FrameStore, episodes: list[int], pixels: int | None = 0
) -> None:
    """The store holds these episodes of its source; pixels: the largest difference, None: of lossy codecs."""
    starts = np.flatnonzero(source.first == np.arange(len(source)))
    rows = np.concatenate([np.arange(starts[i], source.last[starts[i]] + 1) for i in episodes])
    np.testing.assert_array_equal(store.state, source.state[rows])
    np.testing.assert_array_equal(store.action, source.action[rows])
    for name, images in store.images.items():
        difference = np.abs(images.astype(int) - source.images[name][rows])
        if pixels is None:
            assert difference.mean((1, 2, 3)).max() < 8, name  # frames that are mixed up differ by 12
        else:
            assert difference.max() <= pixels, (name, difference.max())


SOURCES = ("demonstrated", "collected", "av1", "images", "mixed")
# Episodes are cut out of a video by encoding what is left again, with its own settings: no loss where those have
# none, as ours.
LOSS = {"av1": None, "mixed": None}


@pytest.mark.parametrize("name", SOURCES)
def test_episodes_deleted_split_and_merged(name: str, dataset: Any, edit: Any, tmp_path: Path) -> None:
    root = dataset(name)
    source, loss = items_equal(root), LOSS.get(name, 0)
    edit("delete_episodes", root, tmp_path / "deleted", episode_indices=[1])
    kept = [i for i in range(source.n_episodes) if i != 1]
    assert_episodes(items_equal(tmp_path / "deleted"), source, kept, loss)
    edit("split", root, tmp_path / "parts", splits={"first": [0, 2], "second": [1]})
    parts = [tmp_path / "parts" / part for part in ("first", "second")]
    for part, episodes in zip(parts, ([0, 2], [1]), strict=True):
        assert_episodes(items_equal(part), source, episodes, loss)
    for together in (True, False):
        merged = tmp_path / f"merged {together}"
        options = {"concatenate_videos": together, "concatenate_data": together}
        paths = {"roots": [*map(str, parts)], "repo_ids": ["local/first", "local/second"]}
        edit("merge", new_root=merged, **paths, **options)
        assert_episodes(items_equal(merged), source, [0, 2, 1], loss)


@pytest.mark.parametrize("name", SOURCES)
def test_tasks_and_statistics_and_features_changed(
    name: str, dataset: Any, edit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = dataset(name)
    source = items_equal(root)
    edit("modify_tasks", root, episode_tasks={"0": "another task"})
    changed = items_equal(root)  # in place: the store is built anew
    told = [changed.tasks[i] for i in changed.task]
    assert told[: source.last[0] + 1] == ["another task"] * (source.last[0] + 1)
    assert "another task" not in told[source.last[0] + 1 :]
    edit("recompute_stats", root, tmp_path / "recomputed")
    assert_episodes(items_equal(tmp_path / "recomputed"), source, list(range(source.n_episodes)))
    edit("info", root, show_features=True)
    assert f"{len(source)}" in capsys.readouterr().out
    if "wrist" in source.images:
        edit("remove_feature", root, tmp_path / "removed", feature_names=[WRIST])
        assert "wrist" not in items_equal(tmp_path / "removed").images


@pytest.mark.parametrize("name", ["demonstrated", "collected", "av1"])
def test_videos_encoded_again(name: str, dataset: Any, edit: Any, tmp_path: Path) -> None:
    root = dataset(name)
    source = items_equal(root)
    lossless = {"vcodec": "h264", "pix_fmt": "yuv444p", "crf": 0, "preset": "ultrafast"}
    edit("reencode_videos", root, tmp_path / "new", **{f"rgb_encoder.{k}": v for k, v in lossless.items()})
    pixels = None if name == "av1" else 3  # colours at half the resolution are interpolated once more
    assert_episodes(items_equal(tmp_path / "new"), source, list(range(source.n_episodes)), pixels)


def test_images_become_videos(dataset: Any, edit: Any, tmp_path: Path) -> None:
    root = dataset("images")
    source = items_equal(root)
    edit("convert_image_to_video", root, tmp_path / "new")
    assert_episodes(items_equal(tmp_path / "new"), source, list(range(source.n_episodes)), pixels=None)


@pytest.mark.parametrize("name", ["demonstrated", "images"])
def test_lerobot_appends_an_episode(name: str, dataset: Any) -> None:
    from lerobot.datasets import LeRobotDataset

    root = dataset(name)
    source = FrameStore.open_or_build(root)
    more = LeRobotDataset.resume("local/test", root=root)
    for i in range(4):
        images = {IMAGES + camera: x[i] for camera, x in source.images.items()}
        more.add_frame(images | {STATE: source.state[i], ACTION: source.action[i], "task": "something else"})
    more.save_episode(parallel_encoding=False)
    more.finalize()
    store = items_equal(root)
    assert len(store) == len(source) + 4
    assert store.tasks[store.task[-1]] == "something else"
    np.testing.assert_array_equal(store.state[: len(source)], source.state)
    np.testing.assert_array_equal(store.state[-4:], source.state[:4])


@pytest.mark.parametrize("name", OURS)
def test_lerobots_trainer_takes_what_is_recorded_here(name: str, dataset: Any) -> None:
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.datasets.factory import make_dataset
    from lerobot.policies.act.configuration_act import ACTConfig

    root = dataset(name)
    config = TrainPipelineConfig(
        DatasetConfig("local/test", root=str(root), video_backend="pyav"),
        policy=ACTConfig(chunk_size=CHUNK, n_action_steps=CHUNK, push_to_hub=False),
    )
    theirs, store = make_dataset(config), FrameStore.open_or_build(root)
    batch = next(iter(torch.utils.data.DataLoader(theirs, batch_size=len(store))))
    ours = Samples(store, CHUNK).batch(torch.arange(len(store)))
    for camera, images in ours.images.items():
        assert torch.equal(batch[IMAGES + camera], images[:, 0])
    assert torch.equal(batch[STATE], ours.state[:, 0])
    assert torch.equal(batch[ACTION], ours.action)
    assert torch.equal(batch["action_is_pad"], ours.action_is_pad)
    assert batch["task"] == [store.tasks[i] for i in ours.task]
    assert theirs.meta.stats is not None
    for key in (STATE, ACTION):
        np.testing.assert_allclose(
            theirs.meta.stats[key]["mean"], store.statistics()[key].mean, rtol=1e-4, atol=1e-6
        )


class Rerun(types.ModuleType):
    """Stands in for rerun-sdk (170 MB), and keeps what lerobot-dataset-viz logs."""

    def __init__(self) -> None:
        super().__init__("rerun")
        self.logged: dict[str, list[Any]] = {}
        self.components = types.SimpleNamespace(Colormap=types.SimpleNamespace(Viridis=None))
        self.names: list[list[str]] = []
        for name in ("init", "set_time", "save"):
            setattr(self, name, lambda *_, **__: None)
        for name in ("Image", "Scalars"):
            setattr(self, name, lambda value: value)

    def SeriesLines(self, names: list[str]) -> None:  # rerun's name
        self.names.append(names)

    def log(self, path: str, entity: Any) -> None:
        self.logged.setdefault(path, []).append(entity)


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> Rerun:
    module, blueprint = Rerun(), types.ModuleType("rerun.blueprint")
    for name in ("Spatial2DView", "TimeSeriesView", "Blueprint", "Grid"):
        setattr(blueprint, name, lambda *_, **__: None)
    module.blueprint = blueprint  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rerun", module)
    monkeypatch.setitem(sys.modules, "rerun.blueprint", blueprint)
    monkeypatch.setattr("lerobot.utils.import_utils.require_package", lambda *_, **__: None)
    return module


@pytest.mark.parametrize("name", OURS)
def test_what_is_recorded_here_can_be_looked_at(
    name: str, dataset: Any, rerun: Rerun, tmp_path: Path
) -> None:
    from lerobot.datasets import LeRobotDataset
    from lerobot.scripts.lerobot_dataset_viz import visualize_dataset

    root = dataset(name)
    store = FrameStore.open_or_build(root)
    theirs = LeRobotDataset("local/test", root=root, episodes=[1], video_backend="pyav")
    visualize_dataset(theirs, 1, mode="local", save=True, output_dir=tmp_path)
    start = store.last[0] + 1
    rows = slice(start, store.last[start] + 1)
    for camera, images in store.images.items():
        difference = np.abs(np.stack(rerun.logged[IMAGES + camera]).astype(int) - images[rows])
        assert difference.max() <= 1  # it cuts off where it should round
    np.testing.assert_array_equal(np.stack(rerun.logged["state"]), store.state[rows])
    np.testing.assert_array_equal(np.stack(rerun.logged[ACTION]), store.action[rows])
    assert [len(names) for names in rerun.names] == [store.action.shape[1], store.state.shape[1]]
