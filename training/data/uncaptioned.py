"""Finds clips that are still to be captioned: in any layout of data/layouts.py, in lists that lack captions, or as
nothing but files.
"""

import os
from functools import partial
from pathlib import Path

from base.errors import DataError, UsageError
from data.layouts import (
    METADATA,
    VIDEO_FILES,
    Layout,
    clips_in,
    files_below,
    find_layout,
    refuse_folder,
    refuse_unsupported,
    sidecar_layouts,
    table_layouts,
    text_layouts,
)
from data.tables import (
    CAPTION_COLUMNS,
    VIDEO_COLUMNS,
    Columns,
    Row,
    collect,
    find_column,
    named_like,
    read_lines,
    read_table,
    refuse_blank,
    table_rows,
)


def find_clips(root: Path, dataset_file, caption_column: str | None, video_column: str | None) -> Layout:
    """How the clips are listed, with or without captions. DataError if that cannot be told, or there are none."""
    if dataset_file is not None:
        table = Path(dataset_file)
        if not caption_column and table.is_file() and not has_captions(table, video_column):
            return bare_table(table, video_column)
        return find_layout(root, table, caption_column, video_column)
    if caption_column or is_listed(root, sorted(files_below(root)), video_column):
        return find_layout(root, None, caption_column, video_column)
    tables = [root / name for name in METADATA if (root / name).is_file()]
    if tables:
        return bare_table(tables[0], video_column)
    lists = [root / name for name in ([video_column] if video_column else VIDEO_FILES) if (root / name).is_file()]
    return bare_list(lists[0]) if lists else bare_folder(root)


def is_listed(root: Path, names: list[str], video_column: str | None = None) -> bool:
    """Whether captions of the clips are found in `names`, the files below `root`."""
    tables, _ = table_layouts(root, names, None, video_column)
    texts = [pair for pair in text_layouts(root, None, video_column) if os.path.relpath(pair.listing, root) in names]
    return bool(texts or tables or sidecar_layouts(root, names, None, video_column))


def find_unlisted(root: Path, own_files: set[str]) -> Layout:
    """The clips of a folder where `own_files`, written by an earlier run, are the only lists. UsageError for others."""
    names = [name for name in sorted(files_below(root)) if name not in own_files]
    lists = {*VIDEO_FILES, *METADATA}.intersection(names)
    if lists or is_listed(root, names):
        raise UsageError(
            f"{root}: its clips have a list or captions already, which are not written over; give an --output_dir"
        )
    return bare_folder(root)


def has_captions(table: Path, video_column: str | None) -> bool:
    refuse_unsupported(table)
    return bool(named_like(read_table(table, None, video_column).header, None, CAPTION_COLUMNS))


def bare_table(path: Path, video_column: str | None) -> Layout:
    """A table with a column of videos and none of captions."""
    table = read_table(path, None, video_column)
    found = named_like(table.header, None, VIDEO_COLUMNS)
    if not video_column and len(found) != 1:
        names = ", ".join(table.header)
        raise DataError(f"{path}: which of its columns ({names}) holds the videos? Name it with --video_column")
    column = find_column(path, table.header, video_column, "--video_column") if video_column else found[0]
    read = partial(table_rows, table, Columns("", column))
    return Layout(f"{path.name}, {table.kind}", path, f"videos in {column}, no captions", "", read)


def bare_list(path: Path) -> Layout:
    """A text file with one video per line."""

    def read(blank_captions: bool, refused: list[tuple[Row, str]] | None = None) -> list[Row]:
        rows = [Row(row, "", line) for row, line in enumerate(read_lines(path), start=1)]
        for row in rows:
            with collect(refused, row):
                refuse_blank(path, row.row, "video path", row.source)
        return rows

    return Layout(path.name, path, f"videos in {path.name}, no captions", "", read)


def bare_folder(root: Path) -> Layout:
    """Every video and image below `root`."""
    names = list(files_below(root))
    if not names:
        raise DataError(f"{root}: no files in it; put the videos there, or give their folder as --data_root")
    clips = sorted(clips_in(names))
    if not clips:
        refuse_folder(root, names, {})
    return Layout("videos", root, "no captions", "", lambda *_: [Row(1, "", name) for name in clips])
