"""From journals to a dataset: what is kept, where it is split, and that training can use it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_journal import FEATURES, JOINTS, make_frame, make_header, step_record, wait_for

from vla.control.recorder import Recorder
from vla.data.collect import SUMMARY, Collection, collect, pieces
from vla.data.frames import FrameStore
from vla.data.journal import End, Frame, Journal, episode_path, journals, record
from vla.observation import Features

SCRIPT = Path(__file__).parent.parent / "scripts" / "collect.py"
PICTURES = Features({"wrist": (48, 64), "front": (32, 32)}, state_dim=3, action_dim=2, fps=10)


def write(session: Path, episode: int, frames: list[Frame], ended: bool = True, **header: Any) -> Path:
    session.mkdir(exist_ok=True)
    path = episode_path(session, episode)
    content = record(make_header(episode=episode, **header)) + b"".join(map(step_record, frames))
    path.write_bytes(content + record(End(9.0, {"success": True})) * ended)
    return path


def cut(frames: list[Frame], keep: str = "run") -> tuple[list[list[int]], Collection]:
    """The steps of each piece of one journal."""
    result = Collection("s", keep, "toy", JOINTS)

    class InMemory(Journal):
        def frames(self) -> Any:
            return iter(frames)

    found: list[list[int]] = []
    for follows, frame in pieces(InMemory(Path(), make_header(), End(9.0, {}, 2), 0, ()), result):
        if not follows:
            found.append([])
        found[-1].append(frame.step)
    return found, result


def test_an_uninterrupted_episode_stays_whole() -> None:
    late = [make_frame(i, stamp=100 + i / 10 + 0.04 * (i % 2)) for i in range(6)]
    assert cut(late)[0] == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("mode", ["INIT", "READY", "HOLD", "STOPPED", "FAULT"])
def test_what_is_no_demonstration_splits(mode: str) -> None:
    frames = [make_frame(i, mode=mode if i in (0, 3, 4, 9) else "RUN") for i in range(10)]
    found, result = cut(frames)
    assert found == [[1, 2], [5, 6, 7, 8]]
    assert result.left_out == {mode: 4}
    assert cut(frames, "all")[0] == [[*range(10)]]
    assert cut(frames, "all")[1].left_out == {}


def test_missing_frames_split() -> None:
    frames = [make_frame(i, lost=3 if i == 2 else 0) for i in range(4)]
    found, result = cut(frames)
    assert (found, result.lost) == ([[0, 1], [2, 3]], 5)  # and two before the end
    skipped = [make_frame(i) for i in (0, 1, 3, 4)]
    assert cut(skipped, "all")[0] == [[0, 1], [3, 4]]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["state", "action"])
def test_numbers_that_are_not_finite_split(name: str, wrong: float) -> None:
    frames = [make_frame(i) for i in range(5)]
    setattr(frames[2], name, np.full_like(getattr(frames[2], name), wrong))
    for keep in ("run", "all"):
        found, result = cut(frames, keep)
        assert found == [[0, 1], [3, 4]]
        assert result.left_out == {"numbers that are not finite": 1}


# What is refused before any work


def test_refusals(tmp_path: Path) -> None:
    session, root = tmp_path / "session", tmp_path / "dataset"
    with pytest.raises(ValueError, match=r"no recorded session.*remedy"):
        collect(session, root)
    path = write(session, 0, [make_frame(i) for i in range(3)])
    with pytest.raises(ValueError, match=r"keep.*got 'some'.*remedy"):
        collect(session, root, "some")
    root.mkdir()
    with pytest.raises(ValueError, match=r"taken.*remedy"):
        collect(session, root)
    root.rmdir()
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the recorder does
        with pytest.raises(ValueError, match=r"being recorded.*remedy"):
            collect(session, root)
    for change in ({"joints": JOINTS[::-1]}, {"fps": 20}, {"robot": "other"}):
        write(session, 1, [make_frame(0)], **change)
        with pytest.raises(ValueError, match=rf"{next(iter(change))}.*got: .*expected: .*remedy"):
            collect(session, root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["session"]


def test_a_journal_that_is_being_recorded_is_locked(tmp_path: Path) -> None:
    with Recorder(tmp_path / "session", FEATURES, JOINTS, "toy") as recorder:
        recorder.begin("x")
        recorder.add(make_frame(0))
        wait_for(lambda: recorder.written == 1)
        with pytest.raises(ValueError, match=r"being recorded.*remedy"):
            collect(tmp_path / "session", tmp_path / "dataset")


# The dataset


def smooth(step: int, **changes: Any) -> Frame:
    """Pictures as cameras take them, other than noise: each step's has a place of its own."""
    frame = make_frame(step, PICTURES, **changes)
    for number, (name, (h, w)) in enumerate(PICTURES.cameras.items()):
        y, x = np.mgrid[:h, :w]
        red = 127 + 100 * np.sin(x / 9 + step)
        image = np.stack([red, 255 * y / h, 255 * ((x + 8 * step) // 8 % 2)], 2)
        frame.images[name] = np.roll(image, 40 * number, 2).astype(np.uint8)
    return frame


def check_episode(store: FrameStore, start: int, expected: list[Frame]) -> None:
    span = slice(start, start + len(expected))
    assert (store.first[span] == start).all()
    assert (store.last[span] == start + len(expected) - 1).all()
    np.testing.assert_array_equal(store.state[span], [frame.state for frame in expected])
    np.testing.assert_array_equal(store.action[span], [frame.action for frame in expected])
    assert [store.tasks[i] for i in store.task[span]] == [frame.task for frame in expected]
    for name in PICTURES.cameras:
        truth = np.stack([frame.images[name] for frame in expected]).astype(int)
        assert np.abs(store.images[name][span] - truth).max() <= 2  # of 255: what colour conversion costs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lerobot and its dependencies
def test_a_session_becomes_a_dataset(tmp_path: Path) -> None:
    session, root = tmp_path / "session", tmp_path / "dataset"
    cameras = dict(PICTURES.cameras)
    first = [smooth(i, task="go left" if i < 4 else "go right", intervention=2 <= i < 5) for i in range(9)]
    second = [smooth(10 + i, mode="HOLD" if i in (3, 4) else "RUN") for i in range(8)]
    second[6].lost = 1  # leaves one frame behind the hold alone
    write(session, 0, first, cameras=cameras, model="abc", meta={"operator": "ann"})
    path = write(session, 1, second, ended=False, cameras=cameras)
    path.write_bytes(path.read_bytes() + b"torn")
    episode_path(session, 2).touch()  # a kill right after it was made

    result = collect(session, root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "session"]
    assert (result.frames, result.lost) == (14, 1)
    assert result.left_out == {"HOLD": 2, "pieces too short": 1}
    assert result.ignored == {"episode_000001.journal": 4}
    assert result.unreadable == ["episode_000002.journal"]
    kept = [first, second[:3], second[6:]]
    assert result.interventions == sum(frame.intervention for piece in kept for frame in piece)
    assert [source["first_step"] for source in result.source] == [0, 10, 16]
    assert [source["frames"] for source in result.source] == [9, 3, 2]
    assert [source["outcome"] for source in result.source] == [{"success": True}, None, None]
    assert (result.source[0]["model"], result.source[0]["meta"]) == ("abc", {"operator": "ann"})
    assert json.loads((root / SUMMARY).read_text())["left_out"] == result.left_out
    for words in ("3 episodes, 14 frames", "left out 2 (HOLD)", "4 damaged bytes", "1 lost"):
        assert words in str(result)

    store = FrameStore.open_or_build(root)
    assert store.features == PICTURES
    assert len(store) == 14
    for start, piece in zip((0, 9, 12), kept, strict=True):
        check_episode(store, start, piece)

    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("local/test", root=root, video_backend="pyav")
    assert (dataset.num_episodes, dataset.num_frames) == (3, 14)
    for row, frame in enumerate(frame for piece in kept for frame in piece):
        item = dataset[row]
        assert item["task"] == frame.task
        assert bool(item["intervention"]) == frame.intervention
        np.testing.assert_array_equal(item["action"].numpy(), frame.action)
        np.testing.assert_array_equal(item["observation.state"].numpy(), frame.state)
        front = item["observation.images.front"].numpy().transpose(1, 2, 0) * 255
        assert np.abs(front - frame.images["front"]).max() <= 2.01
    assert dataset.meta.features["intervention"]["dtype"] == "bool"

    everything = collect(session, tmp_path / "all", "all")
    assert everything.left_out == {}
    assert [source["frames"] for source in everything.source] == [9, 6, 2]

    hold = tmp_path / "hold"
    write(hold, 0, [smooth(i, mode="HOLD") for i in range(4)], cameras=cameras)
    with pytest.raises(ValueError, match=r"Nothing of .*HOLD.*4.*remedy"):
        collect(hold, tmp_path / "nothing")
    assert not list(tmp_path.glob("nothing*"))


@pytest.mark.slow
def test_a_killed_collection_leaves_nothing_half_and_runs_again(tmp_path: Path) -> None:
    session, root = tmp_path / "session", tmp_path / "dataset"
    for episode in range(3):
        frames = [smooth(i) for i in range(1200 if episode else 20)]  # more than may wait for the encoder
        write(session, episode, frames, cameras=dict(PICTURES.cameras))
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), str(session), str(root)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200  # importing lerobot takes long
    try:
        while not (tmp_path / "dataset.parts" / "dataset" / "videos").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not root.exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "3 episodes, 2420 frames" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "session"]
    store = FrameStore.open_or_build(root)
    for number, start in enumerate((0, 20, 1220)):
        check_episode(store, start, [smooth(i) for i in range(1200 if number else 20)])
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert again.returncode != 0
    assert "remedy" in again.stderr
    assert "Traceback" not in again.stderr
    assert len(journals(session)) == 3
