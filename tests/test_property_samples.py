"""No sample is lost or doubled within an epoch, whatever the mix of buckets, repeats, ranks, batch and accumulation.

`make test` draws a few cases, always the same; `make test-all` draws 1,000 new ones of each.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies

from data.buckets import Bucket, num_repeated
from data.clip_lists import draw_keys
from data.loader import tolerant_loader
from run import steps


FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
MANY = settings(max_examples=1000, deadline=None, database=None)
SIZES = [Bucket(1, 64, 96), Bucket(9, 64, 64), Bucket(9, 64, 96), Bucket(49, 480, 720)]


@strategies.composite
def clip_lists(draw):
    """(source, bucket) per entry: clips of a few sizes, each listed once or, as with repeats and windows, several times."""
    files = draw(strategies.lists(strategies.sampled_from(SIZES), min_size=1, max_size=25))
    times = draw(strategies.lists(strategies.integers(1, 4), min_size=len(files), max_size=len(files)))
    entries = [(f"{file}.mp4", size) for file, size in enumerate(files) for _ in range(times[file])]
    return draw(strategies.permutations(entries))


@strategies.composite
def runs(draw):
    """Entries and the flags of a run on them, and the update from which it is resumed."""
    small = strategies.integers(1, 5)
    args = SimpleNamespace(
        train_batch_size=draw(small),
        gradient_accumulation_steps=draw(small),
        num_train_epochs=draw(strategies.integers(1, 3)),
        max_train_steps=draw(strategies.none() | strategies.integers(1, 40)),
        lr_warmup_steps=0,
        lr_scheduler="constant",
        checkpointing_steps=1,
        validation_steps=None,
        learning_rate=1.0,
        scale_lr=False,
        dataloader_num_workers=0,
        pin_memory=False,
    )
    entries, seed, num_ranks = draw(clip_lists()), draw(strategies.integers(0, 99)), draw(small)
    plan = steps.make_plan(args, [size for _, size in entries], num_ranks)
    return args, entries, seed, num_ranks, plan, draw(strategies.integers(0, plan.num_steps - 1))


def batches_of(case, first_step=0):
    """[micro-step][rank] -> keys of a batch, after `first_step` updates."""
    args, entries, seed, num_ranks, plan, _ = case
    dataset = SimpleNamespace(clip_buckets=[size for _, size in entries])
    shares = []
    for rank in range(num_ranks):
        run = SimpleNamespace(rank=rank, num_ranks=num_ranks, seed=seed)
        micro_steps, loader = steps.make_loader(args, run, dataset, plan, first_step)
        own = [keys for _, keys in zip(micro_steps, loader.batch_sampler, strict=False)]
        assert len(own) == len(micro_steps)  # the data never ends before the run
        shares.append(own)
    return list(zip(*shares, strict=True))


def check_epochs(case):
    """Each whole epoch has every entry; one is used again only to give all ranks equally many of its size."""
    args, entries, _, num_ranks, plan, _ = case
    sizes, batches = [size for _, size in entries], batches_of(case)
    for batch in batches:
        assert len({len(keys) for keys in batch}) == 1 and len(batch[0]) <= args.train_batch_size
        assert len({sizes[key % len(sizes)] for keys in batch for key in keys}) == 1
    for epoch in range(len(batches) // plan.batches_per_epoch):
        own = batches[epoch * plan.batches_per_epoch : (epoch + 1) * plan.batches_per_epoch]
        used = Counter(key - epoch * len(sizes) for batch in own for keys in batch for key in keys)
        assert set(used) == set(range(len(sizes)))
        assert used.total() == len(sizes) + num_repeated(sizes, num_ranks)
        for size in set(sizes):
            again = sum(used[index] - 1 for index, other in enumerate(sizes) if other == size)
            assert again == -sizes.count(size) % num_ranks


def check_resume(case):
    """A run that is resumed goes on with the samples, and the draws, that the whole run has there."""
    args, _, _, num_ranks, plan, first_step = case
    whole = batches_of(case)
    assert batches_of(case, first_step) == whole[first_step * plan.accumulation :]
    ids = Counter()
    for micro_step, batch in enumerate(whole):
        for rank, keys in enumerate(batch):
            run = SimpleNamespace(rank=rank, num_ranks=num_ranks)
            ids.update(steps.sample_ids(run, micro_step, args.train_batch_size, len(keys)))
    assert set(ids.values()) == {1}  # no two samples of a run share noise


def check_prepare(entries, num_ranks, batch_size):
    """Preparing takes every entry once over all ranks, and entries of one file draw independently."""
    sizes, taken = [size for _, size in entries], []
    for rank in range(num_ranks):
        own = list(range(len(sizes)))[rank::num_ranks]
        batches = list(tolerant_loader(SimpleNamespace(clip_buckets=sizes), own, batch_size).batch_sampler)
        assert all(len({sizes[index] for index in batch}) == 1 and len(batch) <= batch_size for batch in batches)
        taken += sum(batches, [])
    assert sorted(taken) == list(range(len(sizes)))
    assert len(set(draw_keys(source for source, _ in entries))) == len(entries)


CHECKS = {
    "epochs": (check_epochs, (runs(),)),
    "resume": (check_resume, (runs(),)),
    "prepare": (check_prepare, (clip_lists(), strategies.integers(1, 5), strategies.integers(1, 5))),
}


@pytest.mark.parametrize("name", CHECKS)
def test_no_sample_is_lost_or_doubled(name):
    check, drawn = CHECKS[name]
    FEW(given(*drawn)(check))()


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_no_sample_is_lost_or_doubled_in_1000_draws(name):
    check, drawn = CHECKS[name]
    MANY(given(*drawn)(check))()
