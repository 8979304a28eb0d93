"""One training step: its parts, what it must not do on a GPU, and the capture that makes it one launch."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_without_gpu import CUDA, NoHost, backward_of, fake_cuda, to_cuda
from toy_run import toy_job, toy_model, toy_step, toy_store

from vla.captured import WARM, Captured
from vla.config import ConfigError, TextConfig, TrainConfig
from vla.data.samples import Samples
from vla.model.vla import VLA
from vla.training.average import Average
from vla.training.step import TrainStep

SCRATCH = TextConfig(encoder="scratch", frozen=False, lr_multiplier=1.0, width=16, layers=1, heads=2)


@pytest.mark.parametrize("parts", [2, 8])
def test_a_batch_in_parts_teaches_the_same(parts: int) -> None:
    job = toy_job(Path(), toy_model(dropout=0.0))
    whole, apart = toy_step(job), toy_step(replace(job, train=replace(job.train, accumulate=parts)))
    assert apart(0)["loss"].item() == pytest.approx(whole(0)["loss"].item(), rel=1e-6)
    for mine, other in zip(apart.model.parameters(), whole.model.parameters(), strict=True):
        if other.grad is not None:
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-7, rtol=1e-5)
    for i in range(1, 4):  # AdamW turns the last bits of small gradients into steps
        assert apart(i)["loss"].item() == pytest.approx(whole(i)["loss"].item(), rel=1e-3)


def test_parts_weigh_as_many_actions_as_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    step = toy_step(toy_job(Path(), toy_model(dropout=0.0, prefix_probability=0.9), accumulate=4))
    index = torch.tensor(
        [0, 1, 2, 3, *step.feed.samples.last[[0, 0, 0, 0]].tolist()]
    )  # half are mostly padding
    monkeypatch.setattr(step.feed.samples, "draw", lambda *_: index)
    batch = step.feed.samples.batch(index)
    twin = toy_step(replace(step.job, train=replace(step.config, accumulate=1)))
    monkeypatch.setattr(twin.feed.samples, "draw", lambda *_: index)
    assert batch.action_is_pad.any()
    assert step(0)["loss"].item() == pytest.approx(twin(0)["loss"].item(), rel=1e-6)


def test_parts_must_divide_the_batch() -> None:
    with pytest.raises(
        ConfigError, match="train.accumulate: got 3, expected a divisor of train.batch_size=8"
    ):
        TrainConfig(batch_size=8, accumulate=3)


def test_steps_leave_everything_in_its_place() -> None:
    """What a graph has captured, it reads and writes at the same addresses for ever."""
    step = toy_step(toy_job(Path(), toy_model(), steps=6))

    def places() -> list[int]:
        slots = [value for state in step.optimizer.state.values() for value in state.values()]
        rates = [group["lr"] for group in step.optimizer.param_groups]
        own = [step.number, step.failed, step.failed_index]
        tensors = [*step.model.parameters(), *step.average.weights.values(), *slots, *rates, *own]
        return [tensor.data_ptr() for tensor in tensors]

    step(0)
    before = places()
    for i in range(1, 4):
        step(i, measure=i % 2 == 0)
    assert places() == before


@pytest.mark.parametrize("share", [0.9, 0.3, 1e-3])
def test_a_share_in_a_tensor_moves_the_average_alike(share: float) -> None:
    model = torch.nn.Linear(8, 8)
    one, other = Average(model, 0.99), Average(model, 0.99)
    torch.nn.init.normal_(model.weight)
    one.update(model, share)
    other.update(model, torch.tensor(share))
    for name, weight in one.weights.items():
        torch.testing.assert_close(other.weights[name], weight)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "l1": ({}, {}),
    "in parts": ({}, {"accumulate": 2}),
    "bins": ({"head": "bins"}, {}),
    "gmm": ({"head": "gmm"}, {}),
    "flow": ({"head": "flow"}, {}),
    "autoregressive": ({"decoding": "autoregressive"}, {}),
    "history, in parts again": ({"n_obs_steps": 2, "checkpointing": True, "feed_forward_chunks": 2}, {}),
    "text that trains": ({"text": SCRATCH}, {}),
}


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_nothing_waits_for_a_gpu(option: str, measure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model_options, train_options = OPTIONS[option]
    job = toy_job(Path(), toy_model(**model_options), precision="bf16", capture=False, **train_options)
    store = toy_store()
    model = VLA(job.model, store.features, store.statistics(), instructions=store.tasks).train()
    with fake_cuda(monkeypatch) as mode:
        to_cuda(model, mode)
        monkeypatch.setattr(torch.Tensor, "backward", backward_of(model))
        step = TrainStep(model, Samples(store, 4, job.model.n_obs_steps, CUDA, 0.3), job, store.tasks)
        step(0)  # makes the optimiser's state
        with NoHost():
            metrics = step(1, measure)
    assert {"loss", "grad_norm"} <= metrics.keys()
    assert ("action_error" in metrics) == measure
    assert {value.device for value in metrics.values()} == {CUDA}


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_waiting_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        x = torch.zeros(3, device=CUDA)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            x.sum().item()
        with pytest.raises(RuntimeError, match="two different devices"):
            x + torch.zeros(3)
        with NoHost(), pytest.raises(RuntimeError, match="between host and device"):
            torch.zeros(3).to(CUDA)


def test_capture_runs_warms_and_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of things with a graph that only counts: what torch does with it needs a GPU."""
    log: list[str] = []
    streams: list[torch.device] = []  # a stream decides on which device a graph is made

    def stream(device: torch.device) -> SimpleNamespace:
        streams.append(device)
        return SimpleNamespace(wait_stream=lambda other: None, device=device)

    class Graph:
        def register_generator_state(self, generator: torch.Generator) -> None:
            log.append("generator")

        def pool(self) -> str:
            return "pool"

        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def capture(graph: Graph, pool: Any, stream: SimpleNamespace, capture_error_mode: str) -> Any:
        log.append(f"capture into {pool} on {stream.device}")
        yield

    for name, value in {
        "Stream": stream, "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "CUDAGraph": Graph,
        "stream": lambda other: nullcontext(), "synchronize": lambda device: None, "graph": capture,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    second_gpu = torch.device("cuda", 1)
    first = Captured(lambda: log.append("run") or len(log), second_gpu, [torch.Generator()])
    outputs = [first() for _ in range(WARM + 2)]
    assert log == ["run"] * WARM + ["generator", "capture into None on cuda:1", "run", "replay", "replay"]
    assert outputs[-1] == outputs[-2]  # the graph's own outputs, each time
    log.clear()
    second = Captured(lambda: log.append("other"), second_gpu, pool=first)
    for _ in range(WARM + 1):
        second()
    assert log == ["other"] * WARM + ["capture into pool on cuda:1", "other", "replay"]
    assert streams == [second_gpu]  # one for both


def test_a_capture_that_fails_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Captured(lambda: 1 / 0, CUDA)
    run.warm = WARM
    for name in ("CUDAGraph", "Stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run()


def test_elsewhere_every_call_runs() -> None:
    calls: list[int] = []
    run = Captured(lambda: calls.append(0), torch.device("cpu"))
    for _ in range(WARM + 3):
        run()
    assert len(calls) == WARM + 3


def test_batches_brought_from_the_host_teach_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    job = toy_job(Path(), toy_model(), steps=6)
    inside = toy_step(job)
    expected = [inside(i)["loss"].item() for i in range(6)]
    monkeypatch.setattr(Samples, "resident", False)
    brought = toy_step(job)
    assert [brought(i)["loss"].item() for i in range(3)] == expected[:3]
    saved = {name: tensor.clone() for name, tensor in brought.state().items()}
    brought.feed.close()
    resumed = toy_step(job)  # its thread had drawn further: what was not used is drawn again
    resumed.load_state(saved)
    assert [resumed(i)["loss"].item() for i in range(3, 6)] == expected[3:]
    resumed.feed.close()


def test_random_numbers_of_another_device_do_not_resume() -> None:
    step = toy_step(toy_job(Path(), toy_model()))
    step(0)
    for name in ("random.samples", "random.noise"):
        state = step.state() | {name: torch.zeros(16, dtype=torch.uint8)}  # the size of a GPU's
        with pytest.raises(
            ValueError, match="got: random numbers drawn on the GPU. expected: on the CPU .*remedy"
        ):
            toy_step(step.job).load_state(state)


def test_a_state_is_loaded_into_the_tensors_that_are_there() -> None:
    step = toy_step(toy_job(Path(), toy_model()))
    step(0)
    saved = {name: tensor.clone() for name, tensor in step.state().items()}
    before = {p: dict(slots) for p, slots in step.optimizer.state.items()}
    step(1)
    step.load_state(saved)
    for parameter, slots in before.items():
        for key, tensor in slots.items():
            assert step.optimizer.state[parameter][key] is tensor
    for name, tensor in step.state().items():
        assert torch.equal(tensor, saved[name]), name
