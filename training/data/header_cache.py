"""Headers of video files, cached by size and times: a folder of 20,000 clips is opened once, then only looked at.

One JSON file per folder, beside the cached hashes and under the same rules: if it is damaged, missing or read-only,
files are just read again. A file that could not be read is never cached.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from multiprocessing import get_context

import av

from base.bars import with_progress
from base.errors import DataError, Interrupted
from base.hashes import FileCache, in_threads, real_file
from base.signals import ignore_group_signals
from data.clip_lists import Clip
from data.headers import Header, VideoInfo, read_header
from data.picture import Caution, Picture


FORK_FROM = 1000  # files, which take a second in one process; starting two takes 0.1 s
MAX_PROCESSES, CHUNK = 16, 32
# What an entry depends on beside its file: the rules of data/headers.py and data/picture.py, which raise the number
# whenever they change, and the libraries that read the file
READER = f"1, PyAV {av.__version__}, " + ".".join(map(str, av.library_versions["libavformat"]))


class HeaderCache(FileCache):
    """Headers, cached. With `use_cache` off, nothing is found."""

    def __init__(self, use_cache: bool = True):
        super().__init__("headers", use_cache)
        self.places: dict = {}  # of the files that were not found, with their state before they are read

    def find(self, path) -> Header | None:
        place = real_file(path)
        header = cached_header(self.entry_of(*place))
        if header is None:
            self.places[path] = place
        return header

    def add(self, path, header: Header) -> None:
        """`header`: of the file at `path`, read since `find` did not know it."""
        self.keep(*self.places.pop(path), reader=READER, header=to_json(header))


def header_or_error_of_all(clips: Sequence[Clip], use_cache: bool) -> list[Header | DataError]:
    """One per clip, in their order."""
    is_other_rank = os.environ.get("RANK", "0") != "0"
    paths = [os.fspath(clip.video) for clip in clips]
    with HeaderCache(use_cache) as cache:
        headers = dict(zip(paths, in_threads(cache.find, paths), strict=True))
        unknown = [path for path, header in headers.items() if header is None]
        read = with_progress(read_all(unknown), "reading headers", disable=is_other_rank, delay=2, total=len(unknown))
        for path, header in zip(unknown, read, strict=True):
            headers[path] = header
            if isinstance(header, Header):
                cache.add(path, header)
    return [headers[path] for path in paths]


def read_all(paths: Sequence) -> Iterator[Header | DataError]:
    """In threads if they are few; else in processes, since threads of one open files no faster than one does."""
    if len(paths) < FORK_FROM or num_processes() == 1:
        yield from in_threads(header_or_error, paths)
        return
    try:
        with ProcessPoolExecutor(num_processes(), get_context("fork"), ignore_group_signals) as pool:
            yield from pool.map(header_or_error, paths, chunksize=CHUNK)
    except BrokenProcessPool as error:
        raise Interrupted("a process that reads headers was killed, most likely for lack of memory") from error


def num_processes() -> int:
    """This rank's share of the cores."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_PROCESSES, cores))


def header_or_error(path) -> Header | DataError:
    try:
        return read_header(path)
    except DataError as error:
        return error


# ---------------------------------------------------------------- an entry


def to_json(header: Header) -> list:
    picture = header.picture
    return [*header.info, picture.crop, picture.aspect.as_integer_ratio(), picture.matrix, picture.cautions]


def cached_header(entry: dict) -> Header | None:
    """The header in an entry; None if there is none, or it is of another reader, or damaged."""
    if entry.get("reader") != READER:
        return None
    try:
        frames, fps, height, width, crop, aspect, matrix, cautions = entry["header"]
        info = VideoInfo(int(frames), float(fps), int(height), int(width))
        return Header(info, picture_of(tuple(crop), tuple(aspect), tuple(matrix), tuple(map(tuple, cautions))))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


@functools.lru_cache  # 20,000 clips have few different ones
def picture_of(crop: tuple, aspect: tuple, matrix: tuple, cautions: tuple) -> Picture:
    return Picture(four(crop), Fraction(*aspect), four(matrix), tuple(Caution(*caution) for caution in cautions))


def four(values) -> tuple[int, int, int, int]:
    a, b, c, d = map(int, values)
    return a, b, c, d
