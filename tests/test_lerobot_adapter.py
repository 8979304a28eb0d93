"""LeRobot's own policies in our evaluator: the same actions as LeRobot makes of the same observations."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_run
from load_script import load_script
from safetensors.torch import load_file, save_file

from vla.config import ConfigError, EnvConfig, EvaluateConfig, Job
from vla.lerobot_plugin.adapter import LeRobotPolicy, find
from vla.lerobot_plugin.told import WIDTH, Sentences, tell
from vla.observation import ACTION, ENVIRONMENT_STATE, IMAGES, STATE
from vla.training import checkpoint

FPS, PIXELS, P, A, H = 10, 64, 2, 2, 6
TASKS = ["reach red", "go to the blue target", "reach red"]
CHUNK = {"act": {"chunk_size": H, "n_action_steps": 3}, "diffusion": {"horizon": 8, "n_action_steps": H}}
SIZE: dict[str, dict[str, Any]] = {
    "act": {"dim_model": 16, "dim_feedforward": 16, "n_heads": 2, "n_encoder_layers": 1},
    "diffusion": {"down_dims": (16, 32), "num_train_timesteps": 5, "use_group_norm": True},
    "vqbet": {"gpt_input_dim": 16, "gpt_output_dim": 16, "gpt_hidden_dim": 16, "gpt_n_layer": 1, "gpt_n_head": 1},
}  # fmt: skip
KINDS = ("act", "diffusion")


def make(folder: Path, kind: str, told: bool = True, **options: Any) -> Path:
    """A policy with random weights as lerobot-train leaves it, and the dataset's rate where it looks for it."""
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies import get_policy_class, make_policy_config, make_pre_post_processors

    inputs = {
        f"{IMAGES}front": PolicyFeature(FeatureType.VISUAL, (3, PIXELS, PIXELS)),
        STATE: PolicyFeature(FeatureType.STATE, (P,)),
    }
    if told:
        inputs[ENVIRONMENT_STATE] = PolicyFeature(FeatureType.ENV, (WIDTH,))
    arguments = CHUNK.get(kind, {}) | SIZE[kind] | {"device": "cpu", "pretrained_backbone_weights": None}
    config = make_policy_config(
        kind, input_features=inputs, output_features={ACTION: PolicyFeature(FeatureType.ACTION, (A,))},
        **(arguments | options),
    )  # fmt: skip
    config.normalization_mapping["ENV"] = NormalizationMode.MEAN_STD
    rng = np.random.default_rng(0)
    sizes = {f"{IMAGES}front": (3, 1, 1), STATE: (P,), ENVIRONMENT_STATE: (WIDTH,), ACTION: (A,)}
    stats = {
        key: {
            "mean": torch.from_numpy(rng.normal(size=size)).float(),
            "std": torch.from_numpy(rng.uniform(0.5, 2, size)).float(),
            "min": torch.full(size, -2.0),
            "max": torch.full(size, 3.0),
        }
        for key, size in sizes.items()
    }
    torch.manual_seed(0)
    get_policy_class(kind)(config).save_pretrained(folder)
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(folder)
    root = folder.parent / "dataset"
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta" / "info.json").write_text(json.dumps({"fps": FPS}))
    training = {"dataset": {"root": str(root), "repo_id": "local/toy"}}
    (folder / "train_config.json").write_text(json.dumps(training))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind) / "pretrained_model", kind) for kind in KINDS}


@pytest.fixture(scope="module")
def policies(folders: dict[str, Path]) -> dict[str, LeRobotPolicy]:
    return {kind: LeRobotPolicy.load(folder, "cpu") for kind, folder in folders.items()}


def observe(steps: int, n: int = len(TASKS)) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (n, steps, PIXELS, PIXELS, 3), np.uint8)
    return {"front": images}, rng.normal(size=(n, steps, P)).astype(np.float32)


def selected(
    folder: Path, images: np.ndarray, state: np.ndarray, sentences: np.ndarray, n: int
) -> np.ndarray:
    """What LeRobot's own loop executes: one observation after another into select_action, n actions from the last."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    before, after = make_pre_post_processors(config, pretrained_path=str(folder))
    policy.reset()

    def select(step: int) -> np.ndarray:
        picture = torch.from_numpy(images[:, step]).permute(0, 3, 1, 2).float() / 255
        batch = {f"{IMAGES}front": picture, STATE: torch.from_numpy(state[:, step])}
        torch.manual_seed(0)
        return after(
            policy.select_action(before(batch | {ENVIRONMENT_STATE: torch.from_numpy(sentences)}))
        ).numpy()

    for step in range(images.shape[1] - 1):  # the history, after which it is to look again
        select(step)
        policy._queues[ACTION].clear()
    return np.stack([select(-1) for _ in range(n)], axis=1)  # (B, n, A)


@pytest.mark.parametrize("kind", KINDS)
def test_actions_are_those_of_lerobots_own_loop(
    kind: str, folders: dict[str, Path], policies: dict[str, LeRobotPolicy]
) -> None:
    policy = policies[kind]
    policy.calls = 0
    images, state = observe(policy.n_obs_steps)
    chunk = policy.predict_chunk(images, state, TASKS)
    assert chunk.shape == (3, H, A)
    assert chunk.dtype == np.float32
    expected = selected(
        folders[kind], images["front"], state, Sentences()(TASKS), CHUNK[kind]["n_action_steps"]
    )
    np.testing.assert_allclose(chunk[:, : expected.shape[1]], expected, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 1e-3  # the observations count


def test_a_policy_plays_in_the_precision_it_was_given(folders: dict[str, Path], tmp_path: Path) -> None:
    """As lerobot-eval does it: bf16 differs from float32, by rounding."""
    half = LeRobotPolicy.load(edited(folders["act"], tmp_path / "policy", use_amp=True), "cpu")
    full = LeRobotPolicy.load(folders["act"], "cpu")
    difference = np.abs(half.predict_chunk(*observe(1), TASKS) - full.predict_chunk(*observe(1), TASKS))
    assert 0 < difference.max() < 0.2


def test_what_the_policy_says_of_itself(policies: dict[str, LeRobotPolicy]) -> None:
    for kind, policy in policies.items():
        assert (policy.type, policy.chunk_size) == (kind, H)
        assert policy.n_obs_steps == {"act": 1, "diffusion": 2}[kind]
        assert policy.features.cameras == {"front": (PIXELS, PIXELS)}
        assert (policy.features.state_dim, policy.features.action_dim, policy.features.fps) == (P, A, FPS)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_depend_on_the_observation_the_sentence_and_nothing_before(
    kind: str, policies: dict[str, LeRobotPolicy]
) -> None:
    policy = policies[kind]

    def ask(tasks: list[str]) -> np.ndarray:
        policy.calls = 0  # what Diffusion draws is another thing
        return policy.predict_chunk(*observe(policy.n_obs_steps), tasks)

    first = ask(TASKS)
    other = ask(["reach green", *TASKS[1:]])
    assert np.abs(other[0] - first[0]).max() > 1e-4
    np.testing.assert_allclose(other[1:], first[1:], atol=1e-5)
    np.testing.assert_array_equal(ask(TASKS), first)


def test_a_policy_without_the_sentence_is_deaf(tmp_path: Path) -> None:
    policy = LeRobotPolicy.load(make(tmp_path / "pretrained_model", "act", told=False), "cpu")
    images, state = observe(1)
    np.testing.assert_array_equal(
        policy.predict_chunk(images, state, TASKS), policy.predict_chunk(images, state, ["", "", ""])
    )


def test_sentences_do_not_depend_on_their_neighbours() -> None:
    sentences = Sentences()
    together = sentences(["", "reach red", "go to the blue target now, and then to the green one"])
    assert together.shape == (3, WIDTH)
    np.testing.assert_array_equal(Sentences()(["reach red"])[0], together[1])
    assert np.isfinite(together).all()


def test_runs_and_steps_lead_to_the_policy(folders: dict[str, Path], tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "000010"
    shutil.copytree(folders["act"], step / "pretrained_model")
    (step.parent / "last").symlink_to("000010")
    for path in (tmp_path / "run", step.parent, step, step / "pretrained_model"):
        assert find(path).resolve() == (step / "pretrained_model").resolve()


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def feature(kind: str, *shape: int) -> dict[str, Any]:
    return {"type": kind, "shape": shape}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "vla"}, "config.json: type: got 'vla', expected vla beside a manifest.json"),
        ({"type": "crystal"}, "config.json: type: got 'crystal', expected .*act"),
        ({"a_field_of_tomorrow": 1}, "config.json: got .*a_field_of_tomorrow.*expected fields of lerobot 0.6.1"),
        ({"dim_model": 32}, "model.safetensors: got .*size mismatch.*of type act"),
        ({"input_features": {STATE: feature("STATE", P), ENVIRONMENT_STATE: feature("ENV", WIDTH)}},
         "config.json: input_features: got 'no camera'"),
        ({"input_features": {f"{IMAGES}front": feature("VISUAL", 3, PIXELS, PIXELS), STATE: feature("STATE", P),
                             ENVIRONMENT_STATE: feature("ENV", 7)}}, "environment_state: got"),
        ({"input_features": {"observation.image": feature("VISUAL", 3, PIXELS, PIXELS)}}, "input_features: got"),
    ],
)  # fmt: skip
def test_what_cannot_play_is_named(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LeRobotPolicy.load(edited(folders["act"], tmp_path / "policy", **changes), "cpu")


def test_a_policy_that_lives_on_earlier_calls_is_refused(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "pretrained_model", "vqbet", told=False, crop_shape=(PIXELS, PIXELS), use_group_norm=True
    )
    with pytest.raises(ConfigError, match="config.json: type: got \"'vqbet', which raises"):
        LeRobotPolicy.load(folder, "cpu")


def test_damaged_and_lonely_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint: got .*expected a folder with config.json"):
        LeRobotPolicy.load(tmp_path / "nowhere", "cpu")
    lonely = edited(folders["act"], tmp_path / "lonely")
    (lonely / "train_config.json").unlink()
    with pytest.raises(ConfigError, match="fps: got 'no dataset"):
        LeRobotPolicy.load(lonely, "cpu", tmp_path / "no_dataset")
    assert LeRobotPolicy.load(lonely, "cpu", folders["act"].parent / "dataset").features.fps == FPS
    weights = load_file(lonely / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), lonely / "model.safetensors")
    with pytest.raises(ConfigError, match="Missing key"):  # LeRobot alone would go on with random numbers
        LeRobotPolicy.load(lonely, "cpu", folders["act"].parent / "dataset")
    (lonely / "policy_preprocessor.json").unlink()
    save_file(weights, lonely / "model.safetensors")
    with pytest.raises(ConfigError, match="processors: got .*expected policy_preprocessor.json"):
        LeRobotPolicy.load(lonely, "cpu", folders["act"].parent / "dataset")
    (lonely / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="without model.safetensors"):
        LeRobotPolicy.load(lonely, "cpu")


def test_wrong_observations_are_refused(policies: dict[str, LeRobotPolicy]) -> None:
    policy, (images, state) = policies["act"], observe(1)
    with pytest.raises(ValueError, match="height and width of camera front"):
        policy.predict_chunk({"front": np.zeros((3, 1, 32, 32, 3), np.uint8)}, state, TASKS)
    with pytest.raises(ValueError, match="cameras"):
        policy.predict_chunk({"wrist": images["front"]}, state, TASKS)
    with pytest.raises(ValueError, match="shape of the state"):
        policy.predict_chunk(images, state[..., :1], TASKS)


def test_a_dataset_is_told(tmp_path: Path) -> None:
    from lerobot.datasets import LeRobotDataset

    features = {
        f"{IMAGES}front": {"dtype": "image", "shape": (8, 8, 3), "names": ["height", "width", "channels"]},
        STATE: {"dtype": "float32", "shape": (P,), "names": None},
        ACTION: {"dtype": "float32", "shape": (A,), "names": None},
    }
    source = LeRobotDataset.create(
        "local/toy", FPS, features, root=tmp_path / "source", use_videos=False, image_writer_threads=0
    )
    for episode, task in enumerate(["reach red", "reach blue", "reach red"]):
        for _ in range(3):
            frame = {f"{IMAGES}front": np.full((8, 8, 3), episode, np.uint8), STATE: np.zeros(P, np.float32)}
            source.add_frame(frame | {ACTION: np.ones(A, np.float32), "task": task})
        source.save_episode()
    source.finalize()
    tell(tmp_path / "source", tmp_path / "told")
    told, sentences = LeRobotDataset("local/told", root=tmp_path / "told"), Sentences()
    assert len(told) == 9
    for item in map(told.__getitem__, range(9)):
        np.testing.assert_array_equal(item[ENVIRONMENT_STATE].numpy(), sentences([item["task"]])[0])
    stats: Any = told.meta.stats
    np.testing.assert_allclose(
        stats[ENVIRONMENT_STATE]["mean"],
        sentences(["reach red", "reach blue", "reach red"]).mean(0),
        atol=1e-5,
    )
    assert stats[ACTION]["mean"].shape == (A,)
    with pytest.raises(ConfigError, match="target: got"):
        tell(tmp_path / "source", tmp_path / "told")
    with pytest.raises(ConfigError, match="source: got"):
        tell(tmp_path / "nowhere", tmp_path / "again")


def toy_job(output: Path, **evaluate: Any) -> Job:
    quick = {"episodes": 2, "n_action_steps": 3, "slots": 2, "workers": 1, "videos": 0, "controls": False}
    return Job(
        str(output),
        env=EnvConfig("toy_env:Toy-v0", {"pixels": PIXELS}),
        evaluate=EvaluateConfig(**(quick | evaluate)),
    )


def test_the_evaluator_plays_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    evaluate = load_script("evaluate")
    result = evaluate.main(toy_job(tmp_path / "out"), folders["act"])
    assert result.n_episodes == 2
    data = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert data["checkpoint"]["sha256"] is not None
    model = replace(Job().model, chunk_size=H + 1, max_prefix=0)  # the job's own network could do it
    job = toy_job(tmp_path / "out")
    long = replace(job, model=model, evaluate=replace(job.evaluate, n_action_steps=H + 1))
    with pytest.raises(ConfigError, match=f"evaluate.n_action_steps: got {H + 1}, expected at most .* {H}"):
        evaluate.main(long, folders["act"])


def test_the_command_line_of_the_evaluator(folders: dict[str, Path], tmp_path: Path) -> None:
    evaluate, folder = load_script("evaluate"), folders["act"]
    job, path = evaluate.from_command_line([str(folder), "configs/quickstart.yaml", "--evaluate.episodes=7"])
    assert (path, job.evaluate.episodes) == (folder, 7)
    assert Path(job.output) == folder.parent / "evaluation"  # not among what is uploaded
    job, _ = evaluate.from_command_line([str(folder), "configs/quickstart.yaml", f"--output={tmp_path}"])
    assert Path(job.output) == tmp_path
    with pytest.raises(ConfigError, match="CONFIG: got 'none', expected a YAML file"):
        evaluate.from_command_line([str(folder), "--evaluate.episodes=7"])


def comparison(tmp_path: Path) -> tuple[Any, Any]:
    """A script whose one peer has two tries, of which the first ends in nan; nothing is run."""
    compare = load_script("compare")
    tried = [{"policy.optimizer_lr": 3e-4, "batch_size": 64}, {"policy.optimizer_lr": 1e-4, "batch_size": 32}]
    rows = {"act": compare.Row("ACT", {"policy.type": "act", "policy.x": None}, tries=tried)}
    rows["deaf"] = compare.Row("ACT, deaf", {"policy.type": "act"}, like="act")
    root = tmp_path / "data" / "meta"
    root.mkdir(parents=True)
    base = tmp_path / "base.yaml"
    base.write_text(f"data: {{root: {root.parent}}}\n")
    results = str(tmp_path / "results.json")
    return compare, compare.Comparison(
        str(base), str(tmp_path / "out"), results, budget=110.0, trial=60.0, rows=rows
    )


def test_a_comparison_chooses_once_and_spends_the_budget(tmp_path: Path) -> None:
    compare, setup = comparison(tmp_path)
    calls: list[list[str]] = []

    class Dry(compare.Stages):
        def run(self, command: list[str], output: Path) -> tuple[float, str]:
            calls.append(command)
            output.mkdir(parents=True, exist_ok=True)
            logged = (
                "updt_s:9.0 data_s:9.0\n" + 3 * "updt_s:0.30 data_s:0.10\n"
            )  # 0.4 s a step after the first
            loss = "nan" if "--batch_size=64" in command else "0.5"
            steps = int(next(flag.split("=")[1] for flag in command if flag.startswith("--steps=")))
            return 10 + 0.4 * steps, f"{logged}step {steps}: eval_loss={loss}\n"

    trained = Dry(setup).train("deaf")
    assert [one["held_out_loss"] for one in trained["tried"]] == [None, 0.5]
    assert (trained["batch_size"], trained["steps"], trained["samples"]) == (
        32,
        250,
        8000,
    )  # (110 - 10) / 0.4
    assert trained["wall_s"] == pytest.approx(110)
    assert trained["pace"]["waiting"] == pytest.approx(0.25)
    assert "--policy.optimizer_lr=0.0001" in trained["command"]
    assert len(calls) == 6  # pace and trial of two tries, its own pace, the training
    told = Dry(setup).train("act")
    assert len(calls) == 8  # the choice is there already
    assert "--policy.x=null" in told["command"]
    with pytest.raises(ConfigError, match=r"seed: got \[1\], expected \[0\], as .* was made with"):
        Dry(replace(setup, seed=1)).train("act")  # which would show the other seed's numbers


def test_the_table_of_a_comparison(tmp_path: Path) -> None:
    compare, _ = comparison(tmp_path)
    group = {"success_rate": 0.25, "wilson_95": [0.1, 0.4]}
    row = {
        "title": "ACT",
        "train": {"wall_s": 340.4, "steps": 1234, "samples": 9872},
        "evaluate": group | {"counterfactual_pairs": group, "controls": {"blank": group}},
        "answers": {"params": 51_747_717, "p50_ms": 30.04, "p99_ms": 41.0},
    }
    line = compare.table([row]).splitlines()[-1]
    rates = "25% [10, 40]"
    assert (
        line
        == f"| ACT | 51.7 M | 340 s, 1,234 steps | 9,872 | {rates} | {rates} | {rates} | 30.0 ms | 41.0 ms |"
    )


def test_answers_are_timed_and_networks_counted(tmp_path: Path) -> None:
    """The last stage, with a real checkpoint."""
    compare, _ = comparison(tmp_path)
    job = toy_run.toy_job(tmp_path)
    model, statistics = toy_run.toy_step(job).model, toy_run.toy_store().statistics()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    path = checkpoint.save(tmp_path / "checkpoints", 1, job, model, statistics, trained, {}, keep=1)
    found = compare.answers({"ours": str(path)}, job, 3)["ours"]
    assert (found["n"], found["threads"]) == (3, 1)
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert found["params"] == sum(p.numel() for p in trained.values())


def test_wrong_comparisons_are_named(tmp_path: Path) -> None:
    _, setup = comparison(tmp_path)
    with pytest.raises(ConfigError, match="only: got 'vla', expected some of act, deaf"):
        replace(setup, only=("vla",))
    with pytest.raises(ConfigError, match="rows.act.like: got 'nobody'"):
        replace(setup, rows={"act": replace(setup.rows["act"], like="nobody")})
