"""Split masters: an fp32 number as the bf16 weight that the model computes with, and the 16 bits that this lacks.

bf16 is rounded half away from zero: then `weight << 16 + remainder` gives back every fp32 number, and every pair is one.
Round half to even, torch's own, would need a 17th bit for ties; that is the only difference, about 1 in 131,000 numbers.
"""

import functools

import torch

from memory.recompute import uses_triton


try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None

HALF = 0x8000  # of the last place that bf16 keeps
TILE = 2048  # numbers that a program takes


def round_to_bf16(master: torch.Tensor) -> torch.Tensor:
    """fp32 rounded half away from zero."""
    bits = master.contiguous().view(torch.int32)
    return ((bits + HALF) >> 16).to(torch.int16).view(torch.bfloat16)


def rounded(master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A master, or a stored weight, in the dtype of a copy."""
    return round_to_bf16(master.float()) if dtype == torch.bfloat16 else master.to(dtype)


def split(master: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor) -> None:
    """Write fp32 `master` into bf16 `weight` and int16 `remainder`, contiguous and of the same shape."""
    if runs_triton(master.device):
        split_kernel[tiles_of(master)](master, weight, remainder, master.numel(), TILE)
        return
    bits = master.view(torch.int32)
    upper = (bits + HALF) >> 16
    weight.view(torch.int16).copy_(upper)
    remainder.copy_(bits - (upper << 16))


def join(weight: torch.Tensor, remainder: torch.Tensor, master: torch.Tensor) -> None:
    """The inverse of `split`: write fp32 `master`."""
    if runs_triton(master.device):
        join_kernel[tiles_of(master)](weight, remainder, master, master.numel(), TILE)
        return
    bits = master.view(torch.int32)
    bits.copy_(weight.view(torch.int16))
    bits <<= 16
    bits += remainder


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """One pass over memory instead of several; the same bits, for it is integer arithmetic."""
    return triton is not None and uses_triton(device)


def tiles_of(values: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(values.numel(), TILE),)


if triton is not None:

    @triton.jit
    def split_kernel(master_ptr, weight_ptr, remainder_ptr, size, TILE: tl.constexpr):
        offset = tl.program_id(0) * TILE + tl.arange(0, TILE)
        bits = tl.load(master_ptr + offset, offset < size).to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) >> 16  # arithmetic: keeps the sign
        weight = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(weight_ptr + offset, weight, offset < size)
        tl.store(remainder_ptr + offset, (bits - (upper << 16)).to(tl.int16), offset < size)

    @triton.jit
    def join_kernel(weight_ptr, remainder_ptr, master_ptr, size, TILE: tl.constexpr):
        offset = tl.program_id(0) * TILE + tl.arange(0, TILE)
        upper = tl.load(weight_ptr + offset, offset < size).to(tl.int16, bitcast=True).to(tl.int32)
        bits = (upper << 16) + tl.load(remainder_ptr + offset, offset < size).to(tl.int32)
        tl.store(master_ptr + offset, bits.to(tl.float32, bitcast=True), offset < size)
