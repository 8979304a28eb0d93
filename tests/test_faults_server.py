"""Faults of the policy and of its server, against real processes: judged from the robot's side."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from controlled import PATIENCE_S, Controlled, WalkingServer, controlled, illegal
from fault_robot import record
from faults import REPETITIONS
from proxy import Proxy

from vla.control.console import Instruct, Reset
from vla.serve.__main__ import main

IN_TIME_MS = 250


class Place:
    """An address, and the server that is there now."""

    def __init__(self) -> None:
        self.server = WalkingServer("--port=0", name="walk")
        self.url = self.server.url

    def replace(self, name: str = "walk") -> None:
        """Kill the one that is there (if it is alive) and start another."""
        self.server.end(signal.SIGKILL)
        self.server = WalkingServer(f"--port={self.url.rpartition(':')[2]}", name=name)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place()
    try:
        yield place
    finally:
        place.server.end()


@pytest.fixture(scope="module")
def shared(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controlled]:
    with controlled(tmp_path_factory.mktemp("server"), place.url) as shared:
        yield shared


@pytest.fixture
def control(shared: Controlled) -> Iterator[Controlled]:
    """The module's controller, running; judged after every test."""
    shared.run()
    yield shared
    assert shared.legal() > 100
    assert shared.fresh().counts["illegal"] == 0


@pytest.fixture(scope="module")
def times(request: pytest.FixtureRequest) -> range:
    return range(REPETITIONS if request.config.getoption("--faults") else 1)


# --- what the policy says ---


def some_slow(*kinds: str, fast: int) -> list[Any]:
    return [pytest.param(kind, marks=[pytest.mark.slow] * (i >= fast)) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    "kind", some_slow("nan", "wire-inf", "wire-shape", "inf", "shape", "wire-nan", "wire-model", fast=3)
)
def test_a_wrong_chunk_is_refused_whole_and_the_current_one_goes_on(control: Controlled, kind: str) -> None:
    before = control.fresh().counts["refused_answers"]
    since = control.order(Instruct(f"{kind} 2"))
    control.wait(lambda status: status.counts["refused_answers"] == before + 2, "two refusals")
    control.still(0.3, since)
    assert control.fresh().state == "RUN"
    assert control.fresh().counts["refused_answers"] == before + 2
    assert control.moved(since) > 0.05


@pytest.mark.parametrize(
    "kind", some_slow("shape 99", "wire-nan 99", "nan 99", "wire-inf 99", "raise", fast=2)
)
def test_three_wrong_chunks_in_a_row_are_a_fault(control: Controlled, kind: str, times: range) -> None:
    for _ in times:
        control.run()
        since = control.order(Instruct(kind))
        event = control.timed(
            f"three refused chunks in a row ({kind.partition(' ')[0]})", "FAULT", 400, since
        )
        assert event[4].startswith("3 chunks in a row were refused: ")
        control.wait(lambda status: status.state == "FAULT")
    moved = time.monotonic() + 0.2
    control.still(0.5, moved)  # it latches
    assert control.moved(moved) == 0
    since = control.order(Instruct("swing"))
    control.order(Reset())
    control.event("RUN", since)
    assert [e[3] for e in control.events if e[0] >= since] == ["HOLD", "RUN"]


def test_a_reset_while_the_arm_still_brakes_is_legal(control: Controlled) -> None:
    """The operator's patience is no condition."""
    since = control.order(Instruct("nan 98"))
    while not any(e[0] >= since and e[3] == "FAULT" for e in control.events):
        for _ in range(10):
            control.order(Reset())
            time.sleep(0.001)
        control.look(0.001)
    control.run()


def test_targets_beyond_the_limits_are_cut_and_counted_and_in_the_end_a_fault(
    control: Controlled, times: range
) -> None:
    for _ in times:
        control.run()
        before = control.fresh().counts["clamped"]
        since = control.order(Instruct("far"))
        event = control.timed("targets beyond the limits", "FAULT", 1500, since)
        assert event[4].startswith("targets beyond the limits")
        assert event[0] - since > 1.0  # not a moment sooner
        assert control.fresh().counts["clamped"] > before + 50


def test_a_policy_that_takes_longer_than_the_trained_prefix_holds_and_goes_on(control: Controlled) -> None:
    since = control.order(Instruct("sleep 0.7"))
    hold = control.event("HOLD", since)
    assert "slower than its chunks" in hold[4]
    control.event("RUN", hold[0])
    control.run()
    control.still(0.5, time.monotonic())
    assert {e[3] for e in control.events if e[0] >= since} == {"HOLD", "RUN"}


# --- the server's process ---


def test_a_killed_server_holds_and_its_successor_goes_on(
    control: Controlled, place: Place, times: range
) -> None:
    for _ in times:
        control.run()
        since = time.monotonic()
        place.server.send(signal.SIGKILL)
        hold = control.timed("server killed (SIGKILL)", "HOLD", IN_TIME_MS, since)
        assert hold[4].startswith("no connection to the policy server: ")
        control.still(0.3, hold[0] + 1e-6)
        began = time.monotonic()
        place.replace()
        run = control.event("RUN", hold[0] + 1e-6)
        assert run[0] > began
        rows = control.commands()
        at_rest = rows["command"][(rows["time"] > hold[0] + 0.2) & (rows["time"] < run[0])]
        assert len(at_rest) > 10
        assert (at_rest == at_rest[0]).all()


@pytest.mark.parametrize("seconds", [1.0, pytest.param(10.0, marks=pytest.mark.slow)])
def test_a_stopped_server_holds_and_goes_on(
    control: Controlled, place: Place, times: range, seconds: float
) -> None:
    for _ in times[: 5 if seconds < 5 else 2]:
        control.run()
        since = time.monotonic()
        place.server.send(signal.SIGSTOP)
        try:
            hold = control.timed(f"server stopped for {seconds:g} s (SIGSTOP)", "HOLD", IN_TIME_MS, since)
            assert "silent policy server" in hold[4]
            time.sleep(max(0.0, since + seconds - time.monotonic()))
        finally:
            resumed = time.monotonic()
            place.server.send(signal.SIGCONT)
        control.event("RUN", resumed)
        assert not [e for e in control.events if hold[0] < e[0] < resumed]


def test_another_policy_behind_the_same_address_is_a_fault(
    control: Controlled, place: Place, times: range
) -> None:
    for i in times:
        control.run()
        place.server.end(signal.SIGKILL)
        since = time.monotonic()
        place.replace(f"another {i}")  # which takes a while
        event = control.event("FAULT", since)
        assert event[4] == "the policy server came back with another policy"
        moved = time.monotonic()
        control.order(Reset())
        control.wait(lambda status, moved=moved: status.time > moved and status.state == "FAULT")
        assert control.moved(moved) == 0  # no reset helps
        place.replace()


# --- the network ---


@pytest.mark.slow
def test_a_bad_network_holds_or_runs_and_never_more(place: Place, tmp_path: Path) -> None:
    with Proxy(place.url) as proxy, controlled(tmp_path, proxy.url) as control:
        control.run()
        late = control.fresh().counts["late_answers"]
        proxy.asks, proxy.delay_s = True, 0.03
        proxy.drop, proxy.duplicate, proxy.reorder = 0.1, 0.4, 0.4
        watch(control, 2.0)
        proxy.drop = proxy.duplicate = proxy.reorder = 0.0
        proxy.flip = 0.1
        watch(control, 2.0)
        assert min(proxy.counts[name] for name in ("drop", "duplicate", "reorder", "flip", "passed")) > 0
        proxy.flip, proxy.delay_s = 0.0, 0.6  # beyond the trained prefix, while the beats come
        control.run()
        since = time.monotonic()
        watch(control, 1.5)
        control.event("HOLD", since)
        proxy.delay_s = 0.0
        control.run()
        control.still(0.5, time.monotonic())
        assert control.fresh().counts["late_answers"] >= late
        assert control.end()["counts"]["illegal"] == 0


def watch(control: Controlled, seconds: float) -> None:
    """Whatever comes, RUN and HOLD are all there is, but for three refusals in a row, which a reset ends."""
    since = time.monotonic()
    while time.monotonic() < since + seconds:
        control.look()
        if control.status is not None and control.status.state == "FAULT":
            control.order(Reset())
    control.fresh()
    for event in control.events:
        assert event[3] in ("READY", "RUN", "HOLD") or "in a row were refused" in event[4], event


# --- what is on the disk ---


@pytest.mark.slow
def test_an_export_with_one_flipped_bit_is_refused_by_server_and_controller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from toy_export import hand_made

    folder = hand_made(tmp_path / "export")
    kwargs = {"n": 2, "cameras": ["front"]}
    with controlled(tmp_path / "good", checkpoint=str(folder), kwargs=kwargs) as control:  # it is good
        control.wait(lambda status: status.state == "READY")
        control.end()
    flip_a_bit(folder / "policy.onnx")
    refused(folder, "policy.onnx", capsys)
    refused_by_controller(folder, tmp_path / "bad", kwargs)


@pytest.mark.slow
def test_a_checkpoint_with_one_flipped_bit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from toy_run import toy_job, toy_store

    from vla.training import checkpoint
    from vla.training.loop import train

    train(toy_job(tmp_path / "run", steps=1, save_every=1), toy_store())
    folder = checkpoint.find(tmp_path / "run")
    capsys.readouterr()
    for file in sorted(
        path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".yaml")
    ):
        damaged = tmp_path / f"damaged {file}"
        shutil.copytree(folder, damaged)
        flip_a_bit(damaged / file)
        refused(damaged, "", capsys)
    refused_by_controller(damaged, tmp_path / "bad", {"n": 2, "cameras": ["front"]})


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def refused(folder: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that a server refuses this folder, in one line that has the word.

    In this process: how a command of its own ends is what test_serve.py and the controller below see.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main([str(folder), "--port=0", "--device=cpu", "--threads=1"]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.startswith("serve: ")
    assert said.count("\n") == 1
    assert word in said


def refused_by_controller(folder: Path, output: Path, kwargs: dict[str, Any]) -> None:
    control = Controlled(output, checkpoint=str(folder), kwargs=kwargs)
    try:
        assert control.process.wait(4 * PATIENCE_S) == 1
        last = control.said().splitlines()[-1]
        assert last.startswith(
            "control: policy server: got exit code 1, expected one that is ready. remedy: "
        )
        assert "Traceback" not in control.said()
        assert (control.commands()["number"] == 0).all()  # nothing was ever commanded
    finally:
        control.kill()


# --- the judge ---


def test_the_judge_can_condemn() -> None:
    """Steps in position, velocity and acceleration, each just below and just above a limit."""

    def rows(path: np.ndarray, first: int = 1) -> np.ndarray:
        rows = np.zeros(len(path) + 1, record(1))
        rows["command"][1:, 0], rows["number"][1:] = path, np.arange(first, first + len(path))
        return rows

    n = np.arange(1, 41)
    ramp = (
        1000 * np.minimum(n * (n + 1) * (n + 2) / 6, 1e9) / 100**3
    )  # of constant jerk: legal while it is slow
    assert illegal(rows(ramp[:2])) == []
    assert "jerk" in illegal(rows(1.01 * ramp[:2]))[0]
    assert "acceleration" in "".join(illegal(rows(ramp[:4])))
    still = rows(np.zeros(5))
    assert illegal(still) == []
    far = rows(np.zeros(5))
    far["command"][3] = np.nan
    assert "not finite" in illegal(far)[0]
    drift = rows(0.0101 * n)
    assert any("velocity" in line for line in illegal(drift))
    smooth = rows(0.5 * (1 - np.cos(n / 40)) / 10)
    assert illegal(smooth[np.r_[0:5, 9:15, 17:30]]) == []  # commands that the robot was too busy to see
