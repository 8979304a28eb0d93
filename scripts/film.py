"""Film the tabletop's experts side by side: python scripts/film.py results/tabletop.gif"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from envs.tabletop import Tabletop

SCENES = {"press": 3, "put": 5, "stack": 8, "open": 4}  # skill -> seed
PIXELS, CAPTION, FRAMES_PER_SECOND = 200, 22, 10


def film(skill: str, seed: int) -> tuple[list[np.ndarray], str]:
    """The frames of one episode by the expert, and its instruction."""
    env = Tabletop([skill], render_pixels=2 * PIXELS, preset="full")
    env.images_enabled = False
    _, info = env.reset(seed=seed)
    frames, over = [env.render()], False
    while not over:
        _, _, terminated, truncated, _ = env.step(env.expert_action())
        frames.append(env.render())
        over = terminated or truncated
    env.close()
    return frames, info["task"]


def tile(frame: np.ndarray, task: str) -> Image.Image:
    """One picture with its caption, antialiased by drawing at twice the size."""
    picture = Image.new("RGB", (PIXELS, PIXELS + CAPTION), "white")
    picture.paste(Image.fromarray(frame).resize((PIXELS, PIXELS), Image.Resampling.LANCZOS))
    ImageDraw.Draw(picture).text((PIXELS / 2, PIXELS + CAPTION / 2), task, "black", anchor="mm")
    return picture


def main(path: Path) -> None:
    films = [film(skill, seed) for skill, seed in SCENES.items()]
    length = max(len(frames) for frames, _ in films) + FRAMES_PER_SECOND  # hold the end for a second
    pages = []
    for t in range(length):
        page = Image.new("RGB", (PIXELS * len(films), PIXELS + CAPTION))
        for i, (frames, task) in enumerate(films):
            page.paste(tile(frames[min(t, len(frames) - 1)], task), (i * PIXELS, 0))
        pages.append(page)
    # One palette for all pages, from first, middle and last, or colours would change from frame to frame.
    sample = Image.new("RGB", (pages[0].width, 3 * pages[0].height))
    for i, page in enumerate((pages[0], pages[length // 3], pages[-1])):
        sample.paste(page, (0, i * page.height))
    palette = sample.quantize(256)
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    path.parent.mkdir(parents=True, exist_ok=True)
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=1000 // FRAMES_PER_SECOND, loop=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the GIF to write")
    main(parser.parse_args().path)
