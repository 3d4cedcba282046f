"""Finds out how a folder of clips is written down: the layouts of the Hub and of other trainers, and how to read each.

Each `*_layouts` function names what could be meant in one layout. Several in one folder that list the same clips are
one; others are refused, not guessed.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from base.errors import DataError, first_few
from data.tables import (
    EXPECTED_LAYOUTS,
    Row,
    choose_columns,
    collect,
    read_lines,
    read_table,
    read_text,
    refuse_blank,
    table_rows,
)


TEXT_PAIRS = (("prompts.txt", "videos.txt"), ("prompt.txt", "videos.txt"))  # named in hints
CAPTION_FILES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt", "text", "caption")
VIDEO_FILES = ("videos.txt", "video.txt", "video")
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json")  # the Hub's, in subfolders too
TABLES = (".csv", ".tsv", ".jsonl", ".json")
SPLITS = ("train", "training", "validation", "val", "dev", "test", "eval")  # never read as one set
SIDECARS = (".txt", ".caption")
VIDEOS = {
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv",
    ".ts", ".webm", ".wmv", ".y4m",
}  # fmt: skip
IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
MANIFEST = "data.jsonl"  # of a prepared folder
UNPACK = "for shard in *.tar; do tar -xf $shard; done"
UNSUPPORTED = {
    ".parquet": "a Parquet table; write its columns as metadata.csv (file_name, text), and the videos as files beside it",
    ".arrow": "an Arrow table of the datasets library; write its columns as metadata.csv (file_name, text), and the "
    "videos as files beside it",
    ".toml": "another trainer's TOML config, not a list of clips; give the folder of clips that it names as --data_root, "
    "or the JSON Lines file as --dataset_file",
    ".yaml": "another trainer's YAML config, not a list of clips; give the folder of clips that it names as --data_root",
    ".tar": f"a WebDataset shard; unpack it ({UNPACK}): a video and the .txt of the same name beside it are read",
}


class Layout(NamedTuple):
    """A way to read the folder; `read(blank_captions, refused)` gives its rows, with paths relative to the data root."""

    name: str
    listing: Path
    columns: str
    choice: str  # what to pass, or to do, to have this one read
    read: Callable[[bool, list[tuple[Row, str]] | None], list[Row]]


def find_layout(
    root: Path, dataset_file, caption_column: str | None = None, video_column: str | None = None, lenient: bool = False
) -> Layout:
    """How the clips below `root`, or in `dataset_file`, are written down. DataError if it cannot be told.

    `lenient`: where nothing else is found, that may be a table with records that cannot be read.
    """
    columns = caption_column or None, video_column or None
    if dataset_file is not None:
        path = Path(dataset_file)
        if not path.is_file():
            raise DataError(f"{path}: no such file (--dataset_file)")
        refuse_unsupported(path)
        return table_layout(root, [path], *columns, prefixed=False, lenient=lenient)
    if all(columns):
        return text_layout(root, *columns)
    names = sorted(files_below(root))
    tables, refused = table_layouts(root, names, *columns)
    found = [*text_layouts(root, *columns), *tables, *sidecar_layouts(root, names, *columns)]
    if lenient and not found:
        found, _ = table_layouts(root, names, *columns, lenient=True)
    found = merge_alike(root, found)
    if len(found) > 1:
        both = " or ".join(f"{layout.name} ({layout.choice})" for layout in found)
        raise DataError(f"{root}: {both} could be meant; choose one as said in brackets")
    return found[0] if found else refuse_folder(root, names, refused)


def merge_alike(root: Path, layouts: list[Layout]) -> list[Layout]:
    """One for all those that list the same clips with the same captions, in any order: the first, named with them."""
    groups: dict[object, list[Layout]] = {}
    for layout in layouts if len(layouts) > 1 else []:
        groups.setdefault(listed_clips(root, layout), []).append(layout)
    merged = [
        first._replace(name=f"{' and '.join(layout.name for layout in (first, *others))}, which agree")
        if others
        else first
        for first, *others in groups.values()
    ]
    return merged or layouts


def listed_clips(root: Path, layout: Layout) -> object:
    """Equal for layouts that list the same clips, captions and repeats; the layout's own name if it cannot be read."""
    try:
        rows = layout.read(True, None)
    except DataError:
        return layout.name
    base = os.path.abspath(root)
    listed = Counter((os.path.normpath(os.path.join(base, row.source)), row.prompt, row.repeats) for row in rows)
    return frozenset(listed.items())


def files_below(root: Path) -> Iterator[str]:
    """The files' paths relative to `root`; hidden ones, prepared folders and linked ones are left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name[0] != "." and not Path(folder, name, MANIFEST).is_file()]
        below = prefix_of(root, folder)
        yield from (os.path.join(below, name) for name in names if name[0] != ".")


def refuse_unsupported(path: Path) -> None:
    if what := UNSUPPORTED.get(path.suffix.lower()):
        raise DataError(f"{path}: {what}")


def refuse_folder(root: Path, names: list[str], refused: dict[Path, str]) -> Layout:
    """The error for a folder without a layout: what a table lacks, else what cannot be read, else what could be."""
    settings = [path for path in refused if path.suffix == ".json" and path.name not in METADATA]
    for path, line in refused.items():
        if path not in settings:
            raise DataError(line)
    for name in names:
        refuse_unsupported(root / name)
    if settings:
        raise DataError(refused[settings[0]])
    raise DataError(f"{root}: no list of clips was found; {EXPECTED_LAYOUTS}, or a .txt beside each video")


# ---------------------------------------------------------------- two text files


def text_layouts(root: Path, caption_column: str | None, video_column: str | None) -> list[Layout]:
    """Every pair of text files with usual names, or with the one name given."""
    captions = [caption_column] if caption_column else CAPTION_FILES
    videos = [video_column] if video_column else VIDEO_FILES
    pairs = [(caption, video) for video in videos for caption in captions]
    return [text_layout(root, *pair) for pair in pairs if all((root / name).is_file() for name in pair)]


def text_layout(root: Path, captions: str, videos: str) -> Layout:
    read = partial(read_text_rows, root, captions, videos)
    columns = f"captions in {captions}, videos in {videos}"
    choice = f"--caption_column {captions} --video_column {videos}"
    return Layout(f"{captions} + {videos}", root / videos, columns, choice, read)


def read_text_rows(
    root: Path,
    caption_column: str,
    video_column: str,
    blank_captions: bool = False,
    refused: list[tuple[Row, str]] | None = None,
) -> list[Row]:
    """The two files zipped line by line; trailing blank lines are ignored, except captions with `blank_captions`."""
    captions_path, videos_path = root / caption_column, root / video_column
    for path, flag in ((captions_path, "--caption_column"), (videos_path, "--video_column")):
        if not path.is_file():
            raise DataError(f"{path}: no such file ({flag}); {layout_hint(root)}")
    broken: list[tuple[int, str]] | None = None if refused is None else []
    captions, videos = read_lines(captions_path, broken), read_lines(videos_path, broken)
    if blank_captions:
        lines = read_text(captions_path, lenient=refused is not None).count("\n")
        captions += [""] * (min(len(videos), lines) - len(captions))
    if len(captions) != len(videos):
        with collect(refused, first_alone(captions, videos)):
            raise DataError(
                f"{captions_path} has {len(captions)} captions and {videos_path} {len(videos)} videos; "
                "line n of one belongs to line n of the other"
            )
    if not (captions or videos):
        raise DataError(f"{videos_path}: no clips; {EXPECTED_LAYOUTS}")
    rows, reasons = [], dict(broken or ())
    for row, (prompt, source) in enumerate(zip(captions, videos, strict=False), start=1):
        with collect(refused, Row(row, prompt, source)):
            if row in reasons:
                raise DataError(reasons[row])
            if not blank_captions:
                refuse_blank(captions_path, row, "caption", prompt)
            refuse_blank(videos_path, row, "video path", source)
            rows.append(Row(row, prompt, source))
    return rows


def first_alone(captions: list[str], videos: list[str]) -> Row:
    """The first line of the longer list that has none to go with it."""
    row = min(len(captions), len(videos)) + 1
    return Row(row, *("".join(lines[row - 1 : row]) for lines in (captions, videos)))


def layout_hint(root: Path) -> str:
    """Which flags to pass, guessed from the files that exist."""
    for captions, videos in TEXT_PAIRS:
        if (root / captions).is_file() and (root / videos).is_file():
            return f"pass --caption_column {captions} --video_column {videos}"
    tables = sorted(root.glob("*.csv"))
    if tables:
        return f"for the CSV there pass --dataset_file {tables[0]}, its columns by --caption_column and --video_column"
    return EXPECTED_LAYOUTS


# ---------------------------------------------------------------- tables


def table_layouts(
    root: Path, names: list[str], caption_column: str | None, video_column: str | None, lenient: bool = False
) -> tuple[list[Layout], dict[Path, str]]:
    """Those of the metadata files and of the tables in `root` itself that list clips, and why others do not."""
    metadata = [path for path in names if os.path.basename(path) in METADATA]
    groups = [
        group for name in METADATA for group in in_sets([path for path in metadata if os.path.basename(path) == name])
    ]
    others = [name for name in names if os.sep not in name and name not in (*METADATA, MANIFEST)]
    groups += [[name] for name in others if suffix_of(name) in TABLES]
    found, refused = [], {}
    for group in groups:
        paths = [root / name for name in group]
        try:
            found.append(table_layout(root, paths, caption_column, video_column, lenient=lenient))
        except DataError as error:
            refused[paths[0]] = str(error)
    return found, refused


def in_sets(paths: list[str]) -> list[list[str]]:
    """Metadata of sibling folders is one set; that of splits, or of a folder and one in it, are several."""
    folders = [Path(path).parent for path in paths]
    nested = any(one in other.parents for one in folders for other in folders)
    if nested or any(part.lower() in SPLITS for folder in folders for part in folder.parts):
        return [[path] for path in paths]
    return [paths] if paths else []


def table_layout(
    root: Path,
    paths: list[Path],
    caption_column: str | None,
    video_column: str | None,
    prefixed: bool = True,
    lenient: bool = False,
) -> Layout:
    """Tables of one kind. `prefixed`: their paths are relative to their own folder, as in the Hub's metadata."""
    broken: list[tuple[Row, str]] | None = [] if lenient else None
    tables = [read_table(path, caption_column, video_column, broken) for path in paths]
    chosen = [choose_columns(table, caption_column, video_column) for table in tables]

    def read(blank_captions: bool, refused: list[tuple[Row, str]] | None = None) -> list[Row]:
        rows = []
        if refused is not None:
            refused += broken or []
        for table, columns in zip(tables, chosen, strict=True):
            prefix = prefix_of(root, table.path.parent) if prefixed else ""
            own = table_rows(table, columns, blank_captions, refused)
            rows += [row._replace(source=os.path.join(prefix, row.source)) for row in own]
        return rows

    names = [os.path.relpath(path, root) for path in paths]
    columns = f"captions in {chosen[0].caption}, videos in {chosen[0].video}"
    if chosen[0].repeats:
        columns += f", repeats in {chosen[0].repeats}"
    folder = Path(names[0]).parent
    choice = f"--dataset_file {paths[0]}" if folder == Path() else f"--data_root {root / folder}"
    kind = tables[0].kind
    return Layout(f"{first_few(names)}, {kind}", paths[0], columns, choice, read)


def prefix_of(root: Path, folder) -> str:
    """The folder's path below `root`; empty for `root` itself."""
    below = os.path.relpath(folder, root)
    return "" if below == os.curdir else below


# ---------------------------------------------------------------- a text beside each video


def sidecar_layouts(
    root: Path, names: list[str], caption_column: str | None, video_column: str | None
) -> list[Layout]:
    """The suffixes by which at least one clip has a caption beside it; --caption_column .txt chooses one."""
    if video_column or (caption_column and caption_column not in SIDECARS):
        return []
    clips = clips_in(names)
    found = []
    for suffix in [caption_column] if caption_column else SIDECARS:
        texts = {name for name in names if name.endswith(suffix)}
        captioned = {name for name in clips if beside(name, suffix) in texts} if texts else set()
        if captioned:
            listed = [name for name in clips if name in captioned or is_video(name)]
            read = partial(read_sidecars, root, listed, captioned, suffix)
            columns = f"captions in NAME{suffix} beside each"
            choice = f"--caption_column {suffix}"
            found.append(Layout(f"videos with a {suffix} beside each", root, columns, choice, read))
    return found


def clips_in(names: list[str]) -> list[str]:
    """Videos, and images that are not a video's thumbnail."""
    videos = {name for name in names if is_video(name)}
    stems = {os.path.splitext(name)[0] for name in videos}
    return [
        name
        for name in names
        if name in videos or (suffix_of(name) in IMAGES and os.path.splitext(name)[0] not in stems)
    ]


def is_video(name: str) -> bool:
    return suffix_of(name) in VIDEOS


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # a Path would take a second for 20,000


def beside(name: str, suffix: str) -> str:
    return os.path.splitext(name)[0] + suffix


def read_sidecars(
    root: Path,
    names: list[str],
    captioned: set[str],
    suffix: str,
    blank_captions: bool = False,
    refused: list[tuple[Row, str]] | None = None,
) -> list[Row]:
    """A row for each clip, in the order of their paths; line breaks at a caption's end are not part of it."""
    without = [name for name in names if name not in captioned]
    if without and not blank_captions:
        raise DataError(
            f"{root}: no {suffix} with a caption beside {first_few(without)}; write it, remove the clip, or give "
            "--id_token, which then is the caption"
        )
    rows = []
    for name in names:
        path = root / beside(name, suffix)
        with collect(refused, Row(1, "", name, str(path))):
            caption = read_text(path).replace("\r\n", "\n").rstrip("\n") if name in captioned else ""
            if not blank_captions:
                refuse_blank(path, 1, "caption", caption)
            rows.append(Row(1, caption, name, str(path)))
    return rows
