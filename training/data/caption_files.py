"""What captioning keeps in its output folder: every answer at once, and the lists that training reads.

captions.jsonl only grows, by a line per answer, keyed by the video's content, the model and the question. prompts.txt
with videos.txt, and metadata.jsonl, say the same twice; captions that were edited in either are never written over.
A hidden record of what was written tells an edited caption from an old one.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

from base.errors import DataError, UsageError, first_few
from base.files import flush_descriptor, to_json, written_beside
from data.clip_lists import Clip, draw_keys, unique_stems
from data.layouts import read_text_rows
from data.tables import Columns, read_table, table_rows


logger = logging.getLogger(__name__)

ANSWERS, RECORD = "captions.jsonl", ".captions.json"
PROMPTS, VIDEOS, METADATA = "prompts.txt", "videos.txt", "metadata.jsonl"
COLUMNS = Columns("text", "file_name")  # of metadata.jsonl, as the Hub names them
OWN_FILES = {ANSWERS, PROMPTS, VIDEOS, METADATA, "status.json", "errors.log"}


class Key(NamedTuple):
    """What an answer depends on; `settings`: hash of the question and of what is shown."""

    content: str
    model: str
    settings: str


def text_hash(*texts) -> str:
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).hexdigest()


# ---------------------------------------------------------------- answers


class AnswerFile:
    """The captions that a model gave, by key. A line is on the disk before its clip counts as answered."""

    def __init__(self, folder: Path):
        self.path = folder / ANSWERS
        data = self.path.read_bytes() if self.path.exists() else b""
        self.known: dict[Key, str] = dict(filter(None, map(answer_in, data.split(b"\n"))))
        self.descriptor: int | None = None

    def keep(self, key: Key, caption: str, clip: str) -> None:
        self.known[key] = caption
        line = json.dumps({"clip": clip, "caption": caption, **key._asdict()}, ensure_ascii=False)
        self.write(f"{line}\n".encode())

    def write(self, rest: bytes) -> None:
        if self.descriptor is None:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            rest = b"\n" * self.is_torn() + rest
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]
        flush_descriptor(self.descriptor)

    def is_torn(self) -> bool:
        """Whether a killed process left half a line at the end, which stays and is never read."""
        size = os.fstat(self.descriptor).st_size
        return size > 0 and os.pread(self.descriptor, 1, size - 1) != b"\n"

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def answer_in(line: bytes) -> tuple[Key, str] | None:
    """(key, caption) of a line; None for a torn one, or another's."""
    try:
        entry = json.loads(line)
        values = [entry[name] for name in (*Key._fields, "caption")]
    except (ValueError, KeyError, TypeError):
        return None
    return (Key(*values[:3]), values[3]) if all(isinstance(value, str) for value in values) else None


# ---------------------------------------------------------------- the lists


def read_edits(folder: Path) -> dict[str, str]:
    """{place: caption} of every listed caption that is not as it was written, a place being an entry of `draw_keys`.

    One that was emptied is asked for anew. DataError where two edits disagree.
    """
    record = read_record(folder)
    written, edits = record["captions"], {}
    for rows in read_lists(folder, record["unfinished"]):
        for place, row in zip(draw_keys(row.source for row in rows), rows, strict=True):
            if not row.prompt.strip() or text_hash(row.prompt) in written.get(place, ()):
                continue
            if edits.setdefault(place, row.prompt) != row.prompt:
                raise DataError(
                    f"{folder}: {row.source} was edited in {PROMPTS} and, in other words, in {METADATA}; "
                    "write the same into both"
                )
    return record["edits"] | edits


def read_lists(folder: Path, unfinished: str | None) -> list[list]:
    """The rows of metadata.jsonl and of the two text files, as far as they are there.

    `unfinished`: the hash of the metadata.jsonl that a killed process was writing. If that is in place, the text files,
    which follow it, may belong together no more; what was edited there is in it.
    """
    found, metadata, pair = [], folder / METADATA, (folder / PROMPTS, folder / VIDEOS)
    if metadata.is_file():
        found.append(table_rows(read_table(metadata, *COLUMNS[:2]), COLUMNS, blank_captions=True))
    is_newer = unfinished and metadata.is_file() and text_hash(metadata.read_text(encoding="utf-8")) == unfinished
    if all(path.is_file() for path in pair) and not is_newer:
        found.append(read_text_rows(folder, PROMPTS, VIDEOS, blank_captions=True))
    return found


def read_record(folder: Path) -> dict:
    """{"captions": {place: hashes of what was written there}, "edits": {place: caption} of clips that are not listed now,
    "unfinished": see `read_lists`}; empty if damaged: every caption then counts as edited.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        captions, edits = dict(record["captions"]), dict(record["edits"])
    except (OSError, ValueError, KeyError, TypeError):
        return {"captions": {}, "edits": {}, "unfinished": None}
    return {"captions": captions, "edits": edits, "unfinished": record.get("unfinished")}


def has_own_lists(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def refuse_other_lists(folder: Path) -> None:
    """UsageError for a folder whose lists captioning did not write."""
    others = [name for name in (PROMPTS, VIDEOS, METADATA) if (folder / name).exists()]
    if others and not has_own_lists(folder):
        raise UsageError(
            f"{folder}: {' and '.join(others)} there is not of this script ({RECORD} is missing) and is not written over; "
            "give another --output_dir"
        )


def write_lists(folder: Path, rows: list[tuple[str, str]], edits: dict[str, str]) -> None:
    """Write (name, caption) of every clip into both lists. Killed in between, `read_edits` finds no edit in them."""
    places = draw_keys(name for name, _ in rows)
    new = {place: [text_hash(caption)] for place, (_, caption) in zip(places, rows, strict=True)}
    # An edited caption stays one: the record lacks it
    new = {place: hashes for place, hashes in new.items() if place not in edits}
    old = read_record(folder)["captions"]
    both = {place: [*new.get(place, []), *old.get(place, [])] for place in new | old}
    unlisted = {place: caption for place, caption in edits.items() if place not in set(places)}
    lines = [json.dumps(dict(zip(("file_name", "text"), row, strict=True)), ensure_ascii=False) for row in rows]
    metadata = "".join(f"{line}\n" for line in lines)
    record = {"captions": both, "edits": unlisted, "unfinished": text_hash(metadata)}
    write_durably(folder / RECORD, to_json(record))
    write_durably(folder / METADATA, metadata)
    write_durably(folder / VIDEOS, "".join(f"{name}\n" for name, _ in rows))
    write_durably(folder / PROMPTS, "".join(f"{caption}\n" for _, caption in rows))
    write_durably(folder / RECORD, to_json({"captions": new, "edits": unlisted}))


def write_durably(path: Path, text: str) -> None:
    with written_beside(path, durable=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def one_line(caption: str) -> str:
    """A caption as a line of prompts.txt; T5 reads line breaks as spaces anyway."""
    return " ".join(caption.split()) if "\n" in caption or "\r" in caption else caption


# ---------------------------------------------------------------- the clips, beside their lists


def names_in(clips: list[Clip], is_in_place: bool) -> list[str]:
    """The path below the output folder under which each clip is listed: as before, unless that leads out."""
    stems = unique_stems(clip.stable_name for clip in clips)
    names = []
    for clip, stem in zip(clips, stems, strict=True):
        name = os.path.normpath(clip.stable_name)
        leads_out = os.path.isabs(name) or name.split(os.sep)[0] == os.pardir
        names.append(f"videos/{stem}{clip.video.suffix}" if leads_out and not is_in_place else name)
    return names


def link_clips(clips: list[Clip], names: list[str], folder: Path) -> None:
    """Put a hard link of each clip into `folder`, or where the disk has none a symbolic one, with a warning."""
    symbolic, is_own = [], has_own_lists(folder)
    for clip, name in zip(clips, names, strict=True):
        target = folder / name
        if target.exists() and target.samefile(clip.video):
            continue
        if target.exists() and not is_own:
            raise UsageError(f"{target}: is there already, and is not {clip.video}; give an empty --output_dir")
        with written_beside(target) as temporary:
            try:
                os.link(os.path.realpath(clip.video), temporary)
            except OSError as error:
                os.symlink(os.path.realpath(clip.video), temporary)
                symbolic.append((name, error.strerror))
    if symbolic:
        logger.warning(
            "%d clips are symbolic links, for lack of hard ones (%s), and are read with --allow_outside_root only: %s",
            len(symbolic), symbolic[0][1], first_few([name for name, _ in symbolic]),
        )  # fmt: skip
