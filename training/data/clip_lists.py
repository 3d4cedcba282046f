"""Reads lists of clips: two text files or a CSV; captions are kept exactly as written."""

import contextlib
import csv
import difflib
import functools
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from base.errors import DataError, first_few
from base.file_kinds import archive, placeholder
from base.hashes import short_hash


EXPECTED_LAYOUTS = (
    "expected <data_root>/prompts.txt + <data_root>/videos.txt, line by line "
    "(--caption_column prompts.txt --video_column videos.txt), or a CSV (--dataset_file)"
)

TEXT_PAIRS = (("prompts.txt", "videos.txt"), ("prompt.txt", "videos.txt"))  # common names of the two files


class Clip(NamedTuple):
    """A video and its caption; `row`: the line (in a CSV, the spreadsheet's row), `source`: the path as written."""

    video: Path
    prompt: str
    row: int
    source: str
    below_root: str = ""  # if `source` is absolute: relative to the data root, and so unchanged when the root moves

    @property
    def identity(self) -> str:
        """The clip's path, independent of where the data root is."""
        return self.below_root or self.source


class Row(NamedTuple):
    row: int
    prompt: str
    source: str


def read_clips(
    data_root,
    dataset_file,
    caption_column: str,
    video_column: str,
    allow_outside: bool = False,
    blank_captions: bool = False,
    refused: list[tuple[Clip, str]] | None = None,
) -> list[Clip]:
    """Clips from `<data_root>/<caption_column>` and `<video_column>`, or from the CSV `dataset_file`.

    Raises DataError for any mismatch; missing videos are listed in one error. `blank_captions`: blank captions are
    allowed, because the id token fills them. `refused`: rows that cannot be used are put there, with the reason.
    """
    collects = refused is not None
    root = find_root(data_root, dataset_file)
    if dataset_file is None:
        rows = read_text_rows(root, caption_column, video_column, blank_captions or collects)
        listing = root / video_column
    else:
        rows = read_csv_rows(dataset_file, caption_column, video_column, blank_captions or collects)
        listing = dataset_file
    clips = []
    for row, prompt, source in rows:
        clip = Clip(Path(root, source), prompt, row, source, relative_to_root(root, source))
        with collected(refused, clip):
            if not blank_captions:
                refuse_blank(listing, row, "caption", prompt)
            video = resolve_inside(root, as_on_disk(root, source), f"{listing}:{row}", allow_outside)
            if collects:
                refuse_missing_videos(root, listing, [] if os.path.isfile(video) else [clip._replace(video=video)])
            clips.append(clip._replace(video=video))
    refuse_missing_videos(root, listing, [clip for clip in clips if not os.path.isfile(clip.video)])
    return clips


@contextlib.contextmanager
def collected(refused: list[tuple[Clip, str]] | None, clip: Clip) -> Iterator[None]:
    """Put a DataError of the body into `refused`, if that is a list, as what is wrong with `clip`."""
    try:
        yield
    except DataError as error:
        if refused is None:
            raise
        refused.append((clip, str(error)))


def relative_to_root(root, source: str) -> str:
    """An absolute path below the data root as a relative path; empty for any other path."""
    base = os.path.abspath(root)
    return os.path.relpath(source, base) if os.path.isabs(source) and is_below(source, base) else ""


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
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", source) and not os.path.isfile(os.path.join(root, source)):
        raise DataError(f"{place}: '{source}' is a URL or protocol; only files inside {root} are read")
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, source))
    if allow_outside:
        return Path(path)
    advice = "move the file inside, set --data_root above it, or pass --allow_outside_root"
    if not any(is_below(path, parent) for parent in (base, real_path(base))):
        raise DataError(f"{place}: '{source}' is outside of {root}; {advice}")
    # Resolve the folder, which is cached: 100,000 clips in one folder take a second
    real = os.path.realpath(path) if os.path.islink(path) else os.path.join(real_path(os.path.dirname(path)), "file")
    if not is_below(real, real_path(base)):
        raise DataError(f"{place}: '{source}' is a link to {os.path.realpath(path)}, outside of {root}; {advice}")
    return Path(path)


@functools.lru_cache
def real_path(folder: str) -> str:
    return os.path.realpath(folder)


def is_below(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


# ---------------------------------------------------------------- two text files


def read_text_rows(root: Path, caption_column: str, video_column: str, blank_captions: bool = False) -> list[Row]:
    """The two files zipped line by line; trailing blank lines are ignored, except captions with `blank_captions`."""
    captions_path, videos_path = root / caption_column, root / video_column
    for path, flag in ((captions_path, "--caption_column"), (videos_path, "--video_column")):
        if not path.is_file():
            raise DataError(f"{path}: no such file ({flag}); {layout_hint(root)}")
    captions, videos = read_lines(captions_path), read_lines(videos_path)
    if blank_captions:
        captions += [""] * (min(len(videos), read_text(captions_path).count("\n")) - len(captions))
    if len(captions) != len(videos):
        raise DataError(
            f"{captions_path} has {len(captions)} captions and {videos_path} {len(videos)} videos; "
            "line n of one belongs to line n of the other"
        )
    if not captions:
        raise DataError(f"{videos_path}: no clips; {EXPECTED_LAYOUTS}")
    rows = [Row(row, *pair) for row, pair in enumerate(zip(captions, videos, strict=True), start=1)]
    for row, prompt, source in rows:
        if not blank_captions:
            refuse_blank(captions_path, row, "caption", prompt)
        refuse_blank(videos_path, row, "video path", source)
    return rows


def refuse_blank(path, row: int, what: str, text: str) -> None:
    if not text.strip():
        token = ", or give --id_token, which then is the caption" if what == "caption" else ""
        raise DataError(f"{path}:{row}: blank {what}; fill it in or remove the row{token}")


def layout_hint(root: Path) -> str:
    """Which flags to pass, guessed from the files that exist."""
    for captions, videos in TEXT_PAIRS:
        if (root / captions).is_file() and (root / videos).is_file():
            return f"pass --caption_column {captions} --video_column {videos}"
    tables = sorted(root.glob("*.csv"))
    if tables:
        return f"for the CSV there pass --dataset_file {tables[0]}, its columns by --caption_column and --video_column"
    return EXPECTED_LAYOUTS


def read_lines(path: Path) -> list[str]:
    """Lines without \\n or \\r\\n; no other character ends a line (captions may contain U+2028)."""
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for row, line in enumerate(lines, start=1):
        if "\r" in line:
            raise DataError(f"{path}:{row}: a carriage return without a newline; save with \\n or \\r\\n line endings")
    return lines


def read_text(path: Path) -> str:
    """UTF-8 text, with or without a byte order mark; line endings unchanged."""
    try:
        data = path.read_bytes()
        other = placeholder(path) or archive(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if other:
        raise DataError(f"{path}: {other}")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: UTF-16 (byte offset 0); convert it: iconv -f UTF-16 -t UTF-8")
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, offset) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 at byte offset {offset} (0x{data[offset]:02x}); "
            "convert it, for example: iconv -f CP1252 -t UTF-8"
        ) from error


# ---------------------------------------------------------------- CSV


def read_csv_rows(dataset_file, caption_column: str, video_column: str, blank_captions: bool = False) -> list[Row]:
    """The two columns of the CSV; every field is kept as text."""
    path = Path(dataset_file)
    if not path.is_file():
        raise DataError(f"{path}: no such file (--dataset_file)")
    table = read_table(path)
    if len(table) < 2:
        raise DataError(f"{path}: no rows below the header; {EXPECTED_LAYOUTS}")
    header = table[0]
    caption = find_column(path, header, caption_column, "--caption_column")
    video = find_column(path, header, video_column, "--video_column")
    rows = []
    for row, fields in enumerate(table[1:], start=2):
        if not fields:
            continue  # a blank line
        if len(fields) != len(header):
            raise DataError(
                f"{path}:{row}: {len(fields)} fields and {len(header)} columns; quote captions with commas"
            )
        if not blank_captions:
            refuse_blank(path, row, "caption", fields[caption])
        refuse_blank(path, row, "video path", fields[video])
        rows.append(Row(row, fields[caption], fields[video]))
    if not rows:
        raise DataError(f"{path}: no rows below the header; {EXPECTED_LAYOUTS}")
    return rows


def read_table(path: Path) -> list[list[str]]:
    text = io.StringIO(read_text(path), newline="")  # keeps line endings inside captions
    reader = csv.reader(text, strict=True)
    try:
        return list(reader)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}; is a quote left open?") from error


def find_column(path: Path, header: list[str], name: str, flag: str) -> int:
    if header.count(name) == 1:
        return header.index(name)
    if name in header:
        raise DataError(f"{path}: column '{name}' ({flag}) is there {header.count(name)} times; rename all but one")
    near = difflib.get_close_matches(name, header, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise DataError(f"{path}: no column '{name}' ({flag}); columns: {', '.join(header)}{hint}")


# ---------------------------------------------------------------- names


def with_id_token(prompt: str, id_token: str | None) -> str:
    """The caption prefixed with the token and a space; just the token for a blank caption."""
    if not id_token:
        return prompt
    return f"{id_token} {prompt}" if prompt.strip() else id_token


def draw_keys(sources: Iterable[str]) -> list[str]:
    """`source/window/repeat` per clip: its random draws depend on this alone, so other rows may be added or moved.

    `source` is the normalized path; `repeat` counts earlier rows with the same path; `window` is always 0, reserved
    for clips cut into several.
    """
    seen: Counter[str] = Counter()
    places = []
    for source in map(os.path.normpath, sources):
        places.append(f"{source}/0/{seen[source]}")
        seen[source] += 1
    return places


def unique_stems(sources: Iterable[str]) -> list[str]:
    """File stems for the outputs of each source path: safe, unique, and stable when other rows are added or removed.

    A source listed again (with another caption, say) gets -2, -3 and so on.
    """
    seen: Counter[str] = Counter()
    stems = []
    for source in sources:
        digest = short_hash(source)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(source).stem)[:150].lstrip("-._")
        stem = f"{name}-{digest}" if name else digest
        seen[stem.lower()] += 1  # file systems may ignore case
        count = seen[stem.lower()]
        stems.append(stem if count == 1 else f"{stem}-{count}")
    return stems
