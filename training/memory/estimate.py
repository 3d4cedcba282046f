"""Estimates the GPU and host memory of a run at each level in closed form.

Fitted to the peaks in benchmarks/*.csv; tests check that it is within 10 % of them. Everything is in bytes; u is the
size of one [B, S, D] tensor in the compute dtype, 104 MiB for CogVideoX-5b at 49x480x720.
"""

import math
from typing import NamedTuple

from base.memory_levels import HOST_LEVELS, RING, SPLIT
from memory.streaming import NUM_SLOTS


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
MIN_UNUSED = 0.4 * GIB
UNUSED = {"speed": 6.0, "balanced": 6.0, CHECKPOINTING: 9.0, "offload": 6.0, "stream": 6.0}
FP8_UNUSED = 3.5
EXPANDABLE_UNUSED = 4.1  # u, replaces all of the above with expandable segments
RESIDENT_UNUSED = 1.2 * GIB  # beside split masters on the GPU: gradients come and go block by block
SAVED_BY_SPEED_EAGER = 20.3  # u per stock block, simulated
DEEPSPEED = 0.8 * GIB  # its buffers: with it, estimates are within a tenth of benchmarks/deepspeed_memory.csv
# Split masters (engine/state_ring.py): a chunk's master, gradient and weight; with states on the host also slots, each
# with a chunk's remainders, moments and gradients, and the gradients of two blocks on their way to the host and of the
# one in its backward pass
CHUNK, AT_WORK, RING_SLOTS, LEAVING_BLOCKS = 2**23, 4 + 4 + 2, 7, 2 + 1
REMAINDER = 2  # bytes per weight
HOST_BASE = 2.5 * GIB  # Python, torch, CUDA libraries
# While masters are split: what is there beside their files, and the share of these that is mapped at once
HOST_BASE_LOADING, MAPPED_AT_ONCE = 2.2 * GIB, 0.8
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
)  # values per pixel of a clip: its 3 channels; as overlapping tiles, rows of them, whole
DECODING_UNUSED = 0.3 * GIB  # reserved beyond what decoding takes at least
# Fragmentation meanwhile, with ample memory: of tiles; of whole frames, or of small tiles; and of these at least
VAE_UNUSED, SMALL_UNUSED, MIN_SMALL_UNUSED = 2.7 * GIB, 1.15 * GIB, 0.5 * GIB
EXPANDABLE_VAE_UNUSED = 0.55  # factor on these with expandable segments
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
    masters: str  # FP32, SPLIT, RING or HOST; at full fine-tuning's `offload` and `stream` it is RING
    rings: bool  # full fine-tuning may have its states in host memory, updated on the GPU
    share: float  # of the blocks whose states are on the GPU all the same
    accumulates: bool  # several gradients make an update, of micro-steps or ranks
    deepspeed: bool
    rotary: bool
    item_bytes: int  # of the compute dtype
    stored_bytes: int  # of a weight in the files
    base_precision: str
    state_bytes: int  # of the optimizer, per trained weight
    host_optimizer: float  # bytes on the host per trained weight, if the CPU updates it; else 0
    host_gradients: bool
    converted: bool  # the files hold another dtype
    compiled: bool
    area: int  # pixels of the largest frame
    pixels: int  # of all frames of the largest clip
    raw: bool  # videos are encoded during training
    decoded_ahead: int  # batches of pixels on the host
    renders: bool  # validation renders videos
    tiled: bool
    offloads_models: bool  # the transformer leaves the GPU while the VAE runs
    expandable: bool  # expandable segments, memory/allocator.py
    num_processes: int  # on this machine


class MemoryPeaks(NamedTuple):
    """Peaks in bytes: allocated and reserved on the GPU, and on the host for all processes."""

    allocated: float
    reserved: float
    host: float


def memory_peaks(
    workload: Workload, level: str, ample_memory: bool = False, gpu_bytes: float = math.inf
) -> MemoryPeaks:
    """The peaks of `workload` at `level`, one of LEVELS or CHECKPOINTING.

    `ample_memory`: what it uses if more than the minimum is free: T5 then encodes on the GPU, torch keeps cached memory after
    rendering, and the system keeps the pages of T5's file. `gpu_bytes`: what torch may reserve; host memory depends on it.
    """
    if level in HOST_LEVELS and not workload.is_lora:
        workload = workload._replace(masters=RING)
    unit = unit_bytes(workload)
    resident = weights_on_gpu(workload, level) + trained_bytes(workload)
    resident += (VAE if workload.raw else 0) + (DEEPSPEED if workload.deepspeed else 0)
    resident += 0 if workload.rotary else POSITIONS * unit / workload.shape[0]
    saved = saved_bytes(workload, level)
    eager = CHECKPOINTING if not workload.compiled else level
    transient = TRANSIENT[eager] * unit
    if not workload.rotary:
        transient += ADDING_POSITIONS * unit / workload.shape[0]
    if workload.base_precision == "fp8":
        transient += FP8_TRANSIENT * unit
    gradients = gradients_on_gpu(workload)
    peak = gradients + saved + transient
    # The larger of the start of backward (all activations, no gradients yet) and its end (all gradients)
    if not (workload.is_lora or workload.masters == RING):  # gradients are allocated as activations are freed
        peak = max(saved + transient, gradients + transient / 2)
    allocated = resident + peak
    reserved = allocated + unused_bytes(workload, eager)
    if workload.deepspeed:  # as it starts, it copies a rank's share of what is trained
        share = workload.num_trained / workload.num_processes * (4 if workload.is_lora else workload.item_bytes)
        allocated, reserved = max(allocated, resident + share), max(reserved, resident + share)
    in_small_pieces = level in HOST_LEVELS  # streams T5, and denoises guidance's samples one by one
    returning = RETURN_SLOTS * kept_bytes(workload) if in_small_pieces else 0  # the slots stay allocated
    at_rest = resident + returning - (0 if workload.raw else room_for_updates(workload))
    coding = vae_bytes(workload, at_rest, ample_memory, in_small_pieces)
    # At `offload` the transformer goes to the host while the VAE decodes, unless there is room for both
    room = room_to_decode(workload.area, workload.pixels, workload.item_bytes, workload.tiled)
    moves = level == "offload" and workload.renders and at_rest + room > gpu_bytes
    if coding:
        share = EXPANDABLE_VAE_UNUSED if workload.expandable else 1
        reserved = max(reserved, coding + share * vae_unused(workload, ample_memory, in_small_pieces))
        # Memory cached by training is released before rendering; a loop that encodes holds both all the time
        reserved += share * vae_unused_at_most(workload) if ample_memory and workload.raw else 0
        allocated = max(allocated, coding)
    if ample_memory and (workload.raw or workload.renders):
        text = T5_STREAMED if in_small_pieces else T5_XXL
        allocated, reserved = max(allocated, text), max(reserved, text)
    host = host_peak(workload, level, ample_memory) + (weights_on_gpu(workload, level) if moves else 0)
    return MemoryPeaks(allocated, reserved, host)


def unit_bytes(workload: Workload) -> int:
    batch, tokens, heads, head_dim = workload.shape
    return batch * tokens * heads * head_dim * workload.item_bytes


def kept_bytes(workload: Workload) -> int:
    """Saved per block at `balanced`: its input, the attention's output and log-sum-exp."""
    batch, tokens, heads, _ = workload.shape
    return 2 * unit_bytes(workload) + batch * tokens * heads * 4


def unused_bytes(workload: Workload, level: str) -> float:
    """Reserved but not allocated during training."""
    unit = unit_bytes(workload)
    if workload.expandable:
        return EXPANDABLE_UNUSED * unit + (RESIDENT_UNUSED if workload.masters == SPLIT else 0)
    unused = (UNUSED[level] + (FP8_UNUSED if workload.base_precision == "fp8" else 0)) * unit
    return MIN_UNUSED + max(unused - states_bytes(workload) / 2, 0)


def saved_bytes(workload: Workload, level: str) -> float:
    """Activations on the GPU when the backward pass begins."""
    if level == "speed":
        return (
            workload.num_blocks
            * (SAVED_BY_SPEED if workload.compiled else SAVED_BY_SPEED_EAGER)
            * unit_bytes(workload)
        )
    if level == "balanced":
        return workload.num_blocks * kept_bytes(workload)
    if level == CHECKPOINTING:
        return workload.num_blocks * unit_bytes(workload)
    return (RETURN_SLOTS + 1) * kept_bytes(workload)  # + 1: the last block's are not offloaded


def weights_on_gpu(workload: Workload, level: str) -> float:
    weights = workload.num_weights * workload.item_bytes - quantized_bytes(workload)
    if level != "stream":
        return weights
    blocks = workload.num_block_weights * workload.item_bytes - quantized_bytes(workload)
    return weights - blocks + min(NUM_SLOTS, workload.num_blocks) * blocks / workload.num_blocks


def vae_bytes(workload: Workload, resident: float, ample_memory: bool, in_small_pieces: bool) -> float:
    """GPU memory while the VAE encodes or decodes, 0 if it never does. If memory is short, it decodes alone."""
    coding = 0
    if workload.renders:
        # Without room beside the resident weights, rendering is repeated with one model at a time
        beside = ample_memory or (in_small_pieces and workload.tiled)
        vae, alone = (0 if workload.raw else VAE), workload.offloads_models or not beside
        at_once = (1 if in_small_pieces or not ample_memory else 2) * unit_bytes(workload) / workload.shape[0]
        denoising = resident + DENOISING * at_once + (0 if alone else vae)
        decoding = decoding_bytes(workload, ample_memory) + (
            VAE + staying_bytes(workload) if alone else resident + vae
        )
        coding = max(denoising, decoding)
    if workload.raw:
        coding = max(coding, resident + encoding_bytes(workload, ample_memory))
    return coding


def staying_bytes(workload: Workload) -> float:
    """On the GPU while a validation has moved the model away: what the optimizer has beside its weights."""
    if workload.masters in (RING, SPLIT):
        return trained_bytes(workload) - room_for_updates(workload)
    return states_bytes(workload)


def decoding_bytes(workload: Workload, ample_memory: bool) -> float:
    """Without the VAE's weights."""
    kept = workload.item_bytes * DECODING_KEPT * workload.area if ample_memory and not workload.tiled else 0
    return decoding_at_least(workload.area, workload.pixels, workload.item_bytes, workload.tiled) + kept


def decoding_at_least(area: int, pixels: int, item_bytes: int, tiled: bool) -> float:
    """Frames of `area` pixels, `pixels` in all; kept frames are on the host."""
    if tiled:
        return DECODING_TILED + VIDEO_TILED * item_bytes * pixels
    return SLABS + item_bytes * (DECODING * area + VIDEO * pixels)


def room_to_decode(area: int, pixels: int, item_bytes: int, tiled: bool) -> float:
    """What must be free on the GPU for the VAE and its work."""
    return VAE + decoding_at_least(area, pixels, item_bytes, tiled) + DECODING_UNUSED


def encoding_bytes(workload: Workload, ample_memory: bool) -> float:
    """Clips of a batch one by one; in tiles together."""
    if workload.tiled:
        return workload.shape[0] * ENCODING_TILED
    values = ENCODING + (ENCODING_KEPT if ample_memory else 0)
    return SLABS + workload.item_bytes * (values * workload.area + VIDEO * workload.shape[0] * workload.pixels)


def vae_unused(workload: Workload, ample_memory: bool, in_small_pieces: bool) -> float:
    """Reserved beyond vae_bytes; the caller adds what a loop that encodes holds all the time."""
    if in_small_pieces:
        return SMALL_UNUSED if ample_memory else MIN_SMALL_UNUSED
    if workload.raw or workload.offloads_models:  # the latter: the VAE reuses the transformer's memory
        return 0
    return vae_unused_at_most(workload) if ample_memory and workload.renders else 0


def vae_unused_at_most(workload: Workload) -> float:
    return VAE_UNUSED if workload.tiled else SMALL_UNUSED


def host_peak(workload: Workload, level: str, ample_memory: bool) -> float:
    """Peak of all processes on this machine; ranks share streamed weights."""
    full, splits = workload.num_weights * workload.item_bytes, workload.masters in (SPLIT, RING)
    weights, travelling, shared = full - quantized_bytes(workload), 0, 0
    loading = LOADING + full * (1 if workload.converted or workload.base_precision != "bf16" else MAPPED)
    if level in HOST_LEVELS:
        travelling = (workload.num_blocks - 1) * kept_bytes(workload)
    if level == "stream":
        shared = weights
        if workload.base_precision == "bf16":
            loading = 0
    if not workload.is_lora:
        files = workload.stored_bytes * workload.num_weights  # mapped, until the last of their weights is on the GPU
        loading = MAPPED_AT_ONCE * files + HOST_BASE_LOADING - HOST_BASE if splits else files + LOADING
    left = CONVERTED * full if workload.converted and workload.is_lora and level == "offload" else 0
    saving = 4 * workload.num_trained if workload.is_lora else 0  # a copy of the adapters
    peak = max(loading, travelling + left + saving)  # loading is over when training begins
    if on_host := states_on_host(workload):
        # The ring pins its memory while weights are read, the others load weights first
        loaded = 0 if level == "stream" or splits else LOADING
        peak = max(peak, on_host + (loading if splits else 0), on_host + loaded + travelling + saving)
    if workload.renders:
        peak += RENDERING
    peak += 3 * workload.pixels * workload.shape[0] * workload.decoded_ahead
    if (workload.renders or workload.raw) and not (workload.tiled or ample_memory):
        peak += workload.item_bytes * workload.area * (DECODING_KEPT if workload.renders else ENCODING_KEPT)
    total = shared + workload.num_processes * (HOST_BASE + peak)
    if workload.raw or workload.renders:  # T5 is freed before the transformer is loaded
        total = max(
            total, workload.num_processes * (HOST_BASE + LOADING + text_encoder_on_host(workload, level, ample_memory))
        )
    return total


def text_encoder_on_host(workload: Workload, level: str, ample_memory: bool) -> float:
    """T5 while captions are encoded. Weights that go to the GPU unconverted take hardly any host memory."""
    # --enable_model_cpu_offload belongs here by measurement, 21.6 GiB for 5b; the cause is unknown
    copied = workload.converted or workload.offloads_models or level in HOST_LEVELS
    if not copied:
        return MAPPED * T5_XXL
    return T5_HOST if ample_memory else T5_XXL


def quantized_bytes(workload: Workload) -> float:
    """Bytes that --base_precision saves."""
    item = PRECISION_BYTES[workload.base_precision]
    return 0 if item is None else workload.num_block_linears * (workload.item_bytes - item)


def trained_bytes(workload: Workload) -> float:
    """Always on the GPU beside the model's weights: fp32 adapters or masters, or remainders; and optimizer states."""
    if workload.masters == RING:
        resident = outside_blocks(workload) + workload.share * workload.num_block_weights
        return (REMAINDER + workload.state_bytes) * resident + room_for_updates(workload)
    if workload.masters == SPLIT:
        return workload.num_trained * REMAINDER + room_for_updates(workload) + states_bytes(workload)
    masters = 0 if workload.item_bytes == 4 and not workload.is_lora else 4
    if workload.host_optimizer:
        return workload.num_trained * (4 if workload.is_lora else 0)
    return workload.num_trained * masters + states_bytes(workload)


def room_for_updates(workload: Workload) -> int:
    """Beside split masters: chunks at work and on their way. Validation has it."""
    if workload.masters == SPLIT:
        return AT_WORK * CHUNK
    slots = RING_SLOTS if workload.masters == RING and workload.share < 1 else 0
    return (slots * streamed_bytes(workload) + AT_WORK) * CHUNK if workload.masters == RING else 0


def states_bytes(workload: Workload) -> int:
    """Optimizer states on the GPU."""
    on_host = workload.host_optimizer or workload.masters == RING
    return 0 if on_host else workload.num_trained * workload.state_bytes


def states_on_host(workload: Workload) -> int:
    """Optimizer states, and what of weights and gradients is with them in host memory."""
    if workload.masters == RING:
        return (1 - workload.share) * workload.num_block_weights * streamed_bytes(workload)
    return workload.num_trained * workload.host_optimizer


def streamed_bytes(workload: Workload) -> int:
    """What the ring moves to the GPU per weight of a block; of weights outside of the blocks it is always there."""
    return REMAINDER + workload.state_bytes + gradient_bytes(workload)


def outside_blocks(workload: Workload) -> int:
    return workload.num_weights - workload.num_block_weights


def gradient_bytes(workload: Workload) -> int:
    """Per trained weight. A sum is in fp32, a single gradient stays as backward computed it."""
    return 4 if workload.accumulates or workload.masters not in (SPLIT, RING) else workload.item_bytes


def gradients_on_gpu(workload: Workload) -> float:
    """At the end of the backward pass."""
    if workload.masters == RING:
        resident = outside_blocks(workload) + workload.share * workload.num_block_weights
        leaving = LEAVING_BLOCKS * workload.item_bytes * workload.num_block_weights / workload.num_blocks
        return gradient_bytes(workload) * resident + (1 - workload.share) * leaving
    return 0 if workload.host_gradients else gradient_bytes(workload) * workload.num_trained
