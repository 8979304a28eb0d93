"""Recording demonstrations: what is kept, which seeds, and that a kill costs nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from toy_env import ToyEnv
from toy_turns import TurnsEnv

from vla.config import ConfigError, EnvConfig, RecordConfig
from vla.data.demonstrate import demonstrate, make_environment, record_episode
from vla.data.frames import FrameStore
from vla.data.record import SUMMARY, Recording, alone, content, record_demonstrations
from vla.data.seeds import ATTEMPTS, attempt_seed, carries_noise, require_seeds, shard_episodes
from vla.observation import ACTION, ENVIRONMENT_STATE, STATE, TASK

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "scripts" / "record.py"
TOY = EnvConfig("toy_env:Toy-v0")
TURNS = EnvConfig("toy_turns:Turns-v0")


class StayAfterSuccess(ToyEnv):
    """Success does not end the episode."""

    def step(self, action: np.ndarray) -> Any:
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, False, truncated, info


class DieAtBirth(ToyEnv):
    """Takes its process with it, as a crash in a native library does."""

    def __init__(self, **kwargs: Any) -> None:
        print("the driver says something", file=sys.stderr, flush=True)
        os._exit(7)


class NoExpert(ToyEnv):
    expert_action = None  # type: ignore[assignment]


class Unbounded(ToyEnv):
    """Its actions have no limits."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


for _class in (DieAtBirth, NoExpert, Unbounded):
    if f"{_class.__name__}-v0" not in gym.registry:
        gym.register(f"{_class.__name__}-v0", entry_point=_class, max_episode_steps=30)


# Seeds and noise


def test_no_two_attempts_share_a_seed_and_none_is_an_evaluations() -> None:
    record = RecordConfig(episodes=500, seed=3)
    seeds = [attempt_seed(record, i, a) for i in range(500) for a in range(ATTEMPTS)]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**31
    assert [attempt_seed(record, i, 0) for i in range(500)] == list(range(3, 503))
    assert not any(1000 <= seed < 10**9 for seed in seeds)


@pytest.mark.parametrize("scenes", [1, 3])
@pytest.mark.parametrize("tasks", [3, 50])
def test_attempts_stay_with_their_task(tasks: int, scenes: int) -> None:
    record = RecordConfig(episodes=300, seed=7, instructions_per_scene=scenes)
    retries = [[attempt_seed(record, i, a, tasks) for a in range(1, ATTEMPTS)] for i in range(300)]
    for i, seeds in enumerate(retries):
        assert {seed % tasks for seed in seeds} == {attempt_seed(record, i, 0, tasks) % tasks}
    flat = [seed for seeds in retries for seed in seeds]
    assert len(set(flat)) == len(flat)
    assert min(flat) >= 2**30
    assert [attempt_seed(record, i, 0, tasks) for i in range(300)] == [7 + i // scenes for i in range(300)]


def test_seeds_leave_room_for_tasks_in_turns() -> None:
    highest = 2**25 // 50 - 2500
    record = RecordConfig(episodes=2500, seed=highest)
    require_seeds(record, 50)
    assert attempt_seed(record, 2499, ATTEMPTS - 1, 50) < 2**31
    for seed, tasks in ((highest + 1, 50), (2**25, 1)):
        with pytest.raises(ConfigError, match=rf"record\.seed: got {seed}.*episodes"):
            require_seeds(RecordConfig(episodes=2500, seed=seed), tasks)


def test_each_task_gets_its_share_of_the_noise() -> None:
    record = RecordConfig(episodes=200, seed=1, noise=0.2, noise_episodes=0.5)
    noisy = [attempt_seed(record, i, 0) % 10 for i in range(200) if carries_noise(record, i, 10)]
    assert [noisy.count(task) for task in range(10)] == [10] * 10


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 25), (0.5, 50), (1.0, 100)])
def test_noise_is_spread_evenly(share: float, expected: int) -> None:
    record = RecordConfig(noise=0.2, noise_episodes=share)
    noisy = [carries_noise(record, i) for i in range(100)]
    assert sum(noisy) == expected
    assert sum(noisy[:50]) == expected // 2
    assert not any(carries_noise(RecordConfig(noise=0.0, noise_episodes=1.0), i) for i in range(10))


def test_instructions_of_a_scene_share_its_seed_and_no_other_attempt_does() -> None:
    record = RecordConfig(episodes=30, seed=3, instructions_per_scene=3)
    first = [attempt_seed(record, i, 0) for i in range(30)]
    assert first == [3 + i // 3 for i in range(30)]
    retries = [attempt_seed(record, i, a) for i in range(30) for a in range(1, ATTEMPTS)]
    assert len(set(retries) | set(first)) == len(retries) + 10
    told = [(seed, i % 3) for i, seed in enumerate(first)]
    assert len(set(told)) == 30
    noisy = [carries_noise(record, i) for i in range(30)]
    assert noisy == [noisy[3 * (i // 3)] for i in range(30)]  # a scene's episodes are of one kind
    assert sum(noisy) == 15


def test_shards_hold_every_episode_once() -> None:
    record = RecordConfig(episodes=25, shard_episodes=10)
    assert [i for shard in range(3) for i in shard_episodes(record, shard)] == list(range(25))


def test_shards_hold_few_tasks_in_a_stable_order() -> None:
    record = RecordConfig(episodes=25, shard_episodes=10, seed=2)
    order = [i for shard in range(3) for i in shard_episodes(record, shard, 5)]
    assert sorted(order) == list(range(25))
    assert [(2 + i) % 5 for i in order] == sorted(5 * [*range(5)])
    assert order[:5] == [3, 8, 13, 18, 23]
    for shard in range(3):
        assert len({(2 + i) % 5 for i in shard_episodes(record, shard, 5)}) <= 2


# One demonstration


def test_a_demonstration_ends_with_success_and_repeats() -> None:
    env, features = make_environment(TOY)
    frames, steps = demonstrate(env, seed=5, noise=0.0, tail_steps=3)
    assert frames is not None
    assert len(frames) == steps > 2
    observation, info = env.reset(seed=5)
    for frame in frames:
        np.testing.assert_array_equal(
            frame["observation.images.front"], observation["observation.images.front"]
        )
        np.testing.assert_array_equal(frame[STATE], observation[STATE])
        assert frame[TASK] == info["task"]
        observation, _, terminated, _, info = env.step(frame[ACTION])
    assert terminated
    assert info["is_success"]
    assert features.fps == 10


def test_noise_goes_into_the_step_and_not_into_the_label() -> None:
    env, _ = make_environment(TOY)
    clean, _ = demonstrate(env, seed=5, noise=0.0, tail_steps=0)
    noisy, _ = demonstrate(env, seed=5, noise=0.5, tail_steps=0)
    again, _ = demonstrate(env, seed=5, noise=0.5, tail_steps=0)
    assert clean is not None
    assert noisy is not None
    assert again is not None
    assert not np.array_equal(noisy[1][STATE], clean[1][STATE])
    np.testing.assert_array_equal([f[STATE] for f in noisy], [f[STATE] for f in again])
    env.reset(seed=5)
    for frame in noisy:  # put the env where the noise led: the label is what the expert says there
        env.unwrapped.position = frame[STATE].astype(np.float64)
        np.testing.assert_allclose(frame[ACTION], env.unwrapped.expert_action(), atol=1e-5)


@pytest.mark.parametrize("tail_steps", [0, 1, 3])
def test_tail_steps_follow_the_first_success(tail_steps: int) -> None:
    env = gym.wrappers.TimeLimit(StayAfterSuccess(), 30)
    frames, _ = demonstrate(env, seed=5, noise=0.0, tail_steps=tail_steps)
    plain, _ = demonstrate(make_environment(TOY)[0], seed=5, noise=0.0, tail_steps=0)
    assert frames is not None
    assert plain is not None
    assert len(frames) == len(plain) + tail_steps


class Watched(ToyEnv):
    """Remembers whether each step drew its image."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.drawn: list[bool] = []
        return super().reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> Any:
        self.drawn.append(self.images_enabled)
        return super().step(action)


def test_a_lead_in_moves_the_hand_and_is_not_recorded() -> None:
    env, led = Watched(), []
    for seed in range(8):
        start = env.reset(seed=seed)[0][STATE]
        plain, _ = demonstrate(env, seed, noise=0.0, tail_steps=0)
        frames, steps = demonstrate(env, seed, noise=0.0, tail_steps=0, lead_in=4)
        again, _ = demonstrate(env, seed, noise=0.0, tail_steps=0, lead_in=4)
        assert plain is not None
        assert frames is not None
        assert again is not None
        np.testing.assert_array_equal([f[STATE] for f in frames], [f[STATE] for f in again])
        np.testing.assert_array_equal(plain[0][STATE], start)
        led.append(steps - len(frames))
        assert (led[-1] == 0) == np.array_equal(frames[0][STATE], start)
        assert env.drawn == [False] * (led[-1] - 1) + [True] * (steps - max(0, led[-1] - 1))
        assert frames[0][TASK] == plain[0][TASK]
        env.position = frames[0][STATE].astype(np.float64)  # the first image is of where the lead-in ended
        np.testing.assert_array_equal(frames[0]["observation.images.front"], env._draw(env.pixels))
    assert set(led) <= set(range(5))
    assert len(set(led)) >= 3


def test_a_lead_in_that_ends_the_episode_is_a_failed_attempt() -> None:
    class Fragile(Watched):
        def step(self, action: np.ndarray) -> Any:
            result = super().step(action)
            return (*result[:2], True, False, result[4])

    env, results = Fragile(), []
    for seed in range(6):
        results.append(demonstrate(env, seed, noise=0.0, tail_steps=0, lead_in=3))
        assert env.images_enabled
    assert {frames is None for frames, _ in results} == {True}
    assert {steps for _, steps in results} == {1}


def test_a_scene_is_shown_under_each_of_its_instructions() -> None:
    env, _ = make_environment(TOY)
    record = RecordConfig(noise=0.0, instructions_per_scene=3)
    episodes = [record_episode(env, TOY, record, index) for index in range(6)]
    for scene in (0, 1):
        shown = episodes[3 * scene : 3 * scene + 3]
        _, info = env.reset(seed=scene)
        assert [frames[0][TASK] for frames, _ in shown] == [info["task"], *info["alternatives"]]
        for frames, recorded in shown:
            assert recorded.seed == scene
            for key in ("observation.images.front", STATE):
                np.testing.assert_array_equal(frames[0][key], shown[0][0][0][key])
        directions = np.stack([frames[0][ACTION] for frames, _ in shown])
        assert len(np.unique(directions.round(3), axis=0)) == 3


def test_a_failed_attempt_is_repeated_with_the_next_seed() -> None:
    class Unlucky(ToyEnv):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            seen.append(seed)
            self.steps = 0
            return super().reset(seed=seed, options=options)

        def step(self, action: np.ndarray) -> Any:
            self.steps += 1
            observation, reward, _, truncated, info = super().step(action)
            success = len(seen) == 2 or (len(seen) == 3 and self.steps == 2)
            return observation, reward, success or self.steps == 2, truncated, info | {"is_success": success}

    seen: list[int | None] = []
    frames, recorded = record_episode(Unlucky(), TOY, RecordConfig(noise=0.0), 4)
    # The first fails after two steps, the second succeeds within one frame, which is too short.
    assert seen == [attempt_seed(RecordConfig(), 4, attempt) for attempt in range(3)]
    assert (recorded.attempts, recorded.seed, recorded.steps) == (3, seen[-1], 2 + 1 + 2)
    assert len(frames) == recorded.frames == 2


def test_retries_and_noise_of_an_environment_that_plays_tasks_in_turns() -> None:
    class Unlucky(TurnsEnv):
        """Fails at its first attempt."""

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            seen.append(seed)
            return super().reset(seed=seed, options=options)

        def step(self, action: np.ndarray) -> Any:
            result = super().step(action)
            lost = {"is_success": False} if len(seen) == 1 else {}
            return (*result[:2], result[2] or bool(lost), False, result[4] | lost)

    for index, noisy in ((1, False), (4, True)):  # the first and the second turn of task 1
        seen: list[int | None] = []
        record = RecordConfig(noise=0.1, environment_state=True)
        frames, recorded = record_episode(Unlucky(), TOY, record, index)
        assert seen == [index, attempt_seed(record, index, 1, 3)]
        assert (recorded.noise, recorded.task) == (noisy, "reach green")
        assert {frame[TASK] for frame in frames} == {"reach green"}
        assert {frame[ENVIRONMENT_STATE].shape for frame in frames} == {(6,)}


def test_an_expert_that_never_succeeds_is_given_up() -> None:
    class Lost(ToyEnv):
        def step(self, action: np.ndarray) -> Any:
            result = super().step(action)
            return (*result[:2], True, False, result[4] | {"is_success": False})

    with pytest.raises(RuntimeError, match=rf"{ATTEMPTS} failed attempts at episode 4.*remedy"):
        record_episode(Lost(), TOY, RecordConfig(), 4)


def test_environments_that_cannot_demonstrate() -> None:
    with pytest.raises(ValueError, match=r"expert_action.*remedy"):
        make_environment(EnvConfig("test_record:NoExpert-v0"))
    with pytest.raises(ValueError, match=r"environment_state\(\).*remedy"):
        make_environment(TOY, environment_state=True)
    with pytest.raises(ValueError, match=r"'module:Id-v0'.*remedy"):
        make_environment(EnvConfig("toy_env:Nothing-v0"))
    with pytest.raises(ValueError, match=r"'pixls': 8.*remedy"):
        make_environment(EnvConfig(TOY.id, {"pixls": 8}))


def test_unbounded_actions_are_fine_without_a_lead_in() -> None:
    unbounded = EnvConfig("test_record:Unbounded-v0")
    with pytest.raises(ValueError, match=r"got: .*inf.*record\.lead_in=3.*remedy"):
        make_environment(unbounded, lead_in=3)
    frames, _ = demonstrate(make_environment(unbounded)[0], seed=5, noise=0.1, tail_steps=0)
    assert frames is not None


# What is refused before any work


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    (root / "meta").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"taken.*remedy"):
        record_demonstrations(root, TOY, RecordConfig())
    record = RecordConfig(episodes=7)
    done = Recording(content(TOY, record), 70, 7, 1.0, 70, 1.0, 1.0, 70.0, [])
    (root / SUMMARY).write_text(json.dumps(vars(done)))
    parts = tmp_path / "dataset.parts"  # a kill right after the last rename leaves them
    parts.mkdir()
    assert record_demonstrations(root, TOY, RecordConfig(episodes=7, workers=3, shard_episodes=2)) == done
    assert not parts.exists()
    with pytest.raises(ValueError, match=r"episodes=7.*episodes=8.*remedy"):
        record_demonstrations(root, TOY, RecordConfig(episodes=8))
    with pytest.raises(ValueError, match=r"kwargs=\{\}.*'pixels': 16.*remedy"):
        record_demonstrations(root, EnvConfig(TOY.id, {"pixels": 16}), record)
    for name in ("format", "environment_state"):  # a recording of before there was a choice
        del done.content[name]
    (root / SUMMARY).write_text(json.dumps(vars(done)))
    assert record_demonstrations(root, TOY, record) == done
    with pytest.raises(ValueError, match=r"environment_state=False.*environment_state=True"):
        record_demonstrations(root, TOY, RecordConfig(episodes=7, environment_state=True))


def test_a_recording_that_finished_while_the_lock_was_awaited_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, record = tmp_path / "dataset", RecordConfig(episodes=7)
    done = Recording(content(TOY, record), 70, 7, 1.0, 70, 1.0, 1.0, 70.0, [])

    @contextlib.contextmanager
    def late(parts: Path) -> Iterator[None]:
        with alone(parts):
            (root / SUMMARY).parent.mkdir(parents=True)
            (root / SUMMARY).write_text(json.dumps(vars(done)))
            yield

    monkeypatch.setattr("vla.data.record.alone", late)
    assert record_demonstrations(root, TOY, record) == done
    assert not (tmp_path / "dataset.parts").exists()


def test_parts_of_another_configuration_and_of_another_recorder(tmp_path: Path) -> None:
    parts = tmp_path / "dataset.parts"
    parts.mkdir()
    with alone(parts), pytest.raises(RuntimeError, match=r"being recorded.*remedy"):
        record_demonstrations(tmp_path / "dataset", TOY, RecordConfig())
    wanted = content(TOY, RecordConfig(noise=0.3)) | {"shard_episodes": 100}
    (parts / "config.json").write_text(json.dumps(wanted))
    (parts / "shard_00000").mkdir()  # finished: not to be mixed with other data
    with pytest.raises(ValueError, match=r"noise=0\.3.*noise=0\.2.*remedy"):
        record_demonstrations(tmp_path / "dataset", TOY, RecordConfig())


def test_seeds_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"record\.seed"):
        record_demonstrations(tmp_path / "dataset", TOY, RecordConfig(seed=2**30))


def test_an_environment_that_does_not_tell_its_state_is_refused_at_once(tmp_path: Path) -> None:
    record = RecordConfig(workers=1, format="frames", environment_state=True)
    with pytest.raises(
        RuntimeError, match=r"does not tell where things are.*record\.environment_state=false"
    ):
        record_demonstrations(tmp_path / "dataset", TOY, record)
    assert not list((tmp_path / "dataset.parts").glob("shard_*"))


def test_a_dying_worker_is_named_with_what_it_wrote(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        record_demonstrations(
            tmp_path / "dataset", EnvConfig("test_record:DieAtBirth-v0"), RecordConfig(workers=1)
        )
    for words in ("shard 0", "exit code 7", "the driver says something", "run the command again"):
        assert words in str(caught.value)
    assert not (tmp_path / "dataset").exists()


# The whole job


def run_script(output: Path, *options: str, env: EnvConfig = TOY) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), f"--output={output}", f"--env.id={env.id}", *options]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    return subprocess.Popen(
        command, cwd=output.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lerobot and its dependencies
def test_a_killed_recording_continues_without_losing_or_doubling(tmp_path: Path) -> None:
    options = ["--record.episodes=40", "--record.shard_episodes=4", "--record.noise=0.3"]
    options.append("--record.environment_state=true")
    output, parts = tmp_path / "run", tmp_path / "run" / "dataset.parts"
    first = run_script(output, *options, "--record.workers=2", env=TURNS)
    deadline = time.monotonic() + 400  # a busy machine imports lerobot slowly
    try:
        while len(list(parts.glob("shard_*[0-9]"))) < 2:
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == -signal.SIGKILL
    finished = {path.name: (path / "shard.json").read_bytes() for path in parts.glob("shard_*[0-9]")}
    assert 2 <= len(finished) < 10
    assert not (output / "dataset").exists()

    second = run_script(output, *options, "--record.workers=1", env=TURNS)
    stdout, stderr = second.communicate(timeout=400)
    assert second.returncode == 0, stderr
    assert "40 episodes" in stdout
    assert "Svt" not in stderr
    assert sorted(path.name for path in output.iterdir()) == ["dataset"]

    recording = Recording.load(output / "dataset")
    kept = [json.loads(text) for text in finished.values()]
    assert all(episode in recording.episodes for shard in kept for episode in shard["episodes"])  # not redone
    expected = [*range(0, 40, 3), *range(1, 40, 3), *range(2, 40, 3)]  # task after task
    assert [episode["index"] for episode in recording.episodes] == expected
    assert sum(episode["noise"] for episode in recording.episodes) == 7 + 6 + 6  # of 14 + 13 + 13

    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("local/test", root=output / "dataset", video_backend="pyav")
    assert (dataset.num_episodes, dataset.num_frames) == (40, recording.frames)
    assert dataset[recording.frames - 1]["observation.images.front"].shape == (3, 32, 32)

    store = FrameStore.open_or_build(output / "dataset")
    starts = np.unique(store.first)
    env, _ = make_environment(TURNS)
    for start, episode in zip(
        starts, recording.episodes, strict=True
    ):  # every episode is the one of its seed
        noise = 0.3 if episode["noise"] else 0.0
        frames, _ = demonstrate(env, episode["seed"], noise, 3, environment_state=True)
        assert frames is not None
        span = slice(start, start + len(frames))
        np.testing.assert_array_equal(store.state[span], [frame[STATE] for frame in frames])
        np.testing.assert_array_equal(store.action[span], [frame[ACTION] for frame in frames])
        assert store.environment_state is not None
        told = [frame[ENVIRONMENT_STATE] for frame in frames]
        np.testing.assert_array_equal(store.environment_state[span], told)
        assert {store.tasks[i] for i in store.task[span]} == {frames[0][TASK]}
        truth = np.stack([frame["observation.images.front"] for frame in frames]).astype(float)
        assert np.abs(store.images["front"][span] - truth).max() <= 3  # of 255: what colour conversion costs

    third = run_script(output, *options, env=TURNS)
    stdout, stderr = third.communicate(timeout=120)
    assert third.returncode == 0, stderr
    fourth = run_script(output, *options, "--record.episodes=41", env=TURNS)
    _, stderr = fourth.communicate(timeout=120)
    assert fourth.returncode != 0
    assert "remedy" in stderr


@pytest.mark.slow
def test_demonstrations_must_not_use_evaluation_scenes(tmp_path: Path) -> None:
    process = run_script(tmp_path / "run", "--record.seed=999990")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "evaluate.seed" in stderr
    assert "remedy" in stderr
