#!/usr/bin/env python
"""The small model's world: synthetic clips of one moving shape, with captions that describe them completely.

    python tiny_model/world.py OUT --concept star --num_clips 12 --seed 0

writes such clips as a dataset folder: videos/*.mp4, prompts.txt, videos.txt and metadata.csv. Without --concept they
show what the model knows. Three concepts are held out of its pretraining, to be taught: a shape, a colour, a pattern.

Axes: B batch, F' frames, h/w pixels. A content is one index per attribute of ATTRIBUTES, into that attribute's words.
"""

import math
import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "assets" / "tests"))

from base import console
from base.draws import draw_seed


SIZE, NUM_FRAMES, FPS = 64, 9, 8
# sRGB. Far enough apart, also from the backgrounds, to be told apart after the VAE.
COLOURS = {
    "red": (224, 32, 32), "orange": (248, 136, 16), "yellow": (248, 224, 40), "green": (32, 176, 64),
    "cyan": (40, 200, 224), "blue": (40, 72, 232), "purple": (136, 40, 176), "white": (245, 245, 245),
    "pink": (255, 120, 190),
}  # fmt: skip
BACKGROUNDS = {
    "black": (12, 12, 12), "grey": (104, 104, 104), "navy": (16, 24, 96), "maroon": (96, 16, 32),
    "teal": (0, 88, 88), "olive": (80, 80, 16),
}  # fmt: skip
# The words of each attribute. The last shape, colour and pattern are the held-out concepts.
ATTRIBUTES = {
    "shape": ("circle", "square", "triangle", "cross", "ring", "diamond", "star"),
    "colour": tuple(COLOURS),
    "direction": ("left", "right", "up", "down"),
    "speed": ("slowly", "quickly"),
    "background": tuple(BACKGROUNDS),
    "pattern": ("plain", "fading", "striped"),
}
NAMES = tuple(ATTRIBUTES)
CONCEPTS = {"star": "shape", "pink": "colour", "striped": "pattern"}
NUM_TAUGHT = 12  # clips for teaching a concept
MEASURED = ("shape", "colour", "direction")  # attributes that decide whether a caption is obeyed

RADII = (9.5, 12.0)  # pixels
TRAVEL = {"slowly": (10.0, 13.0), "quickly": (24.0, 28.0)}  # pixels over the whole clip
REACH = 1.25  # radii; no shape extends farther from its centre
FADE, STRIPE, STRIPE_PERIOD = 40, 44, 8  # added to the background from top to bottom, or on every other band of 4 rows
COLOUR_JITTER = 6  # largest deviation of a clip's colours from the named ones

DIRECTION_WORDS = {
    "left": ("to the left", "from right to left"),
    "right": ("to the right", "from left to right"),
    "up": ("up", "from bottom to top"),
    "down": ("down", "from top to bottom"),
}
SENTENCES = (
    "{A} {colour} {shape} moves {speed} {direction} over {a_background} background.",
    "{A} {colour} {shape} {speed} moves {direction} over {a_background} background.",
    "Over {a_background} background {a} {colour} {shape} moves {direction} {speed}.",
    "The {colour} {shape} goes {speed} {direction}, the background is {background}.",
)


class Geometry(NamedTuple):
    """What captions do not say, all [B, ...]: radii in pixels, centres (x, y) in the first and last frame, jitter."""

    radius: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    jitter: torch.Tensor  # [B, 2, 3] in units of 1/255: of the shape's colour and the background's


# ---------------------------------------------------------------- contents


def content(**words: str) -> tuple[int, ...]:
    """The content named by `words`, one per attribute: content(shape="ring", colour="red", ...)."""
    return tuple(ATTRIBUTES[name].index(words[name]) for name in NAMES)


def words_of(row) -> dict[str, str]:
    return {name: ATTRIBUTES[name][int(index)] for name, index in zip(NAMES, row, strict=True)}


def known(name: str) -> range:
    """The indices of attribute `name` that appear in pretraining: all but the held-out concept."""
    return range(len(ATTRIBUTES[name]) - (name in CONCEPTS.values()))


def is_held_out(row) -> bool:
    """True for test contents: one in four (shape, colour, direction) triples; every pair also occurs in training."""
    return (row[0] + row[1] + row[2]) % 4 == 0


def all_contents(concept: str | None = None) -> list[tuple[int, ...]]:
    """All contents made of what pretraining knows; with a `concept`, all of these that show it."""
    choices = {name: list(known(name)) for name in NAMES}
    if concept:
        name = CONCEPTS[concept]
        choices[name] = [ATTRIBUTES[name].index(concept)]
    rows = [()]
    for name in NAMES:
        rows = [(*row, index) for row in rows for index in choices[name]]
    return rows


def training_contents() -> torch.Tensor:
    """[N, 6]: the contents that pretraining draws from."""
    return torch.tensor([row for row in all_contents() if not is_held_out(row)])


def balanced(rows: list[tuple[int, ...]], count: int, draw: random.Random) -> list[tuple[int, ...]]:
    """`count` different rows in which all words of each attribute are about equally frequent."""
    rows = draw.sample(rows, len(rows))
    seen, chosen = Counter(), []
    for _ in range(min(count, len(rows))):
        best = min(
            rows,
            key=lambda row: sum(seen[item] ** 2 for item in enumerate(row)) + sum(seen[item] for item in pairs(row)),
        )
        rows.remove(best)
        chosen.append(best)
        seen.update([*enumerate(best), *pairs(best)])
    return chosen


def pairs(row) -> list[tuple]:
    """The pairs of (shape, colour, direction) values in a row."""
    return [(name, other, row[name], row[other]) for name, other in ((0, 1), (0, 2), (1, 2))]


def teaching_contents(concept: str, count: int = NUM_TAUGHT, seed: int = 0) -> list[tuple[int, ...]]:
    """Contents that show the `concept`, as varied as possible."""
    return balanced(all_contents(concept), count, random.Random(draw_seed(seed, f"teach {concept}")))


def known_contents(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Contents of pretraining, as varied as possible: mixed with a concept's clips, they prevent forgetting."""
    return balanced(
        [tuple(row) for row in training_contents().tolist()], count, random.Random(draw_seed(seed, "known"))
    )


def test_contents(count: int = 100, concept: str | None = None, seed: int = 0) -> list[tuple[int, ...]]:
    """`count` contents unseen in pretraining; with a `concept`, that show it in triples its teaching clips lack."""
    if concept:
        taught = {row[:3] for row in teaching_contents(concept, seed=seed)}
        rows = [row for row in all_contents(concept) if row[:3] not in taught]
    else:
        rows = [row for row in all_contents() if is_held_out(row)]
    return balanced(rows, count, random.Random(draw_seed(seed, f"test {concept}")))


def caption(row, wording: int = 0) -> str:
    """The caption of a content in one of NUM_WORDINGS wordings (modulo); 0 is the plainest."""
    words = words_of(row)
    sentence, phrase = SENTENCES[wording % len(SENTENCES)], wording // len(SENTENCES) % 2
    pattern = "" if words["pattern"] == "plain" else words["pattern"] + " "
    background = pattern + words["background"]
    article = {True: "an", False: "a"}
    a = article[words["colour"][0] in "aeiou"]
    return sentence.format(
        A=a.capitalize(), a=a, colour=words["colour"], shape=words["shape"], speed=words["speed"],
        direction=DIRECTION_WORDS[words["direction"]][phrase], background=background,
        a_background=f"{article[background[0] in 'aeiou']} {background}",
    )  # fmt: skip


NUM_WORDINGS = len(SENTENCES) * 2


# ---------------------------------------------------------------- drawing


def draw_geometry(contents: torch.Tensor, generator: torch.Generator) -> Geometry:
    """Radii, paths and jitter for contents [B, 6], on the CPU, from 11 random numbers each."""
    uniform = torch.rand(len(contents), 11, generator=generator)
    radius = RADII[0] + (RADII[1] - RADII[0]) * uniform[:, 0]
    travels = torch.tensor([TRAVEL[speed] for speed in ATTRIBUTES["speed"]])[contents[:, 3]]  # [B, 2]
    travel = travels[:, 0] + (travels[:, 1] - travels[:, 0]) * uniform[:, 1]
    steps = torch.tensor([(-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)])[contents[:, 2]]  # (x, y), y downwards
    margin = radius[:, None] * REACH
    room = SIZE - 2 * margin - travel[:, None] * steps.abs()
    low = margin + uniform[:, 2:4] * room  # smallest x and y of the path
    start = low + (travel[:, None] * (steps < 0) * steps.abs())
    jitter = (2 * uniform[:, 5:].view(-1, 2, 3) - 1) * COLOUR_JITTER
    return Geometry(radius, start, start + travel[:, None] * steps, jitter)


def polygon_distance(x, y, radius, normals) -> torch.Tensor:
    """Largest distance to the lines given as (angle of the normal, distance from the centre in radii)."""
    lines = [x * math.cos(angle) + y * math.sin(angle) - radius * offset for angle, offset in normals]
    return torch.stack(lines).amax(0)


def star_distance(x, y, radius) -> torch.Tensor:
    """Distance to a star with tips at 1.22 radii and notches at 0.52: folded onto half a tip, whose edge is a line."""
    sector = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2  # 0 at the nearest tip
    length = torch.hypot(x, y)
    along, across = length * angle.cos(), length * angle.sin().abs()
    tip, notch = (1.22, 0.0), (0.52 * math.cos(sector / 2), 0.52 * math.sin(sector / 2))
    edge = (notch[0] - tip[0], notch[1] - tip[1])
    norm = math.hypot(*edge)
    return ((along - radius * tip[0]) * edge[1] - (across - radius * tip[1]) * edge[0]) / norm


def shape_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels from the outline, negative inside, at (x, y) from the centre; y downwards."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.74 * radius).abs() - 0.26 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "diamond":
        return (x.abs() + y.abs() - 1.24 * radius) / math.sqrt(2)
    if shape == "triangle":
        return polygon_distance(x, y, radius, [(math.radians(angle), 0.62) for angle in (90, 210, 330)])
    if shape == "cross":
        low, high = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
        return torch.maximum(low - 0.36 * radius, high - 1.1 * radius)
    return star_distance(x, y, radius)


def shape_coverage(shape: str, centre: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Fraction of each pixel that the shape covers, [..., h, w], for centres [..., 2] and radii [...]."""
    places = torch.arange(SIZE, device=centre.device, dtype=torch.float32) + 0.5
    x, y = torch.broadcast_tensors(places - centre[..., 0, None, None], places[:, None] - centre[..., 1, None, None])
    return (0.5 - shape_distance(shape, x, y, radius[..., None, None])).clamp(0, 1)


def palette(names: dict[str, tuple], indices: torch.Tensor) -> torch.Tensor:
    """Colours [B, 3] in 0..255."""
    return torch.tensor(list(names.values()), dtype=torch.float32, device=indices.device)[indices]


def draw_backgrounds(contents: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
    """[B, 3, h] in 0..255: every pixel row has one colour, which the judge relies on."""
    rows = (torch.arange(SIZE, device=contents.device, dtype=torch.float32) + 0.5) / SIZE
    wave = torch.sin(rows * SIZE * (2 * math.pi / STRIPE_PERIOD))
    added = torch.stack([0 * rows, FADE * rows, STRIPE * (0.5 + 1.5 * wave).clamp(0, 1)])  # plain, fading, striped
    colours = palette(BACKGROUNDS, contents[:, 4]) + jitter
    return colours[:, :, None] + added[contents[:, 5], None]


def render(contents: torch.Tensor, geometry: Geometry, num_frames: int = NUM_FRAMES) -> torch.Tensor:
    """Clips [B, F', 3, h, w] in 0..1 on the device of `contents`, not rounded to 8 bits."""
    device = contents.device
    radius, start, end, jitter = (part.to(device) for part in geometry)
    progress = torch.linspace(0, 1, num_frames, device=device)[None, :, None]
    centres = start[:, None] + (end - start)[:, None] * progress  # [B, F', 2]
    coverage = torch.empty(len(contents), num_frames, SIZE, SIZE, device=device)
    for index, shape in enumerate(ATTRIBUTES["shape"]):
        chosen = contents[:, 0] == index
        coverage[chosen] = shape_coverage(shape, centres[chosen], radius[chosen, None].expand(-1, num_frames))
    background = draw_backgrounds(contents, jitter[:, 1])[:, None, :, :, None]  # [B, 1, 3, h, 1]
    colour = (palette(COLOURS, contents[:, 1]) + jitter[:, 0])[:, None, :, None, None]
    coverage = coverage[:, :, None]
    return ((background + (colour - background) * coverage) / 255).clamp(0, 1)


def draw_clips(
    contents: torch.Tensor, seed: int, place: int = 0, num_frames: int = NUM_FRAMES, device="cpu"
) -> torch.Tensor:
    """Clips [B, F', 3, h, w] in 0..1 on `device`, for contents [B, 6] on the CPU; determined by (seed, place)."""
    generator = torch.Generator().manual_seed(draw_seed(seed, "geometry", place))
    return render(contents.to(device), draw_geometry(contents, generator), num_frames)


# ---------------------------------------------------------------- a dataset folder


def write_dataset(out: Path, contents: list[tuple[int, ...]], seed: int = 0, num_frames: int = NUM_FRAMES) -> None:
    """Write clips and captions in the layout for prepare_dataset.sh; captions cycle through the wordings."""
    from make_clips import encode_video, write_lists

    (out / "videos").mkdir(parents=True, exist_ok=True)
    clips = draw_clips(torch.tensor(contents), seed, num_frames=num_frames)
    frames = (clips * 255).round().byte().permute(0, 1, 3, 4, 2).contiguous().numpy()
    pairs = []
    for number, row in enumerate(contents):
        words = words_of(row)
        name = f"videos/{number:03}_{words['colour']}_{words['shape']}_{words['direction']}.mp4"
        encode_video(out / name, frames[number], FPS)
        pairs.append((name, caption(row, number)))
    write_lists(out, pairs)


def main() -> None:
    parser = console.Parser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--concept", choices=CONCEPTS, help="what every clip shows; default: what the model knows")
    parser.add_argument("--num_clips", type=int, default=12)
    parser.add_argument(
        "--num_known", type=int, default=0, help="with --concept: clips of what the model knows, beside"
    )
    parser.add_argument("--num_frames", type=int, default=NUM_FRAMES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    contents = teaching_contents(args.concept, args.num_clips, args.seed) if args.concept else []
    num_known = args.num_known if args.concept else args.num_clips
    contents += known_contents(num_known, args.seed)
    write_dataset(args.out, contents, args.seed, args.num_frames)
    print(f"{len(contents)} clips: {args.out}")


if __name__ == "__main__":
    main()
