"""Attention maps as pictures: what the policy saw, lit where it looked, and bars for words.

A weight is the share of all attention of one action token that falls on one patch or word. Light runs
from dim at 0 to the frame's own colours at a weight that is always written beside the picture: a colour
map would hide the colours that instructions are about. Pillow alone draws.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vla.explain.episode import Look

INK, GREY, PALE, PAPER = (28, 32, 40), (112, 118, 130), (226, 229, 234), (255, 255, 255)
PARTS = {"pictures": (226, 88, 34), "words": (46, 110, 190), "state": (120, 130, 145)}
DIM = 0.3  # of the frame's brightness, where nobody looks
GAP, MARGIN = 10, 22
TILE, FILM_TILE = 192, 320  # pixels that a frame is enlarged to, at most
LABEL, PANEL = 150, 360  # widths of the grid's first and last column


@functools.cache
def font(size: int) -> Any:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def percent(share: float) -> str:
    """With one digit behind the point below 10 %."""
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def enlarged(image: np.ndarray, wanted: int) -> Image.Image:
    """(h, w, 3) uint8 with every pixel a whole square, `wanted` pixels wide at most, unless it is wider."""
    times = max(1, wanted // image.shape[1])
    return Image.fromarray(image.repeat(times, 0).repeat(times, 1))


def overlay(image: np.ndarray, weights: np.ndarray, full: float, wanted: int = TILE) -> Image.Image:
    """A frame (h, w, 3) uint8 in the smooth light of its patches' weights (rows, columns).

    full: the weight of full light. A thin square marks the strongest patch.
    """
    picture = enlarged(image, wanted)
    light = Image.fromarray((weights / max(full, 1e-12)).astype(np.float32))
    smooth = np.clip(np.asarray(light.resize(picture.size, Image.Resampling.BICUBIC)), 0, 1)[..., None]
    lit = Image.fromarray((np.asarray(picture) * (DIM + (1 - DIM) * smooth)).round().astype(np.uint8))
    row, column = np.unravel_index(weights.argmax(), weights.shape)
    across, down = picture.width / weights.shape[1], picture.height / weights.shape[0]
    corners = (column * across, row * down, (column + 1) * across - 1, (row + 1) * down - 1)
    draw = ImageDraw.Draw(lit)
    draw.rectangle(corners, outline=INK)
    draw.rectangle([c + d for c, d in zip(corners, (1, 1, -1, -1), strict=True)], outline=PAPER)
    return lit


def word_bars(draw: Any, at: tuple[int, int], width: int, words: Sequence[str], weights: np.ndarray,
              full: float, columns: int, size: int) -> None:  # fmt: skip
    """Every word beside its bar and its share, down one column after the other; full: of a whole bar."""
    line, rows = round(size * 1.6), -(-len(words) // columns)
    columns = -(-len(words) // rows)
    text = max(draw.textlength(word, font(size)) for word in words) + size * 0.6
    number = draw.textlength("88.8 %", font(size)) + size * 0.4
    column = (width - size * (columns - 1)) / columns
    longest = max(size, column - text - number)
    for i, (word, weight) in enumerate(zip(words, weights, strict=True)):
        x, y = at[0] + i // rows * (column + size), at[1] + i % rows * line
        bar, middle = x + text, y + size * 0.62
        draw.text((x, middle), word, INK, font(size), anchor="lm")
        draw.rectangle((bar, middle - size * 0.3, bar + longest, middle + size * 0.3), fill=PALE)
        end = bar + longest * min(1.0, float(weight) / max(full, 1e-12))
        draw.rectangle((bar, middle - size * 0.3, end, middle + size * 0.3), fill=PARTS["words"])
        draw.text((bar + longest + size * 0.4, middle), percent(weight), GREY, font(size), anchor="lm")


def panel_height(words: Sequence[str], columns: int, size: int) -> int:
    """How high `panel` draws."""
    return round(size * 2.6) + -(-len(words) // columns) * round(size * 1.6)


def panel(draw: Any, at: tuple[int, int], width: int, look: Look, weights: Any, columns: int, size: int,
          full: float | None = None) -> None:  # fmt: skip
    """(1, 1, S) weights: one bar divided among pictures, words and state, then every word.

    full: of a word's whole bar, by default the largest of these.
    """
    (x, y), left = at, float(at[0])
    for name, share in look.shares(weights).items():
        right = left + width * float(share[0])
        draw.rectangle((left, y, right, y + size * 0.6), fill=PARTS[name])
        left, text = right, f"{name} {percent(float(share[0]))}"
        draw.text((x, y + size * 0.9), text, PARTS[name], font(size))
        x += round(draw.textlength(text, font(size))) + size
    shares = look.memory.of_words(weights)[0, 0].numpy()
    below, full = y + round(size * 2.6), full or float(shares.max())
    word_bars(draw, (at[0], below), width, look.memory.words, shares, full, columns, size)


def rows_of(look: Look) -> dict[str, Any]:
    """The rows of the grid: name -> (H, S) weights. Rollout is there where the network has one."""
    rows = {"average of all": look.maps.average[0]}
    if look.maps.encoder is not None:
        rows["rollout to input"] = look.maps.rollout[0]
    return rows | {name: weights[0] for name, weights in look.maps.heads.items()}


def grid(look: Look, actions: Sequence[int], subtitle: str = "") -> Image.Image:
    """All maps of one look: a row for the average, the rollout, and every layer and head of the decoder;
    a column for every camera under each of some action tokens (from 0); and the words, as a mean over those.
    """
    frames = {name: history[-1] for name, history in look.images.items()}
    tiles = [enlarged(frame, TILE) for frame in frames.values()]
    block = sum(tile.width for tile in tiles) + 4 * (len(tiles) - 1)
    tallest, words = max(tile.height for tile in tiles), look.memory.words
    columns = 1 if panel_height(words, 1, 13) <= tallest else 2
    height = max(tallest, panel_height(words, columns, 13))
    rows, head = rows_of(look), max(tallest, 160) + 2 * MARGIN + 26
    words_at = MARGIN + LABEL + len(actions) * (block + GAP) + GAP
    page = Image.new("RGB", (words_at + PANEL + MARGIN, head + len(rows) * (height + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    x = MARGIN + LABEL
    for tile in tiles:
        page.paste(tile, (x, MARGIN))
        x += tile.width + 4
    draw.text((x + GAP, MARGIN - 3), f"“{look.task}”", INK, font(24))
    for i, text in enumerate(explanation(look, list(frames), subtitle)):
        draw.text((x + GAP, MARGIN + 36 + 20 * i), text, GREY, font(14))
    for i, action in enumerate(actions):
        draw.text((MARGIN + LABEL + i * (block + GAP), head - 26), f"action {action + 1}", INK, font(16))
    draw.text((words_at, head - 26), f"mean of these {len(actions)} actions", INK, font(16))
    for i, (name, weights) in enumerate(rows.items()):
        top = head + i * (height + GAP)
        chosen = weights[list(actions)][None]  # (1, actions, S)
        patches = look.patches(chosen)  # (actions, C, side, side)
        full = float(patches.max())
        draw.text((MARGIN, top), name, INK, font(16))
        draw.text((MARGIN, top + 24), f"full light {percent(full)}", GREY, font(13))
        for j in range(len(actions)):
            x = MARGIN + LABEL + j * (block + GAP)
            for frame, map_of_camera in zip(frames.values(), patches[j], strict=True):
                tile = overlay(frame, map_of_camera, full)
                page.paste(tile, (x, top))
                x += tile.width + 4
        panel(draw, (words_at, top), PANEL, look, chosen.mean(dim=1, keepdim=True), columns, 13)
    return page


def explanation(look: Look, cameras: list[str], subtitle: str) -> list[str]:
    """What one has to know to read the grid."""
    tokens = look.memory.images + len(look.memory.words) + look.memory.steps
    return [
        f"Step {look.step} of the episode. {subtitle}".strip(),
        "At the left what the policy sees; below, where each action that it predicts looks for its",
        "answer, as shares of that action's attention. Full light is the largest share in a row, dark",
        "is none; a thin square marks the strongest patch. A word's full bar is the largest in its row.",
        f"Spread evenly over all {tokens} tokens, each would get {percent(1 / tokens)}.",
        *([f"Cameras, from the left: {', '.join(cameras)}."] if len(cameras) > 1 else []),
    ]


def film_page(look: Look, action: int, now: dict[str, np.ndarray], full: dict[str, float],
              speed: str) -> Image.Image:  # fmt: skip
    """One picture of the film: what the policy last saw, lit by the maps of the action that runs now, and
    what that action has led to. full: the weight of full light (`average`, `rollout`) or bar (`words`).
    """
    maps = {"average": ("average of layers and heads", look.maps.average)}
    if look.maps.encoder is not None:
        maps["rollout"] = ("rollout to the input", look.maps.rollout)
    frames = {name: history[-1] for name, history in look.images.items()}
    tile = enlarged(next(iter(frames.values())), FILM_TILE)
    width = 2 * MARGIN + (len(maps) + 1) * (tile.width + GAP) - GAP
    top = 112
    below = top + len(frames) * (tile.height + GAP) + 34
    height = below + panel_height(look.memory.words, 4, 17) + MARGIN
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN - 8), f"“{look.task}”", INK, font(28))
    text = f"Step {look.step + action + 1}: action {action + 1} of the chunk predicted at step {look.step}. {speed}"
    draw.text((MARGIN, MARGIN + 30), text, GREY, font(16))
    x = MARGIN
    for key, (name, weights) in maps.items():
        draw.text((x, top - 26), f"{name}, full light {percent(full[key])}", INK, font(16))
        patches = look.patches(weights[:, action : action + 1])[0]  # (C, side, side)
        for j, (frame, weight) in enumerate(zip(frames.values(), patches, strict=True)):
            page.paste(overlay(frame, weight, full[key], tile.width), (x, top + j * (tile.height + GAP)))
        x += tile.width + GAP
    draw.text((x, top - 26), "after the action", INK, font(16))
    for j, frame in enumerate(now.values()):
        page.paste(enlarged(frame, tile.width), (x, top + j * (tile.height + GAP)))
    note = (
        f"Average of layers and heads, over the whole memory. A word's full bar is {percent(full['words'])}."
    )
    draw.text((MARGIN, below - 30), note, GREY, font(16))
    weights = look.maps.average[:, action : action + 1]
    panel(draw, (MARGIN, below), width - 2 * MARGIN, look, weights, 4, 17, full["words"])
    return page
