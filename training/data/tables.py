"""Reads the files that list clips: lines of text, CSV, JSON; captions are kept exactly as written.

Reading stops at the first fault, unless a list to `collect` faults in is passed: then each row goes there that cannot
be read, and the others are read.
"""

import contextlib
import csv
import difflib
import io
import json
import re
from collections.abc import Iterator
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
CONVERT = "convert it, for example: iconv -f CP1252 -t UTF-8"
DELIMITERS = {",": "CSV", ";": "CSV with semicolons", "\t": "CSV with tabs"}


class Row(NamedTuple):
    """One caption of one video; `listing`: the file that names them, if not the one of all rows."""

    row: int
    prompt: str
    source: str
    listing: str = ""
    repeats: int | None = None


class Table(NamedTuple):
    """A listing with named columns."""

    path: Path
    kind: str
    header: list[str]
    rows: list[tuple[int, list[str] | dict]]  # (line or item, its fields or {column: value})


class Columns(NamedTuple):
    caption: str
    video: str
    repeats: str | None = None


@contextlib.contextmanager
def collect(refused: list | None, item) -> Iterator[None]:
    """Put a DataError of the body into `refused`, if that is a list, as (item, what is wrong with it)."""
    try:
        yield
    except DataError as error:
        if refused is None:
            raise
        refused.append((item, str(error)))


# ---------------------------------------------------------------- text


def read_lines(path: Path, refused: list[tuple[int, str]] | None = None) -> list[str]:
    """Lines without \\n or \\r\\n; no other character ends a line (captions may contain U+2028).

    Lines in `refused` are returned all the same, so that the others keep their numbers.
    """
    text = read_text(path, refused is not None).replace("\r\n", "\n")
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for row, line in enumerate(lines if "\r" in text or SURROGATE.search(text) else [], start=1):
        with collect(refused, row):
            refuse_undecoded(f"{path}:{row}", line)
            if "\r" in line:
                raise DataError(
                    f"{path}:{row}: a carriage return without a newline; save with \\n or \\r\\n line endings"
                )
    return lines


def read_text(path: Path, lenient: bool = False) -> str:
    """UTF-8 text, with or without a byte order mark; line endings unchanged. `lenient`: other bytes become surrogates,
    for `refuse_undecoded`.
    """
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
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape" if lenient else "strict")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, offset) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 at byte offset {offset} (0x{data[offset]:02x}); {CONVERT}"
        ) from error


def refuse_undecoded(place: str, text: str) -> None:
    """Raise DataError for a piece of a text that was read leniently, if some bytes of it are not UTF-8."""
    if not text.isascii() and (bad := SURROGATE.search(text)):
        raise DataError(f"{place}: not UTF-8 (0x{ord(bad[0]) & 0xFF:02x}); {CONVERT}")


def printable(row: Row) -> Row:
    """A refused row whose caption and path are texts that can be shown, empty where they are none."""
    texts = (SURROGATE.sub("\ufffd", text) if isinstance(text, str) else "" for text in (row.prompt, row.source))
    return Row(row.row, *texts, row.listing, row.repeats)


def refuse_blank(path, row: int, what: str, text: str) -> None:
    if not text.strip():
        token = ", or give --id_token, which then is the caption" if what == "caption" else ""
        raise DataError(f"{path}:{row}: blank {what}; fill it in or remove the row{token}")


# ---------------------------------------------------------------- tables


def read_table(
    path: Path, caption_column: str | None = None, video_column: str | None = None, refused: list | None = None
) -> Table:
    """The CSV, JSON list or JSON Lines at `path`; the columns, None if any usual name will do, tell a CSV's delimiter.

    `refused`: records that are no rows at all are put there with the reason; `table_rows` does so with the others.
    """
    text = read_text(path, refused is not None)
    if path.suffix.lower() in (".json", ".jsonl"):
        return json_table(path, text, refused)
    return csv_table(path, text, delimiter_of(text, caption_column, video_column), refused)


def csv_table(path: Path, text: str, delimiter: str, refused: list | None = None) -> Table:
    records = list(csv_records(path, text, delimiter, refused))
    if len(records) + len(refused or ()) < 2:
        raise DataError(f"{path}: no rows below the header; {EXPECTED_LAYOUTS}")
    refuse_undecoded(f"{path}:1", "".join(records[0][1]))
    rows = [record for record in records[1:] if record[1]]  # without blank lines
    return Table(path, DELIMITERS[delimiter], records[0][1], rows)


def csv_records(path: Path, text: str, delimiter: str, refused: list | None) -> Iterator[tuple[int, list[str]]]:
    """(row, fields), the header's row first. After a refused record reading goes on at the next line: a quote left
    open takes no other row with it.
    """
    lines, start, row = io.StringIO(text, newline="").readlines(), 0, 0  # line endings inside of quotes stay
    while start < len(lines):
        reader, end = csv.reader(lines[start:], delimiter=delimiter, strict=True), 0
        try:
            for fields in reader:
                row, end = row + 1, reader.line_num
                yield row, fields
            return
        except csv.Error as error:
            with collect(refused if row else None, Row(row + 1, "", "", str(path))):
                line = start + reader.line_num
                raise DataError(f"{path}: line {line}: {error}; is a quote left open?") from error
        row, start = row + 1, start + end + 1


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


def json_table(path: Path, text: str, refused: list | None = None) -> Table:
    is_list = text.lstrip().startswith("[")
    items = list(enumerate(parse_json(path, text), start=1)) if is_list else json_lines(path, text, refused)
    undecoded, rows = is_list and SURROGATE.search(text), []
    for row, item in items:
        with collect(refused, Row(row, "", "", str(path))):
            if undecoded:
                refuse_undecoded(f"{path}:{row}", json.dumps(item, ensure_ascii=False))
            if not isinstance(item, dict):
                raise DataError(f"{path}:{row}: not a JSON object with a video and a caption")
            rows.append((row, item))
    if not (rows or refused):
        raise DataError(f"{path}: no clips; {EXPECTED_LAYOUTS}")
    header = list(dict.fromkeys(key for _, item in rows for key in item))
    return Table(path, "JSON list" if is_list else "JSON Lines", header, rows)


def json_lines(path: Path, text: str, refused: list | None) -> list[tuple[int, dict]]:
    lines = [(row, line) for row, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if lines and lines[0][1].strip() == "{":
        raise DataError(
            f"{path}: one JSON object over several lines; give a list of objects, [...], or one on each line"
        )
    items = []
    for row, line in lines:
        with collect(refused, Row(row, "", "", str(path))):
            refuse_undecoded(f"{path}:{row}", line)
            items.append((row, parse_json(path, line, row)))
    return items


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


def table_rows(
    table: Table, columns: Columns, blank_captions: bool = False, refused: list[tuple[Row, str]] | None = None
) -> list[Row]:
    """A row for each caption: a caption that is a list, as in MSR-VTT, gives one for each of its texts."""
    rows = []
    for row, record in table.rows:
        known = record if isinstance(record, dict) else dict(zip(table.header, record, strict=False))
        with collect(refused, Row(row, known.get(columns.caption), known.get(columns.video), str(table.path))):
            rows += record_rows(table, columns, row, record, blank_captions)
    if not (rows or refused):
        raise DataError(f"{table.path}: no rows below the header; {EXPECTED_LAYOUTS}")
    return rows


def record_rows(table: Table, columns: Columns, row: int, record: list[str] | dict, blank_captions: bool) -> list[Row]:
    place, rows = f"{table.path}:{row}", []
    item = record if isinstance(record, dict) else fields_by_column(place, table.header, record)
    source, captions = text_in(place, item, columns.video), item.get(columns.caption)
    captions = captions or [""] if isinstance(captions, list) else [captions]
    repeats = repeats_in(place, item, columns.repeats)
    for caption in captions:
        caption = text_in(place, {columns.caption: caption}, columns.caption)
        if not blank_captions:
            refuse_blank(table.path, row, "caption", caption)
        refuse_blank(table.path, row, "video path", source)
        rows.append(Row(row, caption, source, str(table.path), repeats))
    return rows


def fields_by_column(place: str, header: list[str], fields: list[str]) -> dict[str, str]:
    refuse_undecoded(place, "".join(fields))
    if len(fields) != len(header):
        raise DataError(f"{place}: {len(fields)} fields and {len(header)} columns; quote captions with commas")
    return dict(zip(header, fields, strict=True))


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
