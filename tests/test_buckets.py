import math
import random
from collections import Counter

import pytest

from data.buckets import (
    Bucket,
    frame_times,
    make_buckets,
    nearest_bucket,
    num_batches,
    num_repeated,
    num_sampled_frames,
    pack_batches,
    upscale,
)


def flat(batches):
    return [index for batch in batches for share in batch for index in share]


def random_cases(count):
    rng = random.Random(0)
    for _ in range(count):
        kinds = [Bucket(49, 16 * (k + 1), 16) for k in range(rng.randint(1, 5))]
        samples = [rng.choice(kinds) for _ in range(rng.choice([1, 2, 3, 7, 20, 61]))]
        yield samples, rng.randint(1, 5), rng.randint(1, 5), rng.randrange(100), rng.randrange(4)


def test_make_buckets_is_every_combination_once():
    buckets = make_buckets([49, 17, 49], [480], [720, 256])
    assert buckets == [(17, 480, 256), (17, 480, 720), (49, 480, 256), (49, 480, 720)]


def test_time_comes_before_aspect_and_aspect_before_area():
    buckets = [Bucket(17, 480, 720), Bucket(49, 256, 256), Bucket(49, 480, 720), Bucket(49, 720, 480)]
    assert nearest_bucket(60, 1080, 1620, buckets) == (49, 480, 720)
    assert nearest_bucket(48, 256, 256, buckets) == (17, 480, 720)
    assert nearest_bucket(49, 1920, 1080, buckets) == (49, 720, 480)
    assert nearest_bucket(16, 480, 720, buckets) is None
    assert nearest_bucket(49, 480, 720, []) is None


def test_aspects_within_5_percent_are_decided_by_area():
    exact_but_small, nearly_and_large = Bucket(49, 240, 360), Bucket(49, 496, 720)
    assert nearest_bucket(49, 480, 720, [exact_but_small, nearly_and_large]) == nearly_and_large
    assert nearest_bucket(49, 480, 720, [exact_but_small, Bucket(49, 544, 720)]) == exact_but_small


def test_the_order_of_the_buckets_does_not_matter():
    buckets = make_buckets([17, 49], [256, 320, 480, 512, 720], [256, 320, 480, 512, 720])
    rng = random.Random(1)
    for _ in range(50):
        size = rng.randint(1, 100), rng.randint(100, 2000), rng.randint(100, 2000)
        shuffled = rng.sample(buckets, len(buckets))
        assert nearest_bucket(*size, shuffled) == nearest_bucket(*size, buckets)


@pytest.mark.parametrize(
    ("num_frames", "source_fps", "target_fps", "expected"),
    [
        (49, 8, 8, 49),
        (49, 8.01, 8, 49),
        (49, 7.99, 8, 49),
        (97, 16, 8, 49),
        (98, 16, 8, 49),
        (96, 16, 8, 48),
        (145, 23.976, 8, 49),
        (49, 8, 16, 97),
        (1, 25, 8, 1),
        (1, 1, 16, 1),
        (0, 25, 8, 0),
        (-3, 25, 8, 0),
    ],
)
def test_num_sampled_frames(num_frames, source_fps, target_fps, expected):
    assert num_sampled_frames(num_frames, source_fps, target_fps) == expected


def test_sampled_times_lie_within_the_clip():
    rng = random.Random(2)
    for _ in range(300):
        num_frames, source, target = rng.randint(1, 400), rng.uniform(5, 60), rng.uniform(5, 60)
        times = frame_times(num_sampled_frames(num_frames, source, target), target)
        assert times[-1] <= (num_frames - 0.5) / source


def test_frame_times_are_seconds():
    assert frame_times(3, 8, 0.5) == [0.5, 0.625, 0.75]


def test_upscale_covers_the_bucket():
    assert upscale(240, 720, Bucket(49, 480, 720)) == 2
    assert upscale(960, 1440, Bucket(49, 480, 720)) == 0.5


# ---------------------------------------------------------------- order of an epoch


def test_every_batch_is_of_one_bucket_and_every_rank_gets_as_much():
    for samples, batch_size, num_ranks, seed, epoch in random_cases(300):
        batches = pack_batches(samples, batch_size, num_ranks, seed, epoch)
        assert len(batches) == num_batches(samples, batch_size, num_ranks)  # by which the sampler counts epochs
        for batch in batches:
            assert len(batch) == num_ranks
            assert len({len(share) for share in batch}) == 1
            assert 1 <= len(batch[0]) <= batch_size
            assert len({samples[index] for share in batch for index in share}) == 1


def test_nothing_is_dropped_and_only_the_fill_is_repeated():
    for samples, batch_size, num_ranks, seed, epoch in random_cases(300):
        used = Counter(flat(pack_batches(samples, batch_size, num_ranks, seed, epoch)))
        assert set(used) == set(range(len(samples)))
        assert sum(used.values()) == len(samples) + num_repeated(samples, num_ranks)
        for bucket in set(samples):
            extra = sum(used[i] - 1 for i, other in enumerate(samples) if other == bucket)
            assert extra == -samples.count(bucket) % num_ranks < num_ranks


def test_one_process_sees_every_sample_exactly_once():
    for samples, batch_size, _, seed, epoch in random_cases(100):
        assert sorted(flat(pack_batches(samples, batch_size, 1, seed, epoch))) == list(range(len(samples)))


def test_batches_of_one_bucket_are_full_but_the_last():
    for samples, batch_size, num_ranks, seed, epoch in random_cases(100):
        for bucket in set(samples):
            batches = pack_batches(samples, batch_size, num_ranks, seed, epoch)
            sizes = [len(batch[0]) for batch in batches if samples[batch[0][0]] == bucket]
            assert sizes[:-1] == [batch_size] * (len(sizes) - 1)


@pytest.mark.parametrize("epoch", range(3))
def test_batch_size_and_ranks_can_be_traded_without_another_order(epoch):
    samples = [Bucket(49, 480, 720)] * 26
    one_by_one = flat(pack_batches(samples, 1, 1, 7, epoch))
    assert flat(pack_batches(samples, 4, 1, 7, epoch)) == one_by_one
    assert flat(pack_batches(samples, 2, 2, 7, epoch)) == one_by_one
    assert flat(pack_batches(samples, 1, 2, 7, epoch)) == one_by_one


def test_epochs_and_seeds_differ_and_repeat_themselves():
    samples = [Bucket(49, 480, 720)] * 30 + [Bucket(49, 720, 480)] * 30
    epochs = [pack_batches(samples, 4, 1, 0, epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert {frozenset(batch[0]) for batch in epochs[0]} != {frozenset(batch[0]) for batch in epochs[1]}
    assert pack_batches(samples, 4, 1, 0, 0) == epochs[0]
    assert pack_batches(samples, 4, 1, 1, 0) != epochs[0]


def test_buckets_are_mixed_over_the_epoch():
    samples = [Bucket(49, 480, 720)] * 40 + [Bucket(49, 720, 480)] * 40
    kinds = [samples[batch[0][0]] for batch in pack_batches(samples, 2, 1, 0, 0)]
    assert sum(a != b for a, b in zip(kinds, kinds[1:], strict=False)) > 5


def test_packing_100000_samples_is_quick():
    samples = [Bucket(49, 16 * (i % 40), 16) for i in range(1, 100_001)]
    assert len(pack_batches(samples, 4, 8, 0, 0)) == sum(math.ceil(count / 32) for count in Counter(samples).values())
