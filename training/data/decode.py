"""Reading frames of video files by time, as a player shows them.

Times are seconds from a file's first frame.
"""

import contextlib
import functools
import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np

from base.console import is_quiet
from base.errors import DataError, UsageError, first_line
from data.headers import decoded, formats_of, header_rate, in_one_order, one_clip, opened, read_header
from data.picture import SD_LINES, UNSPECIFIED, Caution, Picture, describe, frame_cautions, show


logger = logging.getLogger(__name__)

TIE = 1e-3  # seconds; a time midway between two frames takes the earlier one, also where a file rounds to 1 ms (mkv)
SEEK_AFTER = 2.0  # seconds; nearer starts are decoded up to
SEEK_MARGIN = 1.0  # seconds; seeking goes by decode times, which run ahead of display times
LATE_STAMPS = {"avi", "asf"}  # formats that store when a frame is decoded, or when another is shown
SEEKABLE = {"mp4", "matroska", "mpegts"}  # formats that store every frame's time, so that it is the same after a seek
DECORD_FORMATS, DECORD_PIXELS = {"mp4", "matroska"}, {"yuv420p", "yuvj420p"}
READ_WITH_PYAV = set()  # paths of which `say_pyav` has told


def read_frames(path, times: Sequence[float], backend: str = "auto", num_threads: int = 0) -> np.ndarray:
    """The frames nearest to the ascending `times`, uint8 [F, H, W, 3] RGB; DataError if they cannot all be had.

    auto is PyAV: 49 frames at 8 fps from each of six H.264 clips (three 720x480, three about 340x256) took 0.83 s in
    all with one thread and 0.77 s by default on 2 cores, decord 0.6 1.07 and 0.95 s, for the same bytes; and decord
    hands out damaged frames as if they were good.
    """
    try:
        with one_clip(path):
            frames = read_with_decord(path, times, num_threads) if backend == "decord" else None
            return read_with_pyav(path, times, num_threads) if frames is None else frames
    except DataError as error:
        message = str(error)
    # Afresh: the old one's traceback keeps the decoder and its threads; a process forked meanwhile would inherit it
    # without them and hang when it is collected there
    raise DataError(message)


# ---------------------------------------------------------------- frames


class Shown(NamedTuple):
    """A decoded frame and when it is shown. What builds on damaged data is damaged, up to the next key frame."""

    seconds: float
    frame: av.VideoFrame
    damaged: bool


def read_with_pyav(path, times: Sequence[float], num_threads: int) -> np.ndarray:
    """A late start seeks. What a seek brings counts only if all went well; else the file is decoded from its start."""
    if times[0] > SEEK_AFTER:
        with contextlib.suppress(DataError), one_clip(path, log=False):
            return decode_at(path, times, num_threads, seek=True)
    return decode_at(path, times, num_threads, seek=False)


def decode_at(path, times: Sequence[float], num_threads: int, seek: bool) -> np.ndarray:
    """The frames nearest to `times`, as a player shows them."""
    pixels, done, previous, broken = None, 0, None, None
    with opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = num_threads
        picture = describe(path, container, stream)
        stamps = display_stamps(path) if LATE_STAMPS & formats_of(container) else []
        try:
            for current in timed_frames(path, container, stream, times[0], seek, stamps):
                while done < len(times) and times[done] <= current.seconds + TIE:
                    early = previous and times[done] <= (previous.seconds + current.seconds) / 2 + TIE
                    chosen = previous if early else current
                    if chosen.damaged:
                        raise unreadable(path, stream, previous, "damaged data")
                    if pixels is None:
                        warn_of_frame(path, chosen.frame, picture)
                    pixels = put(path, pixels, done, show(chosen.frame, picture), len(times))
                    done += 1
                if done == len(times):
                    return pixels
                previous = current
        except av.FFmpegError as error:
            broken = error.strerror
        # The last frame stays for its duration; one before an error only until the next would be nearer
        if (
            previous is None
            or times[-1] > previous.seconds + stay(stream, previous.frame) / (2 if broken else 1) + TIE
        ):
            raise unreadable(path, stream, previous, broken or "it ends early")
        if previous.damaged:
            raise unreadable(path, stream, previous, "damaged data")
        for place in range(done, len(times)):
            pixels = put(path, pixels, place, show(previous.frame, picture), len(times))
    return pixels


def display_stamps(path) -> list[float]:
    """Seconds at which the frames are shown, from the packets: in order, for formats that give a frame the time of when
    it was decoded.
    """
    with opened(path) as (container, stream):
        packets = [packet for packet in in_one_order(path, container, stream) if packet.pts is not None]
    first = next((number for number, packet in enumerate(packets) if packet.is_keyframe), 0)
    seconds = sorted(float(packet.pts * packet.time_base) for packet in packets[first:])
    return [second - seconds[0] for second in seconds]


def warn_of_frame(path, frame: av.VideoFrame, picture: Picture) -> None:
    """Name a clip that is not read as a player shows it, where only a decoded frame tells."""
    for caution in frame_cautions(frame):
        if caution not in picture.cautions:
            say_caution(path, caution)


@functools.cache
def say_caution(path, caution: Caution) -> None:
    """One line, once per clip and process."""
    logger.warning('%s is %s; convert with ffmpeg -i IN -vf "%s" OUT.mp4', path, caution.what, caution.filter)


def timed_frames(path, container, stream, start: float, seek: bool, stamps: list[float]) -> Iterator[Shown]:
    """Frames in order of display, from some frame at or before `start` on; DataError for a seek that lands late, and
    where times go backwards. `stamps` rule where they are given.
    """
    frames = decoded(container, stream)
    first = next(frames, None)
    if first is None:
        return
    origin = first.time or 0.0
    if seek and first.pts is not None and SEEKABLE & formats_of(container):
        container.seek(first.pts + int((start - SEEK_MARGIN) / stream.time_base), stream=stream)
        frames = decoded(container, stream)
        first = next(frames, None)
        if first is None or first.time is None or not first.key_frame or first.time - origin > start:
            raise DataError(f"{path}: no key frame is found before {start:.2f} s")
    period, damaged, before = 1 / header_rate(stream), False, -math.inf
    for number, frame in enumerate(itertools.chain([first], frames)):
        if number < len(stamps):
            seconds = stamps[number]
        else:
            seconds = number * period if frame.pts is None else frame.time - origin
        if seconds < before - TIE:
            raise DataError(
                f"{path}: its frames' times go back from {before:.2f} to {seconds:.2f} s; convert it again"
            )
        damaged, before = frame.is_corrupt or (damaged and not frame.key_frame), seconds
        yield Shown(seconds, frame, damaged)


def put(path, pixels: np.ndarray | None, place: int, image: np.ndarray, num_frames: int) -> np.ndarray:
    """Writes an image at its place of uint8 [F, H, W, 3], made with the first: only wanted frames take memory."""
    if pixels is None:
        pixels = np.empty((num_frames, *image.shape), np.uint8)
    if image.shape != pixels.shape[1:]:
        raise DataError(f"{path}: the frame size changes within the video; convert it to one size")
    pixels[place] = image
    return pixels


def stay(stream, frame: av.VideoFrame) -> float:
    """Seconds for which the last frame stays: longer than a period where the rate varies."""
    period = 1 / header_rate(stream)
    return max(period, float((frame.duration or 0) * (stream.time_base or 0)))


def unreadable(path, stream, last: Shown | None, reason: str) -> DataError:
    readable = 0 if last is None else math.floor(last.seconds * header_rate(stream) + 0.5) + 1
    total = f" of {stream.frames}" if stream.frames else ""
    return DataError(f"{path}: {readable}{total} frames readable ({reason}); download or export it again")


# ---------------------------------------------------------------- decord


def import_decord():
    try:
        import decord
    except ImportError as error:
        raise UsageError(
            "--video_backend decord: decord is not installed: pip install decord (x86-64 only), or use pyav"
        ) from error
    if is_quiet():
        decord.logging.set_level(decord.logging.QUIET)  # what is wrong with a file is in the error that it raises
    return decord


def read_with_decord(path, times: Sequence[float], num_threads: int) -> np.ndarray | None:
    """The same from decord, or None, with one line, for a file in which it is not known to find the right frames.

    decord 0.6 seeks by frame numbers, which loses count in open groups of pictures, intra refresh, HEVC, MPEG-4 and
    files that do not begin at 0: so frames are decoded from the file's start, and their times compared with the packets'.
    """
    stat = os.stat(path)
    decord, stamps = import_decord(), trusted_times(path, stat.st_size, stat.st_mtime_ns)
    if stamps is None:
        return say_pyav(path, "decord is known to give other frames of such files")
    try:
        reader = decord.VideoReader(os.path.abspath(path), num_threads=num_threads)
        starts = reader.get_frame_timestamp(list(range(len(reader)))).astype(np.float64)[:, 0]  # [frames]
        if len(starts) != len(stamps) or abs(starts - starts[0] - stamps).max() > TIE:
            return say_pyav(path, "decord gives its frames other times")
        if times[-1] > stamps[-1] + TIE:
            return say_pyav(path, "decord does not know how long the last frame stays")
        nearest = np.searchsorted((stamps[1:] + stamps[:-1]) / 2 + TIE, times)
        images = {}
        for number in range(nearest[-1] + 1):
            image = reader.next()
            if number in nearest:
                images[number] = image.asnumpy()
        return np.stack([images[number] for number in nearest])
    except (RuntimeError, StopIteration, decord.DECORDError, decord.DECORDLimitReachedError) as error:
        return say_pyav(path, f"decord cannot read it: {first_line(error)}")


def say_pyav(path, reason: str) -> None:
    """One line, once per clip and process: decord's reasons hold the time of day."""
    if path not in READ_WITH_PYAV:
        READ_WITH_PYAV.add(path)
        logger.info("%s: read with PyAV (%s)", path, reason)


@functools.lru_cache(maxsize=10_000)
def trusted_times(path, size: int, mtime_ns: int) -> np.ndarray | None:
    """Seconds of every frame, ascending from 0, of a file that decord shows as a player does; else None.

    Remembered for the file's size and time: it takes the whole file to be demuxed.
    """
    if not read_header(path).picture.is_plain:
        return None
    with opened(path) as (container, stream):
        codec = stream.codec_context
        packets = [packet for packet in container.demux(stream) if packet.size]
        usual = codec.pix_fmt in DECORD_PIXELS and DECORD_FORMATS & formats_of(container)
        described = codec.colorspace != UNSPECIFIED or codec.height <= SD_LINES  # decord takes BT.601 for the rest
        if not (usual and described) or any(packet.pts is None or packet.is_discard for packet in packets):
            return None
        stamps = np.sort([float(packet.pts * packet.time_base) for packet in packets])
    gaps = np.diff(stamps)
    has_gap = len(gaps) and gaps.max() > 1.5 * np.median(gaps)  # where packets are lost decord repeats a frame
    return None if has_gap else stamps - stamps[0]
