"""Checkpoints: whole or not at all, intact or refused, and enough to run a policy anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_run import toy_job, toy_model, toy_step, toy_store
from transformers import T5Config, T5EncoderModel

from vla.config import Job, TextConfig
from vla.model.text import quietly
from vla.policy import Policy
from vla.training import checkpoint
from vla.training.checkpoint import CheckpointError
from vla.training.loop import train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saved at steps 1, 2 and 3."""
    output = tmp_path_factory.mktemp("saved") / "run"
    train(toy_job(output, steps=3, save_every=1, log_every=3, keep=2), toy_store())
    return output


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint.find(run), tmp_path / "step_00000003"))


def inputs(n: int = 2) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    store = toy_store()
    return {"front": store.images["front"][:n, None]}, store.state[:n, None], ["reach red", "reach blue"][:n]


def test_the_newest_are_kept(run: Path) -> None:
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000003"]  # and nothing half written


def test_what_a_checkpoint_holds(run: Path) -> None:
    path = checkpoint.find(run)
    assert {p.name for p in path.iterdir()} == {
        "config.yaml", "features.json", "statistics.json", "model.safetensors", "text",
        "training.safetensors", "manifest.json",
    }  # fmt: skip
    assert checkpoint.load_job(path) == toy_job(run, steps=3, save_every=1, log_every=3, keep=2)
    assert checkpoint.load_features(path) == toy_store().features
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(checkpoint.verify(path)) == files - {"manifest.json"}


def test_a_checkpoint_is_found_from_its_run(run: Path, tmp_path: Path) -> None:
    newest = run / "checkpoints" / "step_00000003"
    for path in (run, run / "checkpoints", newest, str(run)):
        assert checkpoint.find(path) == newest
    assert checkpoint.find(run / "checkpoints" / "step_00000002").name == "step_00000002"
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            CheckpointError, match="expected a folder with manifest.json.*remedy: train first"
        ):
            checkpoint.find(path)


def test_what_a_killed_save_leaves_is_no_checkpoint(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    folder = copied / "checkpoints"
    for name in ("step_00000003", "step_00000004"):  # killed before the renaming, at whatever file
        killed = folder / f".{name}.partial"
        shutil.copytree(folder / "step_00000002", killed)
        (killed / "training.safetensors").write_bytes(b"half")
    shutil.rmtree(folder / "step_00000003")
    assert checkpoint.find(copied).name == "step_00000002"
    job = toy_job(copied, steps=3, save_every=1, log_every=3, keep=2)
    resumed = train(job, toy_store(), resume=True)
    ours, theirs = (
        load_file(resumed / "model.safetensors"),
        load_file(checkpoint.find(run) / "model.safetensors"),
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000002", "step_00000003"]


def test_the_text_encoder_is_stored_once(run: Path) -> None:
    files = list((run / "checkpoints" / "step_00000003" / "text").rglob("*"))
    assert len(files) >= 3
    for file in files:
        assert file.samefile(run / "checkpoints" / "step_00000002" / "text" / file.name)
    assert not (run / "checkpoints/step_00000003/config.yaml").samefile(
        run / "checkpoints/step_00000002/config.yaml"
    )


def test_one_wrong_bit_in_any_file_is_refused(copy: Path) -> None:
    names = [*checkpoint.verify(copy), "manifest.json"]
    assert len(names) >= 9
    for name in names:
        whole = (copy / name).read_bytes()
        broken = bytearray(whole)
        broken[len(broken) // 2] ^= 1
        (copy / name).write_bytes(broken)
        for read in (checkpoint.load_model, checkpoint.load_training):
            with pytest.raises(CheckpointError, match=rf"{name} is damaged. got: .*expected: .*remedy: "):
                read(copy)
        (copy / name).write_bytes(whole)
    checkpoint.verify(copy)


def test_one_wrong_bit_anywhere_in_the_manifest_is_refused(copy: Path) -> None:
    whole = (copy / "manifest.json").read_bytes()
    for position in range(len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 1 << position % 8
        (copy / "manifest.json").write_bytes(broken)
        with pytest.raises(CheckpointError):
            checkpoint.read_manifest(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "statistics.json").unlink()
    with pytest.raises(CheckpointError, match="statistics.json is damaged. got: no such file"):
        Policy.load(copy)


@pytest.mark.parametrize("change", ["renamed", "reshaped"])
def test_weights_of_another_network_are_refused(copy: Path, change: str) -> None:
    weights = load_file(copy / "model.safetensors")
    bias = weights.pop("head.out.bias")
    weights |= {"head.out.offset": bias} if change == "renamed" else {"head.out.bias": torch.zeros(9)}
    save_file(weights, copy / "model.safetensors")
    checkpoint.write_manifest(copy, 3)
    with pytest.raises(
        CheckpointError, match=r"weights of another network.*head\.out\..*head\.out\.bias.*remedy"
    ):
        checkpoint.load_model(copy)


def test_a_configuration_of_another_version_is_refused(copy: Path) -> None:
    with (copy / "config.yaml").open("a") as file:
        file.write("telepathy: true\n")
    checkpoint.write_manifest(copy, 3)
    with pytest.raises(CheckpointError, match="config.yaml is of another version. got: .*telepathy.*remedy"):
        checkpoint.load_model(copy)


def test_a_dataset_with_other_cameras_does_not_resume(run: Path) -> None:
    other = replace(toy_store(), images={"wrist": toy_store().images["front"]})
    job = toy_job(run, steps=4, save_every=1, log_every=3, keep=2)
    with pytest.raises(
        ValueError, match=r"resume step_00000003 with does not fit: cameras. got: \['wrist'\]"
    ):
        train(job, other, resume=True)


def test_tuned_text_comes_back(tmp_path: Path) -> None:
    model = toy_model()
    job = toy_job(
        tmp_path, replace(model, text=replace(model.text, frozen=False, lr_multiplier=1.0)), steps=2
    )
    path = train(job, toy_store())
    loaded, _, _ = checkpoint.load_model(path)
    state = load_file(path / "training.safetensors")
    name = "text.encoder.embeddings.word_embeddings.weight"
    assert torch.equal(loaded.state_dict()[name], state[f"average.{name}"])
    assert not torch.equal(loaded.state_dict()[name], toy_step(job).model.state_dict()[name])


def test_the_average_of_tied_weights_comes_back(tmp_path: Path) -> None:
    """T5 has two names for its embedding."""
    folder = shutil.copytree(toy_model().text.encoder, tmp_path / "t5")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    with quietly():
        T5EncoderModel(T5Config(vocab_size=99, **sizes)).save_pretrained(folder)
    text = TextConfig(encoder=str(folder), frozen=False, lr_multiplier=1.0)
    path = train(toy_job(tmp_path / "run", toy_model(text=text), steps=2), toy_store())
    state, (loaded, _, _) = load_file(path / "training.safetensors"), checkpoint.load_model(path)
    average = state["average.text.encoder.shared.weight"]
    assert not torch.equal(average, state["weights.text.encoder.shared.weight"])
    assert torch.equal(loaded.text.encoder.encoder.embed_tokens.weight, average)


def test_a_checkpoint_needs_nothing_beside_itself(copy: Path, run: Path) -> None:
    """Not the text encoder that it was configured with either."""
    expected = Policy.load(run).predict_chunk(*inputs())
    config = copy / "config.yaml"
    job = checkpoint.load_job(copy)
    config.write_text(config.read_text().replace(job.model.text.encoder, "/gone"))
    checkpoint.write_manifest(copy, 3)
    assert checkpoint.load_job(copy).model.text.encoder == "/gone"
    np.testing.assert_array_equal(Policy.load(copy).predict_chunk(*inputs()), expected)


PROGRAM = """
import importlib.util, sys
import numpy as np
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("gt_all") else find(name, *rest)
from vla.model import text
assert text.minilm() == text.MINILM_HUB
from vla.policy import Policy
x = np.load(sys.argv[2])
policy = Policy.load(sys.argv[1], "cpu")
np.save(sys.argv[3], policy.predict_chunk({"front": x["front"]}, x["state"], ["reach red", "reach blue"]))
assert "lerobot" not in sys.modules
"""


@pytest.mark.slow
def test_a_checkpoint_runs_from_an_empty_cache_without_network(tmp_path: Path) -> None:
    job: Job = toy_job(tmp_path / "run", toy_model(text=TextConfig()), steps=1)
    path = train(job, toy_store())
    images, state, tasks = inputs()
    np.savez(tmp_path / "inputs.npz", front=images["front"], state=state)
    (tmp_path / "home").mkdir()
    moved = Path(shutil.move(path, tmp_path / "moved"))
    outputs = tmp_path / "outputs.npy"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(moved), str(tmp_path / "inputs.npz"), str(outputs)],
        check=True, cwd=ROOT, timeout=400,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path / "home")},
    )  # fmt: skip
    np.testing.assert_allclose(
        np.load(outputs), Policy.load(moved, "cpu").predict_chunk(images, state, tasks), atol=1e-6
    )
    assert json.loads((moved / "manifest.json").read_text())["step"] == 1
