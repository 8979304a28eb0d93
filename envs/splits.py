"""What training never shows. Frozen: published numbers refer to these lists.

train, L0   the same distribution (evaluation differs by its seeds)
L1          colour x shape x destination combinations never demonstrated
L2          phrasings never demonstrated (the second list of each skill in tasks.py)
L3          skill x object never demonstrated
L4          two trained instructions in a chain
"""

from __future__ import annotations

SPLITS = ("train", "L0", "L1", "L2", "L3", "L4")

# L1: (colour, shape, destination) of push and put.
UNSEEN_COMBINATIONS = frozenset(
    {
        ("red", "cube", "bowl"), ("green", "cube", "zone"), ("blue", "cube", "tray"),
        ("yellow", "cylinder", "bowl"), ("purple", "cylinder", "zone"), ("red", "cylinder", "tray"),
        ("white", "brick", "bowl"), ("yellow", "brick", "zone"), ("green", "brick", "tray"),
        ("blue", "cylinder", "bowl"), ("white", "cube", "tray"), ("purple", "brick", "bowl"),
    }
)  # fmt: skip

# L3: (skill, colour, shape).
UNSEEN_PAIRS = frozenset(
    {
        ("touch", "purple", "cube"), ("touch", "yellow", "cylinder"), ("touch", "blue", "brick"),
        ("press", "purple", "button"),
        ("push", "white", "cylinder"), ("push", "red", "brick"), ("push", "yellow", "cube"),
        ("put", "green", "cylinder"), ("put", "purple", "cube"), ("put", "blue", "brick"),
        ("stack", "yellow", "cube"), ("stack", "red", "cylinder"), ("stack", "white", "brick"),
        ("open", "green", "drawer"),
        ("close", "yellow", "drawer"),
    }
)  # fmt: skip

SKILLS_OF_SPLIT = {"L1": ("push", "put")}  # the others have every skill


def kind_of(skill: str, colour: str, shape: str, place: str | None) -> str:
    """Where a goal belongs: "train", "L1" or "L3" (destination `place`: bowl, tray, zone, a shape or None)."""
    if (skill, colour, shape) in UNSEEN_PAIRS:
        return "L3"
    if skill in SKILLS_OF_SPLIT["L1"] and (colour, shape, place) in UNSEEN_COMBINATIONS:
        return "L1"
    return "train"


def belongs(split: str, kind: str) -> bool:
    """Whether a goal of this kind may be the instruction in this split."""
    return kind == (split if split in ("L1", "L3") else "train")
