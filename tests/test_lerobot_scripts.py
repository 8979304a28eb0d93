"""LeRobot's own trainer on a dataset of this project: begin, go on, tune, adapt, and be told what is wrong.

It runs in this process, as its command would start it; one test starts the command itself.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_lerobot import FRONT, VLAPolicy, ours, toy_batch
from toy_run import text_folder

from vla.config import EnvConfig, RecordConfig
from vla.data.demonstrate import make_environment, merge_shards, write_shard
from vla.lerobot_plugin import convert
from vla.policy import Policy
from vla.training import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of lerobot and its dependencies

TINY = (
    "size=tiny", "d_model=32", "n_heads=2", "d_ff=64", "n_encoder_layers=1", "n_decoder_layers=1",
    "image_width=32", "image_depth=1", "image_heads=2", "image.pixels=32", "chunk_size=4", "max_prefix=2",
    "n_action_steps=2", "scheduler_warmup_steps=1", "optimizer_lr=1e-3", "precision=fp32", "ema_decay=0.9",
)  # fmt: skip
# LeRobot's loader draws from torch's generator when it begins, after a resumed run took its state back.
NOTHING_RANDOM = ("prefix_probability=0", "brightness=0", "contrast=0", "shift=0")
LAST = Path("checkpoints", "last", "pretrained_model")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    kind = EnvConfig("toy_env:Toy-v0")
    env, features = make_environment(kind)
    (folder / "parts").mkdir()
    _, report = multiprocessing.Pipe()
    record = RecordConfig(episodes=6, shard_episodes=6)
    write_shard(env, features, kind, record, 0, folder / "parts", report)
    merge_shards(folder / "parts", 1, folder / "dataset")
    return folder / "dataset"


def lerobot_train(dataset: Path, output: Path, *arguments: str) -> Path:
    """Run the command in this process; its output folder."""
    from lerobot.scripts.lerobot_train import train

    data = (f"--dataset.root={dataset}", "--dataset.repo_id=local/toy", "--dataset.video_backend=pyav")
    course = ("--batch_size=4", "--num_workers=0", "--log_freq=1", "--save_freq=2", "--env_eval_freq=0")
    if "--resume=true" not in arguments:
        arguments = (*data, *course, f"--output_dir={output}", *arguments)
    root = logging.getLogger()  # which the command changes for the whole process
    level = root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lerobot-train", *arguments])
        patch.setattr(root, "handlers", root.handlers.copy())
        try:
            train()
        finally:
            root.setLevel(level)
    return output


def fresh(*options: str) -> list[str]:
    text = f"--policy.text.encoder={text_folder()}"
    return [
        "--policy.type=vla",
        "--policy.device=cpu",
        text,
        *(f"--policy.{option}" for option in (*TINY, *options)),
    ]


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lerobot_train(
        dataset, tmp_path_factory.mktemp("lerobot") / "run", "--steps=4", *fresh(*NOTHING_RANDOM)
    )


def test_its_checkpoint_is_ours_too(run: Path) -> None:
    policy, theirs, batch = Policy.load(run, "cpu"), VLAPolicy.from_pretrained(run / LAST), toy_batch()
    assert policy.checkpoint == run / "checkpoints" / "000004" / "pretrained_model"
    np.testing.assert_array_equal(
        policy.predict_chunk(*ours(batch)), theirs.predict_action_chunk(batch).numpy()
    )
    assert (policy.features.fps, policy.job.train.lr, policy.job.evaluate.n_action_steps) == (10, 1e-3, 2)
    assert {path.name for path in (run / LAST).iterdir()} >= {
        "config.json", "train_config.json", "policy_preprocessor.json", "policy_postprocessor.json", "live.safetensors",
    }  # fmt: skip


def test_two_steps_and_two_more_are_four(run: Path, dataset: Path) -> None:
    """Weights, average and optimiser go on where they were, to the bit."""

    def state() -> dict[str, torch.Tensor]:
        step = run / "checkpoints" / "000004"
        names = ("pretrained_model/model", "pretrained_model/live", "training_state/optimizer_state")
        return {f"{n}/{k}": t for n in names for k, t in load_file(step / f"{n}.safetensors").items()}

    expected = state()
    shutil.rmtree(run / "checkpoints" / "000004")
    config = run / "checkpoints" / "000002" / "pretrained_model" / "train_config.json"
    lerobot_train(dataset, run, f"--config_path={config}", "--resume=true")
    got = state()
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    checkpoint.verify(run / LAST)


def test_tuning_begins_with_what_the_checkpoint_deploys(run: Path, dataset: Path, tmp_path: Path) -> None:
    source = convert.to_lerobot(checkpoint.find(run), tmp_path / "there")
    tuned = lerobot_train(
        dataset, tmp_path / "tuned", f"--policy.path={source}", "--policy.optimizer_lr=1e-12", "--policy.device=cpu",
        "--steps=2",
    )  # fmt: skip
    before, after = (Policy.load(path, "cpu").predict_chunk(*ours(toy_batch())) for path in (source, tuned))
    np.testing.assert_allclose(after, before, atol=1e-6)
    assert checkpoint.read_manifest(tuned / LAST)["step"] == 2


def test_lerobots_adapters(run: Path, dataset: Path, tmp_path: Path) -> None:
    from lerobot.configs import PreTrainedConfig
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.policies import make_policy

    arguments = (
        f"--policy.path={run / LAST}",
        "--peft.method_type=LORA",
        "--peft.r=2",
        "--policy.device=cpu",
    )
    output = lerobot_train(dataset, tmp_path / "peft", *arguments, "--steps=2")
    names = load_file(output / LAST / "adapter_model.safetensors")
    assert {name.split(".")[3] for name in names} == {"encoder", "decoder"}
    config = PreTrainedConfig.from_pretrained(output / LAST)
    config.pretrained_path = output / LAST
    policy = make_policy(config, ds_meta=LeRobotDatasetMetadata("local/toy", root=dataset)).eval()
    adapted: Any = policy
    base, batch = VLAPolicy.from_pretrained(run / LAST), toy_batch()
    assert not torch.equal(adapted.predict_action_chunk(batch), base.predict_action_chunk(batch))
    with adapted.disable_adapter():
        assert torch.equal(adapted.predict_action_chunk(batch), base.predict_action_chunk(batch))


def test_data_that_do_not_fit_are_named(run: Path, dataset: Path, tmp_path: Path) -> None:
    """After two seconds and not after the first batch."""
    from vla.checks import ConfigError

    with pytest.raises(ConfigError, match="policy.chunk_size: got 8, expected 4"):
        lerobot_train(
            dataset, tmp_path / "a", f"--policy.path={run / LAST}", "--policy.chunk_size=8", "--steps=2"
        )
    with pytest.raises(ConfigError, match=f"^{FRONT}: got .*this key in the batch.*--rename_map"):
        lerobot_train(
            dataset, tmp_path / "b", f"--policy.path={run / LAST}", "--steps=2",
            '--rename_map={"observation.images.front": "observation.images.top"}',
        )  # fmt: skip


def test_the_command_finds_the_policy_without_another_flag(dataset: Path, tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("lerobot-train")
    done = subprocess.run(
        [str(command), f"--dataset.root={dataset}", "--dataset.repo_id=local/toy", "--dataset.video_backend=pyav",
         "--batch_size=2", "--num_workers=0", "--steps=1", f"--output_dir={tmp_path / 'run'}", *fresh()],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert Policy.load(tmp_path / "run", "cpu").chunk_size == 4
