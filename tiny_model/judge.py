"""Recognizes what a clip shows by arithmetic on its pixels, without a network, so that the result can be trusted.

The background is the median of every row; what differs from it is the shape. Its outline is compared with every shape
of the same area drawn at the same place, its colour with the named ones; its path gives the direction. Whatever
matches no word well enough is None, which counts as wrong. Axes: B batch, F' frames, h/w pixels.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    FADE,
    MEASURED,
    NAMES,
    SIZE,
    STRIPE,
    STRIPE_PERIOD,
    TRAVEL,
    shape_coverage,
    words_of,
)


CORE_PIXELS = 100  # the smallest shape, a ring, covers 215
MIN_CONTRAST = 0.12  # in 0..1; the closest pair of shape and background in the world has 0.3
AREA_LIMITS = (90, 900)  # pixels; the world's shapes cover 215 to 460
MIN_OVERLAP = 0.72  # intersection over union with the best shape; real clips have 0.9 or more
MIN_TRAVEL = 5.0  # pixels; the slowest clips travel 10
MAX_COLOUR_DISTANCE = 0.22  # RGB distance in 0..1; any two named colours are at least 0.32 apart
QUICK = (TRAVEL["slowly"][1] + TRAVEL["quickly"][0]) / 2
MIN_STRIPE, MIN_FADE = 0.04, 0.06  # in 0..1: amplitude of the stripes, difference of the outer quarters


def judge(clips: torch.Tensor) -> list[dict[str, str | None]]:
    """{attribute: word or None} for each of the clips [B, F', 3, h, w] in 0..1."""
    clips = smooth(clips.float())
    background, contrast, coverage = separate(clips)
    area = coverage.sum((2, 3))  # [B, F']
    visible = (contrast > MIN_CONTRAST) & (area > AREA_LIMITS[0]) & (area < AREA_LIMITS[1])
    is_there = visible.all(1)
    centres = centres_of(coverage, area)
    overlaps = shape_overlaps(coverage, area, centres)  # [B, shapes]
    columns = {
        "shape": words("shape", overlaps.argmax(1), is_there & (overlaps.amax(1) > MIN_OVERLAP)),
        "colour": colour_words(inside_colours(clips, coverage), is_there),
        **motion_words(centres, is_there),
        **background_words(background),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def separate(clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(background [B, 3, h], the shape's contrast to it [B, F'], fraction of each pixel it covers [B, F', h, w])."""
    background = clips.permute(0, 2, 3, 1, 4).flatten(3).median(-1).values
    difference = (clips - background[:, None, :, :, None]).norm(dim=2)  # [B, F', h, w]
    contrast = difference.flatten(2).topk(CORE_PIXELS).values.mean(-1)
    return background, contrast, (2 * difference / contrast.clamp(min=1e-3)[..., None, None] - 0.5).clamp(0, 1)


def smooth(clips: torch.Tensor) -> torch.Tensor:
    """Blur with a 1 2 1 kernel in both axes: removes two thirds of the noise, but keeps corners."""
    weights = torch.tensor([1.0, 2.0, 1.0], device=clips.device) / 4
    padded = F.pad(clips.flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    rows = sum(weight * padded[:, :, start : start + SIZE] for start, weight in enumerate(weights))
    return sum(weight * rows[..., start : start + SIZE] for start, weight in enumerate(weights)).view(clips.shape)


def words(name: str, indices: torch.Tensor, is_clear: torch.Tensor) -> list[str | None]:
    pairs = zip(indices.tolist(), is_clear.tolist(), strict=True)
    return [ATTRIBUTES[name][index] if clear else None for index, clear in pairs]


def centres_of(coverage: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Centres of mass (x, y) [B, F', 2] in pixels; every shape is drawn around its centre of mass."""
    places = torch.arange(SIZE, device=coverage.device) + 0.5
    weights = area.clamp(min=1e-3)
    return (
        torch.stack([(coverage.sum(2) * places).sum(-1), (coverage.sum(3) * places).sum(-1)], -1) / weights[..., None]
    )


@functools.cache
def area_factors() -> tuple[float, ...]:
    """Area of each shape in squared radii."""
    middle, radius = torch.full((2,), SIZE / 2), torch.tensor(11.0)
    return tuple(float(shape_coverage(shape, middle, radius).sum()) / 11.0**2 for shape in ATTRIBUTES["shape"])


def shape_overlaps(coverage: torch.Tensor, area: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """[B, shapes]: intersection over union with each shape of the same area and centre, averaged over every other frame."""
    coverage, area, centres = coverage[:, ::2], area[:, ::2], centres[:, ::2]
    overlaps = []
    for shape, factor in zip(ATTRIBUTES["shape"], area_factors(), strict=True):
        drawn = shape_coverage(shape, centres, (area / factor).sqrt().clamp(min=1.0))
        both = torch.minimum(coverage, drawn).sum((2, 3))
        overlaps.append((both / torch.maximum(coverage, drawn).sum((2, 3)).clamp(min=1e-3)).mean(1))
    return torch.stack(overlaps, 1)


def inside_colours(clips: torch.Tensor, coverage: torch.Tensor) -> torch.Tensor:
    """[B, 3]: mean colour of the shape's inside, without its edge."""
    inside = -F.max_pool2d(-coverage, 3, stride=1, padding=1)  # a pixel counts as its least covered neighbour
    weights = inside.square()[:, :, None]
    return (clips * weights).sum((1, 3, 4)) / weights.sum((1, 3, 4)).clamp(min=1e-3)


def colour_words(colours: torch.Tensor, is_there: torch.Tensor) -> list[str | None]:
    """The nearest named colour for each of `colours` [B, 3], or None."""
    distances = torch.cdist(colours, named(COLOURS, colours))
    return words("colour", distances.argmin(1), is_there & (distances.amin(1) < MAX_COLOUR_DISTANCE))


def named(colours: dict[str, tuple], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(colours.values()), device=like.device) / 255


def motion_words(centres: torch.Tensor, is_there: torch.Tensor) -> dict[str, list]:
    """Direction and speed from a line fitted to the centres; None for diagonal or no motion."""
    time = torch.linspace(-0.5, 0.5, centres.shape[1], device=centres.device)[:, None]
    travel = (centres * time).sum(1) / time.square().sum()  # [B, 2] over the whole clip
    x, y = travel.unbind(1)
    longer, shorter = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    index = torch.where(x.abs() > y.abs(), (x > 0).long(), 2 + (y > 0).long())  # left, right, up, down
    is_clear = is_there & (longer > MIN_TRAVEL) & (shorter < 0.5 * longer)
    return {
        "direction": words("direction", index, is_clear),
        "speed": words("speed", (longer > QUICK).long(), is_clear),
    }


def background_words(background: torch.Tensor) -> dict[str, list]:
    """Name and pattern of the background [B, 3, h]."""
    rows = (torch.arange(SIZE, device=background.device) + 0.5) / SIZE
    grey, quarter = background.mean(1), SIZE // 4  # [B, h]
    angle = rows * SIZE * (2 * math.pi / STRIPE_PERIOD)
    stripe = 2 * torch.hypot((grey * angle.sin()).mean(1), (grey * angle.cos()).mean(1))
    fade = grey[:, -quarter:].mean(1) - grey[:, :quarter].mean(1)
    pattern = torch.where(stripe > MIN_STRIPE, 2, (fade > MIN_FADE).long())
    added = torch.tensor([0, FADE / 2, STRIPE / 2], device=background.device)[pattern] / 255  # what patterns add
    distances = torch.cdist(background.mean(2) - added[:, None], named(BACKGROUNDS, background))
    return {
        "background": words("background", distances.argmin(1), distances.amin(1) < MAX_COLOUR_DISTANCE),
        "pattern": words("pattern", pattern, torch.ones_like(pattern, dtype=torch.bool)),
    }


# ---------------------------------------------------------------- scores


def colour_errors(clips: torch.Tensor, contents: Sequence) -> dict[str, float]:
    """Mean error of shape and background colours against the named ones, in units of 1/255.

    "distance": in RGB; "chroma": difference of max(R, G, B) - min(R, G, B), above 0 is over-saturated.
    """
    clips = smooth(clips.float())
    background, _, coverage = separate(clips)
    seen = torch.stack([inside_colours(clips, coverage), background.mean(-1)], 1)  # [B, 2, 3]
    rows = torch.tensor(contents)
    added = torch.tensor([0, FADE / 2, STRIPE / 2])[rows[:, NAMES.index("pattern")]] / 255
    colours, backgrounds = named(COLOURS, clips), named(BACKGROUNDS, clips)
    true = torch.stack(
        [colours[rows[:, NAMES.index("colour")]], backgrounds[rows[:, NAMES.index("background")]] + added[:, None]], 1
    )
    chroma = (seen.amax(-1) - seen.amin(-1)) - (true.amax(-1) - true.amin(-1))
    return {"distance": float(255 * (seen - true).norm(dim=-1).mean()), "chroma": float(255 * chroma.mean())}


def mistakes(verdict: dict[str, str | None], row) -> list[str]:
    """The attributes of MEASURED that differ from the content `row`; empty if the caption is obeyed."""
    want = words_of(row)
    return [name for name in MEASURED if verdict[name] != want[name]]


def accuracy(verdicts: Sequence[dict], contents: Sequence) -> dict[str, float]:
    """Share of clips in which each attribute matches the content; "caption": all of MEASURED match."""
    wanted = [words_of(row) for row in contents]
    pairs = list(zip(verdicts, wanted, strict=True))
    scores = {name: sum(found[name] == want[name] for found, want in pairs) / len(pairs) for name in ATTRIBUTES}
    scores["caption"] = sum(not mistakes(*pair) for pair in zip(verdicts, contents, strict=True)) / len(pairs)
    return scores


def confusion(verdicts: Sequence[dict], contents: Sequence, name: str) -> str:
    """Confusion table of attribute `name`: a row per word asked for, a column per word seen."""
    counts = Counter((words_of(row)[name], found[name]) for found, row in zip(verdicts, contents, strict=True))
    asked = [word for word in ATTRIBUTES[name] if any(pair[0] == word for pair in counts)]
    lines = ["".join(f"{word or 'unclear':>10}" for word in (name, *ATTRIBUTES[name], None))]
    for word in asked:
        cells = [counts[word, seen] or "." for seen in (*ATTRIBUTES[name], None)]
        lines.append(f"{word:>10}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
