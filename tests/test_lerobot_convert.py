"""Checkpoints to LeRobot's layout and back: not a bit changes, and nothing is half there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from load_script import load_script
from toy_lerobot import VLAPolicy, ours, toy_batch, toy_config, toy_policy, toy_stats
from toy_run import toy_job, toy_model, toy_store

from vla.checks import ConfigError
from vla.lerobot_plugin import convert
from vla.manifest import CheckpointError
from vla.policy import Policy
from vla.training import checkpoint
from vla.training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of scripts/train.py."""
    output = tmp_path_factory.mktemp("run")
    train(toy_job(output, toy_model(head="flow")), toy_store())
    return output


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_there_and_back_no_output_changes(run: Path, tmp_path: Path) -> None:
    source, batch = checkpoint.find(run), toy_batch()
    there = convert.to_lerobot(source, tmp_path / "there")
    back = convert.from_lerobot(there, tmp_path / "back")
    expected = Policy.load(source, "cpu").predict_chunk(*ours(batch))
    for policy in (Policy.load(there, "cpu"), Policy.load(back, "cpu")):
        np.testing.assert_array_equal(policy.predict_chunk(*ours(batch)), expected)
    policy = VLAPolicy.from_pretrained(there)
    with torch.inference_mode():
        np.testing.assert_array_equal(policy.predict_action_chunk(batch).numpy(), expected)
    assert policy.config.n_action_steps == 2  # of the job
    kept = {name: content for name, content in files(source).items() if name.startswith(convert.DEPLOYED)}
    assert files(back).keys() == {*kept, "manifest.json", "config.json"}
    for folder in (there, back):
        assert kept.items() <= files(folder).items()
        assert checkpoint.read_manifest(folder)["step"] == 4
        checkpoint.verify(folder)


def test_lerobots_own_names_come_back(tmp_path: Path) -> None:
    """Of cameras, which are shorter here, and on the hub."""
    config = toy_config(repo_id="somebody/their_policy")
    config.input_features = {
        key.replace("images.front", "image"): feature
        for key, feature in (config.input_features or {}).items()
    }
    VLAPolicy(config, dataset_stats=toy_stats()).save_pretrained(tmp_path / "first")
    convert.from_lerobot(tmp_path / "first", tmp_path / "ours")
    again = VLAPolicy.from_pretrained(convert.to_lerobot(tmp_path / "ours", tmp_path / "second"))
    assert sorted(again.config.image_features) == ["observation.image"]
    assert again.config.repo_id == "somebody/their_policy"


def test_lerobots_commands_take_it(run: Path, tmp_path: Path) -> None:
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import make_pre_post_processors

    folder = convert.to_lerobot(checkpoint.find(run), tmp_path / "there")
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=["--n_action_steps=1", "--device=cpu"])
    assert config.type == "vla"
    config.pretrained_path = folder
    before, after = make_pre_post_processors(
        config, str(folder), preprocessor_overrides={"device_processor": {"device": "cpu"}}
    )
    policy, batch = VLAPolicy.from_pretrained(folder, config=config), toy_batch()
    seen = before({key: value for key, value in batch.items() if not key.startswith("action")})
    with torch.inference_mode():
        action = after(policy.select_action(seen))
        assert torch.equal(action, policy.predict_action_chunk(batch)[:, 0])


def test_adapters_are_merged(tmp_path: Path) -> None:
    from vla.config import LoraConfig

    run, tuned, batch = tmp_path / "run", tmp_path / "tuned", toy_batch()
    train(toy_job(run, steps=1), toy_store())
    job = toy_job(tuned, toy_model(lora=LoraConfig(rank=2, on=("text", "trunk"))), steps=2, init=str(run))
    source = train(job, toy_store())
    folder = convert.to_lerobot(source, tmp_path / "there")
    policy = VLAPolicy.from_pretrained(folder)
    expected = Policy.load(source, "cpu").predict_chunk(*ours(batch))
    np.testing.assert_array_equal(policy.predict_action_chunk(batch).numpy(), expected)
    policy.save_pretrained(tmp_path / "again")
    again = Policy.load(tmp_path / "again", "cpu")
    np.testing.assert_array_equal(again.predict_chunk(*ours(batch)), expected)


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    source = checkpoint.find(run)
    (tmp_path / "full").mkdir()
    with pytest.raises(ConfigError, match="folder: got .*full.*expected a folder that does not exist"):
        convert.to_lerobot(source, tmp_path / "full")
    with pytest.raises(FileNotFoundError, match=r"without config.json.*scripts/convert.py"):
        convert.from_lerobot(source, tmp_path / "back")
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    (damaged / "features.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"features.json is damaged"):
        convert.to_lerobot(damaged, tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "full"]


def test_a_conversion_that_ends_early_leaves_no_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    with pytest.raises(OSError, match="no space left"):
        convert.to_lerobot(checkpoint.find(run), tmp_path / "there")
    assert not (tmp_path / "there").exists()
    monkeypatch.undo()
    convert.to_lerobot(checkpoint.find(run), tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_script(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_script("convert").main
    there = main(str(run), str(tmp_path / "there"), "lerobot")
    back = main(str(there), str(tmp_path / "back"), "vla")
    assert capsys.readouterr().out.count("convert: ") == 2
    assert Policy.load(back, "cpu").model_sha256 == Policy.load(run, "cpu").model_sha256


def test_the_newest_checkpoint_of_a_run_of_lerobot_is_found(tmp_path: Path) -> None:
    policy = toy_policy()
    for step in (90, 100):
        policy.save_pretrained(tmp_path / "checkpoints" / f"{step:06d}" / "pretrained_model")
    newest = tmp_path / "checkpoints" / "000100" / "pretrained_model"
    os.symlink("000100", tmp_path / "checkpoints" / "last")
    for path in (tmp_path, tmp_path / "checkpoints", newest.parent, newest):
        assert checkpoint.find(path) == newest
    assert checkpoint.find(tmp_path / "checkpoints" / "last").resolve() == newest
    (newest / "manifest.json").unlink()  # killed while it was written
    assert checkpoint.find(tmp_path).parent.name == "000090"
    with pytest.raises(CheckpointError, match="expected a folder with manifest.json"):
        checkpoint.find(tmp_path / "nowhere")
