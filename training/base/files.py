"""Files and folders that are complete or absent, whenever a process dies; folders that belong to one run at a time.

Everything is written beside its target under a temporary name, which `clean_up` knows, and then renamed. Checkpoints
are flushed first and described by `manifest.json`: size and SHA-256 of each file. Network mounts may refuse to flush,
lock or rename: the first two cost a warning, the last is an error.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from base.errors import StorageError, UsageError


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TEMPORARY, REPLACED = ".tmp-", ".old-"  # name prefixes of unfinished and of replaced files and folders
ABANDONED = 24 * 3600  # seconds; where nothing is locked, an unfinished file this old is a killed process's
HASHING_THREADS = 4  # one file each; hashing releases the GIL
# Error numbers of file systems that cannot flush; EBADF from those that want a descriptor open for writing
NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
held_locks: list[int] = []  # file descriptors; the system releases a lock when its process ends, in any way
undo: list[Callable[[], None]] = []  # undoes the steps of a command that is not accepted yet, in their order
warned: set[str] = set()  # lines that a run logs once
# Per unfinished folder that will get a manifest: SHA-256 of files that were hashed while written, by `file_identity`
noted: dict[Path, dict[tuple, str]] = {}


# ---------------------------------------------------------------- writing


def unfinished(path: Path) -> Path:
    """The temporary path for what becomes `path`, unique to this process."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


@contextlib.contextmanager
def scratch_folder(path: Path):
    """A new folder beside `path`, removed on exit."""
    folder = unfinished(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replaced_folder(target: Path):
    """A new folder that replaces `target` if the body succeeds, and is removed if it fails."""
    with scratch_folder(target) as folder:
        yield folder
        put_in_place(folder, target)


@contextlib.contextmanager
def written_folder(target: Path):
    """The same with a manifest, by which `find_damage` tells whether it is intact."""
    with replaced_folder(target) as folder:
        noted[folder] = {}
        try:
            yield folder
            write_manifest(folder)
        finally:
            del noted[folder]


def hashes_for_manifest(path: Path) -> dict | None:
    """Where the writer of `path` leaves its hash, by `file_identity`, to save a second read; None: no manifest needs
    it.
    """
    return next((hashes for folder, hashes in noted.items() if folder in path.parents), None)


def file_identity(path: Path) -> tuple:
    """Identifies a file and its content, even after a rename."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def write_manifest(folder: Path) -> None:
    """Flush every file of `folder` to the disk and, only then, write their sizes and hashes.

    A hash computed during writing is of the intended bytes, so `find_damage` also detects what the disk got wrong.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        flush(path)
    known = noted.get(folder, {})
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        entries = list(pool.map(lambda path: describe(path, known.get(file_identity(path))), paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    text = json.dumps({"version": 1, "files": dict(zip(names, entries, strict=True))}, indent=2) + "\n"
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        flush_descriptor(file.fileno())
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush_folder(directory)


def describe(path: Path, digest: str | None = None) -> dict:
    """The manifest's entry; reads the file unless its hash `digest` is known."""
    return {"size": path.stat().st_size, "sha256": digest or file_hash(path, "sha256")}


def file_hash(path: Path, algorithm: str = "blake2b") -> str:
    """Hex digest, read in chunks: memory does not grow with the file."""
    make = (lambda: hashlib.blake2b(digest_size=16)) if algorithm == "blake2b" else algorithm
    with open(path, "rb") as file:
        return hashlib.file_digest(file, make).hexdigest()


def flush(path: Path) -> None:
    """Make a file's content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush_descriptor(descriptor)
    finally:
        os.close(descriptor)


def flush_descriptor(descriptor: int) -> None:
    """Flush an open file. A file system that cannot is warned of once; disk errors are raised."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
        warn_once(f"the disk does not support fsync ({error.strerror}): a power cut may lose the files written last")


def free_bytes(folder: Path) -> float:
    """Free space on the disk; infinite if its file system does not say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf


def flush_folder(folder: Path) -> None:
    """Make a folder's list of names survive a power cut, if the file system can: many network mounts cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def warn_once(line: str) -> None:
    if line not in warned:
        warned.add(line)
        logger.warning("%s", line)


def rename(old: Path, new: Path) -> Path:
    """Give a file or folder its final name, replacing a file of that name; StorageError if that is refused."""
    try:
        return old.rename(new) if old.is_dir() else old.replace(new)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # a full disk has its own error line, with the free space
        reason = error.strerror or error
        raise StorageError(
            f"{new}: written, but cannot be renamed to that ({reason}); choose a disk whose file system allows it"
        ) from error


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename to `target`; an existing one is renamed away first and deleted last, see `clean_up`."""
    aside = target.with_name(REPLACED + target.name)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        rename(target, aside)
    rename(temporary, target)
    flush_folder(target.parent)
    if aside.exists():
        remove(aside)


def remove(folder: Path) -> None:
    """Rename the folder away, then delete it; a failure is only a warning."""
    hidden = unfinished(folder)
    try:
        folder.rename(hidden)  # if the process dies now, no partial folder has the old name
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("%s: cannot be removed (%s); delete it by hand", folder, error.strerror)


def clean_up(parent: Path) -> None:
    """Finish or undo what killed processes left in `parent`; the caller holds its lock."""
    for aside in sorted(parent.glob(f"{REPLACED}*")):
        target = parent / aside.name.removeprefix(REPLACED)
        if target.exists():
            remove(aside)
        else:
            rename(aside, target)  # killed between the two renames: the earlier one is still good
    remove_unfinished(parent)


def remove_unfinished(parent: Path, age: float = 0) -> None:
    """Delete what killed processes left unfinished in `parent`, if it has not changed for `age` seconds."""
    for left in sorted(parent.glob(f"{TEMPORARY}*")):
        if age and not is_older(left, age):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def is_older(path: Path, age: float) -> bool:
    """False for a file that is gone: its process has just renamed it."""
    try:
        return time.time() - path.stat().st_mtime > age
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def written_beside(path: Path, durable: bool = False):
    """A temporary path that becomes `path` on success, so readers never see half a file. Creates the folder.

    `durable`: the content survives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    try:
        yield temporary
        if durable:
            flush(temporary)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shared(path: Path, text: str) -> None:
    """Write into a folder shared without a lock, such as the user's cache: of concurrent writers one wins.

    Raises only OSError.
    """
    try:
        with written_beside(path) as temporary:
            remove_unfinished(path.parent, ABANDONED)
            temporary.write_text(text, encoding="utf-8")
    except StorageError as error:
        raise error.__cause__ from None


def write_text(path: Path, text: str) -> None:
    with written_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content) -> None:
    write_text(path, to_json(content))


def to_json(content) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


# ---------------------------------------------------------------- one run at a time


def make_folder(folder: Path) -> None:
    """Create the output folder and its parents; `undo_all` removes them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    undo.extend(path.rmdir for path in reversed(missing))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--output_dir {folder}: {error.filename} is a file; give a folder") from error


def lock_folder(folder: Path) -> None:
    """Lock `folder` until this process ends; UsageError, with the holder's pid, if another process has it.

    A record lock, not a lock file: it ends with its process, even by kill -9, and forked workers do not inherit it.
    """
    path = folder / ".lock"
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    times, before = os.fstat(descriptor), os.read(descriptor, 100)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # POSIX allows either
            os.close(descriptor)
            holder = before.decode(errors="replace").strip() or "another"
            raise UsageError(
                f"{folder}: process {holder} is writing there; wait until it ends, or choose another --output_dir"
            ) from error
        logger.warning("%s: cannot be locked (%s); do not start a second run there", folder, error.strerror)
    if times.st_nlink and not os.fstat(descriptor).st_nlink:  # a refused command has just removed the file
        os.close(descriptor)
        return lock_folder(folder)
    held_locks.append(descriptor)
    undo.append(lambda: restore_lock(path, descriptor, None if is_new else before, times))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def restore_lock(path: Path, descriptor: int, before: bytes | None, times: os.stat_result) -> None:
    """Release the lock and restore its file to `before`; None: there was none."""
    if before is None:
        path.unlink()
    else:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, before, 0)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    held_locks.remove(descriptor)
    os.close(descriptor)


def forget_undo() -> None:
    """The command is accepted: from here on nothing is undone."""
    undo.clear()


def undo_all() -> None:
    """Undo what a refused command did: its lock, its folders, a folder moved aside."""
    while undo:
        with contextlib.suppress(OSError):  # such as a folder that is no longer empty
            undo.pop()()


def release_locks() -> None:
    """For tests, where the process outlives a run."""
    forget_undo()
    warned.clear()
    while held_locks:
        os.close(held_locks.pop())


def nearest_folder(output_dir: str | Path) -> Path:
    """The folder, or its nearest existing parent: the disk that it will be on."""
    whole = Path(output_dir).absolute()
    return next(path for path in (whole, *whole.parents) if path.exists())
