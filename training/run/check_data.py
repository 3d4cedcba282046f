"""prepare_dataset.py --check: reads every row and samples every clip, and writes what it found as one HTML page.

Every fault is reported at once, where preparing and training would stop at the first list that is wrong. A clip's
frames are cut as they are for epoch 0, which is what preparing encodes.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from base.bars import progress
from base.errors import ERROR_LOG_VARIABLE, DataError, Interrupted, UsageError, first_few
from base.files import file_hash, written_beside
from base.hashes import sampled_hash
from base.signals import INTERRUPTION
from base.status import THIS_RUN
from data.buckets import Bucket, frame_times, upscale
from data.clip_lists import Clip, windowed, with_id_token
from data.dataset import read_clips_from_args, tolerant_videos_from_args
from data.decode import read_frames
from data.headers import VideoInfo
from data.histogram import cropped_share
from data.loader import make_loader
from data.videos import WARN_UPSCALE, VideoDataset
from run import report_page


logger = logging.getLogger(__name__)

PAGE = "dataset_report.html"
WARN_CROPPED = 0.25  # share of the picture
NO_CAPTION = "blank caption; write one or remove the row, or give --id_token, which then is the caption"
CLIPS_PER_TASK = 16  # sent to a worker at once
# Longest side of a thumbnail in pixels, by the number of clips: 10,000 clips are a page of some 30 MB
SMALL_SIDE, LARGE_SIDE, MANY_CLIPS = 80, 128, 1000
JPEG_QUALITY = 60  # WebP would be no smaller at this size, and takes 2 ms a clip, not 0.3
TEXTS_AT_ONCE = 1000
FOUND = ("strip", "digest", "problem")  # by ClipSamples


@dataclass
class ClipReport:
    """What is known about one row of the list; `problem`: why the clip is left out, empty for a usable one."""

    row: int
    source: str
    caption: str
    path: str  # of the file, however it is written in the list
    window: int | None = None
    problem: str = ""
    notes: dict[str, str] = field(default_factory=dict)  # kind -> details; the clip is used all the same
    info: VideoInfo | None = None
    bucket: Bucket | None = None
    cropped: float = 0.0  # share of the picture
    upscale: float = 0.0  # linear
    num_tokens: int | None = None
    strip: bytes = b""  # JPEG: first, middle and last frame, side by side; on the first row of a file
    digest: str = ""

    @property
    def pictures(self) -> tuple[str, int | None]:
        """Equal for rows that show the same frames."""
        return self.path, self.window


def check(args, default_fps: float, model_dir: Path | None) -> None:
    """Write the page; DataError if a clip cannot be used. `model_dir`: where the tokenizer is, None without one.

    No lock, and no status of its own: the page is the one file written, under a name that nothing else uses and in
    one rename. So the folder may be one that is being prepared or trained in, and stays as it was for both.
    """
    THIS_RUN.writes_status = False
    os.environ.pop(ERROR_LOG_VARIABLE, None)  # tracebacks go to the system's temporary folder
    clips, rows, faults = read_list(args)
    videos = None
    if clips:
        videos = tolerant_videos_from_args(args, clips, default_fps)
        samples = describe_samples(videos)
        sample_clips(args, videos, samples)
        note_same_content(samples)
        rows += samples + describe_unused(clips, videos)
    if not args.id_token:
        for report in rows:
            if not report.caption.strip():
                report.problem = report.problem or NO_CAPTION
    note_captions(args, rows, model_dir)
    rows.sort(key=lambda row: row.row)
    page = Path(args.output_dir, PAGE)
    write_page(page, args, videos, rows, faults)
    conclude(page, rows, faults)


def read_list(args) -> tuple[list[Clip], list[ClipReport], list[str]]:
    """(clips whose file is there, rows that cannot be used, faults of the list as a whole)."""
    refused: list[tuple[Clip, str]] = []
    try:
        clips = read_clips_from_args(args, refused)
    except DataError as error:
        return [], [], [str(error)]
    return clips, [make_report(clip, problem) for clip, problem in refused], []


def make_report(clip: Clip, problem: str = "") -> ClipReport:
    source = windowed(clip.source, clip.window)
    return ClipReport(clip.row, source, clip.prompt, str(clip.video), clip.window, problem)


def describe_samples(videos: VideoDataset) -> list[ClipReport]:
    """A report per sample of the data set, in its order, from the headers."""
    reports = [make_report(clip) for clip in videos.clips]
    rows = zip(reports, videos.infos, videos.clip_buckets, videos.cautions, strict=True)
    for report, info, bucket, cautions in rows:
        report.info, report.bucket = info, bucket
        report.cropped = cropped_share(info, bucket)
        report.upscale = upscale(info.height, info.width, bucket)
        if cautions:
            report.notes["other colours or shape"] = "; ".join(caution.what for caution in cautions)
        if info.fps < 0.99 * videos.fps:
            report.notes["repeats frames"] = f"{info.fps:.4g} frames per second, sampled at {videos.fps:g}"
        if report.upscale > WARN_UPSCALE:
            report.notes["soft"] = f"enlarged {report.upscale:.1f} times"
        if report.cropped > WARN_CROPPED:
            report.notes["much cropped"] = f"{report.cropped:.0%} of the picture is cut off"
    return reports


def describe_unused(clips: list[Clip], videos: VideoDataset) -> list[ClipReport]:
    """A report per clip that the data set leaves out, with the reason: its lines are `path: what is wrong`."""
    used = {clip._replace(window=None) for clip in videos.clips}
    reports = [make_report(clip) for clip in clips if clip not in used]
    by_path: dict[str, list[ClipReport]] = {}
    for report in reports:
        by_path.setdefault(report.path, []).append(report)
    for line in videos.problems:
        parts = line.split(": ")  # a path may hold that too
        ends = (": ".join(parts[:number]) for number in range(len(parts), 0, -1))
        path = next(end for end in ends if end in by_path)
        for report in by_path[path]:
            report.problem = line.removeprefix(f"{path}: ")
    return reports


# ---------------------------------------------------------------- frames


class ClipSamples(Dataset):
    """Per clip its strip of frames and a hash of its content, or what is wrong with it."""

    def __init__(self, videos: VideoDataset, side: int):
        self.videos, self.side = videos, side

    def __getitem__(self, index: int) -> dict:
        path, strip, digest, problem = self.videos.clips[index].video, b"", "", ""
        try:
            strip = make_strip(sampled_frames(self.videos, index), self.side)
            digest = sampled_hash(path)
        except DataError as error:
            problem = str(error).removeprefix(f"{path}: ")
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        return {"index": index, "strip": strip, "digest": digest, "problem": problem}


def sampled_frames(videos: VideoDataset, index: int) -> torch.Tensor:
    """First, middle and last frame of the clip in epoch 0, uint8 [3, 3, h, w].

    All in one pass, from the start of the sample: for 6 s of video a seek to each would decode more, since it begins
    at a key frame, and it would miss damage in between.
    """
    bucket, path = videos.clip_buckets[index], videos.clips[index].video
    times = frame_times(bucket.frames, videos.fps, videos.start_time(0, index))
    times = [times[place] for place in sorted({0, bucket.frames // 2, bucket.frames - 1})]
    frames = read_frames(path, times, videos.backend, num_threads=1)
    if frames.shape[1:3] != videos.infos[index][2:]:
        raise videos.size_error(index, *frames.shape[1:3])
    pixels = videos.reshape(torch.from_numpy(frames).permute(0, 3, 1, 2), bucket, 0, index)
    is_mirrored = videos.draw("flip", 0, index).random() < videos.random_flip
    return pixels.flip(-1) if is_mirrored else pixels


def make_strip(pixels: torch.Tensor, side: int) -> bytes:
    """The frames [N, 3, h, w] side by side as a JPEG, each at most `side` high and wide."""
    height, width = pixels.shape[-2:]
    scale = min(1, side / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)  # in a quarter of Pillow's time
    frames = small.permute(2, 0, 3, 1)  # h, N, w, 3
    file = BytesIO()
    Image.fromarray(frames.reshape(size[0], -1, 3).numpy()).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def sample_clips(args, videos: VideoDataset, samples: list[ClipReport]) -> None:
    """Sets strip, digest and problem of `samples`, from their frames; those of a file listed twice are read once."""
    first: dict[tuple, int] = {}
    for index, report in enumerate(samples):
        first.setdefault(report.pictures, index)
    indices = list(first.values())
    tasks = [indices[start : start + CLIPS_PER_TASK] for start in range(0, len(indices), CLIPS_PER_TASK)]
    side = SMALL_SIDE if len(indices) > MANY_CLIPS else LARGE_SIDE
    loader = make_loader(ClipSamples(videos, side), tasks, num_workers(args))
    with progress(len(indices), "clips") as bar:
        for batch in INTERRUPTION.until_interrupted(loader):
            for place, index in enumerate(batch["index"]):
                report = samples[index]
                report.strip, report.digest, report.problem = (batch[key][place] for key in FOUND)
            bar.update(len(batch["index"]))
    if INTERRUPTION.reason:
        raise Interrupted(f"stopped by {INTERRUPTION.reason}; no page was written")
    for report in samples:
        report.problem = samples[first[report.pictures]].problem


def num_workers(args) -> int:
    """One process per core, unless --dataloader_num_workers is given."""
    return args.dataloader_num_workers if "dataloader_num_workers" in args.given else len(os.sched_getaffinity(0))


def note_same_content(reports: list[ClipReport]) -> None:
    """Note files that are copies of one another, each on its first row."""
    files = {report.path: report for report in reversed(reports)}
    for alike in groups_of(reversed(files.values()), lambda report: report.digest):
        for same in groups_of(alike, lambda report: file_hash(Path(report.path))):  # of all bytes: seldom needed
            note_group(same, "same content")


def groups_of(reports: Iterable[ClipReport], key: Callable[[ClipReport], str]) -> Iterator[list[ClipReport]]:
    """Reports with equal keys, in groups of two or more; an empty key belongs to none."""
    groups: dict[str, list[ClipReport]] = {}
    for report in reports:
        groups.setdefault(key(report), []).append(report)
    groups.pop("", None)
    return (group for group in groups.values() if len(group) > 1)


def note_group(group: list[ClipReport], kind: str) -> None:
    """Note on each what it equals: the first of its group, and the first is told of the second."""
    for report in group:
        other = group[1] if report is group[0] else group[0]
        more = f", {len(group)} in all" if len(group) > 2 else ""
        report.notes[kind] = f"as {other.source} (row {other.row}){more}"


# ---------------------------------------------------------------- captions


def note_captions(args, rows: list[ClipReport], model_dir: Path | None) -> None:
    """Note equal captions; with a tokenizer set num_tokens, and note what T5 cannot read or is cut off."""
    for same in groups_of(rows, lambda report: report.caption.strip()):
        note_group(same, "same caption")
    if model_dir is None:
        return
    tokenizer = AutoTokenizer.from_pretrained(model_dir, subfolder="tokenizer")
    unknown_token = tokenizer.unk_token_id  # looked up in vain for each token, it takes as long as the tokens
    for first in range(0, len(rows), TEXTS_AT_ONCE):
        some = rows[first : first + TEXTS_AT_ONCE]
        texts = [with_id_token(report.caption, args.id_token) for report in some]
        encoded = tokenizer(texts, return_offsets_mapping=True, verbose=False)
        for report, text, ids, places in zip(some, texts, encoded.input_ids, encoded.offset_mapping, strict=True):
            report.num_tokens = len(ids)
            unread = [place for token, place in zip(ids, places, strict=True) if token == unknown_token]
            unknown = [text[start:end] for start, end in unread]
            if unknown:
                report.notes["unknown tokens"] = f"{len(unknown)}: {first_few(list(dict.fromkeys(unknown)))}"
            if len(ids) > args.max_sequence_length:
                report.notes["caption cut"] = f"{len(ids)} tokens, {args.max_sequence_length} are read"


# ---------------------------------------------------------------- result


def write_page(path: Path, args, videos: VideoDataset | None, rows: list[ClipReport], faults: list[str]) -> None:
    if path.is_dir():
        raise UsageError(f"{path}: a folder; the page is written under that name")
    settings = {
        "data": args.dataset_file or args.data_root,
        "model": args.model_id,
        "frames per second": f"{videos.fps:g}" if videos else "",
        "reshape mode": args.video_reshape_mode or "center",
    }
    with written_beside(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(report_page.page(settings, rows, faults, args.max_sequence_length))


def conclude(page: Path, rows: list[ClipReport], faults: list[str]) -> None:
    """Log the result; DataError if anything must be put right before training."""
    bad = [report for report in rows if report.problem]
    notes = Counter(kind for report in rows for kind in report.notes)
    logger.info("%d clips listed, %d usable, %d left out", len(rows), len(rows) - len(bad), len(bad))
    if notes:
        logger.info("worth a look: %s", ", ".join(f"{count} {kind}" for kind, count in sorted(notes.items())))
    for report in bad:
        logger.warning("row %d, %s: %s", report.row, report.source or "without a video", report.problem)
    if faults:
        raise DataError(f"{'; '.join(faults)} (in {page} too)")
    if bad:
        named = first_few([report.source or f"row {report.row}" for report in bad])
        raise DataError(f"{len(bad)} of {len(rows)} clips cannot be used: {named}; {page} shows all, with reasons")
    logger.info("%s: nothing is wrong", page)
