"""The tabletop in LeRobot's hands: what it makes of the configuration, and that both evaluators agree."""

from __future__ import annotations

import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from envs import splits
from envs.tabletop import Tabletop
from envs.tasks import SKILLS
from vla.config import EnvConfig, EvaluateConfig, Job
from vla.data.frames import FrameStore
from vla.evaluation import evaluate
from vla.observation import ACTION, IMAGES, STATE, Features

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of importing lerobot are not ours
    import draccus
    from lerobot.configs.eval import EvalPipelineConfig
    from lerobot.envs import close_envs, make_env, preprocess_observation
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION, env_to_policy_features
    from lerobot.policies import PreTrainedPolicy
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.scripts.lerobot_eval import eval_policy

    from envs.lerobot_plugin.tabletop_env import TabletopEnv

ROOT = Path(__file__).resolve().parents[1]
BUTTONS = dict(row=0.02, references=["name"], cameras=["front"], pixels=32, commanded=False)
SEED = 1_000_000
FRESH = {NEW_ROLLOUT_OPTION: True}


def parse(*arguments: str) -> TabletopEnv:
    """The environment of a command line of LeRobot's."""
    return draccus.parse(EvalPipelineConfig, args=["--env.type=tabletop", *arguments]).env


class Guesser:
    """Presses one of three buttons in a row, whichever the instruction's letters say: right one time in three.

    Its way there trembles with every bit of what it sees.
    """

    n_obs_steps, chunk_size = 1, 8
    features = Features({"front": (32, 32)}, 7, 5, 10)

    def predict_chunk(self, images: dict[str, np.ndarray], state: np.ndarray, tasks: list[str]) -> np.ndarray:
        rows = zip(images["front"], state, tasks, strict=True)
        return np.stack([self._chunk(*row) for row in rows])

    def _chunk(self, image: np.ndarray, state: np.ndarray, task: str) -> np.ndarray:
        place = np.array([0.02, (zlib.crc32(task.encode()) % 3 - 1) * 0.15])
        away = place - state[-1, :2]
        down = -0.5 if np.hypot(*away) < 0.03 else 0.0
        seen = zlib.crc32(image.tobytes() + state.tobytes())
        tremble = np.random.default_rng(seen).normal(0, 0.3, (self.chunk_size, 5))
        return np.clip([*away / 0.1, down, 0.0, -1.0] + tremble, -1, 1).astype(np.float32)


class Lent(PreTrainedPolicy):
    """A policy of ours in LeRobot's rollouts: the first `actions` of each chunk are executed."""

    config_class, name = ACTConfig, "lent"

    def __init__(self, policy: Any, actions: int) -> None:
        nn.Module.__init__(self)
        self.policy, self.actions = policy, actions
        self.reset()

    def reset(self) -> None:
        self.queue: list[np.ndarray] = []

    def select_action(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        if not self.queue:
            images = {
                name.removeprefix(IMAGES): (value * 255).round().byte().permute(0, 2, 3, 1).numpy()[:, None]
                for name, value in batch.items()
                if name.startswith(IMAGES)
            }
            chunk = self.policy.predict_chunk(images, batch[STATE].numpy()[:, None], batch["task"])
            self.queue = list(chunk.swapaxes(0, 1)[: self.actions])
        return torch.from_numpy(self.queue.pop(0).copy())

    def forward(self, *_: Any, **__: Any) -> Any: ...
    def get_optim_params(self) -> Any: ...
    def predict_action_chunk(self, *_: Any, **__: Any) -> Any: ...


def play(
    config: TabletopEnv, suite: str, episodes: int, batch: int, asynchronous: bool = False, **how: Any
) -> list[tuple[int, bool, float, int]]:
    """What LeRobot's evaluation makes of the Guesser: (seed, success, sum of rewards, steps) of every episode."""
    envs = make_env(config, n_envs=batch, use_async_envs=asynchronous)
    lent, whole = Lent(Guesser(), actions=4), lambda batch: batch
    before, after = config.get_env_processors()
    with torch.no_grad():
        info = eval_policy(
            envs[suite][0],
            lent,
            before,
            after,
            whole,
            whole,
            episodes,
            start_seed=SEED,
            return_episode_data=True,
            **how,
        )
    close_envs(envs)
    frames = info["episodes"]["episode_index"].bincount() - 1  # LeRobot adds the observation after the end
    rows = zip(info["per_episode"], frames.tolist(), strict=False)
    return [(row["seed"], row["success"], row["sum_reward"], steps) for row, steps in rows]


def test_arguments_reach_the_environment_and_its_features_follow() -> None:
    kwargs = "{row: 0.03, references: [name], cameras: [front], pixels: 64, commanded: false}"
    config = parse("--env.task=press", f"--env.kwargs={kwargs}")
    expected = dict(row=0.03, references=["name"], cameras=["front"], pixels=64, commanded=False)
    assert (config.fps, config.kwargs, config.suites()) == (10, expected, {"press": {0: "L0"}})
    shapes = {
        name: (feature.type.value, feature.shape) for name, feature in env_to_policy_features(config).items()
    }
    assert shapes == {
        "observation.images.front": ("VISUAL", (3, 64, 64)),
        "observation.state": ("STATE", (7,)),
        "action": ("ACTION", (5,)),
    }
    again = draccus.decode(
        type(config).__mro__[1], draccus.encode(config, type(config).__mro__[1])
    )  # as train_config.json does
    assert again == config


def test_every_skill_is_a_suite_and_its_place_in_the_list_a_splits_id() -> None:
    config = parse("--env.splits=[L0, L1, L2]")
    both, all_three = {0: "L0", 2: "L2"}, {0: "L0", 1: "L1", 2: "L2"}
    assert config.suites() == {skill: all_three if skill in ("push", "put") else both for skill in SKILLS}
    assert set(parse().suites()) == set(SKILLS)
    assert list(parse("--env.task=put, press").suites()) == ["put", "press"]
    assert parse("--env.task=put,press", "--env.splits=[L1]").suites() == {"put": {0: "L1"}}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--env.task=pres", r"env\.task: got \['pres'\], expected some of touch, press"),
        ("--env.task=press,press", r"env\.task: got .* each once"),
        ("--env.splits=[L9]", r"env\.splits: got \['L9'\], expected some of train, L0"),
        ("--env.splits=[]", r"env\.splits: got \[\]"),
        ("--env.fps=30", r"env\.fps: got 30, expected 10"),
        ("--env.max_parallel_tasks=2", r"env\.max_parallel_tasks: got 2, expected 1"),
        ("--env.kwargs={pixel: 64}", r"env\.kwargs: got 'pixel', expected some of cameras, pixels"),
        ("--env.kwargs={skills: [press]}", r"env\.kwargs: got 'skills', .*remedy: use --env.task"),
        (
            "--env.kwargs={cameras: [top]}",
            r"env\.kwargs: cameras: got \['top'\], expected some of front, wrist",
        ),
        ("--env.kwargs={pixels: many}", r"env\.kwargs: got \{'pixels': 'many'\}.*remedy"),
        ("--env.kwargs={randomize: all}", r"env\.kwargs: got \{'randomize': 'all'\}.*remedy"),
    ],
)
def test_wrong_arguments_are_refused_when_they_are_read(argument: str, message: str) -> None:
    with pytest.raises(draccus.ParsingError, match=message):
        parse(argument)


def test_splits_that_no_skill_has_are_refused() -> None:
    with pytest.raises(
        draccus.ParsingError, match=r"env\.splits: got \['L1'\] for \['press'\].*one of push, put"
    ):
        TabletopEnv(task="press", splits=["L1"])


@pytest.mark.parametrize("skill", SKILLS)
def test_a_task_shows_what_the_tabletop_shows(skill: str) -> None:
    """For every split: the same pictures and state for the same seed, the instruction, the limit."""
    kwargs = dict(pixels=32, render_pixels=48)
    config = TabletopEnv(task=skill, splits=list(splits.SPLITS), kwargs=kwargs)
    envs = make_env(config, n_envs=1)[skill]
    assert [config.splits[number] for number in envs] == [
        split for split in splits.SPLITS if skill in splits.SKILLS_OF_SPLIT.get(split, SKILLS)
    ]
    for number, env in envs.items():
        own = Tabletop(skills=[skill], split=config.splits[number], **kwargs)
        seen, _ = own.reset(seed=SEED + 3)
        got, info = env.reset(seed=[SEED + 3], options=FRESH)
        for _ in range(2):
            for camera in ("front", "wrist"):
                picture = got["pixels"][camera][0]
                np.testing.assert_array_equal(picture, seen[IMAGES + camera])
                assert picture.std() > 5
            for name in ("agent_pos", STATE):
                np.testing.assert_array_equal(got[name][0], seen[STATE])
            assert env.call("task_description") == (own.task,)
            assert info["is_success"].tolist() == [False]
            assert set(preprocess_observation(got)) >= set(env_to_policy_features(config)) - {ACTION}
            action = np.array([[0.5, -0.5, 0.5, 0.5, 1.0]], np.float32)
            seen, got, info = own.step(action[0])[0], *env.step(action)[::4]
        assert env.call("task") == (f"{skill}/{config.splits[number]}",)
        assert env.call("_max_episode_steps") == (own.limit,)
        assert env.envs[0].render().shape == (48, 48, 3)
        own.close()
    close_envs({skill: envs})


def test_the_instruction_changes_where_two_follow_each_other() -> None:
    """The expert plays, by whatever LeRobot tells it."""
    env = make_env(TabletopEnv(task="press", splits=["L4"], kwargs=BUTTONS))["press"][0]
    env.reset(seed=[SEED], options=FRESH)
    inner = env.envs[0].unwrapped
    inner.images_enabled = False
    texts, ended = [], False
    while not ended:
        texts += env.call("task_description")
        _, reward, ended, truncated, info = env.step(inner.expert_action(texts[-1])[None])
        assert not truncated
    assert len(dict.fromkeys(texts)) == 2
    assert (reward.tolist(), info["is_success"].tolist()) == ([1.0], [True])
    env.close()


def test_both_evaluators_see_the_same_episodes() -> None:
    """A policy that errs, and whose every action depends on every bit that it is shown."""
    how = EvaluateConfig(episodes=9, slots=4, workers=1, n_action_steps=4, videos=0, controls=False)
    job = Job(
        env=EnvConfig("envs:Tabletop-v0", {"skills": ["press"], "split": "L0", **BUTTONS}), evaluate=how
    )
    ours = [
        (row.episode.seed, row.success, row.steps) for row in evaluate(Guesser(), job, progress=False).rows
    ]
    theirs = play(TabletopEnv(task="press", kwargs=BUTTONS), "press", episodes=9, batch=3)
    assert [(seed, success, steps) for seed, success, _, steps in theirs] == ours
    assert {success for _, success, _ in ours} == {True, False}
    assert len({steps for *_, steps in ours}) > 4
    assert [total for _, _, total, _ in theirs] == [
        float(success) for _, success, _ in ours
    ]  # nothing after the end


@pytest.mark.slow
def test_environments_in_processes_of_their_own_play_the_same_and_recordings_are_ours_to_read(
    tmp_path: Path,
) -> None:
    """LeRobot records one episode of each environment, in a dataset each, all under the first one's instruction."""
    config = TabletopEnv(task="press", kwargs=BUTTONS)
    rows = play(config, "press", episodes=3, batch=3)
    recording = dict(recording_dir=tmp_path, env_features=config.features)
    assert play(config, "press", episodes=3, batch=3, asynchronous=True, **recording) == rows
    own = Tabletop(skills=["press"], split="L0", **BUTTONS)
    own.reset(seed=SEED)
    told = own.task
    for number, (seed, _, _, steps) in enumerate(rows):
        store = FrameStore.open_or_build(tmp_path / f"env_{number}")
        assert (store.n_episodes, len(store), store.features) == (1, steps, Guesser.features)
        first, _ = own.reset(seed=seed)
        np.testing.assert_array_equal(store.state[0], first[STATE])
        assert store.tasks == [told]
    own.close()


@pytest.mark.slow
def test_commands_of_lerobot_start_without_mujoco() -> None:
    """Those that need no environment of ours: the plugin's import is what every one of them pays."""
    program = "import sys, envs.lerobot_plugin; print(sorted({'mujoco', 'envs.tabletop'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
