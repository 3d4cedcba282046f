#!/usr/bin/env python3
"""Run a training script unchanged; print how long the GPU waits for copies, and how reserved memory develops.

    python benchmarks/overlap.py --warmup 5 --csv benchmarks/overlap.csv -- \
        training/cogvideox_text_to_video_lora.py --memory stream FLAGS

A wait is the time between two events on the compute stream, before and after it waits for a copy: 0 if the copy is
already done. Shares are relative to an update, from one optimizer step to the next. Reserved memory is read after
every update.
"""

import statistics
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console
from step_time import GIB, append_row, check_csv, command_line, package_versions, parse_before_script, run_script


FIELDS = ["updates", "median_s", "waiting", "largest_waiting", "reserved_gib", "largest_reserved_gib", "grown_mib"]
FIELDS += ["card", *package_versions(), "command"]


class CopyClock:
    """Copy waits and reserved bytes per update; an update ends with an optimizer step."""

    def __init__(self, torch):
        self.torch = torch
        self.waits, self.ends = [], []  # events of the current update; end events of all updates
        self.unread = None  # waits of the previous update, which may still be running on the GPU
        self.waited, self.reserved = [], []  # seconds and bytes, one per update

    def event(self):
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def install(self, *streaming):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        wait = streaming[0].wait

        def timed_wait(event):
            start = self.event()
            wait(event)
            self.waits.append((start, self.event()))

        for module in streaming:
            module.wait = timed_wait
        register_optimizer_step_post_hook(lambda *_: self.on_step())

    def on_step(self):
        self.read()
        self.unread, self.waits = self.waits, []
        self.ends.append(self.event())
        self.reserved.append(self.torch.cuda.memory_reserved())

    def read(self):
        """Read the events one update late, so that measuring adds no synchronization."""
        if self.unread is not None:
            self.ends[-1].synchronize()
            self.waited.append(sum(start.elapsed_time(end) for start, end in self.unread) / 1000)
            self.unread = None

    def durations(self):
        """Seconds of each update except the first, which has no start event."""
        return [start.elapsed_time(end) / 1000 for start, end in zip(self.ends, self.ends[1:], strict=False)]


def figures(durations, waited, reserved, warmup):
    """The CSV row for the updates after the first `warmup`: shares of time, and memory at their end."""
    durations, waited, reserved = durations[warmup - 1 :], waited[warmup:], reserved[warmup:]
    shares = [wait / duration for wait, duration in zip(waited, durations, strict=True)]
    return {
        "updates": len(durations),
        "median_s": round(statistics.median(durations), 3),
        "waiting": round(sum(waited) / sum(durations), 4),
        "largest_waiting": round(max(shares), 4),
        "reserved_gib": round(reserved[-1] / GIB, 3),
        "largest_reserved_gib": round(max(reserved) / GIB, 3),
        "grown_mib": round((reserved[-1] - reserved[0]) / 2**20),
    }


def describe_row(row):
    """The row as two readable lines."""
    return (
        f"{row['updates']} updates of {row['median_s']} s: {row['waiting']:.2%} of the time waits for copies "
        f"(at most {row['largest_waiting']:.2%})\n"
        f"reserved {row['reserved_gib']} GiB at the end, {row['largest_reserved_gib']} at most: "
        f"grew by {row['grown_mib']} MiB"
    )


def parse_args(argv):
    parser = console.Parser(description=__doc__, usage="%(prog)s [--warmup N] [--csv FILE] -- script.py ...")
    parser.add_argument("--warmup", type=int, default=5, help="first updates left out (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="file to append a row to")
    args = parse_before_script(parser, argv)
    if args.warmup < 1:
        parser.error("--warmup: at least 1, the first update has no start")
    return args


def main():
    args = parse_args(sys.argv[1:])
    if args.csv:
        check_csv(args.csv, FIELDS)
    import torch

    if not torch.cuda.is_available():
        sys.exit("needs a GPU: on a CPU copies are done at once")
    from memory import activations, streaming

    clock = CopyClock(torch)
    clock.install(activations, streaming)
    exit_code = run_script(args.command)
    clock.read()
    if exit_code == 0 and len(clock.ends) > args.warmup + 1:
        row = figures(clock.durations(), clock.waited, clock.reserved, args.warmup)
        print(describe_row(row), flush=True)
        if args.csv:
            about = {"card": torch.cuda.get_device_name(), **package_versions(), "command": command_line(args.command)}
            append_row(args.csv, row | about, FIELDS)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
