#!/usr/bin/env python3
"""Run a training script unchanged and print one JSON line: seconds per optimizer step and peak memory.

    python benchmarks/step_time.py --warmup 3 --csv rows.csv -- training/cogvideox_text_to_video_lora.py FLAGS

A step ends where the device is done with all that was queued when a torch.optim optimizer had stepped, independent of
the script's own logging: gradient accumulation, data loading, checkpoints and validation in between are included. Only
the first step is waited for, so that nothing keeps the script from queueing ahead. Memory peaks cover the whole
process with loading; without a GPU they are 0. Host memory is that of this process, pinned memory included; on several
GPUs it is that of all processes, what they share counted once, after the first step. The exit code is the script's.
benchmarks/bench.py runs many rows through this.
"""

import csv
import importlib.metadata
import json
import os
import platform
import resource
import runpy
import shlex
import sys
import time
import traceback
import weakref
from pathlib import Path

import psutil


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console
from flops import peak_tflops
from profile_steps import StepProfiler


STARTED = time.perf_counter()  # start of this process, without the interpreter's own startup
ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "flash-attn-4")
FIELDS = ("label", "exit_code", "warmup", "steps", "median_s", "p10_s", "p90_s", "first_step_s")
FIELDS += ("allocated_gib", "reserved_gib", "host_gib", "memory_cap_gib", "mfu", "sm_clock_mhz")
FIELDS += ("card", "python", *PACKAGES, "cuda", "command")
PROFILE = "---- profile"  # the line before one
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # read by torch


class StepClock:
    """Records optimizer step times, and memory peaks across the script's own counter resets."""

    def __init__(self, torch):
        self.torch = torch
        self.first_step = None  # when the first step ended, on the host's clock
        self.marks = []  # of each step: an event on the GPU, the host's clock without one
        self.clocks = []
        self.has_clocks = True
        self.peaks = [0, 0]
        self.host_bytes = None  # of all ranks, if there are several
        self.optimizer = lambda: None
        self.profiler = None

    def on_step(self, optimizer, args, kwargs):
        # Only the first optimizer counts: an offloading one may consist of hundreds, one per parameter.
        if self.optimizer() is None:
            self.optimizer = weakref.ref(optimizer)
        if self.optimizer() is optimizer:
            self.marks.append(self.mark())
            if self.first_step is None:
                if self.torch.cuda.is_initialized():
                    self.marks[0].synchronize()
                self.first_step = time.perf_counter()
                self.host_bytes = bytes_of_ranks()
            self.note_clock()
            if self.profiler and self.torch.cuda.is_initialized():
                self.profiler.on_step()

    def mark(self):
        if not self.torch.cuda.is_initialized():
            return time.perf_counter()
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step_times(self):
        """Ends of the steps, in seconds of the host's clock."""
        if not (self.marks and self.torch.cuda.is_initialized()):
            return self.marks
        self.torch.cuda.synchronize()
        return [self.first_step + self.marks[0].elapsed_time(mark) / 1e3 for mark in self.marks]

    def note_clock(self):
        """Record the SM clock in MHz if nvidia-ml-py is installed: a hot or shared GPU is throttled."""
        if self.has_clocks and self.torch.cuda.is_initialized():
            try:
                self.clocks.append(self.torch.cuda.clock_rate())
            except Exception:  # noqa: BLE001 - package missing, or not supported by driver or container: an empty column
                self.has_clocks = False

    def note_peaks(self):
        """Merge the current device's counters into the process's peaks, in bytes."""
        if self.torch.cuda.is_initialized():
            cuda = self.torch.cuda
            self.peaks = [*map(max, self.peaks, (cuda.max_memory_allocated(), cuda.max_memory_reserved()))]

    def install(self):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(self.on_step)
        reset = self.torch.cuda.memory.reset_peak_memory_stats

        def reset_after_noting(*args, **kwargs):
            self.note_peaks()
            return reset(*args, **kwargs)

        self.torch.cuda.reset_peak_memory_stats = reset_after_noting
        self.torch.cuda.memory.reset_peak_memory_stats = reset_after_noting


def bytes_of_ranks():
    """Host memory of all ranks and their workers, on rank 0, with each page that is shared counted once; else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ["RANK"] != "0":
        return None
    processes = psutil.Process().parent().children(recursive=True)
    return sum(process.memory_full_info().pss for process in processes)


def cap_memory(torch, gib):
    """Limit torch's allocator to `gib` on the GPU, from the moment that the script initializes CUDA.

    The CUDA context, about half a GiB, is not covered and comes on top.
    """

    def cap():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * GIB / total)

    torch.cuda._lazy_call(cap)  # lazily: the script must set the allocator's options before CUDA starts


def leave_out_result():
    """Let the scripts of training/ neither rehearse nor write the result: no part of a step, and a minute for 5b's."""
    from run import checkpoints, result

    def save(run, engine):
        engine.complete()
        checkpoints.refuse_bad_numbers(engine.weights.values())

    result.rehearse_end, result.save = lambda *values: None, save


def run_script(command):
    """Run `command` = [script, *flags] as __main__ in this process; returns its exit code, 1 for a traceback."""
    if not Path(command[0]).is_file():
        sys.exit(f"{command[0]}: no such script")
    sys.argv = list(command)
    ours = {str(ROOT / "training"), str(ROOT / "benchmarks")}
    sys.path[:] = [str(Path(command[0]).resolve().parent), *(folder for folder in sys.path if folder not in ours)]
    sys.modules.pop("console", None)  # let the script import its own
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:  # noqa: BLE001 - of the script that is measured
        traceback.print_exc()
        return 1
    return 0


def step_durations(step_times, warmup):
    """Seconds of each step after the first `warmup`; the very first one has no start time and is never included."""
    durations = [end - start for start, end in zip(step_times, step_times[1:], strict=False)]
    return durations[max(warmup, 1) - 1 :]


def percentile(values, fraction):
    """Linearly interpolated percentile; None without values."""
    if not values:
        return None
    values, place = sorted(values), fraction * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return round(values[low] + (place - low) * (values[high] - values[low]), 5)


def package_versions():
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def command_line(command):
    """The command line without machine-specific paths, prefixed with torch's allocator variables if set."""
    told = [f"{name}={shlex.quote(os.environ[name])}" for name in ALLOCATOR_VARIABLES if name in os.environ]
    return " ".join([*told, shlex.join(map(str, command))]).replace(f"{ROOT}/", "")


def utilisation(model_tflop, seconds, card):
    """Model FLOPs divided by the GPU's peak in that time; None if either is unknown."""
    peak = peak_tflops(card)
    return round(model_tflop / seconds / peak, 4) if model_tflop and seconds and peak else None


def peak_of_process():
    """Bytes of host memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def summarise(clock, args, exit_code):
    """The row of one run, in the order of FIELDS."""
    clock.note_peaks()
    cuda = clock.torch.cuda
    step_times = clock.step_times()
    durations = step_durations(step_times, args.warmup)
    median, card = percentile(durations, 0.5), cuda.get_device_name() if cuda.is_available() else "cpu"
    row = {
        "label": args.label,
        "exit_code": exit_code,
        "warmup": args.warmup,
        "steps": len(durations),
        "median_s": median,
        "p10_s": percentile(durations, 0.1),
        "p90_s": percentile(durations, 0.9),
        "first_step_s": round(step_times[0] - STARTED, 3) if step_times else None,
        "allocated_gib": round(clock.peaks[0] / GIB, 3),
        "reserved_gib": round(clock.peaks[1] / GIB, 3),
        "host_gib": round((clock.host_bytes or peak_of_process()) / GIB, 3),
        "memory_cap_gib": args.memory_cap,
        "mfu": utilisation(args.model_tflop, median, card),
        "sm_clock_mhz": percentile(clock.clocks[args.warmup :], 0.5),
        "card": card,
        "python": platform.python_version(),
        **package_versions(),
        "cuda": clock.torch.version.cuda,
        "command": command_line(args.command),
    }
    return {field: row[field] for field in FIELDS}


def check_csv(path, fields=FIELDS):
    """Exit before the run, rather than after it, if the file has other columns."""
    if path.exists() and path.read_text().partition("\n")[0] != ",".join(fields):
        sys.exit(f"{path}: has other columns than this script writes; name another file")


def append_row(path, row, fields=FIELDS):
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def parse_before_script(parser, argv):
    """Parse the flags before `--`; the script and its flags after it become `args.command`."""
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.command = argv[split + 1 :]
    if not args.command:
        parser.error("name the script after --")
    return args


def parse_args(argv):
    parser = console.Parser(description=__doc__, usage="%(prog)s [flags] -- script.py ...")
    parser.add_argument("--warmup", type=int, default=3, help="first steps left out (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="append a row to this file")
    parser.add_argument("--label", default="", help="name of the row")
    parser.add_argument("--memory_cap", type=float, metavar="GIB", help="the most that torch may reserve on the GPU")
    parser.add_argument("--link", type=float, metavar="GB/S", help="slower copies between GPU and host, slow_link.py")
    parser.add_argument("--no_result", action="store_true", help="scripts of training/ write no result")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes, profile_steps.py")
    parser.add_argument("--deterministic", action="store_true", help="torch's deterministic algorithms, slower")
    parser.add_argument("--model_tflop", type=float, help="of a step, by flops.py: gives the model FLOP utilisation")
    return parse_before_script(parser, argv)


def main():
    args = parse_args(sys.argv[1:])
    if args.csv:
        check_csv(args.csv)
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
    import torch

    torch.use_deterministic_algorithms(args.deterministic)
    clock = StepClock(torch)
    clock.install()
    if args.memory_cap:
        cap_memory(torch, args.memory_cap)
    if args.link:
        from slow_link import slow_down  # needs Triton

        slow_down(args.link)
    if args.no_result:
        leave_out_result()
    if args.profile:
        clock.profiler = StepProfiler(torch)
    exit_code = run_script(args.command)
    row = summarise(clock, args, exit_code)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(row), flush=True)
        if args.csv:
            append_row(args.csv, row)
        if args.profile and exit_code == 0:  # else the script's last line says why
            print(PROFILE, clock.profiler.report(), sep="\n")
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
