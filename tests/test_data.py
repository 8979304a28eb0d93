"""The frame store, samples, statistics and augmentation."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vla.config import DataConfig
from vla.data.augment import augment, shift
from vla.data.frames import Episode, FrameStore
from vla.data.normalize import MODES, Normalizer, Statistics
from vla.data.samples import Samples
from vla.data.video import frames_at
from vla.observation import ACTION, ENVIRONMENT_STATE, STATE

LENGTHS = (3, 7, 1, 5)
TASKS = ("go left", "go right", "go left", "stay")


def make_episodes(cameras: dict[str, tuple[int, int]] | None = None, state_dim: int = 3) -> list[Episode]:
    rng = np.random.default_rng(0)
    cameras = cameras or {"wrist": (8, 10), "front": (6, 6)}
    return [
        Episode(
            images={name: rng.integers(0, 256, (n, *size, 3), np.uint8) for name, size in cameras.items()},
            state=rng.normal(size=(n, state_dim)).astype(np.float32),
            action=rng.normal(size=(n, 2)).astype(np.float32),
            task=task,
        )
        for n, task in zip(LENGTHS, TASKS, strict=True)
    ]


def write_dataset(root: Path, episodes: list[Episode], rows: int | None = None, **info: Any) -> Path:
    """A LeRobotDataset v3.0 by hand: images inside the parquet file, lossless, without importing lerobot.

    rows: of a row group.
    """
    lengths = [len(episode.state) for episode in episodes]
    starts = np.cumsum(lengths) - lengths
    tasks = sorted({episode.task for episode in episodes})

    def png(image: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    def vectors(name: str) -> pa.Array:
        x = np.concatenate([getattr(episode, name) for episode in episodes])
        flat = pa.array(x.flatten())
        return flat if x.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, x.shape[1])

    columns: dict[str, Any] = {
        f"observation.images.{name}": [png(image) for episode in episodes for image in episode.images[name]]
        for name in episodes[0].images
    }
    columns |= {STATE: vectors("state"), ACTION: vectors("action")}
    if episodes[0].environment_state is not None:
        columns[ENVIRONMENT_STATE] = vectors("environment_state")
    columns["timestamp"] = np.concatenate([np.arange(n) / 10 for n in lengths]).astype(np.float32)
    columns["episode_index"] = np.repeat(np.arange(len(lengths)), lengths)
    columns["task_index"] = np.repeat([tasks.index(episode.task) for episode in episodes], lengths)
    ends = starts + lengths
    metadata = {"episode_index": range(len(lengths)), "dataset_from_index": starts, "dataset_to_index": ends}
    features: dict[str, Any] = {
        f"observation.images.{name}": {"dtype": "image", "shape": images.shape[1:], "names": None}
        for name, images in episodes[0].images.items()
    }
    features[STATE] = {"dtype": "float32", "shape": episodes[0].state.shape[1:]}
    features[ACTION] = {"dtype": "float32", "shape": episodes[0].action.shape[1:]}
    if episodes[0].environment_state is not None:
        shape = episodes[0].environment_state.shape[1:]
        features[ENVIRONMENT_STATE] = {"dtype": "float32", "shape": shape}
    description = {"codebase_version": "v3.0", "fps": 10, "total_frames": sum(lengths), "features": features}
    for folder, table in (
        ("data/chunk-000/file-000", columns),
        ("meta/episodes/chunk-000/file-000", metadata),
        ("meta/tasks", {"task_index": range(len(tasks)), "task": tasks}),
    ):
        path = root / f"{folder}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({key: pa.array(value) for key, value in table.items()}), path, rows)
    (root / "meta" / "info.json").write_text(json.dumps(description | info))
    return root


def privileged() -> list[Episode]:
    """With what only a simulator knows."""
    rng = np.random.default_rng(1)
    return [
        replace(e, environment_state=rng.normal(size=(len(e.state), 5)).astype(np.float32))
        for e in make_episodes()
    ]


def assert_same(store: FrameStore, other: FrameStore) -> None:
    assert store.tasks == other.tasks
    assert store.features == other.features
    assert store.arrays().keys() == other.arrays().keys()
    for name, x in store.arrays().items():
        np.testing.assert_array_equal(x, other.arrays()[name], err_msg=name)
        assert x.dtype == other.arrays()[name].dtype, name


# The store


def test_store_of_a_dataset_equals_its_episodes(tmp_path: Path) -> None:
    episodes = make_episodes()
    store = FrameStore.open_or_build(write_dataset(tmp_path / "data", episodes))
    assert_same(store, FrameStore.of_episodes(episodes, fps=10))
    assert len(store) == sum(LENGTHS)
    assert store.n_episodes == len(LENGTHS)
    assert store.features.cameras == {"front": (6, 6), "wrist": (8, 10)}
    assert list(store.features.cameras) == ["front", "wrist"]
    assert isinstance(store.images["front"], np.memmap)
    assert [store.tasks[i] for i in store.task[store.first == np.arange(len(store))]] == list(TASKS)


def test_store_with_one_dimensional_state(tmp_path: Path) -> None:
    episodes = make_episodes(state_dim=1)
    store = FrameStore.open_or_build(write_dataset(tmp_path, episodes))
    assert_same(store, FrameStore.of_episodes(episodes, fps=10))


def test_an_environment_state_is_read_summarised_and_batched(tmp_path: Path) -> None:
    episodes = privileged()
    store = FrameStore.open_or_build(write_dataset(tmp_path, episodes))
    assert_same(store, FrameStore.of_episodes(episodes, fps=10))
    expected = np.concatenate([e.environment_state for e in episodes if e.environment_state is not None])
    np.testing.assert_array_equal(store.environment_state, expected)
    index = torch.tensor([0, 4, 15])
    batch = Samples(store, chunk_size=2, n_obs_steps=2).batch(index)
    assert batch.environment_state is not None
    np.testing.assert_array_equal(batch.environment_state.numpy(), expected[index])
    statistics = store.statistics()
    np.testing.assert_allclose(
        statistics[ENVIRONMENT_STATE].std, expected.std(0, dtype=np.float64), rtol=1e-9
    )
    statistics.save(tmp_path / "statistics.json")
    assert Statistics.load(tmp_path / "statistics.json") == statistics


def test_datasets_without_an_environment_state_are_as_they_were(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, make_episodes())
    store = FrameStore.open_or_build(root)
    assert store.environment_state is None
    assert Samples(store, chunk_size=2).batch(torch.tensor([4])).environment_state is None
    assert set(store.statistics().by_key) == {STATE, ACTION}
    index = json.loads((root / "frames" / "store.json").read_text())
    assert list(index) == ["version", "fingerprint", "cameras", "tasks", "fps"]
    assert not (root / "frames" / "environment_state.npy").exists()


def test_a_store_from_before_environment_states_were_read_is_built_anew(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, privileged())
    built = FrameStore.open_or_build(root)
    path = root / "frames" / "store.json"
    index = json.loads(path.read_text())
    del index["environment_state"]
    path.write_text(json.dumps(index))
    (root / "frames" / "environment_state.npy").unlink()
    assert_same(FrameStore.open_or_build(root), built)


def test_an_environment_state_that_is_no_vector_is_left_alone(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, privileged())
    edit(root, lambda info: info["features"][ENVIRONMENT_STATE].update(shape=[5, 1]))
    assert FrameStore.open_or_build(root).environment_state is None


def test_episodes_with_and_without_an_environment_state_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"lengths.*'environment_state': 13.*remedy"):
        FrameStore.of_episodes([*make_episodes()[:1], *privileged()[1:]], fps=10)


def test_store_is_reused_until_the_dataset_changes(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, make_episodes())
    built = FrameStore.open_or_build(root)
    stamp = (root / "frames" / "store.json").stat().st_mtime_ns
    FrameStore.open_or_build(root)
    assert (root / "frames" / "store.json").stat().st_mtime_ns == stamp
    other = [Episode(e.images, e.state + 1, e.action, e.task) for e in make_episodes()]
    write_dataset(root, other)
    np.testing.assert_array_equal(FrameStore.open_or_build(root).state, built.state + 1)
    assert (root / "frames" / "store.json").stat().st_mtime_ns != stamp


def test_store_of_some_cameras(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, make_episodes())
    assert list(FrameStore.open_or_build(root, cameras=["front"]).images) == ["front"]
    assert list(FrameStore.open_or_build(root).images) == ["front", "wrist"]  # one was missing: built anew
    stamp = (root / "frames" / "store.json").stat().st_mtime_ns
    assert list(FrameStore.open_or_build(root, cameras=["wrist"]).images) == ["wrist"]
    assert (root / "frames" / "store.json").stat().st_mtime_ns == stamp


def test_a_store_keeps_the_cameras_it_has(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, make_episodes())
    first = FrameStore.open_or_build(root, cameras=["front"])
    assert list(FrameStore.open_or_build(root, cameras=["wrist"]).images) == ["wrist"]
    again = FrameStore.open(root / "frames")
    assert list(again.images) == ["front", "wrist"]
    np.testing.assert_array_equal(first.images["front"], again.images["front"])


def test_a_picture_may_be_described_channels_first(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, make_episodes())
    edit(root, lambda info: info["features"]["observation.images.wrist"].update(shape=[3, 8, 10]))
    assert FrameStore.open_or_build(root).features.cameras["wrist"] == (8, 10)


def test_a_killed_build_leaves_nothing_that_counts(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, make_episodes())
    (root / "frames.tmp").mkdir()
    (root / "frames.tmp" / "state.npy").write_bytes(b"half")
    assert len(FrameStore.open_or_build(root)) == sum(LENGTHS)
    assert not (root / "frames.tmp").exists()


def poison(episodes: list[Episode]) -> list[Episode]:
    episodes[1].action[2, 1] = np.nan
    return episodes


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: write_dataset(root, poison(make_episodes())), ["'action'", "row 5", "remedy"]),
        (lambda root: edit(root, lambda info: info["features"].pop(STATE)), [STATE, "expected", "remedy"]),
        (lambda root: edit(root, lambda info: info.update(codebase_version="v2.1")), ["v2.1", "v3"]),
        (lambda root: edit(root, lambda info: info.update(total_frames=99)), ["16 rows", "99"]),
        (lambda root: edit(root, lambda info: info.update(total_frames=0)), ["empty"]),
        (lambda root: edit(root, without_cameras), ["no camera", "observation.images."]),
        (lambda root: edit(root, lambda info: info.pop("features")), ["damaged", "0 features", "remedy"]),
        (lambda root: edit(root, lambda info: info.pop("fps")), ["damaged", "fps None", "remedy"]),
        (lambda root: edit(root, lambda info: info.update(fps=12.5)), ["fractional", "fps 12.5", "remedy"]),
        (lambda root: edit(root, lambda info: info["features"][ACTION].pop("dtype")), ["['action'] without"]),
        (lambda root: edit(root, resized), ["'front'", "(6, 6, 3) at frame 0", "(6, 9, 3)", "remedy"]),
        (lambda root: edit(root, as_videos), ["videos/observation.images.front", "remedy"]),
    ],
    ids=[
        "nan",
        "no state",
        "version",
        "truncated",
        "empty",
        "no camera",
        "no features",
        "no fps",
        "fractional fps",
        "no dtype",
        "size",
        "no video columns",
    ],
)
def test_what_training_could_not_use_is_said(
    tmp_path: Path, spoil: Callable[[Path], Any], words: list[str]
) -> None:
    write_dataset(tmp_path, make_episodes())
    spoil(tmp_path)
    with pytest.raises(ValueError) as caught:
        FrameStore.open_or_build(tmp_path)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "frames").exists()


def edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def without_cameras(info: dict[str, Any]) -> None:
    info["features"] = {key: value for key, value in info["features"].items() if "images" not in key}


def resized(info: dict[str, Any]) -> None:
    info["features"]["observation.images.front"]["shape"] = [6, 9, 3]


def as_videos(info: dict[str, Any]) -> None:
    info["features"]["observation.images.front"]["dtype"] = "video"


def test_missing_camera_and_missing_dataset(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", make_episodes())
    with pytest.raises(ValueError, match=r"\['side'\].*\['front', 'wrist'\].*data\.cameras"):
        FrameStore.open_or_build(root, cameras=["side", "front"])
    with pytest.raises(FileNotFoundError, match="remedy: record one"):
        FrameStore.open_or_build(tmp_path / "nowhere")


def test_frames_of_a_video_are_found_by_their_time(tmp_path: Path) -> None:
    path, pictures = tmp_path / "video.mp4", np.zeros((6, 16, 16, 3), np.uint8)
    pictures += np.arange(0, 240, 40, dtype=np.uint8)[:, None, None, None]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", 10, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb24"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    np.testing.assert_array_equal(list(frames_at(path, np.arange(6) / 10, 10)), pictures)
    some = list(frames_at(path, np.array([0.1, 0.1, 0.32, 0.5]), 10))
    np.testing.assert_array_equal(some, pictures[[1, 1, 3, 5]])
    for seconds in (0.6, -0.1):
        with pytest.raises(ValueError, match=r"none at .* remedy"):
            list(frames_at(path, np.array([seconds]), 10))


# Samples


def make_store() -> FrameStore:
    return FrameStore.of_episodes(make_episodes(), fps=10)


@pytest.mark.parametrize(("n_obs_steps", "chunk_size"), [(1, 4), (3, 1), (2, 8)])
def test_batches_equal_the_items_one_by_one(n_obs_steps: int, chunk_size: int) -> None:
    store = make_store()
    index = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))
    batch = Samples(store, chunk_size, n_obs_steps).batch(index)
    for row, i in enumerate(index.tolist()):
        first, last = store.first[i], store.last[i]
        seen = [max(i + t, first) for t in range(1 - n_obs_steps, 1)]
        ahead = [i + h for h in range(chunk_size)]
        for name, images in store.images.items():
            expected = images[seen].transpose(0, 3, 1, 2)
            np.testing.assert_array_equal(batch.images[name][row].numpy(), expected)
        np.testing.assert_array_equal(batch.state[row].numpy(), store.state[seen])
        np.testing.assert_array_equal(batch.action[row].numpy(), store.action[np.minimum(ahead, last)])
        assert batch.action_is_pad[row].tolist() == [j > last for j in ahead]
        assert batch.task[row] == store.task[i]
    assert batch.images["front"].dtype == torch.uint8


def test_draw_is_uniform_and_repeats() -> None:
    samples = Samples(make_store(), chunk_size=2)
    drawn = samples.draw(16_000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, samples.draw(16_000, torch.Generator().manual_seed(0)))
    counts = torch.bincount(drawn, minlength=len(samples))
    assert len(counts) == len(samples) == sum(LENGTHS)
    assert (counts - 1000).abs().max() < 150  # 5 standard deviations of a binomial draw


@pytest.mark.parametrize(("share", "batch_size"), [(0.0, 8), (0.25, 8), (1.0, 5)])
def test_a_share_of_samples_begins_episodes(share: float, batch_size: int) -> None:
    store = make_store()
    samples, generator = Samples(store, 2, start_share=share), torch.Generator().manual_seed(0)
    begins = np.flatnonzero(np.arange(len(store)) - store.first < 3)
    assert samples.starts.tolist() == begins.tolist()
    assert len(begins) == 3 + 3 + 1 + 3  # of episodes with 3, 7, 1 and 5 frames
    drawn = torch.stack([samples.draw(batch_size, generator) for _ in range(2000)])
    assert drawn.shape == (2000, batch_size)
    n = round(share * batch_size)
    assert set(drawn[:, :n].flatten().tolist()) == (set(begins.tolist()) if n else set())
    assert set(drawn[:, n:].flatten().tolist()) == (set(range(len(store))) if n < batch_size else set())


def test_samples_of_a_mapped_store_do_not_warn(tmp_path: Path) -> None:
    store = FrameStore.open_or_build(write_dataset(tmp_path, make_episodes()))
    batch = Samples(store, chunk_size=2).batch(torch.tensor([4]))
    np.testing.assert_array_equal(
        batch.images["wrist"][0, 0].permute(1, 2, 0).numpy(), store.images["wrist"][4]
    )


# Statistics


def test_statistics_are_exact_and_survive_a_file(tmp_path: Path) -> None:
    store = make_store()
    statistics = store.statistics()
    action = statistics[ACTION]
    x = store.action.astype(np.float64)
    for got, expected in (
        (action.mean, x.mean(0)), (action.std, x.std(0)), (action.min, x.min(0)), (action.max, x.max(0)),
        (action.q01, np.quantile(x, 0.01, axis=0)), (action.q99, np.quantile(x, 0.99, axis=0)),
    ):  # fmt: skip
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    statistics.save(tmp_path / "statistics.json")
    assert Statistics.load(tmp_path / "statistics.json") == statistics


def test_statistics_name_the_first_bad_row() -> None:
    x = np.zeros((5, 2), np.float32)
    x[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"'action' .* row 3 .* remedy"):
        Statistics.of({STATE: np.zeros((5, 1), np.float32), ACTION: x})
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        Statistics.of({ACTION: np.zeros((0, 2), np.float32)})


@pytest.mark.parametrize("mode", MODES)
def test_normalize_and_back(mode: str) -> None:
    x = (
        torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.0])
        + 0.3
    )
    normalizer = Normalizer(Statistics.of({ACTION: x.numpy()})[ACTION], mode)
    y = normalizer.normalize(x)
    torch.testing.assert_close(normalizer.unnormalize(y), x)
    assert (y[:, 2] == 0).all()  # a constant dimension
    assert normalizer.normalize(x + 0.01)[:, 2].abs().max() < 0.02  # and it does not amplify noise
    if mode == "mean_std":
        torch.testing.assert_close(y[:, :2].std(0, correction=0), torch.ones(2))
        assert y.mean(0).abs().max() < 1e-5
    if mode == "min_max":
        torch.testing.assert_close(y[:, :2].abs().amax(0), torch.ones(2))
    assert normalizer.state_dict() == {}


def test_clip_holds_the_range_of_the_data() -> None:
    normalizer = Normalizer(Statistics.of({ACTION: np.array([[-1.0, 0.0], [1.0, 5.0]], np.float32)})[ACTION])
    clipped = normalizer.clip(torch.tensor([[-3.0, 7.0], [0.5, 2.0]]))
    assert clipped.tolist() == [[-1.0, 5.0], [0.5, 2.0]]


def test_unknown_normalisation() -> None:
    with pytest.raises(ValueError, match="mean_std"):
        Normalizer(make_store().statistics()[ACTION], "zscore")


# Augmentation


def pictures(n: int = 64) -> torch.Tensor:
    return torch.rand(n, 3, 9, 7, generator=torch.Generator().manual_seed(1))


def test_shift_moves_by_whole_pixels_and_repeats_the_edge() -> None:
    images = pictures()
    torch.manual_seed(0)
    moved = shift(images, torch.randint(5, (2, len(images))), pixels=2)
    found = set()
    for image, result in zip(images.numpy(), moved.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="edge")
        places = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(padded[:, y : y + 9, x : x + 7], result)
        ]
        assert len(places) == 1
        found.update(places)
    assert len(found) > 15  # of 25: every image draws its own


def test_relight_stays_within_its_factors() -> None:
    images = 0.4 + 0.2 * pictures()  # nothing reaches 0 or 1, so nothing is clamped
    torch.manual_seed(0)
    result = augment(images, DataConfig(brightness=0.2, contrast=0.3, shift=0))
    factor = result.mean((1, 2, 3)) / images.mean((1, 2, 3))
    assert factor.min() >= 0.8 - 1e-5
    assert factor.max() <= 1.2 + 1e-5
    assert factor.max() - factor.min() > 0.3
    contrast = result.std((1, 2, 3)) / images.std((1, 2, 3)) / factor
    assert contrast.min() >= 0.7 - 1e-4
    assert contrast.max() <= 1.3 + 1e-4
    assert contrast.max() - contrast.min() > 0.4


def test_augment_keeps_range_input_and_seed() -> None:
    config = DataConfig(brightness=0.9, contrast=0.9, shift=3)
    images = pictures()
    before = images.clone()
    torch.manual_seed(0)
    result = augment(images, config)
    assert result.shape == images.shape
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(images, before)
    torch.manual_seed(0)
    assert torch.equal(result, augment(images, config))
    assert not torch.equal(result, augment(images, config))
    assert torch.equal(augment(images, DataConfig(brightness=0, contrast=0, shift=0)), images)


# Against lerobot itself


def write_with_lerobot(root: Path, dtype: str) -> None:
    from lerobot.datasets import LeRobotDataset

    episodes = make_episodes({"wrist": (64, 96), "front": (64, 64)})
    episodes = [e for e in episodes if len(e.state) > 1]  # lerobot 0.6.1 fails at one frame of video
    features: dict[str, Any] = {
        f"observation.images.{name}": {
            "dtype": dtype, "shape": images.shape[1:], "names": ["height", "width", "channels"]
        }
        for name, images in episodes[0].images.items()
    }  # fmt: skip
    for key, width in ((STATE, 3), (ACTION, 2)):
        features[key] = {"dtype": "float32", "shape": (width,), "names": None}
    dataset = LeRobotDataset.create(
        "local/test", 10, features, root=root, use_videos=dtype == "video", video_backend="pyav",
        streaming_encoding=dtype == "video", video_files_size_in_mb=0.02 if dtype == "video" else None,
    )  # fmt: skip
    for episode in episodes:
        for i in range(len(episode.state)):
            frame = {f"observation.images.{name}": images[i] for name, images in episode.images.items()}
            dataset.add_frame(
                frame | {STATE: episode.state[i], ACTION: episode.action[i], "task": episode.task}
            )
        dataset.save_episode()
    dataset.finalize()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lerobot and its dependencies
@pytest.mark.parametrize("dtype", ["video", "image"])
def test_items_equal_lerobots_own(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVT_LOG", "1")
    from lerobot.datasets import LeRobotDataset

    root = tmp_path / "data"
    write_with_lerobot(root, dtype)
    if dtype == "video":
        assert len(list(root.rglob("observation.images.front/*/*.mp4"))) > 1  # more than one file is read
    horizon, history = 4, 2
    deltas = {ACTION: [h / 10 for h in range(horizon)], STATE: [t / 10 for t in range(1 - history, 1)]}
    deltas |= {f"observation.images.{name}": deltas[STATE] for name in ("front", "wrist")}
    # The pyav decoder, which is ours; torchcodec's colour conversion may differ in the last bit.
    theirs = LeRobotDataset("local/test", root=root, delta_timestamps=deltas, video_backend="pyav")
    store = FrameStore.open_or_build(root)
    batch = Samples(store, horizon, history).batch(torch.arange(len(store)))
    assert len(theirs) == len(store)
    for i in range(len(store)):
        item = theirs[i]
        for name in ("front", "wrist"):
            picture = (item[f"observation.images.{name}"] * 255).round().to(torch.uint8)
            assert torch.equal(batch.images[name][i], picture)
        assert torch.equal(batch.state[i], item[STATE])
        assert torch.equal(batch.action[i], item[ACTION])
        assert torch.equal(batch.action_is_pad[i], item["action_is_pad"])
        assert store.tasks[int(batch.task[i])] == item["task"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_missing_video_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVT_LOG", "1")
    write_with_lerobot(tmp_path / "data", "video")
    path = next((tmp_path / "data").rglob("*wrist*/*/*.mp4"))
    os.remove(path)
    with pytest.raises(ValueError, match=path.name):
        FrameStore.open_or_build(tmp_path / "data")
