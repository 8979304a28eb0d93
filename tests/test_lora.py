"""Low-rank adapters: what trains, what is merged against peft's own merge, and what a checkpoint holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import parity
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from toy_run import text_folder, toy_job, toy_model, toy_step, toy_store
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2Model, T5Config, T5EncoderModel

from vla.config import ConfigError, ImageConfig, Job, LoraConfig, TextConfig, TrainConfig
from vla.model.lora import ADAPTER, PARTS, adapt, merged, plain_state
from vla.model.vla import VLA
from vla.policy import Policy
from vla.training import checkpoint
from vla.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
ALL = ("text", "image", "trunk")


def network(on: tuple[str, ...] = ALL, rank: int = 2, **lora: Any) -> VLA:
    torch.manual_seed(0)
    store = toy_store()
    model = toy_model(dropout=0.0, lora=LoraConfig(rank=rank, on=on, **lora))
    return VLA(model, store.features, store.statistics())


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Adapters begin at B = 0; give them something to say."""
    for name, parameter in model.named_parameters():
        if ADAPTER in name:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))


def inputs(n: int = 2) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    store = toy_store()
    return {"front": store.images["front"][:n, None]}, store.state[:n, None], ["reach red", "reach blue"][:n]


def unscaled(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}." for part in parts for name in PARTS[part])


# What trains


@pytest.mark.parametrize("on", [("text",), ("image",), ("trunk",), ALL])
def test_adapters_train_and_what_they_adapt_does_not(on: tuple[str, ...]) -> None:
    plain, model = network(rank=0), network(on)
    before = {name for name, p in plain.named_parameters() if p.requires_grad}
    now = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in now if ADAPTER in name}
    assert now - adapters == {name for name in before if not name.startswith(unscaled(on))}
    linear = {
        name for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(unscaled(on)) and "pooler" not in name
    }  # fmt: skip
    assert {name.split(ADAPTER)[0] for name in adapters} == linear
    assert len(adapters) == 2 * len(linear) > 0
    assert all(
        p.shape.numel() == 2 * max(p.shape) for name, p in model.named_parameters() if name in adapters
    )


def test_an_adapted_network_begins_as_it_was() -> None:
    plain, model = network(rank=0), network()
    assert plain_state(model).keys() == plain.state_dict().keys()
    for name, tensor in plain_state(model).items():
        tensor.copy_(plain.state_dict()[name])
    expected, got = (Policy(each, toy_job(Path()), "cpu").predict_chunk(*inputs()) for each in (plain, model))
    np.testing.assert_array_equal(got, expected)


def test_the_gradient_reaches_every_adapter() -> None:
    step = toy_step(toy_job(Path(), toy_model(lora=LoraConfig(rank=2, on=ALL)), init="somewhere"))
    disturb(step.model)
    step(0)
    missing = [
        n
        for n, p in step.model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert missing == []


@pytest.mark.parametrize("on", [("text",), ("image",), ALL])
def test_frozen_weights_stay_and_adapters_move(on: tuple[str, ...]) -> None:
    model = toy_model(lora=LoraConfig(rank=2, on=on))
    model = replace(model, image=replace(model.image, frozen=True))
    step = toy_step(toy_job(Path(), model, init="somewhere"))
    frozen = unscaled(on)
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    assert (step.loss.features is None) == ("text" in on)  # encoded anew, or once
    assert step.model.text.encoder.training == ("text" in on)  # with its own dropout, or without
    assert step.model.tokens.image.backbone.training == ("image" in on)
    step(0), step(1)
    for name, tensor in step.model.state_dict().items():
        is_frozen = (
            name.startswith((*frozen, "text.encoder.", "tokens.image.backbone.")) and ADAPTER not in name
        )
        assert torch.equal(tensor, before[name]) == is_frozen, name


def test_adapters_learn_at_the_full_rate_and_decay() -> None:
    step = toy_step(toy_job(Path(), toy_model(lora=LoraConfig(rank=2, on=("text",)))))
    groups = {id(p): group for group in step.optimizer.param_groups for p in group["params"]}
    adapters = [groups[id(p)] for name, p in step.model.named_parameters() if ADAPTER in name]
    assert {(group["lr_multiplier"], group["weight_decay"]) for group in adapters} == {(1.0, 0.05)}


def test_dropout_before_the_adapter_acts_in_training_only() -> None:
    model = network(("trunk",), dropout=0.5)
    disturb(model)
    layer = model.decoder.layers[0].feed_forward.up
    x = torch.randn(4, layer.in_features)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# Merging

BERT = dict(vocab_size=9, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24)
T5 = dict(vocab_size=9, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
VIT = dict(img_size=32, num_classes=0, embed_dim=32)
SWIN = dict(patch_size=4, window_size=4, depths=(2, 2), num_heads=(2, 4))
FOREIGN: dict[str, tuple[int, Any]] = {  # how many linear layers are to be adapted
    "bert": (4 * 6, lambda: BertModel(BertConfig(**BERT))),
    "gpt2": (2 * 4, lambda: GPT2Model(GPT2Config(vocab_size=9, n_embd=16, n_layer=2, n_head=2))),
    "t5": (2 * 6, lambda: T5EncoderModel(T5Config(**T5))),
    "swin": (4 * 4 + 1, lambda: SwinTransformer(**VIT, **SWIN)),
    "vit": (2 * 4, lambda: VisionTransformer(**VIT, patch_size=16, depth=2, num_heads=2)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_merging_equals_pefts_own_and_changes_no_output(kind: str) -> None:
    torch.manual_seed(0)
    part = "image" if kind in ("swin", "vit") else "text"
    model = nn.Module()
    model.add_module("text", nn.Module())
    model.add_module("tokens", nn.Module())
    model.tokens.add_module("image", nn.Module())
    layers, build = FOREIGN[kind]
    module, plain = build().eval(), build().eval()
    holder, _, attribute = PARTS[part][0].rpartition(".")
    setattr(model.get_submodule(holder), attribute, module)
    adapt(model.eval(), LoraConfig(rank=3, alpha=7.0, on=(part,)))
    disturb(model)
    name = PARTS[part][0] + "."
    mine = {
        n.removeprefix(name): t for n, t in merged(model, model.state_dict()).items() if n.startswith(name)
    }
    assert mine.keys() == plain.state_dict().keys()
    plain.load_state_dict(mine)

    def run(network: Any) -> Tensor:
        if part == "image":
            return network.forward_features(
                torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
            )
        return network(input_ids=torch.arange(8).view(2, 4)).last_hidden_state

    with torch.no_grad():
        expected = run(module)
        parity(f"merged adapters, {kind}", "peft, unmerged", run(plain), expected, 1e-5)
        wrapped = [(n, m) for n, m in module.named_modules() if isinstance(m, LoraLayer)]
        assert len(wrapped) == layers
        for n, layer in wrapped:
            base = layer.get_base_layer().weight.clone()
            layer.merge()  # type: ignore[attr-defined]
            merged_by_peft = layer.get_base_layer().weight
            assert not torch.equal(merged_by_peft, base)
            torch.testing.assert_close(mine[f"{n}.weight"], merged_by_peft, atol=1e-6, rtol=0)


# Checkpoints


def tuned(output: Path, on: tuple[str, ...] = ALL, init: Path | None = None, **train: Any) -> Job:
    model = toy_model(lora=LoraConfig(rank=2, on=on))
    model = replace(model, image=replace(model.image, frozen=True))
    return toy_job(output, model, init=str(init or ""), lr=1e-2, warmup_steps=0, **train)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to begin with, its text encoder trained too."""
    model = toy_model()
    text = replace(model.text, frozen=False, lr_multiplier=1.0)
    return train(toy_job(tmp_path_factory.mktemp("first"), replace(model, text=text), steps=2), toy_store())


def test_the_deployed_network_is_plain_and_answers_the_same(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tuned(tmp_path / "run", init=first, steps=3, ema_decay=0.9)
    path = train(job, toy_store())
    deployed, state = load_file(path / "model.safetensors"), load_file(path / "training.safetensors")
    assert not [name for name in deployed if ADAPTER in name or "base_layer" in name]
    assert "text.encoder.encoder.layer.0.intermediate.dense.weight" in deployed
    unmerged = toy_step(job).model
    averages = {name.removeprefix("average."): t for name, t in state.items() if name.startswith("average.")}
    fixed = {name.removeprefix("fixed."): t for name, t in state.items() if name.startswith("fixed.")}
    text = load_file(path / "text" / "model.safetensors")
    for name, tensor in plain_state(unmerged.text.encoder).items():
        tensor.copy_(text[name])
    left = unmerged.load_state_dict(averages | fixed, strict=False)
    assert left.unexpected_keys == []
    assert all(name.startswith("text.encoder.") for name in left.missing_keys)
    expected = Policy(unmerged, job, "cpu").predict_chunk(*inputs())
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    policy = Policy.load(path, "cpu")
    got = policy.predict_chunk(*inputs())
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    assert policy.job.model.lora.rank == 2
    assert not any(ADAPTER in name for name in policy.model.state_dict())
    assert np.abs(got - Policy.load(first, "cpu").predict_chunk(*inputs())).max() > 1e-3


def test_frozen_text_beside_adapted_images_stays_in_its_folder(first: Path, tmp_path: Path) -> None:
    path = train(tuned(tmp_path / "run", on=("image",), init=first, steps=1), toy_store())
    assert not [name for name in load_file(path / "model.safetensors") if name.startswith("text.")]
    mine = load_file(path / "text" / "model.safetensors")
    theirs = load_file(first / "model.safetensors")  # the text encoder as train.init brought it
    names = [name for name in mine if "pooler" not in name]
    assert names
    assert all(torch.equal(mine[name], theirs[f"text.encoder.{name}"]) for name in names)
    Policy.load(path, "cpu")


@pytest.mark.parametrize("on", [ALL, ("text",)], ids="+".join)
def test_resumed_equals_uninterrupted_without_the_first_checkpoint(
    first: Path, tmp_path: Path, on: tuple[str, ...]
) -> None:
    init = Path(shutil.copytree(first, tmp_path / "first"))
    job = tuned(tmp_path / "whole", on=on, init=init, steps=4)
    whole = train(job, toy_store())
    half = replace(job, output=str(tmp_path / "half"))

    class Interrupted(Exception):
        pass

    def interrupt(path: Path, step: int) -> Any:
        raise Interrupted

    looking = replace(half, train=replace(half.train, evaluate_every=2))
    with pytest.raises(Interrupted):
        train(looking, toy_store(), evaluate=interrupt)
    shutil.rmtree(init)
    resumed = train(half, toy_store(), resume=True)
    for name in ("model.safetensors", "training.safetensors", "text/model.safetensors"):
        mine, theirs = load_file(resumed / name), load_file(whole / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), name


def test_a_training_state_of_another_version_is_refused(first: Path, tmp_path: Path) -> None:
    job = tuned(tmp_path / "run", on=("image",), init=first, steps=2, save_every=1)
    train(replace(job, train=replace(job.train, steps=1)), toy_store())
    path = checkpoint.find(tmp_path / "run")
    state = load_file(path / "training.safetensors")
    save_file({n: t for n, t in state.items() if not n.startswith("fixed.")}, path / "training.safetensors")
    checkpoint.write_manifest(path, 1)
    with pytest.raises(ValueError, match="of another version. got: none of .*fixed.tokens.*remedy: "):
        train(job, toy_store(), resume=True)


# What is refused


@pytest.mark.parametrize(
    ("on", "options"),
    [
        ("trunk", {}),
        ("image", {}),
        ("image", {"image": ImageConfig(backbone="vit_tiny_patch16_224")}),
        ("text", {"text": TextConfig(encoder="scratch", frozen=False)}),
    ],
)
def test_adapters_on_random_weights_are_refused(on: str, options: dict[str, Any]) -> None:
    model = toy_model(lora=LoraConfig(rank=2, on=("text", on)), **options)
    with pytest.raises(
        ConfigError, match=rf"model.lora.on: got .*expected train.init for .*{on}.*remedy: adapt only"
    ):
        Job(model=model, evaluate=toy_job(Path()).evaluate)
    Job(model=model, train=TrainConfig(init="a/checkpoint"), evaluate=toy_job(Path()).evaluate)
    Job(model=replace(model, lora=LoraConfig(rank=0, on=(on,))), evaluate=toy_job(Path()).evaluate)


def test_a_part_without_linear_layers_is_refused() -> None:
    store = toy_store()
    model = toy_model(
        image=ImageConfig(backbone="resnet18", pixels=64), lora=LoraConfig(rank=2, on=("image",))
    )
    with pytest.raises(
        ConfigError, match="model.lora.on: got .*expected parts with linear layers, ResNet has"
    ):
        VLA(model, store.features, store.statistics())


def test_peft_is_asked_for_by_name_and_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    network(rank=0)
    with pytest.raises(
        ConfigError, match=r'model.lora.rank: got 2, .*not installed. remedy: pip install "vla\[lora\]"'
    ):
        network()


@pytest.mark.slow
def test_peft_is_not_imported_without_adapters() -> None:
    program = "import sys, toy_run; toy_run.toy_step(toy_run.toy_job('.')); assert 'peft' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT / "tests", timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_peft_takes_what_transformers_saves(tmp_path: Path) -> None:
    """text/ of an adapted run is an encoder as transformers reads it, without adapters."""
    model = toy_model(lora=LoraConfig(rank=2, on=("text",)))
    path = train(toy_job(tmp_path / "run", model, steps=1), toy_store())
    encoder = AutoModel.from_pretrained(path / "text")
    original = AutoModel.from_pretrained(text_folder())
    assert encoder.state_dict().keys() == original.state_dict().keys()
    assert all(
        torch.equal(tensor, original.state_dict()[name]) for name, tensor in encoder.state_dict().items()
    )
