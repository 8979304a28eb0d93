"""A tabletop that is told what to do: the same scene serves many instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from envs import arm, randomize, splits, tasks
from envs.experts import EXPERTS, feasible
from envs.randomize import SWITCHES
from envs.render import Cameras
from envs.scene import SUBSTEPS, build
from envs.tasks import SKILLS, Goal
from envs.world import Scene, World
from vla.observation import ACTION, IMAGES, IS_SUCCESS, STATE, TASK

CAMERAS = ("front", "wrist")
STATE_DIM = 11
PERIODS = 2  # of physics, in which a command is held
DONE = np.arange(PERIODS, SUBSTEPS + 1, PERIODS)[:, None] / SUBSTEPS  # of the way to a pose, at each command
# The entries of the action by names of LeRobot's kind.
ACTION_NAMES = ("x.vel", "y.vel", "z.vel", "yaw.vel", "gripper.pos")


def state_names(commanded: bool) -> tuple[str, ...]:
    """The entries of the state likewise; commanded: as the environment takes it."""
    lag = ("lag_x.pos", "lag_y.pos", "lag_z.pos", "lag_yaw.pos") if commanded else ()
    return ("x.pos", "y.pos", "z.pos", "sin_yaw.pos", "cos_yaw.pos", "fingers.pos", *lag, "gripper.pos")


def choice(name: str, got: Any, allowed: Sequence[str]) -> tuple[str, ...]:
    got = (got,) if isinstance(got, str) else tuple(got)
    if not got or any(g not in allowed for g in got):
        raise ValueError(
            f"{name}: got {list(got)}, expected some of {', '.join(allowed)}. remedy: correct {name}."
        )
    return got


class Tabletop(gym.Env[dict[str, Any], np.ndarray]):
    """Language-conditioned manipulation with a 7-DoF arm; see splits.py for what a split holds out.

    action (5,): dx, dy, dz (of the commanded fingertip position, full scale 3 cm), dyaw (0.25 rad),
    gripper (-1 closed, 1 open), at 10 Hz.
    observation.state (11,): fingertip position (3) in metres, sin and cos of the hand's yaw,
    finger opening in metres, commanded minus actual position (3), commanded minus actual yaw,
    commanded gripper.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        skills: Sequence[str] = tuple(SKILLS),
        split: str = "train",
        cameras: Sequence[str] = CAMERAS,
        pixels: int = 128,
        references: Sequence[str] = tasks.REFERENCES,
        randomize: dict[str, bool] | None = None,
        row: float | None = None,
        commanded: bool = True,
        max_steps: int | None = None,
        preset: str = "fast",
        render_pixels: int = 256,
        render_mode: str | None = "rgb_array",
    ) -> None:
        """skills: drawn uniformly; references: how instructions name things; randomize: switch -> on
        (all on by default); row: see randomize.draw_scene; commanded: whether the state tells
        commanded minus actual pose, without which it is not quite Markov, and with which a policy can
        copy its last action; max_steps: None takes the skill's own; preset: of render.py;
        render_pixels: side of render()'s picture.
        Raises ValueError for a wrong choice.
        """
        self.skills = choice("skills", skills, tuple(SKILLS))
        self.split = choice("split", split, splits.SPLITS)[0]
        self.cameras = choice("cameras", cameras, CAMERAS)
        self.references = choice("references", references, tasks.REFERENCES)
        self.switches = dict.fromkeys(SWITCHES, True) | {k: bool(v) for k, v in (randomize or {}).items()}
        if randomize:
            choice("randomize", tuple(randomize), SWITCHES)
        able = splits.SKILLS_OF_SPLIT.get(self.split, tuple(SKILLS))
        self.drawn = tuple(s for s in self.skills if s in able)
        if not self.drawn:
            raise ValueError(
                f"split: got {self.split!r} with skills {list(self.skills)}, expected one of the skills "
                f"{list(able)} that this split is about. remedy: add one of them or choose another split."
            )
        for name, value, good in (
            ("pixels", pixels, pixels > 0),
            ("render_pixels", render_pixels, render_pixels > 0),
            ("max_steps", max_steps, max_steps is None or max_steps > 0),
            ("row", row, row is None or 0 <= row <= 0.03),
        ):
            if not good:
                expected = "0 to 0.03 metres" if name == "row" else "a positive number"
                raise ValueError(f"{name}: got {value!r}, expected {expected}. remedy: correct {name}.")
        self.max_steps, self.row, self.commanded = max_steps, row, commanded
        self.pixels, self.render_pixels, self.render_mode = int(pixels), int(render_pixels), render_mode
        self.images_enabled = True
        self.images_at_end = True  # whether the observation that ends an episode shows a new picture
        self.model = build()
        self.data = mujoco.MjData(self.model)
        self.world = World(self.model, self.data)
        self.view = Cameras(self.model, preset)
        self.arm_servos = np.array([self.model.actuator(name).id for name in arm.JOINTS])
        self.finger_servos = np.array([self.model.actuator(name).id for name in arm.FINGERS])
        image = gym.spaces.Box(0, 255, (self.pixels, self.pixels, 3), np.uint8)
        spaces: dict[str, gym.Space[Any]] = {IMAGES + name: image for name in self.cameras}
        spaces[STATE] = gym.spaces.Box(
            -np.inf, np.inf, (STATE_DIM if commanded else STATE_DIM - 4,), np.float32
        )
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (5,), np.float32)
        self.feature_names = {STATE: state_names(commanded), ACTION: ACTION_NAMES}
        self._images = {IMAGES + n: np.zeros((self.pixels, self.pixels, 3), np.uint8) for n in self.cameras}
        self._goals: list[Goal] = []
        self._meanings: dict[str, Goal] = {}  # of the current scene; filled when a sentence is to be read

    # -- episode ---------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """A new scene and its instruction; the seed alone decides both.

        options["task"]: a sentence to follow instead, in the same scene. Raises ValueError when
        the sentence means nothing there.
        """
        super().reset(seed=seed)
        rngs = randomize.generators(self.np_random, self.switches)
        self._draw(rngs)
        if options and options.get("task") is not None:
            self._goals, self._tasks = [self._parse(str(options["task"]))], [str(options["task"])]
        randomize.apply(self.model, self.data, self.world.scene, randomize.draw_look(rngs, self.switches))
        self.world.moved()
        self._commanded, self._yaw, self._grip = self.world.scene.hand.copy(), self.world.scene.hand_yaw, 1.0
        self._done, self._steps = 0, 0
        self.limit = self.max_steps or sum(SKILLS[g.skill].steps for g in self._goals)
        self._before = self._true_goals()
        return self._observe(), self._info(False)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One control step of 0.1 s. Raises ValueError for an action that is not five finite numbers."""
        action = np.asarray(action, np.float64)
        if action.shape != (5,) or not np.isfinite(action).all():
            raise ValueError(
                f"action: got {action!r}, expected 5 finite numbers in [-1, 1]. remedy: check the policy's output."
            )
        self._move(np.clip(action, -1.0, 1.0))
        self._steps += 1
        success, failure = self.judge()
        terminated = success or failure
        truncated = not terminated and self._steps >= self.limit
        shown = self.images_at_end or not (terminated or truncated)
        return self._observe(shown), float(success), terminated, truncated, self._info(success)

    def render(self) -> np.ndarray:
        """(render_pixels, render_pixels, 3) uint8 of the whole arm, for videos; no policy sees it."""
        return self.view.picture(self.data, "view", self.render_pixels)

    def close(self) -> None:
        self.view.close()

    def expert_action(self, task: str | None = None) -> np.ndarray:
        """(5,) float32: the expert's clean action in this state, for the current instruction or another."""
        goal = self._goals[self._done] if task is None else self._parse(task)
        return EXPERTS[goal.skill](self.world, goal, self._commanded, self._yaw)

    @property
    def goal(self) -> Goal:
        """What the current instruction means; indices into `scene.items`."""
        return self._goals[self._done]

    @property
    def rivals(self) -> list[int]:
        """The other items of the kind that the current instruction is about; indices into `scene.items`."""
        scene, target = self.world.scene, self.goal.target
        return [i for i in scene.of(scene.items[target].kind) if i != target]

    def segmentation(self, camera: str) -> np.ndarray:
        """Privileged: (pixels, pixels) int, the item that each pixel of a camera's picture shows now.

        Indices into `scene.items`, as in `goal`; -1 for robot, table and surroundings.
        Raises ValueError for a camera that this environment does not show.
        """
        (camera,) = choice("camera", camera, self.cameras)
        return self.world.items_of(self.view.geoms(self.data, camera, self.pixels))

    def judge(self) -> tuple[bool, bool]:
        """(success, failure), once a step: of two sentences the second follows when the first is done."""
        now, goal = self._true_goals(), self.goal
        success, failure = goal in now, bool(now - self._before - {goal})
        self._before &= now
        if success and self._done + 1 < len(self._goals):
            self._done, success, failure = self._done + 1, False, False
            self._before = self._true_goals()
        return success, failure

    def state(self) -> np.ndarray:
        """(STATE_DIM or 4 less,) float32, as observed."""
        world, yaw = self.world, self.world.hand_yaw
        lag = [*(self._commanded - world.hand), self._yaw - yaw] if self.commanded else []
        return np.array([*world.hand, np.sin(yaw), np.cos(yaw), world.opening, *lag, self._grip], np.float32)

    def adopt(self, position: np.ndarray, yaw: float, grip: float) -> None:
        """Say which pose is commanded, to an environment whose servos another one moves (see robot.py)."""
        self._commanded, self._yaw, self._grip = position, yaw, grip

    @property
    def task(self) -> str:
        """The current instruction."""
        return self._tasks[self._done]

    # -- inside ----------------------------------------------------------------------------

    def _draw(self, rngs: dict[str, np.random.Generator]) -> None:
        """Scene, goals and sentences: draw until the scene allows the skill that was drawn."""
        self._meanings.clear()
        rng = rngs["goal"]
        skill = self.drawn[rng.integers(len(self.drawn))]
        for _ in range(2000):
            layout = rngs["layout"] if self.switches["layout"] else np.random.default_rng(0)
            scene = randomize.draw_scene(SKILLS[skill].scene, rngs["content"], layout, skill, self.row)
            if scene is None:
                continue
            self.world.place(scene)
            askable = self._askable(scene, skill)
            goals = [g for g in askable if splits.belongs(self.split, tasks.split_kind(scene, g))]
            if not goals or len({g.target for g in askable}) < self._candidates(skill):
                continue
            self._goals = [goals[rng.integers(len(goals))]]
            if self.split != "L4":
                break
            first = self._goals[0]
            used, after = {first.target, first.place} - {None}, tasks.done(scene, first)
            later = [g for s in self.skills for g in self._askable(after, s)]
            later = [g for g in later if not {g.target, g.place} & used]
            if later:
                self._goals.append(later[rng.integers(len(later))])
                break
        else:
            raise RuntimeError(f"no scene for skill {skill!r} in split {self.split!r} with {self.switches}")
        unseen = self.split == "L2"
        self._tasks = []
        for goal in self._goals:
            self._tasks.append(tasks.phrase(scene, goal, rng, self.references, unseen))
            scene = tasks.done(scene, goal)  # relations in a second sentence are those of its time
        self._alternatives = self._other_instructions(rng)

    def _askable(self, scene: Scene, skill: str) -> list[Goal]:
        """Feasible goals without those of other splits: the instruction and its alternatives."""
        goals = [g for g in tasks.all_goals(scene, skill) if feasible(scene, g)]
        return [g for g in goals if tasks.split_kind(scene, g) in ("train", self.split)]

    def _candidates(self, skill: str) -> int:
        """How many things must be askable: a held-out colour among three buttons would leave two."""
        return 3 if SKILLS[skill].scene == "buttons" and self.split != "L3" else 2

    def feasible_goals(self, skill: str) -> list[Goal]:
        """Privileged: the goals of a skill that the expert can reach in this scene."""
        return [g for g in tasks.all_goals(self.world.scene, skill) if feasible(self.world.scene, g)]

    def _other_instructions(self, rng: np.random.Generator) -> list[str]:
        """One wording of each other goal here; same skill and another target first."""
        scene, first = self.world.scene, self._goals[0]
        goals = [g for s in self.skills for g in self._askable(scene, s) if g not in self._goals]
        order = rng.permutation(len(goals))
        goals = sorted(
            (goals[i] for i in order), key=lambda g: (g.skill != first.skill, g.target == first.target)
        )
        return [tasks.phrase(scene, g, rng, self.references, self.split == "L2") for g in goals]

    def _parse(self, sentence: str) -> Goal:
        """The goal that a sentence means in this scene, whatever the split."""
        if not self._meanings:
            scene = self.world.scene
            for goal in (g for skill in SKILLS for g in self.feasible_goals(skill)):
                self._meanings |= dict.fromkeys(tasks.sentences(scene, goal), goal)
        wanted = " ".join(sentence.lower().rstrip(" .!").split())
        if wanted in self._meanings:
            return self._meanings[wanted]
        known = "; ".join([*self._tasks, *self._alternatives][:4])
        raise ValueError(
            f"options['task']: got {sentence!r}, expected a sentence that fits this scene. remedy: for example {known}."
        )

    def _true_goals(self) -> set[Goal]:
        """Which goals of the current skill hold now."""
        skill = self._goals[self._done].skill
        return {g for g in tasks.all_goals(self.world.scene, skill) if SKILLS[skill].done(self.world, g)}

    def _move(self, action: np.ndarray) -> None:
        start = arm.inverse(self._commanded, self._yaw)
        self._commanded, self._yaw = arm.advance(self._commanded, self._yaw, self.world.hand, action)
        self._grip = float(action[4])
        end = arm.inverse(self._commanded, self._yaw)
        self.data.ctrl[self.finger_servos] = arm.opening(self._grip)
        for target in start + (end - start) * DONE:
            self.data.ctrl[self.arm_servos] = target
            mujoco.mj_step(self.model, self.data, PERIODS)
        mujoco.mj_forward(self.model, self.data)  # poses and contacts of the state that is shown
        self.world.moved()

    def _observe(self, shown: bool = True) -> dict[str, np.ndarray]:
        """State and pictures; without `images_enabled` or `shown`, the pictures of an earlier observation."""
        if self.images_enabled and shown:
            self._images = {IMAGES + n: self.view.picture(self.data, n, self.pixels) for n in self.cameras}
        return {name: image.copy() for name, image in self._images.items()} | {STATE: self.state()}

    def _info(self, success: bool) -> dict[str, Any]:
        others = list(self._alternatives)
        return {TASK: self.task, IS_SUCCESS: success, "skill": self.goal.skill, "alternatives": others}
