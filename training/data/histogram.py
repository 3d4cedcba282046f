"""Which clips each bucket gets, and what that costs them: cropped away, enlarged, or left out and why."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from data.buckets import Bucket, upscale
from data.headers import VideoInfo
from data.videos import MAX_UPSCALE, VideoDataset, cover_size


logger = logging.getLogger(__name__)

MAX_ROWS = 12  # of the table in the log; the buckets with fewer clips are summed up
# Phrase in a problem's line -> its name in the count of clips left out
REASONS = {
    "too short": "too short",
    "unknown bucket": "of no bucket's size",
    "would be enlarged": f"enlarged over {MAX_UPSCALE:g} times",
    "no such file": "missing",
    "not found in": "missing",
    "a folder in place of a video": "folders",
    "outside of": "outside of the data folder",
    "a URL or protocol": "URLs",
    "blank caption": "without a caption",
    "blank video path": "without a video path",
    "not UTF-8": "not UTF-8",
    "UTF-16": "not UTF-8",
}


# Phrases of what else may be wrong with a row of the list
IN_THE_LIST = (
    "not JSON", "not a JSON object", "not a text", "half of a character", "is a quote left open", "fields and",
    "give an integer", "a carriage return", "of one belongs to line",
)  # fmt: skip
REASONS |= dict.fromkeys(IN_THE_LIST, "wrong in the list")


class Row(NamedTuple):
    """One bucket; shares are of the resized picture's area, factors are linear."""

    bucket: Bucket
    num_clips: int
    cropped: float  # mean share
    max_cropped: float
    num_enlarged: int
    max_upscale: float


def cropped_share(info: VideoInfo, bucket: Bucket) -> float:
    """Share of the picture that is cropped away once it covers the bucket."""
    height, width = cover_size(info.height, info.width, bucket)
    return 1 - bucket.height * bucket.width / (height * width)


def count_buckets(clips: Iterable[tuple[VideoInfo, Bucket]]) -> list[Row]:
    """A row per used bucket, in the buckets' order."""
    infos: dict[Bucket, list[VideoInfo]] = {}
    for info, bucket in clips:
        infos.setdefault(bucket, []).append(info)
    return [make_row(bucket, infos[bucket]) for bucket in sorted(infos)]


def make_row(bucket: Bucket, infos: list[VideoInfo]) -> Row:
    shares = [cropped_share(info, bucket) for info in infos]
    factors = [upscale(info.height, info.width, bucket) for info in infos]
    num_enlarged = sum(factor > 1 for factor in factors)
    return Row(bucket, len(infos), sum(shares) / len(infos), max(shares), num_enlarged, max(factors))


def count_reasons(problems: Iterable[str]) -> Counter[str]:
    """{why clips are left out: how many}, from the lines that describe them."""
    return Counter(reason_of(line) for line in problems)


def reason_of(line: str) -> str:
    return next((name for phrase, name in REASONS.items() if phrase in line), "unreadable")


# ---------------------------------------------------------------- in the log


def log_buckets(videos: VideoDataset, data: str) -> None:
    """Log the table: before any model is loaded, so that wrong sizes cost seconds."""
    rows = count_buckets(zip(videos.infos, videos.clip_buckets, strict=True))
    logger.info("%s: buckets, frames x height x width:\n%s", data, table(rows, videos.problems))


def table(rows: list[Row], problems: list[str]) -> str:
    """One line per bucket, then one for the clips left out."""
    largest = sorted(rows, key=lambda row: -row.num_clips)[:MAX_ROWS]
    shown = [row for row in rows if row in largest]
    total = sum(row.num_clips for row in rows) + len(problems)
    lines = [f"{'bucket':15} {'clips':>7} {'':>5}  {'cropped away':21} enlarged"]
    lines += [line_of(name(row.bucket), row.num_clips, total, f"{cropped(row):21} {enlarged(row)}") for row in shown]
    if hidden := len(rows) - len(shown):
        rest = sum(row.num_clips for row in rows) - sum(row.num_clips for row in shown)
        lines.append(line_of(f"{hidden} more", rest, total, ""))
    if problems:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(problems).most_common())
        lines.append(line_of("left out", len(problems), total, reasons))
    return "\n".join(line.rstrip() for line in lines)


def name(bucket: Bucket) -> str:
    return "x".join(map(str, bucket))


def line_of(title: str, num_clips: int, total: int, words: str) -> str:
    return f"{title:15} {num_clips:>7} {num_clips / total:>5.0%}  {words}"


def cropped(row: Row) -> str:
    return f"{row.cropped:.0%}, up to {row.max_cropped:.0%}" if row.max_cropped >= 0.005 else "nothing"


def enlarged(row: Row) -> str:
    return f"{row.num_enlarged}, up to {row.max_upscale:.1f} times" if row.num_enlarged else "none"
