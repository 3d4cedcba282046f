"""Reads the files that list clips: lines of text, CSV, JSON; captions are kept exactly as written."""

import csv
import difflib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from base.errors import DataError
from base.file_kinds import archive, placeholder


EXPECTED_LAYOUTS = (
    "expected <data_root>/prompts.txt + <data_root>/videos.txt, line by line "
    "(--caption_column prompts.txt --video_column videos.txt), or a CSV (--dataset_file)"
)
# The names that other tools give to the columns, in lower case
CAPTION_COLUMNS = ("text", "caption", "prompt")
VIDEO_COLUMNS = ("video", "video_path", "file_path", "file_name", "path")
REPEATS_COLUMNS = ("repeats", "num_repeats")
MAX_REPEATS = 10_000
SURROGATE = re.compile("[\ud800-\udfff]")
DELIMITERS = {",": "CSV", ";": "CSV with semicolons", "\t": "CSV with tabs"}


class Row(NamedTuple):
    """One caption of one video; `listing`: the file that names them, if not the one of all rows."""

    row: int
    prompt: str
    source: str
    listing: str = ""
    repeats: int | None = None


class Table(NamedTuple):
    """A listing with named columns; reading `rows` raises DataError at the first bad one."""

    path: Path
    kind: str
    header: list[str]
    rows: Iterable[tuple[int, dict]]  # (line or item, {column: value})


class Columns(NamedTuple):
    caption: str
    video: str
    repeats: str | None = None


# ---------------------------------------------------------------- text


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


def refuse_blank(path, row: int, what: str, text: str) -> None:
    if not text.strip():
        token = ", or give --id_token, which then is the caption" if what == "caption" else ""
        raise DataError(f"{path}:{row}: blank {what}; fill it in or remove the row{token}")


# ---------------------------------------------------------------- tables


def read_table(path: Path, caption_column: str | None = None, video_column: str | None = None) -> Table:
    """The CSV, JSON list or JSON Lines at `path`; the columns, None if any usual name will do, tell a CSV's delimiter."""
    text = read_text(path)
    if path.suffix.lower() in (".json", ".jsonl"):
        return json_table(path, text)
    return csv_table(path, text, delimiter_of(text, caption_column, video_column))


def csv_table(path: Path, text: str, delimiter: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)  # keeps line endings inside
    try:
        lines = list(reader)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}; is a quote left open?") from error
    if len(lines) < 2:
        raise DataError(f"{path}: no rows below the header; {EXPECTED_LAYOUTS}")
    return Table(path, DELIMITERS[delimiter], lines[0], csv_rows(path, lines))


def csv_rows(path: Path, lines: list[list[str]]) -> Iterator[tuple[int, dict]]:
    header = lines[0]
    for row, fields in enumerate(lines[1:], start=2):
        if not fields:
            continue  # a blank line
        if len(fields) != len(header):
            raise DataError(
                f"{path}:{row}: {len(fields)} fields and {len(header)} columns; quote captions with commas"
            )
        yield row, dict(zip(header, fields, strict=True))


def delimiter_of(text: str, caption_column: str | None, video_column: str | None) -> str:
    """The one by which the header has both columns; if there is none, the one with the most columns."""
    headers = {delimiter: first_record(text, delimiter) for delimiter in DELIMITERS}
    for delimiter, header in headers.items():
        captions = named_like(header, caption_column, CAPTION_COLUMNS)
        if captions and named_like(header, video_column, VIDEO_COLUMNS):
            return delimiter
    return max(headers, key=lambda delimiter: len(headers[delimiter]))


def first_record(text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []  # quotes that only another delimiter makes sense of


def json_table(path: Path, text: str) -> Table:
    is_list = text.lstrip().startswith("[")
    items = list(enumerate(parse_json(path, text), start=1)) if is_list else json_lines(path, text)
    for row, item in items:
        if not isinstance(item, dict):
            raise DataError(f"{path}:{row}: not a JSON object with a video and a caption")
    if not items:
        raise DataError(f"{path}: no clips; {EXPECTED_LAYOUTS}")
    header = list(dict.fromkeys(key for _, item in items for key in item))
    return Table(path, "JSON list" if is_list else "JSON Lines", header, items)


def json_lines(path: Path, text: str) -> list[tuple[int, dict]]:
    lines = [(row, line) for row, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if lines and lines[0][1].strip() == "{":
        raise DataError(
            f"{path}: one JSON object over several lines; give a list of objects, [...], or one on each line"
        )
    return [(row, parse_json(path, line, row)) for row, line in lines]


def parse_json(path: Path, text: str, row: int = 0):
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{path}: JSON nested too deeply for a list of clips") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{row or error.lineno}: not JSON ({error.msg})") from error


# ---------------------------------------------------------------- columns


def choose_columns(table: Table, caption_column: str | None, video_column: str | None) -> Columns:
    """The columns given, or the one with a usual name; DataError if there is none, or several."""
    columns = []
    for name, usual, flag in (
        (caption_column, CAPTION_COLUMNS, "--caption_column"),
        (video_column, VIDEO_COLUMNS, "--video_column"),
    ):
        columns.append(find_column(table.path, table.header, name, flag) if name else usual_column(table, usual, flag))
    repeats = named_like(table.header, None, REPEATS_COLUMNS)
    return Columns(*columns, repeats[0] if repeats else None)


def named_like(header: list[str], name: str | None, usual: tuple[str, ...]) -> list[str]:
    """The columns called `name`, or without one those with a usual name, in any case."""
    return [column for column in header if (column == name if name else column.strip().lower() in usual)]


def usual_column(table: Table, usual: tuple[str, ...], flag: str) -> str:
    found = named_like(table.header, None, usual)
    if len(found) > 1:
        raise DataError(f"{table.path}: {' and '.join(found)} could both be meant; choose one with {flag}")
    if not found:
        raise DataError(
            f"{table.path}: none of its columns ({', '.join(table.header)}) is called {', '.join(usual[:-1])} or "
            f"{usual[-1]}; name the one meant with {flag}"
        )
    return found[0]


def find_column(path: Path, header: list[str], name: str, flag: str) -> str:
    if header.count(name) == 1:
        return name
    if name in header:
        raise DataError(f"{path}: column '{name}' ({flag}) is there {header.count(name)} times; rename all but one")
    near = difflib.get_close_matches(name, header, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise DataError(f"{path}: no column '{name}' ({flag}); columns: {', '.join(header)}{hint}")


# ---------------------------------------------------------------- rows


def table_rows(table: Table, columns: Columns, blank_captions: bool = False) -> list[Row]:
    """A row for each caption: a caption that is a list, as in MSR-VTT, gives one for each of its texts."""
    rows = []
    for row, item in table.rows:
        place = f"{table.path}:{row}"
        source, captions = text_in(place, item, columns.video), item.get(columns.caption)
        captions = captions or [""] if isinstance(captions, list) else [captions]
        repeats = repeats_in(place, item, columns.repeats)
        for caption in captions:
            caption = text_in(place, {columns.caption: caption}, columns.caption)
            if not blank_captions:
                refuse_blank(table.path, row, "caption", caption)
            refuse_blank(table.path, row, "video path", source)
            rows.append(Row(row, caption, source, str(table.path), repeats))
    if not rows:
        raise DataError(f"{table.path}: no rows below the header; {EXPECTED_LAYOUTS}")
    return rows


def text_in(place: str, item: dict, name: str) -> str:
    """A row's text; nothing and null are blank."""
    value = item.get(name)
    if not isinstance(value, str | None):
        raise DataError(f"{place}: '{name}' is {json.dumps(value)[:40]}, not a text")
    text = value or ""
    if SURROGATE.search(text):
        raise DataError(f"{place}: '{name}' holds half of a character (a lone surrogate, \\ud800 to \\udfff)")
    return text


def repeats_in(place: str, item: dict, name: str | None) -> int | None:
    """How often a row says that its clip is used per epoch; None if it does not say."""
    value = item.get(name) if name else None
    if value is None or value == "":
        return None
    digits = str(value).strip()
    if not re.fullmatch("[0-9]{1,5}", digits) or not 1 <= int(digits) <= MAX_REPEATS:
        raise DataError(f"{place}: {name} is {digits}; give an integer from 1 to {MAX_REPEATS}, or leave it empty")
    return int(digits)
