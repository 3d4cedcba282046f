"""How many updates and epochs a run has, and the batches of each."""

import logging
import math
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset

from data import loader
from data.buckets import Bucket, num_batches
from data.loader import BucketSampler


logger = logging.getLogger(__name__)

WITHOUT_WARMUP = ("constant", "piecewise_constant")  # schedules


class StepPlan(NamedTuple):
    """Counts of a run, and its learning rate. A step is one optimizer update of `accumulation` micro-steps, which may
    span two epochs.
    """

    num_steps: int
    num_epochs: int
    num_micro_steps: int
    accumulation: int
    batches_per_epoch: int
    learning_rate: float | None = None  # after the warmup

    def micro_steps_in(self, step: int) -> int:
        """Micro-steps of the update after `step` updates; only the run's last one may have fewer."""
        return min(self.accumulation, self.num_micro_steps - step * self.accumulation)

    def is_last_of_update(self, micro_step: int) -> bool:
        """True if the accumulated gradient is applied after this micro-step."""
        return (micro_step + 1) % self.accumulation == 0 or micro_step + 1 == self.num_micro_steps


def plan_steps(batches_per_epoch: int, accumulation: int, num_epochs: int, max_steps: int | None = None) -> StepPlan:
    """Number of updates, epochs and micro-steps of a run. `max_steps`, if given, overrides `num_epochs`."""
    if max_steps is None:
        num_micro_steps = batches_per_epoch * num_epochs
        return StepPlan(
            math.ceil(num_micro_steps / accumulation), num_epochs, num_micro_steps, accumulation, batches_per_epoch
        )
    num_micro_steps = max_steps * accumulation
    return StepPlan(
        max_steps, math.ceil(num_micro_steps / batches_per_epoch), num_micro_steps, accumulation, batches_per_epoch
    )


def make_plan(args, buckets: list[Bucket], num_ranks: int) -> StepPlan:
    """The plan for clips of these sizes, from the flags; warns of what the run is too short for."""
    batches_per_epoch = num_batches(buckets, args.train_batch_size, num_ranks)
    plan = plan_steps(batches_per_epoch, args.gradient_accumulation_steps, args.num_train_epochs, args.max_train_steps)
    plan = plan._replace(learning_rate=scaled_learning_rate(args, num_ranks))
    warn_of_unreached(args, plan.num_steps, plan.learning_rate)
    return plan


def warn_of_unreached(args, num_steps: int, learning_rate: float) -> None:
    """Before the run, log what it is too short for: the full learning rate, a checkpoint, a validation."""
    warmup = args.lr_warmup_steps
    if args.lr_scheduler not in WITHOUT_WARMUP and warmup >= num_steps:
        logger.warning(
            "--lr_warmup_steps %d: the run has %d updates, so the learning rate reaches %.3g and never %.3g; "
            "give a smaller one",
            warmup, num_steps, learning_rate * (num_steps - 1) / warmup, learning_rate,
        )  # fmt: skip
    if args.checkpointing_steps > num_steps:
        logger.info(
            "no checkpoint before the end: --checkpointing_steps %d, and the run has %d updates",
            args.checkpointing_steps, num_steps,
        )  # fmt: skip
    if args.validation_steps and args.validation_steps >= num_steps:
        logger.info(
            "no validation between the first and the last: --validation_steps %d, and the run has %d updates",
            args.validation_steps, num_steps,
        )  # fmt: skip


def sample_ids(run, micro_step: int, micro_batch: int, size: int) -> list[int]:
    """Positions in the run of this rank's `size` samples: what every random draw of training depends on.

    `micro_batch` is a full batch of one rank. Accumulation, batch size and ranks only cut the same sequence
    differently, so they change nothing but rounding.
    """
    first = micro_step * micro_batch * run.num_ranks + run.rank * size
    return list(range(first, first + size))


def scaled_learning_rate(args, num_ranks: int) -> float:
    """--learning_rate, times the global batch size with --scale_lr."""
    factor = args.gradient_accumulation_steps * args.train_batch_size * num_ranks if args.scale_lr else 1
    return args.learning_rate * factor


def make_loader(args, run, dataset: Dataset, plan: StepPlan, first_step: int) -> tuple[range, DataLoader]:
    """(the micro-steps after `first_step` updates, a loader of this rank's batches for them)."""
    ranks = {"rank": run.rank, "num_ranks": run.num_ranks}
    sampler = BucketSampler(
        dataset.clip_buckets, args.train_batch_size, **ranks, seed=run.seed, num_epochs=plan.num_epochs
    )
    micro_steps = range(first_step * plan.accumulation, plan.num_micro_steps)
    sampler.set_epoch(*divmod(micro_steps.start, sampler.per_epoch))
    return micro_steps, loader.make_loader(dataset, sampler, args.dataloader_num_workers, args.pin_memory)
