"""What the library does not tell of a container: boxes of an mp4 (ISO 14496-12), elements of a Matroska file (RFC 9559)."""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO


# Matroska: identifiers of elements
SEGMENT, CLUSTER, TRACKS, TRACK_ENTRY, TRACK_NUMBER, VIDEO = 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE, 0xD7, 0xE0


def boxes(file: BinaryIO, start: int, end: int, names: tuple[bytes, ...]) -> Iterator[bytes]:
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


def file_boxes(path, *names: bytes) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from boxes(file, 0, os.path.getsize(path), names)


def elements(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(identifier, offset of the content, offset after it) of the Matroska elements between two offsets."""
    while start < end:
        file.seek(start)
        head = file.read(12)
        try:
            id_length, size_length = number_length(head, 0), number_length(head, number_length(head, 0))
        except IndexError:
            return
        content = start + id_length + size_length
        size = int.from_bytes(head[id_length : id_length + size_length]) & ~(1 << 7 * size_length)
        unknown = size == (1 << 7 * size_length) - 1  # of a stream that was written without going back
        start = end if unknown else min(content + size, end)
        yield int.from_bytes(head[:id_length]), content, start


def number_length(data: bytes, place: int) -> int:
    """Bytes of the number at `place`: its first bit that is set says how many. IndexError if there is none."""
    return 9 - data[place].bit_length() if data[place] else data[len(data)]


def matroska_video(path, track_number: int) -> dict[int, int]:
    """Values of the Video element of a track, as unsigned numbers; empty if it is not found before the first frames."""
    with open(path, "rb") as file:
        for segment, start, end in elements(file, 0, os.path.getsize(path)):
            if segment == SEGMENT:
                return next(tracks_video(file, start, end, track_number), {})
    return {}


def tracks_video(file: BinaryIO, start: int, end: int, track_number: int) -> Iterator[dict[int, int]]:
    for identifier, content, after in elements(file, start, end):
        if identifier == CLUSTER:
            return
        if identifier in (TRACKS, TRACK_ENTRY):
            yield from tracks_video(file, content, after, track_number)
        elif identifier == TRACK_NUMBER and number_at(file, content, after) != track_number:
            return
        elif identifier == VIDEO:
            yield {name: number_at(file, *place) for name, *place in list(elements(file, content, after))}


def number_at(file: BinaryIO, start: int, end: int) -> int:
    file.seek(start)
    return int.from_bytes(file.read(end - start))
