"""The training objective of v-prediction diffusion, family-free and pure: draws, noise, loss.

Axes: B batch, then anything. Everything is computed in fp32: `add_noise` of a scheduler casts alphas to the sample's
dtype, which in bf16 leaves 193 of 1,000 noise levels distinct.
"""

from collections.abc import Sequence

import torch

from base.draws import draw_seed
from memory.host import to_device


CPU = torch.device("cpu")


def draw_generator(seed: int, name: str, *place: int | str) -> torch.Generator:
    """A CPU generator for one draw: the same numbers on every device, rank, worker and after every restart."""
    return torch.Generator("cpu").manual_seed(draw_seed(seed, name, *place))


def draw_normal(
    seed: int, name: str, positions: Sequence[int | str], shape: Sequence[int], device: torch.device = CPU
) -> torch.Tensor:
    """Standard normal [B, *shape] in fp32; row i depends on (seed, name, positions[i]) alone, not on the device."""
    rows = [torch.randn(tuple(shape), generator=draw_generator(seed, name, p)) for p in positions]
    return to_device(torch.stack(rows), device)


def draw_uniform(seed: int, name: str, positions: Sequence[int | str], device: torch.device = CPU) -> torch.Tensor:
    """Uniform [B] in [0, 1)."""
    return to_device(torch.stack([torch.rand((), generator=draw_generator(seed, name, p)) for p in positions]), device)


def draw_timesteps(
    seed: int,
    positions: Sequence[int],
    num_train_timesteps: int,
    num_strata: int | None = None,
    device: torch.device = CPU,
) -> torch.Tensor:
    """Timesteps [B], uniform over 0 ... num_train_timesteps - 1.

    With `num_strata`, the size of the global batch, each of its samples draws from its own share of the timesteps:
    still uniform for a sample, but every update sees all noise levels.
    """
    uniform = draw_uniform(seed, "timestep", positions)
    if num_strata:
        uniform = (torch.tensor([stratum(seed, p, num_strata) for p in positions]) + uniform) / num_strata
    return to_device((uniform * num_train_timesteps).long().clamp(max=num_train_timesteps - 1), device)


def stratum(seed: int, position: int, num_strata: int) -> int:
    """Which share of the timesteps the sample at `position` draws from: a new permutation every global batch."""
    update, place = divmod(position, num_strata)
    return int(torch.randperm(num_strata, generator=draw_generator(seed, "strata", update))[place])


def noise_coefficients(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, ndim: int):
    """(sqrt(abar), sqrt(1 - abar)) at `timesteps` [B] in fp32, shaped [B, 1, ...] for tensors of `ndim` axes."""
    abar = alphas_cumprod[timesteps].view(-1, *[1] * (ndim - 1))  # the schedulers keep fp64: 1 - abar loses nothing
    return abar.sqrt().float(), (1.0 - abar).sqrt().float()


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor):
    """Noisy latents [B, ...] in fp32: sqrt(abar) x0 + sqrt(1 - abar) noise (DDPM, arXiv 2006.11239)."""
    signal, sigma = noise_coefficients(alphas_cumprod, timesteps, latents.ndim)
    return signal * latents.float() + sigma * noise.float()


def v_prediction_loss(
    velocity: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """Loss [B] in fp32: mean squared error against the velocity sqrt(abar) noise - sqrt(1 - abar) x0.

    Equal to the 1/(1 - abar)-weighted error of the x0 that the velocity implies (arXiv 2202.00512, appendix D),
    without its division by nearly zero at small timesteps.
    """
    signal, sigma = noise_coefficients(alphas_cumprod, timesteps, latents.ndim)
    target = signal * noise.float() - sigma * latents.float()
    return (velocity.float() - target).square().flatten(1).mean(1)
