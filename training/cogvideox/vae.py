"""The stock VAE's encoder and decoder on whole frames, in less time and memory: a walk of our own through its weights.

Convolutions read horizontal slabs with a halo of one row, and group norms take their moments of whole frames first:
the stock module's function, without tiles and their seams. Activations are channels-last from end to end.

Axes: B batch, F' pixel frames, F latent frames, T frames of a pass, C channels; H and W are rows and columns of the
layer at hand. Activations are [T, H, W, C].
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from cogvideox import vae_kernels, vae_plain
from cogvideox.vae_memory import KeptFrames, Room


# Of a frame's activations that a convolution reads at once, 16 MiB in bf16. A constant, not what is free: another
# height of the slabs may round otherwise.
SLAB_VALUES = 2**23
IMAGE_SLABS = 8  # times as much where frames come one at a time: launches are what an image costs


class Frames(NamedTuple):
    """Activations, and what the layer before left of their moments, slab by slab."""

    values: torch.Tensor  # [T, H, W, C]
    moments: list | None = None


class Affine(NamedTuple):
    """A group norm with its moments: value * scale + shift, of which the decoder's take `* factor + offset` as well."""

    scale: torch.Tensor  # [C], fp32
    shift: torch.Tensor
    factor: torch.Tensor | None = None  # [T, H, W, C] at the latents' size
    offset: torch.Tensor | None = None


@apply_forward_hook  # as of the stock methods: a pipeline that offloads moves the VAE to the GPU now
@torch.no_grad()
def encode(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> torch.Tensor:
    """Moments [B, 2C, F, H, W] of pixels [B, 3, F', h, w] in [-1, 1]: what `vae.encode` computes on whole frames."""
    if not can_walk(vae):
        return vae.encode(pixels).latent_dist.parameters
    return torch.cat([encode_one(vae, sample) for sample in pixels.split(1)])


@apply_forward_hook
@torch.no_grad()
def decode(vae: AutoencoderKLCogVideoX, latents: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, F', h, w] of latents [B, C, F, H, W]: what `vae.decode` computes on whole frames."""
    if not can_walk(vae):
        return vae.decode(latents).sample
    batches = frame_batches(latents.shape[2], vae.num_latent_frames_batch_size)
    sizes = [upsampled(vae, (frames.stop - frames.start, *latents.shape[3:])) for frames, _ in batches]
    num_frames = sum(size[0] for size in sizes)
    pixels = latents.new_empty(len(latents), vae.config.out_channels, num_frames, *sizes[0][1:])
    for sample, target in zip(latents.split(1), pixels, strict=True):
        decode_one(vae, sample, batches, sizes, target)
    return pixels


def is_used_on(device: torch.device) -> bool:
    """True for GPUs. On a CPU the stock module does, and what it has written there stays the same to the byte."""
    return device.type == "cuda"


def can_walk(vae: AutoencoderKLCogVideoX) -> bool:
    """False where tiles are asked for, another function, and for what no CogVideoX checkpoint has."""
    return not vae.use_tiling and vae.config.act_fn in ("silu", "swish")


def encode_one(vae, pixels: torch.Tensor) -> torch.Tensor:
    _, _, num_frames, height, width = pixels.shape
    batches, passes = frame_batches(num_frames, vae.num_sample_frames_batch_size), []
    first, channels = batches[0][0].stop, vae.config.block_out_channels[0]
    room = make_room(pixels, (first, height, width), 2 * channels, channels)
    with KeptFrames(vae, pixels) as kept:
        walk = Walk(vae, room, kept, slab_values(first))
        for frames, walk.is_last in batches:
            moments = walk.encode(vae.encoder, pixels[0, :, frames].permute(1, 2, 3, 0)).permute(3, 0, 1, 2)[None]
            passes.append(moments if vae.quant_conv is None else vae.quant_conv(moments))
    return torch.cat(passes, dim=2).contiguous()


def decode_one(vae, latents: torch.Tensor, batches: list, sizes: list, pixels: torch.Tensor) -> None:
    """Fill `pixels` [3, F', h, w], of each pass as many frames as its size in `sizes` says."""
    targets = pixels.split([size[0] for size in sizes], dim=1)
    channels = vae.config.block_out_channels[:2]  # the last upsampling leaves those of the level below
    room = make_room(latents, sizes[0], channels[0] + max(channels), max(channels))
    with KeptFrames(vae, latents) as kept:
        walk = Walk(vae, room, kept, slab_values(sizes[0][0]))
        for (frames, walk.is_last), target in zip(batches, targets, strict=True):
            part = latents[:, :, frames]
            part = part if vae.post_quant_conv is None else vae.post_quant_conv(part)
            target.copy_(walk.decode(vae.decoder, part[0].permute(1, 2, 3, 0).contiguous()).permute(3, 0, 1, 2))


def make_room(like: torch.Tensor, size: tuple[int, ...], channels: int, slab_channels: int) -> Room:
    """For the activations of a pass of `size` (frames, height, width), where they are largest: at the pixels' size."""
    num_frames, height, width = size
    rows = slabs_of(height, width, slab_channels, slab_values(num_frames))[0][1]
    return Room(like, math.prod(size) * channels, (2 + num_frames) * (rows + 2) * width * slab_channels)


def upsampled(vae, size: tuple[int, ...]) -> tuple[int, ...]:
    """(frames, height, width) in pixels of a pass of latents: time doubles but for a first frame alone."""
    num_frames, height, width = size
    for layer in (layer for block in vae.decoder.up_blocks for layer in block.upsamplers or []):
        num_frames = 2 * num_frames - num_frames % 2 if layer.compress_time else num_frames
        height, width = 2 * height, 2 * width
    return num_frames, height, width


def frame_batches(num_frames: int, size: int) -> list[tuple[slice, bool]]:
    """(frames, whether they are the last) of each pass. As in the stock VAE, the first pass takes those left over."""
    first = size + num_frames % size if num_frames >= size else num_frames
    starts = [0, *range(first, num_frames, size)]
    stops = [*starts[1:], num_frames]
    return [(slice(start, stop), stop == num_frames) for start, stop in zip(starts, stops, strict=True)]


def slab_values(num_frames: int) -> int:
    """Of a frame in a slab, if a video's first pass has `num_frames`."""
    return SLAB_VALUES * (IMAGE_SLABS if num_frames == 1 else 1)


def slabs_of(height: int, width: int, channels: int, num_values: int) -> list[tuple[int, int]]:
    """(top, bottom) of each slab, of `num_values` a frame at most: a function of the frame's size alone."""
    count = -(-height * width * channels // num_values)
    rows = -(-height // count)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


class Walk:
    """One video's way through the encoder or decoder, a pass of a few frames at a time.

    Activations lie in `room`: those in flight at `end`, a block's others at the other one.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX, room: Room, kept: KeptFrames, slab_values: int):
        self.steps = steps_for(vae)
        self.num_groups = vae.config.norm_num_groups
        self.room, self.end = room, 0
        self.kept = kept
        self.slab_values = slab_values
        self.is_last = False

    def encode(self, encoder, pixels: torch.Tensor) -> torch.Tensor:
        frames = self.place(pixels, encoder.conv_in.conv.out_channels, self.end)
        frames = self.convolve(encoder.conv_in, pixels, frames)
        for block in encoder.down_blocks:
            frames = self.resnets(block, frames)
            for layer in block.downsamplers or []:
                frames = self.downsample(layer, frames.values)
        return self.finish(encoder, self.resnets(encoder.mid_block, frames))

    def decode(self, decoder, latents: torch.Tensor) -> torch.Tensor:
        frames = self.place(latents, decoder.conv_in.conv.out_channels, self.end)
        frames = self.resnets(decoder.mid_block, self.convolve(decoder.conv_in, latents, frames), latents)
        for block in decoder.up_blocks:
            frames = self.resnets(block, frames, latents)
            for layer in block.upsamplers or []:
                frames = self.upsample(layer, frames.values)
        return self.finish(decoder, frames, latents)

    def resnets(self, block, frames: Frames, latents: torch.Tensor | None = None) -> Frames:
        for resnet in block.resnets:
            hidden = self.place(frames.values, resnet.out_channels, 1 - self.end)
            hidden = self.convolve(resnet.conv1, frames.values, hidden, self.affine(resnet.norm1, frames, latents))
            inputs = self.shortcut(resnet, frames.values)
            affine = self.affine(resnet.norm2, hidden, latents)
            frames = self.convolve(resnet.conv2, hidden.values, inputs, affine, adds=True)
        return frames

    def finish(self, coder, frames: Frames, latents: torch.Tensor | None = None) -> torch.Tensor:
        affine = self.affine(coder.norm_out, frames, latents)
        out = frames.values.new_empty(*frames.values.shape[:3], coder.conv_out.conv.out_channels)
        return self.convolve(coder.conv_out, frames.values, out, affine, num_groups=0).values

    def place(self, values: torch.Tensor, channels: int, end: int) -> torch.Tensor:
        """Room at `end` for as many frames of the same size."""
        return self.room.place((*values.shape[:3], channels), end)

    def affine(self, norm: nn.Module, frames: Frames, latents: torch.Tensor | None) -> Affine:
        group_norm = norm if latents is None else norm.norm_layer
        scale, shift = self.steps.scale_and_shift(frames.values, frames.moments, group_norm)
        if latents is None:
            return Affine(scale, shift)
        # Pointwise, so that the nearest upsampling to the frames' size may come after it: the same numbers
        return Affine(scale, shift, pointwise(norm.conv_y.conv, latents), pointwise(norm.conv_b.conv, latents))

    def shortcut(self, resnet, values: torch.Tensor) -> torch.Tensor:
        """A block's inputs with as many channels as its output, in their own place."""
        if resnet.in_channels == resnet.out_channels:
            return values
        out = self.place(values, resnet.out_channels, self.end)
        # Frame by frame away from the room's end where they grow, towards it where they shrink: none is overwritten
        # that is still to be read
        grows = resnet.out_channels > resnet.in_channels
        order = range(len(values)) if grows == (self.end == 1) else reversed(range(len(values)))
        for frame in order:
            out[frame] = pointwise(resnet.conv_shortcut, values[frame])
        return out

    def convolve(
        self, layer, values: torch.Tensor, out: torch.Tensor, affine=None, adds=False, num_groups: int | None = None
    ) -> Frames:
        """The causal convolution `layer` over SiLU(`affine`(values)) or over values as they are, into `out`; with `adds`
        added to what is there. `num_groups` 0: no norm comes next.
        """
        num_groups = self.num_groups if num_groups is None else num_groups
        weight = layer.conv.weight.contiguous(memory_format=torch.channels_last_3d)
        moments = []
        for top, bottom in slabs_of(*values.shape[1:3], max(values.shape[3], out.shape[3]), self.slab_values):
            slab = self.causal_slab(layer, values, top, bottom, affine)
            part = F.conv3d(slab.permute(3, 0, 1, 2)[None], weight, padding=(0, 0, 1))[0].permute(1, 2, 3, 0)
            moments.append(self.steps.store(part, layer.conv.bias, out, top, adds, num_groups))
            del part  # before the next one comes
        return Frames(out, moments)

    def causal_slab(self, layer, values: torch.Tensor, top: int, bottom: int, affine: Affine | None) -> torch.Tensor:
        """[2 + T, rows + 2, W, C]: what `layer` reads for the rows from `top` to `bottom`."""
        num_frames, _, width, channels = values.shape
        slab = self.room.slab((2 + num_frames, bottom - top + 2, width, channels))
        older, newer = self.kept.older((layer, top)), None
        if not self.is_last:
            newer = self.kept.newer((layer, top), (2, *slab.shape[1:]))
        self.steps.fill(slab, values, top - 1, affine, older, newer)
        if newer is not None:
            self.kept.written((layer, top))
        return slab

    def downsample(self, layer, values: torch.Tensor) -> Frames:
        """Pairs of frames averaged where the layer halves time, then a convolution of stride 2 over rows and columns."""
        num_frames, height, width, channels = values.shape
        num_frames = (num_frames + 1) // 2 if layer.compress_time else num_frames
        out = self.room.place((num_frames, height // 2, width // 2, layer.conv.out_channels), 1 - self.end)
        weight = layer.conv.weight.contiguous(memory_format=torch.channels_last)
        moments = []
        for top, bottom in slabs_of(height // 2, width, 2 * channels, self.slab_values):
            slab = self.room.slab((num_frames, 2 * (bottom - top) + 1, width + 1, channels))
            self.steps.fill_down(slab, values, 2 * top, layer.compress_time)
            part = F.conv2d(slab.permute(0, 3, 1, 2), weight, stride=2).permute(0, 2, 3, 1)
            moments.append(self.steps.store(part, layer.conv.bias, out, top, False, self.num_groups))
            del part
        self.end = 1 - self.end
        return Frames(out, moments)

    def upsample(self, layer, values: torch.Tensor) -> Frames:
        """Nearest upsampling, in time too but for a first frame alone, then a convolution over rows and columns."""
        num_frames, height, width, channels = values.shape
        num_frames = 2 * num_frames - num_frames % 2 if layer.compress_time else num_frames
        out = self.room.place((num_frames, 2 * height, 2 * width, layer.conv.out_channels), 1 - self.end)
        weight = layer.conv.weight.contiguous(memory_format=torch.channels_last)
        moments = []
        for top, bottom in slabs_of(2 * height, 2 * width, channels, self.slab_values):
            slab = self.room.slab((num_frames, bottom - top + 2, 2 * width, channels))
            self.steps.fill_up(slab, values, top - 1, layer.compress_time)
            part = F.conv2d(slab.permute(0, 3, 1, 2), weight, padding=(0, 1)).permute(0, 2, 3, 1)
            moments.append(self.steps.store(part, layer.conv.bias, out, top, False, self.num_groups))
            del part
        self.end = 1 - self.end
        return Frames(out, moments)


def steps_for(vae: AutoencoderKLCogVideoX):
    """The module with what comes between the convolutions: Triton kernels on a GPU, else the same in plain torch."""
    return vae_kernels if vae_kernels.can_run(vae) else vae_plain


def pointwise(conv: nn.Conv3d, values: torch.Tensor) -> torch.Tensor:
    """A convolution of kernel size 1 over channels-last values."""
    return F.linear(values, conv.weight.flatten(1), conv.bias)
