"""Assigns clips to buckets of (frames, height, width), and packs an epoch into batches of one bucket each.

Pure arithmetic, standard library only; nothing here opens a file.
"""

import functools
import math
import random
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from base.draws import draw_seed


ASPECT_TOLERANCE = math.log(1.05)  # aspect ratios within 5 % of the best count as ties: the crop hardly differs


class Bucket(NamedTuple):
    """Size of a clip as the VAE sees it, in frames and pixels."""

    frames: int
    height: int
    width: int


def make_buckets(
    frame_buckets: Iterable[int], height_buckets: Iterable[int], width_buckets: Iterable[int]
) -> list[Bucket]:
    """All combinations, without duplicates, sorted."""
    widths, heights = set(width_buckets), set(height_buckets)
    return sorted(Bucket(f, h, w) for f in set(frame_buckets) for h in heights for w in widths)


def image_buckets(buckets: Iterable[Bucket]) -> list[Bucket]:
    """The sizes of `buckets` with one frame: where images go, without a frame bucket of 1 being named."""
    return sorted({bucket._replace(frames=1) for bucket in buckets})


def nearest_bucket(num_frames: int, height: int, width: int, buckets: Iterable[Bucket]) -> Bucket | None:
    """The bucket with the most frames that the clip can fill, then the nearest aspect ratio, then area; or None."""
    return nearest_of(num_frames, height, width, tuple(buckets))


@functools.lru_cache(maxsize=4096)  # 0.3 ms for the 180 sizes of the defaults; the clips of a set share a few sizes
def nearest_of(num_frames: int, height: int, width: int, buckets: tuple[Bucket, ...]) -> Bucket | None:
    fitting = [bucket for bucket in buckets if bucket.frames <= num_frames]
    most_frames = max((bucket.frames for bucket in fitting), default=0)
    candidates = {bucket: aspect_distance(height, width, bucket) for bucket in fitting if bucket.frames == most_frames}
    # Among nearly equal aspect ratios the area decides, so that a clip is not shrunk for a 1 % better crop
    limit = min(candidates.values(), default=0) + ASPECT_TOLERANCE
    close = [bucket for bucket, distance in candidates.items() if distance <= limit]
    return min(close, key=lambda b: (area_distance(height, width, b), candidates[b], b), default=None)


def aspect_distance(height: int, width: int, bucket: Bucket) -> float:
    return abs(math.log(width / height) - math.log(bucket.width / bucket.height))


def area_distance(height: int, width: int, bucket: Bucket) -> float:
    return abs(math.log((bucket.height * bucket.width) / (height * width)))


def upscale(height: int, width: int, bucket: Bucket) -> float:
    """Linear scale factor at which the clip just covers the bucket; above 1 it is enlarged."""
    return max(bucket.height / height, bucket.width / width)


def num_sampled_frames(num_source_frames: int, source_fps: float, target_fps: float) -> int:
    """Number of frames of a clip at `target_fps`: n frames span n - 1 periods.

    Tolerates up to half a period of the slower rate, so that 49 frames at a measured 8.01 fps are 49 frames at 8.
    """
    if num_source_frames < 1:
        return 0
    ratio = target_fps / source_fps
    return math.floor((num_source_frames - 1) * ratio + min(1.0, ratio) / 2 - 1e-6) + 1


def frame_times(num_frames: int, fps: float, start: float = 0.0) -> list[float]:
    """Sampling times in seconds from the clip's first frame."""
    return [start + frame / fps for frame in range(num_frames)]


# ---------------------------------------------------------------- order of an epoch


def pack_batches(
    sample_buckets: Sequence[Hashable], batch_size: int, num_ranks: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """[batch][rank] -> sample indices; each batch is from one bucket, and no sample is dropped.

    A global batch is cut from the epoch's permutation and then split over the ranks, so trading batch size for ranks
    keeps the order. The remainder of a bucket is padded to a multiple of the ranks with the bucket's first samples;
    `num_repeated` counts those.
    """
    order = list(range(len(sample_buckets)))
    random.Random(draw_seed(seed, "order", epoch)).shuffle(order)
    size = batch_size * num_ranks
    batches, own = [], {}  # own: {bucket: its samples so far}
    for index in order:
        samples = own.setdefault(sample_buckets[index], [])
        samples.append(index)
        if len(samples) % size == 0:  # a global batch is complete; batches stay in the order of the permutation
            batches.append(split(samples[-size:], num_ranks))
    for samples in own.values():
        rest = samples[len(samples) // size * size :]
        missing = -len(rest) % num_ranks
        if rest:
            batches.append(split(rest + [samples[i % len(samples)] for i in range(missing)], num_ranks))
    return batches


def split(samples: list[int], num_ranks: int) -> list[list[int]]:
    share = len(samples) // num_ranks
    return [samples[rank * share : (rank + 1) * share] for rank in range(num_ranks)]


def num_batches(sample_buckets: Iterable[Hashable], batch_size: int, num_ranks: int) -> int:
    """Number of batches per epoch, the same for every epoch."""
    return sum(math.ceil(count / (batch_size * num_ranks)) for count in counts(sample_buckets))


def num_repeated(sample_buckets: Iterable[Hashable], num_ranks: int) -> int:
    """Number of samples used twice per epoch so that all ranks get equally many."""
    return sum(-count % num_ranks for count in counts(sample_buckets))


def counts(sample_buckets: Iterable[Hashable]) -> list[int]:
    table: dict[Hashable, int] = {}
    for bucket in sample_buckets:
        table[bucket] = table.get(bucket, 0) + 1
    return list(table.values())


SIZE_FLAGS = "--frame_buckets, --height_buckets, --width_buckets"
