"""Videos or prepared latents -> samples -> batches of one bucket.

Axes: B batch, F' pixel frames, F latent frames, C latent channels, H/W latent size, h/w pixels, S text tokens, D text
width, K noised variants of a first frame.

A sample's key is epoch * len(dataset) + index: a worker then knows the epoch. Every draw about a clip is a function of
(seed, epoch, its place of formats.draw_places), so that no other row of the list changes it; the order of an epoch is of
the list. Sizes come from headers or the manifest; decoding happens in the workers.
"""

import hashlib
import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from buckets import (
    Bucket,
    counts,
    frame_times,
    make_buckets,
    nearest_bucket,
    num_batches,
    num_repeated,
    num_sampled_frames,
    pack_batches,
    upscale,
)
from decode import import_decord, read_frames
from draws import draw_seed
from errors import DataError, Interrupted, UsageError, UserError, first_line
from file_kinds import stand_in
from formats import (
    NAMED,
    Clip,
    Row,
    as_on_disk,
    draw_places,
    first_few,
    inside,
    read_clips,
    read_text,
    read_text_rows,
    with_id_token,
)
from hashes import sampled_hash
from headers import Header, VideoInfo, read_header
from picture import Caution
from signals import shield_worker


logger = logging.getLogger(__name__)

MAX_UPSCALE, WARN_UPSCALE = 4.0, 1.5  # linear factors
UNTIL_A_DEATH_IS_KNOWN = 5.0  # seconds, at most
SIZE_FLAGS = "--frame_buckets, --height_buckets, --width_buckets"
PREPARE_AGAIN = "run prepare_dataset.py --save_latents_and_embeddings --output_dir {} again"


# ---------------------------------------------------------------- videos


class VideoDataset(Dataset):
    """Clips that already have the height and width of a bucket; nothing is resized.

    `clips`, `bucket_of`, `prompts`, `sources` and `problems` hold what the headers said: bad clips raise one DataError, or with
    on_problem="collect" are left out and described in `problems`, a line each.
    """

    def __init__(
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
    ):
        self.buckets, self.fps, self.seed, self.fps_flag = list(buckets), fps, seed, fps_flag
        self.random_flip = random_flip or 0.0
        self.skip_start, self.skip_end = skip_frames_start, skip_frames_end
        self.max_num_frames = max_num_frames or math.inf
        self.backend, self.num_threads = video_backend, num_threads
        self.smallest = min(bucket.frames for bucket in self.buckets)
        if self.max_num_frames < self.smallest:
            raise UsageError(f"--max_num_frames {max_num_frames} is below the smallest frame bucket, {self.smallest}")
        if video_backend == "decord":
            import_decord()  # the install line now, not from a worker
        self.keep_good(clips, on_problem)
        self.warn_of_sizes()
        self.warn_of_pictures()

    def keep_good(self, clips: Sequence[Clip], on_problem: str) -> None:
        """Sets clips, infos, bucket_of and problems from the headers."""
        with ThreadPoolExecutor(8) as pool:  # mostly waiting for the disk
            headers = list(pool.map(header_or_error, clips))
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
        self.bucket_of = [bucket for _, _, bucket in good]
        self.prompts = [clip.prompt for clip in self.clips]
        self.sources = [clip.source for clip in self.clips]
        self.places = draw_places(clip.identity for clip in self.clips)

    def choose_bucket(self, clip: Clip, info: VideoInfo) -> Bucket:
        """The clip's bucket; DataError if it is too short or fits none."""
        num_frames = self.num_frames(info)
        if num_frames < self.smallest:
            enough = info.num_frames - self.skip_start - self.skip_end >= self.smallest
            faster = (
                f"sample it at a higher rate ({self.fps_flag} {math.ceil(info.fps)} takes every frame), "
                if enough
                else ""
            )
            raise DataError(
                f"{clip.video}: too short: {num_frames} frames at {self.fps:g} fps ({info.num_frames} in the file at "
                f"{info.fps:.4g} fps), the smallest bucket takes {self.smallest}; "
                f"{faster}add a smaller one to --frame_buckets or remove the clip"
            )
        return self.match_size(clip, info, min(num_frames, self.max_num_frames))

    def num_frames(self, info: VideoInfo) -> int:
        return num_sampled_frames(info.num_frames - self.skip_start - self.skip_end, info.fps, self.fps)

    def match_size(self, clip: Clip, info: VideoInfo, num_frames: int) -> Bucket:
        same_size = [bucket for bucket in self.buckets if bucket[1:] == (info.height, info.width)]
        bucket = nearest_bucket(num_frames, info.height, info.width, same_size)
        if bucket is None:
            raise DataError(
                f"{clip.video}: unknown bucket: {num_frames} frames of {info.height}x{info.width} (height x width); "
                f"add the size to {SIZE_FLAGS}, or resize with --video_reshape_mode center"
            )
        return bucket

    def warn_of_sizes(self) -> None:
        slow = [clip.source for clip, info in zip(self.clips, self.infos, strict=True) if info.fps < 0.99 * self.fps]
        if slow:
            logger.warning(
                "%d of %d clips have less than %g frames per second, so some of their frames are used twice: %s",
                len(slow), len(self), self.fps, first_few(slow),
            )  # fmt: skip

    def warn_of_pictures(self) -> None:
        """Name the clips that are not read as a player shows them, and what converts them."""
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
        pixels = self.reshape(self.read(epoch, index), self.bucket_of[index], epoch, index)
        if self.draw("flip", epoch, index).random() < self.random_flip:
            pixels = pixels.flip(-1)  # the whole clip at once
        self.check_shape(pixels, index)
        return {"pixels": pixels.contiguous(), "prompt": self.prompts[index], "index": index}

    def read(self, epoch: int, index: int) -> torch.Tensor:
        """Frames of the clip at its own size, uint8 [F', 3, h, w]."""
        times = frame_times(self.bucket_of[index].frames, self.fps, self.start_time(epoch, index))
        # In a worker one thread by default: the workers are the parallelism
        num_threads = self.num_threads or int(get_worker_info() is not None)
        frames = read_frames(self.clips[index].video, times, self.backend, num_threads)
        if frames.shape[1:3] != self.infos[index][2:]:
            raise self.other_size(index, *frames.shape[1:3])
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def start_time(self, epoch: int, index: int) -> float:
        """Seconds; where the clip is longer than its bucket a drawn place, else its start.

        Starts lie on frames of the file: between them, rounding could repeat one frame and skip the next.
        """
        spare = self.spare_frames(index)
        first = self.draw("start", epoch, index).randint(0, spare) if spare else 0
        return (self.skip_start + first) / self.infos[index].fps

    def spare_frames(self, index: int) -> int:
        """How many frames of the file later than the first one the clip's sample may start."""
        info, num_frames = self.infos[index], self.bucket_of[index].frames
        if self.num_frames(info) <= num_frames:
            return 0
        last = info.num_frames - self.skip_start - self.skip_end - 1
        return max(0, math.floor(last - (num_frames - 1) * info.fps / self.fps + 1e-6))

    def draw(self, name: str, epoch: int, index: int) -> random.Random:
        return random.Random(draw_seed(self.seed, name, epoch, self.places[index]))

    def is_drawn(self) -> bool:
        """True if anything about a clip is left to a draw."""
        return self.random_flip > 0 or any(self.spare_frames(index) for index in range(len(self)))

    def reshape(self, pixels: torch.Tensor, bucket: Bucket, epoch: int, index: int) -> torch.Tensor:
        return pixels

    def check_shape(self, pixels: torch.Tensor, index: int) -> None:
        frames, _, height, width = pixels.shape
        if (frames, height, width) != self.bucket_of[index]:
            raise self.other_size(index, height, width)

    def other_size(self, index: int, height: int, width: int) -> DataError:
        info = self.infos[index]
        return DataError(
            f"{self.clips[index].video}: frames of {height}x{width} (height x width) where the header says "
            f"{info.height}x{info.width}; convert the clip again"
        )

    def fingerprint(self, as_written: bool = False) -> str:
        """A hash of which clips, captions and sizes are trained on, in which order; `as_written`: with absolute paths as
        such, as earlier versions had it.
        """
        names = self.sources if as_written else [clip.identity for clip in self.clips]
        return hash_rows(zip(names, self.prompts, self.bucket_of, strict=True))

    def content(self) -> str:
        """A hash of the clips' files, wherever they lie."""
        return hash_files([clip.video for clip in self.clips])


class VideoDatasetWithResizing(VideoDataset):
    """Clips brought to the nearest bucket: resized, aspect kept, until they cover it, then cut at the middle."""

    def match_size(self, clip: Clip, info: VideoInfo, num_frames: int) -> Bucket:
        bucket = nearest_bucket(num_frames, info.height, info.width, self.buckets)
        factor = upscale(info.height, info.width, bucket)
        if factor > MAX_UPSCALE:
            raise DataError(
                f"{clip.video}: {info.height}x{info.width} (height x width) would be enlarged {factor:.1f} times to "
                f"{bucket.height}x{bucket.width}; add smaller sizes to --height_buckets, --width_buckets or remove it"
            )
        return bucket

    def warn_of_sizes(self) -> None:
        super().warn_of_sizes()
        rows = zip(self.clips, self.infos, self.bucket_of, strict=True)
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
        top, left = self.crop_place(*spare, epoch, index)
        return pixels[..., top : top + bucket.height, left : left + bucket.width]

    def crop_place(self, spare_height: int, spare_width: int, epoch: int, index: int) -> tuple[int, int]:
        return spare_height // 2, spare_width // 2


class VideoDatasetWithResizeAndRectangleCrop(VideoDatasetWithResizing):
    """The same, cut at the middle (crop="center") or at a place drawn per clip and epoch (crop="random")."""

    def __init__(self, clips: Sequence[Clip], buckets: Sequence[Bucket], *, crop: str = "center", **options):
        self.crop = crop
        super().__init__(clips, buckets, **options)

    def crop_place(self, spare_height: int, spare_width: int, epoch: int, index: int) -> tuple[int, int]:
        if self.crop == "center":
            return super().crop_place(spare_height, spare_width, epoch, index)
        draw = self.draw("crop", epoch, index)
        return draw.randint(0, spare_height), draw.randint(0, spare_width)

    def is_drawn(self) -> bool:
        rows = zip(self.infos, self.bucket_of, strict=True)
        has_room = any(cover_size(info.height, info.width, bucket) != bucket[1:] for info, bucket in rows)
        return super().is_drawn() or (self.crop == "random" and has_room)


def header_or_error(clip: Clip) -> Header | DataError:
    try:
        return read_header(clip.video)
    except DataError as error:
        return error


def cover_size(height: int, width: int, bucket: Bucket) -> tuple[int, int]:
    """The least height and width that keep the aspect and cover the bucket."""
    factor = upscale(height, width, bucket)
    return max(round(height * factor), bucket.height), max(round(width * factor), bucket.width)


def cover_resize(pixels: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """uint8 [F', 3, h, w] at the size that covers the bucket."""
    size = cover_size(*pixels.shape[-2:], bucket)
    if size == pixels.shape[-2:]:
        return pixels
    # On uint8: a quarter of the memory, and torch rounds and clips what bicubic overshoots
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True)


def summary(problems: list[str], num_clips: int) -> str:
    """One line for any number of problems."""
    if len(problems) == 1:
        return problems[0]
    more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return f"{len(problems)} of {num_clips} clips cannot be used: {'; '.join(problems[:NAMED])}{more}"


def hash_files(paths: Sequence[Path]) -> str:
    """A hash of the files' content, sampled: every start of a run takes it."""
    try:
        with ThreadPoolExecutor(8) as pool:  # mostly waiting for the disk
            hashes = list(pool.map(sampled_hash, paths))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return hashlib.blake2b("".join(hashes).encode(), digest_size=16).hexdigest()


def hash_rows(rows) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for source, prompt, bucket in rows:
        digest.update(json.dumps([source, prompt, *bucket]).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- prepared latents


class Latent(NamedTuple):
    """Files of a prepared clip."""

    moments: Path
    prompt_embeds: Path
    image_moments: Path | None
    source: str
    prompt: str
    bucket: Bucket
    clip: str  # the path in the list that it was prepared from


class LatentDataset(Dataset):
    """Moments and prompt embeddings from a folder of prepare_dataset.py, or one of .pt files in the original's layout.

    `image_moments` are given if every clip has them, unless `with_images` is off: one of the K variants, drawn per epoch.
    """

    def __init__(
        self,
        root,
        *,
        buckets: Sequence[Bucket] | None = None,
        caption_column: str = "prompts.txt",
        video_column: str = "videos.txt",
        seed: int = 0,
        id_token: str | None = None,
        text_dropout: bool = False,
        scaling_factor: float | None = None,
        allow_outside: bool = False,
        with_images: bool = True,
    ):
        self.root, self.seed = Path(root), seed
        if not self.root.is_dir():
            what = "a file" if self.root.is_file() else "no such folder"
            raise DataError(
                f"{root}: {what} (--data_root); give the folder that prepare_dataset.py wrote, or one of videos"
            )
        manifest = self.root / "data.jsonl"
        if not manifest.is_file() and not (self.root / "video_latents").is_dir():
            raise DataError(
                f"{root}: not a prepared folder, it holds neither data.jsonl nor video_latents/; prepare the clips with "
                "prepare_dataset.py --save_latents_and_embeddings, or leave out --load_tensors to train on videos"
            )
        rows = read_manifest(manifest) if manifest.is_file() else []
        if rows and not all(str(row.get("video_latent")).endswith(".pt") for _, row in rows):
            prepared_for = id_token, scaling_factor, allow_outside
            self.latents = [manifest_latent(manifest, number, row, *prepared_for) for number, row in rows]
            refuse_missing(self.root, self.latents)
        else:
            self.latents = original_latents(self.root, caption_column, video_column, allow_outside)
        self.bucket_of = [latent.bucket for latent in self.latents]
        self.prompts = [latent.prompt for latent in self.latents]
        self.sources = [latent.source for latent in self.latents]
        self.places = draw_places(latent.clip for latent in self.latents)
        self.has_image_latents = with_images and all(latent.image_moments for latent in self.latents)
        refuse_unknown_buckets(self.latents, buckets)
        if text_dropout:
            self.empty_prompt_embeds()

    def require_image_latents(self) -> None:
        """Raise DataError unless image-to-video can train on the folder."""
        if not self.has_image_latents:
            raise DataError(
                f"{self.root}: holds no image latents for some clips; run the prepare_dataset.py command that made it "
                "again with --save_image_latents"
            )
        if any(latent.image_moments.suffix == ".pt" for latent in self.latents):
            logger.warning("%s: first frames without noise, while CogVideoX trains on noised ones", self.root)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, key: int) -> dict:
        """{"moments": [2C, F, H, W], "prompt_embeds": [S, D], "index"} and "image_moments" [2C, 1, H, W], as stored."""
        epoch, index = divmod(key, len(self))
        latent = self.latents[index]
        sample = {
            "moments": read_tensor(latent.moments, "moments"),
            "prompt_embeds": read_tensor(latent.prompt_embeds, "prompt_embeds"),
            "index": index,
        }
        if self.has_image_latents:
            variants = self.image_variants(index)
            draw = random.Random(draw_seed(self.seed, "image_variant", epoch, self.places[index]))
            sample["image_moments"] = variants[draw.randrange(len(variants))].clone()
        return sample

    def image_variants(self, index: int) -> torch.Tensor:
        """Moments [K, 2C, 1, H, W] of the first frame; the original's [2C, 1, H, W] are K = 1."""
        variants = read_tensor(self.latents[index].image_moments, "moments")
        return variants[None] if variants.ndim == 4 else variants

    def is_drawn(self) -> bool:
        """True if one of several first frames is drawn; one command prepares equally many of each clip."""
        return self.has_image_latents and len(self.image_variants(0)) > 1

    def empty_prompt_embeds(self) -> torch.Tensor:
        """[S, D] of the empty prompt, for text dropout; DataError if the folder has none."""
        path = self.root / "prompt_embeds/_empty.safetensors"
        if not path.is_file():
            raise DataError(f"{path}: missing, and --text_dropout needs it; {PREPARE_AGAIN.format(self.root)}")
        return read_tensor(path, "prompt_embeds")

    def fingerprint(self, as_written: bool = True) -> str:
        """A hash of which clips, captions and sizes are trained on, in which order; the manifest's paths count as written."""
        return hash_rows((latent.source, latent.prompt, latent.bucket) for latent in self.latents)

    def content(self) -> str:
        """A hash of the moments and embeddings that are read, wherever they lie."""
        files = (path for latent in self.latents for path in (latent.moments, latent.prompt_embeds))
        images = (latent.image_moments for latent in self.latents) if self.has_image_latents else ()
        return hash_files([*files, *images])


def read_manifest(path: Path) -> list[tuple[int, dict]]:
    """(line number, object) of every line that is not blank."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, dict(json.loads(line))))
        except (ValueError, TypeError) as error:
            message = f"{path}:{number}: not a JSON object; {PREPARE_AGAIN.format(path.parent)}"
            raise DataError(message) from error
    return rows


def manifest_latent(
    manifest: Path, number: int, row: dict, id_token: str | None, scaling_factor: float | None, allow_outside: bool
) -> Latent:
    root, place = manifest.parent, f"{manifest}:{number}"
    try:
        files = [row["video_latent"], row["prompt_embed"], row.get("image_latent")]
        sizes = row["metadata"]
        bucket = Bucket(int(sizes["num_frames"]), int(sizes["height"]), int(sizes["width"]))
        source, prompt = str(row.get("video")), row["prompt"]
        clip = str(sizes.get("source", source))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: {error} is missing or wrong; {PREPARE_AGAIN.format(root)}") from error
    if not files[0] or not files[1]:
        raise DataError(f"{place}: prepared without latents and embeddings; {PREPARE_AGAIN.format(root)}")
    stored = sizes.get("id_token")
    if id_token and id_token != stored:
        raise DataError(
            f"{place}: prepared with --id_token {stored or '(none)'}, not {id_token}; "
            "prepare again with the token, or leave the flag out"
        )
    prepared_for = sizes.get("scaling_factor")
    if scaling_factor and prepared_for and prepared_for != scaling_factor:
        raise DataError(
            f"{place}: prepared with another model's VAE (scaling factor {prepared_for}, this model's is "
            f"{scaling_factor}); prepare the clips with the model that is trained"
        )
    moments, prompt_embeds, image = [inside(root, name, place, allow_outside) if name else None for name in files]
    return Latent(moments, prompt_embeds, image, source, prompt, bucket, clip)


def refuse_missing(root: Path, latents: list[Latent]) -> None:
    files = [path for latent in latents for path in latent[:3] if path is not None]
    missing = [os.path.relpath(path, root) for path in files if not path.is_file()]
    if missing:
        raise DataError(f"{root}: {first_few(missing)} not found; {PREPARE_AGAIN.format(root)}")


def original_latents(root: Path, caption_column: str, video_column: str, allow_outside: bool) -> list[Latent]:
    """Clips of the original's layout: text files, and .pt files named after the videos."""
    if not (root / caption_column).is_file() and not (root / video_column).is_file():
        caption_column, video_column = "prompts.txt", "videos.txt"
    rows = read_text_rows(root, caption_column, video_column)
    logger.warning(
        "%s: .pt files without a manifest; sizes are taken from the tensors, and that they were made with this model's "
        "VAE cannot be checked", root
    )  # fmt: skip
    names = [pt_name(root, row.source) for row in rows]
    folders = ("video_latents", "prompt_embeds")
    missing = [f"{folder}/{name}" for name in names for folder in folders if not (root / folder / name).is_file()]
    if missing:
        raise DataError(f"{root}: {first_few(missing)} not found; {PREPARE_AGAIN.format(root)}")
    refuse_shared(root, rows, names)
    latents = []
    for row, name in zip(rows, names, strict=True):
        moments, prompt_embeds, image = [root / folder / name for folder in (*folders, "image_latents")]
        for path in (moments, prompt_embeds, image):
            inside(root, str(path.relative_to(root)), f"{video_column}:{row.row}", allow_outside)
        _, frames, height, width = read_pt(moments, 4).shape
        bucket = Bucket((frames - 1) * 4 + 1, height * 8, width * 8)  # the VAE's factors: 4 in time, 8 in space
        image = image if image.is_file() else None
        latents.append(Latent(moments, prompt_embeds, image, row.source, row.prompt, bucket, row.source))
    return latents


def pt_name(root: Path, source: str) -> str:
    """<stem>.pt, else what the original made of names with several dots: all up to the first."""
    folder = root / "video_latents"
    names = f"{Path(source).stem}.pt", f"{Path(source).name.split('.')[0]}.pt"
    whole, cut = (as_on_disk(folder, name) for name in names)
    return cut if (folder / cut).is_file() and not (folder / whole).is_file() else whole


def refuse_shared(root: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """DataError where the original gave two clips, or two captions of one, the same name."""
    owners: dict[str, Row] = {}
    for row, name in zip(rows, names, strict=True):
        first = owners.setdefault(name, row)
        if (first.source, first.prompt) != (row.source, row.prompt):
            raise DataError(
                f"{root}: rows {first.row} and {row.row} ('{first.source}', '{row.source}') both lead to {name}, which "
                f"is of one of them; {PREPARE_AGAIN.format(root)}"
            )


def refuse_unknown_buckets(latents: list[Latent], buckets: Sequence[Bucket] | None) -> None:
    if buckets is None:
        return
    known = set(buckets)
    unknown = [
        f"{latent.moments} ({latent.bucket.frames} frames of {latent.bucket.height}x{latent.bucket.width})"
        for latent in latents
        if latent.bucket not in known
    ]
    if unknown:
        raise DataError(
            f"unknown bucket: {first_few(unknown)}; add these sizes to {SIZE_FLAGS} or leave the flags out"
        )


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """The tensor `name` of a .safetensors file, or the one tensor of a .pt file; DataError if it is not finite."""
    if path.suffix == ".pt":
        tensor = read_pt(path).clone()  # off the file's memory map
    else:
        try:
            with safe_open(path, framework="pt") as tensors:
                tensor = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            reason = stand_in(path) or f"damaged ({error}); delete it and run prepare_dataset.py again"
            raise DataError(f"{path}: {reason}") from error
    if not torch.isfinite(tensor).all():
        raise DataError(f"{path}: holds values that are not finite; delete it and run prepare_dataset.py again")
    return tensor


def read_pt(path: Path, ndim: int | None = None) -> torch.Tensor:
    """The tensor of a .pt file, mapped, not read; never runs code from it."""
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, OSError, EOFError, ValueError) as error:
        damaged = f"damaged or no tensor ({first_line(error)}); delete it and run prepare_dataset.py again"
        raise DataError(f"{path}: {stand_in(path) or damaged}") from error
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != (ndim or tensor.ndim):
        raise DataError(f"{path}: not a tensor of the expected shape; delete it and run prepare_dataset.py again")
    return tensor


# ---------------------------------------------------------------- batches


class BucketSampler(Sampler):
    """A batch sampler: lists of sample keys for one rank, of one bucket each, on through the epochs.

    The position is where the caller set it, never how far workers have read: iterating changes nothing.
    """

    def __init__(
        self,
        bucket_of: Sequence[Bucket],
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
        num_epochs: int = 1,
    ):
        self.bucket_of, self.batch_size = list(bucket_of), batch_size
        self.rank, self.num_ranks, self.seed = rank, num_ranks, seed
        self.per_epoch = num_batches(self.bucket_of, batch_size, num_ranks)
        self.first, self.stop = 0, num_epochs * self.per_epoch
        repeated = num_repeated(self.bucket_of, num_ranks)
        if repeated and rank == 0:
            logger.info(
                "%d of %d clips are used twice an epoch, to fill %d processes", repeated, len(self.bucket_of), num_ranks
            )  # fmt: skip
        smallest = min(counts(self.bucket_of), default=0)
        if smallest < batch_size * num_ranks and rank == 0:
            logger.info(
                "a bucket holds %d clips, less than a batch of %d: its batches are that small, none is left out",
                smallest, batch_size * num_ranks,
            )  # fmt: skip

    def set_epoch(self, epoch: int, consumed: int = 0) -> None:
        """Start at this epoch, after `consumed` batches of it."""
        self.first = epoch * self.per_epoch + consumed

    def __len__(self) -> int:
        return max(0, self.stop - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        position = self.first
        while position < self.stop:
            epoch, consumed = divmod(position, self.per_epoch)
            batches = pack_batches(self.bucket_of, self.batch_size, self.num_ranks, self.seed, epoch)
            for batch in batches[consumed : consumed + self.stop - position]:
                yield [epoch * len(self.bucket_of) + index for index in batch[self.rank]]
                position += 1


class Guarded(Dataset):
    """Hands a sample's error back in its place: torch would make one long traceback of it on the way from a worker."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: int):
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def collate(samples: list[dict]) -> dict:
    """Tensors stacked to [B, ...], everything else as lists."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: torch.stack(values) if torch.is_tensor(values[0]) else values for name, values in batch.items()}


def collate_guarded(samples: list) -> dict:
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    good = [sample for sample in samples if not isinstance(sample, UserError)]
    return {"index": [], **(collate(good) if good else {}), "errors": errors}


class ClipLoader(DataLoader):
    """A DataLoader that raises a worker's UserError as it was, and says in one line that a worker was killed.

    With `tolerant` set, batches come without the failed samples, which `problems` describes, a line each.
    """

    tolerant = False

    def __iter__(self) -> Iterator[dict]:
        try:
            for batch in self.received():
                errors = batch.pop("errors")
                fatal = [error for error in errors if not (self.tolerant and isinstance(error, DataError))]
                if fatal:
                    raise fatal[0]
                yield batch | {"problems": [str(error) for error in errors]} if self.tolerant else batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise Interrupted(
                "a data worker was killed, most likely for lack of memory; lower --dataloader_num_workers or the batch "
                f"size and run the same command again ({first_line(error)})"
            ) from error

    def received(self) -> Iterator[dict]:
        """torch's batches. Where one cannot be fetched because its worker has just died, torch's own word of that."""
        try:
            yield from super().__iter__()
        except (ConnectionError, EOFError):
            time.sleep(UNTIL_A_DEATH_IS_KNOWN)  # torch raises it from a signal's handler, here
            raise


def make_loader(dataset: Dataset, sampler, num_workers: int, pin_memory: bool = False) -> DataLoader:
    """Batches in the sampler's order; a clip that cannot be read raises DataError."""
    return ClipLoader(
        Guarded(dataset),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),  # torch warns where there is no GPU to copy to
        collate_fn=collate_guarded,
        worker_init_fn=shield_worker,
    )


def tolerant_loader(
    dataset: VideoDataset, indices: Sequence[int], batch_size: int, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Each of the samples once, in epoch 0, in batches of one bucket; bad ones as lines in batch["problems"]."""
    groups: dict[Bucket, list[int]] = {}
    for index in indices:
        groups.setdefault(dataset.bucket_of[index], []).append(index)
    batches = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
    loader = make_loader(dataset, batches, num_workers, pin_memory)
    loader.tolerant = True
    return loader


# ---------------------------------------------------------------- from the flags


def build_dataset_from_args(
    args, default_fps: float, seed: int, scaling_factor: float, image_to_video: bool = False
) -> Dataset:
    """What a training script reads: raw videos, or with --load_tensors prepared latents; captions with the id token.

    `scaling_factor`, the VAE's, tells latents that were prepared for another model.
    """
    if args.load_tensors:
        given = {"frame_buckets", "height_buckets", "width_buckets"} & set(args.given)
        latents = LatentDataset(
            args.data_root,
            buckets=buckets_from_args(args) if given else None,
            caption_column=args.caption_column,
            video_column=args.video_column,
            seed=seed,
            id_token=args.id_token,
            text_dropout=args.text_dropout > 0,
            scaling_factor=scaling_factor,
            allow_outside=args.allow_outside_root,
            with_images=image_to_video,
        )
        if image_to_video:
            latents.require_image_latents()
        return latents
    clips = read_clips_from_args(args)
    clips = [clip._replace(prompt=with_id_token(clip.prompt, args.id_token)) for clip in clips]
    return make_videos_from_args(
        args,
        clips,
        fps=fps_from_args(args, default_fps),
        seed=seed,
        skip_frames_start=args.skip_frames_start,
        skip_frames_end=args.skip_frames_end,
    )


def read_clips_from_args(args) -> list[Clip]:
    columns = args.caption_column, args.video_column
    options = {"allow_outside": args.allow_outside_root, "blank_captions": bool(args.id_token)}
    return read_clips(args.data_root, args.dataset_file, *columns, **options)


def build_videos_from_args(args, fps: float) -> VideoDataset:
    """What prepare_dataset.py reads: captions as written, bad clips left out and described in `problems`."""
    clips = read_clips_from_args(args)
    return make_videos_from_args(
        args, clips, fps=fps, seed=args.seed, num_threads=args.num_decode_threads, on_problem="collect",
        fps_flag="--target_fps",
    )  # fmt: skip


def make_videos_from_args(args, clips: list[Clip], **options) -> VideoDataset:
    options |= {
        "random_flip": args.random_flip,
        "max_num_frames": args.max_num_frames,
        "video_backend": args.video_backend,
    }
    if args.video_reshape_mode == "none":
        return VideoDataset(clips, buckets_from_args(args), **options)
    crop = args.video_reshape_mode or "center"
    return VideoDatasetWithResizeAndRectangleCrop(clips, buckets_from_args(args), crop=crop, **options)


def buckets_from_args(args) -> list[Bucket]:
    return make_buckets(args.frame_buckets, args.height_buckets, args.width_buckets)


def fps_from_args(args, default_fps: float) -> float:
    """--fps where given, else the rate that the checkpoint was made for."""
    if "fps" not in args.given:
        logger.info(
            "clips are sampled at %g frames per second (this checkpoint's rate; --fps changes it)", default_fps
        )
        return default_fps
    if args.fps != default_fps:
        logger.warning("--fps %d: this checkpoint was made for %g", args.fps, default_fps)
    return args.fps
