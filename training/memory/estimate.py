"""Estimates the GPU and host memory of a run at each level in closed form, and picks the fastest level that fits.

Fitted to the peaks in benchmarks/*.csv; tests check that it is within 10 % of them. Everything is in bytes; u is the
size of one [B, S, D] tensor in the compute dtype, 104 MiB for CogVideoX-5b at 49x480x720.
"""

import math
from typing import NamedTuple

from base.levels import HOST_LEVELS, LEVELS
from memory.host import NUM_SLOTS


GIB = 2**30
CHECKPOINTING = "checkpointing"  # --gradient_checkpointing without a memory level
RETURN_SLOTS = 2  # blocks of saved activations fetched back at a time, in `offload` and `stream`
# In u: peak of one block's backward pass, on top of what is saved
TRANSIENT = {"speed": 8.0, "balanced": 16.1, CHECKPOINTING: 20.7, "offload": 16.1, "stream": 16.1}
SAVED_BY_SPEED = 13.1  # u per compiled block
# u of one sample: learned and sinusoidal positions in fp32, and the temporaries of adding them to the hidden states
POSITIONS, ADDING_POSITIONS = 2.0, 2.6
FP8_TRANSIENT = 4.6  # additional u: rounded copies of activations and gradients
# Fragmentation, what torch's allocator reserves beyond what is allocated: a minimum, plus u, of which optimizer
# states, allocated at the first update, can reuse up to half their own size
UNUSED_AT_LEAST = 0.4 * GIB
UNUSED = {"speed": 6.0, "balanced": 6.0, CHECKPOINTING: 9.0, "offload": 6.0, "stream": 6.0}
FP8_UNUSED = 3.5
EXPANDABLE_UNUSED = 4.1  # u, replaces all of the above with expandable segments
SAVED_BY_SPEED_EAGER = 20.3  # u per stock block, simulated
DEEPSPEED = 0.8 * GIB  # its gradient buckets
HOST_BASE = 2.5 * GIB  # Python, torch, CUDA libraries
LOADING = 1.6 * GIB  # temporaries of loading a model, without its weights
CONVERTED = 0.65  # share of the weights that the host allocator keeps after converting them from the file's dtype
MAPPED = 0.16  # share of the weights, when the file is memory-mapped and copied to the GPU unconverted
RENDERING = 1.0 * GIB  # on the host: the VAE and the videos
T5_XXL, T5_STREAMED = 8.96 * GIB, 1.4 * GIB  # on the GPU
T5_HOST = 16.0 * GIB  # on the host: a copy, and the page cache of its file, which the system can reclaim
DENOISING = 13.8  # u per sample: a block without gradients. Guidance doubles the batch, or takes two passes
# The VAE at work on one video, a pass of 8 or 9 frames at a time (cogvideox/vae.py). Values per pixel of a frame: a
# pass's activations, and the frames kept for the next pass, on the GPU where there is room and else on the host
VAE = 0.4 * GIB
ENCODING, ENCODING_KEPT = 9 * 2 * 128, 2 * 1340
DECODING, DECODING_KEPT = 9 * (256 + 128), 2 * 2085
SLABS = 0.5 * GIB
# What --enable_tiling asks for: diffusers' tiles
ENCODING_TILED, DECODING_TILED = 2.3 * GIB, 3.45 * GIB  # the first is not measured
VIDEO, VIDEO_TILED = (
    3,
    3.6 * 3,
)  # values per pixel of the clip: 3 channels; in tiles with their overlaps, in rows, whole
# Fragmentation meanwhile: with ample memory; with guidance's samples one by one and ample memory; then at least
CODING_UNUSED, SMALL_UNUSED, SMALL_UNUSED_AT_LEAST = 2.7 * GIB, 1.15 * GIB, 0.5 * GIB
EXPANDABLE_CODING_UNUSED = 0.55  # factor on these with expandable segments
PRECISION_BYTES = {"bf16": None, "fp8": 1.0, "int8": 1.0, "nf4": 0.52}  # per weight; None: the compute dtype's size


class Workload(NamedTuple):
    """Inputs of the formula. Weights are counted, not measured."""

    shape: tuple[int, int, int, int]  # [B, S, heads, head_dim] of the largest batch
    num_blocks: int
    num_weights: int
    num_block_weights: int  # of all blocks
    num_block_linears: int  # of these, weights of attention and feed-forward, which can be quantized
    num_trained: int
    is_lora: bool
    deepspeed: bool
    rotary: bool
    item_bytes: int  # of the compute dtype
    base_precision: str
    state_bytes: int  # of the optimizer, per trained weight
    host_optimizer: int  # bytes on the host per trained weight; 0: the optimizer is on the GPU
    host_gradients: bool
    converted: bool  # the files hold another dtype
    compiled: bool
    area: int  # pixels of the largest frame
    pixels: int  # of all frames of the largest clip
    raw: bool  # videos are encoded during training
    renders: bool  # validation renders videos
    tiled: bool
    offloads_models: bool  # the transformer leaves the GPU while the VAE runs
    expandable: bool  # expandable segments, memory/allocator.py
    num_processes: int  # on this machine


class Need(NamedTuple):
    """Peaks in bytes: allocated and reserved on the GPU, and on the host for all processes."""

    allocated: float
    reserved: float
    host: float


def need(run: Workload, level: str, roomy: bool = False) -> Need:
    """The peaks of `run` at `level`, one of LEVELS or CHECKPOINTING.

    `roomy`: what it uses if more than the minimum is free: T5 then encodes on the GPU, torch keeps cached memory after
    rendering, and the system keeps the pages of T5's file.
    """
    unit = unit_bytes(run)
    resident = weights_on_gpu(run, level) + trained_bytes(run)
    resident += (VAE if run.raw else 0) + (DEEPSPEED if run.deepspeed else 0)
    resident += 0 if run.rotary else POSITIONS * unit / run.shape[0]
    saved = saved_bytes(run, level)
    eager = CHECKPOINTING if not run.compiled else level
    transient = TRANSIENT[eager] * unit
    if not run.rotary:
        transient += ADDING_POSITIONS * unit / run.shape[0]
    if run.base_precision == "fp8":
        transient += FP8_TRANSIENT * unit
    gradients = 0 if run.host_gradients else 4 * run.num_trained
    peak = gradients + saved + transient
    if not run.is_lora:  # gradients are allocated as activations are freed
        peak = max(saved + transient, gradients + transient / 2)
    allocated = resident + peak
    reserved = allocated + unused_bytes(run, eager)
    thrifty = level in HOST_LEVELS  # streams T5, and renders guidance's samples one by one
    returning = RETURN_SLOTS * kept_bytes(run) if thrifty else 0  # the slots stay allocated
    coding = coding_bytes(run, resident + returning, roomy, thrifty)
    if coding:
        share = EXPANDABLE_CODING_UNUSED if run.expandable else 1
        reserved = max(reserved, coding + share * coding_unused(run, roomy, thrifty))
        # Memory cached by training is released before rendering; a loop that encodes holds both all the time
        reserved += share * CODING_UNUSED if roomy and run.raw else 0
        allocated = max(allocated, coding)
    if roomy and (run.raw or run.renders):
        text = T5_STREAMED if thrifty else T5_XXL
        allocated, reserved = max(allocated, text), max(reserved, text)
    return Need(allocated, reserved, host_peak(run, level, roomy))


def unit_bytes(run: Workload) -> int:
    batch, tokens, heads, head_dim = run.shape
    return batch * tokens * heads * head_dim * run.item_bytes


def kept_bytes(run: Workload) -> int:
    """Saved per block at `balanced`: its input, the attention's output and log-sum-exp."""
    batch, tokens, heads, _ = run.shape
    return 2 * unit_bytes(run) + batch * tokens * heads * 4


def unused_bytes(run: Workload, level: str) -> float:
    """Reserved but not allocated during training."""
    unit = unit_bytes(run)
    if run.expandable:
        return EXPANDABLE_UNUSED * unit
    unused = (UNUSED[level] + (FP8_UNUSED if run.base_precision == "fp8" else 0)) * unit
    return UNUSED_AT_LEAST + max(unused - states_bytes(run) / 2, 0)


def saved_bytes(run: Workload, level: str) -> float:
    """Activations on the GPU when the backward pass begins."""
    if level == "speed":
        return run.num_blocks * (SAVED_BY_SPEED if run.compiled else SAVED_BY_SPEED_EAGER) * unit_bytes(run)
    if level == "balanced":
        return run.num_blocks * kept_bytes(run)
    if level == CHECKPOINTING:
        return run.num_blocks * unit_bytes(run)
    return (RETURN_SLOTS + 1) * kept_bytes(run)  # + 1: the last block's are not offloaded


def weights_on_gpu(run: Workload, level: str) -> float:
    weights = run.num_weights * run.item_bytes - quantised_bytes(run)
    if level != "stream":
        return weights
    blocks = run.num_block_weights * run.item_bytes - quantised_bytes(run)
    return weights - blocks + min(NUM_SLOTS, run.num_blocks) * blocks / run.num_blocks


def coding_bytes(run: Workload, resident: float, roomy: bool, thrifty: bool) -> float:
    """GPU memory while the VAE encodes or decodes, 0 if it never does. If memory is short, it decodes alone."""
    coding = 0
    if run.renders:
        vae, alone = (0 if run.raw else VAE), run.offloads_models or not (roomy or thrifty)
        at_once = (1 if thrifty or not roomy else 2) * unit_bytes(run) / run.shape[0]
        denoising = resident + DENOISING * at_once + (0 if alone else vae)
        decoding = decoding_bytes(run, roomy, thrifty) + (VAE if alone else resident + vae)
        coding = max(denoising, decoding)
    if run.raw:
        coding = max(coding, resident + encoding_bytes(run, roomy))
    return coding


def decoding_bytes(run: Workload, roomy: bool, thrifty: bool) -> float:
    """Without the VAE's weights."""
    if run.tiled:
        return DECODING_TILED + VIDEO_TILED * run.item_bytes * run.pixels
    values = DECODING + (DECODING_KEPT if roomy else 0)
    return SLABS + run.item_bytes * (values * run.area + VIDEO * run.pixels)


def encoding_bytes(run: Workload, roomy: bool) -> float:
    """Clips of a batch one by one; in tiles together."""
    if run.tiled:
        return run.shape[0] * ENCODING_TILED
    return SLABS + run.item_bytes * run.area * (ENCODING + (ENCODING_KEPT if roomy else 0))


def coding_unused(run: Workload, roomy: bool, thrifty: bool) -> float:
    """Reserved beyond coding_bytes; the caller adds what a loop that encodes holds all the time."""
    if thrifty:
        return SMALL_UNUSED if roomy else SMALL_UNUSED_AT_LEAST
    if run.raw or run.offloads_models:  # the latter: the VAE reuses the transformer's memory
        return 0
    return CODING_UNUSED if roomy and run.renders else 0


def host_peak(run: Workload, level: str, roomy: bool) -> float:
    """Peak of all processes on this machine; ranks share streamed weights."""
    full = run.num_weights * run.item_bytes
    weights, travelling, shared = full - quantised_bytes(run), 0, 0
    loading = LOADING + full * (1 if run.converted or run.base_precision != "bf16" else MAPPED)
    if level in HOST_LEVELS:
        travelling = (run.num_blocks - 1) * kept_bytes(run)
    if level == "stream":
        shared = weights
        if run.base_precision == "bf16":
            loading = 0
    if not run.is_lora:
        loading = LOADING + 4 * run.num_weights
    left = CONVERTED * full if run.converted and level == "offload" else 0
    saving = 4 * run.num_trained if run.is_lora else 0  # a copy of the adapters
    peak = max(loading, travelling + left + saving)
    if run.host_optimizer:
        loaded = 0 if level == "stream" else LOADING
        peak = max(peak, loaded + travelling + saving + run.num_trained * run.host_optimizer)
    if run.renders:
        peak += RENDERING
    if (run.renders or run.raw) and not (run.tiled or roomy):
        peak += run.item_bytes * run.area * (DECODING_KEPT if run.renders else ENCODING_KEPT)
    total = shared + run.num_processes * (HOST_BASE + peak)
    if run.raw or run.renders:  # T5 is freed before the transformer is loaded
        total = max(total, run.num_processes * (HOST_BASE + LOADING + text_encoder_on_host(run, level, roomy)))
    return total


def text_encoder_on_host(run: Workload, level: str, roomy: bool) -> float:
    """T5 while captions are encoded. Weights that go to the GPU unconverted take hardly any host memory."""
    # --enable_model_cpu_offload belongs here by measurement, 21.6 GiB for 5b; the cause is unknown
    copied = run.converted or run.offloads_models or level in HOST_LEVELS
    if not copied:
        return MAPPED * T5_XXL
    return T5_HOST if roomy else T5_XXL


def quantised_bytes(run: Workload) -> float:
    """Bytes that --base_precision saves."""
    item = PRECISION_BYTES[run.base_precision]
    return 0 if item is None else run.num_block_linears * (run.item_bytes - item)


def trained_bytes(run: Workload) -> float:
    """Always on the GPU: fp32 adapters, or fp32 masters beside the model's weights; and optimizer states."""
    masters = 0 if run.item_bytes == 4 and not run.is_lora else 4
    if run.host_optimizer:
        return run.num_trained * (4 if run.is_lora else 0)
    return run.num_trained * masters + states_bytes(run)


def states_bytes(run: Workload) -> int:
    """Optimizer states on the GPU."""
    return 0 if run.host_optimizer else run.num_trained * run.state_bytes


def levels_of(run: Workload) -> tuple[str, ...]:
    """The levels available for this task, fastest first."""
    return LEVELS if run.is_lora and not run.deepspeed else ("speed", "balanced")


def fits(needed: Need, gpu_bytes: float, host_bytes: float) -> bool:
    """Leaves 5 % free, since these are estimates."""
    return needed.reserved * 1.05 <= gpu_bytes and needed.host * 1.05 <= host_bytes


def fastest_that_fits(run: Workload, gpu_bytes: float, host_bytes: float) -> str | None:
    """The fastest level that fits, or None."""
    return next((level for level in levels_of(run) if fits(need(run, level), gpu_bytes, host_bytes)), None)


def closest(run: Workload, gpu_bytes: float, host_bytes: float) -> tuple[str, Need]:
    """The level that is least short of memory, and what it needs."""
    needs = {level: need(run, level) for level in levels_of(run)}
    level = min(needs, key=lambda level: max(needs[level].reserved / gpu_bytes, needs[level].host / host_bytes))
    return level, needs[level]


def table(run: Workload, gpu_bytes: float | None, host_bytes: float) -> str:
    """One line per level; `gpu_bytes` is None without a GPU."""
    lines = [f"{'--memory':12} {'GPU, reserved':>14} {'allocated':>12} {'host':>12}  fits here"]
    for level in (CHECKPOINTING, *levels_of(run)):
        needed = need(run, level)
        sizes = [f"{size / GIB:.1f} GiB" for size in (needed.reserved, needed.allocated, needed.host)]
        if gpu_bytes is None:
            verdict = "no GPU"
        elif fits(needed, gpu_bytes, host_bytes):
            verdict = "yes"
        elif fits(needed, gpu_bytes, math.inf):
            verdict = f"no, {host_bytes / GIB:.1f} GiB are free on the host"
        else:
            verdict = f"no, {gpu_bytes / GIB:.1f} GiB are free on the GPU"
        name = "(checkpoints)" if level == CHECKPOINTING else level
        lines.append(f"{name:13}{sizes[0]:>14} {sizes[1]:>12} {sizes[2]:>12}  {verdict}")
    return "\n".join(lines)
