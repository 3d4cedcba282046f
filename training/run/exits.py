"""How a run ends: every error that the user can fix becomes one line and an exit code, also in status.json."""

import contextlib
import errno
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from base.console import bars_cleared, print_suppressed
from base.errors import (
    ERROR_LOG_VARIABLE,
    INTERNAL,
    INTERRUPTED,
    REFUSED,
    STORAGE,
    MemoryFullError,
    StorageError,
    UserError,
    first_line,
)
from base.files import forget_undo, free_bytes, nearest_folder, undo_all
from base.memory_levels import HOST_LEVELS, obstacle_to_splitting_from_args
from base.ranks import exchange_on_host, group_store
from base.signals import INTERRUPTION, catch_signals
from base.startup import end_imports
from base.status import THIS_RUN, is_of_this_run, read_status, record_refusal, write_status
from data.buckets import Bucket
from engine.deepspeed_zero import uses_deepspeed
from memory.allocator import uses_expandable_segments
from run.launch import launch_id
from run.metrics import memory_report


FULL_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
STORAGE_ERRORS = FULL_DISK | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
RESUME_ADVICE = "the same command continues from the last checkpoint"


# ---------------------------------------------------------------- stop requests, out of memory


def stop_is_due(run, step: int) -> bool:
    """True on all ranks after the same `step` if any was asked to stop. Exchanged on the host: no GPU sync."""
    asked = INTERRUPTION.reason is not None
    if run.num_ranks == 1:
        return asked
    asked_of_ranks = exchange_on_host(f"stop-{step}", "asked" if asked else "")
    # All ranks have reached this step, so none still reads the previous step's keys
    group_store().delete_key(f"stop-{step - 1}/{run.rank}")
    return any(asked_of_ranks)


@contextlib.contextmanager
def explained_oom(args, device: torch.device, buckets: Sequence[Bucket], level: str | None, is_lora: bool):
    """Turn an out-of-memory error in the body into one line: peak, largest batch, and flags that would make it fit.

    `level`: the memory level in use, also if --memory auto chose it.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        largest = max(buckets, key=math.prod)
        peak = memory_report(device).get("peak_allocated_gib")
        raise MemoryFullError(
            f"the GPU's memory is full{f' (peak {peak:.1f} GiB)' if peak else ''}: batches of {args.train_batch_size} "
            f"with up to {largest.frames} frames of {largest.height}x{largest.width} (height x width). To make it fit, "
            f"the cheapest first: {'; '.join(memory_savers(args, level, is_lora))}. {oom_line(error)}"
        ) from error


def oom_line(error: torch.cuda.OutOfMemoryError) -> str:
    """torch's message, without its advice to use expandable segments if they are in use already."""
    line = first_line(error)
    return line.partition(" If reserved but unallocated")[0] if uses_expandable_segments() else line


def memory_savers(args, level: str | None, is_lora: bool) -> list[str]:
    """Unused flags that lower the peak of a run at `level`, cheapest in speed and quality first."""
    batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    streams = is_lora and not uses_deepspeed()  # hardly slower than the other levels
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    offloads = alone and not (
        is_lora or uses_deepspeed() or obstacle_to_splitting_from_args(args)
    )  # full fine-tuning's level
    has_small_states = args.use_8bit or args.use_4bit or args.use_fp8 or args.use_cpu_offload_optimizer
    instead = " in place of --gradient_checkpointing" if args.gradient_checkpointing else ""
    savers = {
        "a smaller --states_on_gpu": bool(args.states_on_gpu) and offloads,
        f"--memory stream{instead}, with host memory for the weights": streams and level != "stream",
        "--memory balanced": not streams and level == "speed",
        f"--memory offload{instead}, with host memory for the optimizer": offloads and level not in HOST_LEVELS,
        "--memory stream, with host memory for the weights, too": offloads and level == "offload",
        "--gradient_checkpointing": not (streams or offloads or level or args.gradient_checkpointing),
        "--mixed_precision bf16": args.mixed_precision == "no",
        "--load_tensors on data of prepare_dataset.py, which needs no VAE here": not args.load_tensors,
        f"--train_batch_size 1 --gradient_accumulation_steps {batch * accumulation}": batch > 1,
        "--use_8bit": args.optimizer in ("adam", "adamw") and not (offloads or has_small_states),
        "--use_cpu_offload_optimizer": not (offloads or has_small_states),
        "--offload_gradients": args.use_cpu_offload_optimizer and not (offloads or args.offload_gradients),
        "smaller --frame_buckets, --height_buckets, --width_buckets": True,
    }
    return [flags for flags, helps in savers.items() if helps]


# ---------------------------------------------------------------- finish


def run_script(main: Callable[[], None], output_dir: str | Path, resume_advice: str = RESUME_ADVICE) -> None:
    """Run `main` and exit: an error that the user can fix is one line, and its exit code is also in status.json.

    Any other error is a bug: exit code 70, with a traceback. A signal is 75, see base/signals.py. `resume_advice` says
    what the same command does next.
    """
    end_imports()
    output_dir = Path(output_dir)
    os.environ[ERROR_LOG_VARIABLE] = str(output_dir.absolute() / "errors.log")
    THIS_RUN.__init__(launch_id())
    forget_undo()  # left by an earlier run in this process, or by the process that forked it
    with catch_signals(lambda: record_failure(output_dir, INTERRUPTED, f"stopped at once; {resume_advice}")):
        try:
            main()
            return
        except UserError as error:
            code, line = error.exit_code, str(error)
            if code == REFUSED:
                undo_all()
        except KeyboardInterrupt:
            code, line = INTERRUPTED, f"interrupted by {INTERRUPTION.reason or 'the keyboard'}; {resume_advice}"
        except torch.cuda.OutOfMemoryError as error:
            code, line = INTERNAL, f"the GPU's memory is full: {oom_line(error)}"
        except Exception as error:  # outermost handler: prints the traceback unless the user can fix the error
            code, line = explain(error, output_dir, resume_advice)
            if code == INTERNAL:
                print_suppressed()
                traceback.print_exc()
            record_failure(output_dir, code, line)
            raise SystemExit(code) from error
        record_failure(output_dir, code, line)
    sys.exit(code)  # at once: the other ranks may wait in a collective that this one never joins


def explain(error: Exception, output_dir: Path, resume_advice: str) -> tuple[int, str]:
    """(exit code, line) for an error from a library."""
    if is_storage_error(error):
        return STORAGE, storage_line(error, output_dir)
    if "DataLoader worker" in str(error):  # torch raises it anywhere, once a worker has died
        return INTERRUPTED, f"a data worker was killed, most likely for lack of memory; {resume_advice}"
    return INTERNAL, repr(error)


def is_storage_error(error: Exception) -> bool:
    """True for a full, read-only or failing disk; safetensors has the error number only in its message."""
    in_text = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    number = int(in_text[1]) if in_text else getattr(error, "errno", None)
    return number in STORAGE_ERRORS


def storage_line(error: Exception, output_dir: str | Path) -> str:
    if getattr(error, "errno", None) not in (None, *FULL_DISK):
        return f"cannot read or write: {error}; once that is fixed, the same command continues"
    folder = nearest_folder(output_dir)
    free = free_bytes(folder) / 2**30
    return f"cannot write: {error}; {free:.1f} GiB are free in {folder}; with room there the same command continues"


def record_failure(output_dir: Path, code: int, line: str) -> None:
    """Print one line on stderr and write status.json, unless another rank of this run already has.

    Any rank may be the first to fail; what the others report afterwards is only a consequence.
    """
    with bars_cleared():
        print(f"error: {line}", file=sys.stderr, flush=True)
    # Before the run has begun, a stop may only mean that another rank was refused, and a refusal keeps the old status
    may_be_refused = code == INTERRUPTED and not THIS_RUN.has_begun and int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        earlier = read_status(output_dir)
        if code == REFUSED or not THIS_RUN.writes_status:
            record_refusal(output_dir, line, code)
        elif may_be_refused or is_of_this_run(earlier):
            return
        elif not THIS_RUN.has_begun and earlier.get("state") == "complete":
            record_refusal(output_dir, line, code)  # a finished run stays finished, whatever a later command lacked
        else:
            state = "interrupted" if code == INTERRUPTED else "failed"
            write_status(output_dir, state, code, message=line, step=last_step(output_dir))
    except (OSError, StorageError) as error:
        if code != STORAGE:  # whose line already says that the disk cannot be written
            print(f"error: status.json not written: {error}", file=sys.stderr, flush=True)


def last_step(output_dir: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    steps = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)
