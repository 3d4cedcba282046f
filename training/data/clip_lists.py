"""Reads lists of clips: where each video is, and under what name it is known."""

import functools
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from base.errors import DataError, first_few
from base.hashes import real_path, short_hash
from data.layouts import Layout, find_layout
from data.tables import EXPECTED_LAYOUTS, Row, collect, printable


logger = logging.getLogger(__name__)


class Clip(NamedTuple):
    """A video and its caption; `row`: the line (in a CSV, the spreadsheet's row), `source`: the path as written."""

    video: Path
    prompt: str
    row: int
    source: str
    below_root: str = ""  # if `source` is absolute: relative to the data root, and so unchanged when the root moves
    repeats: int = 1  # how often it is used per epoch
    window: int | None = None  # of a clip cut into several: the first frame of this one in the file

    @property
    def stable_name(self) -> str:
        """The clip's path, and window if it has one, independent of where the data root is."""
        return windowed(self.below_root or self.source, self.window)


def read_clips_from_args(args, refused: list[tuple[Clip, str]] | None = None) -> list[Clip]:
    """The listed clips; `refused`: rows that would stop it are left out and put there, with the reason."""
    columns = args.caption_column, args.video_column
    options = {"allow_outside": args.allow_outside_root, "blank_captions": bool(args.id_token)}
    options |= {"repeats": args.repeats, "refused": refused}
    return read_clips(args.data_root, args.dataset_file, *columns, **options)


def read_clips(
    data_root,
    dataset_file,
    caption_column: str | None = None,
    video_column: str | None = None,
    allow_outside: bool = False,
    blank_captions: bool = False,
    repeats: int = 1,
    refused: list[tuple[Clip, str]] | None = None,
) -> list[Clip]:
    """The clips of a folder in the layout that is found there, or in `<data_root>/<caption_column>` and
    `<video_column>`, or in the columns of `dataset_file`.

    Raises DataError for any mismatch; missing videos are listed in one error. `blank_captions`: blank captions are
    allowed, because the id token fills them. `repeats`: of the rows that do not say. `refused`: rows that cannot be read,
    and those whose video is not there or outside, are put there with the reason, and the others are read; blank
    captions are then left to the caller too.
    """
    root = find_root(data_root, dataset_file)
    layout = find_layout(root, dataset_file, caption_column, video_column, lenient=refused is not None)
    is_found = dataset_file is None
    clips = clips_in_layout(root, layout, is_found, allow_outside, blank_captions, repeats, refused)
    if not (caption_column and video_column):
        logger.info("%s: found %s: %d clips, %s", root, layout.name, len(clips), layout.columns)
    return clips


def clips_in_layout(
    root: Path,
    layout: Layout,
    is_found: bool,
    allow_outside: bool = False,
    blank_captions: bool = False,
    repeats: int = 1,
    refused: list[tuple[Clip, str]] | None = None,
) -> list[Clip]:
    """The clips of a layout, as in `read_clips`. `is_found`: no flag names the files that are read."""
    collects = refused is not None
    unread: list[tuple[Row, str]] | None = [] if collects else None
    rows, clips = layout.read(blank_captions or collects, unread), []
    base = os.fspath(root)
    if is_found:  # captions beside the videos, and tables that were found: links may lead out
        for listing in dict.fromkeys(row.listing for row in rows if row.listing):
            resolve_inside(root, os.path.relpath(listing, root), listing, allow_outside)
    for row in rows:
        with collect(unread, row):
            place = f"{row.listing or layout.listing}:{row.row}"
            video = resolve_inside(base, as_on_disk(base, row.source), place, allow_outside)
            clip = listed_clip(root, row, repeats, video)
            if collects and not os.path.isfile(video):
                refuse_missing_videos(root, layout.listing, [clip])
            clips.append(clip)
    if collects:
        refused += [(listed_clip(root, printable(row), repeats), reason) for row, reason in unread]
    refuse_missing_videos(root, layout.listing, [clip for clip in clips if not os.path.isfile(clip.video)])
    return clips


def listed_clip(root: Path, row: Row, repeats: int, video: Path | None = None) -> Clip:
    """A row's clip; without `video`, its path as written."""
    below = relative_to_root(root, row.source)
    return Clip(video or Path(root, row.source), row.prompt, row.row, row.source, below, row.repeats or repeats)


def relative_to_root(root, source: str) -> str:
    """An absolute path below the data root as a relative path; empty for any other path."""
    if not os.path.isabs(source):
        return ""
    base = os.path.abspath(root)
    return os.path.relpath(source, base) if is_below(source, base) else ""


def as_on_disk(root, source: str) -> str:
    """The relative path `source` as spelt on disk, if that differs only by Unicode normalization: macOS uses
    decomposed names, most editors write composed ones. Unchanged if there is no such file.
    """
    if source.isascii() or os.path.exists(os.path.join(root, source)):
        return source
    folder, name = os.path.split(source)
    folder = as_on_disk(root, folder) if folder and folder != source else folder
    return os.path.join(folder, names_in(os.path.join(root, folder)).get(unicodedata.normalize("NFC", name), name))


@functools.lru_cache
def names_in(folder: str) -> dict[str, str]:
    """{composed form: name on disk} of a folder's entries; empty if there is no such folder."""
    if not os.path.isdir(folder):
        return {}
    return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder)}


def refuse_missing_videos(root: Path, listing, clips: list[Clip]) -> None:
    """Raise DataError for rows whose video is missing, with a guess at what was meant."""
    folders = [f"'{clip.source}' (row {clip.row})" for clip in clips if os.path.isdir(clip.video)]
    if folders:
        raise DataError(
            f"{listing}: {first_few(folders)}: a folder in place of a video; make one of the frames in it, as in "
            "ffmpeg -framerate 8 -i FOLDER/%04d.png -c:v libx264 -crf 10 -pix_fmt yuv420p VIDEO.mp4"
        )
    if clips:
        missing = [f"'{clip.source}' (row {clip.row})" for clip in clips]
        raise DataError(
            f"{listing}: {first_few(missing)} not found in {root}; paths are relative to that folder"
            f"{likely_meant(root, clips[0])}"
        )


def likely_meant(root: Path, clip: Clip) -> str:
    """The end of the error line for a missing video: a similar file that exists; empty if there is none."""
    if os.path.islink(clip.video):
        target = os.readlink(clip.video)
        fetch = "; run git annex get" if ".git/annex" in target else ""
        return f"; {clip.source} is a link to {target}, which is not there{fetch}"
    bare = clip.source.strip().strip("\"'")
    for spelling, why in ((bare, "quotes and spaces count"), (bare.replace("\\", "/"), "folders are separated by /")):
        if spelling != clip.source and os.path.isfile(os.path.join(root, spelling)):
            return f"; '{spelling}' is there: {why}"
    folder = Path(clip.video).parent
    names = {name.casefold(): name for name in (os.listdir(folder) if folder.is_dir() else ())}
    stems = {Path(name).stem: name for name in names.values()}
    near = names.get(clip.video.name.casefold()) or stems.get(clip.video.name) or stems.get(clip.video.stem)
    return f"; {folder} holds '{near}'" if near else ""


def find_root(data_root, dataset_file) -> Path:
    """The folder that video paths are relative to: --data_root, or the CSV's folder."""
    if data_root is None and dataset_file is None:
        raise DataError(f"no data: {EXPECTED_LAYOUTS}")
    root = Path(dataset_file).parent if data_root is None else Path(data_root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (--data_root); {EXPECTED_LAYOUTS}")
    return root


def resolve_inside(root, source: str, place: str, allow_outside: bool = False) -> Path:
    """The path of `source` below `root`; DataError, prefixed with `place`, for URLs and paths that lead outside.

    Outside by `..`, by an absolute path or by a link: a downloaded dataset must not choose which files of this machine
    are read.
    """
    if (
        ":" in source
        and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", source)
        and not os.path.isfile(os.path.join(root, source))
    ):
        raise DataError(f"{place}: '{source}' is a URL or protocol; only files inside {root} are read")
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, source))
    if allow_outside:
        return Path(path)
    advice = "move the file inside, set --data_root above it, or pass --allow_outside_root"
    if not (is_inside(path, base) or is_inside(path, real_path(base))):
        raise DataError(f"{place}: '{source}' is outside of {root}; {advice}")
    # Resolve the folder, which is cached: 100,000 clips in one folder take a second
    real = os.path.realpath(path) if os.path.islink(path) else os.path.join(real_path(os.path.dirname(path)), "file")
    if not is_inside(real, real_path(base)):
        raise DataError(f"{place}: '{source}' is a link to {os.path.realpath(path)}, outside of {root}; {advice}")
    return Path(path)


def is_inside(path: str, folder: str) -> bool:
    """`is_below` of absolute, normalized paths, in a tenth of the time."""
    return path == folder or path.startswith(f"{folder.rstrip(os.sep)}{os.sep}")


def is_below(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


# ---------------------------------------------------------------- names


def with_id_token(prompt: str, id_token: str | None) -> str:
    """The caption prefixed with the token and a space; just the token for a blank caption."""
    if not id_token:
        return prompt
    return f"{id_token} {prompt}" if prompt.strip() else id_token


def windowed(source: str, window: int | None) -> str:
    """The name of a clip's window; of a whole clip, its path."""
    return source if window is None else f"{source}@{window}"


def draw_keys(sources: Iterable[str]) -> list[str]:
    """`source/window/repeat` per clip: its random draws depend on this alone, so other rows may be added or moved.

    `source` is the normalized path, with `windowed` if the clip is cut into several; `repeat` counts earlier rows with
    the same; `window` is always 0.
    """
    seen: Counter[str] = Counter()
    places = []
    for source in map(os.path.normpath, sources):
        places.append(f"{source}/0/{seen[source]}")
        seen[source] += 1
    return places


def repeated_keys(keys: Iterable[str], repeats: Iterable[int]) -> list[str]:
    """`draw_keys` of clips used several times per epoch: the first use keeps its key, so that it is also that of
    preparing, the others add their number.
    """
    pairs = zip(keys, repeats, strict=True)
    return [f"{key}/{use}" if use else key for key, count in pairs for use in range(count)]


def unique_stems(sources: Iterable[str], windows: Iterable[int | None] = repeat(None)) -> list[str]:
    """File stems for the outputs of each source path: safe, unique, and stable when other rows are added or removed.

    A source listed again (with another caption, say) gets -2, -3 and so on; a window of it @ and its first frame.
    """
    seen: Counter[str] = Counter()
    stems = []
    for source, window in zip(sources, windows, strict=False):  # by default there is no end of them
        digest = short_hash(source)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(source).stem)[:150].lstrip("-._")
        stem = windowed(f"{name}-{digest}" if name else digest, window)
        seen[stem.lower()] += 1  # file systems may ignore case
        count = seen[stem.lower()]
        stems.append(stem if count == 1 else f"{stem}-{count}")
    return stems
