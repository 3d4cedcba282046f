"""The stock VAE's encoder and decoder on whole frames, in less time and memory: a walk of our own through its weights.

Convolutions read horizontal slabs with a halo of one row, and group norms take their moments of whole frames first:
the stock module's function, without tiles and their seams. Activations are channels-last from end to end.

Axes: B batch, F' pixel frames, F latent frames, T frames of a pass, C channels; H and W are rows and columns of the
layer at hand. Activations are [T, H, W, C].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from torch import nn

from cogvideox import vae_kernels, vae_plain


# Of a frame's activations that a convolution reads at once, 16 MiB in bf16. A constant, not what is free: another
# height of the slabs may round otherwise.
SLAB_VALUES = 2**23


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


@torch.no_grad()
def encode(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> torch.Tensor:
    """Moments [B, 2C, F, H, W] of pixels [B, 3, F', h, w] in [-1, 1]: what `vae.encode` computes on whole frames."""
    if not can_walk(vae):
        return vae.encode(pixels).latent_dist.parameters
    return torch.cat([encode_one(vae, sample) for sample in pixels.split(1)])


@torch.no_grad()
def decode(vae: AutoencoderKLCogVideoX, latents: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, F', h, w] of latents [B, C, F, H, W]: what `vae.decode` computes on whole frames."""
    if not can_walk(vae):
        return vae.decode(latents).sample
    return torch.cat([decode_one(vae, sample) for sample in latents.split(1)])


def can_walk(vae: AutoencoderKLCogVideoX) -> bool:
    """False where tiles are asked for, another function, and for what no CogVideoX checkpoint has."""
    return not vae.use_tiling and vae.config.act_fn in ("silu", "swish")


def encode_one(vae, pixels: torch.Tensor) -> torch.Tensor:
    walk, passes = Walk(vae), []
    for frames, walk.is_last in frame_batches(pixels.shape[2], vae.num_sample_frames_batch_size):
        moments = walk.encode(vae.encoder, pixels[0, :, frames].permute(1, 2, 3, 0))
        moments = moments.permute(3, 0, 1, 2)[None]
        passes.append(moments if vae.quant_conv is None else vae.quant_conv(moments))
    return torch.cat(passes, dim=2).contiguous()


def decode_one(vae, latents: torch.Tensor) -> torch.Tensor:
    walk, passes = Walk(vae), []
    for frames, walk.is_last in frame_batches(latents.shape[2], vae.num_latent_frames_batch_size):
        part = latents[:, :, frames]
        part = part if vae.post_quant_conv is None else vae.post_quant_conv(part)
        pixels = walk.decode(vae.decoder, part[0].permute(1, 2, 3, 0).contiguous())
        passes.append(pixels.permute(3, 0, 1, 2)[None])
    return torch.cat(passes, dim=2).contiguous()


def frame_batches(num_frames: int, size: int) -> list[tuple[slice, bool]]:
    """(frames, whether they are the last) of each pass. As in the stock VAE, the first pass takes those left over."""
    first = size + num_frames % size if num_frames >= size else num_frames
    starts = [0, *range(first, num_frames, size)]
    stops = [*starts[1:], num_frames]
    return [(slice(start, stop), stop == num_frames) for start, stop in zip(starts, stops, strict=True)]


def slabs_of(height: int, width: int, channels: int) -> list[tuple[int, int]]:
    """(top, bottom) of each slab: a function of the frame's size alone."""
    count = -(-height * width * channels // SLAB_VALUES)
    rows = -(-height // count)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


class Walk:
    """One video's way through the encoder or decoder, a pass of a few frames at a time.

    `kept` holds what a causal convolution read last: [2, rows, W, C] of each of its slabs, halo included. The frames
    in flight are an attribute, so that a layer can free what it has read.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX):
        self.steps = steps_for(vae)
        self.num_groups = vae.config.norm_num_groups
        self.kept = {}
        self.is_last = False
        self.frames: Frames | None = None

    def encode(self, encoder, pixels: torch.Tensor) -> torch.Tensor:
        self.frames = self.convolve(encoder.conv_in, pixels)
        for block in encoder.down_blocks:
            self.resnets(block)
            for layer in block.downsamplers or []:
                self.frames = self.downsample(layer)
        self.resnets(encoder.mid_block)
        return self.finish(encoder)

    def decode(self, decoder, latents: torch.Tensor) -> torch.Tensor:
        self.frames = self.convolve(decoder.conv_in, latents)
        self.resnets(decoder.mid_block, latents)
        for block in decoder.up_blocks:
            self.resnets(block, latents)
            for layer in block.upsamplers or []:
                self.frames = self.upsample(layer)
        return self.finish(decoder, latents)

    def resnets(self, block, latents: torch.Tensor | None = None) -> None:
        for resnet in block.resnets:
            inputs = self.take()
            hidden = self.convolve(resnet.conv1, inputs.values, self.affine(resnet.norm1, inputs, latents))
            inputs = shortcut(resnet, inputs.values)
            affine = self.affine(resnet.norm2, hidden, latents)
            self.frames = self.convolve(resnet.conv2, hidden.values, affine, onto=inputs)

    def finish(self, coder, latents: torch.Tensor | None = None) -> torch.Tensor:
        frames = self.take()
        affine = self.affine(coder.norm_out, frames, latents)
        return self.convolve(coder.conv_out, frames.values, affine, num_groups=0).values

    def take(self) -> Frames:
        """The frames in flight, which nobody else holds any longer."""
        frames, self.frames = self.frames, None
        return frames

    def affine(self, norm: nn.Module, frames: Frames, latents: torch.Tensor | None) -> Affine:
        group_norm = norm if latents is None else norm.norm_layer
        scale, shift = self.steps.scale_and_shift(frames.values, frames.moments, group_norm)
        if latents is None:
            return Affine(scale, shift)
        # Pointwise, so that the nearest upsampling to the frames' size may come after it: the same numbers
        return Affine(scale, shift, pointwise(norm.conv_y.conv, latents), pointwise(norm.conv_b.conv, latents))

    def convolve(
        self, layer, values: torch.Tensor, affine=None, onto: torch.Tensor | None = None, num_groups: int | None = None
    ) -> Frames:
        """The causal convolution `layer` over SiLU(`affine`(values)), or values as they are; added to `onto` in place."""
        conv, (num_frames, height, width, channels) = layer.conv, values.shape
        num_groups = self.num_groups if num_groups is None else num_groups
        weight = conv.weight.contiguous(memory_format=torch.channels_last_3d)
        out = values.new_empty(num_frames, height, width, conv.out_channels) if onto is None else onto
        moments = []
        for top, bottom in slabs_of(height, width, max(channels, conv.out_channels)):
            slab = values.new_empty(2 + num_frames, bottom - top + 2, width, channels)
            older, kept = self.kept.pop((layer, top), None), None
            if not self.is_last:
                kept = self.kept[layer, top] = values.new_empty(2, *slab.shape[1:])
            self.steps.fill(slab, values, top - 1, affine, older, kept)
            part = F.conv3d(slab.permute(3, 0, 1, 2)[None], weight, padding=(0, 0, 1))[0].permute(1, 2, 3, 0)
            moments.append(self.steps.store(part, conv.bias, out, top, onto is not None, num_groups))
        return Frames(out, moments)

    def downsample(self, layer) -> Frames:
        """Pairs of frames averaged where the layer halves time, then a convolution of stride 2 over rows and columns."""
        values, halves_time = self.take().values, layer.compress_time
        num_frames, height, width, channels = values.shape
        num_frames = (num_frames + 1) // 2 if halves_time else num_frames
        out = values.new_empty(num_frames, height // 2, width // 2, channels)
        weight = layer.conv.weight.contiguous(memory_format=torch.channels_last)
        moments = []
        for top, bottom in slabs_of(height // 2, width, 2 * channels):
            slab = values.new_empty(num_frames, 2 * (bottom - top) + 1, width + 1, channels)
            self.steps.fill_down(slab, values, 2 * top, halves_time)
            part = F.conv2d(slab.permute(0, 3, 1, 2), weight, stride=2).permute(0, 2, 3, 1)
            moments.append(self.steps.store(part, layer.conv.bias, out, top, False, self.num_groups))
        return Frames(out, moments)

    def upsample(self, layer) -> Frames:
        """Nearest upsampling, in time too but for a first frame alone, then a convolution over rows and columns."""
        values, doubles_time = self.take().values, layer.compress_time
        num_frames, height, width, channels = values.shape
        num_frames = 2 * num_frames - num_frames % 2 if doubles_time else num_frames
        out = values.new_empty(num_frames, 2 * height, 2 * width, channels)
        weight = layer.conv.weight.contiguous(memory_format=torch.channels_last)
        moments = []
        for top, bottom in slabs_of(2 * height, 2 * width, channels):
            slab = values.new_empty(num_frames, bottom - top + 2, 2 * width, channels)
            self.steps.fill_up(slab, values, top - 1, doubles_time)
            part = F.conv2d(slab.permute(0, 3, 1, 2), weight, padding=(0, 1)).permute(0, 2, 3, 1)
            moments.append(self.steps.store(part, layer.conv.bias, out, top, False, self.num_groups))
        return Frames(out, moments)


def steps_for(vae: AutoencoderKLCogVideoX):
    """The module with what comes between the convolutions: Triton kernels on a GPU, else the same in plain torch."""
    return vae_kernels if vae_kernels.can_run(vae) else vae_plain


def shortcut(resnet, values: torch.Tensor) -> torch.Tensor:
    return values if resnet.in_channels == resnet.out_channels else pointwise(resnet.conv_shortcut, values)


def pointwise(conv: nn.Conv3d, values: torch.Tensor) -> torch.Tensor:
    """A convolution of kernel size 1 over channels-last values."""
    return F.linear(values, conv.weight.flatten(1), conv.bias)
