"""Recording: the file survives whatever cuts or damages it, and the loop never notices the recorder."""

from __future__ import annotations

import enum
import gc
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.control import ring
from vla.control.journalist import Episode
from vla.control.recorder import LARGEST_STEP, Recorder, plain
from vla.control.ring import Full, Receiver, Sender
from vla.data.journal import (
    PREFIX,
    End,
    Frame,
    Header,
    Journal,
    JournalError,
    Step,
    checksum,
    compress,
    episode_path,
    journals,
    record,
    records,
    to_step,
)
from vla.observation import Features

FEATURES = Features({"wrist": (8, 10), "front": (6, 6)}, state_dim=3, action_dim=2, fps=10)
JOINTS = ("a", "b", "c", "d")


class State(enum.StrEnum):
    RUN = "RUN"


def make_frame(step: int, features: Features = FEATURES, **changes: Any) -> Frame:
    rng = np.random.default_rng(step)
    frame = Frame(
        step=step,
        stamp=100 + step / features.fps,
        mode="RUN",
        task="go left",
        images={name: rng.integers(0, 256, (*size, 3), np.uint8) for name, size in features.cameras.items()},
        stamps=dict.fromkeys(features.cameras, 99.0 + step),
        state=rng.normal(size=features.state_dim).astype(np.float32),
        state_stamp=99.5 + step,
        action=rng.normal(size=features.action_dim).astype(np.float32),
        command=rng.normal(size=len(JOINTS)),
        intervention=step % 3 == 0,
    )
    return replace(frame, **changes)


def assert_same(got: Frame, expected: Frame) -> None:
    assert got.images.keys() == expected.images.keys()
    for name, image in expected.images.items():
        np.testing.assert_array_equal(got.images[name], image)
        assert got.images[name].dtype == np.uint8
    for name in ("state", "action", "command"):
        x, y = getattr(got, name), getattr(expected, name)
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype
    for name in ("step", "stamp", "mode", "task", "stamps", "state_stamp", "intervention", "lost"):
        assert getattr(got, name) == getattr(expected, name), name


def make_header(**changes: Any) -> Header:
    cameras, f = dict(FEATURES.cameras), FEATURES
    header = Header(
        1, "0.1", "toy", JOINTS, cameras, f.state_dim, f.action_dim, f.fps, "abc", 0, "go left", 1.0, {}
    )
    return Header(**({name: getattr(header, name) for name in header.__struct_fields__} | changes))


def step_record(frame: Frame) -> bytes:
    step = to_step(frame)
    step.images = {name: compress(np.ascontiguousarray(image)) for name, image in frame.images.items()}
    return record(step)


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    recorder = Recorder(tmp_path / "session", FEATURES, JOINTS, "toy")
    yield recorder
    if recorder._process.poll() is None:
        recorder._process.send_signal(signal.SIGCONT)
    recorder.close()


# The file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    frames = [make_frame(0), make_frame(1, task="go right", mode="HOLD", lost=4)]
    path = tmp_path / "x.journal"
    end = End(9.0, {"success": True, "note": ["x", 1.5]}, 2)
    path.write_bytes(record(make_header()) + b"".join(map(step_record, frames)) + record(end))
    journal = Journal.open(path)
    assert (journal.header, journal.end, journal.ignored, len(journal)) == (make_header(), end, 0, 2)
    assert journal.header.features == FEATURES
    for got, expected in zip(journal.frames(), frames, strict=True):
        assert_same(got, expected)


def test_a_cut_at_any_byte_costs_no_whole_record(tmp_path: Path) -> None:
    frames = [make_frame(i) for i in range(3)]
    parts = [record(make_header()), *map(step_record, frames), record(End(9.0, {}))]
    data, path = b"".join(parts), tmp_path / "x.journal"
    ends = np.cumsum([len(part) for part in parts])
    for cut in range(len(parts[0]), len(data) + 1):
        path.write_bytes(data[:cut])
        journal = Journal.open(path)
        whole = int((ends <= cut).sum())
        assert len(journal) == min(whole - 1, 3)
        assert (journal.end is not None) == (whole == 5)
        assert journal.ignored == cut - ends[whole - 1]
    path.write_bytes(data[: ends[2] + 7])
    for got, expected in zip(Journal.open(path).frames(), frames[:2], strict=True):
        assert_same(got, expected)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bits_never_give_wrong_data(data: st.DataObject) -> None:
    frames = [make_frame(i) for i in range(3)]
    parts = [record(make_header()), *map(step_record, frames), record(End(9.0, {"success": True}))]
    content = bytearray(b"".join(parts))
    first = data.draw(st.integers(len(parts[0]), len(content) - 1))
    content[first] ^= data.draw(st.integers(1, 255))
    for place in data.draw(st.sets(st.integers(first + 1, len(content)), max_size=3)) - {len(content)}:
        content[place] ^= data.draw(st.integers(1, 255))
    ends = np.cumsum([len(part) for part in parts])
    intact = int((ends <= first).sum())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.journal"
        path.write_bytes(content)
        journal = Journal.open(path)
        read = list(journal.frames())
    assert journal.end is None
    assert (len(read), journal.ignored) == (intact - 1, len(content) - ends[intact - 1])
    for got, expected in zip(read, frames, strict=False):
        assert_same(got, expected)


def test_zeros_of_a_power_failure_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    path.write_bytes(record(make_header()) + step_record(make_frame(0)) + bytes(4096))
    journal = Journal.open(path)
    assert (len(journal), journal.ignored) == (1, 4096)


@pytest.mark.parametrize(
    "content", [b"", b"x", bytes(100), record(make_header())[:-1], step_record(make_frame(0))]
)
def test_no_header_no_journal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.journal"
    path.write_bytes(content)
    with pytest.raises(JournalError, match=r"got: .*expected: .*remedy"):
        Journal.open(path)


def test_a_later_version_is_named(tmp_path: Path) -> None:
    payload = b"\x81\xa4type\xa5other"
    path = tmp_path / "x.journal"
    prefix = PREFIX.pack(len(payload), checksum(payload))
    path.write_bytes(record(make_header()) + prefix + payload)
    with pytest.raises(JournalError, match=r"does not know.*remedy"):
        Journal.open(path)
    path.write_bytes(record(make_header(version=2)))
    with pytest.raises(JournalError, match=r"got: version 2.*remedy"):
        Journal.open(path)


# The ring


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.booleans()), max_size=80))
def test_the_ring_keeps_order_and_content(messages: list[tuple[int, bool]]) -> None:
    sender = Sender(1000)
    receiver = Receiver(*map(os.dup, sender.receiver))
    expected: list[bytes] = []
    got: list[bytes] = []

    def take() -> None:
        message = receiver.receive(1.0)
        assert message is not None
        got.append(bytes(message))

    try:
        with mock.patch.object(ring, "POLL", 0.001):
            for number, (length, now) in enumerate(messages):
                content = bytes((number + i) % 256 for i in range(length))
                refused = 0
                while not sent(sender, content):
                    refused += 1
                    assert refused < 10
                    if len(got) < len(expected):
                        take()
                    else:
                        assert receiver.receive(0.0) is None  # which says that all was consumed
                expected.append(content)
                if now:
                    take()
            os.close(sender.pipe)
            sender.pipe = -1
            while len(got) < len(expected):
                take()
            with pytest.raises(EOFError):
                receiver.receive(1.0)
        assert got == expected
    finally:
        os.close(sender.receiver[1])
        sender.close()
        receiver.close()


def sent(sender: Sender, content: bytes) -> bool:
    try:
        sender.send(content[:1], [np.frombuffer(content[1:], np.uint8)])
    except Full:
        return False
    return True


def test_messages_that_could_never_fit_are_an_error() -> None:
    sender = Sender(1000)
    with pytest.raises(ValueError, match="half"):
        sender.send(bytes(600))
    os.close(sender.receiver[1])
    sender.close()


# The recorder


def test_a_session_is_recorded(recorder: Recorder) -> None:
    frames = [make_frame(i, task="go left" if i < 3 else "go right", mode=State.RUN) for i in range(6)]
    flipped = frames[2].images["front"][::-1]  # not contiguous
    frames[2].images["front"] = flipped
    assert recorder.begin("go left", model="abc", operator="ann", at=np.float32(2.0)) == 0
    for frame in frames:
        kept = {name: image.copy() for name, image in frame.images.items()}
        given = replace(frame, images=kept if frame.step != 2 else frame.images)
        assert recorder.add(given)
        if frame.step != 2:
            for image in kept.values():  # a camera's buffer is used again at once
                image[:] = 0
    recorder.end({"success": np.bool_(True)})
    assert recorder.begin("stay") == 1
    wait_for(lambda: recorder.written == 6)
    assert recorder.state == "ok"
    recorder.close()
    assert recorder.state.startswith("closed (exit code 0, 0 lost, 6 written")

    first, second = map(Journal.open, journals(recorder.session))
    assert first.header.meta == {"operator": "ann", "at": 2.0}
    assert (first.header.robot, first.header.joints, first.header.model) == ("toy", JOINTS, "abc")
    assert first.header.features == FEATURES
    assert first.end is not None
    assert first.end.outcome == {"success": True}
    for got, expected in zip(first.frames(), frames, strict=True):
        assert_same(got, expected)
    assert (len(second), second.header.task, second.header.episode) == (0, "stay", 1)
    assert second.end is not None

    with Recorder(recorder.session, FEATURES, JOINTS, "toy") as again:  # continues, overwrites nothing
        assert again.begin("once more") == 2
    assert len(journals(recorder.session)) == 3


def test_what_does_not_fit_is_refused_and_said(recorder: Recorder) -> None:
    assert not recorder.add(make_frame(0))
    assert "no episode" in recorder.state
    recorder.begin("x")
    f = make_frame(1)
    wrong: list[Any] = [
        replace(f, images={"front": f.images["front"]}),
        replace(f, images=f.images | {"wrist": f.images["front"]}),
        replace(f, images=f.images | {"front": f.images["front"].astype(np.float32)}),
        replace(f, state=np.zeros(4, np.float32)),
        replace(f, action=np.zeros((1, 2), np.float32)),
        replace(f, command=np.zeros(3)),
        replace(f, command=None),
        replace(f, task="\ud800"),
        replace(f, task="x" * LARGEST_STEP),
        replace(f, stamps=None),
        None,
    ]
    for number, frame in enumerate(wrong):
        assert recorder.add(frame) is False, number
    assert recorder.refused == len(wrong) + 1
    assert recorder.state.startswith(f"misfit ({len(wrong) + 1} refused: ")
    assert recorder.add(make_frame(2, action=np.full(2, np.nan, np.float32)))
    assert recorder.add(make_frame(3, stamps={"front": np.float64(1), "wrist": 2.0}))
    recorder.close()
    frames = list(Journal.open(journals(recorder.session)[0]).frames())
    assert [(frame.step, frame.lost) for frame in frames] == [(2, len(wrong)), (3, 0)]


def test_notes_of_any_kind_are_kept(recorder: Recorder) -> None:
    recorder.begin("\ud800" + "x" * 5000, path=Path("/a"), big=2**80)
    recorder.end({"huge": "x" * 10**6})
    recorder.close()
    journal = Journal.open(journals(recorder.session)[0])
    assert journal.header.task.startswith("\\ud800xxx")
    assert journal.end is not None
    assert "unreadable" in journal.header.meta
    assert "unreadable" in journal.end.outcome
    assert plain({"path": Path("/a"), "x": np.arange(2)}) == {"path": repr(Path("/a")), "x": [0, 1]}


def test_no_place_to_record(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match=r"got: .*expected: .*remedy"):
        Recorder(tmp_path / "file" / "session", FEATURES, JOINTS, "toy")


def test_a_killed_recorder_costs_the_rest_and_nothing_else(recorder: Recorder) -> None:
    recorder.begin("x")
    frames = [make_frame(i) for i in range(5)]
    for frame in frames:
        recorder.add(frame)
    wait_for(lambda: recorder.written == 5)
    recorder._process.kill()
    recorder._process.wait()
    assert recorder.state == "dead (exit code -9, 0 lost, 5 written)"
    for i in range(5, 300):
        assert not recorder.add(make_frame(i))
    recorder.end({})
    assert recorder.state == "dead (exit code -9, 295 lost, 5 written)"
    recorder.close()
    assert recorder.state.startswith("dead")
    journal = Journal.open(journals(recorder.session)[0])
    assert journal.end is None
    for got, expected in zip(journal.frames(), frames, strict=True):
        assert_same(got, expected)


def test_frames_that_die_unseen_with_the_recorder_are_counted(recorder: Recorder) -> None:
    recorder.begin("x")
    recorder.add(make_frame(0))
    wait_for(lambda: recorder.written == 1)
    recorder._process.send_signal(signal.SIGSTOP)
    assert [recorder.add(make_frame(i)) for i in range(1, 4)] == [True] * 3
    recorder._process.kill()
    recorder._process.wait()
    assert recorder.state == "dead (exit code -9, 3 lost, 1 written)"


@pytest.mark.parametrize("both", [False, True])
def test_a_killed_controller_costs_nothing_that_was_flushed(tmp_path: Path, both: bool) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_journal import *
recorder = Recorder({str(tmp_path)!r}, FEATURES, JOINTS, "toy")
recorder.begin("x")
for i in range(20):
    recorder.add(make_frame(i))
while recorder.written < 20: time.sleep(0.01)
print(recorder._process.pid, flush=True)
if not {both}:  # what the recorder has not seen yet
    for i in range(20, 40): recorder.add(make_frame(i))
    print("added", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout as lines:
        child = int(lines.readline())
        if not both:
            lines.readline()
        process.kill()
        if both:
            os.kill(child, signal.SIGKILL)
    wait_for(lambda: not running(child))
    journal = Journal.open(journals(tmp_path)[0])
    assert (journal.end, journal.ignored) == (None, 0)
    read = list(journal.frames())
    assert len(read) == (20 if both else 40)
    for number, frame in enumerate(read):
        assert_same(frame, make_frame(number))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stopped_recorder_delays_nothing_and_goes_on(tmp_path: Path) -> None:
    features = Features({"front": (64, 64)}, 3, 2, 10)
    frame = make_frame(0, features)
    with Recorder(tmp_path, features, JOINTS, "toy") as recorder:
        recorder.begin("x")
        recorder.add(frame)
        wait_for(lambda: recorder.written == 1)
        recorder._process.send_signal(signal.SIGSTOP)
        taken, costs = 0, []
        for i in range(1, 401):
            frame.step = i
            start = time.perf_counter()
            taken += recorder.add(frame)
            costs.append(time.perf_counter() - start)
        assert statistics.median(costs) < 1e-3
        assert 5 * features.fps <= taken < 200
        assert recorder.dropped == 400 - taken
        assert recorder.state == f"slow ({400 - taken} dropped)"
        recorder.end({"first": True})  # no room for it now, and yet it must not be forgotten
        recorder.begin("y")
        recorder._process.send_signal(signal.SIGCONT)
        wait_for(lambda: recorder.written == 1 + taken)
        assert recorder.add(replace(frame, step=401))
        wait_for(lambda: recorder.written == 2 + taken)
        assert recorder.state == f"ok ({400 - taken} lost)"
    first, second = map(Journal.open, journals(tmp_path))
    assert [f.step for f in first.frames()] == list(range(1 + taken))
    assert first.end is not None
    assert (first.end.outcome, first.end.lost) == ({"first": True}, 400 - taken)
    assert [(f.step, f.lost) for f in second.frames()] == [(401, 0)]


def test_a_gap_is_marked_where_it_was(tmp_path: Path) -> None:
    features = Features({"front": (64, 64)}, 3, 2, 10)
    with Recorder(tmp_path, features, JOINTS, "toy") as recorder:
        recorder.begin("x")
        recorder._process.send_signal(signal.SIGSTOP)
        taken = sum(recorder.add(make_frame(i, features)) for i in range(300))
        recorder._process.send_signal(signal.SIGCONT)
        wait_for(lambda: recorder.written == taken)
        recorder.add(make_frame(300, features))
    frames = list(Journal.open(journals(tmp_path)[0]).frames())
    assert [(f.step, f.lost) for f in frames[-2:]] == [(taken - 1, 0), (300, 300 - taken)]


def test_a_full_disk_is_said_and_survived(recorder: Recorder) -> None:
    """A limit on the size of files stands for it: what exceeds it is written in part, then refused."""
    pid, full = recorder._process.pid, "disk full"
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)

    def fill(size: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, unlimited[1]))

    def free() -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)

    recorder.begin("x")
    for i in range(3):
        recorder.add(make_frame(i))
    wait_for(lambda: recorder.written == 3)
    fill(episode_path(recorder.session, 0).stat().st_size + 100)
    for i in range(3, 8):
        assert recorder.add(make_frame(i))  # the loop is untouched
    wait_for(lambda: recorder.lost == 5)
    assert recorder.state == f"{full} (5 lost)"
    time.sleep(0.7)  # longer than a retry without a frame: nothing was written, nothing is well
    assert recorder.state == f"{full} (5 lost)"
    free()
    recorder.add(make_frame(8))
    wait_for(lambda: recorder.written == 4)
    assert recorder.state == "ok (5 lost)"
    fill(10)
    recorder.add(make_frame(9))
    recorder.end({"success": True})
    recorder.begin("y")  # its header must wait
    recorder.add(make_frame(10))
    wait_for(lambda: recorder.lost == 7)
    assert recorder.state == f"{full} (7 lost)"
    free()
    wait_for(lambda: recorder.state == "ok (7 lost)")
    recorder.add(make_frame(11))
    recorder.close()
    assert recorder.state == "closed (exit code 0, 7 lost, 5 written)"
    first, second = map(Journal.open, journals(recorder.session))
    assert first.ignored == second.ignored == 0
    assert [(f.step, f.lost) for f in first.frames()] == [(0, 0), (1, 0), (2, 0), (8, 5)]
    assert [(f.step, f.lost) for f in second.frames()] == [(11, 1)]
    for frame in first.frames():
        assert_same(replace(frame, lost=0), make_frame(frame.step))


def test_a_full_file_system_is_said_and_survived(tmp_path: Path) -> None:
    """The real thing, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, timeout=10).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not permitted here")
    ballast = disk / "ballast"

    def fill() -> None:
        with ballast.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    try:
        recorder = Recorder(disk / "session", big(FEATURES), JOINTS, "toy")
        recorder.begin("x")
        for i in range(2):
            recorder.add(make_frame(i, big(FEATURES)))
        wait_for(lambda: recorder.written == 2)
        fill()
        for i in range(2, 7):
            assert recorder.add(make_frame(i, big(FEATURES)))
        wait_for(lambda: recorder.lost == 5)
        assert recorder.state == "disk full (5 lost)"
        ballast.unlink()
        recorder.add(make_frame(7, big(FEATURES)))
        wait_for(lambda: recorder.written == 3)
        recorder.close()
        journal = Journal.open(journals(recorder.session)[0])
        assert [(f.step, f.lost) for f in journal.frames()] == [(0, 0), (1, 0), (7, 5)]
        assert journal.end is not None
    finally:
        gc.collect()  # maps of its files
        subprocess.run(["umount", str(disk)], check=True, timeout=10)


def big(features: Features) -> Features:
    """Frames larger than a block of the file system."""
    return replace(features, cameras=dict.fromkeys(features.cameras, (64, 64)))


def test_the_disk_is_synced_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[float] = []
    monkeypatch.setattr(os, "fdatasync", lambda _: synced.append(now))
    episode = Episode(tmp_path / "x.journal", make_header())
    start = time.monotonic()
    for i in range(30):
        now = start + i / 10
        step = to_step(make_frame(i))
        episode.write(step)
        assert Journal.open(tmp_path / "x.journal").ignored == 0  # the system has it at once
        episode.sync(now)
    assert len(synced) == 2
    assert min(b - a for a, b in pairwise(synced)) >= 1
    episode.close()
    assert len(synced) == 3


def test_the_controllers_side_needs_neither_torch_nor_lerobot() -> None:
    program = (
        "import sys, vla.control.recorder, vla.control.journalist;"
        "print({'torch', 'lerobot', 'av', 'PIL', 'yaml'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_what_a_failing_disk_tore_is_taken_back_before_the_next_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.journal"
    episode = Episode(path, make_header())
    episode.write(to_step(make_frame(0)))

    def tear(file: int, data: Any) -> int:
        os.pwrite(file, bytes(data[:5]), 0)  # to a file opened for appending: at its end
        raise OSError(5, "a broken disk")

    def refuse(*_: int) -> None:
        raise OSError(5, "a broken disk")

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", tear)
        broken.setattr(os, "ftruncate", refuse)
        with pytest.raises(OSError, match="broken"):
            episode.write(to_step(make_frame(1, lost=2)))
    assert Journal.open(path).ignored == 5
    episode.write(to_step(make_frame(2, lost=4)))
    episode.end(End(9.0, {}))
    episode.close()
    read = [message for _, message in records(path.read_bytes())]
    assert [type(message) for message in read] == [Header, Step, Step, End]
    assert [message.lost for message in read if isinstance(message, Step)] == [0, 2 + 1 + 4]
    assert Journal.open(path).ignored == 0
