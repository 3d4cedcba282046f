"""What comes between the VAE's convolutions in Triton: the steps of vae_plain.py, each one pass over memory.

A program works on whole pixels, so that its loads are contiguous: COLUMNS or SPOTS pixels of C channels each. Moments
are merged in a fixed order: the same bits from run to run.
"""

import inspect

import torch
from torch import nn

from cogvideox import vae_plain
from memory.recompute import uses_triton


try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None

TILE = 4096  # values that a program holds at once
TILES_PER_PROGRAM = 16  # of `store`, which leaves the moments of so many together
MERGED_AT_ONCE = 1024
SIZES = ("top", "height", "width", "alone", "time_ratio", "ratio", "num_spots", "out_frame_spots", "num_parts")


def can_run(vae) -> bool:
    """True on a GPU with Triton, for channels and groups that are powers of two, as in all CogVideoX checkpoints."""
    counts = [*vae.config.block_out_channels, vae.config.norm_num_groups]
    return triton is not None and uses_triton(vae.device) and all(count & (count - 1) == 0 for count in counts)


if triton is not None:

    def compiled(kernel):
        """One binary for all sizes: a slab's first row would else give several of each."""
        sizes = [name for name in inspect.signature(kernel).parameters if name in SIZES]
        return triton.jit(kernel, do_not_specialize=sizes)

    @triton.jit
    def latent_pixel(frame, line, column, alone, height, width, time_ratio, ratio):
        """Where the latents' pixel of a frame's pixel lies, counted in pixels; `alone` 1: the first frame has its own."""
        time = tl.where(frame < alone, 0, alone + (frame - alone) // time_ratio)
        return (time * (height // ratio) + line // ratio) * (width // ratio) + column // ratio

    @compiled
    def fill_kernel(
        values_ptr, scale_ptr, shift_ptr, factor_ptr, offset_ptr, older_ptr, kept_ptr, slab_ptr,
        top, height, width, alone, time_ratio, ratio,
        MODULATES: tl.constexpr, STARTS: tl.constexpr, KEEPS: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[:, None]
        channel = tl.arange(0, C)[None, :]
        row, frame = tl.program_id(1), tl.program_id(2)
        num_frames = tl.num_programs(2)
        line = top + row
        mask = column < width
        inside = column < tl.where((line >= 0) & (line < height), width, 0)
        start = (frame.to(tl.int64) * height + line) * width * C
        loaded = tl.load(values_ptr + start + column * C + channel, inside, 0.0)
        value = loaded.to(tl.float32) * tl.load(scale_ptr + channel) + tl.load(shift_ptr + channel)
        if MODULATES:
            pixel = latent_pixel(frame, line, column, alone, height, width, time_ratio, ratio) * C + channel
            value *= tl.load(factor_ptr + pixel, inside, 0.0).to(tl.float32)
            value += tl.load(offset_ptr + pixel, inside, 0.0).to(tl.float32)
        value = value * tl.sigmoid(value)
        value = tl.where(inside, value, 0.0).to(loaded.dtype)

        frame_size = tl.num_programs(1).to(tl.int64) * width * C
        element = row * width * C + column * C + channel
        tl.store(slab_ptr + (frame + 2) * frame_size + element, value, mask)
        kept = frame + 2 - num_frames  # 0 or 1 for the last two frames
        if KEEPS:
            tl.store(kept_ptr + kept * frame_size + element, value, column < tl.where(kept >= 0, width, 0))
        if frame == 0:
            if STARTS:
                older, last = value, value
            else:
                older, last = (
                    tl.load(older_ptr + element, mask),
                    tl.load(older_ptr + frame_size + element, mask),
                )
            tl.store(slab_ptr + element, older, mask)
            tl.store(slab_ptr + frame_size + element, last, mask)
            if KEEPS:
                tl.store(kept_ptr + element, last, column < tl.where(num_frames == 1, width, 0))

    @triton.jit
    def join(part_ptr, out_ptr, bias, spot, num_spots, channel, ADDS: tl.constexpr, C: tl.constexpr):
        """Store a tile of the convolution's result plus bias, and of what was there with ADDS; the values in fp32."""
        mask = spot[:, None] < num_spots
        element = spot[:, None] * C + channel[None, :]
        part = tl.load(part_ptr + element, mask, 0.0)
        value = part.to(tl.float32) + bias
        if ADDS:
            value += tl.load(out_ptr + element, mask, 0.0).to(tl.float32)
        value = value.to(part.dtype)
        tl.store(out_ptr + element, value, mask)
        return value.to(tl.float32)

    @compiled
    def store_kernel(
        part_ptr, bias_ptr, out_ptr, moments_ptr, num_spots, out_frame_spots,
        ADDS: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr, SPOTS: tl.constexpr, TILES: tl.constexpr,
    ):  # fmt: skip
        channel, offset = tl.arange(0, C), tl.arange(0, SPOTS)
        bias = tl.load(bias_ptr + channel).to(tl.float32)[None, :]
        frame = tl.program_id(1).to(tl.int64)
        part_ptr += frame * num_spots * C
        out_ptr += frame * out_frame_spots * C
        start = tl.program_id(0) * SPOTS * TILES

        value = join(part_ptr, out_ptr, bias, start + offset, num_spots, channel, ADDS, C)
        mask = (start + offset < num_spots)[:, None]
        # Deviations from a first mean, so that no large mean drowns a small variance
        pivot = tl.sum(tl.where(mask, value, 0.0), 0) / tl.minimum(SPOTS, num_spots - start)
        deviation = tl.where(mask, value - pivot[None, :], 0.0)
        total, squares = deviation, deviation * deviation
        for tile in range(1, TILES):
            spot = start + tile * SPOTS + offset
            value = join(part_ptr, out_ptr, bias, spot, num_spots, channel, ADDS, C)
            deviation = tl.where((spot < num_spots)[:, None], value - pivot[None, :], 0.0)
            total += deviation
            squares += deviation * deviation

        count = tl.minimum(SPOTS * TILES, num_spots - start).to(tl.float32)
        shift = tl.sum(total, 0) / count
        spread = tl.sum(squares, 0) - count * shift * shift
        means = tl.reshape(pivot + shift, (GROUPS, C // GROUPS))
        mean = tl.sum(means, 1) / (C // GROUPS)
        apart = means - mean[:, None]
        spread = tl.sum(tl.reshape(spread, (GROUPS, C // GROUPS)) + count * apart * apart, 1)

        group = tl.arange(0, GROUPS)
        num_programs = tl.num_programs(0) * tl.num_programs(1)
        moments_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(moments_ptr, count)
        tl.store(moments_ptr + (1 + group) * num_programs, mean)
        tl.store(moments_ptr + (1 + GROUPS + group) * num_programs, spread)

    @compiled
    def scale_and_shift_kernel(
        moments_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, num_parts, eps,
        PER_GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
    ):  # fmt: skip
        group, num_groups = tl.program_id(0), tl.num_programs(0)
        means_ptr = moments_ptr + (1 + group) * num_parts
        spreads_ptr = moments_ptr + (1 + num_groups + group) * num_parts
        counts = tl.zeros((AT_ONCE,), tl.float32)
        totals = tl.zeros((AT_ONCE,), tl.float32)
        for start in range(0, num_parts, AT_ONCE):
            part = start + tl.arange(0, AT_ONCE)
            count = tl.load(moments_ptr + part, part < num_parts, 0.0)
            counts += count
            totals += count * tl.load(means_ptr + part, part < num_parts, 0.0)
        count = tl.sum(counts, 0)
        mean = tl.sum(totals, 0) / count
        spreads = tl.zeros((AT_ONCE,), tl.float32)
        for start in range(0, num_parts, AT_ONCE):
            part = start + tl.arange(0, AT_ONCE)
            apart = tl.load(means_ptr + part, part < num_parts, 0.0) - mean
            spreads += tl.load(spreads_ptr + part, part < num_parts, 0.0)
            spreads += tl.load(moments_ptr + part, part < num_parts, 0.0) * PER_GROUP * apart * apart
        variance = tl.sum(spreads, 0) / (count * PER_GROUP)
        channel = group * PER_GROUP + tl.arange(0, PER_GROUP)
        scale = tl.load(weight_ptr + channel).to(tl.float32) / tl.sqrt(variance + eps)
        tl.store(scale_ptr + channel, scale)
        tl.store(shift_ptr + channel, tl.load(bias_ptr + channel).to(tl.float32) - mean * scale)

    @compiled
    def fill_down_kernel(
        values_ptr, slab_ptr, top, height, width, alone, HALVES: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr
    ):
        column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[:, None]
        channel = tl.arange(0, C)[None, :]
        row, frame = tl.program_id(1), tl.program_id(2)
        inside = tl.where(top + row < height, width, 0)
        source = tl.where(frame < alone, 0, 2 * frame - alone) if HALVES else frame
        start = (source.to(tl.int64) * height + top + row) * width * C
        element = start + column * C + channel
        value = tl.load(values_ptr + element, column < inside, 0.0)
        if HALVES:
            second = tl.load(
                values_ptr + element + height * width * C, column < tl.where(frame < alone, 0, inside), 0.0
            )
            mean = (0.5 * (value.to(tl.float32) + second.to(tl.float32))).to(value.dtype)
            value = tl.where(frame < alone, value, mean)
        start = (frame.to(tl.int64) * tl.num_programs(1) + row) * (width + 1) * C
        tl.store(slab_ptr + start + column * C + channel, value, column <= width)

    @compiled
    def fill_up_kernel(
        values_ptr, slab_ptr, top, height, width, alone, DOUBLES: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr
    ):
        column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[:, None]
        channel = tl.arange(0, C)[None, :]
        row, frame = tl.program_id(1), tl.program_id(2)
        line = top + row
        mask = column < tl.where((line >= 0) & (line < 2 * height), 2 * width, 0)
        source = tl.where(frame < alone, 0, alone + (frame - alone) // 2) if DOUBLES else frame
        start = (source.to(tl.int64) * height + line // 2) * width * C
        value = tl.load(values_ptr + start + column // 2 * C + channel, mask, 0.0)
        start = (frame.to(tl.int64) * tl.num_programs(1) + row) * 2 * width * C
        tl.store(slab_ptr + start + column * C + channel, value, column < 2 * width)


def scale_and_shift(values: torch.Tensor, moments: list, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """As vae_plain's, from the moments that `store` left: per part the pixels, then each group's mean and spread."""
    channels, groups = values.shape[-1], norm.num_groups
    parts = torch.cat(moments, dim=1) if len(moments) > 1 else moments[0]
    scale, shift = (torch.empty(channels, device=values.device) for _ in range(2))
    scale_and_shift_kernel[(groups,)](
        parts, norm.weight, norm.bias, scale, shift, parts.shape[1], norm.eps,
        PER_GROUP=channels // groups, AT_ONCE=MERGED_AT_ONCE,
    )  # fmt: skip
    return scale, shift


def fill(
    slab: torch.Tensor, values: torch.Tensor, top: int, affine, older: torch.Tensor | None, kept: torch.Tensor | None
) -> None:
    """As vae_plain's. Values as they are, the first convolution's, have few channels: it does them."""
    if affine is None:
        return vae_plain.fill(slab, values, top, affine, older, kept)
    num_frames, height, width, channels = values.shape
    modulates = affine.factor is not None
    latents = affine.factor.shape if modulates else (num_frames, height, width)
    alone = int(num_frames > 1 and num_frames % 2 == 1)
    time_ratio = (num_frames - alone) // max(latents[0] - alone, 1)
    columns = max(TILE // channels, 1)
    fill_kernel[(triton.cdiv(width, columns), slab.shape[1], num_frames)](
        values, affine.scale, affine.shift, affine.factor if modulates else values,
        affine.offset if modulates else values, slab if older is None else older, slab if kept is None else kept, slab,
        top, height, width, alone, time_ratio, height // latents[1],
        MODULATES=modulates, STARTS=older is None, KEEPS=kept is not None, C=channels, COLUMNS=columns,
    )  # fmt: skip


def store(
    part: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, top: int, adds: bool, num_groups: int
) -> torch.Tensor | None:
    """As vae_plain's; leaves the stored values' moments for `scale_and_shift`, [1 + 2 groups, parts]."""
    if not num_groups:
        return vae_plain.store(part, bias, out, top, adds, num_groups)
    num_frames, rows, width, channels = part.shape
    spots = max(TILE // channels, 1)
    grid = (triton.cdiv(rows * width, spots * TILES_PER_PROGRAM), num_frames)
    moments = torch.empty(1 + 2 * num_groups, grid[0] * grid[1], device=part.device)
    store_kernel[grid](
        part.contiguous(), bias, out[:, top:], moments, rows * width, out.shape[1] * width,
        ADDS=adds, C=channels, GROUPS=num_groups, SPOTS=spots, TILES=TILES_PER_PROGRAM,
    )  # fmt: skip
    return moments


def fill_down(slab: torch.Tensor, values: torch.Tensor, top: int, halves_time: bool) -> None:
    """As vae_plain's."""
    num_frames, height, width, channels = values.shape
    columns = max(TILE // channels, 1)
    fill_down_kernel[(triton.cdiv(width + 1, columns), slab.shape[1], slab.shape[0])](
        values, slab, top, height, width, num_frames % 2, HALVES=halves_time, C=channels, COLUMNS=columns
    )


def fill_up(slab: torch.Tensor, values: torch.Tensor, top: int, doubles_time: bool) -> None:
    """As vae_plain's."""
    num_frames, height, width, channels = values.shape
    columns = max(TILE // channels, 1)
    fill_up_kernel[(triton.cdiv(2 * width, columns), slab.shape[1], slab.shape[0])](
        values, slab, top, height, width, num_frames % 2, DOUBLES=doubles_time, C=channels, COLUMNS=columns
    )
