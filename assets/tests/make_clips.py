#!/usr/bin/env python3
"""Draw the sample clips beside this file: moving shapes in two sizes, with captions that say what moves and where.

    python assets/tests/make_clips.py [OUT]

Writes videos/*.mp4, prompts.txt with videos.txt, and metadata.csv (video, caption).
"""

import argparse
import csv
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


FPS = 8

# Places and radii are fractions (y, x) and lengths of the height, from the first frame to the last.
CLIPS = [
    {
        "name": "circle_right",
        "caption": "A red circle moves from left to right over a dark blue background.",
        "size": (9, 64, 96),  # frames, height, width
        "background": (16, 24, 96),
        "shapes": [("circle", (224, 32, 32), (0.5, 0.2), (0.5, 0.8), (0.22, 0.22))],
    },
    {
        "name": "square_left",
        "caption": "A green square moves from right to left over a black background.",
        "size": (13, 64, 96),
        "background": (0, 0, 0),
        "shapes": [("square", (32, 192, 64), (0.5, 0.8), (0.5, 0.2), (0.2, 0.2))],
    },
    {
        "name": "circle_grows",
        "caption": "A yellow circle grows in the middle of a purple background.",
        "size": (17, 64, 96),
        "background": (88, 24, 120),
        "shapes": [("circle", (248, 216, 32), (0.5, 0.5), (0.5, 0.5), (0.08, 0.45))],
    },
    {
        "name": "square_falls",
        "caption": "A white square falls from top to bottom over a grey background.",
        "size": (9, 64, 64),
        "background": (112, 112, 112),
        "shapes": [("square", (248, 248, 248), (0.18, 0.5), (0.82, 0.5), (0.16, 0.16))],
    },
    {
        "name": "circle_rises",
        "caption": "An orange circle rises from bottom to top over a dark green background.",
        "size": (17, 64, 64),
        "background": (8, 72, 32),
        "shapes": [("circle", (248, 136, 16), (0.8, 0.5), (0.2, 0.5), (0.18, 0.18))],
    },
    {
        "name": "circle_and_square",
        "caption": "A blue circle moves down on the left while a red square moves up on the right, over white.",
        "size": (20, 64, 64),
        "background": (240, 240, 240),
        "shapes": [
            ("circle", (32, 64, 224), (0.2, 0.28), (0.8, 0.28), (0.18, 0.18)),
            ("square", (208, 32, 32), (0.8, 0.72), (0.2, 0.72), (0.16, 0.16)),
        ],
    },
]


def shape_coverage(kind, height, width, centre, radius):
    """How much of each pixel a shape covers, [H, W] in 0..1, with an edge one pixel soft."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    dy, dx = rows - centre[0], columns - centre[1]
    distance = np.hypot(dy, dx) if kind == "circle" else np.maximum(abs(dy), abs(dx))
    return np.clip(radius - distance + 0.5, 0, 1)


def draw_frame(clip, progress):
    """One frame [H, W, 3] uint8 at `progress` in 0..1."""
    _, height, width = clip["size"]
    frame = np.full((height, width, 3), clip["background"], dtype=np.float64)
    for kind, colour, start, end, radii in clip["shapes"]:
        y, x = (a + (b - a) * progress for a, b in zip(start, end, strict=True))
        radius = height * (radii[0] + (radii[1] - radii[0]) * progress)
        coverage = shape_coverage(kind, height, width, (y * height, x * width), radius)[..., None]
        frame = frame * (1 - coverage) + np.array(colour) * coverage
    return frame.round().astype(np.uint8)


def encode_video(path, frames, fps):
    """Write frames [F, H, W, 3] uint8 as an mp4, yuv420p; the same frames give the same bytes on one machine."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"threads": "1", **({"crf": "16"} if codec == "libx264" else {"qscale": "2"})}
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_lists(out, pairs):
    """The two layouts of a raw dataset, from (video, caption) pairs."""
    (out / "videos.txt").write_text("".join(f"{video}\n" for video, _ in pairs))
    (out / "prompts.txt").write_text("".join(f"{caption}\n" for _, caption in pairs))
    with open(out / "metadata.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("video", "caption"), *pairs])


def make_clips(out):
    out = Path(out)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    for clip in CLIPS:
        num_frames = clip["size"][0]
        frames = np.stack([draw_frame(clip, index / (num_frames - 1)) for index in range(num_frames)])
        encode_video(out / "videos" / f"{clip['name']}.mp4", frames, FPS)
    write_lists(out, [(f"videos/{clip['name']}.mp4", clip["caption"]) for clip in CLIPS])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent, help="folder (default: this one)")
    make_clips(parser.parse_args().out)


if __name__ == "__main__":
    main()
