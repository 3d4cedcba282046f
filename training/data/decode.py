"""Decodes frames at given times from video files, as a player shows them.

Times are in seconds from the file's first frame.
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
from av.video.reformatter import VideoReformatter

from base.console import is_quiet
from base.errors import DataError, UsageError, first_line
from data.headers import clip_errors, decoded, header_rate, open_video, ordered_packets, read_header
from data.picture import SD_LINES, UNSPECIFIED, Caution, Picture, describe, formats_of, frame_cautions, show


logger = logging.getLogger(__name__)

TIE_SECONDS = (
    1e-3  # seconds; midway between two frames the earlier one is taken, even if the file rounds to 1 ms (mkv)
)
SEEK_AFTER = 2.0  # seconds; up to here, decoding from the start is used instead of a seek
SEEK_MARGIN = 1.0  # seconds; seeking uses decode times, which run ahead of display times
DECODE_TIME_FORMATS = {"avi", "asf"}  # formats whose timestamps are decode times, or those of another frame
SEEKABLE_FORMATS = {
    "mp4",
    "matroska",
    "mpegts",
}  # formats that store every frame's time, so times are the same after a seek
DECORD_FORMATS, DECORD_PIXELS = {"mp4", "matroska"}, {"yuv420p", "yuvj420p"}
LOGGED_PATHS = set()  # paths that `log_pyav` has logged


def read_frames(path, times: Sequence[float], backend: str = "auto", num_threads: int = 0) -> np.ndarray:
    """The frames nearest to the ascending `times`, uint8 [F, H, W, 3] RGB; DataError if any cannot be read.

    "auto" is PyAV: 49 frames at 8 fps from each of six H.264 clips (three 720x480, three about 340x256) took 0.83 s in
    total with one thread and 0.77 s with default threads on 2 cores; decord 0.6 took 1.07 s and 0.95 s for the same
    bytes, and returns damaged frames without an error.
    """
    try:
        with clip_errors(path):
            frames = read_with_decord(path, times, num_threads) if backend == "decord" else None
            return read_with_pyav(path, times, num_threads) if frames is None else frames
    except DataError as error:
        message = str(error)
    # A new exception: the old one's traceback keeps the decoder and its threads alive. A process forked meanwhile
    # would inherit the decoder without its threads, and hang when it is garbage-collected there
    raise DataError(message)


# ---------------------------------------------------------------- frames


class TimedFrame(NamedTuple):
    """A decoded frame and its display time. Frames after a damaged one count as damaged up to the next key frame."""

    seconds: float
    frame: av.VideoFrame
    damaged: bool


def read_with_pyav(path, times: Sequence[float], num_threads: int) -> np.ndarray:
    """Seeks for a late start. If anything goes wrong after the seek, the file is decoded from its start instead."""
    if times[0] > SEEK_AFTER:
        with contextlib.suppress(DataError), clip_errors(path, log=False):
            return decode_at(path, times, num_threads, seek=True)
    return decode_at(path, times, num_threads, seek=False)


def decode_at(path, times: Sequence[float], num_threads: int, seek: bool) -> np.ndarray:
    """The frames nearest to `times`, as a player shows them."""
    pixels, done, previous, broken, to_rgb = None, 0, None, None, VideoReformatter()
    with open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = num_threads
        picture = describe(path, container, stream)
        stamps = display_stamps(path) if DECODE_TIME_FORMATS & formats_of(container) else []
        try:
            for current in timed_frames(path, container, stream, times[0], seek, stamps):
                # A wanted time is decided once a frame at or after it is known; one frame may serve several times
                while done < len(times) and times[done] <= current.seconds + TIE_SECONDS:
                    early = previous and times[done] <= (previous.seconds + current.seconds) / 2 + TIE_SECONDS
                    chosen = previous if early else current
                    if chosen.damaged:
                        raise unreadable(path, stream, previous, "damaged data")
                    if pixels is None:
                        warn_of_frame(path, chosen.frame, picture)
                    pixels = write_frame(path, pixels, done, show(chosen.frame, picture, to_rgb), len(times))
                    done += 1
                if done == len(times):
                    return pixels
                previous = current
        except av.FFmpegError as error:
            broken = error.strerror
        # The last frame is shown for its duration; the last one before an error for half, then the next is nearer
        if (
            previous is None
            or times[-1]
            > previous.seconds + display_seconds(stream, previous.frame) / (2 if broken else 1) + TIE_SECONDS
        ):
            raise unreadable(path, stream, previous, broken or "it ends early")
        if previous.damaged:
            raise unreadable(path, stream, previous, "damaged data")
        for place in range(done, len(times)):
            pixels = write_frame(path, pixels, place, show(previous.frame, picture, to_rgb), len(times))
    return pixels


def display_stamps(path) -> list[float]:
    """Display times in seconds, from the packets in sorted order; for formats whose frames carry decode times."""
    with open_video(path) as (container, stream):
        packets = [packet for packet in ordered_packets(path, container, stream) if packet.pts is not None]
    first = next((number for number, packet in enumerate(packets) if packet.is_keyframe), 0)
    seconds = sorted(float(packet.pts * packet.time_base) for packet in packets[first:])
    return [second - seconds[0] for second in seconds]


def warn_of_frame(path, frame: av.VideoFrame, picture: Picture) -> None:
    """Warn about a clip that is not read as a player shows it, if only a decoded frame reveals it."""
    for caution in frame_cautions(frame):
        if caution not in picture.cautions:
            log_caution(path, caution)


@functools.cache
def log_caution(path, caution: Caution) -> None:
    """Log one line, once per clip and process."""
    logger.warning('%s is %s; convert with ffmpeg -i IN -vf "%s" OUT.mp4', path, caution.what, caution.filter)


def timed_frames(path, container, stream, start: float, seek: bool, stamps: list[float]) -> Iterator[TimedFrame]:
    """Frames in display order, beginning at or before `start`; DataError if a seek lands too late or times go
    backwards. `stamps`, if given, replace the frames' own times.
    """
    frames = decoded(container, stream)
    first = next(frames, None)
    if first is None:
        return
    origin = first.time or 0.0  # times count from the first frame, whatever the container's clock says
    if seek and first.pts is not None and SEEKABLE_FORMATS & formats_of(container):
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
        if seconds < before - TIE_SECONDS:
            raise DataError(
                f"{path}: its frames' times go back from {before:.2f} to {seconds:.2f} s; convert it again"
            )
        damaged, before = frame.is_corrupt or (damaged and not frame.key_frame), seconds
        yield TimedFrame(seconds, frame, damaged)


def write_frame(path, pixels: np.ndarray | None, place: int, image: np.ndarray, num_frames: int) -> np.ndarray:
    """Write `image` to its place in uint8 [F, H, W, 3], allocated at the first: only wanted frames take memory."""
    if pixels is None:
        pixels = np.empty((num_frames, *image.shape), np.uint8)
    if image.shape != pixels.shape[1:]:
        raise DataError(f"{path}: the frame size changes within the video; convert it to one size")
    pixels[place] = image
    return pixels


def display_seconds(stream, frame: av.VideoFrame) -> float:
    """Seconds for which the last frame is shown: may exceed a period if the rate varies."""
    period = 1 / header_rate(stream)
    return max(period, float((frame.duration or 0) * (stream.time_base or 0)))


def unreadable(path, stream, last: TimedFrame | None, reason: str) -> DataError:
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
        decord.logging.set_level(decord.logging.QUIET)  # its exceptions say what is wrong with a file
    return decord


def read_with_decord(path, times: Sequence[float], num_threads: int) -> np.ndarray | None:
    """`read_with_pyav` with decord; logs a line and returns None for files where decord may return wrong frames.

    decord 0.6 seeks by frame number and miscounts with open GOPs, intra refresh, HEVC, MPEG-4 and files that do not
    begin at 0. So frames are decoded from the file's start, and their times are compared with those of the packets.
    """
    stat = os.stat(path)
    decord, stamps = import_decord(), trusted_times(path, stat.st_size, stat.st_mtime_ns)
    if stamps is None:
        return log_pyav(path, "decord is known to return wrong frames for such files")
    try:
        reader = decord.VideoReader(os.path.abspath(path), num_threads=num_threads)
        starts = reader.get_frame_timestamp(list(range(len(reader)))).astype(np.float64)[:, 0]  # [frames]
        if len(starts) != len(stamps) or abs(starts - starts[0] - stamps).max() > TIE_SECONDS:
            return log_pyav(path, "decord reports other frame times")
        if times[-1] > stamps[-1] + TIE_SECONDS:
            return log_pyav(path, "decord does not know how long the last frame is shown")
        nearest = np.searchsorted(
            (stamps[1:] + stamps[:-1]) / 2 + TIE_SECONDS, times
        )  # midpoints: index of the nearest frame
        images = {}
        for number in range(nearest[-1] + 1):
            image = reader.next()
            if number in nearest:
                images[number] = image.asnumpy()
        return np.stack([images[number] for number in nearest])
    except (RuntimeError, StopIteration, decord.DECORDError, decord.DECORDLimitReachedError) as error:
        return log_pyav(path, f"decord cannot read it: {first_line(error)}")


def log_pyav(path, reason: str) -> None:
    """Log one line, once per clip and process. Not functools.cache: decord's messages contain the time of day."""
    if path not in LOGGED_PATHS:
        LOGGED_PATHS.add(path)
        logger.info("%s: read with PyAV (%s)", path, reason)


@functools.lru_cache(maxsize=10_000)
def trusted_times(path, size: int, mtime_ns: int) -> np.ndarray | None:
    """Times of all frames in seconds, ascending from 0, if decord shows the file as a player does; else None.

    Cached by the file's size and mtime, because it demuxes the whole file.
    """
    if not read_header(path).picture.is_plain:
        return None
    with open_video(path) as (container, stream):
        codec = stream.codec_context
        packets = [packet for packet in container.demux(stream) if packet.size]
        usual = codec.pix_fmt in DECORD_PIXELS and DECORD_FORMATS & formats_of(container)
        described = codec.colorspace != UNSPECIFIED or codec.height <= SD_LINES  # decord assumes BT.601 otherwise
        if not (usual and described) or any(packet.pts is None or packet.is_discard for packet in packets):
            return None
        stamps = np.sort([float(packet.pts * packet.time_base) for packet in packets])
    gaps = np.diff(stamps)
    has_gap = len(gaps) and gaps.max() > 1.5 * np.median(gaps)  # decord repeats a frame if packets are lost
    return None if has_gap else stamps - stamps[0]
