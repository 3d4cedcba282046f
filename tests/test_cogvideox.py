"""What training builds equals what the stock diffusers pipelines build."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from safetensors.torch import load_file, save_file

from base.errors import UsageError
from cogvideox.config import VaeConfig, load_scheduler, load_vae_config, num_parameters, read_config
from cogvideox.encoding import encode_captions, encode_noised_images, encode_prompts, encode_videos
from cogvideox.folder import resolve_model_dir, stored_dtype
from cogvideox.inputs import pad_frames, rotary_embeddings, sample_latents
from cogvideox.loading import load_text_encoder, load_transformer, load_vae


KINDS = ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
CPU = torch.device("cpu")


def load_pipeline(model_dir, kind):
    pipeline_class = CogVideoXImageToVideoPipeline if "i2v" in kind else CogVideoXPipeline
    pipe = pipeline_class.from_pretrained(model_dir, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(3, 32, 32), (3, 8, 12), (5, 10, 6)])  # latent frames, height, width
def test_rotary_embeddings_are_the_pipelines(tiny, kind, size):
    pipe = load_pipeline(tiny(kind), kind)
    frames, height, width = size
    latents = pad_frames(torch.zeros(1, frames, 16, height, width), pipe.transformer.config.patch_size_t)
    ours = rotary_embeddings(pipe.transformer.config, latents)
    if not pipe.transformer.config.use_rotary_positional_embeddings:
        assert ours is None and kind == "2b"
        return
    theirs = pipe._prepare_rotary_positional_embeddings(height * 8, width * 8, latents.shape[1], CPU)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()  # as the pipelines run: with gradients attention takes another kernel
@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_prompt_embeddings_are_the_pipelines(tiny, kind):
    pipe = load_pipeline(tiny(kind), kind)
    prompts = ["a red square moves left", "", "a dog"]
    tokenizer, text_encoder = load_text_encoder(tiny(kind), torch.float32)
    ours = encode_prompts(tokenizer, text_encoder, prompts)
    theirs, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.equal(ours, theirs)
    in_turn = torch.stack(list(encode_captions(tiny(kind), prompts, torch.float32, CPU, 226)))
    torch.testing.assert_close(in_turn, theirs)


def test_moments_decode_back_as_the_pipeline_decodes(tiny):
    """The latents that training sees, decoded by the pipeline, are the VAE's reconstruction: the scale is right."""
    pipe = load_pipeline(tiny("2b"), "2b")
    vae_config = load_vae_config(tiny("2b"))
    assert vae_config == VaeConfig(1.15258426, False)
    pixels = torch.rand(2, 9, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = encode_videos(pipe.vae, pixels)
    posterior = pipe.vae.encode(pixels.permute(0, 2, 1, 3, 4)).latent_dist
    assert torch.equal(moments, posterior.parameters) and moments.shape == (2, 32, 3, 4, 6)
    latents = sample_latents(moments, torch.zeros(2, 3, 16, 4, 6), vae_config)
    with torch.no_grad():
        torch.testing.assert_close(pipe.decode_latents(latents), pipe.vae.decode(posterior.mode()).sample)


def test_posterior_noise_is_scaled_by_the_posterior(tiny):
    moments = torch.cat([torch.full((1, 16, 2, 2, 2), 3.0), torch.full((1, 16, 2, 2, 2), 2.0).log() * 2], dim=1)
    latents = sample_latents(moments, torch.ones(1, 2, 16, 2, 2), VaeConfig(0.7, True))
    torch.testing.assert_close(latents, torch.full((1, 2, 16, 2, 2), (3.0 + 2.0) * 0.7))


def test_image_noise_comes_before_the_vae(tiny):
    vae = load_vae(tiny("5b-i2v"), torch.float32)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    noise = torch.randn(1, 3, 32, 32)
    clean = encode_noised_images(vae, image, noise, torch.tensor([-100.0]))
    assert torch.equal(clean, vae.encode(image[:, :, None]).latent_dist.parameters)
    noisy = encode_noised_images(vae, image, noise, torch.tensor([0.0]))
    assert torch.equal(noisy, vae.encode((image + noise)[:, :, None]).latent_dist.parameters)
    assert not torch.equal(noisy, clean)


@pytest.mark.parametrize(("frames", "patch_size_t", "padded"), [(13, None, 13), (13, 2, 14), (14, 2, 14), (1, 2, 2)])
def test_frames_are_padded_in_front(frames, patch_size_t, padded):
    latents = torch.arange(1.0, frames + 1).view(1, frames, 1, 1, 1)
    result = pad_frames(latents, patch_size_t).flatten().tolist()
    assert len(result) == padded
    assert result == [1.0] * (padded - frames) + list(range(1, frames + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_stored_dtype_is_read_from_the_file(tiny, kind):
    assert stored_dtype(tiny(kind)) == (torch.float16 if kind == "2b" else torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_schedule_is_the_checkpoints(tiny, kind):
    scheduler = load_scheduler(tiny(kind))
    theirs = load_pipeline(tiny(kind), kind).scheduler
    assert type(scheduler) is type(theirs)
    assert scheduler.alphas_cumprod.dtype in (torch.float32, torch.float64)
    assert torch.equal(scheduler.alphas_cumprod, theirs.alphas_cumprod)
    assert scheduler.alphas_cumprod[-1] == 0  # zero terminal SNR


def test_number_of_parameters_is_about_right(tiny):
    transformer = load_transformer(tiny("5b"), torch.float32)
    blocks = sum(param.numel() for param in transformer.transformer_blocks.parameters())
    assert num_parameters(transformer.config) == pytest.approx(blocks, rel=0.1)
    real_5b = {"num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 42}
    assert num_parameters(real_5b) == pytest.approx(5.55e9, rel=0.05)


def test_a_folder_that_is_no_model_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="lacks model_index.json, transformer"):
        resolve_model_dir(str(tmp_path), ["transformer"])
    with pytest.raises(UsageError, match="neither a folder nor a model") as error:
        resolve_model_dir("zai-org/CogVideoX-none", ["transformer"])
    assert "\n" not in str(error.value) and "HF_ENDPOINT" in str(error.value) and "folder" in str(error.value)


@pytest.fixture
def copied(tiny, tmp_path):
    return Path(shutil.copytree(tiny("5b"), tmp_path / "model"))


WEIGHTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.mark.parametrize(
    "name", ["vae/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/spiece.model"]
)
def test_a_link_to_nothing_is_found_before_anything_is_loaded(name, copied):
    """As in a hub's cache whose blob has gone."""
    (copied / name).unlink()
    (copied / name).symlink_to("../../blobs/0123")
    with pytest.raises(UsageError, match=Path(name).name):
        resolve_model_dir(str(copied), ["vae", "tokenizer"])


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_cut_file_of_weights_is_found_before_anything_is_loaded(component, share, copied):
    path = copied / component / f"{WEIGHTS[component]}.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(UsageError, match=rf"{path.name}: not readable \(.*download the model again"):
        resolve_model_dir(str(copied), list(WEIGHTS))


def test_a_missing_shard_is_named(copied):
    (copied / "vae/x.safetensors.index.json").write_text('{"weight_map": {"a": "x-1.safetensors"}}')
    with pytest.raises(UsageError, match=r"vae: lacks x-1\.safetensors"):
        resolve_model_dir(str(copied), ["vae"])


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_damaged_config_is_one_line(name, copied):
    (copied / name).write_text("{")
    with pytest.raises(UsageError, match=rf"{name}: not readable"):
        resolve_model_dir(str(copied), ["transformer", "scheduler"])


def test_another_kind_of_model_is_one_line(copied):
    (copied / "transformer/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(UsageError, match="no CogVideoX model, its transformer is FluxTransformer2DModel"):
        read_config(copied, "transformer")


def test_configs_are_read_without_weights(tiny):
    config = read_config(tiny("1.5-5b"), "transformer")
    assert config["patch_size_t"] == 2


@pytest.mark.parametrize(("there", "asked"), [("fp16", None), (None, "fp16"), ("bf16", "fp16")])
def test_weights_of_another_variant_are_told(copied, there, asked):
    path = copied / "transformer/diffusion_pytorch_model.safetensors"
    path.rename(path.with_name(f"diffusion_pytorch_model{f'.{there}' if there else ''}.safetensors"))
    with pytest.raises(UsageError) as error:
        stored_dtype(copied, asked)
    assert f"no weights of --variant {asked or '(none)'}" in str(error.value)
    assert f"it holds those of --variant {there or '(none)'}" in str(error.value)
    assert stored_dtype(copied, there) == torch.bfloat16


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_weights_that_files_lack_are_never_drawn_at_random(part, tiny, tmp_path):
    """The libraries only warn of them."""
    shutil.copytree(tiny("5b"), tmp_path / "model")
    path = next((tmp_path / "model" / part).glob("*.safetensors"))
    tensors = load_file(path)
    lost = max(name for name in tensors if name != "shared.weight")  # T5's, which has another name in the model
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path, {"format": "pt"})
    load = {"text_encoder": load_text_encoder, "vae": load_vae, "transformer": load_transformer}[part]
    with pytest.raises(UsageError, match=f"{part}: lacks {re.escape(lost)}; download the model again"):
        load(tmp_path / "model", torch.float32)
