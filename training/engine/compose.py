"""Builds the engines: the one place where weights, precision and memory techniques are combined, in one order."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
from diffusers.training_utils import EMAModel
from torch import nn

from attention.choose_kernel import pick_attention
from attention.kernels import SAVED_OPS, make_attend
from attention.norm_rope import can_fuse, norm_and_rotate
from attention.processor import JointAttention
from base.dtypes import DTYPES
from base.memory_levels import HOST, HOST_LEVELS, RING, SPLIT
from base.ranks import is_distributed
from base.startup import STARTUP
from engine.block_states import Storage
from engine.deepspeed_zero import ZeroMasters, start_deepspeed_from_args, uses_deepspeed
from engine.engines import Engine, LoraEngine, SftEngine, SplitSftEngine
from engine.lora import (
    add_lora,
    is_plain,
    project,
    project_apart,
    start_from_lora,
)
from engine.master_weights import HostMasters, Masters, choose_masters_from_args
from engine.optimizers import ADAMS, adam_settings_from_args, make_optimizer_from_args
from engine.ring_adam import RingAdam
from engine.state_ring import StateRing
from memory.activations import offload_activations
from memory.quantization import frozen_linears, frozen_products, quantize_base
from memory.recompute import checkpoint_blocks, compile_blocks, uses_triton
from memory.streaming import stream_weights


logger = logging.getLogger(__name__)


def build_lora_engine_from_args(
    args, level, transformer: nn.Module, model, shape: tuple, run, resumes: bool
) -> LoraEngine:
    """Prepare `transformer`, frozen, on the CPU and in the compute dtype, for training a LoRA on the run's device.

    `level`: memory level or None; `shape`: [B, S, heads, head_dim] of the largest batch. Read from `model`: its pipeline
    class, to check the result with. A run that `resumes` ignores --init_lora.
    """
    dtype, device = transformer.dtype, run.device
    attend = make_attend(agree_on_attention(args, shape, dtype, device))
    names, init = args.lora_target_modules, args.lora_init
    params = add_lora(transformer, args.rank, args.lora_alpha, run.seed, names, init, args.use_dora, args.use_rslora)
    if args.init_lora and not resumes:
        start_from_lora(transformer, Path(args.init_lora))
    if args.base_precision != "bf16":
        quantize_base(transformer, args.base_precision, device)
    set_attention(transformer, attend, device)
    masters = None
    if uses_deepspeed():
        masters = ZeroMasters(params, device, torch.float32)
    elif args.use_cpu_offload_optimizer:
        masters = HostMasters(params, device, torch.float32, args.offload_gradients)
    set_memory_level(args, level, transformer, device)
    if level == "stream":
        stream_weights(transformer.transformer_blocks, device)  # from here on `.to()` leaves the blocks in host memory
    transformer.to(device).train()
    STARTUP.mark("engine")
    trained = masters.params if masters else params
    return LoraEngine(transformer, trained, notes_for_inference(args), level, model.pipeline_class, masters)


def build_sft_engine_from_args(
    args,
    level,
    share: float,
    transformer: nn.Module,
    shape: tuple,
    dtype: torch.dtype,
    stored_dtype: torch.dtype,
    device: torch.device,
) -> SftEngine:
    """Prepare `transformer`, on the CPU as stored, for training all its weights on `device` with compute in `dtype`.

    `level` and `shape` as above; `share`: of the blocks whose states stay on the GPU at the levels that keep them on the
    host. The masters start from the stored weights, before these are rounded to `dtype`.
    """
    attend = make_attend(agree_on_attention(args, shape, dtype, device))
    set_attention(transformer, attend, device)
    set_memory_level(args, level, transformer.requires_grad_(True), device)
    masters = make_masters(args, level, share, transformer, device, dtype)
    nn.Module.to(transformer, device, dtype).train()  # diffusers' own .to() warns about modules that do not exist here
    params = masters.params if masters else list(transformer.parameters())
    splits, ema = isinstance(masters, StateRing), None
    if args.ema:
        ema = masters.ema if splits else EMAModel(params, decay=args.ema_decay)
        logger.info("the moving average of the weights is what is validated and written; it lies beside them in fp32")
    STARTUP.mark("engine")
    save_dtype = DTYPES[args.save_dtype] if args.save_dtype else stored_dtype
    notes = notes_for_inference(args)
    engine_class = SplitSftEngine if splits else SftEngine
    return engine_class(transformer, params, notes, level, save_dtype, masters, ema)


def make_masters(
    args, level: str | None, share: float, transformer: nn.Module, device: torch.device, dtype: torch.dtype
):
    """fp32 masters of all weights for compute in `dtype`; None if the weights are in fp32 themselves."""
    weights, blocks = list(transformer.parameters()), transformer.transformer_blocks
    if uses_deepspeed():
        return ZeroMasters(weights, device, dtype)
    num_ranks = torch.distributed.get_world_size() if is_distributed() else 1
    kind = choose_masters_from_args(args, level, dtype, num_ranks)
    if kind in (SPLIT, RING):
        accumulates = args.gradient_accumulation_steps > 1 or num_ranks > 1
        ema = EMAModel([], decay=args.ema_decay) if args.ema else None  # the ring keeps the averages
        storage = Storage(share if kind == RING else 1.0, streams=level == "stream", low_bit=args.use_8bit)
        return StateRing(transformer, blocks, device, storage, accumulates, ema)
    if kind == HOST:
        return HostMasters(weights, device, dtype, args.offload_gradients)
    return None if dtype == torch.float32 else Masters(weights, device, dtype)


def build_engine_optimizer_from_args(args, accelerator, engine: Engine, learning_rate: float):
    """RingAdam for split masters, DeepSpeed if the accelerate config has it, else what make_optimizer_from_args makes."""
    if isinstance(engine.masters, StateRing):
        settings = adam_settings_from_args(args, learning_rate)
        return RingAdam(engine.masters, ADAMS[args.optimizer], settings)
    if not uses_deepspeed():
        return make_optimizer_from_args(args, engine.params, learning_rate)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    return start_deepspeed_from_args(args, config, engine.masters, accelerator.num_processes, learning_rate)


def agree_on_attention(args, shape: tuple, dtype: torch.dtype, device: torch.device) -> str:
    """Resolve --attention to a kernel; all ranks take rank 0's choice. Call it before the model is on the GPU."""
    name = [pick_attention(args.attention, shape, dtype, device)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(name, src=0)
    STARTUP.mark("attention")
    return name[0]


def set_attention(transformer: nn.Module, attend: Callable, device: torch.device) -> None:
    """Set one attention processor on all blocks; on a GPU it fuses projections, and q/k norm with RoPE, if possible.

    On a CPU each layer computes by itself, bit-equal to the stock processor.
    """
    attentions = [block.attn1 for block in transformer.transformer_blocks]
    processor = JointAttention(attend)
    if device.type == "cuda":
        adapted = [is_plain(layer) for attn in attentions for layer in (attn.to_q, attn.to_k, attn.to_v)]
        fuse = uses_triton(device) and all(adapted) and all(can_fuse(attn.norm_q, attn.norm_k) for attn in attentions)
        projection = functools.partial(project, linears=frozen_linears)
        processor = JointAttention(attend, projection, fused_heads if fuse else None)
    for attn in attentions:
        attn.processor = processor


def fused_heads(attn, states: torch.Tensor, rotary, num_text: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`heads_by_torch` for adapted layers, with one pass over memory after the matmuls."""
    bases, deltas = project_apart(states, [attn.to_q, attn.to_k, attn.to_v], frozen_products)
    return norm_and_rotate(bases, deltas, attn.norm_q, attn.norm_k, rotary, num_text)


def set_memory_level(args, level: str | None, transformer: nn.Module, device: torch.device) -> None:
    """Apply checkpointing, compilation and activation offload, by `level` or by their flags.

    Blocks are compiled with a level on a GPU, with --compile_blocks, or with the accelerate config's dynamo_backend.
    """
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()  # diffusers' own, around the compiled blocks
    elif level in ("balanced", *HOST_LEVELS):
        checkpoint_blocks(transformer.transformer_blocks, SAVED_OPS)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    by_level = level and not args.no_compile_blocks and uses_triton(device)
    if args.compile_blocks or by_level or backend != "no":
        compile_blocks(transformer.transformer_blocks, "inductor" if backend == "no" else backend)
    if level in HOST_LEVELS:
        offload_activations(transformer.transformer_blocks, device)


def notes_for_inference(args) -> dict:
    """Image-to-video training options that a stock pipeline does not know about; empty for the defaults."""
    inference_notes = {}
    if args.drop_learned_positions:
        inference_notes["drop_learned_positions"] = True
    if args.image_latent_scale != "pipeline":
        inference_notes["image_latent_scale"] = args.image_latent_scale
    return inference_notes
