"""Folders on disk that are whole or not there, whatever moment a process dies at, and that belong to one run at a time.

A folder is written beside its place, flushed, described by `manifest.json` (size and SHA-256 of each file) and renamed.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from errors import UsageError


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TEMPORARY, REPLACED = ".tmp-", ".old-"  # what the names of unfinished and of replaced files and folders begin with
HASHING_THREADS = 4  # hashing runs beside Python: a file each
held_locks: list[int] = []  # file descriptors; the system frees a lock when its process ends, however it ends


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def written_folder(target: Path):
    """A new folder that becomes `target` if the body succeeds, and is removed if it fails."""
    temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        write_manifest(temporary)
        put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Flush every file of `folder` to the disk and, only then, write their sizes and hashes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        flush(path)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        entries = list(pool.map(describe, paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    text = json.dumps({"version": 1, "files": dict(zip(names, entries, strict=True))}, indent=2) + "\n"
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush(directory)


def describe(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def flush(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename; an earlier `target` steps aside first and is deleted last, see `clean_up`."""
    aside = target.with_name(REPLACED + target.name)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    temporary.rename(target)
    flush(target.parent)
    if aside.exists():
        remove(aside)


def remove(folder: Path) -> None:
    """Delete a folder that nobody needs any more: it is gone at once, and that it cannot be deleted stops nothing."""
    hidden = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    try:
        folder.rename(hidden)  # a process that dies now leaves no half of it under its own name
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
            aside.rename(target)  # killed between the two renames: the earlier one is still good
    for left in sorted(parent.glob(f"{TEMPORARY}*")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write beside and rename."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------- reading


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `written_folder` made, one reason with the file's name; None if it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    for name, (size, _) in expected.items():  # sizes first: they cost nothing
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashes = pool.map(lambda name: describe(folder / name)["sha256"], expected)
        for name, found in zip(expected, hashes, strict=True):
            if found != expected[name][1]:
                return f"{name} was changed after it was written (its SHA-256 differs)"
    return None


# ---------------------------------------------------------------- one run at a time


def lock_folder(folder: Path) -> None:
    """Hold `folder` until this process ends; UsageError, with the holder's number, if another process does.

    A record lock, not a file that exists: it ends with its process, kill -9 included, and forked workers do not share it.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 20).decode(errors="replace").strip() or "another"
        os.close(descriptor)
        raise UsageError(
            f"{folder}: process {holder} is writing there; wait until it ends, or choose another --output_dir"
        ) from error
    except OSError as error:  # some network file systems have no locks
        os.close(descriptor)
        logger.warning("%s: cannot be locked (%s); start no second run there", folder, error.strerror)
        return
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    held_locks.append(descriptor)


def release_locks() -> None:
    """For a process that goes on after a run: tests."""
    while held_locks:
        os.close(held_locks.pop())
