"""Parses the container metadata that PyAV does not expose: mp4 boxes (ISO 14496-12), Matroska elements (RFC 9559)."""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO


# Matroska element ids
SEGMENT, CLUSTER, TRACKS, TRACK_ENTRY, VIDEO = 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE, 0xE0
MAX_HEADER_BYTES = 16  # an id and a size, at most 8 bytes each


def boxes(file: BinaryIO, start: int, end: int, names: tuple[bytes, ...]) -> Iterator[bytes]:
    """Contents of the boxes at path `names` between two offsets of an mp4."""
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
    """(id, start of the content, end of the content) of the Matroska elements between two offsets."""
    while start < end:
        file.seek(start)
        head = file.read(MAX_HEADER_BYTES).ljust(MAX_HEADER_BYTES, b"\xff")
        identifier_bytes = number_bytes(head[0])
        size_bytes = number_bytes(head[identifier_bytes])
        content = start + identifier_bytes + size_bytes
        largest = (1 << 7 * size_bytes) - 1  # all ones: unknown size, extends to the end
        size = int.from_bytes(head[identifier_bytes : identifier_bytes + size_bytes]) & largest
        start = end if size == largest else min(content + size, end)
        yield int.from_bytes(head[:identifier_bytes]), content, start


def number_bytes(first: int) -> int:
    """Length of a variable-size integer from its first byte: the number of leading zeros plus 1."""
    return 9 - first.bit_length() if first else 8


def matroska_videos(path) -> list[dict[int, int]]:
    """The Video elements of the tracks, {id: unsigned value}, as far as they precede the first frames."""
    with open(path, "rb") as file:
        return list(video_elements(file, 0, os.path.getsize(path)))


def video_elements(file: BinaryIO, start: int, end: int) -> Iterator[dict[int, int]]:
    for identifier, content, after in elements(file, start, end):
        if identifier == CLUSTER:
            return
        if identifier in (SEGMENT, TRACKS, TRACK_ENTRY):
            yield from video_elements(file, content, after)
        elif identifier == VIDEO:
            yield {name: number_at(file, *place) for name, *place in list(elements(file, content, after))}


def number_at(file: BinaryIO, start: int, end: int) -> int:
    file.seek(start)
    return int.from_bytes(file.read(end - start))
