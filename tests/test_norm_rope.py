"""One kernel between projection and attention computes what torch's operations do."""

import pytest
import torch
from torch import nn

from attention import norm_rope
from attention.norm_rope import can_fuse, norm_and_rotate
from attention.processor import heads_by_torch


CUDA = torch.device("cuda")
BATCH, TOKENS, TEXT, HEADS = 2, 301, 26, 5
WIDTH = 64 * HEADS


class Layers:
    """What `heads_by_torch` reads of an attention layer."""

    to_q = to_k = to_v = None
    heads = HEADS

    def __init__(self):
        self.norm_q, self.norm_k = (nn.LayerNorm(64, eps=1e-6, device=CUDA) for _ in range(2))
        for norm in (self.norm_q, self.norm_k):
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, 0.0, 0.3)
            norm.requires_grad_(False)


def make_inputs(dtype, shared):
    """(base outputs, adapters' outputs) of q, k and v; `shared`: the first in one tensor."""
    torch.manual_seed(0)
    fused = torch.randn(BATCH, TOKENS, 3 * WIDTH, device=CUDA).to(dtype)
    bases = [fused] if shared else [part.contiguous() for part in fused.split(WIDTH, dim=-1)]
    deltas = [0.3 * torch.randn(BATCH, TOKENS, WIDTH, device=CUDA).to(dtype) for _ in range(3)]
    return [part.detach().requires_grad_() for part in bases], [part.requires_grad_() for part in deltas]


def relative_error(result, exact):
    return float((result.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("with_rope", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2.5e-3), (torch.float16, 3e-4), (torch.float32, 1e-6)])
def test_the_kernel_equals_torchs_operations_in_fp64(dtype, bound, shared, with_rope):
    layers, (bases, deltas) = Layers(), make_inputs(dtype, shared)
    angles = torch.rand(TOKENS - TEXT, 64, device=CUDA)
    rotary = (angles.cos(), angles.sin()) if with_rope else None
    results = norm_and_rotate(bases, deltas, layers.norm_q, layers.norm_k, rotary, TEXT)
    upstream = [torch.randn_like(result) for result in results]
    grads = torch.autograd.grad(results, [*bases, *deltas], upstream)

    # The sum is rounded to the compute dtype, as the products are, and everything after it is exact
    parts = [part.detach() for base in bases for part in base.split(WIDTH, dim=-1)]
    sums = [(part + delta).detach().double().requires_grad_() for part, delta in zip(parts, deltas, strict=True)]
    layers.norm_q, layers.norm_k = layers.norm_q.double(), layers.norm_k.double()
    exact = heads_by_torch(layers, None, rotary, TEXT, project=lambda states, _: sums)
    exact_grads = torch.autograd.grad(exact, sums, [grad.double() for grad in upstream])
    base_grads = [torch.cat(exact_grads, dim=-1)] if shared else exact_grads
    for result, reference in zip([*results, *grads], [*exact, *base_grads, *exact_grads], strict=True):
        assert relative_error(result, reference) < bound


@pytest.mark.gpu
def test_text_is_not_turned_and_padding_of_the_last_rows_is_not_written():
    layers, (bases, deltas) = Layers(), make_inputs(torch.bfloat16, shared=True)
    angles = torch.rand(TOKENS - TEXT, 64, device=CUDA)
    turned = norm_and_rotate(bases, deltas, layers.norm_q, layers.norm_k, (angles.cos(), angles.sin()), TEXT)
    still = norm_and_rotate(bases, deltas, layers.norm_q, layers.norm_k, None, TEXT)
    for one, other in zip(turned[:2], still[:2], strict=True):
        assert torch.equal(one[:, :TEXT], other[:, :TEXT]) and not torch.equal(one[:, TEXT:], other[:, TEXT:])
    assert torch.equal(turned[2], still[2])


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
def test_inputs_of_other_strides_give_the_same(shared):
    layers, (bases, deltas) = Layers(), make_inputs(torch.bfloat16, shared)
    angles = torch.rand(TOKENS - TEXT, 64, device=CUDA)
    rotary = (angles.cos(), angles.sin())
    expected = norm_and_rotate(bases, deltas, layers.norm_q, layers.norm_k, rotary, TEXT)
    bases, deltas = (
        [part.transpose(0, 1).contiguous().transpose(0, 1) for part in parts] for parts in (bases, deltas)
    )
    rotary = [part.t().contiguous().t() for part in rotary]
    results = norm_and_rotate(bases, deltas, layers.norm_q, layers.norm_k, rotary, TEXT)
    assert all(torch.equal(result, reference) for result, reference in zip(results, expected, strict=True))


def test_it_is_left_out_where_it_cannot_compute(monkeypatch):
    frozen, trained = nn.LayerNorm(64).requires_grad_(False), nn.LayerNorm(64)
    monkeypatch.setattr(norm_rope, "triton", object())
    assert can_fuse(frozen, frozen)
    assert not can_fuse(trained, trained)
    assert not can_fuse(nn.LayerNorm(32).requires_grad_(False), frozen)
    assert not can_fuse(None, None)
    monkeypatch.setattr(norm_rope, "triton", None)
    assert not can_fuse(frozen, frozen)
