"""Turns what a check found into one HTML page that needs neither network nor server.

Style and script are in report_page.html. Counts and tables are written as HTML here; clips go into the page as JSON,
and the script makes HTML of those in view only. All text from the data set is escaped: it may come from anywhere.
"""

import base64
import bisect
import html
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.histogram import count_buckets, count_reasons, cropped, enlarged, name


TEMPLATE = Path(__file__).with_suffix(".html")
SECONDS_STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 60, 120, 300, 600)  # upper ends of the bars
TOKENS_STEPS = (8, 16, 32, 64, 96, 128, 160, 192, 226)


def page(settings: dict[str, str], reports: Sequence, faults: list[str], most_tokens: int) -> Iterator[str]:
    """Yield the page's text in pieces: thumbnails of 10,000 clips take 40 MB."""
    start, middle, end = TEMPLATE.read_text(encoding="utf-8").split("<!-- filled in -->")
    yield start
    yield from summary(settings, reports, faults, most_tokens)
    yield middle
    yield from clips_as_json(reports)
    yield end


def summary(settings: dict[str, str], reports: Sequence, faults: list[str], most_tokens: int) -> Iterator[str]:
    given = " · ".join(f"{escaped(key)}: <b>{escaped(value)}</b>" for key, value in settings.items() if value)
    yield f"<p class='settings'>{given}</p>\n"
    for fault in faults:
        yield f"<p class='fault'>{escaped(fault)}</p>\n"
    yield figures(reports)
    yield "<div class='panels'>\n"
    yield bucket_table([report for report in reports if report.bucket and not report.problem])
    reasons = count_reasons(report.problem for report in reports if report.problem).most_common()
    yield bar_table("Left out", "reasons", reasons)
    seconds = [report.info.num_frames / report.info.fps for report in reports if report.info]
    yield bars("Length", "seconds", seconds, SECONDS_STEPS)
    tokens = [report.num_tokens for report in reports if report.num_tokens is not None]
    steps = sorted({*(step for step in TOKENS_STEPS if step < most_tokens), most_tokens, 2 * most_tokens})
    yield bars("Captions", f"T5 tokens, {most_tokens} are read", tokens, steps)
    yield "</div>\n"


def escaped(text) -> str:
    return html.escape(str(text))


def figures(reports: Sequence) -> str:
    """The large numbers at the top."""
    bad = sum(bool(report.problem) for report in reports)
    seconds = sum(report.info.num_frames / report.info.fps for report in reports if report.info)
    captions = len({report.caption for report in reports})
    noted = sum(bool(report.notes) and not report.problem for report in reports)
    values = [
        (len(reports), "clips listed", ""), (len(reports) - bad, "usable", "good"), (bad, "left out", "bad" if bad else ""),
        (noted, "worth a look", "warn" if noted else ""), (duration(seconds), "in all", ""),
        (captions, "different captions", ""),
    ]  # fmt: skip
    cells = (f"<div class='{kind}'><b>{value}</b>{label}</div>" for value, label, kind in values)
    return f"<div class='figures'>{''.join(cells)}</div>\n"


def duration(seconds: float) -> str:
    """`48 s`, `12 min` or `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def bucket_table(reports: Sequence) -> str:
    buckets = count_buckets((report.info, report.bucket) for report in reports)
    most = max((row.num_clips for row in buckets), default=1)
    rows = "".join(
        f"<tr><td>{name(row.bucket)}<td class='bar'><i style='width:{100 * row.num_clips / most:.1f}%'></i>"
        f"<td>{row.num_clips}<td>{cropped(row)}<td>{enlarged(row)}\n"
        for row in buckets
    )
    head = "<tr><th>frames x height x width<th><th>clips<th>cropped away<th>enlarged\n"
    return f"<section><h2>Buckets</h2><table>{head}{rows}</table></section>\n" if buckets else ""


def bars(title: str, unit: str, values: list[float], steps: Sequence[float]) -> str:
    """A histogram; each bar counts the values above the previous step and up to its own."""
    if not values:
        return ""
    counts = Counter(bisect.bisect_left(steps, value) for value in values)
    labels = [
        f"up to {steps[0]}",
        *(f"{low} to {high}" for low, high in itertools.pairwise(steps)),
        f"over {steps[-1]}",
    ]
    used = range(min(counts), max(counts) + 1)
    return bar_table(title, unit, [(labels[place], counts[place]) for place in used])


def bar_table(title: str, unit: str, counts: list[tuple[str, int]]) -> str:
    most = max((count for _, count in counts), default=0)
    rows = "".join(
        f"<tr><td>{label}<td class='bar'><i style='width:{100 * count / most:.1f}%'></i><td>{count}\n"
        for label, count in counts
    )
    head = f"<h2>{title} <small>{unit}</small></h2>"
    return f"<section>{head}<table>{rows}</table></section>\n" if counts else ""


# ---------------------------------------------------------------- clips


def clips_as_json(reports: Sequence) -> Iterator[str]:
    """A list of objects, one a line. No `<`: it could end the script element around it."""
    places = {report.pictures: number for number, report in enumerate(reports) if report.strip}
    yield "["
    for number, report in enumerate(reports):
        clip = clip_as_dict(report) | {"frames_of": places.get(report.pictures)}  # a file's pictures are written once
        text = json.dumps(clip, separators=(",", ":"))  # ASCII: paths may hold broken characters
        yield f"{',' if number else ''}\n{text}".replace("<", "\\u003c")
    yield "\n]"


def clip_as_dict(report) -> dict:
    clip = {"row": report.row, "path": report.source, "caption": report.caption, "problem": report.problem}
    clip |= {"notes": report.notes, "tokens": report.num_tokens}
    if report.info:
        frames, fps, height, width = report.info
        clip |= {
            "size": f"{height}x{width}", "frames": frames, "fps": round(fps, 2), "seconds": round(frames / fps, 2),
            "bucket": name(report.bucket), "cropped": round(report.cropped, 3), "upscale": round(report.upscale, 2),
        }  # fmt: skip
    if report.strip:
        clip["strip"] = base64.b64encode(report.strip).decode("ascii")
    return clip
