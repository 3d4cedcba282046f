"""A saved LoRA, loaded with plain diffusers calls, is the trained model."""

import hashlib
import os
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from base.errors import UsageError
from cogvideox.config import TEXT_TO_VIDEO_PIPELINE
from cogvideox.loading import load_transformer
from engine.lora import ADAPTER, add_lora, check_saved_lora, load_lora, lora_layers, save_lora
from engine.lora_file import WEIGHTS_NAME, write_tensors


def trained_transformer(model_dir, rank=4, alpha=4.0, seed=0, dtype=torch.float32):
    """A transformer whose adapter does something: B is no longer zero."""
    transformer = load_transformer(model_dir, dtype)
    params = add_lora(transformer, rank, alpha, seed)
    generator = torch.Generator().manual_seed(1)
    for param in params:
        param.data += torch.randn(param.shape, generator=generator) * 0.05
    return transformer.eval()


def example_inputs(transformer, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    config = transformer.config
    return {
        "hidden_states": torch.randn(1, 2, config.in_channels, 8, 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, 226, config.text_embed_dim, generator=generator).to(dtype),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """A LoRA may have gigabytes, and B is not written as it is trained."""
    made = []

    def tensor_of(name):
        assert all(earlier() is None for earlier in made), name
        tensor = torch.full((4, 3), float(name))
        made.append(weakref.ref(tensor))
        return tensor

    path = tmp_path / WEIGHTS_NAME
    write_tensors(path, {str(n): (torch.float32, (4, 3)) for n in range(5)}, tensor_of, {"format": "pt"})
    assert {name: tensor.unique().item() for name, tensor in load_file(path).items()} == {str(n): n for n in range(5)}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_others_may_read_the_file_as_any_other(mask, mode, tiny, tmp_path):
    tmp_path.chmod(0o777)
    before = os.umask(mask)
    try:
        path = save_lora(trained_transformer(tiny("2b"), 4, 4), tmp_path, TEXT_TO_VIDEO_PIPELINE)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode and os.listdir(tmp_path) == [path.name]


@torch.no_grad()
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 1), (8, 32), (2, 64)])
def test_a_plain_load_gives_the_trained_model_exactly(tiny, tmp_path, rank, alpha):
    transformer = trained_transformer(tiny("2b"), rank, alpha)
    inputs = example_inputs(transformer)
    trained = transformer(**inputs)[0]
    save_lora(transformer, tmp_path, TEXT_TO_VIDEO_PIPELINE)
    check_saved_lora(transformer, tmp_path)

    pipe = TEXT_TO_VIDEO_PIPELINE.from_pretrained(tiny("2b"), dtype=torch.float32)
    base = pipe.transformer(**inputs)[0]
    pipe.load_lora_weights(tmp_path)
    assert (pipe.transformer(**inputs)[0] - trained).abs().max() == 0
    assert (base - trained).abs().max() > 1e-3


@torch.no_grad()
def test_the_adapter_leaves_a_fresh_model_unchanged(tiny):
    transformer = load_transformer(tiny("5b"), torch.float32).eval()
    inputs = example_inputs(transformer)
    before = transformer(**inputs)[0]
    params = add_lora(transformer, 4, 4, seed=0)
    assert torch.equal(transformer(**inputs)[0], before)
    assert len(params) == 2 * 4 * 2  # blocks x (q, k, v, out) x (A, B)


@pytest.mark.parametrize(("use_rslora", "strength"), [(False, 8 / 16), (True, 8 / 4)])
def test_the_strength_is_alpha_over_rank_or_its_root(use_rslora, strength, tiny):
    transformer = load_transformer(tiny("5b"), torch.float32)
    add_lora(transformer, 16, 8, seed=0, use_rslora=use_rslora)
    assert {layer.scaling[ADAPTER] for layer in lora_layers(transformer).values()} == {strength}


def test_adapters_are_fp32_and_compute_in_the_models_dtype(tiny):
    transformer = trained_transformer(tiny("5b"), dtype=torch.bfloat16)
    trainable = [param for param in transformer.parameters() if param.requires_grad]
    assert {param.dtype for param in trainable} == {torch.float32}
    output = transformer(**example_inputs(transformer, torch.bfloat16))[0]
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert {param.grad.dtype for param in trainable} == {torch.float32}


@torch.no_grad()
def test_a_bf16_pipeline_with_the_lora_equals_bf16_training(tiny, tmp_path):
    transformer = trained_transformer(tiny("5b"), dtype=torch.bfloat16)
    inputs = example_inputs(transformer, torch.bfloat16)
    save_lora(transformer, tmp_path, TEXT_TO_VIDEO_PIPELINE)
    pipe = TEXT_TO_VIDEO_PIPELINE.from_pretrained(tiny("5b"), dtype=torch.bfloat16)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(pipe.transformer(**inputs)[0], transformer(**inputs)[0])


def test_init_follows_the_seed_alone(tiny):
    torch.manual_seed(1)
    first = add_lora(load_transformer(tiny("5b"), torch.float32), 4, 4, seed=3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = add_lora(load_transformer(tiny("5b"), torch.float32), 4, 4, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = add_lora(load_transformer(tiny("5b"), torch.float32), 4, 4, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


SAVE = """
import sys, torch
sys.path[:0] = ["training", "tests"]
from test_lora import trained_transformer, TEXT_TO_VIDEO_PIPELINE, save_lora
save_lora(trained_transformer(sys.argv[1]), sys.argv[2], TEXT_TO_VIDEO_PIPELINE)
"""


def test_equal_runs_write_equal_bytes(tiny, tmp_path, request):
    """Also in a process that hashes strings differently: sets of target modules then come in another order."""
    subprocess.run(
        [sys.executable, "-c", SAVE, str(tiny("2b")), str(tmp_path / "other")],
        check=True, cwd=request.config.rootpath, env={"PYTHONHASHSEED": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    save_lora(trained_transformer(tiny("2b")), tmp_path / "here", TEXT_TO_VIDEO_PIPELINE)
    digests = {hashlib.sha256((tmp_path / out / WEIGHTS_NAME).read_bytes()).hexdigest() for out in ("here", "other")}
    assert len(digests) == 1


def test_load_is_exact_and_strict(tiny, tmp_path):
    trained = trained_transformer(tiny("2b"))
    path = save_lora(trained, tmp_path, TEXT_TO_VIDEO_PIPELINE)
    fresh = load_transformer(tiny("2b"), torch.float32)
    add_lora(fresh, 4, 4, seed=9)
    load_lora(fresh, tmp_path)
    for (name, ours), theirs in zip(fresh.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert {param.dtype for param in fresh.parameters() if param.requires_grad} == {torch.float32}

    tensors = load_file(path)
    removed = tensors.popitem()[0]
    save_file(tensors, path)
    with pytest.raises(UsageError, match=removed.removeprefix("transformer.")):
        load_lora(fresh, tmp_path)
    other_rank = load_transformer(tiny("2b"), torch.float32)
    add_lora(other_rank, 8, 4, seed=0)
    save_lora(trained, tmp_path, TEXT_TO_VIDEO_PIPELINE)
    with pytest.raises(UsageError, match="does not fit"):
        load_lora(other_rank, tmp_path)


def test_the_check_finds_a_wrong_file_and_leaves_the_adapter_alone(tiny, tmp_path):
    transformer = trained_transformer(tiny("2b"))
    path = save_lora(transformer, tmp_path, TEXT_TO_VIDEO_PIPELINE)
    check_saved_lora(transformer, tmp_path)
    assert list(transformer.peft_config) == [ADAPTER]
    assert sum(param.requires_grad for param in transformer.parameters()) == 2 * 4 * 2
    next(param for param in transformer.parameters() if param.requires_grad).data[0, 0] += 1e-6
    with pytest.raises(RuntimeError, match="differs after saving"):
        check_saved_lora(transformer, tmp_path)
    path.unlink()
