"""The objective against its definitions, and draws that nothing but their place can change."""

import torch

from engine.objective import add_noise, draw_normal, draw_timesteps, draw_uniform, v_prediction_loss


ALPHAS_CUMPROD = torch.linspace(0.9999, 0.0, 1000)


def example(batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    velocity, latents, noise = torch.randn(3, batch, 4, 16, 2, 2, generator=generator, dtype=dtype)
    return velocity.requires_grad_(), latents, noise, torch.tensor([1, 500, 998])


def x0_loss(velocity, latents, noise, timesteps):
    """The weighted x0 error that CogVideoX's own trainers minimise, in fp64."""
    abar = ALPHAS_CUMPROD.double()[timesteps].view(-1, 1, 1, 1, 1)
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    x0 = abar.sqrt() * noisy - (1 - abar).sqrt() * velocity
    return ((x0 - latents) ** 2 / (1 - abar)).flatten(1).mean(1)


def test_loss_and_gradient_equal_the_weighted_x0_formula():
    velocity, latents, noise, timesteps = example()
    expected = x0_loss(velocity, latents, noise, timesteps)
    (expected_grad,) = torch.autograd.grad(expected.sum(), velocity)
    loss = v_prediction_loss(velocity, latents, noise, timesteps, ALPHAS_CUMPROD)
    (grad,) = torch.autograd.grad(loss.sum(), velocity)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_true_velocity_has_no_loss():
    _, latents, noise, timesteps = example(dtype=torch.float32)
    noisier = (timesteps * 0 + 1e-3).view(-1, 1, 1, 1, 1)
    abar = ALPHAS_CUMPROD[timesteps].view(-1, 1, 1, 1, 1)
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * latents
    assert v_prediction_loss(velocity, latents, noise, timesteps, ALPHAS_CUMPROD).max() < 1e-10
    assert v_prediction_loss(velocity + noisier, latents, noise, timesteps, ALPHAS_CUMPROD).min() > 5e-7


def test_the_loss_of_a_bf16_velocity_is_taken_in_fp32():
    """Against a target that is not rounded: in bf16 errors below 1/256 of it would be none."""
    velocity, latents, noise, timesteps = example(dtype=torch.float32)
    velocity = velocity.detach().bfloat16()
    loss = v_prediction_loss(velocity, latents, noise, timesteps, ALPHAS_CUMPROD)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, v_prediction_loss(velocity.float(), latents, noise, timesteps, ALPHAS_CUMPROD))


def test_noise_levels_stay_distinct_for_bf16_latents():
    """A scheduler's own add_noise casts alphas to bf16, where most of 1,000 levels coincide."""
    latents = torch.zeros(1000, 1, 1, 1, 1, dtype=torch.bfloat16)
    noise = torch.ones_like(latents)
    noisy = add_noise(latents, noise, torch.arange(1000), torch.linspace(0.9, 0.1, 1000))
    assert noisy.dtype == torch.float32
    assert noisy.unique().numel() == 1000


def test_a_draw_depends_on_its_position_alone():
    together = draw_normal(3, "noise", [4, 5, 6], (2, 3))
    assert torch.equal(together[1], draw_normal(3, "noise", [5], (2, 3))[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, draw_normal(3, "posterior", [4, 5, 6], (2, 3)))
    assert not torch.equal(together, draw_normal(4, "noise", [4, 5, 6], (2, 3)))
    assert torch.equal(draw_timesteps(3, [9], 1000), draw_timesteps(3, [8, 9], 1000)[1:])


def test_draws_are_unbiased():
    """Neighbouring positions are independent: mean and spread are those of one long stream."""
    timesteps = draw_timesteps(0, range(4000), 1000).double()
    assert abs(timesteps.mean() - 499.5) < 5 * 288.7 / 4000**0.5
    assert timesteps.min() < 10 and timesteps.max() > 989
    normal = draw_normal(0, "noise", range(4000), (4,))
    assert abs(normal.mean()) < 5 / 16000**0.5 and abs(normal.std() - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([normal[:-1, 0], normal[1:, 0]]))[0, 1]) < 0.08
    uniform = draw_uniform(0, "text_dropout", range(4000))
    assert abs((uniform < 0.1).double().mean() - 0.1) < 0.024


def test_strata_spread_each_global_batch_and_stay_uniform():
    """Every global batch of 8 has one timestep in each eighth; over many, a sample's place does not bias its timestep."""
    timesteps = draw_timesteps(0, range(8 * 500), 1000, num_strata=8).view(500, 8)
    shares = (timesteps * 8 // 1000).sort(dim=1).values
    assert torch.equal(shares, torch.arange(8).expand(500, 8))
    assert (timesteps.double().mean(0) - 499.5).abs().max() < 5 * 288.7 / 500**0.5
    assert len({tuple(row) for row in (timesteps * 8 // 1000).tolist()}) > 400  # another permutation each time
    # However a global batch is cut, its samples draw the same
    assert torch.equal(draw_timesteps(0, [11, 12], 1000, num_strata=8), timesteps.flatten()[11:13])
