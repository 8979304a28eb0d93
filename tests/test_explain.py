"""Looking inside: the maps are the network's own, they change nothing, and the pictures show them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from load_script import load_script
from parity import parity
from PIL import Image
from torch import Tensor
from toy_env import COLOURS, ToyEnv
from toy_run import toy_job, toy_model, toy_step, toy_store

from vla.architecture import AttentionConfig, ImageConfig, ResamplerConfig
from vla.environment import make_env
from vla.explain import Look, Memory, play, recording
from vla.explain.episode import look
from vla.explain.localise import Sighting, localise, measure
from vla.explain.maps import Maps, rolled
from vla.explain.pictures import DIM, film_page, grid, overlay, percent
from vla.model.vla import VLA
from vla.observation import IMAGES, STATE, Observation
from vla.policy import Policy
from vla.training.checkpoint import CheckpointError
from vla.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
H = 4
TASKS = ["reach red", "go to the blue target", "reach blue"]  # of 2 and 5 words
LONG = AttentionConfig("linformer", rank=8)
RESAMPLED = ImageConfig(pixels=32, patch=8, resampler=ResamplerConfig(tokens=3))
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "post": {"norm": "post", "n_decoder_layers": 2, "n_encoder_layers": 2},
    "history": {"n_obs_steps": 2},
    "autoregressive": {"decoding": "autoregressive"},
    "bins": {"decoding": "autoregressive", "head": "bins", "bins": 8},
    "flow": {"head": "flow", "flow_steps": 2},
    "cross": {"fusion": "cross"},
    "linformer": {"attention": LONG},
    "resampler": {"image": RESAMPLED},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make_policy(**model: Any) -> Policy:
    job = toy_job(Path(), toy_model(**model), precision="fp32")
    policy = Policy(toy_step(job).model, job, "cpu")
    with torch.no_grad():  # at its initialisation attention is nearly even, and shows little
        for layer in policy.model.decoder.layers:
            layer.cross_attention.query.weight.mul_(8)  # type: ignore[union-attr]
    return policy


def observe(policy: Policy) -> tuple[dict[str, np.ndarray], np.ndarray]:
    store = toy_store()
    index = np.arange(len(TASKS))[:, None] * 5 + np.arange(policy.n_obs_steps)
    return {"front": store.images["front"][index]}, store.state[index]


def maps_of(policy: Policy) -> tuple[Maps, np.ndarray]:
    with recording(policy.model) as record:
        chunk = policy.predict_chunk(*observe(policy), TASKS)
    return record.maps(), chunk


@every_option
def test_the_weights_of_every_token_sum_to_one_and_padding_gets_none(options: dict[str, Any]) -> None:
    policy = make_policy(**options)
    maps, _ = maps_of(policy)
    config = policy.model.config
    for i, task in enumerate(TASKS):
        memory = Memory.of(policy.model, task)
        length = memory.images + 8 + memory.steps  # texts are padded to a multiple of 8
        assert maps.cross.shape == (3, config.n_decoder_layers, config.n_heads, H, length)
        pad = slice(memory.images + len(memory.words), memory.images + 8)
        for weights in (maps.cross, maps.average, *([] if maps.encoder is None else [maps.rollout])):
            torch.testing.assert_close(weights[i].sum(-1), torch.ones(weights[i].shape[:-1]))
            assert (weights[i][..., pad] == 0).all()
            parts = [memory.of_images(weights[i]), memory.of_words(weights[i]), memory.of_state(weights[i])]
            total = parts[0].sum((-3, -2, -1)) + parts[1].sum(-1) + parts[2].sum(-1)
            torch.testing.assert_close(total, torch.ones_like(total))
    assert maps.cross.std() > 0.01  # there is something to see


@every_option
def test_taking_maps_changes_no_bit_of_the_output(options: dict[str, Any]) -> None:
    policy = make_policy(**options)
    before = policy.predict_chunk(*observe(policy), TASKS)
    _, during = maps_of(policy)
    assert np.array_equal(before, during)
    assert np.array_equal(before, policy.predict_chunk(*observe(policy), TASKS))
    assert not any("attend" in vars(module) for module in policy.model.modules())


def test_an_error_inside_leaves_the_network_as_it_was() -> None:
    policy = make_policy()
    with pytest.raises(KeyError), recording(policy.model):
        raise KeyError("of the caller")
    assert not any("attend" in vars(module) for module in policy.model.modules())


def by_the_formula(model: VLA, layer: int, x: Tensor, memory: Tensor, pad: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √d) of a decoder layer's cross-attention in float64: (B, n, H, S)."""
    attention: Any = model.decoder.layers[layer].cross_attention
    q = x.double() @ attention.query.weight.double().T + attention.query.bias.double()
    width = q.shape[-1]
    k = memory.double() @ attention.key_value.weight[:width].double().T
    k = k + attention.key_value.bias[:width].double()
    heads = []
    for n in range(attention.n_heads):
        d = width // attention.n_heads
        part = slice(n * d, (n + 1) * d)
        scores = torch.einsum("bqd,bsd->bqs", q[..., part], k[..., part]) / math.sqrt(d)
        scores = torch.where(pad[:, None], -math.inf, scores).exp()
        heads.append(scores / scores.sum(-1, keepdim=True))
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("name", ["default", "post", "cross", "resampler"])
def test_the_maps_are_those_of_the_formula(name: str) -> None:
    policy = make_policy(**OPTIONS[name])
    heard: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in policy.model.decoder.layers:
        attention: Any = layer.cross_attention
        attention.register_forward_hook(lambda module, inputs, output: heard.append(inputs))
    maps, _ = maps_of(policy)
    assert len(heard) == maps.cross.shape[1]
    with torch.inference_mode():
        for layer, inputs in enumerate(heard):
            expected = by_the_formula(policy.model, layer, *inputs)
            parity("attention maps", "the formula", maps.cross[:, layer], expected.float(), 2e-6)


@pytest.mark.parametrize("name", ["autoregressive", "bins"])
def test_maps_of_cached_decoding_are_those_of_one_pass_over_its_chunk(name: str) -> None:
    policy = make_policy(**OPTIONS[name])
    maps, chunk = maps_of(policy)
    images, state = observe(policy)
    model = policy.model
    with torch.inference_mode():
        seen = Observation(
            {"front": torch.from_numpy(images["front"]).permute(0, 1, 4, 2, 3)},
            torch.from_numpy(state),
            policy.text(TASKS),
        )
        actions = model.normalizer.normalize(torch.from_numpy(chunk))
        with recording(model) as record:
            model(seen, actions, torch.zeros(len(TASKS), H, dtype=torch.bool))
    torch.testing.assert_close(record.maps().cross, maps.cross, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("times", [0, 2])
def test_not_exactly_one_chunk_is_refused(times: int) -> None:
    policy = make_policy()
    with recording(policy.model) as record:
        for _ in range(times):
            policy.predict_chunk(*observe(policy), TASKS)
    with pytest.raises(ValueError, match=f"got: {times * H} action tokens. expected: {H}. remedy"):
        record.maps()


def test_rollout_known_by_hand() -> None:
    eye, even = torch.eye(3).expand(1, 1, 3, 3), torch.full((1, 1, 3, 3), 1 / 3)
    torch.testing.assert_close(rolled(torch.cat([eye, eye], 1))[0], torch.eye(3))
    # ((U + I) / 2)² = (3 U + I) / 4, since U U = U
    torch.testing.assert_close(rolled(torch.cat([even, even], 1))[0], (3 * even[0, 0] + torch.eye(3)) / 4)
    # the first layer copies token 0 into token 1, the second token 1 into token 2: 0 reaches 2, not back
    first, second = torch.eye(3), torch.eye(3)
    first[1], second[2] = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    flow = rolled(torch.stack([first, second])[None])[0]
    torch.testing.assert_close(flow, torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]]))


@pytest.mark.parametrize("name", ["default", "post", "autoregressive"])
def test_rollout_is_a_distribution_and_the_average_through_an_idle_encoder(name: str) -> None:
    maps, _ = maps_of(make_policy(**OPTIONS[name]))
    torch.testing.assert_close(maps.rollout.sum(-1), torch.ones(3, H))
    assert not torch.allclose(maps.rollout, maps.average, atol=1e-3)
    assert maps.encoder is not None
    idle = Maps(maps.cross, torch.eye(maps.cross.shape[-1]).expand_as(maps.encoder))
    torch.testing.assert_close(idle.rollout, maps.average)


@pytest.mark.parametrize("name", ["linformer", "cross"])
def test_rollout_needs_full_maps_of_the_encoder(name: str) -> None:
    maps, _ = maps_of(make_policy(**OPTIONS[name]))
    with pytest.raises(ValueError, match=r"got.*expected: model\.attention\.kind=full.*remedy"):
        _ = maps.rollout


def test_the_memory_is_cut_where_the_network_puts_its_tokens() -> None:
    """Against the network itself: what marks a camera, a time, the words, the state, must lie there."""
    from dataclasses import replace

    from vla.data.normalize import Statistics

    features = replace(toy_store().features, cameras={"wrist": (32, 32), "front": (32, 32)})
    store: Statistics = toy_store().statistics()
    model = VLA(toy_model(n_obs_steps=2), features, store).eval()
    memory = Memory.of(model, TASKS[0])
    assert (memory.steps, memory.cameras, memory.tokens) == (2, ("front", "wrist"), 4)
    assert memory.words == ("reach", "red")
    text = Policy(model, toy_job(Path(), toy_model(n_obs_steps=2)), "cpu").text(TASKS[:1])
    seen = Observation(
        {name: torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8) for name in features.cameras},
        torch.zeros(1, 2, 2),
        text,
    )

    def marked(parameter: Tensor, index: Any) -> Tensor:
        """Which tokens of the memory change with a parameter: (S,)."""
        with torch.no_grad():
            before = model.tokens(seen).x
            parameter[index] += 10
            after = model.tokens(seen).x
            parameter[index] -= 10
        return (before - after).abs().amax(-1)[0] > 1

    image: Any = model.tokens.image
    wrist = memory.of_images(marked(image.camera, 1))
    assert wrist[:, 1].all()
    assert not wrist[:, 0].any()
    newest = memory.of_images(marked(image.time.table, 1))
    assert newest[1].all()
    assert not newest[0].any()
    state = marked(model.tokens.modality, 2)
    assert memory.of_state(state).all()
    assert state.sum() == 2
    words = marked(model.tokens.modality, 1)
    assert memory.of_words(words).all()
    assert not memory.of_images(words).any()


def test_patches_are_numbered_in_rows() -> None:
    model = make_policy(image=ImageConfig(pixels=32, patch=8, stem="patch")).model
    memory, maps = Memory.of(model, TASKS[0]), Maps(torch.zeros(1, 1, 1, 1, 1))
    stem: Any = model.tokens.image.backbone.patch_embed
    images = torch.zeros(1, 3, 32, 32)
    with torch.inference_mode():
        dark = stem(images)
        images[:, :, 12:13, 20:21] = 5  # inside row 1, column 2
        change = (stem(images) - dark).abs().sum(-1)  # (1, V)
    weights = torch.cat([change, torch.zeros(1, 3)], dim=1)
    grid_of_patches = memory.patches(weights, maps)[0, 0, 0]
    assert grid_of_patches.shape == (4, 4)
    assert divmod(int(grid_of_patches.argmax()), 4) == (1, 2)


def test_queries_of_a_resampler_hand_their_weight_on_to_the_patches() -> None:
    policy = make_policy(**OPTIONS["resampler"])
    maps, _ = maps_of(policy)
    memory = Memory.of(policy.model, TASKS[0])
    assert memory.tokens == 3
    patches = memory.patches(maps.average, maps)  # (B, H, T, C, side, side)
    assert patches.shape == (3, H, 1, 1, 4, 4)
    torch.testing.assert_close(patches.sum((-2, -1)), memory.of_images(maps.average).sum(-1))
    assert maps.resampler is not None
    queries = memory.of_images(maps.average)[1, 2, 0, 0]  # (3,)
    by_hand = sum(queries[i] * maps.resampler[1, 0, i] for i in range(3))
    torch.testing.assert_close(patches[1, 2, 0, 0].flatten(), by_hand)


def test_tokens_without_a_square_grid_are_refused() -> None:
    memory = Memory(1, ("front",), 6, ("reach",))
    with pytest.raises(ValueError, match="got: 6 tokens per image. expected: the square"):
        memory.patches(torch.zeros(1, 8), Maps(torch.zeros(1, 1, 1, 1, 8)))


def first_look(policy: Policy, cameras: tuple[str, ...] = ("front",)) -> Look:
    env = ToyEnv(cameras=cameras)
    return next(play(policy, env, seed=3))


def test_an_episode_is_played_as_its_schedule_says() -> None:
    policy = make_policy()
    env, _ = make_env("toy_env:Toy-v0", {})  # with its time limit
    looks = list(play(policy, env, seed=3, task="reach green"))
    assert [seen.step for seen in looks] == list(range(0, 2 * len(looks), 2))  # n_action_steps = 2
    assert all(len(seen.after) == 2 for seen in looks[:-1])
    assert all(seen.task == "reach green" for seen in looks)
    for before, after in itertools.pairwise(looks):
        assert np.array_equal(before.after[-1]["front"], after.images["front"][-1])
    observation, _ = env.reset(seed=3, options={"task": "reach green"})
    images = {"front": observation[IMAGES + "front"][None, None]}
    chunk = policy.predict_chunk(images, observation[STATE][None, None], ["reach green"])
    assert np.array_equal(chunk[0], looks[0].chunk)


def test_light_shows_the_frames_own_colours_and_dims_the_rest() -> None:
    frame = np.full((32, 32, 3), (200, 100, 50), np.uint8)
    weights = np.zeros((4, 4), np.float32)
    weights[1, 2] = 0.5
    picture = np.asarray(overlay(frame, weights, full=0.5, wanted=128))
    assert picture.shape == (128, 128, 3)
    assert np.array_equal(picture[48, 80], (200, 100, 50))  # middle of row 1, column 2
    assert np.array_equal(picture[120, 5], np.round(np.array((200, 100, 50)) * DIM))
    assert picture[32, 80].sum() < 200  # the square around the strongest patch
    half = np.asarray(overlay(frame, weights, full=1.0, wanted=128))
    assert picture[48, 80].sum() > half[48, 80].sum() > picture[120, 5].sum()


def test_a_frame_is_enlarged_by_whole_pixels_and_never_shrunk() -> None:
    weights = np.ones((2, 2), np.float32)
    assert overlay(np.zeros((50, 50, 3), np.uint8), weights, 1, wanted=128).size == (100, 100)
    assert overlay(np.zeros((300, 400, 3), np.uint8), weights, 1, wanted=128).size == (400, 300)


@every_option
def test_pictures_of_every_network(options: dict[str, Any]) -> None:
    seen = first_look(make_policy(**options))
    page = grid(seen, [0, 3])
    heads = seen.maps.cross.shape[1] * seen.maps.cross.shape[2]
    assert page.height > (heads + 1 + (seen.maps.encoder is not None)) * 192
    full = {"average": 0.1, "rollout": 0.1, "words": 0.1}
    now = {"front": seen.images["front"][-1]}
    film = film_page(seen, 1, now, full, "")
    columns = 2 + (seen.maps.encoder is not None)
    assert film.width >= columns * 320
    assert np.asarray(film).std() > 20


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.0 %"), (0.0042, "0.4 %"), (0.0994, "9.9 %"), (0.0996, "10 %"), (1, "100 %")]
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def sighting(peak: tuple[int, int], target: tuple[int, int], rival: tuple[int, int]) -> Sighting:
    """A 2 x 2 grid of patches over 8 x 8 pixels; every item fills the middle of its patch."""
    weights = np.full((1, 2, 2), 0.1, np.float32)
    weights[(0, *peak)] = 0.3

    def pixels(at: tuple[int, int]) -> np.ndarray:
        shown = np.zeros((1, 8, 8), bool)
        shown[0, at[0] * 4 + 1 : at[0] * 4 + 3, at[1] * 4 + 1 : at[1] * 4 + 3] = True
        return shown

    even = np.full((1, 2, 2), 0.1, np.float32)
    return Sighting({"average": weights}, [pixels(target), pixels(rival)], {"average": even})


def test_the_measures_by_hand() -> None:
    hit = sighting(peak=(0, 1), target=(0, 1), rival=(1, 0))
    miss = sighting(peak=(1, 0), target=(1, 1), rival=(1, 0))
    nothing = sighting(peak=(0, 0), target=(0, 1), rival=(1, 0))
    assert hit.cover(0).tolist() == [[[False, True], [False, False]]]
    assert hit.density(0, hit.maps["average"]) == pytest.approx(0.3)
    found = measure([hit, miss, nothing], "average")
    assert found["peak_on_target"]["rate"] == pytest.approx(1 / 3)
    assert found["peak_on_target"]["n"] == 3
    assert found["peak_on_others"] == pytest.approx(1 / 3)  # miss
    assert found["chance"] == 0.25
    assert found["chance_swapped"] == pytest.approx(1 / 6)  # nothing under the peak of hit, of six pairs
    assert found["most_attended"]["rate"] == pytest.approx(1 / 3)  # a tie is no win
    assert found["most_chance"] == 0.5
    assert found["follows"]["rate"] == pytest.approx(1 / 3)


def test_an_item_on_several_patches_covers_all_of_them() -> None:
    shown = np.zeros((1, 10, 10), bool)  # which 3 x 3 patches do not divide
    shown[0, 3:7, 0] = True
    view = Sighting({"average": np.zeros((1, 3, 3))}, [shown])
    assert view.cover(0).tolist() == [[[True, False, False], [True, False, False], [False] * 3]]


class Told:
    """What the toy's pixels show, as `localise` asks for it."""

    def __init__(self, env: ToyEnv) -> None:
        self.env = env

    @property
    def goal(self) -> SimpleNamespace:
        return SimpleNamespace(target=list(COLOURS).index(self.env.goal))

    @property
    def rivals(self) -> list[int]:
        return [i for i in range(3) if i != self.goal.target]

    def segmentation(self, camera: str) -> np.ndarray:
        shown = np.full(self.env.images.shape[:2], -1)
        for i, rgb in enumerate(COLOURS.values()):
            shown[(self.env.images == rgb).all(-1)] = i
        return shown


class SlowToy(ToyEnv):
    """A toy that tells, and ends after five steps that hardly move it."""

    @property
    def unwrapped(self) -> Any:
        return Told(self)

    def reset(self, **options: Any) -> Any:
        self.steps = 0
        return super().reset(**options)

    def step(self, action: np.ndarray) -> Any:
        self.steps += 1
        self.position = self.position + 0.01 * np.clip(action, -1, 1)
        return self._observe(), 0.0, self.steps == 5, False, self._info(False)


def test_localisation_over_scenes() -> None:
    policy = make_policy(n_decoder_layers=2)
    found = localise(policy, SlowToy(), seed=10, episodes=3)
    assert found["scenes"] == 3
    assert found["patches"] == [1, 2, 2]
    assert set(found["every_head"]) == {f"layer {i} head {j}" for i in (1, 2) for j in (1, 2)}
    assert set(found["first_look"]) == {"average", "rollout", found["best_head"]["name"]}
    row = found["first_look"]["average"]
    assert row["peak_on_target"]["n"] == row["follows"]["n"] == 3
    assert 0.25 <= row["chance"] <= 1
    assert found["second_look"]["average"]["peak_on_target"]["n"] == 3  # nothing covers a target
    json.dumps(found)


def test_localisation_needs_an_environment_that_tells() -> None:
    with pytest.raises(ValueError, match="got: ToyEnv without segmentation. expected.*remedy"):
        localise(make_policy(), ToyEnv(), 0, 1)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("explain")


@pytest.mark.parametrize("name", ["default", "linformer"])
def test_the_script_writes_a_picture_and_a_film(
    name: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import av

    train(toy_job(tmp_path / "run", toy_model(**OPTIONS[name]), steps=1), toy_store())
    arguments = ["--seed=5", "--task=reach green", "--evaluate.n_action_steps=1"]
    script.main(*script.from_command_line([str(tmp_path / "run"), *arguments]))
    printed = capsys.readouterr().out
    folder = tmp_path / "run" / "explain"
    assert sorted(path.name for path in folder.iterdir()) == ["explain_run.mp4", "explain_run.png"]
    assert all(str(path) in printed for path in folder.iterdir())
    assert "“reach green”" in printed
    assert np.asarray(Image.open(folder / "explain_run.png")).std() > 20
    with av.open(str(folder / "explain_run.mp4")) as film:
        frames = sum(1 for _ in film.decode(video=0))
    steps = int(printed.split("after ")[1].split()[0])
    assert frames == steps * script.SLOWER + 8  # and the last one held


def test_the_script_needs_a_checkpoint(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a folder with manifest.json.*remedy: train first"):
        script.from_command_line([str(tmp_path)])


def test_look_and_play_agree() -> None:
    from collections import deque

    policy, env = make_policy(n_obs_steps=2), ToyEnv()
    observation, info = env.reset(seed=3)
    seen = look(policy, deque([observation] * 2), info["task"], 0)
    torch.testing.assert_close(seen.maps.cross, first_look(policy).maps.cross, rtol=0, atol=0)
    assert seen.patches(seen.maps.average).shape == (H, 1, 2, 2)
    assert seen.images["front"].shape == (2, 32, 32, 3)
