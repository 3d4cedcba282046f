"""What a run takes of GPU and host memory at each level, by a closed formula, and the fastest level that fits.

Calibrated on the peaks of benchmarks/*.csv, which the tests hold it to within 10 %. Bytes throughout; u is one tensor of
[B, S, D] in the compute dtype, 104 MiB for CogVideoX-5b at 49x480x720.
"""

import math
from typing import NamedTuple


GIB = 2**30
FASTEST_FIRST = ("speed", "balanced", "offload", "stream")
CHECKPOINTING = "checkpointing"  # --gradient_checkpointing without a level
RING_SLOTS = 3  # blocks of weights on the GPU in `stream`
RETURN_SLOTS = 2  # blocks of saved activations that come back, in `offload` and `stream`
# In u: what one block's backward pass takes at most, beside what is saved
TRANSIENT = {"speed": 8.0, "balanced": 16.1, CHECKPOINTING: 20.7, "offload": 16.1, "stream": 16.1}
SAVED_BY_SPEED = 13.1  # u a block, in compiled ones
POSITIONS = 4.6  # u, of learned and of sinusoidal positions, which lie beside the hidden states
FP8_TRANSIENT = 4.6  # u more: rounded copies of activations and gradients
# In u: what torch's allocator holds beyond what is used
UNUSED = {"speed": 8.5, "balanced": 8.5, CHECKPOINTING: 14.0, "offload": 8.5, "stream": 8.5}
FP8_UNUSED = 3.5
HOST_BASE = 2.9 * GIB  # Python, torch, CUDA's libraries
DECODING = 4.2 * GIB  # the VAE at work on one video, tiled and sliced; 480x720
DECODING_UNTILED = 13.0 * GIB
PRECISION_BYTES = {"bf16": None, "fp8": 1.0, "int8": 1.0, "nf4": 0.52}  # a weight; None: as computed


class Run(NamedTuple):
    """What the formula reads. Weights are counted, not measured."""

    shape: tuple[int, int, int, int]  # [B, S, heads, head_dim] of the largest batch
    num_blocks: int
    num_weights: int
    num_block_weights: int  # of all blocks
    num_block_linears: int  # of these in attention and feed-forward, which may be quantised
    num_trained: int
    is_lora: bool
    may_stream: bool  # frozen weights and activations may lie in host memory
    rotary: bool
    item_bytes: int  # of the compute dtype
    base_precision: str
    state_bytes: int  # of the optimizer, for each trained weight
    host_optimizer: bool
    host_gradients: bool
    validates: bool
    tiled: bool
    num_processes: int  # on this machine


class Need(NamedTuple):
    """Peaks in bytes: of the GPU what is used and what torch holds, and of the host for all processes."""

    allocated: float
    reserved: float
    host: float


def need(run: Run, level: str) -> Need:
    """What `run` takes at `level`, a name of FASTEST_FIRST or CHECKPOINTING."""
    batch, tokens, heads, head_dim = run.shape
    unit = batch * tokens * heads * head_dim * run.item_bytes
    weights = run.num_weights * run.item_bytes - quantised_bytes(run)
    block = (run.num_block_weights * run.item_bytes - quantised_bytes(run)) / run.num_blocks
    kept = 2 * unit + batch * tokens * heads * 4  # of a block: input, attention's output, log-sum-exp
    resident, host = weights, HOST_BASE + (weights if run.is_lora else 2 * weights)
    if level == "stream":
        resident = weights - run.num_blocks * block + min(RING_SLOTS, run.num_blocks) * block
    saved = {
        "speed": run.num_blocks * SAVED_BY_SPEED * unit,
        "balanced": run.num_blocks * kept,
        CHECKPOINTING: run.num_blocks * unit,
    }.get(level, (RETURN_SLOTS + 1) * kept)  # the last block's stay where they are
    if level in ("offload", "stream"):
        host = HOST_BASE + weights + (run.num_blocks - 1) * kept
    transient = TRANSIENT[level] * unit + (0 if run.rotary else POSITIONS * unit)
    unused = UNUSED[level] * unit
    if run.base_precision == "fp8":
        transient, unused = transient + FP8_TRANSIENT * unit, unused + FP8_UNUSED * unit
    gradients = 0 if run.host_gradients else 4 * run.num_trained
    peak = gradients + saved + transient
    if not run.is_lora:  # gradients come as activations go
        peak = max(saved + transient, gradients + transient / 2)
    host += run.num_trained * (4 + 4 + run.state_bytes) if run.host_optimizer else 0
    resident += trained_bytes(run)
    allocated = resident + peak
    if run.validates:
        allocated = max(allocated, resident + (DECODING if run.tiled else DECODING_UNTILED))
    shared = weights if level == "stream" else 0  # ranks of one machine share the streamed weights
    return Need(allocated, allocated + unused, shared + run.num_processes * (host - shared))


def quantised_bytes(run: Run) -> float:
    """What --base_precision saves."""
    item = PRECISION_BYTES[run.base_precision]
    return 0 if item is None else run.num_block_linears * (run.item_bytes - item)


def trained_bytes(run: Run) -> float:
    """On the GPU for all the time: fp32 adapters, or fp32 masters beside the model's weights, and optimizer states."""
    masters = 0 if run.item_bytes == 4 and not run.is_lora else 4
    if run.host_optimizer:
        return run.num_trained * (4 if run.is_lora else 0)
    return run.num_trained * (masters + run.state_bytes)


def levels_of(run: Run) -> tuple[str, ...]:
    """Those that the task can have, the fastest first."""
    return FASTEST_FIRST if run.may_stream else ("speed", "balanced")


def fastest_that_fits(run: Run, gpu_bytes: float, host_bytes: float) -> str | None:
    """None if no level does. Peaks are estimates: 5 % are left free."""
    for level in levels_of(run):
        needed = need(run, level)
        if needed.reserved * 1.05 <= gpu_bytes and needed.host <= host_bytes:
            return level
    return None


def table(run: Run, gpu_bytes: float, host_bytes: float) -> str:
    """A line for each level; `gpu_bytes` infinite: there is no GPU to compare with."""
    lines = [f"{'--memory':12} {'GPU, reserved':>14} {'allocated':>12} {'host':>12}  fits here"]
    for level in (CHECKPOINTING, *levels_of(run)):
        needed = need(run, level)
        sizes = [f"{size / GIB:.1f} GiB" for size in (needed.reserved, needed.allocated, needed.host)]
        if math.isinf(gpu_bytes):
            fits = "no GPU"
        elif needed.reserved * 1.05 > gpu_bytes:
            fits = f"no, {gpu_bytes / GIB:.1f} GiB are free on the GPU"
        else:
            fits = "yes" if needed.host <= host_bytes else f"no, {host_bytes / GIB:.1f} GiB are free on the host"
        name = "(checkpoints)" if level == CHECKPOINTING else level
        lines.append(f"{name:13}{sizes[0]:>14} {sizes[1]:>12} {sizes[2]:>12}  {fits}")
    return "\n".join(lines)
