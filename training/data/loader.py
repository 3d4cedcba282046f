"""Sampler and DataLoader: batches of one bucket each, in an order fixed by the dataset, seed and epoch."""

import logging
import time
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from base.errors import DataError, Interrupted, UserError, first_line
from base.signals import ignore_group_signals
from data.buckets import Bucket, counts, num_batches, num_repeated, pack_batches
from data.videos import VideoDataset


logger = logging.getLogger(__name__)

WORKER_DEATH_SECONDS = 5.0  # seconds that torch's SIGCHLD handler may take to report a dead worker, at most


class BucketSampler(Sampler):
    """Batch sampler: lists of sample keys for one rank, each list from one bucket, continuing through all epochs.

    Iterating does not change its state: the position is what the caller set, not how far workers have prefetched.
    """

    def __init__(
        self,
        clip_buckets: Sequence[Bucket],
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
        num_epochs: int = 1,
    ):
        self.clip_buckets, self.batch_size = list(clip_buckets), batch_size
        self.rank, self.num_ranks, self.seed = rank, num_ranks, seed
        self.per_epoch = num_batches(self.clip_buckets, batch_size, num_ranks)
        self.first, self.stop = 0, num_epochs * self.per_epoch
        repeated = num_repeated(self.clip_buckets, num_ranks)
        if repeated and rank == 0:
            logger.info(
                "%d of %d clips are used twice per epoch, to fill %d processes",
                repeated, len(self.clip_buckets), num_ranks,
            )  # fmt: skip
        smallest = min(counts(self.clip_buckets), default=0)
        if smallest < batch_size * num_ranks and rank == 0:
            logger.info(
                "a bucket holds %d clips, fewer than a batch of %d: its batches are smaller, no clip is left out",
                smallest, batch_size * num_ranks,
            )  # fmt: skip

    def set_epoch(self, epoch: int, consumed: int = 0) -> None:
        """Start at `epoch`, after the first `consumed` batches of it."""
        self.first = epoch * self.per_epoch + consumed

    def __len__(self) -> int:
        return max(0, self.stop - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        batches, packed = [], None  # of epoch `packed`
        for position in range(self.first, self.stop):
            epoch, consumed = divmod(position, self.per_epoch)
            if epoch != packed:
                packed = epoch
                batches = pack_batches(self.clip_buckets, self.batch_size, self.num_ranks, self.seed, epoch)
            yield [epoch * len(self.clip_buckets) + index for index in batches[consumed][self.rank]]


class ErrorsAsSamples(Dataset):
    """Returns a UserError in place of the sample: raised in a worker, torch would turn it into one long traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: int):
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def collate(samples: list[dict]) -> dict:
    """Stack tensors to [B, ...]; everything else becomes lists."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: torch.stack(values) if torch.is_tensor(values[0]) else values for name, values in batch.items()}


def collate_with_errors(samples: list) -> dict:
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    good = [sample for sample in samples if not isinstance(sample, UserError)]
    return {"index": [], **(collate(good) if good else {}), "errors": errors}


class ClipLoader(DataLoader):
    """A DataLoader that re-raises a worker's UserError unchanged, and reports a killed worker in one line.

    With `tolerant` set, failed samples are dropped from batches and described in `problems`, one line each.
    """

    tolerant = False

    def __iter__(self) -> Iterator[dict]:
        """Workers start now, not at the first `next`: they prefetch while the caller does something else."""
        return self.checked(super().__iter__())

    def checked(self, batches: Iterator[dict]) -> Iterator[dict]:
        try:
            for batch in received(batches):
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


def received(batches: Iterator[dict]) -> Iterator[dict]:
    """torch's batches. If fetching fails because a worker just died, gives torch time to raise its own error."""
    try:
        yield from batches
    except (ConnectionError, EOFError):
        time.sleep(WORKER_DEATH_SECONDS)  # torch raises from its signal handler, during this sleep
        raise


def make_loader(dataset: Dataset, sampler, num_workers: int, pin_memory: bool = False) -> DataLoader:
    """A loader of batches in the sampler's order; an unreadable clip raises DataError."""
    return ClipLoader(
        ErrorsAsSamples(dataset),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),  # without a GPU torch warns
        collate_fn=collate_with_errors,
        worker_init_fn=ignore_group_signals,
    )


def tolerant_loader(
    dataset: VideoDataset, indices: Sequence[int], batch_size: int, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Each sample of `indices` once, in epoch 0, in batches of one bucket; bad clips as lines in batch["problems"]."""
    groups: dict[Bucket, list[int]] = {}
    for index in indices:
        groups.setdefault(dataset.clip_buckets[index], []).append(index)
    batches = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
    loader = make_loader(dataset, batches, num_workers, pin_memory)
    loader.tolerant = True
    return loader
