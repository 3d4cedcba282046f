"""Clips of every kind that people have, drawn at random: codec x container x group of pictures x rate x what went wrong.

Each frame shows its own number, so that which frame was read can be told from its pixels.
"""

import functools
import random
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
from make_clips import encode_video

from data.headers import VideoInfo, read_header


BLOCK = 16  # pixels: large enough for the bits to survive any codec
HEIGHT, WIDTH = 2 * BLOCK, 8 * BLOCK

X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-sc_threshold", "0")
CODECS = {  # name: (encoder's flags, containers)
    "h264": ((*X264, "-pix_fmt", "yuv420p"), ("mp4", "mov", "mkv", "ts", "avi", "flv", "dash.mp4", "frag.mp4", "h264")),
    "h264-b": ((*X264, "-pix_fmt", "yuv420p", "-bf", "3"), ("mp4", "mov", "mkv", "ts", "flv", "dash.mp4", "frag.mp4")),
    "h264-open": ((*X264, "-pix_fmt", "yuv420p", "-bf", "2", "-x264-params", "open-gop=1"), ("mp4", "mkv", "ts")),
    "h264-refresh": ((*X264, "-pix_fmt", "yuv420p", "-x264-params", "intra-refresh=1"), ("mp4", "mkv", "ts")),
    "h264-422": ((*X264, "-pix_fmt", "yuv422p"), ("mp4", "mkv")),
    "h264-444": ((*X264, "-pix_fmt", "yuv444p"), ("mp4", "mkv")),
    "h264-10bit": ((*X264, "-pix_fmt", "yuv420p10le"), ("mp4", "mkv", "ts")),
    "hevc": (("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p"),
             ("mp4", "mkv", "ts", "dash.mp4")),
    "vp8": (("-c:v", "libvpx", "-deadline", "realtime", "-auto-alt-ref", "1", "-lag-in-frames", "9"), ("webm", "mkv")),
    "vp9": (("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-pix_fmt", "yuv420p"), ("webm", "mp4")),
    "vp9-10bit": (("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-pix_fmt", "yuv420p10le",
                   "-profile:v", "2"), ("webm", "mp4")),
    "av1": (("-c:v", "libsvtav1", "-preset", "12", "-pix_fmt", "yuv420p"), ("mp4", "mkv", "webm")),
    "mpeg4": (("-c:v", "mpeg4", "-q:v", "3", "-bf", "2"), ("avi", "mp4", "mkv")),
    "mpeg2": (("-c:v", "mpeg2video", "-q:v", "3", "-bf", "2", "-pix_fmt", "yuv420p"), ("mpg", "ts", "mkv")),
    "mjpeg": (("-c:v", "mjpeg", "-q:v", "3", "-pix_fmt", "yuvj420p"), ("avi", "mkv", "mov", "mjpeg")),
    "ffv1": (("-c:v", "ffv1"), ("mkv", "avi")),
}  # fmt: skip
CONTAINER_FLAGS = {
    "dash.mp4": ("-movflags", "+dash"),
    "frag.mp4": ("-movflags", "+frag_keyframe+empty_moov"),
    "mp4": ("-movflags", "+faststart"),
    "flv": ("-flvflags", "no_duration_filesize"),
}
RATES = ("8", "12", "24", "25", "30000/1001", "30", "50")
MPEG2_RATES = ("24", "25", "30000/1001", "30", "50")
GROUPS = (1, 5, 12, 50, 110, 250)  # frames from one key frame to the next
CHANGES = ("none", "none", "none", "later", "trimmed", "cut bytes", "dropped frames")


class Case(NamedTuple):
    codec: str
    container: str
    group: int
    rate: str
    num_frames: int
    change: str

    @property
    def name(self) -> str:
        values = (self.codec, self.group, self.rate.replace("/", "_"), self.num_frames, self.change.replace(" ", "_"))
        return "-".join(map(str, values)) + f".{self.container}"


def draw_case(rng: random.Random) -> Case:
    codec = rng.choice(sorted(CODECS))
    container = rng.choice(CODECS[codec][1])
    rate = rng.choice(MPEG2_RATES if codec == "mpeg2" else RATES)
    return Case(codec, container, rng.choice(GROUPS), rate, rng.randint(40, 250), rng.choice(CHANGES))


def numbered_frames(num_frames: int) -> np.ndarray:
    """Frames [F, 32, 128, 3] that show their own number in 8 black and white blocks."""
    bits = (np.arange(num_frames)[:, None] >> np.arange(7, -1, -1)) & 1
    rows = np.repeat(np.repeat(bits[:, None, :, None] * 255, BLOCK, axis=2), HEIGHT, axis=1)
    return rows.repeat(3, 3).astype("u1")


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames [F, 32, 128, 3] show."""
    bits = frames[:, BLOCK, BLOCK // 2 :: BLOCK, 0] > 127
    return (bits @ (1 << np.arange(7, -1, -1))).tolist()


@functools.cache
def ffmpeg_path():
    """imageio_ffmpeg's program; where that is missing, tests that encode nothing run all the same."""
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg(*flags, pixels: bytes = b"") -> None:
    """Run the ffmpeg that imageio-ffmpeg brings."""
    done = subprocess.run([ffmpeg_path(), "-y", "-v", "error", *map(str, flags)], input=pixels, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-1000:]


def encode(path, frames: np.ndarray, rate: str, *flags) -> Path:
    """Frames uint8 [F, H, W, 3] as a file, by ffmpeg with these flags for the output."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", rate, "-i", "-")
    ffmpeg(*raw, *flags, path, pixels=frames.tobytes())
    return Path(path)


def write_case(folder: Path, case: Case, rng: random.Random) -> Path:
    """The clip of a case, in `folder`."""
    flags = [*CODECS[case.codec][0], "-g", case.group, *CONTAINER_FLAGS.get(case.container, ())]
    if case.change == "dropped frames":
        flags += ["-vf", f"select='not(between(n,{case.num_frames // 3},{case.num_frames // 2}))'"]
        flags += ["-fps_mode", "passthrough"]
    if case.change == "later":
        flags += ["-output_ts_offset", f"{rng.uniform(0.5, 5):.2f}"]
    path = encode(folder / case.name, numbered_frames(case.num_frames), case.rate, *flags)
    if case.change == "trimmed":  # without encoding again: from a key frame on, what lies before the start hidden
        trimmed = path.with_name(f"t-{path.name}")
        more = CONTAINER_FLAGS.get(case.container, ())
        ffmpeg("-ss", f"{rng.uniform(0.1, 1.5):.2f}", "-i", path, "-c", "copy", *more, trimmed)
        return trimmed
    if case.change == "cut bytes" and case.container in ("ts", "mpg", "h264", "mjpeg"):
        data = path.read_bytes()
        path.write_bytes(data[len(data) * rng.randint(1, 5) // 10 : len(data) * rng.randint(7, 10) // 10])
    return path


def write_clip(path, num_frames=9, height=64, width=96, fps=8, seed=0):
    """Write a small mp4 whose every frame differs: a bright square crossing a colour gradient. Returns the path."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 160, size=(2, 3))
    colour = rng.integers(180, 256, size=3)
    ramp = np.linspace(0, 1, width)[None, :, None]
    background = np.broadcast_to(corners[0] * (1 - ramp) + corners[1] * ramp, (height, width, 3))
    frames = np.repeat(background[None], num_frames, axis=0)
    side = max(2, height // 4)
    top = rng.integers(0, height - side + 1)
    for index, frame in enumerate(frames):
        left = round(index * (width - side) / max(num_frames - 1, 1))
        frame[top : top + side, left : left + side] = colour
    encode_video(path, frames.astype(np.uint8), fps)
    return Path(path)


def probe(path) -> VideoInfo:
    """Frame count, rate and displayed size, as the data set reads them."""
    return read_header(path).info
