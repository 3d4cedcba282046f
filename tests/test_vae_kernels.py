"""The VAE's Triton kernels do what plain torch does between the convolutions: on a GPU, or with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from cogvideox import vae_kernels, vae_plain
from cogvideox.vae import Affine


C, GROUPS = 8, 4


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request, monkeypatch):
    """With tiles so small that a tiny frame takes several programs, the last ones in part."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if vae_kernels.triton is None or is_interpreted != (request.param == "cpu"):
        pytest.skip("a CPU needs Triton and TRITON_INTERPRET=1, a GPU none of the two")
    monkeypatch.setattr(vae_kernels, "TILE", 4 * C)
    monkeypatch.setattr(vae_kernels, "TILES_PER_PROGRAM", 2)
    monkeypatch.setattr(vae_kernels, "MERGED_AT_ONCE", 4)
    torch.manual_seed(0)
    return torch.device(request.param)


def same(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def make_affine(device, latents):
    modulation = (torch.randn(*latents, C, device=device) for _ in range(2)) if latents else ()
    return Affine(torch.randn(C, device=device), torch.randn(C, device=device), *modulation)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize(
    ("num_frames", "latents"),
    [(1, None), (2, None), (3, None), (5, (3, 3, 3)), (4, (2, 3, 3)), (1, (1, 3, 3)), (2, (2, 6, 6))],
)
@pytest.mark.parametrize(("top", "rows"), [(-1, 4), (1, 3), (3, 4), (-1, 8)])
def test_fill(device, num_frames, latents, top, rows, starts, keeps):
    values = torch.randn(num_frames, 6, 6, C, device=device)
    affine = make_affine(device, latents)
    older = None if starts else torch.randn(2, rows, 6, C, device=device)
    results = []
    for steps in (vae_kernels, vae_plain):
        slab = torch.full((2 + num_frames, rows, 6, C), torch.nan, device=device)
        kept = torch.full((2, rows, 6, C), torch.nan, device=device) if keeps else None
        steps.fill(slab, values, top, affine, older, kept)
        results.append((slab, kept))
    same(results[0][0], results[1][0])
    if keeps:
        same(results[0][1], results[1][1])


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_store_and_the_moments_it_leaves(device, adds, mean):
    """A large mean beside a small variance, in slabs of unequal height."""
    norm = torch.nn.GroupNorm(GROUPS, C, eps=1e-6, device=device)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    bias, before = torch.randn(C, device=device), torch.randn(3, 7, 5, C, device=device)
    parts = [(0, mean + torch.randn(3, 4, 5, C, device=device)), (4, mean + torch.randn(3, 3, 5, C, device=device))]
    results = []
    for steps in (vae_kernels, vae_plain):
        out = before.clone()
        moments = [steps.store(part, bias, out, top, adds, GROUPS) for top, part in parts]
        scale, shift = steps.scale_and_shift(out, moments, norm)
        results.append((out, scale, out * scale + shift))
    same(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("halves_time", [True, False])
@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize(("height", "width", "top", "rows"), [(6, 6, 0, 5), (6, 7, 4, 3), (5, 5, 2, 3)])
def test_fill_down(device, height, width, top, rows, num_frames, halves_time):
    values = torch.randn(num_frames, height, width, C, device=device)
    results = []
    for steps in (vae_kernels, vae_plain):
        after = (num_frames + 1) // 2 if halves_time else num_frames
        results.append(torch.full((after, rows, width + 1, C), torch.nan, device=device))
        steps.fill_down(results[-1], values, top, halves_time)
    same(*results)


@pytest.mark.parametrize("doubles_time", [True, False])
@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize(("top", "rows"), [(-1, 4), (2, 4), (5, 4), (-1, 10)])
def test_fill_up(device, top, rows, num_frames, doubles_time):
    values = torch.randn(num_frames, 4, 3, C, device=device)
    results = []
    for steps in (vae_kernels, vae_plain):
        after = 2 * num_frames - num_frames % 2 if doubles_time else num_frames
        results.append(torch.full((after, rows, 6, C), torch.nan, device=device))
        steps.fill_up(results[-1], values, top, doubles_time)
    same(*results)
