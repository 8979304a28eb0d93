"""A checkpoint as a policy: what goes in, what comes out, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_run import toy_job, toy_model, toy_step, toy_store

from vla.config import ConfigError
from vla.device import resolve_device
from vla.model.text import TextTokens
from vla.model.vla import VLA
from vla.observation import Features
from vla.policy import Policy

B, H, A = 3, 4, 2
TASKS = ["reach red", "go to the blue target", "reach red"]


def make_policy(precision: str = "fp32", **model: Any) -> Policy:
    job = toy_job(Path(), toy_model(**model), precision=precision)
    return Policy(toy_step(job).model, job, "cpu")


def observe(steps: int = 1, n: int = B) -> tuple[dict[str, np.ndarray], np.ndarray]:
    store = toy_store()
    index = np.arange(n)[:, None] * 5 + np.arange(steps)
    return {"front": store.images["front"][index]}, store.state[index]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy()


def test_what_the_policy_says_of_itself(policy: Policy) -> None:
    assert (policy.chunk_size, policy.n_obs_steps, policy.features) == (4, 1, toy_store().features)
    assert not policy.model.training


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_actions_are_float32_and_within_the_limits(precision: str) -> None:
    policy = make_policy(precision)
    with torch.no_grad():
        policy.model.head.out.weight.mul_(100)  # type: ignore[union-attr]
    chunk = policy.predict_chunk(*observe(), TASKS)
    assert chunk.shape == (B, H, A)
    assert chunk.dtype == np.float32
    low, high = toy_store().action.min(0), toy_store().action.max(0)
    assert (chunk >= low - 1e-5).all()
    assert (chunk <= high + 1e-5).all()
    assert np.isclose(chunk, low, atol=1e-4).any() or np.isclose(chunk, high, atol=1e-4).any()


@pytest.mark.parametrize("n_obs_steps", [1, 2])
def test_a_batch_equals_its_robots_one_by_one(n_obs_steps: int) -> None:
    policy = make_policy(n_obs_steps=n_obs_steps)
    images, state = observe(n_obs_steps)
    together = policy.predict_chunk(images, state, TASKS)
    assert not np.allclose(together[0], together[2])  # the same words before another picture
    for i in range(B):
        alone = policy.predict_chunk(
            {"front": images["front"][i : i + 1]}, state[i : i + 1], TASKS[i : i + 1]
        )
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


def test_history_matters() -> None:
    policy = make_policy(n_obs_steps=2)
    images, state = observe(2)
    chunk = policy.predict_chunk(images, state, TASKS)
    state = state.copy()
    state[:, 0] += 1
    assert not np.allclose(policy.predict_chunk(images, state, TASKS), chunk)


def test_one_observation_with_lerobots_keys(policy: Policy) -> None:
    images, state = observe()
    observation = {"observation.images.front": images["front"][1, 0], "observation.state": state[1, 0]}
    one = policy.predict(observation, TASKS[1])
    assert one.shape == (H, A)
    np.testing.assert_allclose(one, policy.predict_chunk(images, state, TASKS)[1], atol=1e-5)


def test_float64_states_are_taken(policy: Policy) -> None:
    images, state = observe()
    expected = policy.predict_chunk(images, state, TASKS)
    np.testing.assert_array_equal(policy.predict_chunk(images, state.astype(np.float64), TASKS), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_committed_actions_come_back_unchanged(precision: str) -> None:
    policy = make_policy(precision)
    free = policy.predict_chunk(*observe(), TASKS)
    prefix = np.random.default_rng(0).uniform(-1, 1, (B, H, A)).astype(np.float32)
    chunk = policy.predict_chunk(*observe(), TASKS, prefix, np.array([0, 2, 1]))
    np.testing.assert_allclose(chunk[0], free[0], atol=1e-2 if precision == "bf16" else 1e-5)
    np.testing.assert_array_equal(chunk[1, :2], prefix[1, :2])
    np.testing.assert_array_equal(chunk[2, :1], prefix[2, :1])
    assert not np.allclose(chunk[1, 2:], free[1, 2:])


def test_each_instruction_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen = make_policy(), []
    encode = TextTokens.encode

    def counted(self: TextTokens, words: Any) -> Any:
        seen.append(words.x)
        return encode(self, words)

    monkeypatch.setattr(TextTokens, "encode", counted)
    for _ in range(3):
        policy.predict_chunk(*observe(), TASKS)
    assert len(seen) == 2
    policy.predict_chunk(*observe(), ["reach green", *TASKS[:2]])
    assert len(seen) == 3


def two_cameras(**model: Any) -> Policy:
    job = toy_job(Path(), toy_model(**model))
    features = Features(dict.fromkeys(("front", "wrist"), (32, 32)), 2, A, 10)
    torch.manual_seed(0)
    return Policy(VLA(job.model, features, toy_store().statistics()), job, "cpu")


def test_a_policy_trained_with_camera_dropout_does_without_a_camera() -> None:
    policy, (images, state) = two_cameras(camera_dropout=0.3), observe()
    alone = policy.predict_chunk(images, state, TASKS)  # its front camera only
    wrist = 255 - images["front"]
    assert not np.allclose(alone, policy.predict_chunk(images | {"wrist": wrist}, state, TASKS))
    assert np.array_equal(alone, policy.predict_chunk(images, state, TASKS))
    other = policy.predict_chunk({"wrist": images["front"]}, state, TASKS)
    assert not np.allclose(alone, other)  # the same picture in another place
    with pytest.raises(ValueError, match=r"cameras. got: \[\]"):
        policy.predict_chunk({}, state, TASKS)
    with pytest.raises(ValueError, match=r"cameras. got: \['front', 'top'\]"):
        policy.predict_chunk(images | {"top": wrist}, state, TASKS)


def test_other_policies_want_all_their_cameras() -> None:
    with pytest.raises(ValueError, match=r"got: \['front'\]. expected: \['front', 'wrist'\].*camera_dropout"):
        two_cameras().predict_chunk(*observe(), TASKS)


def test_one_camera_cannot_be_dropped() -> None:
    with pytest.raises(ConfigError, match="model.camera_dropout: got 0.3, expected 0 with one camera"):
        make_policy(camera_dropout=0.3)


def change(**parts: Any) -> dict[str, Any]:
    images, state = observe()
    return {"images": images, "state": state, "tasks": TASKS} | parts


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"images": {}}, r"cameras. got: \[\]. expected: \['front'\]"),
        ({"images": {"wrist": observe()[0]["front"]}}, r"cameras. got: \['wrist'\]. expected: \['front'\]"),
        (
            {"images": {"front": observe()[0]["front"].astype(np.float32)}},
            "type of camera front. got: float32",
        ),
        ({"images": {"front": observe()[0]["front"][:, 0]}}, r"shape of camera front. got: \(3, 32, 32, 3\)"),
        ({"images": {"front": observe(2)[0]["front"]}}, r"shape of camera front. got: \(3, 2, 'h', 'w', 3\)"),
        (
            {"images": {"front": observe()[0]["front"].transpose(0, 1, 4, 2, 3)}},
            r"shape of camera front. got: .*32\)",
        ),
        ({"state": observe()[1][:, :, :1]}, r"shape of the state. got: \(3, 1, 1\). expected: \(3, 1, 2\)"),
        ({"state": observe()[1][:2]}, r"shape of the state. got: \(2, 1, 2\)"),
        ({"tasks": TASKS[:2]}, r"got: \(3, 1, 'h', 'w', 3\). expected: \(2, 1, 'h', 'w', 3\)"),
        ({"prefix": np.zeros((B, H, A), np.float32)}, "only one of prefix and prefix_length"),
        ({"prefix": np.zeros((B, 3, A)), "prefix_length": np.zeros(B, int)}, r"prefix. got: \(3, 3, 2\)"),
        ({"prefix": np.zeros((B, H, A)), "prefix_length": np.zeros(1, int)}, r"prefix_length. got: \(1,\)"),
        (
            {"prefix": np.zeros((B, H, A)), "prefix_length": np.array([0, 1, 3])},
            r"prefix_length. got: \[0, 1, 3\]. expected: 0 … 2, as trained",
        ),
        ({"prefix": np.zeros((B, H, A)), "prefix_length": np.array([-1, 0, 0])}, r"prefix_length. got: \[-1"),
        (
            {"prefix": np.full((B, H, A), np.nan), "prefix_length": np.array([0, 1, 0])},
            "numbers in the prefix. got: not finite",
        ),
    ],
)
def test_what_does_not_fit_is_explained(policy: Policy, parts: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected + ".*remedy: "):
        policy.predict_chunk(**change(**parts))


def test_a_missing_key_is_named(policy: Policy) -> None:
    images, state = observe()
    with pytest.raises(ValueError, match="expected: observation.state.*remedy"):
        policy.predict({"observation.images.front": images["front"][0, 0]}, TASKS[0])
    with pytest.raises(ValueError, match=r"cameras. got: \[\]. expected: \['front'\]"):
        policy.predict({"observation.state": state[0, 0]}, TASKS[0])


def test_devices_that_are_not_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda:77", "abacus"):
        with pytest.raises(ConfigError, match=f"device: got '{name}', expected .*remedy"):
            resolve_device(name)
    assert resolve_device("auto").type in ("cpu", "cuda")


def test_a_loaded_policy_knows_its_checkpoint(tmp_path: Path) -> None:
    from vla.training.loop import train

    job = toy_job(tmp_path, steps=1)
    path = train(job, toy_store())
    policy = Policy.load(tmp_path, "cpu")
    assert policy.checkpoint == path
    assert policy.job == replace(job)
