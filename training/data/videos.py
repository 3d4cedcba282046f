"""Datasets of videos and images: each clip is cut, resized, cropped and flipped for its bucket.

A sample's key is epoch * len(dataset) + index, so a worker knows the epoch. Random draws for a clip depend only on
(seed, epoch, its entry of clip_lists.draw_keys), not on other rows of the list. Sizes come from headers; decoding
happens in the workers. An image is a clip of one frame, in a bucket of one frame. Axes: F' pixel frames, h/w pixels.

`start_time` says where a clip is cut, `crop_corner` where it is cropped; data/dataset.py chooses the class by the flags.
"""

import logging
import math
import os
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, get_worker_info

from base.draws import draw_seed
from base.errors import MAX_LISTED, DataError, UsageError, first_few
from base.hashes import hash_files, hash_rows
from data.buckets import (
    SIZE_FLAGS,
    Bucket,
    frame_times,
    image_buckets,
    nearest_bucket,
    num_sampled_frames,
    upscale,
)
from data.clip_lists import Clip, draw_keys, repeated_keys, windowed
from data.decode import import_decord, read_frames
from data.header_cache import header_or_error_of_all
from data.headers import Header, VideoInfo, is_image
from data.picture import Caution


logger = logging.getLogger(__name__)

MAX_UPSCALE, WARN_UPSCALE = 4.0, 1.5  # linear factors


class VideoDataset(Dataset):
    """Clips that already have the height and width of a bucket; nothing is resized.

    `clips`, `clip_buckets`, `prompts`, `sources` and `problems` are set from the headers. Bad clips raise one DataError;
    with on_problem="collect" they are left out and described in `problems`, one line each. Images are left out with
    `with_images` off. `use_cache` off reads every header from its file.
    """

    def __init__(  # noqa: PLR0913 - by keyword, one a flag
        self,
        clips: Sequence[Clip],
        buckets: Sequence[Bucket],
        *,
        fps: float,
        seed: int = 0,
        random_flip: float | None = None,
        skip_frames_start: int = 0,
        skip_frames_end: int = 0,
        max_num_frames: int | None = None,
        video_backend: str = "auto",
        num_threads: int = 0,
        on_problem: str = "raise",
        fps_flag: str = "--fps",
        with_images: bool = True,
        use_cache: bool = True,
    ):
        self.buckets, self.fps, self.seed, self.fps_flag = list(buckets), fps, seed, fps_flag
        self.image_buckets = image_buckets(buckets)
        self.random_flip = random_flip or 0.0
        self.skip_start, self.skip_end = skip_frames_start, skip_frames_end
        self.max_num_frames = max_num_frames or math.inf
        self.backend, self.num_threads = video_backend, num_threads
        self.smallest = min(bucket.frames for bucket in self.buckets)
        if self.max_num_frames < self.smallest:
            raise UsageError(f"--max_num_frames {max_num_frames} is below the smallest frame bucket, {self.smallest}")
        if video_backend == "decord":
            import_decord()  # fail now if it is missing, not in a worker
        # Reads every header: a bad clip is known before training starts
        self.read_headers(clips, on_problem, with_images, use_cache)
        self.warn_of_sizes()
        self.warn_of_pictures()

    def read_headers(self, clips: Sequence[Clip], on_problem: str, with_images: bool, use_cache: bool) -> None:
        """Sets clips, infos, clip_buckets and problems from the headers."""
        headers = header_or_error_of_all(clips, use_cache)
        if not with_images:
            clips, headers = without_images(clips, headers)
        good, self.problems = [], []
        for clip, header in zip(clips, headers, strict=True):
            try:
                if isinstance(header, DataError):
                    raise header
                good.append((clip, header, self.choose_bucket(clip, header.info)))
            except DataError as error:
                self.problems.append(str(error))
        if self.problems and on_problem == "raise":
            raise DataError(summary(self.problems, len(clips)))
        self.clips = [clip for clip, _, _ in good]
        self.infos = [header.info for _, header, _ in good]
        self.cautions = [header.picture.cautions for _, header, _ in good]
        self.clip_buckets = [bucket for _, _, bucket in good]
        self.prompts = [clip.prompt for clip in self.clips]
        self.sources = [clip.source for clip in self.clips]
        self.draw_keys = draw_keys(clip.stable_name for clip in self.clips)

    def cut(self, most: float) -> None:
        """Replace each clip by windows of its bucket's length that do not overlap, at most `most`, spread over it."""
        cuts = [(index, window) for index in range(len(self)) for window in self.windows(index, most)]
        self.pick([index for index, _ in cuts])
        self.clips = [clip._replace(window=window) for clip, (_, window) in zip(self.clips, cuts, strict=True)]
        self.draw_keys = draw_keys(clip.stable_name for clip in self.clips)

    def windows(self, index: int, most: float) -> list[int]:
        """First frames of a clip's windows, in the file after --skip_frames_start; what remains at its end is too
        short for one.
        """
        span = self.clip_buckets[index].frames * self.infos[index].fps / self.fps  # frames of the file
        count = math.floor(self.spare_frames(index) / span + 1e-6) + 1
        starts = [math.ceil(number * span - 1e-6) for number in range(count)]
        chosen = min(len(starts), most)
        return [starts[number * len(starts) // chosen] for number in range(chosen)]

    def repeat(self) -> None:
        """Use each clip as often per epoch as it says, each time with random draws of its own."""
        repeats = [clip.repeats for clip in self.clips]
        keys = repeated_keys(self.draw_keys, repeats)
        self.pick([index for index, count in enumerate(repeats) for _ in range(count)])
        self.draw_keys = keys

    def pick(self, indices: Sequence[int]) -> None:
        """Have the clips at `indices`, in that order; `draw_keys` is up to the caller."""
        self.clips = [self.clips[index] for index in indices]
        self.infos = [self.infos[index] for index in indices]
        self.cautions = [self.cautions[index] for index in indices]
        self.clip_buckets = [self.clip_buckets[index] for index in indices]
        self.prompts = [clip.prompt for clip in self.clips]
        self.sources = [clip.source for clip in self.clips]

    def choose_bucket(self, clip: Clip, info: VideoInfo) -> Bucket:
        """The clip's bucket; DataError if it is too short or fits none."""
        if is_image(clip.video, info.num_frames):
            return self.match_size(clip, info, 1, self.image_buckets)
        num_frames = self.num_frames(info)
        if num_frames < self.smallest:
            raise self.length_error(clip, info, num_frames)
        return self.match_size(clip, info, min(num_frames, self.max_num_frames), self.buckets)

    def length_error(self, clip: Clip, info: VideoInfo, num_frames: int) -> DataError:
        advice = "add a smaller one to --frame_buckets or remove the clip"
        if info.num_frames == 1:  # a still, or what a scene cutter left over: for the user to say
            advice = (
                "if an image is meant, list it as one (ffmpeg -i IN.mp4 -frames:v 1 OUT.png), else remove the clip"
            )
        elif info.num_frames - self.skip_start - self.skip_end >= self.smallest:
            faster = f"{self.fps_flag} {math.ceil(info.fps)} takes every frame"
            advice = f"sample it at a higher rate ({faster}), {advice}"
        return DataError(
            f"{clip.video}: too short: {num_frames} frames at {self.fps:g} fps ({info.num_frames} in the file at "
            f"{info.fps:.4g} fps), the smallest bucket takes {self.smallest}; {advice}"
        )

    def num_frames(self, info: VideoInfo) -> int:
        return num_sampled_frames(info.num_frames - self.skip_start - self.skip_end, info.fps, self.fps)

    def match_size(self, clip: Clip, info: VideoInfo, num_frames: int, buckets: Sequence[Bucket]) -> Bucket:
        same_size = [bucket for bucket in buckets if bucket[1:] == (info.height, info.width)]
        bucket = nearest_bucket(num_frames, info.height, info.width, same_size)
        if bucket is None:
            raise DataError(
                f"{clip.video}: unknown bucket: {num_frames} frames of {info.height}x{info.width} (height x width); "
                f"add the size to {SIZE_FLAGS}, or resize with --video_reshape_mode center"
            )
        return bucket

    def warn_of_sizes(self) -> None:
        slow = [
            clip.source
            for clip, info in zip(self.clips, self.infos, strict=True)
            if info.fps < 0.99 * self.fps and not is_image(clip.video, info.num_frames)
        ]
        if slow:
            logger.warning(
                "%d of %d clips have less than %g frames per second, so some of their frames are used twice: %s",
                len(slow), len(self), self.fps, first_few(slow),
            )  # fmt: skip

    def warn_of_pictures(self) -> None:
        """Warn about clips that are not read as a player shows them, with the ffmpeg filter that converts them."""
        sources: dict[Caution, list[str]] = {}
        for clip, cautions in zip(self.clips, self.cautions, strict=True):
            for caution in cautions:
                sources.setdefault(caution, []).append(clip.source)
        for caution, named in sources.items():
            logger.warning(
                '%d of %d clips are %s: %s; convert with ffmpeg -i IN -vf "%s" OUT.mp4',
                len(named), len(self), caution.what, first_few(named), caution.filter,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int) -> dict:
        """{"pixels": uint8 [F', 3, h, w], "prompt", "index"}"""
        epoch, index = divmod(key, len(self))
        pixels = self.reshape(self.read(epoch, index), self.clip_buckets[index], epoch, index)
        if self.draw("flip", epoch, index).random() < self.random_flip:
            pixels = pixels.flip(-1)  # all frames alike
        self.check_shape(pixels, index)
        return {"pixels": pixels.contiguous(), "prompt": self.prompts[index], "index": index}

    def read(self, epoch: int, index: int) -> torch.Tensor:
        """Frames of the clip at its native size, uint8 [F', 3, h, w]."""
        times = frame_times(self.clip_buckets[index].frames, self.fps, self.start_time(epoch, index))
        # One thread per worker by default: the workers provide the parallelism
        num_threads = self.num_threads or int(get_worker_info() is not None)
        frames = read_frames(self.clips[index].video, times, self.backend, num_threads)
        if frames.shape[1:3] != self.infos[index][2:]:  # height and width; the bucket was chosen by the header
            raise self.size_error(index, *frames.shape[1:3])
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def start_time(self, epoch: int, index: int) -> float:
        """Start in seconds: a window's own, or drawn if the clip is longer than its bucket, else the clip's start.

        Always on a frame of the file: in between, rounding could repeat one frame and skip the next.
        """
        if is_image(self.clips[index].video, self.infos[index].num_frames):
            return 0.0
        spare = self.spare_frames(index)
        first = self.draw("start", epoch, index).randint(0, spare) if spare else self.clips[index].window or 0
        return (self.skip_start + first) / self.infos[index].fps

    def spare_frames(self, index: int) -> int:
        """The number of frames of the file by which the sample's start may be delayed."""
        info, num_frames = self.infos[index], self.clip_buckets[index].frames
        if self.num_frames(info) <= num_frames or self.clips[index].window is not None:
            return 0
        last = info.num_frames - self.skip_start - self.skip_end - 1
        # The sample spans (num_frames - 1) periods of the target rate; the rest is spare
        return max(0, math.floor(last - (num_frames - 1) * info.fps / self.fps + 1e-6))

    def draw(self, name: str, epoch: int, index: int) -> random.Random:
        return random.Random(draw_seed(self.seed, name, epoch, self.draw_keys[index]))

    def is_random(self) -> bool:
        """True if any clip depends on a random draw."""
        return self.random_flip > 0 or any(self.spare_frames(index) for index in range(len(self)))

    def reshape(self, pixels: torch.Tensor, bucket: Bucket, epoch: int, index: int) -> torch.Tensor:
        return pixels

    def check_shape(self, pixels: torch.Tensor, index: int) -> None:
        frames, _, height, width = pixels.shape
        if (frames, height, width) != self.clip_buckets[index]:
            raise self.size_error(index, height, width)

    def size_error(self, index: int, height: int, width: int) -> DataError:
        info = self.infos[index]
        return DataError(
            f"{self.clips[index].video}: frames of {height}x{width} (height x width) where the header says "
            f"{info.height}x{info.width}; convert the clip again"
        )

    def fingerprint(self, as_written: bool = False) -> str:
        """Hash of the clips, captions and sizes in their order. `as_written`: absolute paths as they are, as in
        earlier versions.
        """
        names = [windowed(clip.source, clip.window) if as_written else clip.stable_name for clip in self.clips]
        return hash_rows(zip(names, self.prompts, self.clip_buckets, strict=True))

    def hash_files(self) -> str:
        """Hash of the content of the clips' files, independent of their location."""
        return hash_files([os.fspath(clip.video) for clip in self.clips])


class VideoDatasetWithResizing(VideoDataset):
    """Clips brought to the nearest bucket: resized to cover it, keeping the aspect ratio, then center-cropped."""

    def match_size(self, clip: Clip, info: VideoInfo, num_frames: int, buckets: Sequence[Bucket]) -> Bucket:
        bucket = nearest_bucket(num_frames, info.height, info.width, buckets)
        factor = upscale(info.height, info.width, bucket)
        if factor > MAX_UPSCALE:
            raise DataError(
                f"{clip.video}: {info.height}x{info.width} (height x width) would be enlarged {factor:.1f} times to "
                f"{bucket.height}x{bucket.width}; add smaller sizes to --height_buckets, --width_buckets or remove it"
            )
        return bucket

    def warn_of_sizes(self) -> None:
        super().warn_of_sizes()
        rows = zip(self.clips, self.infos, self.clip_buckets, strict=True)
        factors = [(upscale(info.height, info.width, bucket), clip.source) for clip, info, bucket in rows]
        blurred = [source for factor, source in factors if factor > WARN_UPSCALE]
        if blurred:
            logger.warning(
                "%d of %d clips are enlarged more than %g times, up to %.1f, and will be soft: %s",
                len(blurred), len(self), WARN_UPSCALE, max(factors)[0], first_few(blurred),
            )  # fmt: skip

    def reshape(self, pixels: torch.Tensor, bucket: Bucket, epoch: int, index: int) -> torch.Tensor:
        pixels = cover_resize(pixels, bucket)
        spare = pixels.shape[-2] - bucket.height, pixels.shape[-1] - bucket.width
        top, left = self.crop_corner(*spare, epoch, index)
        return pixels[..., top : top + bucket.height, left : left + bucket.width]

    def crop_corner(self, spare_height: int, spare_width: int, epoch: int, index: int) -> tuple[int, int]:
        return spare_height // 2, spare_width // 2


class VideoDatasetWithResizeAndRectangleCrop(VideoDatasetWithResizing):
    """Like VideoDatasetWithResizing, with crop="random" cropped at a random place per clip and epoch."""

    def __init__(self, clips: Sequence[Clip], buckets: Sequence[Bucket], *, crop: str = "center", **options):
        self.crop = crop
        super().__init__(clips, buckets, **options)

    def crop_corner(self, spare_height: int, spare_width: int, epoch: int, index: int) -> tuple[int, int]:
        if self.crop == "center":
            return super().crop_corner(spare_height, spare_width, epoch, index)
        draw = self.draw("crop", epoch, index)
        return draw.randint(0, spare_height), draw.randint(0, spare_width)

    def is_random(self) -> bool:
        rows = zip(self.infos, self.clip_buckets, strict=True)
        has_room = any(cover_size(info.height, info.width, bucket) != bucket[1:] for info, bucket in rows)
        return super().is_random() or (self.crop == "random" and has_room)


def without_images(clips: Sequence[Clip], headers: Sequence[Header | DataError]) -> tuple:
    """(clips, headers) without those of images, for image-to-video."""
    rows = list(zip(clips, headers, strict=True))
    log_images_left_out([clip.source for clip, header in rows if is_still(clip, header)], len(rows))
    return tuple(zip(*(row for row in rows if not is_still(*row)), strict=True))


def is_still(clip: Clip, header: Header | DataError) -> bool:
    return isinstance(header, Header) and is_image(clip.video, header.info.num_frames)


def log_images_left_out(sources: list[str], num_clips: int) -> None:
    """Log one line, if there are any; DataError if there is nothing else."""
    if sources and len(sources) == num_clips:
        raise DataError(f"only images ({first_few(sources)}), and image-to-video needs videos; add some to the list")
    if sources:
        named = first_few(sources)
        logger.warning("%d of %d clips are images, left out in image-to-video: %s", len(sources), num_clips, named)


def cover_size(height: int, width: int, bucket: Bucket) -> tuple[int, int]:
    """The smallest height and width that keep the aspect ratio and cover the bucket."""
    factor = upscale(height, width, bucket)
    return max(round(height * factor), bucket.height), max(round(width * factor), bucket.width)


def cover_resize(pixels: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """Resize uint8 [F', 3, h, w] to the size that covers the bucket."""
    size = cover_size(*pixels.shape[-2:], bucket)
    if size == pixels.shape[-2:]:
        return pixels
    # On uint8: a quarter of the memory, and torch rounds and clamps bicubic overshoot
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True)


def summary(problems: list[str], num_clips: int) -> str:
    """One line that summarizes any number of problems."""
    if len(problems) == 1:
        return problems[0]
    more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    return f"{len(problems)} of {num_clips} clips cannot be used: {'; '.join(problems[:MAX_LISTED])}{more}"
