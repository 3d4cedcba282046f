"""Adapters on q, k, v and the output in few products train what peft's own path trains."""

import functools

import pytest
import torch

from attention.kernels import make_attend
from attention.processor import JointAttention, project_each
from cogvideox.loading import load_transformer
from engine import lora
from engine.lora import add_lora, project, project_apart
from memory.quantization import frozen_linears
from test_memory import KINDS, make_inputs


def loss_and_grads(transformer, processor, inputs):
    for block in transformer.transformer_blocks:
        block.attn1.processor = processor
    transformer.zero_grad()
    loss = transformer(**inputs, return_dict=False)[0].square().mean()
    loss.backward()
    return loss.item(), {name: param.grad for name, param in transformer.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ("to_q", "to_v")}])
def test_adapters_in_few_products_train_what_pefts_path_trains(kind, flags, tiny, monkeypatch):
    """In fp64: B times the scale is rounded to fp32, the rest differs by 1e-15. What is not plain goes peft's path."""
    transformer = load_transformer(tiny(kind), torch.float64)
    params = add_lora(transformer, 4, 10, 0, **flags)  # alpha is not the rank
    torch.manual_seed(1)
    for param in params:
        param.data += 0.05 * torch.randn_like(param)
    inputs = make_inputs(transformer, dtype=torch.float64)
    apart, calls = [], []
    monkeypatch.setattr(lora, "project_apart", lambda *args: calls.append(1) or project_apart(*args))
    for project_with in (project_each, functools.partial(project, linears=frozen_linears)):
        apart.append(loss_and_grads(transformer, JointAttention(make_attend("sdpa"), project_with), inputs))
    (loss, grads), (reference, reference_grads) = apart[1], apart[0]
    num_blocks = len(transformer.transformer_blocks)
    plain = not flags.get("use_dora") and "target_modules" not in flags
    assert len(calls) == (2 * num_blocks if plain else 0)
    assert loss == (pytest.approx(reference, rel=1e-8) if plain else reference)
    assert grads.keys() == reference_grads.keys() and len(grads) == len(params)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, reference_grads[name], rtol=2e-6, atol=1e-9)  # gradients are fp32
        assert grad.abs().max() > 0
