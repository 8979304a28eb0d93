"""Streaming: the order of draws, the ring of frames, resuming, and what stops it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data import make_episodes, write_dataset, write_with_lerobot

from vla.data.frames import Episode, FrameStore
from vla.data.order import RESIDENCE, Order
from vla.data.prefetch import Prefetch
from vla.data.samples import START_FRAMES, Samples
from vla.data.stream import Stream, StreamedData
from vla.observation import Batch

LENGTHS = np.array([5, 3, 11, 2, 8, 7, 1, 9])  # of the episodes in the tests of the order: 46 frames


def order(block: int = 8, seed: int = 0) -> Order:
    return Order(LENGTHS, np.minimum(LENGTHS, START_FRAMES), block, seed)


def many_episodes(n: int = 40, size: tuple[int, int] = (8, 10)) -> list[Episode]:
    rng, episodes = np.random.default_rng(1), []
    for i in range(n):
        frames = int(rng.integers(3, 9))
        images = {
            "wrist": rng.integers(0, 256, (frames, *size, 3), np.uint8),
            "front": rng.integers(0, 256, (frames, 6, 6, 3), np.uint8),
        }
        state, action = (rng.normal(size=(frames, d)).astype(np.float32) for d in (3, 2))
        episodes.append(Episode(images, state, action, f"task {i % 3}"))
    return episodes


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("streamed"), many_episodes(), rows=7)


def stream(root: Path, frames: int = 70, batch_size: int = 4, **options: Any) -> Stream:
    """A stream whose cache holds so many frames (of 348 bytes)."""
    data = StreamedData.open(root, "", (), frames * 348 / 1e6)
    return Stream(data, 4, batch_size=batch_size, **options)


def assert_equal(batch: Batch, other: Batch) -> None:
    assert batch.images.keys() == other.images.keys()
    for name in batch.images:
        assert torch.equal(batch.images[name], other.images[name])
    for name in ("state", "task", "action", "action_is_pad"):
        assert torch.equal(getattr(batch, name), getattr(other, name))


# The order


def test_every_frame_is_drawn_once_a_pass() -> None:
    drawn = np.concatenate([order().drawn(block) for block in range(200)])
    assert len(set(drawn.tolist())) == len(drawn)  # no position twice
    low, _ = order().window(200)
    assert set(range(low)) <= set(drawn.tolist())  # and none is left out
    frames = order().frames(np.arange(3 * 46)).reshape(3, 46)
    assert [sorted(row) for row in frames.tolist()] == [list(range(46))] * 3
    assert len({tuple(row) for row in frames.tolist()}) == 3  # each pass in another order of the episodes


def test_draws_come_from_all_over_the_window() -> None:
    """Uniform in age: a position is drawn at any of the 16 blocks behind it, as likely."""
    o = order(block=500)
    drawn = o.drawn(40)
    age = 40 - drawn // 500
    assert all(o.window(40)[0] <= p < o.window(40)[1] for p in drawn)
    counts = np.bincount(age, minlength=RESIDENCE + 1)
    expected = 500 / RESIDENCE * np.array([0.5, *[1] * (RESIDENCE - 1), 0.5])
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert np.abs(np.diff(drawn)).mean() > 2000  # neighbours in the order are not neighbours in the data


def test_places_episodes_and_starts_of_the_endless_row() -> None:
    o = order()
    rows = np.concatenate([o.frames(np.arange(46 * 4))])
    first = np.cumsum(LENGTHS) - LENGTHS
    is_start = np.isin(rows, [f + i for f, n in zip(first, LENGTHS, strict=True) for i in range(min(n, 3))])
    for position in range(46 * 3):
        episode, begin = o.episode(o.episode_at(position))
        assert begin <= position < begin + LENGTHS[episode]
        assert rows[position] == first[episode] + position - begin
        assert o.starts_before(position) == is_start[:position].sum()
    numbers = np.arange(o.starts * 3)
    assert o.starts_at(numbers).tolist() == np.flatnonzero(is_start)[: len(numbers)].tolist()


def test_the_order_follows_the_seed() -> None:
    assert np.array_equal(order().drawn(30), order().drawn(30))
    assert not np.array_equal(order().drawn(30), order(seed=1).drawn(30))


# The stream


@pytest.mark.parametrize(("n_obs_steps", "share"), [(1, 0.0), (3, 0.0), (2, 0.5), (1, 1.0)])
def test_batches_equal_those_of_the_store(root: Path, n_obs_steps: int, share: float) -> None:
    """For 4 passes of a dataset that is 3 times the ring."""
    streamed = stream(root, batch_size=8, n_obs_steps=n_obs_steps, start_share=share)
    store = FrameStore.open_or_build(root)
    assert len(store) > 3 * streamed.frames
    samples = Samples(store, 4, n_obs_steps)
    assert streamed.data.features == store.features
    assert streamed.data.statistics() == store.statistics()
    assert (streamed.data.tasks, len(streamed)) == (store.tasks, len(store))
    generator, n = torch.Generator().manual_seed(0), round(8 * share)
    for _ in range(4 * len(store) // 8):
        index = streamed.draw(8, generator)
        assert_equal(streamed.batch(index), samples.batch(index))
        assert set(index[:n].tolist()) <= set(samples.starts.tolist())
    streamed.close()


def test_every_frame_is_shown_about_once_a_pass(root: Path) -> None:
    streamed = stream(root)
    passes, n = 8, len(streamed)
    drawn = torch.cat([streamed.draw(4) for _ in range(passes * n // 4)])
    streamed.close()
    counts = torch.bincount(drawn, minlength=n)
    # Exact but for the window: frames of it may come a pass early or late.
    assert counts.min() >= passes - 2
    assert counts.max() <= passes + 1
    assert drawn[: n // 2].sort().values.tolist() != list(range(n // 2))


def test_starts_come_as_often_as_each_other(root: Path) -> None:
    streamed = stream(root, frames=600, batch_size=8, start_share=0.5)
    generator, begins = torch.Generator().manual_seed(0), streamed.numbers.starts
    drawn = torch.cat([streamed.draw(8, generator)[:4] for _ in range(600)])
    streamed.close()
    counts = torch.bincount(drawn, minlength=len(streamed))[begins].float()
    assert counts.sum() == len(drawn)
    expected = len(drawn) / len(begins)
    assert (counts - expected).abs().max() < 6 * expected**0.5


def test_one_thread_or_many_draw_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for cores in (1, 6):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        streamed = stream(root, start_share=0.5)
        generator = torch.Generator().manual_seed(0)
        batches = [streamed.batch(streamed.draw(4, generator)) for _ in range(150)]
        assert len(streamed.threads) == max(1, cores - 1)
        drawn.append(torch.cat([batch.images["wrist"] for batch in batches]))
        streamed.close()
    assert torch.equal(*drawn)


def test_a_resumed_stream_goes_on(root: Path) -> None:
    whole, resumed = stream(root, start_share=0.25), stream(root, start_share=0.25)
    generator = torch.Generator().manual_seed(0)
    for _ in range(97):
        whole.draw(4, generator)
    saved, state = {name: x.clone() for name, x in whole.position().items()}, generator.get_state()
    resumed.draw(4)
    resumed.load_position(saved)
    for a, b in [(whole, torch.Generator()), (resumed, torch.Generator())]:
        b.set_state(state)
        batches = [a.batch(a.draw(4, b)) for _ in range(60)]
        a.close()
        if a is whole:
            expected = batches
    for batch, other in zip(batches, expected, strict=True):
        assert_equal(batch, other)


def test_a_slow_thread_spoils_no_later_frame(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming in the middle of an episode, whose earlier frames share their places with later ones."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    whole, resumed = stream(root, frames=58), stream(root, frames=58)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):  # until the window begins inside of an episode, and a later one ends in its places
        whole.draw(4, generator)
        saved, state = {name: x.clone() for name, x in whole.position().items()}, generator.get_state()
        low = max(0, whole.order.window(int(saved["stream"][0]))[0] - whole.history)
        first = whole.order.episode_at(low)
        begin = whole.order.episode(first)[1]
        later = [whole.order.episode(first + i) for i in range(1, 40)]
        ends = [at + int(whole.data.lengths[episode]) for episode, at in later]
        if any(begin + whole.frames < end <= low + whole.frames for end in ends):
            break
    else:
        pytest.fail("there is no such place")
    expected = [whole.batch(whole.draw(4, generator)) for _ in range(40)]
    whole.close()
    resumed.load_position(saved)
    number, read, held = whole.order.episode(first)[0], resumed.data.reader.frames, threading.Event()

    def slow(name: str, episode: int) -> Any:
        if name == "wrist" and episode == number and not held.is_set():
            held.set()
            time.sleep(0.5)  # the other threads fill the ring meanwhile
        return read(name, episode)

    monkeypatch.setattr(type(resumed.data.reader), "frames", lambda self, name, episode: slow(name, episode))
    generator.set_state(state)
    batches = [resumed.batch(resumed.draw(4, generator)) for _ in range(40)]
    resumed.close()
    assert held.is_set()
    for batch, other in zip(batches, expected, strict=True):
        assert_equal(batch, other)


def test_frames_that_left_are_not_given(root: Path) -> None:
    streamed = stream(root)
    index = streamed.draw(4)
    for _ in range(60):
        streamed.draw(4)
    with pytest.raises(ValueError, match=r"not in memory.*remedy: gather a batch before"):
        streamed.batch(index)
    streamed.close()


def test_a_dataset_smaller_than_the_cache(tmp_path: Path) -> None:
    streamed = stream(write_dataset(tmp_path, make_episodes()), frames=100_000)
    assert streamed.frames < 100
    counts = torch.bincount(torch.cat([streamed.draw(4) for _ in range(80)]), minlength=16)
    streamed.close()
    assert counts.min() >= 16
    assert counts.max() <= 23


def test_too_small_a_cache_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"data\.cache_mb: got 0\.00\d+, expected .* two of the longest episode"
    ):
        stream(root, frames=15)
    with pytest.raises(ValueError, match=r"data\.cache_mb: got .*, expected .* for batches of 64, .*remedy"):
        stream(root, batch_size=64)
    monkeypatch.setattr(StreamedData, "lengths", property(lambda self: np.array([100, *[3] * 39])))
    with pytest.raises(
        ValueError, match=r"the longest episode \(100 frames\) and data\.start_share=0\.5.*remedy"
    ):
        stream(root, frames=210, batch_size=4, start_share=0.5)
    stream(root, frames=210, batch_size=4)
    monkeypatch.undo()
    streamed = stream(root)
    with pytest.raises(ValueError, match="draw of 200"):
        streamed.draw(200)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lerobot and its dependencies
@pytest.mark.parametrize("dtype", ["video", "image"])
def test_streamed_videos_equal_the_store(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVT_LOG", "1")
    root = tmp_path / "data"
    write_with_lerobot(root, dtype)
    samples = Samples(FrameStore.open_or_build(root), 4)
    streamed = Stream(StreamedData.open(root, "", ("wrist",), 2), 4, batch_size=4)
    for _ in range(20):
        index = streamed.draw(4)
        assert torch.equal(streamed.batch(index).images["wrist"], samples.batch(index).images["wrist"])
    streamed.close()
    if dtype == "video":
        path = next(root.rglob("*wrist*/*/*.mp4"))
        path.write_bytes(path.read_bytes()[:2000] + bytes(5000))
        streamed = Stream(StreamedData.open(root, "", ("wrist",), 2), 4, batch_size=4)
        for _ in range(2):  # at every draw, not only at the first
            with pytest.raises(ValueError, match=rf"Episode \d .*camera 'wrist'.*{path.name}.*remedy"):
                [streamed.draw(4) for _ in range(20)]
        streamed.close()
        path.unlink()
        with pytest.raises(ValueError, match=path.name):
            StreamedData.open(root, "", (), 2)


# Prefetch


def test_prefetched_batches_are_those_drawn_one_by_one(root: Path) -> None:
    samples = Samples(FrameStore.open_or_build(root), 4)
    generator, other = (torch.Generator().manual_seed(3) for _ in range(2))
    ahead = Prefetch(samples, 8, generator)
    assert torch.equal(ahead.generator_state, other.get_state())
    for _ in range(10):
        index, batch = ahead.next()
        expected = samples.draw(8, other)
        assert torch.equal(index, expected)
        assert_equal(batch, samples.batch(expected))
        assert torch.equal(ahead.generator_state, other.get_state())  # and not that of what lies ready
    ahead.close()
    assert ahead.thread is not None
    assert not ahead.thread.is_alive()


def test_a_prefetched_stream_resumes_behind_the_batch_handed_out(root: Path) -> None:
    streamed, generator = stream(root, start_share=0.5), torch.Generator().manual_seed(3)
    ahead = Prefetch(streamed, 4, generator)
    for _ in range(30):
        ahead.next()
    state, samples = ahead.generator_state, ahead.position
    expected = [ahead.next() for _ in range(20)]
    ahead.close()
    streamed.close()
    streamed, generator = stream(root, start_share=0.5), torch.Generator()
    generator.set_state(state)
    streamed.load_position(samples)
    ahead = Prefetch(streamed, 4, generator)
    for index, batch in expected:
        again, other = ahead.next()
        assert torch.equal(index, again)
        assert_equal(batch, other)
    ahead.close()
    streamed.close()


def test_errors_of_the_thread_are_raised_by_next(root: Path) -> None:
    class Broken(Samples):
        def gather(self, index: torch.Tensor) -> Batch:
            raise ValueError("a damaged file")

    ahead = Prefetch(Broken(FrameStore.open_or_build(root), 4), 8, torch.Generator())
    for _ in range(2):
        with pytest.raises(ValueError, match="a damaged file"):
            ahead.next()
    ahead.close()


def test_prefetch_wants_a_generator_of_the_cpu(root: Path) -> None:
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="got: cuda. expected: cpu"):
        Prefetch(Samples(FrameStore.open_or_build(root), 4), 8, Elsewhere())  # pyright: ignore[reportArgumentType]


# Memory

FLAT = """
import sys, numpy as np, psutil, torch
from pathlib import Path
from vla.data.prefetch import Prefetch
from vla.data.stream import Stream, StreamedData
data = StreamedData.open(Path(sys.argv[1]), "", (), float(sys.argv[2]))
stream = Stream(data, 8, batch_size=16)
ahead = Prefetch(stream, 16, torch.Generator())
rss, steps = [], len(data) // 16
for step in range(2 * steps):
    ahead.next()
    rss.append(psutil.Process().memory_info().rss)
print(len(data) * data.frame_bytes / 1e6, max(rss[:steps]) / 1e6, max(rss[steps:]) / 1e6, rss[0] / 1e6)
ahead.close(); stream.close()
"""


@pytest.mark.slow
def test_memory_stays_flat_over_a_dataset_ten_times_the_cache(tmp_path: Path) -> None:
    rng, noise = np.random.default_rng(0), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    episodes = [
        Episode({"front": np.stack([np.roll(noise, int(k), 0) for k in rng.integers(0, 64, 40)])},
                np.zeros((40, 3), np.float32) + i, np.zeros((40, 2), np.float32), "go")
        for i in range(420)
    ]  # fmt: skip
    root = write_dataset(tmp_path, episodes, rows=40)
    del episodes
    cache = 20.0
    done = subprocess.run(
        [sys.executable, "-c", FLAT, str(root), str(cache)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    decoded, first, second, begin = map(float, done.stdout.split())
    print(
        f"a pass decodes {decoded:.0f} MB into {cache} MB; RSS {begin:.0f}, then {first:.0f}, {second:.0f} MB"
    )
    assert decoded > 10 * cache
    assert first < begin + cache + 40  # the rest: batches, decoders, parquet
    assert second < first + 5
