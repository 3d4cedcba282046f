"""--memory auto and --memory plan: what a run takes at each level, on this machine, and the level that it gets."""

import logging
import os
from collections.abc import Callable

import psutil
import torch
from torch import nn

from base.errors import UsageError, print_to_pipe
from base.files import free_bytes, nearest_folder
from base.ranks import smallest_of_all_ranks
from data.captions import embeds_bytes
from data.dataset import build_dataset_from_args
from engine.compose import block_loader_from_args
from engine.deepspeed_zero import uses_deepspeed
from engine.optimizers import state_bytes_from_args
from memory.allocator import expand_segments, uses_expandable_segments
from memory.estimate import GIB, Run, closest, fastest_that_fits, table
from memory.host import free_on_gpu
from memory.quantization import BASE_LINEARS
from run.launch import PRECISIONS


logger = logging.getLogger(__name__)


def plan_memory_from_args(
    args, outline, buckets, dtype: torch.dtype, device: torch.device, is_lora: bool
) -> tuple[str | None, tuple, Callable | None]:
    """(level, [B, S, heads, head_dim] of the largest batch, what `load_transformer` is to fill the blocks with).

    --memory auto is the fastest level that fits all ranks, UsageError where none does. Before anything lies on the GPU.
    `outline`: of the model, from its configuration; `buckets`: (frames, height, width) of the clips.
    """
    shape = outline.shape_of(buckets, args.train_batch_size)
    level = args.memory
    if level == "auto" and device.type != "cuda":
        logger.info("--memory auto: speed, as there is no GPU whose memory could be short")
        level = "speed"
    elif level == "auto":
        run = run_from_args(args, outline, buckets, dtype, is_lora)
        level = fastest_level(run, *smallest_of_all_ranks(free_on_gpu(device), psutil.virtual_memory().available))
    return level, shape, block_loader_from_args(args, level, device)


def fastest_level(run: Run, gpu_bytes: float, host_bytes: float) -> str:
    """The level of --memory auto, and in the log what it was chosen from."""
    level = fastest_that_fits(run, gpu_bytes, host_bytes)
    if level is None:
        name, needed = closest(run, gpu_bytes, host_bytes)
        more = "" if run.is_lora else ", or --use_cpu_offload_optimizer --offload_gradients, or train a LoRA"
        raise UsageError(
            f"--memory auto: no level fits the {gpu_bytes / GIB:.1f} GiB that are free on the GPU and the "
            f"{host_bytes / GIB:.1f} GiB of host memory; the closest, {name}, takes {needed.reserved / GIB:.1f} and "
            f"{needed.host / GIB:.1f}; give smaller --frame_buckets, --height_buckets and --width_buckets or "
            f"--train_batch_size 1{more}"
        )
    logger.info("memory by level, estimated:\n%s", table(run, gpu_bytes, host_bytes))
    logger.info("--memory auto: %s", level)
    return level


def print_plan_from_args(args, outline, is_lora: bool) -> None:
    """--memory plan: a line for each level, from the model's `outline` and the data's sizes alone; nothing is written.

    Without a GPU: what one would need.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expand_segments(device)  # as the run would, before the estimates
    reading = (args, outline.fps, args.seed or 0, outline.scaling_factor, outline.image_to_video)
    dataset, dtype = build_dataset_from_args(*reading), PRECISIONS[args.mixed_precision or "bf16"]
    run = run_from_args(args, outline, dataset.bucket_of, dtype, is_lora)
    free = free_on_gpu(device) if device.type == "cuda" else None
    lines = [table(run, free, psutil.virtual_memory().available)]
    if not args.load_tensors:
        lines.append(disk_line(args.output_dir, outline.transformer.config, dataset.prompts, dtype))
    print_to_pipe("\n".join(lines))


def disk_line(output_dir: str, config, prompts: list[str], dtype: torch.dtype) -> str:
    """What the captions' embeddings take: of the disk, since their file is mapped, and not of the host's memory."""
    num_captions = len(set(prompts)) + 1  # the empty one
    needed = embeds_bytes((num_captions, config["max_text_seq_length"], config["text_embed_dim"]), dtype)
    place = nearest_folder(output_dir)
    free = free_bytes(place)
    verdict = "yes" if needed <= free else "no"
    return (
        f"disk: {needed / GIB:.1f} GiB for the embeddings of {num_captions} captions, as long as the run lasts; "
        f"{free / GIB:.1f} GiB are free in {place}; fits: {verdict}"
    )


def run_from_args(args, outline, buckets, dtype: torch.dtype, is_lora: bool) -> Run:
    transformer, config = outline.transformer, outline.transformer.config
    blocks, deepspeed = transformer.transformer_blocks, uses_deepspeed()
    zero_on_host = deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE") == "cpu"
    state = state_bytes_from_args(args) + (0 if is_lora or not args.ema else 4)
    on_host = 4 + 4 + 2 + state  # fp32 weight and gradient, and a copy that travels
    if zero_on_host:
        on_host += 10  # measured
    return Run(
        shape=outline.shape_of(buckets, args.train_batch_size),
        num_blocks=len(blocks),
        num_weights=count(transformer),
        num_block_weights=count(blocks),
        num_block_linears=sum(
            module.weight.numel() for name, module in linears(blocks) if name.endswith(BASE_LINEARS)
        ),
        num_trained=num_adapted(transformer, args.lora_target_modules, args.rank) if is_lora else count(transformer),
        is_lora=is_lora,
        deepspeed=deepspeed,
        rotary=config.get("use_rotary_positional_embeddings", False)
        and not config.get("use_learned_positional_embeddings", False),
        item_bytes=dtype.itemsize,
        base_precision=args.base_precision,
        state_bytes=state,
        host_optimizer=on_host if args.use_cpu_offload_optimizer or zero_on_host else 0,
        host_gradients=(args.use_cpu_offload_optimizer and args.offload_gradients) or zero_on_host,
        converted=outline.stored != dtype,
        compiled=not args.no_compile_blocks,
        area=max(height * width for _, height, width in buckets),
        pixels=max(frames * height * width for frames, height, width in buckets),
        raw=not args.load_tensors,
        renders=args.validation_prompt is not None,
        sliced=args.enable_slicing,
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
    """Weights of a LoRA of `rank` on the layers whose names end with one of `targets`."""
    ends = tuple(f".{target}" for target in targets)
    return sum(
        rank * (layer.in_features + layer.out_features) for name, layer in linears(transformer) if name.endswith(ends)
    )
