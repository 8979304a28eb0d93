"""Beginning with an earlier checkpoint: what is taken, what is reported, and where training starts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from toy_run import metrics, text_folder, toy_job, toy_model, toy_step, toy_store
from transformers import T5Config, T5EncoderModel

from vla.config import DataConfig, ImageConfig, LoraConfig, ModelConfig, TextConfig
from vla.data.normalize import Statistics
from vla.model.lora import plain_state
from vla.model.text import quietly
from vla.model.vla import VLA
from vla.observation import Features
from vla.training import checkpoint
from vla.training.checkpoint import CheckpointError
from vla.training.initialise import Report, grouped, initialise_from
from vla.training.loop import train

PLAIN = {"dropout": 0.0, "prefix_probability": 0.0}


def text(**options: Any) -> TextConfig:
    return replace(toy_model().text, **options)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few steps; text frozen."""
    return train(
        toy_job(tmp_path_factory.mktemp("first"), toy_model(**PLAIN), steps=20, lr=3e-3), toy_store()
    )


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose text encoder was trained."""
    model = toy_model(text=text(frozen=False, lr_multiplier=1.0))
    return train(toy_job(tmp_path_factory.mktemp("spoken"), model, steps=2, lr=1e-2), toy_store())


def network(config: ModelConfig | None = None, features: Features | None = None) -> VLA:
    torch.manual_seed(5)
    features = features or toy_store().features
    actions, state = torch.randn(100, features.action_dim), torch.randn(100, features.state_dim)
    statistics = Statistics.of({"action": actions.numpy(), "observation.state": state.numpy()})
    return VLA(config or toy_model(), features, statistics).eval()


def begun(
    path: Path, config: ModelConfig | None = None, features: Features | None = None
) -> tuple[VLA, VLA, Report]:
    """A network before and after, and the report; what the report says is held against both."""
    before, model = network(config, features), network(config, features)
    report = initialise_from(model, path)
    names = [*report.taken, *report.missing, *report.reshaped]
    assert len(names) == len(set(names))
    for name, tensor in plain_state(model).items():
        if name not in report.taken:
            assert torch.equal(tensor, plain_state(before)[name]), name
    assert set(names) <= plain_state(model).keys()
    return before, model, report


# Training


def first_loss(output: Path, model: ModelConfig, **train_options: Any) -> float:
    data = DataConfig(brightness=0, contrast=0, shift=0)
    job = toy_job(output, model, data, steps=1, batch_size=16, **train_options)
    train(job, toy_store())
    return metrics(job)[0]["loss"]


def test_fine_tuning_starts_at_the_checkpoints_loss(first: Path, tmp_path: Path, capsys: Any) -> None:
    model, _, _ = checkpoint.load_model(first)
    step = toy_step(
        toy_job(Path(), toy_model(**PLAIN), DataConfig(brightness=0, contrast=0, shift=0), batch_size=16)
    )
    _, batch = step.feed.take()
    with torch.no_grad():
        expected = model.loss(batch, step.loss.features[batch.task])[0].item()  # type: ignore[index]
    new = first_loss(tmp_path / "new", toy_model(**PLAIN))
    assert new > 1.2 * expected
    for i, init in enumerate((first, first.parents[1])):
        output = tmp_path / f"tuned{i}"
        assert first_loss(output, toy_model(**PLAIN), init=str(init)) == pytest.approx(expected, rel=1e-5)
        for name, tensor in load_file(
            checkpoint.find(output) / "model.safetensors"
        ).items():  # and its average
            torch.testing.assert_close(tensor, model.state_dict()[name], atol=2e-3, rtol=0)
    lora = toy_model(**PLAIN, lora=LoraConfig(rank=2, on=("image", "trunk")))
    assert first_loss(tmp_path / "lora", lora, init=str(first)) == pytest.approx(expected, rel=1e-5)
    out = capsys.readouterr().out
    assert out.count(f"from {first}") == 3
    assert "init: " in out


def test_a_resumed_run_does_not_begin_again(first: Path, tmp_path: Path, capsys: Any) -> None:
    """Frozen images come from the first checkpoint, which is gone when the run is resumed."""
    init = Path(shutil.copytree(first, tmp_path / "first"))
    model = toy_model(image=ImageConfig(pixels=32, patch=16, frozen=True))
    whole = toy_job(tmp_path / "whole", model, init=str(init))
    expected = train(whole, toy_store())
    half = replace(whole, output=str(tmp_path / "half"), train=replace(whole.train, evaluate_every=2))

    def interrupt(path: Path, step: int) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(half, toy_store(), evaluate=interrupt)
    shutil.rmtree(init)
    capsys.readouterr()
    resumed = train(half, toy_store(), resume=True)
    assert "init:" not in capsys.readouterr().out
    for name in ("model.safetensors", "training.safetensors"):
        mine, theirs = load_file(resumed / name), load_file(expected / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), name
    name = "tokens.image.backbone.blocks.0.attn.qkv.weight"
    assert torch.equal(
        load_file(resumed / "model.safetensors")[name], load_file(first / "model.safetensors")[name]
    )


# What is taken


def test_the_same_network_takes_everything(first: Path) -> None:
    _, model, report = begun(first)
    deployed = load_file(first / "model.safetensors")
    assert deployed.keys() <= report.taken.keys()
    assert report.missing == report.unused == []
    assert report.reshaped == {}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in deployed.items())
    assert sum(report.taken.values()) == sum(model.state_dict()[name].numel() for name in report.taken)
    lines = str(report).splitlines()
    total = len(report.taken)
    assert lines[0].startswith(f"init: {total} of {total} tensors, ")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "taken",
        "cameras",
        "text encoder",
        "statistics",
    ]
    assert all(len(line) < 700 for line in lines)


def test_adapters_take_it_below_themselves(first: Path) -> None:
    _, model, report = begun(first, toy_model(lora=LoraConfig(rank=2, on=("text", "image", "trunk"))))
    deployed = load_file(first / "model.safetensors")
    assert report.missing == report.unused == []
    assert deployed.keys() <= report.taken.keys()
    assert all(torch.equal(plain_state(model)[name], tensor) for name, tensor in deployed.items())


def test_what_does_not_fit_is_named_with_both_shapes(first: Path) -> None:
    features = replace(toy_store().features, action_dim=5)
    config = toy_model(chunk_size=6, n_encoder_layers=2)
    _, _, report = begun(first, config, features)
    assert report.reshaped["actions.positions.table"] == ((6, 32), (4, 32))
    assert report.reshaped["actions.committed.weight"][0][1] == 5
    assert "encoder.layers.1.attention.query.weight" in report.missing
    assert "encoder.layers.0.attention.query.weight" in report.taken
    said = str(report)
    assert "actions.positions.table (6, 32) here, (4, 32) there" in said
    assert "not in the checkpoint: encoder.layers (" in said


def test_weights_that_nobody_wants_are_named(first: Path) -> None:
    _, _, report = begun(first, toy_model(image=ImageConfig(pixels=32, patch=16, conditioning="none")))
    assert report.unused
    assert all(name.startswith("tokens.image.conditioning.") for name in report.unused)
    assert "in the checkpoint only: tokens.image.conditioning" in str(report)


def test_groups_are_short() -> None:
    names = [
        "encoder.layers.0.attention.out.weight",
        "encoder.layers.1.norm.bias",
        "head.out.weight",
        "table",
    ]
    assert grouped(names) == "encoder.layers (2), head.out (1), table (1)"


# Cameras, by name


def two_cameras(tmp_path: Path, names: tuple[str, str]) -> Path:
    store = toy_store()
    images = dict.fromkeys(names, store.images["front"])
    both = replace(store, images=images)
    return train(toy_job(tmp_path / "two", steps=1), both)


def test_cameras_are_matched_by_name(tmp_path: Path) -> None:
    path = two_cameras(tmp_path, ("front", "wrist"))
    rows = load_file(path / "model.safetensors")["tokens.image.camera"]
    features = replace(toy_store().features, cameras=dict.fromkeys(("above", "wrist"), (32, 32)))
    before, model, report = begun(path, features=features)
    assert torch.equal(model.tokens.image.camera[1], rows[1])  # wrist, in the second place of both
    assert torch.equal(model.tokens.image.camera[0], before.tokens.image.camera[0])  # above is not front
    assert report.cameras == "wrist taken by name; above new, not among the checkpoint's front, wrist"
    features = replace(features, cameras=dict.fromkeys(("wrist", "zenith"), (32, 32)))
    before, model, report = begun(path, features=features)
    assert torch.equal(model.tokens.image.camera[0], rows[1])
    assert torch.equal(model.tokens.image.camera[1], before.tokens.image.camera[1])
    _, model, report = begun(path)
    assert torch.equal(model.tokens.image.camera, rows[:1])  # fewer cameras
    assert report.reshaped == {}
    features = replace(features, cameras={"side": (32, 32)})
    _, _, report = begun(path, features=features)
    assert report.cameras.startswith("none taken by name; side new")
    assert "tokens.image.camera" not in report.taken


# Text


def test_a_tuned_text_encoder_is_taken(spoken: Path) -> None:
    _, model, report = begun(spoken)  # frozen from now on
    tuned = load_file(spoken / "model.safetensors")
    name = "text.encoder.embeddings.word_embeddings.weight"
    assert torch.equal(model.state_dict()[name], tuned[name])
    assert not torch.equal(network().state_dict()[name], tuned[name])
    assert report.text == "the checkpoint's, tuned there"
    assert [n for n in report.taken if "pooler" in n] == []


def test_another_vocabulary_leaves_text_as_configured(spoken: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_folder(), tmp_path / "words"))
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"red"', '"rot"'))
    assert Tokenizer.from_file(str(tokenizer)).token_to_id("red") is None
    before, model, report = begun(spoken, toy_model(text=text(encoder=str(folder))))
    for name, tensor in before.text.encoder.state_dict().items():
        assert torch.equal(model.text.encoder.state_dict()[name], tensor)
    assert report.text == (
        "as configured, for the checkpoint's has another vocabulary and was tuned; "
        f"take that with --model.text.encoder={spoken / 'text'}"
    )
    assert not [n for n in [*report.missing, *report.unused, *report.reshaped] if n.startswith("text.")]
    _, model, report = begun(spoken, toy_model(text=text(encoder=str(spoken / "text"))))  # as the report says
    assert report.text == "the checkpoint's, tuned there"


def t5_folder(tmp_path: Path, width: int = 16) -> str:
    folder = Path(shutil.copytree(text_folder(), tmp_path / "t5"))
    config = T5Config(vocab_size=99, d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    with quietly():
        T5EncoderModel(config).save_pretrained(folder)
    return str(folder)


def test_text_is_taken_whole_or_not_at_all(first: Path, tmp_path: Path) -> None:
    t5 = toy_model(text=text(encoder=t5_folder(tmp_path)))
    _, _, report = begun(first, t5)
    assert report.text.startswith("as configured, for the checkpoint's has another network; take that with")
    path = train(toy_job(tmp_path / "run", t5, steps=1), toy_store())
    _, _, report = begun(path, t5)  # T5 saves its tied embedding once
    assert report.text == "the checkpoint's"
    assert report.missing == []


# What is refused, and what is not


def test_a_checkpoint_with_nothing_in_common_is_refused(first: Path, tmp_path: Path) -> None:
    sizes = {"d_model": 48, "n_heads": 3, "d_ff": 80, "image_width": 24, "image_heads": 3}
    image = ImageConfig(pixels=32, patch=8, stem="patch", conditioning="none")
    config = toy_model(**sizes, image=image, text=text(encoder=t5_folder(tmp_path, 24)))
    model = network(config, replace(toy_store().features, action_dim=7))
    with pytest.raises(
        ValueError, match=r"nothing of the checkpoint fits. got: init: (.|\n)*expected: .*remedy: "
    ):
        initialise_from(model, first)


def test_random_weights_do_not_stay_frozen_below_adapters(first: Path) -> None:
    model = network(toy_model(n_encoder_layers=2, lora=LoraConfig(rank=2, on=("trunk",))))
    with pytest.raises(ValueError, match=r"nobody trained. got: encoder.layers \(\d+\) of trunk, .*remedy: "):
        initialise_from(model, first)


def test_a_random_text_encoder_does_not_stay_frozen_below_adapters(first: Path) -> None:
    scratch = TextConfig("scratch", frozen=False, width=16, layers=1, heads=2)
    job_model = toy_model(text=scratch, lora=LoraConfig(rank=2, on=("text",)))
    model = VLA(job_model, toy_store().features, toy_store().statistics(), instructions=toy_store().tasks)
    with pytest.raises(ValueError, match=r"nobody trained. got: text.encoder.* of text, .*remedy: "):
        initialise_from(model, first)


def test_a_damaged_checkpoint_is_refused(first: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(first, tmp_path / first.name))
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (path / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        initialise_from(network(), path)
    with pytest.raises(CheckpointError, match="expected a folder with manifest.json"):
        train(toy_job(tmp_path / "run", init=str(tmp_path / "nowhere")), toy_store())


def test_the_configuration_may_be_of_another_version(first: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(first, tmp_path / first.name))
    with (path / "config.yaml").open("a") as file:
        file.write("telepathy: true\n")
    checkpoint.write_manifest(path, 20)
    assert begun(path)[2].missing == []
