"""The start of a process: launcher, ranks, device, precision, seed."""

import contextlib
import logging
import os
import secrets
import socket
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed
from accelerate import Accelerator, InitProcessGroupKwargs

from attention.kernels import check_sage
from base.console import capture_prints, log_errors_only, log_to_stderr
from base.dtypes import DTYPES
from base.errors import UsageError
from base.ranks import group_store
from base.startup import STARTUP
from base.status import THIS_RUN
from engine.deepspeed_zero import check_deepspeed_from_args, uses_deepspeed
from memory.allocator import expand_segments
from memory.quantization import check_base_precision
from run.hub import check_hub
from run.output_dir import open_output_dir
from run.tracking import tracking_options


logger = logging.getLogger(__name__)

PRECISIONS = {"no": DTYPES["fp32"], "fp16": DTYPES["fp16"], "bf16": DTYPES["bf16"]}  # by --mixed_precision's names
REAL_SIZE = 200e6  # parameters; above it, a step on a CPU takes minutes
# Variables that the launcher exports, if its config sets them
LAUNCHER_VARIABLES = {
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "max_grad_norm": "ACCELERATE_GRADIENT_CLIPPING",
}
LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}


def find_launcher() -> psutil.Process | None:
    """The launcher that started this process."""
    with contextlib.suppress(psutil.Error):  # the parent is another user's, or gone
        parent = psutil.Process().parent()
        if parent and LAUNCHERS & {Path(word).name for word in parent.cmdline()[:4]}:
            return parent
    return None


def launch_time() -> float:
    """When the launcher was started, or this process if it has none."""
    return (find_launcher() or psutil.Process()).create_time()


def launch_id() -> str | None:
    """An id of this launch, the same in all processes of the launcher; None without one."""
    launcher = find_launcher()
    return f"{socket.gethostname()}-{launcher.pid}-{launcher.create_time()}" if launcher else None


def agree_on_run() -> None:
    """All ranks take rank 0's run id: every machine has its own launcher, and mpirun is not among the known ones."""
    if torch.distributed.is_initialized():
        store = group_store()
        if torch.distributed.get_rank() == 0:
            store.set("run", THIS_RUN.id)
        THIS_RUN.id = store.get("run").decode()


class Run(NamedTuple):
    """The processes of a run, and what they have agreed on."""

    accelerator: Accelerator
    device: torch.device
    rank: int
    num_ranks: int
    seed: int
    output_dir: Path
    hub_repo: str | None  # to upload to; None without an upload and on other ranks


def open_run(args) -> Run:
    """Start the processes, claim the output folder and the repository; refuses here if it cannot have them."""
    accelerator = init_accelerator(args)
    ranks = (accelerator.device, accelerator.process_index, accelerator.num_processes)
    hub_repo = check_hub(args, accelerator)
    earlier_seed = open_output_dir(args, accelerator)
    seed = shared_seed(args) if earlier_seed is None else earlier_seed
    return Run(accelerator, *ranks, seed, Path(args.output_dir), hub_repo)


def init_accelerator(args) -> Accelerator:
    """Processes and device. accelerate's precision stays "no", its autocast unused: see `compute_dtype`."""
    STARTUP.begin(launch_time())
    STARTUP.mark("imports")
    log_to_stderr()
    check_launcher(args)
    check_deepspeed_from_args(args)
    # No backend is named: accelerate picks nccl on GPUs and gloo on CPUs, and fails on one process if one is named
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=args.nccl_timeout))
    cpu = not torch.cuda.is_available() and not uses_deepspeed()  # cpu=True would drop DeepSpeed
    options = tracking_options(args)
    if uses_deepspeed():
        import deepspeed  # noqa: F401 - imported before prints are captured: its logger binds stdout
    with capture_prints():  # of DeepSpeed, which builds an operator here
        accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[process_group], **options)
    agree_on_run()
    if not accelerator.is_main_process:
        log_errors_only()
    expand_segments(accelerator.device)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def shared_seed(args) -> int:
    """--seed, or one that rank 0 draws for all."""
    if args.seed is not None:
        return args.seed
    seed = [secrets.randbits(31)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seed, src=0)
    return seed[0]


def compute_dtype(args, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """--mixed_precision, else the launcher's config, else bf16 on CUDA and fp32 on a CPU; refused if it cannot work here.

    The launcher exports "no" both for "no" and if nothing is set, so "no" decides nothing.
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
    if PRECISIONS.get(name) is None:
        raise UsageError(f"mixed_precision: {name} of the accelerate config is not supported; use no, fp16 or bf16")
    check_base_precision(args.base_precision, PRECISIONS[name], device)
    if stored != PRECISIONS[name]:
        logger.info("weights stored in %s are converted once and computed in %s", stored, PRECISIONS[name])
    if args.validation_prompt is not None and args.validation_attention == "sage":
        check_sage(PRECISIONS[name], device)
    return PRECISIONS[name]


def check_launcher(args) -> None:
    """Refuse an accelerate config whose accumulation or clipping contradicts the flags': one source of truth each."""
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


def check_device(args, num_parameters: float, device: torch.device) -> None:
    """Refuse a model of real size without a GPU, unless --allow_cpu is given."""
    if device.type == "cpu" and num_parameters > REAL_SIZE and not args.allow_cpu:
        raise UsageError(
            f"no GPU found and the model has {num_parameters / 1e9:.1f} billion parameters: a step would take many "
            "minutes; pass --allow_cpu to try anyway"
        )
