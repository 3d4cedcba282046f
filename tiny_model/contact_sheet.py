"""Draws an animated before/after sheet: a caption per row, both clips, and whether each obeys the caption.

All rows are shown; those obeyed after training come first. Axes: F' frames, h/w pixels.
"""

import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from world import FPS, SIZE


SCALE = 2  # pixels per pixel of a clip
CLIP = SIZE * SCALE
GAP, BORDER = 8, 3
COLUMNS = 2  # of rows; twelve rows then make about a square
TEXT_WIDTH = 131  # next to the clips; two columns are then 830 pixels wide, like a README
CHARACTERS = 23  # that fit into TEXT_WIDTH
LINE, HEADER = 14, 64
WIDTH = 2 * CLIP + 2 * GAP + TEXT_WIDTH  # of a row
MILLISECONDS, PAUSE = 1000 // FPS, 600  # per frame, and extra for the last, so that the loop's end is visible
QUALITY = 85  # of 100: keeps the text sharp
INK, GREY = (31, 35, 40), (101, 109, 118)
OBEYED, MISSED = (26, 127, 55), (207, 34, 46)  # green and red; the marks next to them also differ in shape


class Row(NamedTuple):
    caption: str
    clips: tuple[torch.Tensor, torch.Tensor]  # before and after, [F', 3, h, w] in 0..1
    wrong: tuple[list[str], list[str]]  # attributes that differ from the caption, before and after


def draw_sheet(title: str, rows: list[Row]) -> list[Image.Image]:
    """The sheet's frames, one per frame of the clips."""
    rows = sorted(rows, key=lambda row: bool(row.wrong[1]))
    places = places_of(len(rows))
    page = draw_page(title, rows, places)
    frames = []
    for number in range(len(rows[0].clips[0])):
        frame = page.copy()
        for row, (left, top) in zip(rows, places, strict=True):
            for side, clip in enumerate(row.clips):
                frame.paste(enlarged(clip[number]), (left + side * (CLIP + GAP), top))
        frames.append(frame)
    return frames


def save_sheet(frames: list[Image.Image], path: Path) -> None:
    """Save an endlessly looping animated WebP: 0.3 MB for twelve rows; lossless would take 1.4 MB."""
    durations = [MILLISECONDS] * (len(frames) - 1) + [MILLISECONDS + PAUSE]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=QUALITY)


def places_of(count: int) -> list[tuple[int, int]]:
    """(left, top) of the rows' first clips: down the first column, then down the second."""
    height = -(-count // COLUMNS)
    return [
        (GAP + number // height * (WIDTH + GAP), HEADER + number % height * (CLIP + GAP)) for number in range(count)
    ]


def enlarged(frame: torch.Tensor) -> Image.Image:
    """A frame [3, h, w] in 0..1 scaled to CLIP pixels by nearest neighbour."""
    pixels = (frame * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((CLIP, CLIP), Image.Resampling.NEAREST)


# ---------------------------------------------------------------- the static page


def draw_page(title: str, rows: list[Row], places: list[tuple[int, int]]) -> Image.Image:
    """Everything but the clips."""
    size = (COLUMNS * (WIDTH + GAP) + GAP, max(top for _, top in places) + CLIP + GAP)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 6), title, INK, ImageFont.load_default(16))
    rule = "Obeyed: shape, colour and direction are as the caption says, measured from the pixels."
    draw.text((GAP, 26), rule, GREY, ImageFont.load_default(12))
    for left in sorted({left for left, _ in places}):
        for side, name in enumerate(("before", "after")):
            draw.text((left + side * (CLIP + GAP), HEADER - 20), name, INK, ImageFont.load_default(13))
    for row, place in zip(rows, places, strict=True):
        draw_row(draw, row, place)
    return page


def draw_row(draw: ImageDraw.ImageDraw, row: Row, place: tuple[int, int]) -> None:
    """Draw frames around the clips, and next to them the caption and both verdicts."""
    left, top = place
    for side, wrong in enumerate(row.wrong):
        x = left + side * (CLIP + GAP)
        box = (x - BORDER, top - BORDER, x + CLIP + BORDER - 1, top + CLIP + BORDER - 1)
        draw.rectangle(box, outline=MISSED if wrong else OBEYED, width=BORDER)
    x = left + 2 * (CLIP + GAP)
    top = draw_lines(draw, (x, top - 3), row.caption, INK) + 3
    for name, wrong in zip(("before", "after"), row.wrong, strict=True):
        draw_mark(draw, (x, top + 3), not wrong)
        verdict = f"{name}: wrong {', '.join(wrong)}" if wrong else f"{name}: obeyed"
        top = draw_lines(draw, (x + 15, top), verdict, MISSED if wrong else OBEYED, CHARACTERS - 3)


def draw_lines(draw, place: tuple[int, int], text: str, colour: tuple, characters: int = CHARACTERS) -> int:
    """Draw wrapped text; returns the y position of the next line."""
    left, top = place
    for line in textwrap.wrap(text, characters):
        draw.text((left, top), line, colour, ImageFont.load_default(12))
        top += LINE
    return top


def draw_mark(draw: ImageDraw.ImageDraw, place: tuple[int, int], obeyed: bool) -> None:
    """Draw a 9-pixel tick or cross as lines: Pillow's built-in font has neither."""
    x, y = place
    if obeyed:
        draw.line([(x, y + 5), (x + 3, y + 8), (x + 9, y + 1)], OBEYED, 2)
    else:
        draw.line([(x + 1, y + 1), (x + 8, y + 8)], MISSED, 2)
        draw.line([(x + 1, y + 8), (x + 8, y + 1)], MISSED, 2)
