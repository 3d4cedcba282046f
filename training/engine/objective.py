"""The v-prediction objective as pure functions, independent of the model: random draws, noise and loss.

Axes: B batch, then any others. Everything is computed in fp32: a diffusers scheduler's `add_noise` casts alphas to the
sample's dtype, and in bf16 only 193 of the 1,000 noise levels stay distinct.
"""

from collections.abc import Sequence

import torch

from base.draws import draw_seed
from memory.host import to_device


CPU = torch.device("cpu")


def draw_generator(seed: int, name: str, *key: int | str) -> torch.Generator:
    """A CPU generator for one draw: the same numbers on every device, rank and worker, and after a restart."""
    return torch.Generator("cpu").manual_seed(draw_seed(seed, name, *key))


def draw_normal(
    seed: int, name: str, sample_ids: Sequence[int | str], shape: Sequence[int], device: torch.device = CPU
) -> torch.Tensor:
    """Standard normal [B, *shape] in fp32; row i depends only on (seed, name, sample_ids[i]), not on the device."""
    rows = [torch.randn(tuple(shape), generator=draw_generator(seed, name, p)) for p in sample_ids]
    return to_device(torch.stack(rows), device)


def draw_uniform(seed: int, name: str, sample_ids: Sequence[int | str], device: torch.device = CPU) -> torch.Tensor:
    """Uniform [B] in [0, 1); row i depends only on (seed, name, sample_ids[i])."""
    return to_device(
        torch.stack([torch.rand((), generator=draw_generator(seed, name, p)) for p in sample_ids]), device
    )


def draw_timesteps(
    seed: int,
    sample_ids: Sequence[int],
    num_train_timesteps: int,
    num_strata: int | None = None,
    device: torch.device = CPU,
) -> torch.Tensor:
    """Timesteps [B], uniform over 0 ... num_train_timesteps - 1.

    With `num_strata`, the global batch size, each sample of a batch draws from its own interval of the timesteps:
    still uniform per sample, but every update covers all noise levels.
    """
    uniform = draw_uniform(seed, "timestep", sample_ids)  # [B]
    if num_strata:  # (k + u) / n is uniform over interval k of n
        uniform = (torch.tensor([stratum(seed, p, num_strata) for p in sample_ids]) + uniform) / num_strata
    return to_device((uniform * num_train_timesteps).long().clamp(max=num_train_timesteps - 1), device)


def stratum(seed: int, sample_id: int, num_strata: int) -> int:
    """The interval of the timesteps that the sample at `sample_id` draws from: a new permutation per global batch."""
    update, row = divmod(sample_id, num_strata)  # which global batch, and its row in it
    return int(torch.randperm(num_strata, generator=draw_generator(seed, "strata", update))[row])


def noise_coefficients(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, ndim: int):
    """(sqrt(abar), sqrt(1 - abar)) at `timesteps` [B] in fp32, shaped [B, 1, ...] for tensors of `ndim` axes."""
    abar = alphas_cumprod[timesteps].view(-1, *[1] * (ndim - 1))  # fp64 in the schedulers, so 1 - abar is accurate
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
    without the division by almost zero at small timesteps.
    """
    signal, sigma = noise_coefficients(alphas_cumprod, timesteps, latents.ndim)
    target = signal * noise.float() - sigma * latents.float()
    return (velocity.float() - target).square().flatten(1).mean(1)
