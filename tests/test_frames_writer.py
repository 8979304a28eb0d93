"""Recording straight into a frame store: without lerobot, without copies, and a kill costs nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bare import without
from test_data import assert_same, make_episodes
from toy_run import text_folder

from vla.checks import ConfigError
from vla.config import DataConfig, EnvConfig, Job, MixConfig, RecordConfig
from vla.data import frames_writer
from vla.data.demonstrate import demonstrate, make_environment
from vla.data.frames import Episode, FrameStore
from vla.data.frames_writer import FrameShard, join_shards
from vla.data.lerobot_v3 import DatasetFolder
from vla.data.record import Recording, record_demonstrations
from vla.data.samples import Samples
from vla.data.sources import open_data, samples_of
from vla.observation import ACTION, ENVIRONMENT_STATE, IMAGES, STATE, TASK, Features

TESTS = Path(__file__).parent
SCRIPTS = TESTS.parent / "scripts"
TURNS = EnvConfig("toy_turns:Turns-v0", {"cameras": ["front", "wrist"], "pixels": 16})
RECORD = RecordConfig(
    episodes=12, shard_episodes=5, noise=0.3, workers=2, format="frames", environment_state=True
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve episodes of three tasks, in three shards."""
    root = tmp_path_factory.mktemp("recorded") / "dataset"
    record_demonstrations(root, TURNS, RECORD)
    return root


# What is recorded


def test_a_recorded_store_holds_what_was_demonstrated(recorded: Path) -> None:
    store, recording = FrameStore.open_or_build(recorded), Recording.load(recorded)
    env, features = make_environment(TURNS, environment_state=True)
    episodes = []
    for one in recording.episodes:
        frames, _ = demonstrate(
            env, one["seed"], 0.3 if one["noise"] else 0.0, RECORD.tail_steps, environment_state=True
        )
        assert frames is not None
        assert one["task"] == frames[0][TASK]
        columns = {key: np.stack([frame[key] for frame in frames]) for key in frames[0].keys() - {TASK}}
        images = {name: columns[IMAGES + name] for name in features.cameras}
        numbers = (columns[STATE], columns[ACTION], one["task"], columns[ENVIRONMENT_STATE])
        episodes.append(Episode(images, *numbers))
    assert_same(store, FrameStore.of_episodes(episodes, features.fps))
    assert isinstance(store.images["wrist"], np.memmap)
    assert recording.frames == len(store)


def test_episodes_come_task_after_task_with_noise_in_each(recorded: Path) -> None:
    episodes = Recording.load(recorded).episodes
    assert [e["index"] % 3 for e in episodes] == [0] * 4 + [1] * 4 + [2] * 4
    assert [e["seed"] % 3 for e in episodes] == [e["index"] % 3 for e in episodes]
    assert [e["task"] for e in episodes[::4]] == ["reach blue", "reach green", "reach red"]
    assert [sum(e["noise"] for e in episodes[i : i + 4]) for i in (0, 4, 8)] == [2, 2, 2]


def test_nothing_but_the_store_is_left(recorded: Path) -> None:
    assert [path.name for path in recorded.parent.iterdir()] == ["dataset"]
    files = sorted(str(path.relative_to(recorded)) for path in recorded.rglob("*") if path.is_file())
    numbers = ("action", "environment_state", "first", "last")
    cameras = [f"frames/{IMAGES}{name}.npy" for name in ("front", "wrist")]
    rest = ["frames/state.npy", "frames/store.json", "frames/task.npy", "meta/recording.json"]
    assert files == sorted([*(f"frames/{name}.npy" for name in numbers), *cameras, *rest])
    before = Recording.load(recorded)
    assert record_demonstrations(recorded, TURNS, RECORD) == before
    other = RecordConfig(**{**vars(RECORD), "format": "lerobot"})
    with pytest.raises(ValueError, match=r"format='frames'.*format='lerobot'.*remedy"):
        record_demonstrations(recorded, TURNS, other)


def test_training_opens_it_as_any_dataset(recorded: Path) -> None:
    data = open_data(Job(data=DataConfig(root=str(recorded), cameras=("wrist",))))
    assert list(data.features.cameras) == ["wrist"]
    assert data.tasks == ["reach blue", "reach green", "reach red"]
    with pytest.raises(ValueError, match=r"\['side'\].*\['front', 'wrist'\].*data\.cameras"):
        FrameStore.open_or_build(recorded, cameras=["side"])


def test_it_may_be_one_of_a_mixture(recorded: Path) -> None:
    mix = {name: MixConfig(root=str(recorded)) for name in ("one", "other")}
    job = Job(data=DataConfig(mix=mix))
    data = open_data(job)
    batch = samples_of(data, job).batch(torch.tensor([0, len(data) - 1]))
    assert batch.source is not None
    assert batch.source.tolist() == [0, 1]
    assert batch.environment_state is None


def test_what_needs_a_lerobot_dataset_names_the_format(recorded: Path) -> None:
    with pytest.raises(ValueError, match=r"frame store.*record\.format=frames.*data\.stream=false"):
        open_data(Job(data=DataConfig(root=str(recorded), stream=True)))
    with pytest.raises(ValueError, match=r"record\.format=lerobot"):
        DatasetFolder.open(recorded)
    with pytest.raises(ConfigError, match=r"data\.stream.*record\.format=frames"):
        Job(record=RECORD, data=DataConfig(stream=True))
    with pytest.raises(ConfigError, match=r"record\.format.*'hdf5'.*lerobot, frames"):
        RecordConfig(format="hdf5")


def test_a_store_of_another_version_is_not_misread(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    index = json.loads((recorded / "frames" / "store.json").read_text())
    (tmp_path / "frames" / "store.json").write_text(json.dumps(index | {"version": 0}))
    with pytest.raises(ValueError, match=r"version 0.*version 1.*remedy"):
        FrameStore.open_or_build(tmp_path)


def test_batches_tell_the_newest_frames_environment_state(recorded: Path) -> None:
    store = FrameStore.open_or_build(recorded)
    assert store.environment_state is not None
    index = torch.tensor([0, 5, len(store) - 1])
    batch = Samples(store, chunk_size=4, n_obs_steps=3).batch(index)
    assert batch.environment_state is not None
    np.testing.assert_array_equal(batch.environment_state.numpy(), store.environment_state[index.numpy()])
    statistics = store.statistics()[ENVIRONMENT_STATE]
    np.testing.assert_allclose(statistics.mean, store.environment_state.mean(0, dtype=np.float64), rtol=1e-9)


# Joining shards


def write_shards(parts: Path, episodes: list[Episode], sizes: tuple[int, ...] = (2, 1, 1)) -> list[Path]:
    """The episodes as recording processes write them."""
    features, rest, shards = Features({}, 3, 2, 10), iter(episodes), []
    for number, size in enumerate(sizes):
        shards.append(parts / f"shard_{number:05d}")
        shard = FrameShard(shards[-1], features)
        for episode in [next(rest) for _ in range(size)]:
            shard.add(frames_of(episode))
        shard.close()
    return shards


def frames_of(episode: Episode) -> list[dict[str, Any]]:
    columns = {IMAGES + name: x for name, x in episode.images.items()}
    columns |= {STATE: episode.state, ACTION: episode.action, TASK: [episode.task] * len(episode.state)}
    if episode.environment_state is not None:
        columns[ENVIRONMENT_STATE] = episode.environment_state
    return [{key: x[i] for key, x in columns.items()} for i in range(len(episode.state))]


def lengths(episodes: list[Episode], sizes: tuple[int, ...] = (2, 1, 1)) -> list[list[tuple[int, str]]]:
    rest = iter([(len(episode.state), episode.task) for episode in episodes])
    return [[next(rest) for _ in range(size)] for size in sizes]


class Killed(BaseException):
    """What no handler catches."""


def test_a_join_killed_anywhere_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after every removal, and in the midst of every copy."""
    episodes, unlink, copy = make_episodes(), Path.unlink, frames_writer.shutil.copyfileobj
    for number in range(100):
        parts = tmp_path / str(number)
        parts.mkdir()
        shards, left = write_shards(parts, episodes), [number]

        def count(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        def half(source: Any, target: Any, block: int, count: Callable[[], None] = count) -> None:
            target.write(source.read(5))
            count()
            copy(source, target, block)

        def before(path: Path, count: Callable[[], None] = count, parts: Path = parts) -> None:
            count()
            # A process that is killed writes nothing any more.
            assert path.read_bytes() in (parts / "frames" / f"{path.stem}.npy").read_bytes()
            unlink(path)
            count()

        monkeypatch.setattr(Path, "unlink", before)
        monkeypatch.setattr(frames_writer.shutil, "copyfileobj", half)
        try:
            join_shards(shards, lengths(episodes), parts / "frames")
            break
        except Killed:
            monkeypatch.setattr(Path, "unlink", unlink)
            monkeypatch.setattr(frames_writer.shutil, "copyfileobj", copy)
            assert not (parts / "frames" / "store.json").exists()
            join_shards(shards, lengths(episodes), parts / "frames")
        assert_same(FrameStore.open(parts / "frames"), FrameStore.of_episodes(episodes, fps=10))
        assert not list(parts.rglob("*.raw"))
    assert number == 3 * 4 * 3  # copies and removals of four arrays in three shards, each with three moments


def test_a_join_never_holds_more_than_a_block(tmp_path: Path) -> None:
    """Measured on what NumPy and Python allocate."""
    import tracemalloc

    x = np.zeros((200, 128, 128, 3), np.uint8)  # 10 MB
    episodes = [Episode({"front": x}, np.zeros((200, 3)), np.zeros((200, 2)), "wait") for _ in range(4)]
    shards = write_shards(tmp_path, episodes, (1, 1, 1, 1))
    tracemalloc.start()
    try:
        join_shards(shards, lengths(episodes, (1, 1, 1, 1)), tmp_path / "frames")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "frames" / f"{IMAGES}front.npy").stat().st_size > 39e6
    assert peak < 2 * frames_writer.BLOCK


def test_shards_that_lost_frames_are_refused(tmp_path: Path) -> None:
    episodes = make_episodes()
    shards = write_shards(tmp_path, episodes)
    piece = shards[1] / "action.raw"
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"got: 7 .*expected: 8 bytes.*remedy"):
        join_shards(shards, lengths(episodes), tmp_path / "frames")
    for file in (tmp_path / "frames").iterdir():
        file.unlink()  # what was joined already is gone
    with pytest.raises(ValueError, match=r"got: no file.*shard_00000.*remedy"):
        join_shards(shards, lengths(episodes), tmp_path / "frames")


def test_shards_of_other_columns_do_not_fit(tmp_path: Path) -> None:
    other = make_episodes({"wrist": (8, 10), "front": (6, 7)})
    episodes = [*make_episodes()[:2], *other[2:]]
    with pytest.raises(ValueError, match=r"shard_00001 does not fit.*\[6, 7, 3\].*\[6, 6, 3\].*remedy"):
        join_shards(write_shards(tmp_path, episodes), lengths(episodes), tmp_path / "frames")


def test_an_episode_that_training_could_not_use_is_not_written(tmp_path: Path) -> None:
    first, second, *_ = make_episodes()
    shard = FrameShard(tmp_path / "shard", Features({}, 3, 2, 10))
    shard.add(frames_of(first))
    wide = Episode(second.images, np.zeros((len(second.state), 4)), second.action, "x")
    with pytest.raises(ValueError, match=r"'observation\.state' changes.*\[4\].*\[3\].*remedy"):
        shard.add(frames_of(wide))
    second.action[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"'action'.*nan.*remedy"):
        shard.add(frames_of(second))


# The whole job on a machine with torch, timm and transformers alone


@pytest.mark.slow
def test_a_bare_machine_records_goes_on_and_trains(tmp_path: Path) -> None:
    absent = "lerobot,datasets,pyarrow,pandas,av,wandb,accelerate,peft,onnx,onnxruntime"
    environment = without(absent, tmp_path / "site", TESTS, SCRIPTS.parent)
    config = tmp_path / "job.yaml"
    config.write_text(
        f"output: {tmp_path / 'run'}\n"
        f"env: {{id: {TURNS.id}}}\n"
        "record: {episodes: 40, shard_episodes: 4, format: frames, environment_state: true, workers: 2}\n"
        "model: {size: tiny, d_model: 32, n_heads: 2, d_ff: 64, n_encoder_layers: 1, n_decoder_layers: 1,"
        " image_width: 32, image_depth: 1, image_heads: 2, chunk_size: 4, max_prefix: 2,"
        f" image: {{pixels: 32, patch: 16}}, text: {{encoder: {text_folder()}}}}}\n"
        "train: {steps: 2, batch_size: 8, device: cpu, wandb: disabled, threads: 1}\n"
        "evaluate: {n_action_steps: 2}\n"
    )

    def start(script: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(SCRIPTS / f"{script}.py"), str(config)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    parts, killed, deadline = tmp_path / "run" / "dataset.parts", start("record"), time.monotonic() + 100
    try:
        while len(list(parts.glob("shard_?????"))) < 2:
            assert killed.poll() is None, killed.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        killed.kill()
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    for script in ("record", "train"):
        process = start(script)
        stdout, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
    assert "step_00000002" in stdout
    root = tmp_path / "run" / "dataset"
    assert sorted(e["index"] for e in Recording.load(root).episodes) == list(range(40))
    assert not (root / "meta" / "info.json").exists()
