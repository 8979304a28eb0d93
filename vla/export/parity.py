"""How far an export is from its checkpoint, measured through the same door as robots use.

B batch   T n_obs_steps   H chunk_size   A action_dim   P state_dim
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vla.data.normalize import Statistics
from vla.observation import ACTION, STATE, Features

OBSERVATIONS = 48
# Of different lengths, so that padding differs; those that have too many tokens for a policy are left out.
INSTRUCTIONS = (
    "",
    "reach",
    "press the red button",
    "go to the blue target",
    "pick up the small green cube and put it into the bowl on the left",
    "open the drawer",
)


def instructions(policy: Any) -> list[str]:
    """Those of INSTRUCTIONS that the policy can read. Raises ConfigError when it reads none."""
    texts = [
        text
        for text in INSTRUCTIONS
        if len(policy.text.tokenizer.encode(text).ids) <= policy.text.sizes.max_tokens
    ]
    return texts or list(INSTRUCTIONS[:1])


def observations(
    features: Features, n_obs_steps: int, statistics: Statistics, n: int, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """n random observations that the sensors could give: images (n, T, h, w, 3), states (n, T, P).

    States lie inside the demonstrations' limits; half of the images are noise, half large flat patches.
    """
    images = {}
    for name, (h, w) in features.cameras.items():
        coarse = rng.integers(0, 256, (n, n_obs_steps, -(-h // 8), -(-w // 8), 3), dtype=np.uint8)
        patches = coarse.repeat(8, axis=2).repeat(8, axis=3)[:, :, :h, :w]
        noise = rng.integers(0, 256, patches.shape, dtype=np.uint8)
        images[name] = np.where((np.arange(n) % 2 == 0)[:, None, None, None, None], patches, noise)
    low, high = np.array(statistics[STATE].min), np.array(statistics[STATE].max)
    state = rng.uniform(low, high, (n, n_obs_steps, features.state_dim)).astype(np.float32)
    return images, state


def parity(policy: Any, reference: Any, statistics: Statistics, seed: int = 0) -> dict[str, Any]:
    """Differences between two policies' chunks, as shares of each action dimension's range.

    Every length of prefix occurs, and every instruction; where a camera may be missing, one is in every
    third observation. Observations go one by one, as robots ask. A dimension that never moves counts
    in its own units. Returns the maximum, the mean over actions that are not committed, and on what they
    were measured.
    """
    rng, inputs = np.random.default_rng(seed), policy.inputs
    images, state = observations(policy.features, policy.n_obs_steps, statistics, OBSERVATIONS, rng)
    low, high = np.array(statistics[ACTION].min), np.array(statistics[ACTION].max)
    span = np.where(high > low, high - low, 1.0)  # (A,)
    texts, errors, peaks = instructions(policy), [], []
    for i in range(OBSERVATIONS):
        names = sorted(images)
        if inputs.may_miss and i % 3 == 0:
            names.remove(names[i // 3 % len(names)])
        prefix = rng.uniform(low, high, (1, policy.chunk_size, len(low))).astype(np.float32)
        asked = (
            {name: images[name][i : i + 1] for name in names}, state[i : i + 1], [texts[i % len(texts)]],
            prefix, np.array([committed := i % (policy.max_prefix + 1)]),
        )  # fmt: skip
        error = np.abs(policy.predict_chunk(*asked) - reference.predict_chunk(*asked))[0] / span  # (H, A)
        peaks.append(error.max())
        errors.append(error[committed:])
    return {
        "max_of_range": float(np.max(peaks)),  # NaN where a chunk has one
        "mean_of_range": float(np.concatenate(errors).mean()),
        "observations": OBSERVATIONS,
        "instructions": len(texts),
        "seed": seed,
    }
