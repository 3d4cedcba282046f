"""The transformer's inputs: latents, padded and conditioned, and their positions.

In training they are what the stock diffusers pipeline feeds it. Latents are [B, F, C, H, W] here and outside:
B batch, F latent frames, C latent channels, H/W latent size.
"""

import functools

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from cogvideox.config import VaeConfig


def latent_shape(moments: torch.Tensor) -> tuple[int, int, int, int]:
    """(F, C, H, W) of the latents that moments [B, 2C, F, H, W] describe."""
    _, channels, frames, height, width = moments.shape
    return frames, channels // 2, height, width


def sample_latents(moments: torch.Tensor, noise: torch.Tensor, vae_config: VaeConfig) -> torch.Tensor:
    """Sample scaled fp32 latents [B, F, C, H, W] from moments [B, 2C, F, H, W]; `noise` is standard normal [B, F, C,
    H, W].

    Video latents are always multiplied by scaling_factor, even with invert_scale_latents: that applies to image
    latents only (CogVideoXPipeline.decode_latents).
    """
    posterior = DiagonalGaussianDistribution(moments.float())
    latents_BFCHW = posterior.mean.transpose(1, 2) + posterior.std.transpose(1, 2) * noise
    return latents_BFCHW * vae_config.scaling_factor


def sample_image_latents(
    moments: torch.Tensor, noise: torch.Tensor, vae_config: VaeConfig, scale: str = "pipeline"
) -> torch.Tensor:
    """Sample fp32 latents [B, 1, C, H, W] of first frames from their moments [B, 2C, 1, H, W].

    `scale`: "pipeline" as in CogVideoXImageToVideoPipeline.prepare_latents, which uses 1/scaling_factor with
    invert_scale_latents (1.5); "raw" leaves them unscaled, as the SAT code of 1.5 did.
    """
    raw_latents = sample_latents(moments, noise, VaeConfig(1.0, False))
    if scale == "raw":
        return raw_latents
    inverted = vae_config.invert_scale_latents
    return raw_latents * (1 / vae_config.scaling_factor if inverted else vae_config.scaling_factor)


def condition_on_first_frame(latents: torch.Tensor, image_latents: torch.Tensor) -> torch.Tensor:
    """Noisy padded latents with image latents as further channels, [B, F, 2C, H, W], zero after the first frame."""
    padding = image_latents.new_zeros(image_latents.shape[0], latents.shape[1] - 1, *image_latents.shape[2:])
    return torch.cat([latents, torch.cat([image_latents, padding], dim=1)], dim=2)


def ofs_input(transformer_config, latents: torch.Tensor) -> torch.Tensor | None:
    """The constant 2.0 [1] that 1.5's image-to-video model takes beside the timestep; None for all other models."""
    return None if transformer_config.get("ofs_embed_dim") is None else latents.new_full((1,), 2.0)


def pad_frames(latents: torch.Tensor, patch_size_t: int | None) -> torch.Tensor:
    """Repeat the first frame of latents [B, F, ...] in front until F is a multiple of `patch_size_t` (1.5).

    The pipelines pad in front too, and drop those latents before decoding.
    """
    missing = -latents.shape[1] % (patch_size_t or 1)
    return torch.cat([latents[:, :1]] * missing + [latents], dim=1) if missing else latents


def rotary_embeddings(transformer_config, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(cos, sin) [F/p_t x H/p x W/p, head_dim] in fp32 for padded latents [B, F, C, H, W]; None without RoPE (2b)."""
    config = transformer_config
    if not config.use_rotary_positional_embeddings:
        return None
    num_frames, _, height, width = latents.shape[1:]
    grid = (height // config.patch_size, width // config.patch_size)
    base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    return rotary_grid(config.attention_head_dim, config.patch_size_t, num_frames, grid, base, latents.device)


@functools.lru_cache(maxsize=64)  # one entry per bucket; rebuilding it takes about 20 ms per step
def rotary_grid(
    head_dim: int,
    patch_size_t: int | None,
    num_frames: int,
    grid: tuple[int, int],
    base: tuple[int, int],
    device: torch.device,
):
    """CogVideoXPipeline._prepare_rotary_positional_embeddings: 1.0 stretches the base grid to other sizes, 1.5 slices
    it.

    Grids are (height, width) in patches.
    """
    if patch_size_t is None:
        crops = get_resize_crop_region_for_grid(grid, base[1], base[0])
        return get_3d_rotary_pos_embed(head_dim, crops, grid, num_frames, device=device)
    return get_3d_rotary_pos_embed(
        head_dim,
        crops_coords=None,
        grid_size=grid,
        temporal_size=-(-num_frames // patch_size_t),
        grid_type="slice",
        max_size=base,
        device=device,
    )
