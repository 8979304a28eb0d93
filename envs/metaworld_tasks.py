"""Meta-World's fifty tasks: their tiers and what a policy is told to do. Standard library alone.

Names, tiers and sentences are those of LeRobot 0.6.1 (lerobot/envs/metaworld_config.json), by which published
numbers come about; `TASKS` says otherwise only where LeRobot tells two tasks the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TIERS = ("easy", "medium", "hard", "very_hard")
INSTRUCTIONS = ("distinct", "lerobot")
EVERY = "mt50"


@dataclass(frozen=True)
class Task:
    """tier: one of TIERS; instruction: what a policy is told, another one for each task."""

    tier: str
    instruction: str


TASKS: dict[str, Task] = {
    "button-press-v3": Task("easy", "Press a button"),
    "button-press-topdown-v3": Task("easy", "Press a button from the top"),
    "button-press-topdown-wall-v3": Task("easy", "Bypass a wall and press a button from the top"),
    "button-press-wall-v3": Task("easy", "Bypass a wall and press a button"),
    "coffee-button-v3": Task("easy", "Push a button on the coffee machine"),
    "dial-turn-v3": Task("easy", "Rotate a dial 180 degrees"),
    "door-close-v3": Task("easy", "Close a door with a revolving joint"),
    "door-lock-v3": Task("easy", "Lock the door by rotating the lock clockwise"),
    "door-open-v3": Task("easy", "Open a door with a revolving joint"),
    "door-unlock-v3": Task("easy", "Unlock the door by rotating the lock counter-clockwise"),
    "drawer-close-v3": Task("easy", "Push and close a drawer"),
    "drawer-open-v3": Task("easy", "Open a drawer"),
    "faucet-close-v3": Task("easy", "Rotate the faucet clockwise"),
    "faucet-open-v3": Task("easy", "Rotate the faucet counter-clockwise"),
    "handle-press-v3": Task("easy", "Press a handle down"),
    "handle-press-side-v3": Task("easy", "Press a handle down sideways"),
    "handle-pull-v3": Task("easy", "Pull a handle up"),
    "handle-pull-side-v3": Task("easy", "Pull a handle up sideways"),
    "lever-pull-v3": Task("easy", "Pull a lever down 90 degrees"),
    "plate-slide-v3": Task("easy", "Slide a plate into a cabinet"),
    "plate-slide-back-v3": Task("easy", "Get a plate from the cabinet"),
    "plate-slide-back-side-v3": Task("easy", "Get a plate from the cabinet sideways"),
    "plate-slide-side-v3": Task("easy", "Slide a plate into a cabinet sideways"),
    "reach-v3": Task("easy", "Reach a goal position"),
    "reach-wall-v3": Task("easy", "Bypass a wall and reach a goal"),
    "window-close-v3": Task("easy", "Push and close a window"),
    "window-open-v3": Task("easy", "Push and open a window"),
    "peg-unplug-side-v3": Task("easy", "Unplug a peg sideways"),
    "basketball-v3": Task("medium", "Dunk the basketball into the basket"),
    "bin-picking-v3": Task("medium", "Grasp the puck from one bin and place it into another bin"),
    "box-close-v3": Task("medium", "Grasp the cover and close the box with it"),
    "coffee-pull-v3": Task("medium", "Pull a mug from a coffee machine"),
    "coffee-push-v3": Task("medium", "Push a mug under a coffee machine"),
    "hammer-v3": Task("medium", "Hammer a screw on the wall"),
    "peg-insert-side-v3": Task("medium", "Insert a peg sideways"),
    "push-wall-v3": Task("medium", "Bypass a wall and push a puck to a goal"),
    "soccer-v3": Task("medium", "Kick a soccer into the goal"),
    "sweep-v3": Task("medium", "Sweep a puck off the table"),
    "sweep-into-v3": Task("medium", "Sweep a puck into a hole"),
    "assembly-v3": Task("hard", "Pick up a nut and place it onto a peg"),
    "hand-insert-v3": Task("hard", "Insert the gripper into a hole"),
    "pick-out-of-hole-v3": Task("hard", "Pick up a puck from a hole"),
    "pick-place-v3": Task("hard", "Pick and place a puck to a goal"),
    "push-v3": Task("hard", "Push the puck to a goal"),
    "push-back-v3": Task("hard", "Push the puck back to a goal"),
    "shelf-place-v3": Task("very_hard", "Pick and place a puck onto a shelf"),
    "disassemble-v3": Task("very_hard", "Pick a nut out of a peg"),
    "stick-pull-v3": Task("very_hard", "Grasp a stick and pull a box with the stick"),
    "stick-push-v3": Task("very_hard", "Grasp a stick and push a box using the stick"),
    "pick-place-wall-v3": Task("very_hard", "Pick a puck, bypass a wall and place the puck"),
}
# LeRobot tells push-back what it tells push, and the picture does not always say which one it is.
AS_PUBLISHED = {"push-back-v3": "Push the puck to a goal"}


def instruction(name: str, table: str) -> str:
    """The sentence of a task; table: one of INSTRUCTIONS. Raises ValueError for another one."""
    if table not in INSTRUCTIONS:
        raise ValueError(
            f"instructions: got {table!r}, expected one of {', '.join(INSTRUCTIONS)}. remedy: 'distinct' tells "
            "push-back apart from push, 'lerobot' is for strict comparison."
        )
    return AS_PUBLISHED.get(name, TASKS[name].instruction) if table == "lerobot" else TASKS[name].instruction


def chosen(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """Names of tasks: of "mt50", of a tier, of a task or of a list of tasks.

    Raises ValueError for a name that there is not, a name twice, and none at all.
    """
    if tasks == EVERY:
        return tuple(TASKS)
    if isinstance(tasks, str) and tasks in TIERS:
        return tuple(name for name, task in TASKS.items() if task.tier == tasks)
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    unknown = [name for name in names if name not in TASKS]
    if not names or unknown or len(set(names)) < len(names):
        some = ", ".join(list(TASKS)[:3])
        raise ValueError(
            f"tasks: got {unknown or list(names)}, expected '{EVERY}', one of the tiers {', '.join(TIERS)}, or names "
            f"of tasks like {some}, each once. remedy: correct tasks."
        )
    return names
