"""A clip as a vision-language model is shown it: a few frames as small JPEGs, or the file itself."""

import io
import mimetypes
import os
from typing import NamedTuple

from PIL import Image

from base.errors import DataError
from data.decode import read_frames
from data.headers import is_image, read_header


JPEG_QUALITY = 90
MAX_VIDEO_BYTES = 128 * 2**20  # of a file sent whole: base64 makes it a third larger, and it is held in memory


class Shown(NamedTuple):
    """Files to send, each (media type, bytes); `seconds`: how long the clip lasts, 0 for a still image."""

    files: list[tuple[str, bytes]]
    seconds: float


def show_frames(path, num_frames: int, max_size: int) -> Shown:
    """Frames in the middle of `num_frames` equal parts of the clip, no side longer than `max_size` pixels."""
    info = read_header(path).info
    if is_image(path, info.num_frames):
        return Shown([as_jpeg(read_frames(path, [0.0], num_threads=1)[0], max_size)], 0.0)
    times = middle_times(info.num_frames, info.fps, num_frames)
    frames = read_frames(path, times, num_threads=1)  # [F, H, W, 3]; one thread: clips are decoded side by side
    return Shown([as_jpeg(frame, max_size) for frame in frames], info.num_frames / info.fps)


def middle_times(num_frames: int, fps: float, count: int) -> list[float]:
    """Ascending times in seconds, each of another frame: of a short clip there are fewer than `count`."""
    count = min(count, num_frames)
    return [int((part + 0.5) * num_frames / count) / fps for part in range(count)]


def as_jpeg(pixels, max_size: int) -> tuple[str, bytes]:
    image = Image.fromarray(pixels)
    image.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)  # keeps the aspect ratio, never enlarges
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "image/jpeg", buffer.getvalue()


def show_video(path, max_size: int) -> Shown:
    """The file itself; of a still image, the picture."""
    info = read_header(path).info
    if is_image(path, info.num_frames):
        return show_frames(path, 1, max_size)
    if (size := os.path.getsize(path)) > MAX_VIDEO_BYTES:
        raise DataError(
            f"{path}: {size / 2**20:.0f} MiB, and files of up to {MAX_VIDEO_BYTES >> 20} MiB are sent; use --send frames"
        )
    with open(path, "rb") as file:
        return Shown([(mimetypes.guess_type(path)[0] or "video/mp4", file.read())], info.num_frames / info.fps)
