"""Is a folder as it was written? By the sizes and SHA-256 in its manifest, which base/files.py writes."""

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from base.files import HASHING_THREADS, MANIFEST, describe


unverified: dict[Path, str] = {}  # SHA-256 of files that are being loaded, until whoever reads them has compared it


class DamagedFile(Exception):
    """A file is not as it was written; the message names it and says how it differs."""


def find_damage(folder: Path, is_later: Callable[[str], bool] = lambda name: False) -> str | None:
    """What is wrong with a folder made by `written_folder`, one reason naming the file; None if it is intact.

    Of files whose name `is_later` only the size is compared: `verified_folder` hashes them.
    """
    try:
        expected = read_manifest(folder)
    except DamagedFile as error:
        return str(error)
    for name, (size, _) in expected.items():  # sizes first: they are cheap
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return find_change(folder, {name: digest for name, (_, digest) in expected.items() if not is_later(name)})


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """{name: (size, SHA-256)} of the files that were written into the folder."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError as error:
        raise DamagedFile(f"{MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{MANIFEST} is damaged ({error})") from error


def find_change(folder: Path, hashes: dict[str, str]) -> str | None:
    """The first of these files whose SHA-256 is another, as a reason; None if there is none."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        found = pool.map(lambda name: describe(folder / name)["sha256"], hashes)
        for name, digest in zip(hashes, found, strict=True):
            if digest != hashes[name]:
                return changed(name)
    return None


def changed(name: str) -> str:
    return f"{name} was changed after it was written (its SHA-256 differs)"


@contextlib.contextmanager
def verified_folder(folder: Path, is_later: Callable[[str], bool]):
    """Verify what `find_damage` left for later while the body reads it; DamagedFile if a file was changed.

    Readers that hash what they read take it out of `unverified`; the rest is hashed at the end, after an error in the
    body too: a changed header can look like the file of another model.
    """
    hashes = {folder / name: digest for name, (_, digest) in read_manifest(folder).items() if is_later(name)}
    unverified.update(hashes)
    try:
        yield
    except Exception as error:
        refuse_changed(folder, hashes, error)
        raise
    else:
        refuse_changed(folder, hashes)
    finally:
        for path in hashes:
            unverified.pop(path, None)


def refuse_changed(folder: Path, hashes: dict[Path, str], cause: Exception | None = None) -> None:
    """DamagedFile if one of these files was changed, as far as they are unverified."""
    rest = {path.relative_to(folder).as_posix(): digest for path, digest in hashes.items() if path in unverified}
    if reason := find_change(folder, rest):
        raise DamagedFile(reason) from cause
