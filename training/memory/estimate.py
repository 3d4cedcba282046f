"""What a run takes of GPU and host memory at each level, by a closed formula, and the fastest level that fits.

Calibrated on the peaks of benchmarks/*.csv, which the tests hold it to within 10 %. Bytes throughout; u is one tensor of
[B, S, D] in the compute dtype, 104 MiB for CogVideoX-5b at 49x480x720.
"""

import math
from typing import NamedTuple

from base.levels import HOST_LEVELS, LEVELS
from memory.host import NUM_SLOTS


GIB = 2**30
CHECKPOINTING = "checkpointing"  # --gradient_checkpointing without a level
RETURN_SLOTS = 2  # blocks of saved activations that come back, in `offload` and `stream`
# In u: what one block's backward pass takes at most, beside what is saved
TRANSIENT = {"speed": 8.0, "balanced": 16.1, CHECKPOINTING: 20.7, "offload": 16.1, "stream": 16.1}
SAVED_BY_SPEED = 13.1  # u a block, in compiled ones
# u of one sample: learned and sinusoidal positions in fp32, and what adding them to the hidden states takes
POSITIONS, ADDING_POSITIONS = 2.0, 2.6
FP8_TRANSIENT = 4.6  # u more: rounded copies of activations and gradients
# What torch's allocator holds beyond what is used: so much at least, and in u what optimizer states, which come with
# the first update, may half fill
UNUSED_AT_LEAST = 0.4 * GIB
UNUSED = {"speed": 6.0, "balanced": 6.0, CHECKPOINTING: 9.0, "offload": 6.0, "stream": 6.0}
FP8_UNUSED = 3.5
EXPANDABLE_UNUSED = 4.1  # u, instead of all that, in segments that grow
SAVED_BY_SPEED_EAGER = 20.3  # of the stock block, simulated
DEEPSPEED = 0.8 * GIB  # its buckets of gradients
HOST_BASE = 2.5 * GIB  # Python, torch, CUDA's libraries
LOADING = 1.6 * GIB  # and what reading a model takes beside its weights
CONVERTED = 0.65  # of weights of another dtype in the file: what their conversion leaves to the host's allocator
MAPPED = 0.16  # of weights whose file is mapped into memory and copied to the GPU as it is
RENDERING = 1.0 * GIB  # of the host: the VAE, and videos
T5_XXL, T5_STREAMED = 8.96 * GIB, 1.4 * GIB  # on the GPU
T5_HOST = 16.0 * GIB  # of the host: a copy, and the pages of its file, which the system may take back
DENOISING = 13.8  # u of a sample: a block without gradients. Guidance makes it two, one by one where room is short
# The VAE at work on one video; it works through 8 frames at a time, whole ones of 480x720 or tiles
VAE = 0.4 * GIB
DECODING_SMALL, DECODING, DECODING_UNTILED = 1.45 * GIB, 3.45 * GIB, 12.3 * GIB
VIDEO = 3.6 * 3  # numbers a pixel: overlapping tiles, rows of them and the video, 3 channels each
ENCODING, ENCODING_TILED = 8.2 * GIB, 2.3 * GIB  # the second not measured: in the ratio of frames to tiles above
# What torch holds beside it: where there is room, in small pieces where there is, and at `offload` and `stream` at least
CODING_UNUSED, SMALL_UNUSED, SMALL_UNUSED_AT_LEAST = 2.7 * GIB, 1.15 * GIB, 0.5 * GIB
EXPANDABLE_CODING_UNUSED = 0.55  # of that in segments that grow
PRECISION_BYTES = {"bf16": None, "fp8": 1.0, "int8": 1.0, "nf4": 0.52}  # a weight; None: as computed


class Workload(NamedTuple):
    """What the formula reads. Weights are counted, not measured."""

    shape: tuple[int, int, int, int]  # [B, S, heads, head_dim] of the largest batch
    num_blocks: int
    num_weights: int
    num_block_weights: int  # of all blocks
    num_block_linears: int  # of these in attention and feed-forward, which may be quantised
    num_trained: int
    is_lora: bool
    deepspeed: bool
    rotary: bool
    item_bytes: int  # of the compute dtype
    base_precision: str
    state_bytes: int  # of the optimizer, for each trained weight
    host_optimizer: int  # bytes on the host for each trained weight; 0: the optimizer is on the GPU
    host_gradients: bool
    converted: bool  # the files' weights are of another dtype
    compiled: bool
    area: int  # pixels of the largest frame
    pixels: int  # of all frames of the largest clip
    raw: bool  # videos are encoded as training goes
    renders: bool  # sample videos
    sliced: bool
    tiled: bool
    offloads_models: bool  # the transformer leaves the GPU while others work
    expandable: bool  # torch's segments grow, memory/allocator.py
    num_processes: int  # on this machine


class Need(NamedTuple):
    """Peaks in bytes: of the GPU what is used and what torch holds, and of the host for all processes."""

    allocated: float
    reserved: float
    host: float


def need(run: Workload, level: str, roomy: bool = False) -> Need:
    """What `run` takes at `level`, a name of LEVELS or CHECKPOINTING.

    `roomy`: where there is more than that, T5 encodes on the GPU, torch keeps what rendering no longer uses, and the
    system the pages of T5's file.
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
    if not run.is_lora:  # gradients come as activations go
        peak = max(saved + transient, gradients + transient / 2)
    allocated = resident + peak
    reserved = allocated + unused_bytes(run, eager)
    thrifty = level in HOST_LEVELS
    returning = RETURN_SLOTS * kept_bytes(run) if thrifty else 0  # their memory stays
    coding = coding_bytes(run, resident + returning, roomy, thrifty)
    if coding:
        share = EXPANDABLE_CODING_UNUSED if run.expandable else 1
        reserved = max(reserved, coding + share * coding_unused(run, roomy, thrifty))
        # What torch holds for training is given back before rendering; a loop that encodes holds both all the time
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
    """Of a block in `balanced`: its input, the attention's output and log-sum-exp."""
    batch, tokens, heads, _ = run.shape
    return 2 * unit_bytes(run) + batch * tokens * heads * 4


def unused_bytes(run: Workload, level: str) -> float:
    """What torch holds in training and does not use."""
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
    return (RETURN_SLOTS + 1) * kept_bytes(run)  # the last block's stay where they are


def weights_on_gpu(run: Workload, level: str) -> float:
    weights = run.num_weights * run.item_bytes - quantised_bytes(run)
    if level != "stream":
        return weights
    blocks = run.num_block_weights * run.item_bytes - quantised_bytes(run)
    return weights - blocks + min(NUM_SLOTS, run.num_blocks) * blocks / run.num_blocks


def coding_bytes(run: Workload, resident: float, roomy: bool, thrifty: bool) -> float:
    """GPU memory while the VAE encodes or decodes, 0 if it never does. Where room is short for whole frames or large
    tiles, it decodes alone.
    """
    scale = run.area / (480 * 720)
    coding = 0
    if run.renders:
        whole = DECODING if run.tiled else scale * DECODING_UNTILED
        vae, alone = (0 if run.raw else VAE), run.offloads_models or not (roomy or thrifty)
        in_pieces = thrifty or not roomy
        at_once = (1 if in_pieces else 2) * unit_bytes(run) / run.shape[0]
        denoising = resident + DENOISING * at_once + (0 if alone else vae)
        decoding = (DECODING_SMALL if in_pieces else whole) + VIDEO * run.item_bytes * run.pixels
        decoding += VAE if alone else resident + vae
        coding = max(denoising, decoding)
    if run.raw:
        batch = 1 if run.sliced else run.shape[0]
        coding = max(coding, resident + batch * (ENCODING_TILED if run.tiled else scale * ENCODING))
    return coding


def coding_unused(run: Workload, roomy: bool, thrifty: bool) -> float:
    """What torch reserves beyond coding_bytes; what a loop that encodes holds all the time is counted by its caller."""
    if thrifty:
        return SMALL_UNUSED if roomy else SMALL_UNUSED_AT_LEAST
    if run.raw or run.offloads_models:  # the latter: the transformer's place serves the VAE
        return 0
    return CODING_UNUSED if roomy and run.renders else 0


def host_peak(run: Workload, level: str, roomy: bool) -> float:
    """Of all processes of this machine; ranks share the weights that are streamed."""
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
    total = shared + run.num_processes * (HOST_BASE + peak)
    if run.raw or run.renders:  # T5 is gone before the transformer comes
        total = max(total, run.num_processes * (HOST_BASE + LOADING + text_encoder_on_host(run, level, roomy)))
    return total


def text_encoder_on_host(run: Workload, level: str, roomy: bool) -> float:
    """While captions are encoded. Weights that go from their file to the GPU as they are leave hardly a trace."""
    # --enable_model_cpu_offload is among them as measured, 21.6 GiB for 5b; why, was not found out
    copied = run.converted or run.offloads_models or level in HOST_LEVELS
    if not copied:
        return MAPPED * T5_XXL
    return T5_HOST if roomy else T5_XXL


def quantised_bytes(run: Workload) -> float:
    """What --base_precision saves."""
    item = PRECISION_BYTES[run.base_precision]
    return 0 if item is None else run.num_block_linears * (run.item_bytes - item)


def trained_bytes(run: Workload) -> float:
    """On the GPU for all the time: fp32 adapters, or fp32 masters beside the model's weights, and optimizer states."""
    masters = 0 if run.item_bytes == 4 and not run.is_lora else 4
    if run.host_optimizer:
        return run.num_trained * (4 if run.is_lora else 0)
    return run.num_trained * masters + states_bytes(run)


def states_bytes(run: Workload) -> int:
    """Of the optimizer, on the GPU."""
    return 0 if run.host_optimizer else run.num_trained * run.state_bytes


def levels_of(run: Workload) -> tuple[str, ...]:
    """Those that the task can have, the fastest first."""
    return LEVELS if run.is_lora and not run.deepspeed else ("speed", "balanced")


def fits(needed: Need, gpu_bytes: float, host_bytes: float) -> bool:
    """Estimates: 5 % are left free."""
    return needed.reserved * 1.05 <= gpu_bytes and needed.host * 1.05 <= host_bytes


def fastest_that_fits(run: Workload, gpu_bytes: float, host_bytes: float) -> str | None:
    """None if no level does."""
    return next((level for level in levels_of(run) if fits(need(run, level), gpu_bytes, host_bytes)), None)


def closest(run: Workload, gpu_bytes: float, host_bytes: float) -> tuple[str, Need]:
    """The level that lacks the least, and what it needs."""
    needs = {level: need(run, level) for level in levels_of(run)}
    level = min(needs, key=lambda level: max(needs[level].reserved / gpu_bytes, needs[level].host / host_bytes))
    return level, needs[level]


def table(run: Workload, gpu_bytes: float | None, host_bytes: float) -> str:
    """A line for each level; `gpu_bytes` None: there is no GPU to compare with."""
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
