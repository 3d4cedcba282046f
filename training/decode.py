"""Reading video files: sizes from the header, frames by time.

Times are seconds from a file's first frame. Rotation metadata is applied as players do.
"""

import contextlib
import itertools
import math
import os
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition

from errors import DataError, UsageError


TIE = 1e-3  # seconds; a time midway between two frames takes the earlier one, also where a file rounds to 1 ms (mkv)
SEEK_AFTER = 2.0  # seconds; nearer starts are decoded up to
SEEK_MARGIN = 1.0  # seconds; seeking goes by decode times, which run ahead of display times
UPRIGHT = (1, 0, 0, 1)
# Containers that hold their frames themselves. Playlists and lists (hls, dash, concat, sdp, image2) name other files or
# addresses, and what is a list is told by content: a list may call itself .mp4
CONTAINERS = (
    "mov", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "av1", "obu", "ivf", "gif",
    "apng", "png_pipe", "webp_pipe", "ogg", "flv", "asf", "mxf", "nut", "dv", "rm", "swf", "wtv", "yuv4mpegpipe",
)  # fmt: skip


class VideoInfo(NamedTuple):
    """Height and width as displayed."""

    num_frames: int
    fps: float
    height: int
    width: int


def probe(path) -> VideoInfo:
    """Frame count, rate and displayed size, from the header; DataError for what is no readable video.

    Files without a frame count (mkv) are demuxed to count and one frame is decoded for its rotation.
    """
    return read_header(path)[0]


def read_frames(path, times: Sequence[float], backend: str = "auto", num_threads: int = 0) -> np.ndarray:
    """The frames nearest to the ascending `times`, uint8 [F, H, W, 3] RGB; DataError if they cannot all be had.

    auto is PyAV: 49 frames at 8 fps from each of six H.264 clips (three 720x480, three about 340x256) took 0.83 s in
    all with one thread and 0.77 s by default on 2 cores, decord 0.6 1.07 and 0.95 s, for the same bytes; and decord
    hands out damaged frames as if they were good.
    """
    try:
        if backend == "decord":
            decord = import_decord()
            if read_header(path)[1] == UPRIGHT:  # decord 0.6 garbles turned clips
                return read_with_decord(decord, path, times, num_threads)
        return read_with_pyav(path, times, num_threads)
    except DataError as error:
        message = str(error)
    # Afresh: the old one's traceback keeps the decoder and its threads; a process forked meanwhile would inherit it
    # without them and hang when it is collected there
    raise DataError(message)


# ---------------------------------------------------------------- headers


@contextlib.contextmanager
def opened(path):
    """(container, video stream) of a file; DataError names what is wrong with it."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise DataError(f"{path}: empty file; download or export it again")
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(CONTAINERS)}
    try:
        container = av.open(os.path.abspath(path), options=options, metadata_errors="replace")  # tags in any encoding
    except av.ArgumentError as error:  # what a format that is not listed gives
        raise DataError(
            f"{path}: a playlist, a list of files, or no video; only files that hold their frames are read"
        ) from error
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: not a readable video (no index: truncated download? {reason})") from error
    with container:
        stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
        if stream is None:
            raise DataError(f"{path}: no video stream")
        if stream.codec_context is None:
            raise DataError(f"{path}: its codec cannot be decoded; convert it to H.264")
        yield container, stream


def read_header(path) -> tuple[VideoInfo, tuple[int, int, int, int]]:
    """The video's facts and its display matrix, reduced to signs: (1, 0, 0, 1) is upright."""
    with opened(path) as (container, stream):
        height, width = stream.codec_context.height, stream.codec_context.width
        fps = header_rate(stream)
        if "mp4" in container.format.name.split(","):
            num_frames = count_indexed_frames(path, stream)
            seconds = float((stream.duration or 0) * stream.time_base)
            # The larger of two estimates: where the rate varies, the clip then never seems longer than it is
            fps = max(fps, measured_rate(fps, num_frames, seconds))
            matrix = read_track_matrix(path, stream.id)
        elif stream.frames:
            num_frames, matrix = stream.frames, UPRIGHT
        else:
            num_frames, seconds, matrix = count_by_demuxing(path, container, stream)
            fps = measured_rate(fps, num_frames, seconds)  # the header's is a guess from the first frames
    if num_frames == 0 or height == 0:
        raise DataError(f"{path}: no frames in its video stream")
    if matrix[0] == 0:
        height, width = width, height
    return VideoInfo(num_frames, fps, height, width), matrix


def header_rate(stream) -> float:
    """Frames per second; 1 for a still, which has no rate."""
    return float(stream.average_rate or stream.guessed_rate or 1)


def measured_rate(fps: float, num_frames: int, seconds: float) -> float:
    """Frames over length, or `fps` where that is unknown or within the 1 % that rounding makes."""
    measured = num_frames / seconds if seconds else fps
    return measured if abs(measured / fps - 1) > 0.01 else fps


def count_indexed_frames(path, stream) -> int:
    """Frames of an mp4 that are shown (edit lists hide some); DataError if the file ends before its last frame."""
    entries = list(stream.index_entries)
    if not entries:  # fragmented: the index lies between the fragments
        return stream.frames
    size = os.path.getsize(path)
    there = sum(entry.pos + entry.size <= size for entry in entries)
    if there < len(entries):
        raise DataError(f"{path}: cut off: {there} of {len(entries)} frames are in the file; download it again")
    return sum(not entry.is_discard for entry in entries)


def count_by_demuxing(path, container, stream) -> tuple[int, float, tuple[int, int, int, int]]:
    """(frames, seconds, display matrix) of a file whose header tells none; reads all packets, decodes one frame."""
    count, begin, end, first = 0, math.inf, 0.0, None
    stream.codec_context.thread_count = 1
    try:
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None:
                begin = min(begin, float(packet.pts * packet.time_base))
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            count += packet.size > 0  # the last packet is an empty one, to flush
            if first is None:
                first = next(iter(packet.decode()), None)
    except av.FFmpegError as error:
        raise DataError(
            f"{path}: damaged after frame {count} ({error.strerror}); download or export it again"
        ) from error
    if first is None:
        raise DataError(f"{path}: no frame can be decoded; download or export it again")
    promised = promised_seconds(container, stream)
    if end < promised - 0.5:
        raise DataError(f"{path}: cut off: {end:.1f} of {promised:.1f} s are in the file; download it again")
    return count, max(0.0, end - begin), display_matrix(first)


def promised_seconds(container, stream) -> float:
    """Length of the video track by the header, 0 if unknown (the file's length may be another track's)."""
    tag = stream.metadata.get("DURATION", "")  # what mkv writers put: 00:00:10.333000000
    with contextlib.suppress(ValueError):
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    alone = len(container.streams) == 1 and container.duration
    return container.duration / av.time_base if alone else 0.0


def read_track_matrix(path, track_id: int) -> tuple[int, int, int, int]:
    """The display matrix in an mp4's track header (ISO 14496-12, 8.3.2), which PyAV gives only with a decoded frame."""
    with open(path, "rb") as file:
        for body in boxes(file, 0, os.path.getsize(path), (b"moov", b"trak", b"tkhd")):
            times = 8 if body[0] == 1 else 4  # bytes of a time in version 1 and 0
            if int.from_bytes(body[4 + 2 * times : 8 + 2 * times]) == track_id:
                return signs(body[28 + 3 * times : 64 + 3 * times], ">9i")
    return UPRIGHT


def boxes(file, start: int, end: int, names: tuple[bytes, ...]) -> Iterator[bytes]:
    """Contents of the boxes at the path `names` between two offsets of an mp4."""
    while start + 8 <= end:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = int.from_bytes(file.read(8)), 16
        stop = min(start + size, end) if size else end
        if stop < start + header:
            return  # not a box
        if name == names[0] and len(names) == 1:
            yield file.read(stop - start - header)
        elif name == names[0]:
            yield from boxes(file, start + header, stop, names[1:])
        start = stop


def signs(matrix: bytes, layout: str) -> tuple[int, int, int, int]:
    """a, b, c, d of x' = a x + c y, y' = b x + d y, to the nearest quarter turn."""
    a, b, _, c, d, *_ = struct.unpack(layout, matrix)
    turned = abs(b) > abs(a)
    a, b, c, d = (0, b, c, 0) if turned else (a, 0, 0, d)
    if (a or b) == 0 or (d or c) == 0:
        return UPRIGHT  # all zero: some writers leave it unset
    return tuple((value > 0) - (value < 0) for value in (a, b, c, d))


def display_matrix(frame) -> tuple[int, int, int, int]:
    data = frame.side_data.get("DISPLAYMATRIX")
    return UPRIGHT if data is None else signs(bytes(data), "=9i")


# ---------------------------------------------------------------- frames


def read_with_pyav(path, times: Sequence[float], num_threads: int) -> np.ndarray:
    pixels, done, previous, seconds = None, 0, None, 0.0
    with opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = num_threads
        try:
            for seconds, frame in timed_frames(path, container, stream, times[0]):
                while done < len(times) and times[done] <= seconds + TIE:
                    early = previous and times[done] <= (previous[0] + seconds) / 2 + TIE
                    pixels = put(path, pixels, done, previous[1] if early else frame, len(times))
                    done += 1
                if done == len(times):
                    return pixels
                previous = (seconds, frame)
        except av.FFmpegError as error:
            raise unreadable(path, stream, seconds if previous else None, error.strerror) from error
        if previous is None or times[-1] > previous[0] + shown_seconds(stream, previous[1]) + TIE:
            raise unreadable(path, stream, previous and previous[0], "it ends early")
        for place in range(done, len(times)):
            pixels = put(path, pixels, place, previous[1], len(times))
    return pixels


def timed_frames(path, container, stream, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds from the first frame, frame) in order of display, from some frame at or before `start` on.

    A late start seeks, which is exact: it counts only if it lands on a key frame at or before `start`.
    """
    frames = container.decode(stream)
    first = next(frames, None)
    if first is None:
        return
    origin = first.time or 0.0
    if start > SEEK_AFTER and first.pts is not None:
        container.seek(first.pts + int((start - SEEK_MARGIN) / stream.time_base), stream=stream)
        frames = container.decode(stream)
        landed = next(frames, None)
        if landed is None or landed.time is None or not landed.key_frame or landed.time - origin > start:
            container.seek(first.pts, stream=stream)
            frames = container.decode(stream)
            landed = next(frames)
        first = landed
    period = 1 / header_rate(stream)
    damaged = False
    for number, frame in enumerate(itertools.chain([first], frames)):
        seconds = number * period if frame.pts is None else frame.time - origin
        damaged = frame.is_corrupt or (damaged and not frame.key_frame)  # later frames build on a damaged one
        if damaged and seconds >= start - period:
            raise unreadable(path, stream, seconds - period, "damaged data")
        yield seconds, frame


def put(path, pixels: np.ndarray | None, place: int, frame: av.VideoFrame, num_frames: int) -> np.ndarray:
    """Writes a frame at its place of uint8 [F, H, W, 3], made with the first: only wanted frames take memory."""
    # threads=1: starting threads costs more than converting a frame
    image = upright(frame.to_ndarray(format="rgb24", threads=1), display_matrix(frame))
    if pixels is None:
        pixels = np.empty((num_frames, *image.shape), np.uint8)
    if image.shape != pixels.shape[1:]:
        raise DataError(f"{path}: the frame size changes within the video; convert it to one size")
    pixels[place] = image
    return pixels


def upright(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """An image [H, W, 3] turned and mirrored as its display matrix says."""
    a, b, c, d = matrix
    if a == 0:
        image = image.transpose(1, 0, 2)
    return image[:: b + d, :: a + c]


def shown_seconds(stream, frame) -> float:
    """How long the last frame stays: longer than a period where the rate varies."""
    period = 1 / header_rate(stream)
    return max(period, float((frame.duration or 0) * (stream.time_base or 0)))


def unreadable(path, stream, seconds: float | None, reason: str) -> DataError:
    readable = 0 if seconds is None else math.floor(seconds * header_rate(stream) + 0.5) + 1
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
    return decord


def read_with_decord(decord, path, times: Sequence[float], num_threads: int) -> np.ndarray:
    try:
        reader = decord.VideoReader(os.path.abspath(path), num_threads=num_threads)
        shown = reader.get_frame_timestamp(list(range(len(reader)))).astype(np.float64)  # [frames, (start, end)]
        starts, end = shown[:, 0] - shown[0, 0], shown[-1, 1] - shown[0, 0]
        if times[-1] > end + TIE:
            raise DataError(f"{path}: {len(reader)} frames readable (it ends early); download or export it again")
        nearest = np.searchsorted((starts[1:] + starts[:-1]) / 2 + TIE, times)
        return reader.get_batch(nearest).asnumpy()
    except (RuntimeError, decord.DECORDError, decord.DECORDLimitReachedError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: decord cannot read it ({reason}); try --video_backend pyav") from error
