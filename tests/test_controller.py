"""The controller's states under every fault that can be played to it, in the test's own time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_link import CHUNK, FakeLink, PlaneArm, Reply
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.checks import ConfigError
from vla.control.config import SCHEDULES, LimitsConfig, LoopConfig
from vla.control.controller import Controller
from vla.control.robot import Reading
from vla.control.safety import Limits
from vla.control.states import Machine, State

LIMITS = LimitsConfig((-1.0, -1.0), (1.0, 1.0), (2.0, 2.0), (30.0, 30.0), (3000.0, 3000.0))
INIT, READY, RUN, HOLD, STOPPED, FAULT = State


def towards(goal: float = 0.5) -> Callable[[dict[str, Any]], np.ndarray]:
    """A policy that walks both joints from where they are to a goal, 2 cm a step; another task, the other way."""

    def policy(question: dict[str, Any]) -> np.ndarray:
        at = question["prefix"][-1] if len(question["prefix"]) else question["state"][-1]
        way = (goal if question["task"] == "go" else -goal) - at
        n = np.arange(1, CHUNK + 1 - len(question["prefix"]))[:, None]
        steps = at + np.sign(way) * np.minimum(0.02 * n, np.abs(way))
        return np.concatenate([question["prefix"].reshape(-1, 2), steps])

    return policy


class Bench:
    """A controller, an arm and a policy, in virtual time."""

    def __init__(
        self, policy: Any = None, delay: float = 0.0, robot: PlaneArm | None = None, **config: Any
    ) -> None:
        self.arm, self.link = robot or PlaneArm(), FakeLink(policy or towards(), delay)
        self.controller = Controller(
            self.arm, Limits(LIMITS, self.arm.position), LoopConfig(**config), self.link
        )
        self.now = 100.0
        self.look: Callable[[], Reading | None] = lambda: self.arm.look(self.now)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * 100)):
            self.now += 0.01
            self.link.now = self.now
            command = self.controller.tick(self.now, self.look())
            if command is not None:
                self.arm.send(command)

    def start(self, seconds: float = 1.0) -> Bench:
        self.controller.instruct("go")
        self.run(seconds)
        assert self.state is RUN, self.controller.machine.events
        return self

    @property
    def state(self) -> State:
        return self.controller.state

    @property
    def path(self) -> list[State]:
        return [event.after for event in self.controller.machine.events]

    def held_after(self, start: float) -> float:
        """Seconds from `start` to the first HOLD, FAULT or STOPPED behind it."""
        return (
            min(e.time for e in self.controller.machine.events if e.time > start and e.after in (HOLD, FAULT))
            - start
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("delay", [0.0, 0.13])
def test_runs_to_the_goal(schedule: str, delay: float) -> None:
    bench = Bench(schedule=schedule, delay=delay).start()
    bench.run(6)
    assert bench.path == [READY, RUN]
    np.testing.assert_allclose(bench.arm.at, 0.5, atol=0.02)
    assert bench.controller.audit.illegal == 0


def test_nothing_is_commanded_before_there_is_a_reading_and_nothing_moves_before_an_instruction() -> None:
    bench = Bench()
    bench.look = lambda: None
    bench.run(0.5)
    assert bench.arm.sent == []
    assert bench.state is INIT
    bench.look = lambda: bench.arm.look(bench.now)
    bench.run(1)
    assert bench.state is READY
    assert np.ptp(bench.arm.sent, axis=0).max() == 0


def test_a_new_instruction_is_followed_within_one_replan() -> None:
    bench = Bench(delay=0.1).start()
    before = bench.arm.at.copy()
    bench.controller.instruct("come back")
    bench.run(0.35)  # one step to ask, one to answer, what was committed
    turned = bench.arm.at.copy()
    bench.run(0.5)
    assert (before > 0).all()
    assert (bench.arm.at < turned).all()
    assert bench.state is RUN
    assert bench.link.asked[-1]["task"] == "come back"


def test_no_instruction_holds() -> None:
    bench = Bench().start()
    bench.controller.instruct("")
    bench.run(0.2)
    assert bench.state is HOLD
    assert "no instruction" in bench.controller.machine.reason


def test_operator_stops_and_resumes() -> None:
    bench = Bench().start()
    bench.controller.stop(bench.now)
    bench.run(0.5)
    rest = bench.arm.at.copy()
    bench.run(2)
    assert bench.state is STOPPED
    np.testing.assert_array_equal(bench.arm.at, rest)
    asked = len(bench.link.asked)
    bench.controller.resume(bench.now)
    bench.run(1)
    assert bench.path[-3:] == [STOPPED, HOLD, RUN]
    assert bench.link.asked[asked]["captured_ns"] > 1e9 * (bench.now - 1.05)  # a fresh observation


def test_a_reset_while_the_arm_brakes_waits_for_its_rest() -> None:
    bench = Bench().start()
    bench.controller.fail(bench.now, "test")
    moving = bench.arm.at.copy()
    bench.run(0.01)
    bench.controller.reset(bench.now)
    assert bench.state is FAULT
    bench.run(0.3)
    assert bench.path[-2:] == [FAULT, HOLD] or bench.path[-3:] == [FAULT, HOLD, RUN]
    assert (bench.arm.at > moving).all()
    sent = np.array(bench.arm.sent)
    assert np.abs(np.diff(sent, n=2, axis=0)).max() <= 30.0 * 0.01**2 * 1.001
    assert np.abs(np.diff(sent, n=3, axis=0)).max() <= 3000.0 * 0.01**3 * 1.001
    bench.controller.fail(bench.now, "again")  # the last reset does not count for this
    bench.run(0.5)
    assert bench.state is FAULT


def test_reset_and_resume_each_leave_their_own_state_only() -> None:
    bench = Bench().start()
    bench.controller.reset(bench.now)
    assert bench.state is RUN
    bench.controller.stop(bench.now)
    bench.controller.reset(bench.now)
    assert bench.state is STOPPED


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_an_answer_that_is_refused_lets_the_chunk_go_on(number: float) -> None:
    bench = Bench().start()
    bench.link.answer = lambda question: Reply(
        "refused", question["seq"], None, "numbers that are not finite"
    )
    moved = bench.arm.at.copy()
    bench.run(0.2)
    assert (bench.arm.at > moved).all()
    bench.run(1)
    assert bench.state is FAULT
    assert "3 chunks in a row" in bench.controller.machine.reason
    bench.controller.resume(bench.now)  # FAULT is left by reset alone
    assert bench.state is FAULT
    del bench.link.answer
    bench.controller.reset(bench.now)
    bench.run(1)
    assert bench.path[-2:] == [HOLD, RUN]


def stale(bench: Bench) -> None:
    old = bench.arm.look(bench.now)
    bench.look = lambda: old


def stale_camera(bench: Bench) -> None:
    seen = bench.now
    bench.look = lambda: dataclasses.replace(bench.arm.look(bench.now), stamps={"front": seen})


def frozen_camera(bench: Bench) -> None:
    bench.arm.moving_picture = False


def silent(bench: Bench) -> None:
    bench.link.silent_since = bench.now
    bench.link.delay = 1e9


def gone(bench: Bench) -> None:
    bench.link.connected = False
    bench.link.under_way.clear()


def broken_sensor(bench: Bench) -> None:
    def look() -> Reading:
        reading = bench.arm.look(bench.now)
        return dataclasses.replace(reading, joints=np.array([np.nan, 0]))

    bench.look = look


CAUSES = [stale, stale_camera, frozen_camera, silent, gone, broken_sensor]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.__name__)
def test_holds_in_time_and_goes_on_with_a_fresh_observation(
    cause: Callable[[Bench], None], schedule: str
) -> None:
    bench = Bench(schedule=schedule).start()
    broken = bench.now
    cause(bench)
    bench.run(1)
    assert bench.state is HOLD
    assert bench.held_after(broken) <= 0.25
    rest = bench.arm.at.copy()
    bench.run(1)
    np.testing.assert_array_equal(bench.arm.at, rest)  # keeps its position
    mended, asked = bench.now, len(bench.link.asked)
    bench.look = lambda: bench.arm.look(bench.now)
    bench.arm.moving_picture, bench.link.connected = True, True
    bench.link.silent_since, bench.link.delay = float("inf"), 0.0
    bench.run(1)
    assert bench.path[-2:] == [HOLD, RUN]
    assert bench.link.asked[asked]["captured_ns"] >= 1e9 * mended
    assert bench.controller.audit.illegal == 0


def test_a_still_picture_of_an_arm_at_rest_is_no_frozen_camera() -> None:
    bench = Bench(lambda question: np.zeros((CHUNK, 2))).start()
    bench.arm.moving_picture = False
    bench.run(2)
    assert bench.state is RUN


def test_an_answer_from_before_the_hold_does_not_start_the_arm() -> None:
    bench = Bench().start()
    bench.link.delay = 0.4
    bench.run(0.5)  # a question is under way
    bench.look = lambda: dataclasses.replace(bench.arm.look(bench.now), stamp=0.0)
    bench.run(0.02)
    assert bench.state is HOLD
    bench.look = lambda: bench.arm.look(bench.now)
    question = len(bench.link.asked)
    bench.run(0.3)
    assert bench.state is HOLD
    bench.run(0.4)
    assert bench.state is RUN
    assert len(bench.link.asked) > question


def test_late_duplicate_and_reordered_answers_are_dropped() -> None:
    """Every answer comes three times: as the one before, as it should, and once more."""
    bench, answers = Bench(), []

    def poll() -> list[Any]:
        new = FakeLink.poll(bench.link)
        answers.extend(new)
        return [*answers[-3:-1], *new, *new] if new else []

    bench.link.poll = poll  # type: ignore[method-assign]
    bench.start(4)
    bench.run(2)
    assert bench.path == [READY, RUN]
    np.testing.assert_allclose(bench.arm.at, 0.5, atol=0.02)


def test_delay_beyond_the_trained_prefix_holds_and_goes_on() -> None:
    bench = Bench(delay=0.75)
    bench.controller.instruct("go")
    bench.run(25)
    assert {RUN, HOLD} == set(bench.path[1:])
    assert bench.controller.audit.illegal == 0
    np.testing.assert_allclose(bench.arm.at, 0.5, atol=0.02)  # stop and go, and it arrives all the same


def test_targets_beyond_the_limits_are_cut_and_in_the_end_a_fault() -> None:
    bench = Bench(lambda question: np.full((CHUNK, 2), 5.0)).start()
    bench.run(3)
    assert bench.state is FAULT
    assert "beyond the limits" in bench.controller.machine.reason
    assert np.max(bench.arm.sent) <= 1.0


def test_an_arm_that_does_not_follow_is_a_fault() -> None:
    bench = Bench(towards(0.9), following=0.1).start()
    bench.arm.send = lambda command: None  # type: ignore[method-assign]
    bench.run(2)
    assert bench.state is FAULT
    assert "does not follow" in bench.controller.machine.reason


def test_another_policy_behind_the_same_address_is_a_fault() -> None:
    bench = Bench().start()
    bench.link.changed = True
    bench.run(0.1)
    assert bench.state is FAULT


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"state_dim": 3}, "state_dim"), ({"fps": 5}, "fps"), ({"cameras": {"wrist": (4, 4)}}, "cameras")],
)
def test_a_policy_for_another_robot_is_a_fault(wrong: dict[str, Any], named: str) -> None:
    bench = Bench()
    assert bench.link.hello is not None
    bench.link.hello = type(bench.link.hello)(
        **{f: getattr(bench.link.hello, f) for f in bench.link.hello.__struct_fields__} | wrong
    )
    bench.run(0.1)
    assert bench.state is FAULT
    assert named in bench.controller.machine.reason
    assert "expected" in bench.controller.machine.reason


def test_an_arm_that_stands_outside_of_its_limits_is_not_commanded() -> None:
    bench = Bench()
    bench.arm.at = np.array([1.5, 0.0])
    bench.controller.instruct("go")
    bench.run(0.5)
    assert bench.state is FAULT
    assert bench.arm.sent == []
    bench.arm.at = np.zeros(2)
    bench.controller.reset(bench.now)
    bench.run(1)
    assert bench.state is RUN


def test_an_operator_drives_and_hands_back() -> None:
    bench = Bench().start()
    for _ in range(10):
        bench.controller.intervene(np.array([-0.3, 0.3]), bench.now)
        bench.run(0.1)
        assert bench.controller.step is None or bench.controller.step.intervention
    np.testing.assert_allclose(bench.arm.at, [-0.3, 0.3], atol=0.01)
    bench.run(2)
    assert bench.state is RUN
    assert (bench.arm.at > [-0.2, 0.3]).all()  # the policy goes on from there


def test_an_operator_can_drive_without_a_server_but_not_without_sensors() -> None:
    bench = Bench().start()
    gone(bench)
    bench.run(0.3)
    assert bench.state is HOLD
    bench.controller.intervene(np.array([0.3, 0.0]), bench.now)
    bench.run(0.1)
    assert bench.state is RUN
    bench.run(1)
    assert bench.state is HOLD
    stale(bench)
    bench.run(0.5)
    bench.controller.intervene(np.array([-0.3, 0.0]), bench.now)
    bench.run(0.2)
    assert bench.state is HOLD


@pytest.mark.parametrize("action", [np.array([np.nan, 0.0]), np.zeros(3), np.array([np.inf, 0.0])])
def test_an_operator_cannot_send_nonsense(action: np.ndarray) -> None:
    bench = Bench().start()
    bench.controller.intervene(action, bench.now)
    assert bench.controller.operator is None


def test_deadman() -> None:
    for deadman, expected in (("continue", RUN), ("hold", HOLD)):
        bench = Bench(deadman=deadman)
        bench.controller.console_heard = bench.now
        bench.controller.instruct("go")
        bench.run(0.15)
        assert bench.state is RUN
        bench.run(0.5)
        assert bench.state is expected
        bench.controller.console_heard = bench.now
        bench.run(0.15)
        assert bench.state is RUN


def test_a_restart_begins_anew_from_the_new_pose() -> None:
    bench = Bench().start()
    bench.controller.restart(bench.now)
    bench.arm.at = np.array([-0.5, -0.5])
    sent = len(bench.arm.sent)
    bench.run(0.1)
    assert bench.state is HOLD
    np.testing.assert_allclose(bench.arm.sent[sent], -0.5)
    bench.controller.instruct("go")
    bench.run(1)
    assert bench.link.asked[-1]["episode"] == 1
    assert bench.controller.audit.illegal == 0


def test_latency_and_steps_are_told() -> None:
    bench = Bench(delay=0.05)
    bench.controller.instruct("go")
    captured, steps = [], []
    for _ in range(200):
        bench.run(0.01)
        if bench.controller.captured is not None:
            captured.append(bench.now - bench.controller.captured)
        if bench.controller.step is not None:
            steps.append(bench.controller.step)
    assert len(captured) >= 3
    assert min(captured) >= 0.05
    assert 15 <= len(steps) <= 20
    assert steps[-1].task == "go"


def test_a_loop_that_does_not_divide_into_policy_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loop\.rate: got 95, expected a multiple of the 10"):
        Bench(rate=95)


def test_transitions_outside_the_table_are_mistakes() -> None:
    with pytest.raises(RuntimeError, match="cannot go from INIT to RUN"):
        Machine().go(RUN, "", 0.0, 0)


def test_a_stop_wins_over_a_reset() -> None:
    """In FAULT it makes the reset lead to STOPPED; after a reset, while the arm brakes, too."""
    for early in (True, False):
        bench = Bench().start()
        bench.controller.fail(bench.now, "test")
        if early:
            bench.controller.stop(bench.now)
        bench.controller.reset(bench.now)
        if not early:
            assert not bench.controller.limiter.at_rest
            bench.controller.stop(bench.now)
            bench.run(1)
            assert bench.state is FAULT
            bench.controller.reset(bench.now)
        bench.run(1)
        assert bench.state is STOPPED
        bench.controller.resume(bench.now)
        bench.run(1)
        assert bench.state is RUN


def test_a_second_fault_while_resetting_is_not_lost() -> None:
    bench = Bench().start()
    bench.controller.fail(bench.now, "first")
    bench.controller.reset(bench.now)
    bench.controller.fail(bench.now, "second")
    bench.run(1)
    assert bench.state is FAULT
    assert bench.controller.machine.reason == "second"


@pytest.mark.parametrize("wrong", ["raises", "nan", "size", "stamp"])
def test_a_robot_class_that_fails_is_a_fault_and_the_arm_brakes(wrong: str) -> None:
    bench = Bench().start()

    def target(action: np.ndarray, target: np.ndarray, reading: Reading) -> np.ndarray:
        if wrong == "raises":
            raise ZeroDivisionError("the robot's own mistake")
        return np.full(2, np.nan) if wrong == "nan" else np.zeros(3)

    if wrong == "stamp":
        bench.look = lambda: dataclasses.replace(bench.arm.look(bench.now), images={})
    else:
        bench.arm.target = target  # type: ignore[method-assign]
    bench.run(1)
    assert bench.state is FAULT
    assert bench.controller.limiter.at_rest
    assert bench.controller.audit.illegal == 0


def test_a_command_that_the_audit_finds_illegal_is_withheld() -> None:
    bench = Bench().start()
    bench.controller.limiter.step = lambda *_: bench.arm.at + 0.3  # type: ignore[method-assign]
    sent = len(bench.arm.sent)
    bench.run(0.5)
    assert len(bench.arm.sent) == sent
    assert bench.state is FAULT
    assert bench.controller.audit.illegal > 0


@pytest.mark.parametrize("leave", ["resume", "reset"])
def test_leaving_a_latched_state_takes_the_pose_of_a_later_reading(leave: str) -> None:
    """Somebody has pushed the arm; what was measured before must not become the command."""
    bench = Bench().start()
    (bench.controller.stop if leave == "resume" else bench.controller.fail)(bench.now, "test")
    bench.run(1)
    before = bench.arm.look(bench.now)
    bench.arm.send = bench.arm.sent.append  # type: ignore[method-assign]
    bench.arm.at = np.array([-0.2, 0.2])
    bench.look = lambda: before
    getattr(bench.controller, leave)(bench.now)
    sent = len(bench.arm.sent)
    bench.run(0.1)
    assert len(bench.arm.sent) == sent
    bench.look = lambda: bench.arm.look(bench.now)
    bench.run(0.02)
    np.testing.assert_allclose(bench.arm.sent[sent], [-0.2, 0.2])


@pytest.mark.parametrize("camera", [False, True], ids=["reading", "camera"])
@pytest.mark.parametrize("ahead", [3600.0, np.nan])
def test_stamps_from_the_future_or_none_hold(ahead: float, camera: bool) -> None:
    bench = Bench().start()
    stamp = bench.now + ahead
    seen: dict[str, Any] = {"stamps": {"front": stamp}} if camera else {"stamp": stamp}
    bench.look = lambda: dataclasses.replace(bench.arm.look(bench.now), **seen)
    bench.run(0.1)
    assert bench.state is HOLD


def test_a_pause_of_the_controller_holds() -> None:
    bench = Bench().start()
    bench.now += 1.0
    bench.run(0.01)
    assert bench.state is HOLD
    assert "stood still" in bench.controller.machine.events[-1].reason


def test_interventions_do_not_outlive_a_stop_or_a_scene() -> None:
    bench = Bench().start()
    bench.controller.stop(bench.now)
    bench.controller.intervene(np.array([0.9, 0.9]), bench.now)
    assert bench.controller.operator is None
    bench = Bench().start()
    bench.controller.intervene(np.array([0.9, 0.9]), bench.now)
    bench.controller.restart(bench.now)
    assert bench.controller.operator is None


def test_a_target_without_a_safe_way_is_a_fault_in_the_end() -> None:
    bench = Bench(towards(0.9)).start()
    bench.controller.limiter._way_out = lambda motion: None  # type: ignore[method-assign]
    bench.run(2)
    assert bench.state is FAULT
    assert "no safe way" in bench.controller.machine.reason


def test_being_cut_once_before_a_hold_is_not_being_cut_for_long() -> None:
    bench = Bench().start()
    bench.controller.clamped_since = bench.now
    stale(bench)
    bench.run(3)
    assert bench.state is HOLD
    bench.look = lambda: bench.arm.look(bench.now)
    bench.run(0.5)
    assert bench.controller.clamped_since == 0.0


def test_an_instruction_that_the_wire_would_refuse_holds() -> None:
    bench = Bench().start()
    bench.controller.instruct("go " * 1000)
    bench.run(0.5)
    assert bench.state is HOLD


any_number = st.floats(allow_nan=True, allow_infinity=True, width=32) | st.floats(-1.25, 1.25, width=32)
pair = st.tuples(any_number, any_number).map(np.array)
deed = st.one_of(
    st.tuples(st.just("chunk"), pair),
    st.tuples(st.just("joints"), pair),
    st.tuples(st.just("intervene"), pair),
    st.tuples(
        st.sampled_from(["none", "stale", "frozen", "lost", "refused", "wrong", "silent", "gone", "changed"])
    ),
    st.tuples(st.sampled_from(["stop", "resume", "reset", "restart", "instruct", "mend", "jump"])),
)


@given(deeds=st.lists(st.tuples(deed, st.integers(1, 25)), max_size=40), schedule=st.sampled_from(SCHEDULES))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_every_command_is_legal(deeds: list, schedule: str) -> None:
    """Any answers, sensors, orders and faults in any order: commands stay legal, states stay in the table."""
    bench = Bench(schedule=schedule, following=10.0)
    bench.controller.instruct("go")
    for (what, *value), ticks in deeds:
        if what == "chunk":
            bench.link.policy = lambda question, value=value[0]: np.tile(value, (CHUNK, 1))
        elif what == "joints":
            bench.look = lambda value=value[0]: dataclasses.replace(bench.arm.look(bench.now), joints=value)
        elif what == "intervene":
            bench.controller.intervene(value[0], bench.now)
        elif what in ("stop", "resume", "reset", "restart"):
            getattr(bench.controller, what)(bench.now)
        elif what == "instruct":
            bench.controller.instruct("go" if bench.controller.task != "go" else "stay")
        elif what == "none":
            bench.look = lambda: None
        elif what == "stale":
            stale(bench)
        elif what == "frozen":
            frozen_camera(bench)
        elif what in ("lost", "refused"):
            bench.link.answer = lambda question, kind=what: Reply(kind, question["seq"])
        elif what == "wrong":
            bench.link.answer = lambda question: Reply("chunk", question["seq"] + 1, np.zeros((CHUNK, 2)))
        elif what == "silent":
            silent(bench)
        elif what == "gone":
            gone(bench)
        elif what == "changed":
            bench.link.changed = True
        elif what == "jump":
            bench.now += 3600
        else:
            bench.look = lambda: bench.arm.look(bench.now)
            bench.link.connected, bench.link.changed = True, False
            bench.link.silent_since, bench.link.delay = float("inf"), 0.0
            bench.link.__dict__.pop("answer", None)
        before = len(bench.arm.sent)
        bench.run(ticks / 100)
        assert np.isfinite(bench.arm.sent[before:]).all()
    assert bench.controller.audit.illegal == 0
