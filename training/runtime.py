"""The run around the loop: process set-up, precision, step plan, metrics, exit codes."""

import contextlib
import errno
import logging
import math
import os
import re
import resource
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset

from allocator import expand_segments, uses_expandable_segments
from buckets import Bucket
from console import beside_bars, capture_prints, dump_kept, log_errors_only, log_to_stderr
from dataset import BucketSampler, make_loader
from durable import free_bytes, keep, take_back
from errors import ERROR_LOG, MemoryFullError, StorageError, UsageError, UserError, first_line
from quantization import check_base_precision
from signals import INTERRUPTION, caught_signals
from status import REFUSED, RUN, is_of_this_run, note_refusal, read_status, write_status
from tracking import tracking_options_from_args
from zero import check_deepspeed_from_args, uses_deepspeed


logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REAL_SIZE = 200e6  # parameters: above it a step on a CPU takes minutes
INTERNAL, STORAGE, INTERRUPTED = 70, 74, 75  # exit codes
FULL_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
STORAGE_ERRORS = FULL_DISK | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
# What the launcher exports of its config, where that sets it
LAUNCHER_VARIABLES = {
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "max_grad_norm": "ACCELERATE_GRADIENT_CLIPPING",
}
WITHOUT_WARMUP = ("constant", "piecewise_constant")  # schedules
LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}
GO_ON = "the same command continues from the last checkpoint"
MEETING_SECONDS = 24 * 3600  # longest that ranks wait for one another outside of collectives


# ---------------------------------------------------------------- start


class Start:
    """Seconds from the launch to the first update, by part."""

    def __init__(self):
        self.parts: dict[str, float] = {}
        self.since = launch_time()

    def mark(self, part: str) -> None:
        """What was done since the last mark is `part`."""
        now = time.time()
        self.parts[part] = round(self.parts.get(part, 0.0) + now - self.since, 2)
        self.since = now


def find_launcher() -> psutil.Process | None:
    """The launcher that started this process."""
    with contextlib.suppress(psutil.Error):  # the parent of another user, or gone
        parent = psutil.Process().parent()
        if parent and LAUNCHERS & {Path(word).name for word in parent.cmdline()[:4]}:
            return parent
    return None


def launch_time() -> float:
    """When this process was started, or the launcher that started it."""
    return (find_launcher() or psutil.Process()).create_time()


def launch_id() -> str | None:
    """An id of what the launcher has started, the same in all its processes; None without one."""
    launcher = find_launcher()
    return f"{socket.gethostname()}-{launcher.pid}-{launcher.create_time()}" if launcher else None


def agree_on_run() -> None:
    """All ranks take the id of the first: several machines have a launcher each, and mpirun is none of those known."""
    if torch.distributed.is_initialized():
        store = torch.distributed.distributed_c10d._get_default_store()
        if torch.distributed.get_rank() == 0:
            store.set("run", RUN.id)
        RUN.id = store.get("run").decode()


START = Start()  # of this process


def init_accelerator_from_args(args) -> Accelerator:
    """Processes and device. Precision stays "no" here: prepare() and autocast are not used, see `compute_dtype`."""
    START.parts.clear()
    START.mark("imports")
    log_to_stderr()
    check_launcher_from_args(args)
    check_deepspeed_from_args(args)
    # No backend named: accelerate takes nccl on GPUs and gloo on CPUs, and fails on one process with one named
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=args.nccl_timeout))
    cpu = not torch.cuda.is_available() and not uses_deepspeed()  # accelerate would leave DeepSpeed out
    options = tracking_options_from_args(args)
    if uses_deepspeed():
        import deepspeed  # noqa: F401 - its logger takes stdout as it is at the import, which accelerate makes below
    with capture_prints():  # DeepSpeed's, which builds an operator here
        accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[process_group], **options)
    agree_on_run()
    if not accelerator.is_main_process:
        log_errors_only()
    expand_segments(accelerator.device)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def shared_seed_from_args(args) -> int:
    """--seed, or one drawn by rank 0 for all."""
    if args.seed is not None:
        return args.seed
    seed = [secrets.randbits(31)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seed, src=0)
    return seed[0]


def compute_dtype_from_args(args, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """--mixed_precision, else what the launcher's configuration says, else bf16 on CUDA and fp32 on a CPU.

    The launcher exports "no" both for "no" and for nothing said; so that "no" decides nothing.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision and launcher not in ("no", args.mixed_precision):
        raise UsageError(
            f"--mixed_precision {args.mixed_precision} disagrees with mixed_precision: {launcher} of the accelerate "
            "config; remove it from one of the two"
        )
    name = (
        args.mixed_precision or (launcher if launcher != "no" else None) or ("bf16" if device.type == "cuda" else "no")
    )
    if name == "fp16" and device.type != "cuda":
        raise UsageError("fp16 trains on CUDA only; use --mixed_precision no or bf16 here")
    if name == "fp16" and stored == torch.bfloat16:
        raise UsageError("this checkpoint is stored in bf16 and overflows in fp16; use --mixed_precision bf16")
    if DTYPES.get(name) is None:
        raise UsageError(f"mixed_precision: {name} of the accelerate config is not supported; use no, fp16 or bf16")
    check_base_precision(args.base_precision, DTYPES[name], device)
    if stored != DTYPES[name]:
        logger.info("weights stored in %s are converted once and computed in %s", stored, DTYPES[name])
    return DTYPES[name]


def check_launcher_from_args(args) -> None:
    """Refuse an accelerate config whose accumulation or clipping is not the flags': each has one source of truth."""
    for dest, variable in LAUNCHER_VARIABLES.items():
        text = os.environ.get(variable, "auto")
        if text in ("auto", "none"):
            continue
        if float(text) != getattr(args, dest):
            name = variable.removeprefix("ACCELERATE_").lower()
            raise UsageError(
                f"--{dest} {getattr(args, dest)} disagrees with {name}: {text} of the accelerate config; remove it "
                "from the config, or give the same"
            )


def check_device_from_args(args, num_parameters: float, device: torch.device) -> None:
    """Refuse a model of real size without a GPU, unless --allow_cpu."""
    if device.type == "cpu" and num_parameters > REAL_SIZE and not args.allow_cpu:
        raise UsageError(
            f"no GPU found and the model has {num_parameters / 1e9:.1f} billion parameters: a step would take many "
            "minutes; pass --allow_cpu to try all the same"
        )


def on_main_process(accelerator, function: Callable):
    """What `function()` returns on the main process, for all ranks. A UserError there is raised on all of them.

    Else the others would wait for a process that is gone, and say something else in its place.
    """
    outcome = [None]
    if accelerator.is_main_process:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def meet(name: str, message: str = "") -> list[str]:
    """Wait until every rank has come to `name`, a name used once a run; returns their messages, in order.

    Through the process group's store: a collective would wait for the GPU, and end the run where one rank takes longer
    than --nccl_timeout.
    """
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return [message]
    store = torch.distributed.distributed_c10d._get_default_store()
    keys = [f"{name}/{rank}" for rank in range(torch.distributed.get_world_size())]
    store.set(keys[torch.distributed.get_rank()], message)
    deadline, pause = time.monotonic() + MEETING_SECONDS, 0.001
    while not store.check(keys):
        if time.monotonic() > deadline:
            raise UserError(f"{name}: another process did not come within {MEETING_SECONDS // 3600} hours")
        time.sleep(pause)  # in slices, so that Ctrl-C is heard
        pause = min(1.2 * pause, 0.1)
    return [message.decode() for message in store.multi_get(keys)]


# ---------------------------------------------------------------- plan


class StepPlan(NamedTuple):
    """Counts of a run: a step is one optimizer update of `accumulation` micro-steps; epochs flow into one another."""

    num_steps: int
    num_epochs: int
    num_micro_steps: int
    accumulation: int

    def micro_steps_in(self, step: int) -> int:
        """Micro-steps of the update after `step` updates; only the run's last may have fewer."""
        return min(self.accumulation, self.num_micro_steps - step * self.accumulation)

    def is_last_of_update(self, micro_step: int) -> bool:
        """True where the accumulated gradient is due."""
        return (micro_step + 1) % self.accumulation == 0 or micro_step + 1 == self.num_micro_steps


def plan_steps(batches_per_epoch: int, accumulation: int, num_epochs: int, max_steps: int | None = None) -> StepPlan:
    """How many updates, epochs and micro-steps a run has. `max_steps` given: it rules over `num_epochs`."""
    if max_steps is None:
        num_micro_steps = batches_per_epoch * num_epochs
        return StepPlan(math.ceil(num_micro_steps / accumulation), num_epochs, num_micro_steps, accumulation)
    num_micro_steps = max_steps * accumulation
    return StepPlan(max_steps, math.ceil(num_micro_steps / batches_per_epoch), num_micro_steps, accumulation)


def plan_steps_from_args(args, batches_per_epoch: int, num_ranks: int) -> StepPlan:
    """The flags' plan; what it leaves no room for is said."""
    plan = plan_steps(batches_per_epoch, args.gradient_accumulation_steps, args.num_train_epochs, args.max_train_steps)
    tell_what_never_comes_from_args(args, plan.num_steps, learning_rate_from_args(args, num_ranks))
    return plan


def tell_what_never_comes_from_args(args, num_steps: int, learning_rate: float) -> None:
    """A line each, before the run: the whole learning rate, a checkpoint, a validation."""
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


def sample_positions(micro_step: int, micro_batch: int, num_ranks: int, rank: int, size: int) -> list[int]:
    """Positions in the run of a rank's `size` samples: what every random draw of training depends on.

    `micro_batch` is the full batch of one rank. Accumulation, batch size and ranks only cut the same sequence
    differently, so that they change nothing but rounding.
    """
    first = micro_step * micro_batch * num_ranks + rank * size
    return list(range(first, first + size))


def learning_rate_from_args(args, num_ranks: int) -> float:
    """--learning_rate, times the global batch with --scale_lr."""
    factor = args.gradient_accumulation_steps * args.train_batch_size * num_ranks if args.scale_lr else 1
    return args.learning_rate * factor


# ---------------------------------------------------------------- in the loop


def make_loader_from_args(
    args, accelerator: Accelerator, dataset: Dataset, plan: StepPlan, seed: int, first_step: int
) -> tuple[range, DataLoader]:
    """(micro-steps that follow `first_step` updates, a loader of this rank's batches for them)."""
    ranks = {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes}
    sampler = BucketSampler(dataset.bucket_of, args.train_batch_size, **ranks, seed=seed, num_epochs=plan.num_epochs)
    micro_steps = range(first_step * plan.accumulation, plan.num_micro_steps)
    sampler.set_epoch(*divmod(micro_steps.start, sampler.per_epoch))
    return micro_steps, make_loader(dataset, sampler, args.dataloader_num_workers, args.pin_memory)


def to_device(values, device: torch.device):
    """A tensor, or the tensors of a batch, on `device`: from page-locked memory, so that the host waits for no GPU."""
    if isinstance(values, dict):
        return {name: to_device(value, device) for name, value in values.items()}
    if not torch.is_tensor(values):
        return values
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # kept by torch until the copy is made, then used again
    return values.to(device, non_blocking=True)


def stop_is_due(accelerator: Accelerator, step: int) -> bool:
    """True on all ranks after the same `step` if any was asked to stop. Ranks meet on the host: no GPU is waited for."""
    asked = INTERRUPTION.reason is not None
    if accelerator.num_processes == 1:
        return asked
    asked_of_ranks = meet(f"stop-{step}", "asked" if asked else "")
    # All have come here, so that none still reads what was said a step ago
    torch.distributed.distributed_c10d._get_default_store().delete_key(f"stop-{step - 1}/{accelerator.process_index}")
    return any(asked_of_ranks)


def memory_report(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB: the host's peak, and on CUDA torch's allocated and reserved, now and at their peak."""
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


@contextlib.contextmanager
def explained_oom_from_args(args, device: torch.device, buckets: Sequence[Bucket], level: str | None, is_lora: bool):
    """Within, a GPU whose memory is full is one line: peak, largest batch, and the flags that would make it fit.

    `level`: of memory that the run has, whichever --memory auto chose.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        largest = max(buckets, key=math.prod)
        peak = memory_report(device).get("peak_allocated_gib")
        raise MemoryFullError(
            f"the GPU's memory is full{f' (peak {peak:.1f} GiB)' if peak else ''}: batches of {args.train_batch_size} "
            f"with up to {largest.frames} frames of {largest.height}x{largest.width} (height x width). To make it fit, "
            f"the cheapest first: {'; '.join(memory_savers_from_args(args, level, is_lora))}. {oom_line(error)}"
        ) from error


def oom_line(error: torch.cuda.OutOfMemoryError) -> str:
    """What torch says, but for its advice of expandable segments where they are in use."""
    line = first_line(error)
    return line.partition(" If reserved but unallocated")[0] if uses_expandable_segments() else line


def memory_savers_from_args(args, level: str | None, is_lora: bool) -> list[str]:
    """Flags not in use that lower the peak of a run at `level`, by what they cost in speed and quality."""
    is_low_bit = args.use_8bit or args.use_4bit or args.use_fp8
    batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    streams = is_lora and not uses_deepspeed()  # whose time hardly differs from that of the other levels
    instead = " in place of --gradient_checkpointing" if args.gradient_checkpointing else ""
    savers = {
        f"--memory stream{instead}, with host memory for the weights": streams and level != "stream",
        "--memory balanced": not streams and level == "speed",
        "--gradient_checkpointing": not (streams or level or args.gradient_checkpointing),
        "--mixed_precision bf16": args.mixed_precision == "no",
        "--load_tensors on data of prepare_dataset.py, which needs no VAE here": not args.load_tensors,
        "--enable_slicing --enable_tiling": not (args.load_tensors or args.enable_tiling),
        f"--train_batch_size 1 --gradient_accumulation_steps {batch * accumulation}": batch > 1,
        "--use_8bit": args.optimizer in ("adam", "adamw") and not (is_low_bit or args.use_cpu_offload_optimizer),
        "--use_cpu_offload_optimizer": not (is_low_bit or args.use_cpu_offload_optimizer),
        "--offload_gradients": args.use_cpu_offload_optimizer and not args.offload_gradients,
        "smaller --frame_buckets, --height_buckets, --width_buckets": True,
    }
    return [flags for flags, helps in savers.items() if helps]


# ---------------------------------------------------------------- finish


def run_script(main: Callable[[], None], output_dir: str | Path, go_on: str = GO_ON) -> None:
    """Run `main` and leave: every error that a user can mend is one line, its exit code also in status.json.

    Any other error is a defect: exit code 70 too, after its traceback. A signal is 75, see signals.py. `go_on` says
    what the same command does then.
    """
    output_dir = Path(output_dir)
    os.environ[ERROR_LOG] = str(output_dir.absolute() / "errors.log")
    RUN.__init__(launch_id())
    keep()  # what a process before this one, or a run before in it, did
    with caught_signals(lambda: note_failure(output_dir, INTERRUPTED, f"stopped at once; {go_on}")):
        try:
            main()
            return
        except UserError as error:
            code, line = error.exit_code, str(error)
            if code == REFUSED:
                take_back()
        except KeyboardInterrupt:
            code, line = INTERRUPTED, f"interrupted by {INTERRUPTION.reason or 'the keyboard'}; {go_on}"
        except torch.cuda.OutOfMemoryError as error:
            code, line = INTERNAL, f"the GPU's memory is full: {oom_line(error)}"
        except Exception as error:  # the outermost place: with its traceback, unless a user can mend it
            code, line = explain(error, output_dir, go_on)
            if code == INTERNAL:
                dump_kept()
                traceback.print_exc()
            note_failure(output_dir, code, line)
            raise SystemExit(code) from error
        note_failure(output_dir, code, line)
    sys.exit(code)  # at once: the other ranks may wait in a collective that will never come


def explain(error: Exception, output_dir: Path, go_on: str) -> tuple[int, str]:
    """(exit code, line) of an error of a library."""
    if is_storage_error(error):
        return STORAGE, storage_line(error, output_dir)
    if "DataLoader worker" in str(error):  # torch raises it at any place, as soon as the worker has died
        return INTERRUPTED, f"a data worker was killed, most likely for lack of memory; {go_on}"
    return INTERNAL, repr(error)


def is_storage_error(error: Exception) -> bool:
    """True for a full, read-only or failing disk; safetensors hides the error number in its text."""
    in_text = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    number = int(in_text[1]) if in_text else getattr(error, "errno", None)
    return number in STORAGE_ERRORS


def nearest_folder(output_dir: str | Path) -> Path:
    """The folder, or of those above it the nearest that exists: on its disk it will be."""
    whole = Path(output_dir).absolute()
    return next(path for path in (whole, *whole.parents) if path.exists())


def storage_line(error: Exception, output_dir: str | Path) -> str:
    if getattr(error, "errno", None) not in (None, *FULL_DISK):
        return f"cannot read or write: {error}; when that is mended the same command continues"
    folder = nearest_folder(output_dir)
    free = free_bytes(folder) / 2**30
    return f"cannot write: {error}; {free:.1f} GiB are free in {folder}; with room there the same command continues"


def note_failure(output_dir: Path, code: int, line: str) -> None:
    """One line on stderr, and status.json unless another rank of this run has spoken there.

    Any rank may be the one that fails; what the others say after that is only that it is gone.
    """
    with beside_bars():
        print(f"error: {line}", file=sys.stderr, flush=True)
    # Before the run has begun a rank may be asked to stop because another was refused, which leaves no trace by hand
    may_be_refused = code == INTERRUPTED and not RUN.has_begun and int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        earlier = read_status(output_dir)
        if code == REFUSED:
            note_refusal(output_dir, line)
        elif may_be_refused or is_of_this_run(earlier):
            return
        elif not RUN.has_begun and earlier.get("state") == "complete":
            note_refusal(output_dir, line, code)  # a finished run stays one, whatever a later command lacked
        else:
            state = "interrupted" if code == INTERRUPTED else "failed"
            write_status(output_dir, state, code, message=line, step=last_step(output_dir))
    except (OSError, StorageError) as error:
        if code != STORAGE:  # which says already that the disk cannot be written
            print(f"error: status.json not written: {error}", file=sys.stderr, flush=True)


def last_step(output_dir: Path) -> int:
    """The newest checkpoint's step, 0 without one."""
    steps = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)
