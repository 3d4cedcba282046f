"""Per-update logging: metrics.jsonl, progress bar, trackers, non-finite updates, memory and timing.

Values stay on the device until `flush`, every --log_every updates: logging adds no other sync to a step.
"""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from base.bars import progress
from base.errors import NumbersError, first_few
from base.files import write_text
from base.ranks import all_gather_objects
from base.startup import STARTUP, StartupTimer
from engine.update import Update
from run.tracking import log_update, start_trackers


logger = logging.getLogger(__name__)

TRACKED = ("loss", "lr", "grad_norm", "seconds", "data_seconds", "copy_seconds")  # of a line, for trackers

Timestamp = float | torch.cuda.Event


# ---------------------------------------------------------------- time


def now(device: torch.device) -> Timestamp:
    """A timestamp in the device's work, which the host runs ahead of; on a CPU, the host's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Timestamp, end: Timestamp) -> float:
    """Seconds from `start` to `end`; the device must have reached the later event."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


# ---------------------------------------------------------------- bad numbers


class BadSteps:
    """Counts consecutive updates that were skipped for a non-finite loss or gradient, and names the samples.

    `sources` are the paths of all samples, by index.
    """

    def __init__(self, limit: int, sources: list[str]):
        self.limit, self.sources, self.in_a_row = limit, sources, 0

    def count(self, step: int, update: Update, seen: list[tuple[int, float]]) -> None:
        """Call it for every update in order, on all ranks, with its samples and losses. NumbersError at the limit."""
        bad = update.skipped and not update.searching
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if not bad:
            return
        logger.warning("step %d skipped, gradient norm %g: %s", step, update.grad_norm, self.describe(seen))
        if self.in_a_row >= self.limit:
            raise NumbersError(
                f"step {step}: {self.in_a_row} updates in a row had a loss or gradient that is not finite; lower "
                "--learning_rate, train in bf16, or check the samples named above"
            )

    def describe(self, seen: list[tuple[int, float]]) -> str:
        """The samples with a non-finite loss, on any rank; if there are none, all samples of the update."""
        pairs = [pair for pairs_of_rank in all_gather_objects(seen) for pair in pairs_of_rank]
        bad = [index for index, loss in pairs if not math.isfinite(loss)]
        names = [f"{index} ({self.sources[index]})" for index in sorted(set(bad or (index for index, _ in pairs)))]
        what = "loss is not finite for" if bad else "gradient is not finite, among"
        return f"the {what} {'sample' if len(names) == 1 else 'samples'} {first_few(names)}"


# ---------------------------------------------------------------- updates


class PendingUpdate(NamedTuple):
    """An update that is not in metrics.jsonl yet."""

    step: int
    result: Update
    loss: torch.Tensor  # mean over this rank's samples
    numbers: torch.Tensor  # gradient norm, 1 if skipped, then the loss of every sample
    samples: list[int]
    times: tuple[Timestamp, Timestamp]
    transfers: list[tuple[Timestamp, Timestamp]]  # per micro-step, from the batch's arrival
    data_seconds: float


class StepMeter:
    """One line per update in `metrics.jsonl`, the same on all ranks, written by the main process."""

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        first_step: int,
        num_steps: int,
        log_every: int,
        bad_steps: BadSteps,
        start: StartupTimer | None = None,  # ends with the first update
    ):
        self.path, self.accelerator, self.device, self.log_every = path, accelerator, accelerator.device, log_every
        self.bad_steps, self.start = bad_steps, start
        self.unwritten: list[PendingUpdate] = []
        self.began: Timestamp | None = None  # start of the current update; None while something else runs
        self.begin_update()
        self.bar = progress(num_steps, "steps", disable=True)  # until the loop begins: validation comes first
        self.first_step, self.num_steps = first_step, num_steps
        if accelerator.is_main_process:
            keep_lines_before(path, first_step)

    def begin_update(self) -> None:
        self.loss, self.data_seconds = torch.zeros((), device=self.device), 0.0
        self.samples, self.losses, self.transfers = [], [], []

    def timed(self, batches: Iterable) -> Iterator:
        """Yield from `batches`; the time spent waiting for each counts as the update's data_seconds."""
        batches = iter(batches)
        while True:
            self.began = self.began or now(self.device)
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.data_seconds += time.perf_counter() - asked
            self.arrived = now(self.device)
            yield batch

    def copied(self) -> None:
        """Batch and draws are on the device, encoded: copy_seconds runs from the batch's arrival to this call."""
        self.transfers.append((self.arrived, now(self.device)))

    def add(self, loss: torch.Tensor, losses: torch.Tensor, samples: list[int]) -> None:
        """Add a micro-step: its share of the update's loss, and the loss [B] of each sample."""
        self.loss += loss.detach()
        self.losses.append(losses.detach())
        self.samples += samples

    def log(self, step: int, result: Update) -> None:
        """Finish update `step` (counted from 1)."""
        end = now(self.device)
        results = [scalar(value, self.device) for value in (result.grad_norm, result.skipped)]
        numbers = torch.cat([torch.stack(results), *self.losses])
        times = ((self.began, end), self.transfers, self.data_seconds)
        self.unwritten.append(PendingUpdate(step, result, self.loss, numbers, self.samples, *times))
        self.began = end
        self.begin_update()
        self.bar.update(1)
        if step % self.log_every == 0:
            self.flush()
        if self.start:
            self.log_startup(step)

    def flush(self) -> None:
        """Wait for the pending updates, write their lines, report bad ones; NumbersError if too many came in a row."""
        if not self.unwritten:
            return
        made, self.unwritten = self.unwritten, []
        losses = torch.stack([update.loss for update in made])
        if self.accelerator.num_processes > 1:
            losses = self.accelerator.reduce(losses, reduction="mean")
        values = iter(torch.cat([losses, *(update.numbers for update in made)]).tolist())  # the only transfer
        losses = list(islice(values, len(made)))
        rows, checks = [], []
        for update, loss in zip(made, losses, strict=True):
            result = update.result._replace(grad_norm=next(values), skipped=bool(next(values)))
            rows.append(row_of(update, result, loss))
            checks.append((update.step, result, [(sample, next(values)) for sample in update.samples]))
        self.write(rows)
        for row in rows:
            log_update(self.accelerator, {name: row[name] for name in TRACKED if row[name] is not None}, row["step"])
        self.bar.set_postfix(loss=f"{losses[-1]:.4f}", lr=f"{rows[-1]['lr']:.2e}")
        for check in checks:
            self.bad_steps.count(*check)

    def write(self, rows: list[dict]) -> None:
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def pause(self) -> None:
        """Write the pending updates; until the next batch is requested, time counts for no update."""
        self.flush()
        self.began = None

    def write_event(self, step: int, event: str, **values) -> None:
        """Write a line {"step", "event", ...} about what happened after update `step`; all ranks must call it."""
        self.pause()
        self.write([{"step": step, "event": event, **values}])

    def log_startup(self, step: int) -> None:
        """Log the startup's parts, also in metrics.jsonl, once the first update is done."""
        start, self.start = self.start, None
        self.pause()
        start.mark("first update")
        seconds = round(sum(start.parts.values()), 2)
        self.write_event(step, "start", seconds=seconds, parts=start.parts)
        texts = [f"{part} {seconds:.1f}" for part, seconds in start.parts.items()]
        logger.info("first update %.1f s after the launch: %s", seconds, ", ".join(texts))

    def __enter__(self) -> "StepMeter":
        if self.start:
            self.start.mark("validation")  # everything between the checkpoint and the loop
        self.bar = progress(self.num_steps, "steps", self.first_step, disable=not self.accelerator.is_main_process)
        return self

    def __exit__(self, error_type, error, trace) -> None:
        # After an error the other ranks may not get here: no collective then
        if error is None or self.accelerator.num_processes == 1:
            self.flush()
        self.bar.close()


def start(args, run, project: str, sources: list[str], first_step: int, num_steps: int) -> StepMeter:
    """Open the trackers, in `project` unless --tracker_name names another, and metrics.jsonl. `sources`: see BadSteps."""
    start_trackers(args, run, project, first_step)
    bad_steps = BadSteps(args.max_bad_steps, sources)
    path = run.output_dir / "metrics.jsonl"
    return StepMeter(path, run.accelerator, first_step, num_steps, args.log_every, bad_steps, STARTUP)


def scalar(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """An fp32 scalar [] on `device`: a tensor is there already, a Python number is filled in without a copy."""
    return value.float() if torch.is_tensor(value) else torch.full((), float(value), device=device)


def row_of(update: PendingUpdate, result: Update, loss: float) -> dict:
    """The line of an update that the device has finished. JSON has no NaN: null instead."""
    return {
        "step": update.step,
        "loss": loss if math.isfinite(loss) else None,
        "lr": result.lr,
        "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
        "skipped": result.skipped,
        "seconds": round(seconds_between(*update.times), 4),
        "data_seconds": round(update.data_seconds, 4),
        "copy_seconds": round(sum(seconds_between(*copy) for copy in update.transfers), 4),
    }


def keep_lines_before(path: Path, first_step: int) -> None:
    """Drop what a resumed run writes again: updates after `first_step` and their events; at step 0 everything."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if first_step else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
    write_text(path, "".join(kept))


# ---------------------------------------------------------------- memory


def report_memory(meter: StepMeter, step: int, when: str) -> None:
    """Log the memory in use, also in metrics.jsonl; `when` is "before_training" and the like. All ranks must call it.

    GPU peaks are those since the last report.
    """
    device = meter.accelerator.device
    figures = memory_report(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    meter.write_event(step, "memory", when=when, **figures)
    texts = [f"{name.removesuffix('_gib').replace('_', ' ')} {value:.2f}" for name, value in figures.items()]
    logger.info("memory %s, GiB: %s", when.replace("_", " "), ", ".join(texts))


def memory_report(device: torch.device) -> dict[str, float]:
    """This process's memory in GiB: the host's peak and, on CUDA, torch's allocated and reserved, current and peak."""
    unit = 2**10 if sys.platform == "darwin" else 1  # ru_maxrss: KiB, on macOS bytes
    figures = {"host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10 / unit}
    if device.type == "cuda":
        figures |= {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak_allocated": torch.cuda.max_memory_allocated(device),
            "peak_reserved": torch.cuda.max_memory_reserved(device),
        }
    return {f"{name}_gib": round(value / 2**30, 3) for name, value in figures.items()}
