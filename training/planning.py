"""--memory auto and --memory plan: what a run takes at each level, on this machine, and the level that it gets."""

import logging
import math
import os
from collections.abc import Callable

import psutil
import torch
import torch.distributed
from torch import nn

from engine import block_loader_from_args
from errors import UsageError
from memory_plan import GIB, Run, fastest_that_fits, table
from optimizers import state_bytes_from_args
from quantization import BASE_LINEARS
from streaming import free_on_gpu
from zero import uses_deepspeed


logger = logging.getLogger(__name__)


def choose_level_from_args(
    args, transformer: nn.Module, shape: tuple, dtype: torch.dtype, device: torch.device, is_lora: bool
) -> tuple[str | None, Callable | None]:
    """(--memory, what `load_transformer` is to fill the blocks with). Before anything lies on the GPU.

    auto is the fastest level that fits all ranks, UsageError where none does; plan prints what each takes and leaves.
    `transformer` has no memory, `shape` is [B, S, heads, head_dim] of the largest batch.
    """
    level = args.memory
    if level in ("auto", "plan"):
        run = run_from_args(args, transformer, shape, dtype, is_lora)
        gpu_bytes = free_on_gpu(device) if device.type == "cuda" else math.inf
        free = smallest_of_all_ranks(gpu_bytes, psutil.virtual_memory().available)
        if level == "plan":
            print_once(table(run, *free))
            raise SystemExit(0)
        level = fastest_level(run, *free)
    return level, block_loader_from_args(args, level, device)


def fastest_level(run: Run, gpu_bytes: float, host_bytes: float) -> str:
    """The level of --memory auto, and in the log what it was chosen from."""
    level = fastest_that_fits(run, gpu_bytes, host_bytes)
    if level is None:
        more = "" if run.is_lora else ", or --use_cpu_offload_optimizer --offload_gradients, or train a LoRA"
        raise UsageError(
            f"--memory auto: no level fits the {gpu_bytes / GIB:.1f} GiB that are free on the GPU and the "
            f"{host_bytes / GIB:.1f} GiB of host memory; give smaller --frame_buckets, --height_buckets and "
            f"--width_buckets or --train_batch_size 1{more}"
        )
    logger.info("memory by level, estimated:\n%s", table(run, gpu_bytes, host_bytes))
    logger.info("--memory auto: %s", level)
    return level


def print_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text)


def run_from_args(args, transformer: nn.Module, shape: tuple, dtype: torch.dtype, is_lora: bool) -> Run:
    blocks, config = transformer.transformer_blocks, transformer.config
    return Run(
        shape=shape,
        num_blocks=len(blocks),
        num_weights=count(transformer),
        num_block_weights=count(blocks),
        num_block_linears=sum(
            module.weight.numel() for name, module in linears(blocks) if name.endswith(BASE_LINEARS)
        ),
        num_trained=num_adapted(transformer, args.lora_target_modules, args.rank) if is_lora else count(transformer),
        is_lora=is_lora,
        may_stream=is_lora and not uses_deepspeed(),
        rotary=config.get("use_rotary_positional_embeddings", False)
        and not config.get("use_learned_positional_embeddings", False),
        item_bytes=dtype.itemsize,
        base_precision=args.base_precision,
        state_bytes=state_bytes_from_args(args),
        host_optimizer=args.use_cpu_offload_optimizer,
        host_gradients=args.use_cpu_offload_optimizer and args.offload_gradients,
        validates=args.validation_prompt is not None or not args.load_tensors,
        tiled=args.enable_tiling,
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


def smallest_of_all_ranks(*numbers: float) -> list[float]:
    """The smallest of each over all ranks, so that they choose alike."""
    if not torch.distributed.is_initialized():
        return list(numbers)
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, numbers)
    return [min(values) for values in zip(*gathered, strict=True)]
