"""Reading video files: sizes from the header, frames by time.

Times are seconds from a file's first frame. Frames are what a player shows, see picture.py. What a decoder raises is a
DataError of the one clip.
"""

import contextlib
import functools
import io
import itertools
import logging
import math
import mimetypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition

from containers import file_boxes
from errors import DataError, UsageError, UserError, first_line, keep_trace
from file_kinds import other_content
from picture import SD_LINES, UNSPECIFIED, Picture, describe, show


logger = logging.getLogger(__name__)

TIE = 1e-3  # seconds; a time midway between two frames takes the earlier one, also where a file rounds to 1 ms (mkv)
SEEK_AFTER = 2.0  # seconds; nearer starts are decoded up to
SEEK_MARGIN = 1.0  # seconds; seeking goes by decode times, which run ahead of display times
MISSING = 0.5  # seconds by which a file may end before the length that its header gives
STARTS_OVER = 1.0  # seconds by which a packet's decode time may lie before its predecessor's
# Containers that hold their frames themselves. Playlists and lists (hls, dash, concat, sdp, image2) name other files or
# addresses, and what is a list is told by content: a list may call itself .mp4
CONTAINERS = (
    "mov", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "vvc", "av1", "obu", "ivf",
    "mjpeg", "h261", "h263", "vc1", "dirac", "cavsvideo", "gif", "apng", "jpegxl_anim", "ogg", "flv", "asf", "mxf", "nut",
    "nsv", "dv", "rm", "swf", "wtv", "yuv4mpegpipe", "amv", "smjpeg", "flic", "roq", "bink", "smk", "gxf", "lxf",
    *(f"{image}_pipe" for image in (
        "bmp", "dds", "dpx", "exr", "gif", "hdr", "j2k", "jpeg", "jpegls", "jpegxl", "pam", "pbm", "pcx", "pfm", "pgm",
        "png", "ppm", "psd", "qoi", "sgi", "sunrast", "tiff", "webp", "xbm", "xwd",
    )),
)  # fmt: skip
SEEKABLE = {"mp4", "matroska", "mpegts"}  # formats that store every frame's time, so that it is the same after a seek
KEEP_LENGTH = {"mp4", "matroska", "avi", "asf", "flv"}  # formats whose header has the length; FFmpeg guesses others'
DECORD_FORMATS, DECORD_PIXELS = {"mp4", "matroska"}, {"yuv420p", "yuvj420p"}
PATTERNS = set("%*?{")  # in an image's name, FFmpeg takes them for a list of files


class VideoInfo(NamedTuple):
    """Height and width as displayed."""

    num_frames: int
    fps: float
    height: int
    width: int


class Header(NamedTuple):
    """What is known of a file before its frames are read."""

    info: VideoInfo
    picture: Picture


def probe(path) -> VideoInfo:
    """Frame count, rate and displayed size; DataError for what is no readable video."""
    return read_header(path).info


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


@contextlib.contextmanager
def one_clip(path):
    """Whatever the libraries raise within is a DataError of this clip: one line, what nobody foresaw with its traceback
    in a log file.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except (av.PatchWelcomeError, av.DecoderNotFoundError) as error:
        raise DataError(
            f"{path}: FFmpeg cannot read this kind of it ({error.strerror}); convert it to H.264"
        ) from error
    except av.FFmpegError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); download or export it again") from error
    except Exception as error:  # decoders are many and fed with anything: the other clips go on
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(
            f"{path}: cannot be read ({reason}; traceback in {keep_trace()}); convert it to H.264"
        ) from error


# ---------------------------------------------------------------- headers


@contextlib.contextmanager
def opened(path):
    """(container, video stream) of a file; DataError names what is wrong with it."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise DataError(f"{path}: empty file; download or export it again")
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(CONTAINERS)}
    source, kind = os.path.abspath(path), mimetypes.guess_type(path)[0] or ""
    if kind.startswith("image/") and PATTERNS & set(os.path.basename(path)):
        source = io.BytesIO(Path(path).read_bytes())
    try:
        container = av.open(source, options=options, metadata_errors="replace")  # tags in any encoding
    except (av.FFmpegError, ValueError) as error:
        raise DataError(f"{path}: {why_not_opened(path, error)}") from error
    with container:
        yield container, choose_stream(path, container)


def why_not_opened(path, error: Exception) -> str:
    if other := other_content(path):
        return other
    if isinstance(error, av.ArgumentError):  # what a format that is not listed gives
        return "a playlist, a list of files, or no video; only files that hold their frames are read"
    reason = getattr(error, "strerror", None) or error
    return f"not a readable video (no index: truncated download? {reason})"


def choose_stream(path, container):
    """The video stream that a player shows; cover pictures and single tiles of a photo are none."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    stream = best if best in streams else next(iter(streams), None)
    if stream is None:
        raise DataError(f"{path}: no video stream")
    if stream.codec_context is None:
        raise DataError(f"{path}: its codec cannot be decoded; convert it to H.264")
    if stream.disposition & Disposition.dependent:
        raise DataError(f"{path}: a photo made of tiles (HEIF), which are not put together; convert it to JPEG")
    return stream


def read_header(path) -> Header:
    """Facts and Picture of a video. Files whose header does not tell how many frames can be decoded are demuxed."""
    with one_clip(path), opened(path) as (container, stream):
        counted = count_indexed(path, container, stream) or count_by_demuxing(path, container, stream)
        picture = describe(path, container, stream, counted.first)
        height, width = picture.shown(stream.codec_context.height, stream.codec_context.width)
        if counted.num_frames == 0 or height == 0 or width == 0:
            raise DataError(f"{path}: no frames in its video stream")
        return Header(VideoInfo(counted.num_frames, counted.fps, height, width), picture)


class Counted(NamedTuple):
    num_frames: int
    fps: float
    first: av.VideoFrame | None  # decoded where packets were read


def header_rate(stream) -> float:
    """Frames per second; 1 for a still, which has no rate."""
    return float(stream.average_rate or stream.guessed_rate or 1)


def measured_rate(fps: float, num_frames: int, seconds: float) -> float:
    """Frames over length, or `fps` where that is unknown or within the 1 % that rounding makes."""
    measured = num_frames / seconds if seconds > 0 else fps
    return measured if abs(measured / fps - 1) > 0.01 else fps


def formats_of(container) -> set[str]:
    return set(container.format.name.split(","))


def count_indexed(path, container, stream) -> Counted | None:
    """The frames of an mp4, from an index that tells of all of them; DataError if the file ends before the last.

    None where it does not: in fragments, of which only some were read, under an edit list, which hides frames, or
    before a key frame.
    """
    if "mp4" not in formats_of(container) or next(file_boxes(path, b"moov", b"mvex"), None) is not None:
        return None
    entries, size = list(stream.index_entries), os.path.getsize(path)
    there = sum(entry.pos + entry.size <= size for entry in entries)
    if there < len(entries):
        raise DataError(f"{path}: cut off: {there} of {len(entries)} frames are in the file; download it again")
    fps, seconds = header_rate(stream), float((stream.duration or 0) * stream.time_base)
    edited = not entries or not entries[0].is_keyframe or any(entry.is_discard for entry in entries)
    if edited or len(entries) / fps < seconds - MISSING:
        return None
    # The larger of two estimates: where the rate varies, the clip then never seems longer than it is
    return Counted(len(entries), max(fps, measured_rate(fps, len(entries), seconds)), None)


def count_by_demuxing(path, container, stream) -> Counted:
    """The frames that can be decoded, from the first key frame on; DataError for a file that is damaged or cut off.

    Reads all packets, decodes the first frame and, where no header vouches for the file's end, the last ones.
    """
    stream.codec_context.thread_count = 1
    begin, end, stamps, first, group = math.inf, -math.inf, [], None, []  # group: packets since the last key frame
    try:
        for packet in in_one_order(path, container.demux(stream)):
            if packet.pts is not None:
                begin = min(begin, float(packet.pts * packet.time_base))
                end = max(end, float((packet.pts + packet.duration) * packet.time_base))
            if packet.is_keyframe:
                group = []
            elif not group:
                continue  # nothing to build on
            group.append(packet)
            first = first or next(iter(packet.decode()), None)
            if not packet.is_discard:
                stamps.append(packet.pts)
        first = first or next(iter(stream.decode(None)), None)
    except av.FFmpegError as error:
        raise damaged_after(path, len(stamps), error) from error
    if first is None:
        raise DataError(f"{path}: no frame can be decoded; download or export it again")
    if first.pts is None or None in stamps:  # a stream without a container: frames follow one another at one rate
        return Counted(len(good_frames(path)), header_rate(stream), first)
    promised = promised_seconds(container, stream)
    there = max(end, end - begin)  # some headers count from 0, others from the first frame
    if there < promised - MISSING - 1 / header_rate(stream):
        raise DataError(f"{path}: cut off: {there:.1f} of {promised:.1f} s are in the file; download it again")
    vouched = promised and KEEP_LENGTH & formats_of(container) and not group[-1].is_corrupt
    last = max(stamps) if vouched else last_decodable(path, stream, group)
    shown = {stamp for stamp in stamps if first.pts <= stamp <= last}
    seconds = float((last - first.pts + group[-1].duration) * stream.time_base)
    return Counted(len(shown), measured_rate(header_rate(stream), len(shown), seconds), first)


def in_one_order(path, packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """The packets that hold data; DataError where their times start over."""
    before = -math.inf
    for packet in packets:
        if is_empty(packet):
            continue
        seconds = before if packet.dts is None else float(packet.dts * packet.time_base)
        if seconds < before - STARTS_OVER:
            raise DataError(
                f"{path}: its times go back from {before:.1f} to {seconds:.1f} s, as in files that were joined by bytes; "
                "join them with ffmpeg's concat demuxer, or convert it"
            )
        before = seconds
        yield packet


def is_empty(packet: av.Packet) -> bool:
    """True for an AVI's sign that the last frame stays, and for the end; to a decoder it would always be the end."""
    return packet.size == 0


def damaged_after(path, num_frames: int, error: av.FFmpegError) -> DataError:
    head = Path(path).read_bytes()[:21]
    if head[:4] + head[8:16] == b"RIFFWEBPVP8X" and head[20] & 2:
        return DataError(f"{path}: an animated WebP, which FFmpeg cannot read; convert it to GIF or mp4")
    return DataError(f"{path}: damaged after frame {num_frames} ({error.strerror}); download or export it again")


def promised_seconds(container, stream) -> float:
    """Length of the video track by the header, 0 if unknown (the file's length may be another track's)."""
    tag = stream.metadata.get("DURATION", "")  # what mkv writers put: 00:00:10.333000000
    with contextlib.suppress(ValueError):
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if stream.duration:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1 and container.duration
    return container.duration / av.time_base if alone else 0.0


def last_decodable(path, stream, group: list[av.Packet]) -> int:
    """When the last good frame is shown, in the stream's time base: of the packets since the last key frame, or, where
    those do not suffice (intra refresh), of the whole file.
    """
    stream.codec_context.flush_buffers()
    stamps = good_stamps(itertools.chain.from_iterable(map(stream.decode, [*group, None]))) or good_frames(path)
    if not stamps:
        raise DataError(f"{path}: its last frames cannot be decoded; download or export it again")
    return max(stamps)


def good_frames(path) -> list[int | None]:
    """The times of all frames of a file that is decoded for this."""
    with opened(path) as (container, stream):
        return good_stamps(decoded(container, stream))


def good_stamps(frames: Iterator[av.VideoFrame]) -> list[int | None]:
    """The times of the frames before the first damage, in the stream's time base."""
    stamps = []
    with contextlib.suppress(av.FFmpegError):
        stamps.extend(frame.pts for frame in itertools.takewhile(lambda frame: not frame.is_corrupt, frames))
    return stamps


# ---------------------------------------------------------------- frames


class Shown(NamedTuple):
    """A decoded frame and when it is shown. What builds on damaged data is damaged, up to the next key frame."""

    seconds: float
    frame: av.VideoFrame
    damaged: bool


def read_with_pyav(path, times: Sequence[float], num_threads: int) -> np.ndarray:
    """A late start seeks. What a seek brings counts only if all went well; else the file is decoded from its start."""
    if times[0] > SEEK_AFTER:
        with contextlib.suppress(DataError), one_clip(path):
            return decode_at(path, times, num_threads, seek=True)
    return decode_at(path, times, num_threads, seek=False)


def decode_at(path, times: Sequence[float], num_threads: int, seek: bool) -> np.ndarray:
    """The frames nearest to `times`, as a player shows them."""
    pixels, done, previous, broken = None, 0, None, None
    with opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = num_threads
        picture = describe(path, container, stream)
        try:
            for current in timed_frames(path, container, stream, times[0], seek):
                while done < len(times) and times[done] <= current.seconds + TIE:
                    early = previous and times[done] <= (previous.seconds + current.seconds) / 2 + TIE
                    chosen = previous if early else current
                    if chosen.damaged:
                        raise unreadable(path, stream, previous, "damaged data")
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


def timed_frames(path, container, stream, start: float, seek: bool) -> Iterator[Shown]:
    """Frames in order of display, from some frame at or before `start` on; DataError for a seek that lands late, and
    where times go backwards.
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
        seconds = number * period if frame.pts is None else frame.time - origin
        if seconds < before - TIE:
            raise DataError(
                f"{path}: its frames' times go back from {before:.2f} to {seconds:.2f} s; convert it again"
            )
        damaged, before = frame.is_corrupt or (damaged and not frame.key_frame), seconds
        yield Shown(seconds, frame, damaged)


def decoded(container, stream) -> Iterator[av.VideoFrame]:
    """Frames from the first key frame on: what comes before it, in the file or in order of display, lacks its base."""
    begin = None
    for packet in container.demux(stream):
        if begin is None and packet.is_keyframe:
            begin = packet
        if begin is None or (is_empty(packet) and packet.dts is not None):
            continue
        for frame in packet.decode():  # the last packet is empty and without a time: it brings what is left
            if frame.pts is None or begin.pts is None or frame.pts >= begin.pts:
                yield frame


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
    return decord


def read_with_decord(path, times: Sequence[float], num_threads: int) -> np.ndarray | None:
    """The same from decord, or None, with one line, for a file in which it is not known to find the right frames.

    decord 0.6 seeks by frame numbers, which loses count in open groups of pictures, intra refresh, HEVC, MPEG-4 and
    files that do not begin at 0: so frames are decoded from the file's start, and their times compared with the packets'.
    """
    decord, stamps = import_decord(), trusted_times(path)
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


@functools.cache
def say_pyav(path, reason: str) -> None:
    """One line, once per clip and process."""
    logger.info("%s: read with PyAV (%s)", path, reason)


def trusted_times(path) -> np.ndarray | None:
    """Seconds of every frame, ascending from 0, of a file that decord shows as a player does; else None."""
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
    return stamps - stamps[0]
