"""Which episodes an evaluation plays, and the row each leaves behind.

Controls show whether the instruction is read at all. All play scenes of the first split again:

    counterfactual  the same scene with another of its instructions; a pair counts when both succeed
    shuffled        the goal stays, the policy is told another instruction that is valid in the scene
    blank           the goal stays, the policy is told nothing
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vla.config import EvaluateConfig

STANDARD, COUNTERFACTUAL, SHUFFLED, BLANK = "standard", "counterfactual", "shuffled", "blank"
CONTROLS = (COUNTERFACTUAL, SHUFFLED, BLANK)


@dataclass(frozen=True)
class Episode:
    """One episode to be played."""

    split: str
    control: str
    index: int  # of the scene in its split
    seed: int
    task: str | None = None  # the instruction the environment is to set; None: its own
    text: str | None = None  # what the policy is told; None: the environment's instruction
    film: bool = False

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:04d}-{self.control}"


@dataclass
class Row:
    """What became of an episode. `task` is the first instruction, `text` what the policy was told."""

    episode: Episode
    task: str
    text: str
    skill: str
    alternatives: list[str] = field(default_factory=list)
    success: bool = False
    steps: int = 0
    done: bool = False
    non_finite: bool = False  # the policy returned NaN or infinity, which ended the episode as a failure
    video: str | None = None  # relative to the evaluation's folder

    @property
    def scene(self) -> tuple[str, int]:
        """The same for all episodes of one scene."""
        return self.episode.split, self.episode.index

    def as_dict(self) -> dict[str, Any]:
        """For evaluation.json."""
        episode = asdict(self.episode)
        keys = ("task", "text", "skill", "success", "steps", "non_finite", "video")
        kept = {key: episode[key] for key in ("split", "control", "index", "seed")}
        return kept | {key: getattr(self, key) for key in keys}


def split_kwargs(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Name -> extra environment arguments; one split called `default` when none is configured."""
    return dict(config.splits) or {"default": {}}


def standard_episodes(config: EvaluateConfig) -> list[Episode]:
    """Every split's scenes under their own instructions; the first `videos` of each are filmed."""
    return [
        Episode(split, STANDARD, index, config.seed + index, film=index < config.videos)
        for split in split_kwargs(config)
        for index in range(config.episodes)
    ]


def control_episodes(rows: list[Row], film: int, policy_reads: bool) -> list[Episode]:
    """The controls of the first split, from its standard episodes, which must have begun.

    film: how many counterfactual episodes to film. policy_reads: False when the environment's
    expert plays, to which the text means nothing: counterfactual pairs alone then.
    """
    first = rows[0].episode.split if rows else ""
    rows = [row for row in rows if row.episode.split == first and row.episode.control == STANDARD]
    rows.sort(key=lambda row: row.episode.index)
    plain = [(row, replace(row.episode, film=False)) for row in rows]
    episodes = [
        replace(episode, control=COUNTERFACTUAL, task=row.alternatives[0], film=number < film)
        for number, (row, episode) in enumerate(plain)
        if row.alternatives
    ]
    if policy_reads:
        texts = wrong_texts(rows)
        episodes += [
            replace(episode, control=SHUFFLED, text=text)
            for (_, episode), text in zip(plain, texts, strict=True)
            if text is not None
        ]
        episodes += [replace(episode, control=BLANK, text="") for _, episode in plain]
    return episodes


def wrong_texts(rows: list[Row]) -> list[str | None]:
    """For every episode another instruction: the counterfactual's where the environment names
    alternatives, else the next different one of an episode with the same skill; None if there is none.
    """
    texts: list[str | None] = []
    for number, row in enumerate(rows):
        if row.alternatives:
            texts.append(row.alternatives[0])
            continue
        following = rows[number + 1 :] + rows[:number]
        same = [other.task for other in following if other.skill == row.skill and other.task != row.task]
        texts.append(same[0] if same else None)
    return texts


def failures_to_film(rows: list[Row], count: int) -> list[Episode]:
    """Failed standard episodes that nobody filmed, so that with filmed ones there are `count`: one of each skill,
    from the one that fails most, then a second of each; all splits get their share.
    """
    standard = [row for row in rows if row.episode.control == STANDARD]
    played = Counter(row.skill for row in standard)
    failed = [row for row in standard if not row.success]
    failures = Counter(row.skill for row in failed)
    failed.sort(key=lambda row: (row.video is None, row.episode.index))  # of one skill, filmed ones first
    seen: Counter[str] = Counter()
    ranked = []
    for row in failed:
        ranked.append((seen[row.skill], -failures[row.skill] / played[row.skill], row.episode.index, row))
        seen[row.skill] += 1
    ranked.sort(key=lambda entry: entry[:3])
    return [replace(row.episode, film=True) for *_, row in ranked[:count] if row.video is None]
