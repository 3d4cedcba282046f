"""Reads frame count, frame rate and displayed size of a video, from its header or, if needed, from its packets.

Whatever a decoder raises becomes a DataError for that clip.
"""

import contextlib
import io
import itertools
import math
import mimetypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
from av.codec.context import Flags
from av.stream import Disposition

from base.errors import DataError, UserError, log_traceback, named_line
from base.file_kinds import read_head, unexpected_content
from data.containers import boxes
from data.picture import Picture, color_cautions, describe, formats_of, read_movies


MISSING_SECONDS = 0.5  # seconds by which a file may end before the length in its header
STEP_BACK_SECONDS = 0.1  # seconds by which a packet's decode time may precede its predecessor's
# Containers that hold their own frames. Playlists and lists (hls, dash, concat, sdp, image2) refer to other files or
# URLs, and FFmpeg detects them by content: a playlist may be named .mp4
CONTAINERS = (
    "mov", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "vvc", "av1", "obu", "ivf",
    "mjpeg", "h261", "h263", "vc1", "dirac", "cavsvideo", "gif", "apng", "jpegxl_anim", "ogg", "flv", "asf", "mxf", "nut",
    "nsv", "dv", "rm", "swf", "wtv", "yuv4mpegpipe", "amv", "smjpeg", "flic", "roq", "bink", "smk", "gxf", "lxf",
    *(f"{image}_pipe" for image in (
        "bmp", "dds", "dpx", "exr", "gif", "hdr", "j2k", "jpeg", "jpegls", "jpegxl", "pam", "pbm", "pcx", "pfm", "pgm",
        "png", "ppm", "psd", "qoi", "sgi", "sunrast", "tiff", "webp", "xbm", "xwd",
    )),
)  # fmt: skip
# Brands of an mp4 or mov, which begins with them: told so, FFmpeg opens it in 0.25 ms and not in 0.42, since it need not
# try the other formats. Brands of pictures (JPEG 2000, HEIF) are left to it
MP4_BRANDS = {b"isom", b"iso2", b"iso4", b"iso5", b"iso6", b"avc1", b"mp41", b"mp42", b"qt  ", b"M4V "}
FORMATS_WITH_LENGTH = {
    "mp4",
    "matroska",
    "avi",
    "asf",
    "flv",
}  # formats with the length in the header; others are guessed
FORMATS_WITH_SIZE = {"mp4", "avi"}  # formats whose header has the file size
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}  # whatever the system's table of types knows besides


class VideoInfo(NamedTuple):
    """Frame count, frame rate, and height and width as displayed."""

    num_frames: int
    fps: float
    height: int
    width: int


class Header(NamedTuple):
    """What is known about a file before its frames are decoded."""

    info: VideoInfo
    picture: Picture


def is_image(path, num_frames: int) -> bool:
    """True for a still image, which trains as a clip of one frame; False for an animated one, and for videos."""
    return num_frames == 1 and is_image_name(path)


def is_image_name(path) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    return suffix in IMAGE_SUFFIXES or (mimetypes.guess_type(path)[0] or "").startswith("image/")


@contextlib.contextmanager
def clip_errors(path, log: bool = True):
    """Turn whatever the libraries raise inside into a one-line DataError for this clip. Unexpected errors leave their
    traceback in a log file if `log`; off if another attempt follows.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except (av.PatchWelcomeError, av.DecoderNotFoundError) as error:
        raise DataError(
            f"{path}: FFmpeg cannot decode this variant ({error.strerror}); convert it to H.264"
        ) from error
    except av.FFmpegError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); download or export it again") from error
    except Exception as error:  # many decoders, arbitrary input: one clip must not stop the others
        trace = f"; traceback in {log_traceback()}" if log else ""
        reason = f"{named_line(error)}{trace}"
        raise DataError(f"{path}: cannot be read ({reason}); convert it to H.264") from error


# ---------------------------------------------------------------- opening


@contextlib.contextmanager
def open_video(path):
    """(container, video stream) of a file; DataError names what is wrong with it."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise DataError(f"{path}: empty file; download or export it again")
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(CONTAINERS)}
    source = os.path.abspath(path)
    if is_image_name(path):  # by its name FFmpeg would open a photo as a file sequence, image2
        source = io.BytesIO(Path(path).read_bytes())
    try:
        container = av.open(
            source, format=known_format(path), options=options, metadata_errors="replace"
        )  # tags in any encoding
    except (av.FFmpegError, ValueError) as error:
        raise DataError(f"{path}: {why_not_opened(path, error)}") from error
    with container:
        stream = choose_stream(path, container)
        stream.codec_context.flags |= Flags.unaligned  # exact left crop, not rounded for alignment
        yield container, stream


def known_format(path) -> str | None:
    """The format of a file whose first bytes leave no doubt."""
    head = read_head(path)
    return "mp4" if head[4:8] == b"ftyp" and head[8:12] in MP4_BRANDS else None


def why_not_opened(path, error: Exception) -> str:
    if other := unexpected_content(path):
        return other
    if isinstance(error, av.ArgumentError):  # raised for formats that are not whitelisted
        return "a playlist, a list of files, or no video; only files that hold their frames are read"
    reason = getattr(error, "strerror", None) or error
    return f"not a readable video (no index: truncated download? {reason})"


def choose_stream(path, container):
    """The video stream that a player shows; cover pictures and the tiles of a photo are skipped or refused."""
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
    """VideoInfo and Picture of a video. Demuxes files whose header does not give the number of decodable frames."""
    with clip_errors(path), open_video(path) as (container, stream):
        colors = tuple(color_cautions(stream))  # from the container's tags, which the decoder may overwrite
        movies = read_movies(path, container)
        counted = count_indexed(path, container, stream, movies) or count_by_demuxing(path, container, stream, movies)
        picture = describe(path, container, stream, counted.first, colors, movies)
        height, width = picture.shown(stream.codec_context.height, stream.codec_context.width)
        if counted.num_frames == 0 or height == 0 or width == 0:
            raise DataError(f"{path}: no frames in its video stream")
        return Header(VideoInfo(counted.num_frames, counted.fps, height, width), picture)


class FrameCount(NamedTuple):
    num_frames: int
    fps: float
    first: av.VideoFrame | None  # if packets were read


def header_rate(stream) -> float:
    """Frames per second; 1 for a still image, which has no rate."""
    return float(stream.average_rate or stream.guessed_rate or 1)


def measured_rate(fps: float, num_frames: int, seconds: float) -> float:
    """Frames divided by length; `fps` if the length is unknown or the two agree within 1 % (rounding)."""
    measured = num_frames / seconds if seconds > 0 else fps
    return measured if abs(measured / fps - 1) > 0.01 else fps


def count_indexed(path, container, stream, movies: list[bytes]) -> FrameCount | None:
    """The frames of an mp4 from its index; DataError if the file is cut off. `movies`: see `read_movies`.

    None if the index is not enough: fragmented files (only some fragments are read), edit lists (which hide frames),
    or a first frame that is not a key frame.
    """
    if not movies or any(map(is_fragmented, movies)):  # none: a HEIF photo, whose rotation is not stored in a track
        return None
    entries, size = list(stream.index_entries), os.path.getsize(path)
    if beyond := [entry for entry in entries if entry.pos + entry.size > size]:
        there = len(entries) - len(beyond)
        raise DataError(f"{path}: cut off: {there} of {len(entries)} frames are in the file; download it again")
    fps, seconds = header_rate(stream), float((stream.duration or 0) * stream.time_base)
    edited = not entries or not entries[0].is_keyframe or any(entry.is_discard for entry in entries)
    if edited or len(entries) / fps < seconds - MISSING_SECONDS:
        return None
    # The larger of two estimates: with a variable rate, the clip then never seems longer than it is
    return FrameCount(len(entries), max(fps, measured_rate(fps, len(entries), seconds)), None)


def is_fragmented(movie: bytes) -> bool:
    """True if an mp4's `moov` box says that the frames are in fragments."""
    return next(boxes(io.BytesIO(movie), 0, len(movie), (b"mvex",)), None) is not None


def count_by_demuxing(path, container, stream, movies: list[bytes]) -> FrameCount:
    """The decodable frames, from the first key frame on; DataError if the file is damaged or cut off.

    Reads all packets, decodes the first frame and, unless the header proves the file complete, the last ones.
    """
    if "avi" in formats_of(container):
        refuse_cut_avi(path)
    stream.codec_context.thread_count = 1
    header_length = header_seconds(container, stream, movies)
    vouched = FORMATS_WITH_LENGTH & formats_of(container) and (
        header_length or FORMATS_WITH_SIZE & formats_of(container)
    )
    begin, end, stamps, first, group = math.inf, -math.inf, [], None, []  # group: packets since the last key frame
    try:
        for packet in ordered_packets(path, container, stream):
            if packet.pts is not None:
                begin = min(begin, float(packet.pts * packet.time_base))
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if not (packet.is_keyframe or group):
                continue  # no reference frame yet
            if packet.is_keyframe or vouched:
                group.clear()  # vouched: the last group is not decoded
            group.append(packet)
            first = first or next(iter(packet.decode()), None)  # only until the first frame comes out
            if not packet.is_discard:
                stamps.append(packet.pts)
        first = first or next(iter(stream.decode(None)), None)
    except av.FFmpegError as error:
        raise damaged_after(path, len(stamps), error) from error
    if first is None:
        raise DataError(f"{path}: no frame can be decoded; download or export it again")
    if first.pts is None or None in stamps:  # a raw stream without a container: constant rate
        return FrameCount(len(good_frames(path)), header_rate(stream), first)
    there = max(end, end - begin)  # the header's length counts from 0 in some files, from the first frame in others
    if there < header_length - MISSING_SECONDS - 1 / header_rate(stream):
        raise DataError(f"{path}: cut off: {there:.1f} of {header_length:.1f} s are in the file; download it again")
    is_whole = vouched and not group[-1].is_corrupt
    last = max(stamps) if is_whole else last_decodable(path, stream, group)
    # Frames are counted by distinct display times
    shown = {stamp for stamp in stamps if first.pts <= stamp <= last}
    seconds = float((last - first.pts + (group[-1].duration or 0)) * stream.time_base)
    return FrameCount(len(shown), measured_rate(header_rate(stream), len(shown), seconds), first)


def ordered_packets(path, container, stream) -> Iterator[av.Packet]:
    """The non-empty packets; DataError if their times jump back, except in mp4, where an edit list may do so."""
    before, is_edited = -math.inf, "mp4" in formats_of(container)
    for packet in container.demux(stream):
        if is_empty(packet):
            continue
        seconds = before if packet.dts is None else float(packet.dts * packet.time_base)
        if seconds < before - STEP_BACK_SECONDS and not is_edited:
            raise DataError(
                f"{path}: its times go back from {before:.1f} to {seconds:.1f} s, as in files that were joined by bytes; "
                "join them with ffmpeg's concat demuxer, or convert it"
            )
        before = seconds
        yield packet


def is_empty(packet: av.Packet) -> bool:
    """True for an AVI's repeat-frame packet and for end of stream; a decoder would take both for end of stream."""
    return packet.size == 0


def damaged_after(path, num_frames: int, error: av.FFmpegError) -> DataError:
    head = read_head(path)
    if head[:4] + head[8:16] == b"RIFFWEBPVP8X" and head[20:21] and head[20] & 2:
        return DataError(f"{path}: an animated WebP, which FFmpeg cannot read; convert it to GIF or mp4")
    return DataError(f"{path}: damaged after frame {num_frames} ({error.strerror}); download or export it again")


def header_seconds(container, stream, movies: list[bytes]) -> float:
    """Length of the video track from the header, 0 if unknown (the file's length may be another track's)."""
    formats = formats_of(container)
    if "avi" in formats or ("mp4" in formats and not any(map(is_fragmented, movies))):
        # Already checked by `count_indexed` or `refuse_cut_avi`; this length is a guess, or from before edits
        return 0.0
    tag = stream.metadata.get("DURATION", "")  # mkv: 00:00:10.333000000
    with contextlib.suppress(ValueError):
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if stream.duration:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1 and container.duration
    return container.duration / av.time_base if alone else 0.0


def refuse_cut_avi(path) -> None:
    """DataError if the file is shorter than its first RIFF chunk, whose size writers into a pipe leave open."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8)[4:], "little") + 8
    if (there := os.path.getsize(path)) < size < 2**32:
        raise DataError(f"{path}: cut off: {there} of {size} bytes are in the file; download it again")


def last_decodable(path, stream, group: list[av.Packet]) -> int:
    """Timestamp of the last good frame, in the stream's time base: decodes the packets since the last key frame or, if
    that gives none (intra refresh), the whole file.
    """
    stream.codec_context.flush_buffers()
    stamps = good_stamps(itertools.chain.from_iterable(map(stream.decode, [*group, None]))) or good_frames(path)
    if not stamps:
        raise DataError(f"{path}: its last frames cannot be decoded; download or export it again")
    return max(stamps)


def good_frames(path) -> list[int | None]:
    """Timestamps of the good frames, from decoding the whole file."""
    with open_video(path) as (container, stream):
        return good_stamps(decoded(container, stream))


def good_stamps(frames: Iterator[av.VideoFrame]) -> list[int | None]:
    """Timestamps of the frames before the first damaged one, in the stream's time base."""
    stamps = []
    with contextlib.suppress(av.FFmpegError):
        stamps.extend(frame.pts for frame in itertools.takewhile(lambda frame: not frame.is_corrupt, frames))
    return stamps


def decoded(container, stream) -> Iterator[av.VideoFrame]:
    """Frames from the first key frame on; those before it, in file or display order, lack their reference frames."""
    begin = None
    for packet in container.demux(stream):
        if begin is None and packet.is_keyframe:
            begin = packet
        if begin is None or (is_empty(packet) and packet.dts is not None):
            continue
        for frame in packet.decode():  # the last packet is empty and has no time: it flushes the decoder
            if frame.pts is None or begin.pts is None or frame.pts >= begin.pts:
                yield frame
