import os
from dataclasses import replace
from typing import Any

import av
import gymnasium as gym
import numpy as np
import pytest
from toy_env import COLOURS, ToyPolicy

from vla.config import EnvConfig, EvaluateConfig, Job
from vla.evaluation import EnvironmentCrash, evaluate
from vla.evaluation.episodes import Episode, Row, failures_to_film, wrong_texts
from vla.observation import Features
from vla.provenance import portable
from vla.rates import rate, wilson

TOY = EnvConfig("toy_env:Toy-v0")
SMALL = EvaluateConfig(episodes=12, slots=5, workers=1, n_action_steps=4, videos=0)


def job(env: EnvConfig = TOY, output: Any = "unused", **changes: Any) -> Job:
    return Job(env=env, output=str(output), evaluate=replace(SMALL, **changes))


def outcomes(evaluation, control: str = "standard") -> list[bool]:
    return [row.success for row in evaluation.rows if row.episode.control == control]


class Line(gym.Env):
    """Somebody else's environment: no renderer, no expert, no alternatives, and a little clockwork.

    State: (position, pictures drawn, steps). Success beyond 1. `fail`: how it breaks at step 3 of seed 5.
    """

    observation_space = gym.spaces.Dict(
        {"observation.images.eye": gym.spaces.Box(0, 255, (8, 10, 3), np.uint8),
         "observation.state": gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)}
    )  # fmt: skip
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, fail: str = "", render_mode: str | None = None, fps: int = 10) -> None:
        self.fail, self.render_mode, self.images_enabled = fail, render_mode, True
        self.metadata = {"render_fps": fps}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.seed, self.position, self.pictures, self.steps = seed, 0.0, 0, 0
        return self._observe()

    def step(self, action: np.ndarray) -> Any:
        assert np.isfinite(action).all()
        self.steps += 1
        self.position += 0.1 * float(action[0])
        if self.fail and self.seed == SMALL.seed + 5 and self.steps == 3:
            os._exit(7) if self.fail == "die" else 1 / 0
        observation, info = self._observe()
        return observation, 0.0, False, False, info

    def _observe(self) -> Any:
        self.pictures += self.images_enabled
        observation = {
            "observation.images.eye": np.full((8, 10, 3), self.pictures, np.uint8),
            "observation.state": np.array([self.position, self.pictures, self.steps], np.float32),
        }
        if self.fail == "float":
            observation["observation.images.eye"] = np.full((8, 10, 3), 0.5, np.float32)
        if self.fail == "mute":
            return observation, {}
        task = "go right" if self.position < 0.5 else "go on"
        return observation, {"task": task, "is_success": self.position > 1}


if "Line-v0" not in gym.registry:
    gym.register("Line-v0", entry_point=Line, max_episode_steps=20)
LINE = EnvConfig(f"{__name__}:Line-v0")


class Watched(Line):
    """Line with an expert, which insists on so many pictures: none, or one of each observation."""

    def __init__(self, drawn: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.drawn = drawn

    def expert_action(self) -> np.ndarray:
        assert self.pictures == (self.steps + 1 if self.drawn else 0)
        return np.ones(1, np.float32)


if "Watched-v0" not in gym.registry:
    gym.register("Watched-v0", entry_point=Watched, max_episode_steps=20)


class LinePolicy:
    """Walks right at full speed, and keeps what it was shown."""

    features = Features({"eye": (8, 10)}, state_dim=3, action_dim=1, fps=10)

    def __init__(self, n_obs_steps: int = 1, answer: float = 1.0) -> None:
        self.n_obs_steps, self.chunk_size, self.answer = n_obs_steps, 4, answer
        self.seen: list[tuple[np.ndarray, np.ndarray, list[str]]] = []

    def predict_chunk(self, images: dict[str, np.ndarray], state: np.ndarray, tasks: list[str]) -> np.ndarray:
        self.seen.append((images["eye"], state, tasks))
        chunks = np.ones((len(tasks), 4, 1), np.float32)
        chunks[state[:, -1, 0] > 0.7] = self.answer  # what it says when nearly there
        return chunks


def test_an_environment_of_the_users_own():
    evaluation = evaluate(LinePolicy(), job(LINE), progress=False)
    assert evaluation.success_rate == 1
    assert evaluation.summary["mean_steps"] == 11  # 0.1 a step, until beyond 1
    assert evaluation.summary["counterfactual_pair_rate"] is None  # it names no alternatives
    assert evaluation.summary["shuffled_instruction_rate"] is None  # nor has it a second instruction
    assert evaluation.summary["blank_instruction_rate"] == 1


@pytest.mark.parametrize("history", [1, 2])
def test_history_and_pictures_nobody_looks_at(history):
    policy = LinePolicy(history)
    evaluate(policy, job(LINE, episodes=3, slots=3, controls=False), progress=False)
    states = np.stack([state for _, state, _ in policy.seen])[:, 0]  # (calls, T, 3)
    assert states.shape == (3, history, 3)
    steps = [[0] * history, list(range(4, 4 - history, -1))[::-1], list(range(8, 8 - history, -1))[::-1]]
    np.testing.assert_array_equal(states[..., 2], steps)
    assert states[-1, -1, 1] == 1 + 2 * history  # drawn: the first, and the last of each 4 that are shown
    for images, state, _ in policy.seen:  # each picture is of its own step
        np.testing.assert_array_equal(images[:, :, 0, 0, 0], state[:, :, 1])


def test_the_policy_hears_the_instruction_of_the_moment():
    policy = LinePolicy()
    evaluate(policy, job(LINE, episodes=1, slots=1, controls=False), progress=False)
    assert [tasks for _, _, tasks in policy.seen] == [["go right"], ["go right"], ["go on"]]


class TwoEyes(ToyPolicy):
    """The toy's policy, with a second camera that it may do without."""

    features = Features({"front": (32, 32), "wrist": (32, 32)}, state_dim=2, action_dim=2, fps=10)

    def __init__(self) -> None:
        super().__init__()
        self.shown: set[tuple[str, ...]] = set()

    def predict_chunk(self, images: dict[str, np.ndarray], state: np.ndarray, tasks: list[str]) -> np.ndarray:
        self.shown.add(tuple(sorted(images)))
        return super().predict_chunk(images, state, tasks)


def test_a_camera_that_the_policy_is_not_shown():
    policy, env = TwoEyes(), replace(TOY, kwargs={"cameras": ("front", "wrist")})
    assert evaluate(policy, job(env, without=("wrist",), controls=False), progress=False).success_rate == 1
    assert policy.shown == {("front",)}
    for without in (("front", "wrist"), ("top",)):
        with pytest.raises(
            ValueError, match=r"evaluate.without: got .*expected some of \['front', 'wrist'\]"
        ):
            evaluate(policy, job(env, without=without), progress=False)


def test_batch_is_always_full():
    policy = LinePolicy()
    evaluate(policy, job(LINE, episodes=7, slots=5, controls=False), progress=False)
    assert {len(tasks) for _, _, tasks in policy.seen} == {5}


@pytest.mark.parametrize("answer", [np.nan, np.inf])
def test_non_finite_actions_fail_and_never_reach_the_environment(answer):
    evaluation = evaluate(LinePolicy(answer=answer), job(LINE, controls=False), progress=False)
    assert evaluation.success_rate == 0
    assert evaluation.summary["non_finite"] == 12
    assert {row.steps for row in evaluation.rows} == {8}


@pytest.mark.parametrize(("fail", "says"), [("raise", "ZeroDivisionError"), ("die", "exit code 7")])
def test_a_crash_says_where(fail, says):
    with pytest.raises(EnvironmentCrash, match=says) as caught:
        evaluate(LinePolicy(), job(replace(LINE, kwargs={"fail": fail}), workers=2), progress=False)
    assert fail == "die" or f"seed={SMALL.seed + 5}" in str(caught.value)


@pytest.mark.parametrize("env_id", ["toy_env:Nothing-v0", "no_such_module:Toy-v0"])
def test_an_unknown_environment_is_refused(env_id):
    with pytest.raises(ValueError, match=r"(?s)got .*expected 'module:Id-v0'.*remedy"):
        evaluate(None, job(EnvConfig(env_id)), progress=False)


@pytest.mark.parametrize(
    ("policy", "fail", "says"),
    [
        (None, "", r"expected: a method expert_action"),
        (LinePolicy(), "mute", r"got: info with \[\]"),
        (LinePolicy(), "float", r"images.eye'\] of shape \(8, 10, 3\), float32. expected: .*uint8"),
    ],
)
def test_an_environment_that_does_not_follow_the_protocol_is_refused(policy, fail, says):
    with pytest.raises(ValueError, match=says + ".*remedy"):
        evaluate(policy, job(replace(LINE, kwargs={"fail": fail})), progress=False)


def test_an_environment_that_does_not_fit_the_policy_is_refused():
    with pytest.raises(ValueError, match=r"cameras. got: \['wrist'\]. expected: \['front'\]"):
        evaluate(ToyPolicy(), job(replace(TOY, kwargs={"cameras": ["wrist"]})), progress=False)


def test_an_environment_may_show_more_cameras_than_the_policy_wants():
    class Strict(ToyPolicy):
        def predict_chunk(self, images, state, tasks):
            assert list(images) == ["front"]
            return super().predict_chunk(images, state, tasks)

    settings = job(replace(TOY, kwargs={"cameras": ["above", "front", "wrist"]}), controls=False)
    assert evaluate(Strict(), settings, progress=False).success_rate == 1


@pytest.mark.parametrize(("fps", "says"), [(20, "fps. got: 20. expected: 10"), (0, "control rate")])
def test_an_environment_at_another_rate_is_refused(fps, says):
    with pytest.raises(ValueError, match=says + ".*remedy"):
        evaluate(LinePolicy(), job(replace(LINE, kwargs={"fps": fps})), progress=False)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"phrasng": 1}, r"Split 'last': .*does not take.*'phrasng'.*remedy"),
        ({"pixels": 16}, r"Split 'last' does not fit.*\(16, 16\).*\(32, 32\).*remedy"),
        ({"cameras": []}, r"Split 'last': .*spaces do not fit.*remedy"),
    ],
)
def test_a_mistake_in_the_last_split_shows_before_the_first_is_played(kwargs, says):
    class Never(ToyPolicy):
        def predict_chunk(self, images, state, tasks):
            raise AssertionError("something was played")

    settings = job(splits={"first": {}, "other": {"phrasing": 1}, "last": kwargs}, workers=2)
    with pytest.raises(ValueError, match=f"(?s){says}"):
        evaluate(Never(), settings, progress=False)


class Gossip(ToyPolicy):
    """What it does in one slot depends on all the others, to the last bit."""

    def predict_chunk(self, images, state, tasks):
        return super().predict_chunk(images, state, tasks) + 0.3 * np.sin(1e3 * state.sum(dtype=np.float64))


@pytest.mark.parametrize("ensemble", [0.0, 0.1])
def test_results_do_not_depend_on_the_number_of_workers(ensemble):
    settings = {"ensemble": ensemble, "splits": {"a": {}, "b": {"phrasing": 1}}, "episodes": 9}
    one = evaluate(Gossip(), job(**settings), progress=False)
    two = evaluate(Gossip(), job(**settings, workers=2), progress=False)
    assert one.workers != two.workers
    assert [row.as_dict() for row in one.rows] == [row.as_dict() for row in two.rows]
    assert len({row.steps for row in one.rows}) > 1


def test_the_expert_scores_what_it_scores_when_stepped_directly():
    kwargs = {"max_episode_steps": 6}  # too few for some scenes
    env = gym.make("toy_env:Toy-v0", disable_env_checker=True, **kwargs)
    expected = []
    for index in range(SMALL.episodes):
        _, info = env.reset(seed=SMALL.seed + index)
        done = False
        while not done:
            _, _, terminated, truncated, info = env.step(env.unwrapped.expert_action())  # type: ignore[attr-defined]
            done = terminated or truncated
        expected.append(info["is_success"])
    assert 0 < sum(expected) < SMALL.episodes
    evaluation = evaluate(None, job(replace(TOY, kwargs=kwargs)), progress=False)
    assert outcomes(evaluation) == expected
    assert {row.episode.control for row in evaluation.rows} == {"standard", "counterfactual"}


@pytest.mark.parametrize("filmed", [False, True])
def test_nothing_is_drawn_for_an_expert_but_films(tmp_path, filmed):
    env = EnvConfig(f"{__name__}:Watched-v0", {"drawn": filmed})
    settings = job(env, tmp_path, episodes=1, slots=1, controls=False, videos=int(filmed))
    evaluation = evaluate(None, settings, progress=False)
    assert evaluation.success_rate == 1
    assert bool(evaluation.rows[0].video) == filmed


def test_controls_do_what_they_say():
    evaluation = evaluate(ToyPolicy(), job(), progress=False)
    assert evaluation.summary["success_rate"] == evaluation.summary["counterfactual_pair_rate"] == 1
    standard = {row.episode.index: row for row in evaluation.rows if row.episode.control == "standard"}
    seen = set()
    for row in evaluation.rows:
        same = standard[row.episode.index]
        control = row.episode.control
        seen.add(control)
        assert row.episode.seed == same.episode.seed
        if control == "counterfactual":
            assert row.task == row.text == same.alternatives[0] != same.task
        elif control == "shuffled":
            assert (row.task, row.text) == (same.task, same.alternatives[0])
        elif control == "blank":
            assert (row.task, row.text) == (same.task, "")
    assert seen == {"standard", "counterfactual", "shuffled", "blank"}
    assert evaluation.summary["shuffled_instruction_rate"] == 0  # it obeyed, and that was wrong
    assert 0 < evaluation.summary["blank_instruction_rate"] < 0.7  # leftmost, whatever was meant


def test_a_policy_that_ignores_the_instruction_never_wins_a_pair():
    summary = evaluate(ToyPolicy(reads=False), job(episodes=30, slots=10), progress=False).summary
    assert 0.1 < summary["success_rate"] < 0.6  # a third, by chance
    assert summary["counterfactual_pair_rate"] == 0
    assert summary["blank_instruction_rate"] == summary["success_rate"]
    assert summary["shuffled_instruction_rate"] == summary["success_rate"]


def test_wrong_texts_come_from_episodes_of_the_same_skill_without_alternatives():
    def row(task, skill):
        return Row(Episode("a", "standard", 0, 0), task, task, skill)

    rows = [row("press red", "press"), row("touch red", "touch"), row("press blue", "press")]
    rows.append(row("press red", "press"))
    assert wrong_texts(rows) == ["press blue", None, "press red", "press blue"]


def failures(skills: dict[str, str], count: int, filmed: tuple[int, ...] = ()) -> list[tuple[str, int]]:
    """What is filmed; skills: of each, what became of its episodes: w won, f failed. They are played in turns."""
    rows = []
    for number, outcomes in enumerate(zip(*skills.values(), strict=True)):
        for place, (skill, outcome) in enumerate(zip(skills, outcomes, strict=True)):
            index = number * len(skills) + place
            row = Row(Episode("a", "standard", index, index), "", "", skill, success=outcome == "w")
            row.video = "a film" if index in filmed else None
            rows.append(row)
    chosen = [episode.index for episode in failures_to_film(rows, count)]
    return [(rows[index].skill, index) for index in chosen]


def test_the_skills_that_fail_most_are_filmed_first():
    skills = {"good": "wwww", "fair": "fwwf", "bad": "wfff", "worse": "ffff"}
    assert failures(skills, 2) == [("worse", 3), ("bad", 6)]
    assert failures(skills, 5) == [("worse", 3), ("bad", 6), ("fair", 1), ("worse", 7), ("bad", 10)]
    assert failures(skills, 3, filmed=(1, 7)) == [("bad", 6)]  # a filmed failure will do for its skill
    assert failures(skills, 3, filmed=(0, 2)) == failures(skills, 3)  # a success will not
    assert len(failures(skills, 100)) == 9


def test_without_skills_the_first_failures_are_filmed():
    assert failures({"": "wffwff"}, 2) == [("", 1), ("", 2)]
    assert failures({"": "wffwff"}, 2, filmed=(4,)) == [("", 1)]
    assert failures({"": "wffwff"}, 1, filmed=(4, 5)) == []


def test_splits_are_environments_of_their_own():
    settings = job(splits={"go": {"phrasing": 0}, "reach": {"phrasing": 1}}, episodes=4, controls=False)
    evaluation = evaluate(ToyPolicy(), settings, progress=False)
    words = {row.episode.split: row.task.split()[0] for row in evaluation.rows}
    assert words == {"go": "go", "reach": "reach"}
    assert {split["n_episodes"] for split in evaluation.summary["splits"].values()} == {4}


def test_films_show_the_episode(tmp_path):
    settings = job(replace(TOY, kwargs={"max_episode_steps": 6}), tmp_path, videos=2, controls=False)
    evaluation = evaluate(ToyPolicy(), settings, progress=False)
    filmed = [row for row in evaluation.rows if row.video]
    assert [row.episode.index for row in filmed[:2]] == [0, 1]
    assert any(not row.success for row in filmed)  # a failure was filmed, if need be afterwards
    for row in filmed:
        with av.open(tmp_path / row.video) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert len(pictures) == 1 + row.steps + 8  # reset, steps, 0.8 s at 10 Hz
        assert pictures[0].shape[0] >= 192
        for rgb in COLOURS.values():
            assert (np.abs(pictures[0].astype(int) - rgb).max(-1) < 40).any()


def test_only_films_of_the_evaluation_before_are_removed(tmp_path):
    settings = job(output=tmp_path, videos=2, controls=False, episodes=3)
    evaluate(ToyPolicy(), settings, progress=False).save(tmp_path)
    (tmp_path / "videos" / "mine.mp4").write_bytes(b"")
    wrong = replace(settings, env=replace(TOY, kwargs={"cameras": ["wrist"]}))
    with pytest.raises(ValueError, match="does not fit"):
        evaluate(ToyPolicy(), wrong, progress=False)
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 3
    again = replace(settings, evaluate=replace(settings.evaluate, videos=1))
    evaluate(ToyPolicy(), again, progress=False)
    films = sorted(path.name for path in (tmp_path / "videos").glob("*.mp4"))
    assert films == ["default-0000-standard.mp4", "mine.mp4"]


def test_films_of_an_environment_without_a_renderer(tmp_path):
    settings = job(LINE, tmp_path, videos=1, controls=False, episodes=2)
    evaluation = evaluate(LinePolicy(), settings, progress=False)
    assert (tmp_path / evaluation.rows[0].video).stat().st_size > 500


BAD_SPACES = {
    "flat picture": ("observation.images.eye", gym.spaces.Box(0, 255, (8, 10), np.uint8)),
    "four channels": ("observation.images.eye", gym.spaces.Box(0, 255, (8, 10, 4), np.uint8)),
    "float picture": ("observation.images.eye", gym.spaces.Box(0, 1, (8, 10, 3), np.float32)),
    "square state": ("observation.state", gym.spaces.Box(-1, 1, (3, 3), np.float32)),
    "scalar state": ("observation.state", gym.spaces.Box(-1, 1, (), np.float32)),
    "discrete state": ("observation.state", gym.spaces.Discrete(3)),
}


@pytest.mark.parametrize(("key", "space"), BAD_SPACES.values(), ids=BAD_SPACES.keys())
def test_spaces_no_policy_knows_are_refused(key, space):
    spaces = gym.spaces.Dict({**Line.observation_space.spaces, key: space})
    with pytest.raises(ValueError, match=r"(?s)spaces do not fit. got: .*expected: .*remedy"):
        Features.of_spaces(spaces, Line.action_space, 10)


def test_wilson_known_values():
    assert wilson(85, 100) == pytest.approx((0.7671644040916763, 0.9069401471634337))  # scipy.stats.binomtest
    assert wilson(0, 10) == pytest.approx((0.0, 1.96**2 / (10 + 1.96**2)), abs=1e-4)  # its closed form at 0
    assert wilson(0, 0) == (0.0, 1.0)
    assert rate([])["success_rate"] is None


def test_wilson_inverts_the_score_test():
    low, high = wilson(37, 50)
    for bound in (low, high):  # at its bounds the observed share is exactly 1.96 standard errors away
        assert abs(37 / 50 - bound) / np.sqrt(bound * (1 - bound) / 50) == pytest.approx(1.959964, rel=1e-6)


def test_no_absolute_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"root": str(tmp_path / "a" / "b"), "other": "/somewhere/else", "list": ("x", tmp_path / "y")}
    assert portable(config) == {"root": "a/b", "other": "else", "list": ["x", "y"]}
