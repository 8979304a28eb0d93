"""An evaluation that was killed goes on: what was played stays, what is missing is played, nothing else changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import psutil
import pytest
from toy_env import ToyEnv, ToyPolicy

from vla.config import EnvConfig, EvaluateConfig, Job, dump
from vla.evaluation import Evaluation, evaluate
from vla.evaluation.episodes import STANDARD, Episode, Row
from vla.evaluation.kept import Kept
from vla.evaluation.rollouts import Clock
from vla.training.ranks import Ranks

REPO = Path(__file__).parent.parent
PARTIAL = "evaluation.partial.jsonl"
CONFIG = EvaluateConfig(episodes=12, slots=5, workers=1, n_action_steps=4, videos=2)
FEW = {"max_episode_steps": 6}  # too few steps for some scenes


def job(output: Path, env: EnvConfig | None = None, **changes: Any) -> Job:
    env = env or EnvConfig("toy_env:Toy-v0", FEW)
    return Job(output=str(output), env=env, evaluate=replace(CONFIG, **changes))


def films(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in (folder / "videos").iterdir()}


def kept_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["row"] for line in (folder / PARTIAL).read_text().splitlines()[1:]]


# A real kill


class Gated(ToyEnv):
    """The toy, which writes down what it plays, and at seed `at` waits until a file is there."""

    def __init__(self, log: str, gate: str, at: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.log, self.gate, self.at = Path(log), Path(gate), at

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        with self.log.open("a") as file:
            file.write(f"{seed} {(options or {}).get('task')}\n")
        while seed == self.at and not self.gate.exists():
            time.sleep(0.01)
        return super().reset(seed=seed, options=options)


if "Gated-v0" not in gym.registry:
    gym.register("Gated-v0", entry_point=Gated, max_episode_steps=6)


def play(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPO / "scripts" / "evaluate.py"), "--expert", "job.yaml"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")])}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_evaluation_goes_on_with_the_same_command(tmp_path):
    log, gate = tmp_path / "log", tmp_path / "gate"
    env = EnvConfig(f"{__name__}:Gated-v0", {"log": str(log), "gate": str(gate), "at": CONFIG.seed + 8})
    mine = job(tmp_path / "run", env, slots=3, controls=False)
    (tmp_path / "job.yaml").write_text(dump(mine))
    folder = tmp_path / "run" / "expert"
    with play(tmp_path) as process:
        while not (log.is_file() and str(CONFIG.seed + 8) in log.read_text()):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        [worker] = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
    assert not (folder / "evaluation.json").exists()
    done = [row["episode"]["seed"] for row in kept_rows(folder)]
    assert 4 <= len(done) < 8
    gate.touch()
    worker.wait(10)  # nobody is there to tell it what to do
    log.unlink()

    process = play(tmp_path)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"evaluation: {len(done)} of 12 episodes are there already\n" in printed
    played = [int(line.split()[0]) for line in log.read_text().splitlines()]
    expected = {CONFIG.seed + index for index in range(12)} - set(done)
    assert expected == set(played)
    data = json.loads((folder / "evaluation.json").read_text())
    whole = evaluate(None, replace(mine, output=str(tmp_path / "whole")), progress=False)
    assert data["episodes"] == [row.as_dict() for row in whole.rows]
    assert (data["time"]["parts"], whole.as_dict(tmp_path)["time"]["parts"]) == (2, 1)
    assert data["time"]["env_steps"] >= sum(row["steps"] for row in data["episodes"])
    assert films(folder) == {row["video"] for row in data["episodes"] if row["video"]}
    for film in films(folder):
        with av.open(folder / film) as container:
            assert sum(1 for _ in container.decode(video=0)) > 8
    assert not list(folder.glob("*partial*"))


# Parts in one process


class Killed(Exception):
    pass


class Mortal(ToyPolicy):
    """The toy's policy, which ends the evaluation after so many calls; none of its answers depends on neighbours."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def predict_chunk(self, images: Any, state: Any, tasks: Any) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise Killed
        return super().predict_chunk(images, state, tasks)


class Other(Mortal):
    pass


def in_parts(settings: Job, calls: int) -> tuple[Evaluation, int]:
    """Killed again and again until it is through; how many parts it took."""
    for part in range(1, 20):
        try:
            return evaluate(Mortal(calls), settings, progress=False, keep=True), part
        except Killed:
            continue
    raise AssertionError("it never ends")


def test_controls_and_splits_go_on_too(tmp_path):
    splits = {"a": {}, "b": {"phrasing": 1}}
    whole = evaluate(Mortal(1000), job(tmp_path / "whole", splits=splits), progress=False)
    parted, parts = in_parts(job(tmp_path / "parts", splits=splits), calls=8)
    assert parts >= 3
    assert [row.as_dict() for row in parted.rows] == [row.as_dict() for row in whole.rows]
    assert films(tmp_path / "parts") == films(tmp_path / "whole")
    assert parted.clock.parts == parts
    assert parted.clock.env_steps > whole.clock.env_steps  # what was cut off counts, as its time does
    assert (tmp_path / "parts" / PARTIAL).is_file()  # nothing is lost before the result is written
    parted.save(tmp_path / "parts")
    assert not (tmp_path / "parts" / PARTIAL).exists()


def test_films_of_the_evaluation_before_are_not_mistaken(tmp_path):
    settings = job(tmp_path, controls=False)
    evaluate(Mortal(1000), settings, progress=False).save(tmp_path)
    before = films(tmp_path)
    with pytest.raises(Killed):
        evaluate(Mortal(5), settings, progress=False, keep=True)
    kept = {row["video"] for row in kept_rows(tmp_path) if row["video"]}
    assert kept
    made = {film: (tmp_path / film).stat().st_mtime_ns for film in kept}
    evaluate(Mortal(1000), settings, progress=False, keep=True)
    assert films(tmp_path) == before
    assert made == {film: (tmp_path / film).stat().st_mtime_ns for film in kept}  # not filmed again


@pytest.mark.parametrize("other", ["weights", "configuration"])
def test_rows_of_another_evaluation_are_replaced(tmp_path, capsys, other):
    settings = job(tmp_path, controls=False)
    with pytest.raises(Killed):
        evaluate(Mortal(5), settings, progress=False, keep=True)
    assert films(tmp_path)
    policy, differs = Mortal(1000), "env.kwargs, evaluate.videos"
    if other == "weights":
        policy, differs = Other(1000), "player"
    else:
        settings = job(tmp_path, EnvConfig("toy_env:Toy-v0"), controls=False, videos=0)
    evaluation = evaluate(policy, settings, progress=False, keep=True)
    assert (
        f"evaluation: begins anew, what was kept of another differs in {differs}\n" in capsys.readouterr().out
    )
    assert evaluation.clock.parts == 1
    assert films(tmp_path) == {row.video for row in evaluation.rows if row.video}
    assert len((tmp_path / PARTIAL).read_text().splitlines()) == 1 + 12


# The file


def row(index: int, video: str | None = None, split: str = "a") -> Row:
    episode = Episode(split, STANDARD, index, 100 + index, film=video is not None)
    return Row(episode, "größer", "tell", "skill", ["other"], index % 2 == 0, 7, True, False, video)


def opened(folder: Path, settings: Job, ranks: Ranks | None = None, player: str = "expert") -> Kept:
    kept = Kept(folder, settings, player, ranks or Ranks())
    kept.begin(12)
    return kept


def test_a_row_comes_back_as_it_was(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "b.mp4").touch()
    rows = [row(0), row(1, "videos/gone.mp4"), row(2, "videos/b.mp4")]
    kept = opened(tmp_path, job(tmp_path))
    assert (kept.rows, kept.part, kept.clock) == ([], 0, None)
    for number, one in enumerate(rows):
        kept.add(one, Clock(wall_s=number + 1.0, env_steps=10 * number))
    again = opened(tmp_path, job(tmp_path, workers=7, device="cuda", launch="eager"))  # at most the last bits
    assert again.rows == [rows[0], rows[2]]  # the one whose film is gone is played again
    assert (again.part, again.films) == (1, {"b.mp4"})
    again.add(rows[1], Clock(wall_s=5.0, env_steps=1))
    assert Kept(tmp_path, job(tmp_path), "expert", Ranks()).clock == Clock(8.0, env_steps=21, parts=2)


def test_a_file_torn_anywhere_keeps_its_whole_lines(tmp_path):
    kept = opened(tmp_path, job(tmp_path))
    for number in range(3):
        kept.add(row(number), Clock())
    whole = (tmp_path / PARTIAL).read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in {*range(0, len(whole), 131), *ends, *(end - 1 for end in ends), len(whole)}:
        (tmp_path / PARTIAL).write_bytes(whole[:cut])
        # a line whose end alone is missing is whole
        expected = max(0, sum(end - 1 <= cut for end in ends) - 1)
        again = opened(tmp_path, job(tmp_path))
        assert [r.episode.index for r in again.rows] == list(range(expected)), cut
        again.add(row(9), Clock())
        last = Kept(tmp_path, job(tmp_path), "expert", Ranks()).rows
        assert [r.episode.index for r in last] == [*range(expected), 9], cut


class Second(Ranks):
    index, count = 1, 2


def test_each_rank_keeps_its_own_and_the_first_reads_all(tmp_path, capsys):
    settings = job(tmp_path)
    first, second = opened(tmp_path, settings), opened(tmp_path, settings, Second())
    first.add(row(0), Clock(wall_s=2.0, env_steps=5))
    second.add(row(1), Clock(wall_s=4.0, env_steps=5))
    again = opened(tmp_path, settings)
    assert [r.episode.index for r in again.rows] == [1, 0]
    assert again.clock == Clock(wall_s=3.0, env_steps=10)  # side by side
    assert capsys.readouterr().out == "evaluation: 2 of 12 episodes are there already\n"
    opened(tmp_path, settings, player="other")
    assert [path.name for path in tmp_path.glob("*.jsonl")] == [PARTIAL]
