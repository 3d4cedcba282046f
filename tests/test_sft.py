"""Full fine-tuning: fp32 masters get every gradient, and what is written is what was trained."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cogvideox import load_transformer
from engine import check_sft_fits
from errors import UsageError
from sft import (
    MASTERS_NAME,
    add_masters,
    check_saved_transformer,
    load_masters,
    save_masters,
    save_transformer,
)
from update import copy_weights


CPU = torch.device("cpu")


def small_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8)).to(dtype)


def test_gradients_reach_the_masters_in_fp32_and_leave_the_model():
    model = small_model()
    masters = add_masters(model, CPU)
    inputs = torch.randn(4, 8, dtype=torch.bfloat16)
    model(inputs).float().square().mean().backward()
    assert all(param.grad is None for param in model.parameters())
    assert all(master.grad.dtype == torch.float32 for master in masters)
    reference = small_model()
    reference(inputs).float().square().mean().backward()
    for master, param in zip(masters, reference.parameters(), strict=True):
        assert torch.equal(master.grad, param.grad.float())


def test_small_gradients_are_not_lost_in_accumulation():
    """A bf16 sum of 1 and 300 times 0.001 stays 1; the masters' sum does not."""
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    model = torch.nn.ParameterList([param])
    (master,) = add_masters(model, CPU)
    for weight in [1.0] + [0.001] * 300:
        (param * weight).sum().backward()
    assert torch.allclose(master.grad, torch.full((4,), 1.3), rtol=0.01)


def test_copies_are_the_rounded_masters():
    model = small_model()
    masters = add_masters(model, CPU)
    with torch.no_grad():
        for master in masters:
            master += 1e-3
    copy_weights(masters, list(model.parameters()))
    for master, param in zip(masters, model.parameters(), strict=True):
        assert torch.equal(param, master.bfloat16())


@pytest.fixture
def trained(tiny):
    """(transformer in bf16, masters that are no longer its stored weights)."""
    transformer = load_transformer(tiny("5b"), torch.float32)
    masters = add_masters(transformer, CPU)
    torch.nn.Module.to(transformer, torch.bfloat16)
    with torch.no_grad():
        for master in masters:
            master *= 1.01
    copy_weights(masters, list(transformer.parameters()))
    return transformer, masters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_result_is_the_masters_in_the_dtype_asked_for(trained, tmp_path, dtype):
    transformer, masters = trained
    save_transformer(transformer, masters, dtype, tmp_path, {})
    check_saved_transformer(transformer, masters, dtype, tmp_path)
    loaded = type(transformer).from_pretrained(tmp_path, subfolder="transformer", dtype=dtype)
    for (name, param), master in zip(loaded.named_parameters(), masters, strict=True):
        assert torch.equal(param, master.to(dtype)), name
    # The model in memory is as before
    assert {param.dtype for param in transformer.parameters()} == {torch.bfloat16}
    assert not list(tmp_path.glob(".*"))


def test_a_second_save_replaces_the_first_and_notes_facts(trained, tmp_path):
    transformer, masters = trained
    save_transformer(transformer, masters, torch.bfloat16, tmp_path, {"image_latent_scale": "raw"})
    assert json.loads((tmp_path / "transformer" / "training.json").read_text()) == {"image_latent_scale": "raw"}
    with torch.no_grad():
        masters[0] += 1.0
    with pytest.raises(RuntimeError, match="differs after saving"):
        check_saved_transformer(transformer, masters, torch.bfloat16, tmp_path)
    save_transformer(transformer, masters, torch.bfloat16, tmp_path, {})
    check_saved_transformer(transformer, masters, torch.bfloat16, tmp_path)
    assert not (tmp_path / "transformer" / "training.json").exists()


def test_masters_are_restored_bit_for_bit(trained, tmp_path, tiny):
    transformer, masters = trained
    save_masters(transformer, masters, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / MASTERS_NAME).values()} == {torch.float32}
    fresh = load_transformer(tiny("5b"), torch.float32)
    fresh_masters = add_masters(fresh, CPU)
    torch.nn.Module.to(fresh, torch.bfloat16)
    load_masters(fresh, fresh_masters, tmp_path)
    for ours, theirs in zip(fresh_masters, masters, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(fresh.parameters(), transformer.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    other = small_model()
    with pytest.raises(UsageError, match="other weights"):
        load_masters(other, add_masters(other, CPU), tmp_path)


def test_what_cannot_fit_is_refused_before_it_is_loaded(monkeypatch):
    """A card of 80 GB: 5b in bf16 needs 93 GiB, 2b fits."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 2**30, 80 * 2**30))
    with pytest.raises(UsageError, match="needs 93 GiB .* 79 GiB are free"):
        check_sft_fits(5.57e9, torch.bfloat16, torch.device("cuda"))
    check_sft_fits(1.69e9, torch.bfloat16, torch.device("cuda"))
    check_sft_fits(5.57e9, torch.bfloat16, CPU)
