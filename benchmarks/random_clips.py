#!/usr/bin/env python3
"""Write a raw dataset of synthetic clips, to benchmark what decodes, encodes and prepares videos.

    python benchmarks/random_clips.py OUT --num_clips 50 --frames 49 --height 480 --width 720

Coloured patterns that move, as mp4 (h264) of 8 frames per second in videos/, with prompts.txt and videos.txt.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "assets/tests")]

import numpy as np
from make_clips import encode_video

from base import console


FPS, NUM_CLIPS, BLOCK = 8, 50, 24  # BLOCK: pixels of a coloured square


def draw_clip(number, frames, height, width):
    """uint8 [F, H, W, 3]: blocks of random colours under fine noise, shifted a little further in each frame."""
    rng = np.random.default_rng(number)
    blocks = rng.integers(32, 224, (height // BLOCK + 1, width // BLOCK + 1, 3), dtype=np.uint8)
    picture = blocks.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)[:height, :width]
    picture = picture + rng.integers(0, 32, picture.shape, dtype=np.uint8)
    shift = rng.integers(1, 6, size=2)
    return np.stack([np.roll(picture, shift * frame, axis=(0, 1)) for frame in range(frames)])


def write_clip(folder, size, number):
    encode_video(folder / f"{number:03d}.mp4", draw_clip(number, *size), FPS)


def write_clips(out, num_clips, size):
    """`size`: frames, height, width in pixels."""
    (out / "videos").mkdir(parents=True)
    with ProcessPoolExecutor(min(num_clips, os.cpu_count() or 1)) as pool:
        list(pool.map(partial(write_clip, out / "videos", size), range(num_clips)))
    (out / "prompts.txt").write_text("".join(f"Pattern number {number} moves.\n" for number in range(num_clips)))
    (out / "videos.txt").write_text("".join(f"videos/{number:03d}.mp4\n" for number in range(num_clips)))


def main():
    parser = console.Parser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--num_clips", type=int, default=NUM_CLIPS, help="clips (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=49, help="of a clip (default: %(default)s)")
    parser.add_argument("--height", type=int, default=480, help="pixel height (default: %(default)s)")
    parser.add_argument("--width", type=int, default=720, help="pixel width (default: %(default)s)")
    args = parser.parse_args()
    write_clips(args.out, args.num_clips, (args.frames, args.height, args.width))
    print(f"{args.num_clips} clips of {args.frames}x{args.height}x{args.width}: {args.out}")


if __name__ == "__main__":
    main()
