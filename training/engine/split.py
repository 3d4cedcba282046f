"""Split masters: an fp32 number as the bf16 weight that the model computes with, and the 16 bits that this lacks."""

import torch


HALF = 0x8000  # of the last place that bf16 keeps


def round_to_bf16(master: torch.Tensor) -> torch.Tensor:
    """fp32 rounded half away from zero; torch rounds half to even."""
    bits = master.contiguous().view(torch.int32)
    return ((bits + HALF) >> 16).to(torch.int16).view(torch.bfloat16)
