"""Ranks: one process is left as it was, and what many are refused for; flags that change no result."""

from __future__ import annotations

import copy
import functools
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_run import toy_job, toy_model, toy_step

from vla.config import ConfigError, TrainConfig
from vla.training.launched import Launched, is_connection
from vla.training.ranks import Ranks, Share, laid_out, require_even, start, whole

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


def environment(monkeypatch: pytest.MonkeyPatch, **changed: str) -> None:
    for name, value in (LAUNCHED | changed).items():
        monkeypatch.setenv(name, value)


# One process


def test_alone_a_rank_is_everything_and_needs_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # importing it fails
    ranks = start("cpu", TrainConfig(batch_size=7))
    assert (ranks.index, ranks.count, ranks.beside, ranks.main, ranks.sharded) == (0, 1, 1, True, False)
    model, samples, tensor = torch.nn.Linear(2, 2), object(), torch.ones(2)
    assert ranks.prepare(model, torch.optim.SGD(model.parameters())) is model
    assert ranks.twin(model) is model
    assert ranks.share(samples) is samples
    assert ranks.sum(tensor) is tensor
    assert ranks.part(6) == slice(0, 6)
    assert ranks.mine([1, 2, 3]) == ranks.gather([1, 2, 3]) == [1, 2, 3]
    assert whole(tensor) is laid_out(tensor, torch.zeros(2)) is tensor
    before = torch.get_rng_state()
    ranks.reseed(0, 5)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(KeyError), ranks.together("train", str):
        raise KeyError


def test_ranks_need_no_torch() -> None:
    program = "import sys, vla.training.ranks as r; r.Ranks(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


# Several


class Second(Ranks):
    index, count = 1, 3


def test_every_sample_is_one_ranks_and_every_item() -> None:
    ranks = [type("", (Ranks,), {"index": i, "count": 3})() for i in range(3)]
    batch, items = list(range(12)), list("abcdefgh")
    assert [x for rank in ranks for x in batch[rank.part(12)]] == batch
    assert sorted(x for rank in ranks for x in rank.mine(items)) == items
    assert [rank.main for rank in ranks] == [True, False, False]


def test_a_share_gathers_its_part_of_the_frames() -> None:
    step = toy_step(toy_job(Path()))
    samples = step.feed.samples
    share = Share(samples, Second())
    index = torch.arange(6) * 2
    assert len(share) == len(samples)
    for name in ("batch", "gather"):
        mine, all_of_it = getattr(share, name)(index), getattr(samples, name)(index)
        assert torch.equal(mine.action, all_of_it.action[2:4])
        assert torch.equal(mine.images["front"], all_of_it.images["front"][2:4])
    drawn = [s.draw(8, torch.Generator().manual_seed(3)) for s in (share, samples)]
    assert torch.equal(*drawn)


def test_a_batch_must_be_as_many_parts_of_one_size() -> None:
    require_even(2, TrainConfig(batch_size=12, accumulate=3))
    with pytest.raises(
        ConfigError, match=r"train.batch_size: got 8, expected a multiple of 6, 3 ranks times .*=2"
    ):
        require_even(3, TrainConfig(batch_size=8, accumulate=2))


def test_a_job_that_does_not_fit_is_refused_before_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch)
    monkeypatch.setattr(Launched, "_connect", lambda self: pytest.fail("it connected"))
    with pytest.raises(ConfigError, match="train.batch_size: got 3, expected a multiple of 2"):
        start("cpu", TrainConfig(batch_size=3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ConfigError, match="device: got 'cuda:0', expected auto, cpu or cuda: each of several"
    ):
        start("cuda:0")
    with pytest.raises(ConfigError, match="ranks: got 2, expected at most one for each of the 1 GPUs here"):
        start("auto")


def test_each_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
    monkeypatch.setattr(Launched, "_connect", lambda self: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert start("auto").device == torch.device("cuda:1")
    assert start("cpu").device == torch.device("cpu")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, ACCELERATE_USE_FSDP="true")
    with pytest.raises(ConfigError, match=r"FSDP_VERSION: got '1', expected 2. remedy: accelerate launch"):
        start("cpu")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        ConfigError, match=r'ranks: got 2, expected 1, as .* remedy: pip install "vla\[ranks\]"'
    ):
        start("cpu")


def test_a_lost_rank_is_told_from_other_errors() -> None:
    assert is_connection(
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed")
    )
    assert is_connection(torch.distributed.DistBackendError("NCCL error"))
    assert not is_connection(RuntimeError("CUDA out of memory"))
    assert not is_connection(ValueError("gloo"))


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_last_words_are_said_inside_a_call_that_does_not_return() -> None:
    program = """
import ctypes
from vla.training.launched import last_words
with last_words(lambda: print("told", flush=True)):
    print("ready", flush=True)
    while True:  # a handler in Python would run in between, this one has no need to
        ctypes.CDLL(None).sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (128 + signal.SIGTERM, "told\n")


# Flags that change speed and memory, and nothing else

PLAIN = {"dropout": 0.0, "head": "bins", "bins": 16}


def losses(model: dict[str, Any], **train: Any) -> tuple[list[float], dict[str, Tensor]]:
    step = toy_step(toy_job(Path(), toy_model(**PLAIN | model), **train))
    return [step(i)["loss"].item() for i in range(3)], copy.deepcopy(step.model.state_dict())


FLAGS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "checkpointing": ({"checkpointing": True}, {}, 0.0),
    "accumulate": ({}, {"accumulate": 4}, 1e-6),
    "both": ({"checkpointing": True}, {"accumulate": 4}, 1e-6),
    "bf16": ({}, {"precision": "bf16"}, 2e-2),
    "bf16 and both": ({"checkpointing": True}, {"accumulate": 4, "precision": "bf16"}, 2e-2),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_changes_no_loss(flag: str) -> None:
    model, train, tolerance = FLAGS[flag]
    got, expected = losses(model, **train)[0], losses({})[0]
    assert got == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, which compiles
@pytest.mark.parametrize("flag", ["alone", "all"])
def test_a_compiled_step_changes_no_loss(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, train, tolerance = {"alone": ({}, {}, 1e-5), "all": FLAGS["bf16 and both"]}[flag]
    if flag == "all":  # traced and run as written: g++ takes minutes
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    got = losses(model, compile=True, **train)[0]
    assert got == pytest.approx(losses({})[0], rel=tolerance)


def kept_bytes(**model: Any) -> int:
    """What one forward pass keeps for the way back."""
    step = toy_step(toy_job(Path(), toy_model(**PLAIN | model)))
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step(0)
    return sum(kept.values())


def test_checkpointing_keeps_less_of_the_backbone_too() -> None:
    deep = {"image_depth": 8, "n_encoder_layers": 1}
    assert kept_bytes(checkpointing=True, **deep) < 0.5 * kept_bytes(**deep)
    shallow = {"image_depth": 1, "n_encoder_layers": 1}
    more = kept_bytes(checkpointing=True, **deep) - kept_bytes(checkpointing=True, **shallow)
    assert more < 0.2 * (kept_bytes(**deep) - kept_bytes(**shallow))
