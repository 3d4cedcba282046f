"""File hashes, cached by size and times so that gigabytes are read once.

The cache is one JSON file per folder, in the user's cache folder. If it is damaged, missing or read-only, files are
just read again.
"""

import functools
import hashlib
import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from base.bars import with_progress
from base.errors import DataError, UsageError
from base.files import file_hash, write_shared


logger = logging.getLogger(__name__)

# Seconds. A file modified more recently is not cached: with coarse clocks it could change again under the same times.
# If a file server's clock is off by more, this check is void, or files are hashed again for a while.
SETTLED_SECONDS = 0.1
SAMPLED_BYTES = 2**16  # bytes
MAX_LOT = 32  # files read in one task
QUICK_SECONDS = 50e-6  # to look at a file on a local disk, or read its ends from the page cache
PATIENCE_SECONDS = 0.2  # for other work, such as reading a folder's cache, before threads are started
LOG_ABOVE_BYTES = 2**30  # bytes; larger files take seconds to read
BLOB_NAME = re.compile(
    r"[0-9a-f]{64}"
)  # large files in the hub's cache are named by their SHA-256, small ones are not


class FileCache:
    """What is known about files, by name, right as long as their size and times stay; safe to use from several threads.
    With `use_cache` off, nothing is known at first.

    The cache is written when the `with` block ends.
    """

    def __init__(self, kind: str, use_cache: bool = True):
        self.kind, self.use_cache = kind, use_cache
        self.known: dict[str, dict] = {}  # folder -> name -> {"stamp": ..., what is known}
        self.changed: set[str] = set()
        self.lock = threading.Lock()

    def entries_of(self, folder: str) -> dict:
        with self.lock:
            if folder not in self.known:
                self.known[folder] = read_entries(Path(folder), self.kind) if self.use_cache else {}
            return self.known[folder]

    def entry_of(self, folder: str, name: str, stamp: list[int] | None) -> dict:
        """What is known about a file in this state; empty if nothing is."""
        entry = self.entries_of(folder).get(name)
        return entry if isinstance(entry, dict) and stamp and entry.get("stamp") == stamp else {}

    def keep(self, folder: str, name: str, stamp: list[int] | None, **entry) -> None:
        """Replace what is known about a file, unless it may have changed since `stamp`, taken before it was read."""
        if stamp and is_settled(os.path.join(folder, name), stamp):
            self.entries_of(folder)[name] = {"stamp": stamp, **entry}
            self.changed.add(folder)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for folder in sorted(self.changed):
            write_entries(Path(folder), self.known[folder], self.kind)
        self.changed.clear()


class HashCache(FileCache):
    """Content hashes of files, cached. With `use_cache` off, every file is read once."""

    def __init__(self, use_cache: bool = True):
        super().__init__("hashes", use_cache)

    def hash(self, path: Path, algorithm: str = "blake2b") -> str:
        """Hex digest: 16-byte blake2b, or sha256, which for a file in the hub's cache is its name."""
        real = Path(os.path.realpath(path))
        if self.use_cache and algorithm == "sha256" and is_blob(real):
            return real.name
        digest = self.find(real, algorithm, lambda path: hash_whole(path, algorithm))
        if algorithm == "sha256" and is_blob(real) and digest != real.name:
            raise UsageError(f"{real}: other bytes than were downloaded into the hub's cache; delete it and run again")
        return digest

    def sampled(self, path: str | Path) -> str:
        """The file's `sampled_hash`."""
        return self.find(path, "sampled tensors" if is_tensor_file(path) else "sampled", sampled_hash)

    def find(self, path: str | Path, name: str, read: Callable[[str | Path], str]) -> str:
        """The hash of that name; from `read` if it is not known."""
        place = real_file(path)
        known = self.entry_of(*place)
        if isinstance(known.get(name), str):
            return known[name]
        digest = read(path)
        self.keep(*place, **{key: value for key, value in known.items() if key != "stamp"}, **{name: digest})
        return digest


def hash_whole(path: Path, algorithm: str) -> str:
    if (size := path.stat().st_size) > LOG_ABOVE_BYTES:
        logger.info("%s: reading %.1f GiB to hash it, once unless it changes", path, size / 2**30)
    return file_hash(path, algorithm)


@functools.lru_cache
def real_path(folder: str) -> str:
    return os.path.realpath(folder)


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
    return folder, name, stamp_of(status)


def is_blob(path: Path) -> bool:
    """True for a file of the hub's cache, <repository>/blobs/<hash>, which is immutable."""
    return path.parent.name == "blobs" and bool(BLOB_NAME.fullmatch(path.name))


def file_stamp(path) -> list[int]:
    """[size, mtime, ctime], which change with the content. Programs can reset mtime, but not ctime."""
    return stamp_of(os.stat(path))


def stamp_of(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def is_settled(path, stamp: list[int]) -> bool:
    """True if the file has not changed since `stamp`, taken before it was read, nor just before that."""
    return stamp == file_stamp(path) and time.time() - stamp[2] / 1e9 > SETTLED_SECONDS


def short_hash(name: str) -> str:
    """8 hex digits to distinguish names."""
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()


def sampled_hash(path: str | Path) -> str:
    """Cheap content hash from size, start and end, two reads; tells apart files that may appear under the same name.

    For safetensors, the header is left out, since it also holds metadata.
    """
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little") if is_tensor_file(path) else 0
        end = file.seek(0, os.SEEK_END)
        start = min(start, end)  # damaged files are reported when they are loaded
        size = end - start
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        for offset in (start, start + max(0, size - SAMPLED_BYTES)):
            file.seek(offset)
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def is_tensor_file(path: str | Path) -> bool:
    return os.path.splitext(path)[1] == ".safetensors"  # `path.suffix` in less time


def hash_files(paths: Sequence[str | Path]) -> str:
    """A combined `sampled_hash` of files; sampled because there may be terabytes."""
    try:
        with HashCache() as cache:
            hashes = list(with_progress(in_threads(cache.sampled, paths), "comparing", total=len(paths), delay=2))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return hashlib.blake2b("".join(hashes).encode(), digest_size=16).hexdigest()


def in_threads(read: Callable, items: Sequence) -> Iterator:
    """`read` of each item, in their order: disk bound. In lots: a task costs more than a header that is cached.

    In this thread as long as each takes microseconds: threads that all need the interpreter take twice as long.
    """
    size = max(1, min(MAX_LOT, len(items) // 64))
    lots = (items[first : first + size] for first in range(0, len(items), size))
    late = -PATIENCE_SECONDS
    for lot in lots:
        begun = time.perf_counter()
        results = [read(item) for item in lot]
        late += time.perf_counter() - begun - QUICK_SECONDS * len(lot)
        yield from results
        if late > 0:
            break
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(lambda lot: [read(item) for item in lot], lots):
            yield from results


def hash_rows(rows) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for source, prompt, bucket in rows:
        digest.update(json.dumps([source, prompt, *bucket]).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- the cache


def cache_dir(kind: str = "hashes") -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "cogvideox-factory" / kind


def cache_path(folder: Path, kind: str = "hashes") -> Path:
    name = hashlib.blake2b(os.fsencode(folder), digest_size=16).hexdigest()
    return cache_dir(kind) / f"{name}.json"


def read_entries(folder: Path, kind: str = "hashes") -> dict:
    try:
        entries = json.loads(cache_path(folder, kind).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: the user has no home directory
        return {}
    return entries if isinstance(entries, dict) else {}


def write_entries(folder: Path, entries: dict, kind: str = "hashes") -> None:
    """Replace the file atomically. Of concurrent writers one wins; files that the others read are read again."""
    try:
        names = set(os.listdir(folder))
        present = {name: entry for name, entry in entries.items() if name in names}
        write_shared(cache_path(folder, kind), json.dumps(present))
    except (OSError, RuntimeError) as error:
        logger.warning("%s of the files in %s cannot be kept (%s): every run reads them again", kind, folder, error)
