"""The noise and the target of training against the schedulers that the pipelines sample with, at every timestep.

A broken schedule hardly shows in a sample of a model that knows one video; here it shows exactly.
"""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from cogvideox.config import load_scheduler
from engine.objective import add_noise, noise_coefficients, v_prediction_loss
from tiny_pipeline import KINDS, kind_scheduler


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_target_are_the_schedulers(tiny, kind):
    """In fp64 on their side, where a scheduler does not round its alphas."""
    ours, theirs = load_scheduler(tiny(kind)), kind_scheduler(kind)
    timesteps = torch.arange(theirs.config.num_train_timesteps)
    latents, noise = torch.randn(2, len(timesteps), 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    noisy = add_noise(latents, noise, timesteps, ours.alphas_cumprod)
    torch.testing.assert_close(
        noisy.double(), theirs.add_noise(latents.double(), noise.double(), timesteps), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(noisy[-1], noise[-1])  # zero terminal SNR: sampling starts where training ends

    velocity = theirs.get_velocity(latents.double(), noise.double(), timesteps)
    assert v_prediction_loss(velocity, latents, noise, timesteps, ours.alphas_cumprod).max() < 1e-10


@pytest.mark.parametrize("timestep", [999, 600, 40, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_finds_the_latents_of_a_perfect_model(tiny, kind, timestep):
    """The x0 that its step computes from training's noisy latents and training's target."""
    scheduler = load_scheduler(tiny(kind))
    scheduler.set_timesteps(50)
    t = torch.tensor([timestep])
    latents, noise = torch.randn(2, 1, 3, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    signal, sigma = noise_coefficients(scheduler.alphas_cumprod, t, latents.ndim)
    more = (
        {}
        if isinstance(scheduler, CogVideoXDDIMScheduler)
        else dict.fromkeys(("old_pred_original_sample", "timestep_back"))
    )
    x0 = scheduler.step(
        model_output=signal * noise - sigma * latents,
        timestep=timestep,
        sample=add_noise(latents, noise, t, scheduler.alphas_cumprod),
        return_dict=False,
        **more,
    )[1]
    torch.testing.assert_close(x0, latents, rtol=1e-5, atol=1e-5)
