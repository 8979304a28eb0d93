"""Training: resumed equals uninterrupted, one batch is learned, and what stops a run says why."""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from load_script import load_script
from safetensors.torch import load_file
from toy_run import metrics, toy_job, toy_model, toy_step, toy_store

from vla.config import ConfigError, DataConfig, Job, TrainConfig
from vla.observation import Observation
from vla.training import checkpoint
from vla.training.loop import train
from vla.training.step import learning_rate
from vla.training.track import Tracker

ROOT = Path(__file__).resolve().parents[1]


class Interrupted(Exception):
    pass


def look(path: Path, step: int) -> tuple[dict[str, float], list[Path]]:
    """An evaluation that draws random numbers, as loading a policy does."""
    return {"success": float(torch.rand(()) >= 0)}, []


def interrupt(path: Path, step: int) -> tuple[dict[str, float], list[Path]]:
    raise Interrupted


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = toy_job(tmp_path_factory.mktemp("whole") / "run", steps=5, save_every=2, evaluate_every=3)
    train(job, toy_store(), evaluate=look)
    return job


# Resuming


@pytest.mark.parametrize("lost", [False, True], ids=["at a checkpoint", "behind a checkpoint"])
def test_a_resumed_run_equals_an_uninterrupted_one(uninterrupted: Job, tmp_path: Path, lost: bool) -> None:
    job = replace(uninterrupted, output=str(tmp_path / "run"))
    with pytest.raises(Interrupted):
        train(job, toy_store(), evaluate=interrupt)
    if lost:  # killed while it wrote the checkpoint of step 3: what came behind step 2 happens again
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000003")
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')  # and while it wrote a row
    resumed = train(job, toy_store(), resume=True, evaluate=look)
    rows = [row for row in metrics(uninterrupted) if lost or "success" not in row or row["step"] == 5]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]
    assert metrics(job) == rows  # floats survive JSON exactly
    whole = checkpoint.find(uninterrupted.output)
    for name in ("model.safetensors", "training.safetensors"):
        mine, theirs = load_file(resumed / name), load_file(whole / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), name
    kinds = {key.split(".")[0] for key in load_file(whole / "training.safetensors")}
    assert kinds == {"weights", "adamw", "average", "random"}


def test_another_seed_is_another_run(uninterrupted: Job, tmp_path: Path) -> None:
    job = replace(uninterrupted, output=str(tmp_path / "run"), seed=1)
    train(job, toy_store(), evaluate=look)
    assert metrics(job) != metrics(uninterrupted)


def test_a_finished_run_is_left_alone(
    uninterrupted: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    before = metrics(uninterrupted)
    job = replace(uninterrupted, train=replace(uninterrupted.train, wandb="offline"))
    assert train(job, toy_store(), resume=True) == checkpoint.find(uninterrupted.output)
    assert metrics(job) == before
    assert capsys.readouterr() == ("", "")


def test_checkpoints_are_not_trained_over(uninterrupted: Job) -> None:
    with pytest.raises(ConfigError, match="a folder without checkpoints. remedy: go on with --resume"):
        train(uninterrupted, toy_store())


def test_another_job_does_not_resume(uninterrupted: Job) -> None:
    job = replace(
        uninterrupted,
        seed=3,
        model=toy_model(d_ff=96),
        data=DataConfig(shift=1),
        train=replace(uninterrupted.train, lr=2e-3, steps=9, log_every=7),
    )
    with pytest.raises(ConfigError) as caught:
        train(job, toy_store(), resume=True)
    fields, _, rest = str(caught.value).partition(": got ")
    assert fields == "seed, model.d_ff, data.shift, train.lr"
    assert "'3, 96, 1, 0.002', expected 0, 64, 2, 0.001 as in checkpoint step_00000005. remedy: " in rest


def test_more_steps_go_on(uninterrupted: Job, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted.output, tmp_path / "run")
    longer = replace(uninterrupted.train, steps=6, evaluate_every=0)
    job = replace(uninterrupted, output=str(tmp_path / "run"), train=longer)
    assert train(job, toy_store(), resume=True).name == "step_00000006"
    assert metrics(job)[:-1] == metrics(uninterrupted)
    assert metrics(job)[-1]["lr"] == learning_rate(5, longer)


def test_rows_behind_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    job = toy_job(tmp_path)
    tracker = Tracker(job)
    for step in range(1, 6):
        tracker.log(step, loss=step / 10)
    Tracker(job, 3)
    assert [row["step"] for row in metrics(job)] == [1, 2, 3]
    Tracker(job)  # a new run starts anew
    assert metrics(job) == []


# One step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fusion", ["concat", "cross"])
def test_checkpointing_changes_no_step(precision: str, fusion: str) -> None:
    losses = []
    for checkpointing in (False, True):
        model = toy_model(checkpointing=checkpointing, dropout=0.0, fusion=fusion)
        step = toy_step(toy_job(Path(), model, precision=precision))
        losses.append([step(i)["loss"].item() for i in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses = []
    for compiled in (False, True):
        step = toy_step(toy_job(Path(), toy_model(dropout=0.0, decoding="autoregressive"), compile=compiled))
        losses.append([step(i)["loss"].item() for i in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


ANSWERS = [("parallel", head) for head in ("l1", "bins", "gmm", "flow")] + [
    ("autoregressive", head) for head in ("l1", "bins", "gmm")
]


@pytest.mark.slow
@pytest.mark.parametrize(("decoding", "head"), ANSWERS)
def test_a_few_samples_are_answered_by_heart(decoding: str, head: str) -> None:
    """The whole network, in the robot's units and decoded as on the robot."""
    plain = {"dropout": 0.0, "prefix_probability": 0.0, "bins": 64, "components": 2}
    data, steps = DataConfig(brightness=0, contrast=0, shift=0), 500
    model = toy_model(**plain, decoding=decoding, head=head)
    step = toy_step(toy_job(Path(), model, data, steps=steps, lr=3e-3, weight_decay=0.0), toy_store(1))
    for i in range(steps):
        step(i, measure=False)
    samples = step.feed.samples
    batch = samples.batch(torch.arange(len(samples)))
    seen = Observation(batch.images, batch.state, step.model.text.encode(step.loss.words[batch.task]))
    with torch.no_grad():
        chunk = step.model.eval().predict_chunk(seen)
    error = (chunk - batch.action).abs().mean(dim=2)[~batch.action_is_pad]
    spread = (batch.action - batch.action.mean(dim=(0, 1))).abs().mean()
    assert error.mean() < 0.25 * spread


@pytest.mark.slow
def test_a_few_samples_are_learned_by_heart() -> None:
    plain = {"dropout": 0.0, "prefix_probability": 0.0}
    data = DataConfig(brightness=0, contrast=0, shift=0)
    steps = 300
    job = toy_job(Path(), toy_model(**plain), data, steps=steps, lr=3e-3, weight_decay=0.0)
    step = toy_step(job, toy_store(1))
    losses = [step(i)["loss"].item() for i in range(steps)]
    assert sum(losses[-5:]) < sum(losses[:5]) / 10


def test_frozen_text_takes_no_part() -> None:
    step = toy_step(toy_job(Path()))
    step(0)
    optimised = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    frozen, rest = [], []
    for name, p in step.model.named_parameters():
        (frozen if name.startswith("text.") else rest).append(p)
    assert frozen
    assert not any(id(p) in optimised or p.requires_grad or p.grad is not None for p in frozen)
    assert all(id(p) in optimised for p in rest)
    assert not any(name.startswith("text.") for name in step.average.weights)


def test_tuned_text_takes_part(tmp_path: Path) -> None:
    model = toy_model()
    job = toy_job(tmp_path, replace(model, text=replace(model.text, frozen=False, lr_multiplier=0.5)))
    step = toy_step(job)
    before = {n: p.detach().clone() for n, p in step.model.text.named_parameters() if p.requires_grad}
    step(0)
    assert all((p != before[n]).any() for n, p in step.model.text.named_parameters() if n in before)
    multipliers = {group["lr_multiplier"]: group["lr"] for group in step.optimizer.param_groups}
    rate = learning_rate(0, job.train)
    assert multipliers == {1.0: rate, 0.5: rate / 2}


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    config = TrainConfig(steps=110, warmup_steps=10, lr=2.0)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates[110] == pytest.approx(0.0)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert learning_rate(0, TrainConfig(warmup_steps=0, lr=2.0)) == 2.0


def test_the_average_follows_its_formula() -> None:
    step = toy_step(toy_job(Path(), steps=30, ema_decay=0.6))
    name = "head.out.weight"
    weight = dict(step.model.named_parameters())[name]
    expected = weight.detach().double().clone()
    for i in range(10):
        step(i)
        decay = min(0.6, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * weight.detach().double()
    torch.testing.assert_close(step.average.weights[name].double(), expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(step.average.weights[name], weight)


def test_without_average_the_live_weights_are_deployed(tmp_path: Path) -> None:
    path = train(toy_job(tmp_path, steps=2, ema_decay=0.0), toy_store())
    deployed, live = load_file(path / "model.safetensors"), load_file(path / "training.safetensors")
    assert torch.equal(deployed["head.out.weight"], live["weights.head.out.weight"])


def test_the_average_is_deployed(uninterrupted: Job) -> None:
    path = checkpoint.find(uninterrupted.output)
    deployed, live = load_file(path / "model.safetensors"), load_file(path / "training.safetensors")
    assert torch.equal(deployed["head.out.weight"], live["average.head.out.weight"])
    assert not torch.equal(deployed["head.out.weight"], live["weights.head.out.weight"])


def test_gradients_are_clipped() -> None:
    norm = toy_step(toy_job(Path(), grad_clip=1e9))(0)["grad_norm"]
    assert norm > 0.1
    clipped = toy_step(toy_job(Path(), grad_clip=1e-2))  # draws the same numbers
    torch.testing.assert_close(clipped(0)["grad_norm"], norm)  # reported as it was
    grads = [p.grad for p in clipped.model.parameters() if p.grad is not None]
    torch.testing.assert_close(torch.nn.utils.get_total_norm(grads), torch.tensor(1e-2), atol=1e-4, rtol=0)


# What stops a run


def test_a_diverging_run_stops_and_names_its_last_checkpoint(tmp_path: Path) -> None:
    job = toy_job(tmp_path, lr=1e30, warmup_steps=0, grad_clip=1e30, save_every=1, batch_size=16)
    said = (
        r"got a loss or gradient that is not finite at step 2, of frames \d+, .*8 more.*remedy.*step_00000001"
    )
    with pytest.raises(FloatingPointError, match=said) as caught:
        train(job, toy_store())
    assert "\n" not in str(caught.value)
    written = json.loads((tmp_path / "diverged.json").read_text())
    assert written["step"] == 2
    twin = toy_step(job)
    twin(0)
    twin(1)
    assert twin.failure() == (1, written["frames"])  # the frames of that step, not of an earlier one
    assert len(set(written["frames"])) > 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    job = toy_job(tmp_path, lr=1e30, warmup_steps=0, grad_clip=1e30, log_every=100, save_every=3)
    with pytest.raises(FloatingPointError, match="not finite at step 2.*none yet"):  # though noticed at 3
        train(job, toy_store())
    assert checkpoint.checkpoints(tmp_path / "checkpoints") == []


def test_wandb_is_not_needed_when_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    train(toy_job(tmp_path, steps=1), toy_store())
    with pytest.raises(ImportError):
        Tracker(toy_job(tmp_path, wandb="offline"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of wandb
def test_wandb_offline_writes_a_run(tmp_path: Path) -> None:
    train(toy_job(tmp_path, steps=2, wandb="offline"), toy_store())
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


# The script


def script() -> Any:
    return load_script("train")


@pytest.mark.slow
def test_training_evaluates_itself(tmp_path: Path) -> None:
    job = toy_job(tmp_path, steps=2, evaluate_every=1, evaluate_episodes=2)
    train(job, toy_store(), evaluate=script().evaluation_of(job))
    rates = [row["success"] for row in metrics(job) if "success" in row]
    assert len(rates) == 2  # at step 1 and at the end
    assert 0 <= rates[0] <= 1
    films = list((tmp_path / "evaluations" / "step_00000001").rglob("*.mp4"))
    assert len(films) == 2
