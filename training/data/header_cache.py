"""Headers of video files, cached by size and times: a folder of 20,000 clips is opened once, then only looked at.

One JSON file per folder, beside the cached hashes and under the same rules: if it is damaged, missing or read-only,
files are just read again. A file that could not be read is never cached.
"""

import os
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import av

from base.bars import with_progress
from base.errors import DataError, Interrupted
from base.hashes import in_threads, is_settled, read_entries, write_entries
from base.signals import ignore_group_signals
from data.clip_lists import Clip, real_path
from data.headers import Header, VideoInfo, read_header
from data.picture import Caution, Picture


KIND = "headers"
FORK_FROM = 1000  # files, which take a second in one process; starting two takes 0.1 s
MAX_PROCESSES, CHUNK = 16, 32
# What an entry depends on beside its file: the rules of data/headers.py and data/picture.py, which raise the number
# whenever they change, and the libraries that read the file
READER = f"1, PyAV {av.__version__}, " + ".".join(map(str, av.library_versions["libavformat"]))


class HeaderCache:
    """Headers, cached; `find` is safe to use from several threads. With `use_cache` off, nothing is found.

    The cache is written when the `with` block ends.
    """

    def __init__(self, use_cache: bool = True):
        self.use_cache = use_cache
        self.known: dict[str, dict] = {}  # folder -> name -> {"stamp": ..., "reader": ..., "header": ...}
        self.stamps: dict = {}  # of the files that were not found, before they are read
        self.changed: set[str] = set()
        self.lock = threading.Lock()

    def find(self, path) -> Header | None:
        folder, name, stamp = real_file(path)
        header = cached_header(self.entries_of(folder).get(name), stamp) if stamp else None
        if header is None and stamp:
            self.stamps[path] = folder, name, stamp
        return header

    def keep(self, path, header: Header) -> None:
        """`header`: of the file at `path`, read since `find` did not know it."""
        folder, name, stamp = self.stamps.pop(path, (None, None, None))
        if stamp and is_settled(Path(folder, name), stamp):
            self.entries_of(folder)[name] = {"stamp": stamp, "reader": READER, "header": to_json(header)}
            self.changed.add(folder)

    def entries_of(self, folder: str) -> dict:
        with self.lock:
            if folder not in self.known:
                self.known[folder] = read_entries(Path(folder), KIND) if self.use_cache else {}
            return self.known[folder]

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for folder in sorted(self.changed):
            write_entries(Path(folder), self.known[folder], KIND)
        self.changed.clear()


def header_or_error_of_all(clips: Sequence[Clip], use_cache: bool) -> list[Header | DataError]:
    """One per clip, in their order."""
    is_other_rank = os.environ.get("RANK", "0") != "0"
    paths = [clip.video for clip in clips]
    with HeaderCache(use_cache) as cache:
        headers = dict(zip(paths, in_threads(cache.find, paths), strict=True))
        unknown = [path for path, header in headers.items() if header is None]
        read = with_progress(read_all(unknown), "reading headers", disable=is_other_rank, delay=2, total=len(unknown))
        for path, header in zip(unknown, read, strict=True):
            headers[path] = header
            if isinstance(header, Header):
                cache.keep(path, header)
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


def real_file(path) -> tuple[str, str, list[int] | None]:
    """(folder, name, `file_stamp`) of the file that `path` leads to, the stamp None if there is no file: one lstat,
    unless it is a link.
    """
    folder, name = os.path.split(os.path.abspath(path))
    folder = real_path(folder)
    try:
        status = os.lstat(os.path.join(folder, name))
        if stat.S_ISLNK(status.st_mode):
            folder, name = os.path.split(os.path.realpath(os.path.join(folder, name)))
            status = os.stat(os.path.join(folder, name))
    except OSError:
        return folder, name, None
    return folder, name, [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


# ---------------------------------------------------------------- an entry


def to_json(header: Header) -> list:
    picture = header.picture
    return [*header.info, picture.crop, picture.aspect.as_integer_ratio(), picture.matrix, picture.cautions]


def cached_header(entry, stamp: list[int]) -> Header | None:
    """The header in an entry; None if it is of another state of the file, of another reader, or damaged."""
    if not isinstance(entry, dict) or entry.get("stamp") != stamp or entry.get("reader") != READER:
        return None
    try:
        frames, fps, height, width, crop, aspect, matrix, cautions = entry["header"]
        info = VideoInfo(int(frames), float(fps), int(height), int(width))
        picture = Picture(
            four(crop), Fraction(*aspect), four(matrix), tuple(Caution(*caution) for caution in cautions)
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return Header(info, picture)


def four(values) -> tuple[int, int, int, int]:
    a, b, c, d = map(int, values)
    return a, b, c, d
