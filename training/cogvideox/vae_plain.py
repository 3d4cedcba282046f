"""What comes between the VAE's convolutions, in plain torch: the CPU's way, and the reference of vae_kernels.py.

A step fills the slab that a convolution reads, or stores what it wrote. A slab starts at row `top` of the frame, -1
where its halo lies above the frame; rows outside of the frame are zeros.
"""

import torch
import torch.nn.functional as F
from torch import nn


def scale_and_shift(
    values: torch.Tensor, moments: list | None, norm: nn.GroupNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm` of [T, H, W, C] as one multiplication and one addition: two tensors [C] in fp32."""
    grouped = values.float().unflatten(-1, (norm.num_groups, -1))
    variance, mean = torch.var_mean(grouped, dim=(0, 1, 2, 4), correction=0)
    per_channel = values.shape[-1] // norm.num_groups
    scale = norm.weight.float() * (variance + norm.eps).rsqrt().repeat_interleave(per_channel)
    return scale, norm.bias.float() - mean.repeat_interleave(per_channel) * scale


def fill(
    slab: torch.Tensor, values: torch.Tensor, top: int, affine, older: torch.Tensor | None, kept: torch.Tensor | None
) -> None:
    """`slab` [2 + T, rows, W, C]: two frames of the pass before (the first one repeated at a video's start), then
    SiLU of the `affine` of `values`, or they as they are. `kept` gets the last two for the next pass."""
    first, last, inner = frame_rows(slab, values, top)
    rows = values[:, first:last]
    if affine is not None:
        rows = F.silu(modulated(rows.float() * affine.scale + affine.shift, affine, values.shape, first))
    slab[:, : inner.start] = 0
    slab[:, inner.stop :] = 0
    slab[2:, inner] = rows
    slab[:2] = slab[2:3] if older is None else older
    if kept is not None:
        kept.copy_(slab[-2:])


def frame_rows(slab: torch.Tensor, values: torch.Tensor, top: int) -> tuple[int, int, slice]:
    """(first, last) row of the frame that a slab holds, and where they lie in it."""
    first, last = max(top, 0), min(top + slab.shape[1], values.shape[1])
    return first, last, slice(first - top, last - top)


def modulated(rows: torch.Tensor, affine, shape: torch.Size, first: int) -> torch.Tensor:
    """The decoder's spatial norm: `rows` times and plus what the latents say, by nearest upsampling."""
    if affine.factor is None:
        return rows
    num_frames, height, width, _ = shape
    sizes = affine.factor.shape
    times = latent_frames(num_frames, sizes[0])
    lines = [line * sizes[1] // height for line in range(first, first + rows.shape[1])]
    columns = [column * sizes[2] // width for column in range(width)]
    factor, offset = (part[times][:, lines][:, :, columns] for part in (affine.factor, affine.offset))
    return rows * factor + offset


def latent_frames(num_frames: int, num_latents: int) -> list[int]:
    """The latent frame of each frame: the first one has its own where their number is odd."""
    alone = int(num_frames > 1 and num_frames % 2 == 1)
    rest = [alone + i * (num_latents - alone) // (num_frames - alone) for i in range(num_frames - alone)]
    return [0] * alone + rest


def store(
    part: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, top: int, adds: bool, num_groups: int
) -> torch.Tensor | None:
    """`part` + `bias` into the rows of `out` from `top` on, added to what is there or not. No moments yet: None."""
    rows = out[:, top : top + part.shape[1]]
    rows.copy_(rows + part + bias if adds else part + bias)


def fill_down(slab: torch.Tensor, values: torch.Tensor, top: int, halves_time: bool) -> None:
    """`slab` [T', rows, W + 1, C]: pairs of frames averaged or all frames, with a row and a column of zeros at the end."""
    rows = values[:, top : top + slab.shape[1]]
    if halves_time:
        alone = rows.shape[0] % 2
        rows = torch.cat([rows[:alone], (rows[alone::2].float() + rows[alone + 1 :: 2]) / 2])
    slab.zero_()
    slab[:, : rows.shape[1], :-1] = rows


def fill_up(slab: torch.Tensor, values: torch.Tensor, top: int, doubles_time: bool) -> None:
    """`slab` [T', rows, 2W, C]: every value four times, or eight times where time doubles (a first frame alone four)."""
    num_frames, height, width, _ = values.shape
    alone = num_frames % 2
    times = range(num_frames)
    if doubles_time:
        times = [0] * alone + [alone + i // 2 for i in range(2 * (num_frames - alone))]
    first, last = max(top, 0), min(top + slab.shape[1], 2 * height)
    lines, columns = [line // 2 for line in range(first, last)], [column // 2 for column in range(2 * width)]
    slab.zero_()
    slab[:, first - top : last - top] = values[list(times)][:, lines][:, :, columns]
