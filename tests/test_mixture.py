"""Several datasets in one training: drawn by weight, padded, normalised by their own statistics, cut apart again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_data import write_dataset
from toy_run import metrics, toy_job, toy_model

from vla.config import AttentionConfig, Job, load
from vla.data.frames import Episode, FrameStore
from vla.data.mixture import MixedData, Mixture, resized
from vla.data.normalize import MixedStatistics, Normalizer, Statistics
from vla.data.samples import Samples
from vla.data.sources import open_data, samples_of
from vla.model.cut import cut
from vla.model.heads import HEADS, Kinds
from vla.model.vla import VLA, both_absent
from vla.observation import ACTION, STATE, Batch, Features, Observation
from vla.policy import Policy
from vla.training import checkpoint
from vla.training.checkpoint import CheckpointError
from vla.training.loop import train
from vla.training.step import TrainStep

SIZES = {"arm": ({"front": (32, 32)}, 3, 2), "table": ({"front": (40, 24), "wrist": (8, 8)}, 5, 4)}


def episodes(name: str, n: int = 4) -> list[Episode]:
    cameras, state, action = SIZES[name]
    rng, made = np.random.default_rng(len(name)), []
    for i in range(n):
        frames = 6 + i
        images = {c: rng.integers(0, 256, (frames, *size, 3), np.uint8) for c, size in cameras.items()}
        x, y = (rng.normal(len(name), d, (frames, d)).astype(np.float32) for d in (state, action))
        made.append(Episode(images, x, y, f"reach {'red' if i % 2 else name}"))
    return made


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {n: write_dataset(tmp_path_factory.mktemp(n), episodes(n), rows=5) for n in SIZES}


def mixed_job(output: Path, roots: dict[str, Path], *arguments: str, **train: Any) -> Job:
    model = toy_model(
        **{k: train.pop(k) for k in list(train) if k in ("head", "decoding", "camera_dropout", "bins")}
    )
    job = toy_job(output, model, **train)
    mix = ", ".join(f"{n}: {{root: {roots[n]}, weight: {w}}}" for n, w in (("table", 2), ("arm", 1)))
    path = output.with_suffix(".yaml")
    path.write_text(f"data: {{mix: {{{mix}}}, start_share: 0.25}}\n")
    return replace(job, data=load(Job, [str(path), *arguments]).data)


def data(roots: dict[str, Path]) -> MixedData:
    stores = {name: FrameStore.open_or_build(root) for name, root in roots.items()}
    return MixedData(stores, {"arm": 1 / 3, "table": 2 / 3}, 32)


# Batches


def test_what_a_mixture_is(roots: dict[str, Path]) -> None:
    mixed = data(roots)
    assert mixed.features == Features({"front": (32, 32), "wrist": (8, 8)}, 5, 4, 10)
    assert mixed.tasks == ["reach arm", "reach red", "reach table"]
    assert (len(mixed), mixed.n_episodes) == (60, 8)


def test_each_dataset_gives_the_batches_of_its_samples(roots: dict[str, Path]) -> None:
    mixed = data(roots)
    alone = {
        name: Samples(store, 4, 2) for name, store in mixed.members.items() if isinstance(store, FrameStore)
    }
    mixture = Mixture(mixed, alone)
    index = mixture.draw(31, torch.Generator().manual_seed(0))
    batch = mixture.batch(index)
    assert batch.source is not None
    assert batch.absent is not None
    assert set(batch.source.tolist()) == {0, 1}
    for row, i in enumerate(index.tolist()):
        source = int(i >= 30)
        name = ("arm", "table")[source]
        cameras, state, action = SIZES[name]
        own = alone[name].batch(torch.tensor([i - 30 * source]))
        assert batch.source[row] == source
        assert torch.equal(batch.state[row, :, :state], own.state[0])
        assert torch.equal(batch.action[row, :, :action], own.action[0])
        assert not batch.state[row, :, state:].any()
        assert not batch.action[row, :, action:].any()
        assert torch.equal(batch.action_is_pad[row], own.action_is_pad[0])
        assert mixed.tasks[int(batch.task[row])] == mixed.members[name].tasks[int(own.task[0])]
        assert batch.absent[row].tolist() == [False, "wrist" not in cameras]
        for camera in ("front", "wrist"):
            if camera in cameras:
                expected = resized(own.images[camera], mixed.features.cameras[camera])[0]
                assert torch.equal(batch.images[camera][row], expected)
            else:
                assert not batch.images[camera][row].any()


def test_pictures_are_resized_as_the_model_resizes(roots: dict[str, Path]) -> None:
    images = torch.randint(256, (2, 3, 3, 40, 24), dtype=torch.uint8)
    tokens = VLA(toy_model(), data(roots).features, data(roots).statistics()).tokens.image
    ours = tokens.resized(resized(images, (32, 32)))
    torch.testing.assert_close(ours, tokens.resized(images), atol=0.502 / 255, rtol=0)  # half a step of 255


def test_datasets_are_drawn_by_weight(roots: dict[str, Path]) -> None:
    mixed = data(roots)
    mixture = Mixture(
        mixed, {n: Samples(s, 4) for n, s in mixed.members.items() if isinstance(s, FrameStore)}
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([mixture.draw(16, generator) for _ in range(1500)])
    counts = (drawn >= 30).sum(1)
    assert set(counts.tolist()) == {10, 11}  # two thirds of 16 are 10.67
    assert counts.float().mean() == pytest.approx(10.667, abs=0.05)
    assert ((drawn >= 30).float().mean(0) - 2 / 3).abs().max() < 0.06  # in no order
    assert torch.bincount(drawn.flatten()).min() > 150


def test_another_rate_is_refused(roots: dict[str, Path]) -> None:
    stores = {
        "a": FrameStore.of_episodes(episodes("arm"), 10),
        "b": FrameStore.of_episodes(episodes("arm"), 30),
    }
    with pytest.raises(
        ValueError, match=r"data\.mix: got \{'a': 10, 'b': 30\}, expected datasets of one rate.*remedy"
    ):
        MixedData(stores, {"a": 0.5, "b": 0.5}, 32)


# Statistics


def test_statistics_of_each_dataset(roots: dict[str, Path], tmp_path: Path) -> None:
    statistics = data(roots).statistics()
    statistics.save(tmp_path / "datasets.json")
    assert MixedStatistics.load(tmp_path / "datasets.json") == statistics
    both = Normalizer(statistics[ACTION])
    x, source = torch.randn(6, 3, 4), torch.tensor([0, 1, 1, 0, 0, 1])
    x[source == 0, :, 2:] = 0
    y = both.normalize(x, source)
    for i, (name, size) in enumerate((("arm", 2), ("table", 4))):
        own = Normalizer(statistics.statistics[name][ACTION])
        assert torch.equal(y[source == i][..., :size], own.normalize(x[source == i][..., :size]))
    assert not y[source == 0, :, 2:].any()
    torch.testing.assert_close(both.unnormalize(y, source), x)


# Losses


@pytest.mark.parametrize("head", HEADS)
def test_dimensions_that_a_robot_lacks_do_not_count(roots: dict[str, Path], head: str) -> None:
    """The loss of samples of one dataset in the mixture is that of its own head on its own dimensions."""
    config, statistics = toy_model(head=head, bins=8, components=2), data(roots).statistics()
    torch.manual_seed(0)
    whole = HEADS[head](config, Normalizer(statistics[ACTION])).eval()
    own = HEADS[head](config, Normalizer(statistics.statistics["arm"][ACTION])).eval()
    weights = {f"head.{n}": t for n, t in whole.state_dict().items()}
    mixture, alone = Features({"front": (8, 8)}, 3, 4, 10), Features({"front": (8, 8)}, 3, 2, 10)
    own.load_state_dict({n.removeprefix("head."): t for n, t in cut(weights, config, mixture, alone).items()})
    hidden, target = torch.randn(5, 4, 32), torch.randn(5, 4, 4)
    target[..., 2:] = 0
    ignore = torch.rand(5, 4) < 0.3
    real = torch.tensor([True, True, False, False]).expand(5, 1, 4)
    kinds = Kinds(torch.zeros(5, dtype=torch.int64), real)
    if head == "flow":  # one draw for both
        noise, time = torch.randn(5, 4, 4), torch.rand(5, 4, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x: noise[..., : x.shape[-1]])
            patch.setattr(torch, "rand_like", lambda x: time)
            losses = whole.loss(hidden, target, ignore, kinds), own.loss(hidden, target[..., :2], ignore)
        getattr(own, "noise").copy_(getattr(whole, "noise")[:, :2])  # noqa: B009
    else:
        losses = whole.loss(hidden, target, ignore, kinds), own.loss(hidden, target[..., :2], ignore)
    torch.testing.assert_close(*losses)
    actions = whole.decode(hidden, kinds=kinds)[..., :2], own.decode(hidden)
    torch.testing.assert_close(*actions)


def test_a_dropped_camera_leaves_another() -> None:
    lacking = torch.tensor([[False, True], [False, False], [False, True]])
    dropped = torch.tensor([[True, False], [True, False], [False, False]])
    assert both_absent(lacking, dropped).tolist() == [[False, True], [True, False], [False, True]]  # pyright: ignore
    assert both_absent(None, dropped) is dropped
    assert both_absent(lacking, None) is lacking
    assert both_absent(None, None) is None


def test_what_is_absent_or_padded_changes_nothing(roots: dict[str, Path], tmp_path: Path) -> None:
    job = mixed_job(tmp_path / "run", roots, head="gmm", camera_dropout=0.0, batch_size=16)
    mixed = open_data(job)
    torch.manual_seed(0)
    model = VLA(job.model, mixed.features, mixed.statistics(), None, mixed.tasks).eval()
    samples = samples_of(mixed, job)
    batch = samples.batch(torch.arange(25))  # of the arm
    text = model.text.encode(model.text.tokenize(mixed.tasks))[batch.task]
    loss, numbers = model.loss(batch, text)
    batch.images["wrist"] = torch.randint(256, batch.images["wrist"].shape, dtype=torch.uint8)
    assert not torch.isclose(loss, model.loss(replace(batch, absent=None), text)[0])
    other, again = model.loss(batch, text)
    torch.testing.assert_close((loss, numbers), (other, again))
    assert batch.source is not None
    swapped = replace(batch, source=torch.ones_like(batch.source))
    assert not torch.isclose(loss, model.loss(swapped, text)[0])  # the other's statistics would count


# The whole way


@pytest.mark.parametrize(
    ("stream", "options"),
    [
        (False, {"head": "gmm", "camera_dropout": 0.3}),
        (True, {"head": "bins", "decoding": "autoregressive"}),
        (True, {"head": "flow"}),
    ],
)
def test_train_resume_load_and_act(
    roots: dict[str, Path], tmp_path: Path, stream: bool, options: dict
) -> None:
    arguments = ("--data.stream=true", "--data.cache_mb=2") if stream else ()
    whole = mixed_job(tmp_path / "whole", roots, *arguments, steps=5, save_every=3, **options)
    path = train(whole, open_data(whole))
    short = replace(whole, output=str(tmp_path / "short"))
    train(replace(short, train=replace(short.train, steps=5)), open_data(short))
    for folder in (tmp_path / "short" / "checkpoints").glob("step_00000005/*"):
        folder.unlink() if folder.is_file() else None
    resumed = train(short, open_data(short), resume=True)
    assert metrics(short) == metrics(whole)
    for name in ("model.safetensors", "training.safetensors"):
        mine, theirs = load_file(resumed / name), load_file(path / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), name
    assert not (path / "statistics.json").exists()
    for name, (cameras, state, action) in SIZES.items():
        policy = Policy.load(path, "cpu", dataset=name)
        assert policy.features == Features(cameras, state, action, 10)
        images = {c: np.zeros((2, 1, *size, 3), np.uint8) for c, size in cameras.items()}
        chunk = policy.predict_chunk(images, np.zeros((2, 1, state), np.float32), ["reach red"] * 2)
        assert chunk.shape == (2, 4, action)
        own = Statistics.of({ACTION: FrameStore.open_or_build(roots[name]).action})[ACTION]
        assert (chunk >= np.float32(own.min) - 1e-5).all()
        assert (chunk <= np.float32(own.max) + 1e-5).all()
    for wrong in ("", "robot"):
        with pytest.raises(
            CheckpointError, match=rf"got dataset '{wrong}', expected one of arm, table.*remedy"
        ):
            Policy.load(path, "cpu", dataset=wrong)


def test_a_cut_network_computes_what_it_was_cut_from(roots: dict[str, Path], tmp_path: Path) -> None:
    job = mixed_job(tmp_path / "run", roots, steps=3, head="bins")
    path = train(job, open_data(job))
    whole = checkpoint.rebuild(
        path, job, job.model, checkpoint.load_features(path), checkpoint.load_statistics(path)
    ).eval()  # fmt: skip
    mixed = open_data(job)
    batch: Batch = samples_of(mixed, job).batch(torch.arange(20))  # of the arm
    text = whole.text.encode(whole.text.tokenize(mixed.tasks))[batch.task]
    own, _, statistics = checkpoint.load_model(path, "arm")
    seen = Observation({"front": batch.images["front"]}, batch.state[..., :3], text)
    union = Observation(batch.images, batch.state, text, batch.absent, batch.source)
    none = torch.zeros(20, 4, dtype=torch.bool)
    with torch.no_grad():
        hidden = whole(union, torch.zeros(20, 4, 4), none)
        torch.testing.assert_close(own(seen, torch.zeros(20, 4, 2), none), hidden)
        actions = whole.head.decode(hidden, kinds=whole.kinds(batch))
        expected = whole.normalizer.unnormalize(actions, batch.source)[..., :2]
        torch.testing.assert_close(own.predict_chunk(seen), own.normalizer.clip(expected))
    assert statistics == mixed.statistics().statistics["arm"]
    assert own.tokens.state.normalizer.centre.tolist() == pytest.approx(statistics[STATE].mean)


def test_a_checkpoint_of_one_dataset_takes_no_name(tmp_path: Path) -> None:
    store = FrameStore.of_episodes(episodes("arm"), 10)
    path = train(toy_job(tmp_path, steps=1), store)
    with pytest.raises(CheckpointError, match="got dataset 'arm', expected none"):
        Policy.load(path, "cpu", dataset="arm")


def test_another_mixture_does_not_resume(roots: dict[str, Path], tmp_path: Path) -> None:
    job = mixed_job(tmp_path / "run", roots, steps=1)
    train(job, open_data(job))
    other = mixed_job(tmp_path / "run", roots, "--data.mix.arm.weight=5", steps=2)
    with pytest.raises(ValueError, match=r"data\.mix\.arm\.weight: got '5.0', expected 1.0"):
        train(other, open_data(other), resume=True)


def test_attention_that_hangs_on_the_length_is_refused(roots: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"model\.attention\.kind: got 'linformer', expected full or window"):
        VLA(
            toy_model(attention=AttentionConfig(kind="linformer")),
            data(roots).features,
            data(roots).statistics(),
        )


def test_a_mixed_step_runs_in_parts(roots: dict[str, Path], tmp_path: Path) -> None:
    losses = []
    for accumulate in (1, 2):
        job = mixed_job(tmp_path / "run", roots, batch_size=8, accumulate=accumulate)
        job = replace(job, model=replace(job.model, dropout=0.0))
        mixed = open_data(job)
        torch.manual_seed(0)
        model = VLA(job.model, mixed.features, mixed.statistics()).train()
        step = TrainStep(model, samples_of(mixed, job), job, mixed.tasks)
        losses.append([step(i)["loss"].item() for i in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("data_yaml", "words"),
    [
        ("{root: x, mix: {a: {root: b}}}", r"data\.root: got 'x', expected nothing beside data\.mix"),
        ("{mix: {a: {root: b, weight: 0}}}", r"data\.mix\.a\.weight: got 0.*a positive number"),
        ("{mix: {a: {weight: 2}}}", r"data\.mix\.a\.root: got ''.*a dataset's folder"),
        ("{mix: {a: {root: b, wight: 2}}}", r"data\.mix\.a\.wight: got 'an unknown field'.*one of weight"),
        ("{mix: {a: 3}}", r"data\.mix\.a: got 3"),
        ("{stream: true, cache_mb: 0}", r"data\.cache_mb: got 0"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_said(tmp_path: Path, data_yaml: str, words: str) -> None:
    (tmp_path / "job.yaml").write_text(f"data: {data_yaml}\n")
    with pytest.raises(SystemExit, match=words):
        load(Job, [str(tmp_path / "job.yaml")])
