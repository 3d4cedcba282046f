"""--memory auto and --memory plan: what a run needs at each level on this machine, and which level it gets."""

import logging
import os

import psutil
import torch
from torch import nn

from base.errors import UsageError, print_to_pipe
from base.files import free_bytes, nearest_folder
from base.memory_levels import FP32, HOST, HOST_LEVELS, ON_HOST_INSTEAD, RING, SPLIT
from base.ranks import min_over_ranks
from base.startup import STARTUP
from data.captions import embeds_bytes
from data.dataset import build_dataset_from_args
from engine.deepspeed_zero import uses_deepspeed
from engine.master_weights import choose_masters_from_args
from engine.optimizers import state_bytes_from_args
from memory.allocator import expand_segments, uses_expandable_segments
from memory.choose_level import fastest_that_fits, nearest_level, table
from memory.estimate import GIB, Workload
from memory.host import free_gpu_bytes
from memory.quantization import BASE_LINEARS
from run.launch import PRECISIONS


logger = logging.getLogger(__name__)

ON_HOST = "fp32 weights, gradients and optimizer states"


def choose(args, model, buckets, dtype: torch.dtype, device: torch.device, is_lora: bool) -> tuple[str | None, float]:
    """Resolve --memory and --states_on_gpu: auto is the fastest level that fits on all ranks, with what states fit.

    UsageError if none does. Call it before anything is on the GPU. `buckets`: (frames, height, width) of the clips, in
    pixels.
    """
    if not is_lora:
        check_sft_fits(args, model.num_parameters, dtype, device)
    level, share = args.memory, args.states_on_gpu or 0.0
    if level == "auto" and device.type != "cuda":
        logger.info("--memory auto: speed, since there is no GPU to run out of memory")
        level = "speed"
    elif level == "auto":
        workload = make_workload(args, model, model.stored_dtype, buckets, dtype, is_lora)
        free = min_over_ranks(free_gpu_bytes(device), free_host_bytes(args))
        level, share = fastest_level(workload, *free)
    STARTUP.mark("data")
    return level, share


def fastest_level(workload: Workload, gpu_bytes: float, host_bytes: float) -> tuple[str, float]:
    """The level and the share of states on the GPU for --memory auto; logs the estimates that they were chosen by."""
    fastest = fastest_that_fits(workload, gpu_bytes, host_bytes)
    if fastest is None:
        name, needed = nearest_level(workload, gpu_bytes, host_bytes)
        hosted = "" if workload.rings else ", or --use_cpu_offload_optimizer --offload_gradients"
        more = "" if workload.is_lora else f"{hosted}, or train a LoRA"
        raise UsageError(
            f"--memory auto: no level fits the {gpu_bytes / GIB:.1f} GiB that are free on the GPU and the "
            f"{host_bytes / GIB:.1f} GiB of host memory; the closest, {name}, takes {needed.reserved / GIB:.1f} and "
            f"{needed.host / GIB:.1f}; give smaller --frame_buckets, --height_buckets and --width_buckets or "
            f"--train_batch_size 1{more}"
        )
    logger.info("memory by level, estimated:\n%s", table(workload, gpu_bytes, host_bytes))
    level, share = fastest
    logger.info("--memory auto: %s%s", level, f" --states_on_gpu {share:.3g}" if share else "")
    return fastest


def print_plan(args, model, is_lora: bool) -> None:
    """--memory plan: print one line per level, from the model's config and the data's sizes alone; nothing is written.

    Without a GPU: what one would need.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expand_segments(device)  # as the run does: the estimates depend on it
    dataset = build_dataset_from_args(args, model, args.seed or 0)
    dtype = PRECISIONS[args.mixed_precision or "bf16"]
    stored = model.stored_dtype if model.has_weights else torch.bfloat16  # as almost all on the hub are
    workload = make_workload(args, model, stored, dataset.clip_buckets, dtype, is_lora)
    free = free_gpu_bytes(device) if device.type == "cuda" else None
    lines = [table(workload, free, free_host_bytes(args))]
    if not args.load_tensors:
        lines.append(disk_line(args.output_dir, model.text_shape, dataset.prompts, dtype))
    print_to_pipe("\n".join(lines))


def free_host_bytes(args) -> float:
    return psutil.virtual_memory().available if args.host_memory is None else args.host_memory * GIB


def disk_line(output_dir: str, text_shape: tuple[int, int], prompts: list[str], dtype: torch.dtype) -> str:
    """Disk space for the captions' embeddings. Their file is mapped, so they do not count as host memory."""
    num_captions = len(set(prompts)) + 1  # the empty one
    needed = embeds_bytes((num_captions, *text_shape), dtype)
    folder = nearest_folder(output_dir)
    free = free_bytes(folder)
    verdict = "yes" if needed <= free else "no"
    return (
        f"disk: {needed / GIB:.1f} GiB for the embeddings of {num_captions} captions, as long as the run lasts; "
        f"{free / GIB:.1f} GiB are free in {folder}; fits: {verdict}"
    )


def make_workload(args, model, stored: torch.dtype, buckets, dtype: torch.dtype, is_lora: bool) -> Workload:
    """What the memory formula needs to know about a run with weights `stored` in one dtype and compute in `dtype`."""
    transformer = model.empty_transformer()
    config = transformer.config
    blocks, deepspeed = transformer.transformer_blocks, uses_deepspeed()
    zero_on_host = deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE") == "cpu"
    state = state_bytes_from_args(args) + (0 if is_lora or not args.ema else 4)
    on_host = 4 + 4 + 2 + state  # fp32 weight and gradient, and the 2-byte copy that is transferred
    if zero_on_host:  # in each process, fitted to measurements on one and two GPUs: most of it is divided among them
        on_host = 1.2 + 26.8 / num_ranks()
    masters = kind_of_masters(args, None, dtype)
    if is_lora or deepspeed:
        masters = HOST if args.use_cpu_offload_optimizer or zero_on_host else FP32
    return Workload(
        shape=model.attention_shape(buckets, args.train_batch_size),
        num_blocks=len(blocks),
        num_weights=count(transformer),
        num_block_weights=count(blocks),
        num_block_linears=sum(
            module.weight.numel() for name, module in linears(blocks) if name.endswith(BASE_LINEARS)
        ),
        num_trained=num_adapted(transformer, args.lora_target_modules, args.rank) if is_lora else count(transformer),
        is_lora=is_lora,
        masters=masters,
        share=args.states_on_gpu or 0.0,
        rings=not (is_lora or deepspeed) and kind_of_masters(args, "offload", dtype) == RING,
        accumulates=accumulates(args),
        deepspeed=deepspeed,
        rotary=config.get("use_rotary_positional_embeddings", False)
        and not config.get("use_learned_positional_embeddings", False),
        item_bytes=dtype.itemsize,
        stored_bytes=stored.itemsize,
        base_precision=args.base_precision,
        state_bytes=state,
        host_optimizer=on_host if masters == HOST else 0,
        host_gradients=(args.use_cpu_offload_optimizer and args.offload_gradients) or zero_on_host,
        converted=stored != dtype,
        compiled=not args.no_compile_blocks,
        area=max(height * width for _, height, width in buckets),
        pixels=max(frames * height * width for frames, height, width in buckets),
        raw=not args.load_tensors,
        decoded_ahead=0 if args.load_tensors else 2 * args.dataloader_num_workers,  # torch's prefetch_factor
        renders=args.validation_prompt is not None,
        tiled=args.enable_tiling,
        offloads_models=args.enable_model_cpu_offload,
        expandable=uses_expandable_segments(),
        num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(f".{name}", layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


def num_adapted(transformer: nn.Module, targets: list[str], rank: int) -> int:
    """Number of weights of a LoRA of `rank` on the layers whose names end with one of `targets`."""
    ends = tuple(f".{target}" for target in targets)
    return sum(
        rank * (layer.in_features + layer.out_features) for name, layer in linears(transformer) if name.endswith(ends)
    )


def num_ranks() -> int:
    """From the launcher, before a process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def kind_of_masters(args, level: str | None, dtype: torch.dtype) -> str:
    return choose_masters_from_args(args, level, dtype, num_ranks())


def accumulates(args) -> bool:
    """True if an update sums several gradients, which is done in fp32."""
    return args.gradient_accumulation_steps > 1 or num_ranks() > 1


# ---------------------------------------------------------------- does it fit?


def check_sft_fits(args, num_weights: float, dtype: torch.dtype, device: torch.device) -> None:
    """UsageError, before anything is loaded, if weights, gradients and optimizer states alone do not fit."""
    check_states_on_host(args, dtype)
    # DeepSpeed shards them; --memory auto estimates all of it
    if device.type != "cuda" or uses_deepspeed() or args.memory == "auto":
        return
    kind = kind_of_masters(args, args.memory, dtype)
    on_device, on_host = sft_bytes_per_weight(args, kind, dtype)
    size, weights = num_weights / 2**30, f"full fine-tuning of {num_weights / 1e9:.1f} billion weights"
    free = free_gpu_bytes(device) / 2**30
    if on_device * size > free:
        raise UsageError(
            f"{weights} needs {on_device * size:.0f} GiB for {what_lies_on_device(args, kind)}, and {free:.0f} GiB "
            f"are free on the GPU; {how_to_need_less(args, kind)}"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, each with its own masters
    available = free_host_bytes(args) / 2**30
    if on_host * size * processes > available:
        flag = "--use_cpu_offload_optimizer" if args.use_cpu_offload_optimizer else f"--memory {args.memory}"
        what = "gradients, optimizer states and the low bits of weights" if kind == RING else ON_HOST
        raise UsageError(
            f"{flag}: {weights} needs {on_host * size * processes:.0f} GiB of host memory for {what} of {processes} "
            f"process(es), and {available:.0f} GiB are available"
        )


def check_states_on_host(args, dtype: torch.dtype) -> None:
    """UsageError if states in host memory cannot work here; the flags alone were checked when they were parsed."""
    low_bit = args.use_8bit and args.use_cpu_offload_optimizer
    if not (args.memory in HOST_LEVELS or low_bit):
        return
    flags = f"--memory {args.memory}" if args.memory in HOST_LEVELS else "--use_8bit --use_cpu_offload_optimizer"
    if uses_deepspeed():
        raise UsageError(f"{flags}: DeepSpeed has an optimizer of its own; use --memory balanced with it")
    if num_ranks() > 1:
        raise UsageError(
            f"{flags}: full fine-tuning has that on one GPU only yet, not on {num_ranks()}; use {ON_HOST_INSTEAD}"
        )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"{flags}: full fine-tuning has that in bf16 only, and this run computes in {name}; use "
            f"--mixed_precision bf16, or {ON_HOST_INSTEAD}"
        )


def sft_bytes_per_weight(args, kind: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes on the GPU, bytes on the host) per trained weight, including gradient and optimizer states."""
    states = state_bytes_from_args(args)
    if kind in (SPLIT, RING):
        average = 4 if args.ema else 0
        moved = 2 + states + average + (4 if accumulates(args) else 2)  # low bits, states and gradient
        share, streamed = (args.states_on_gpu or 0, args.memory == "stream") if kind == RING else (1, False)
        return (0 if streamed else 2) + share * moved, (2 if streamed else 0) + (1 - share) * moved
    trained = 4 + states + (4 if args.ema else 0)
    if kind == HOST:
        return dtype.itemsize + (0 if args.offload_gradients else 4), trained + 4
    return trained + 4 + (0 if dtype == torch.float32 else dtype.itemsize), 0


def what_lies_on_device(args, kind: str) -> str:
    if kind == RING or (kind == HOST and args.offload_gradients):
        return "the weights"
    return "the weights and fp32 gradients" if kind == HOST else ON_HOST


def how_to_need_less(args, kind: str) -> str:
    """The end of a sentence; a LoRA always takes less."""
    flag = ""
    if kind == SPLIT and num_ranks() == 1:
        flag = "--memory offload" + (" in place of --gradient_checkpointing" if args.gradient_checkpointing else "")
    elif kind in (SPLIT, FP32):
        flag = "--use_cpu_offload_optimizer"
    elif kind == HOST and not args.offload_gradients:
        flag = "--offload_gradients"
    return (f"add {flag}, or " if flag else "") + "train a LoRA, or a smaller model"
