"""What is trained is what diffusers renders: a script teaches a tiny model one latent video, a stock pipeline gives it back.

Full fine-tuning first, then a LoRA on its result for a second video. Every convention between the data and the loss
(scaling, padding, positions, schedule, target) must agree with the pipeline's for the sample to come out; the slow tests
break them one by one. Error: ||sample - target|| / ||target|| of scaled latents [F, C, H, W]; unrelated videos have 1.4.
"""

import importlib
import json
from typing import NamedTuple

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.pipelines.cogvideo import pipeline_cogvideox_image2video
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from args import parse_training_args
from cogvideox import inputs, models
from cogvideox.config import VaeConfig
from cogvideox.inputs import rotary_grid
from engine import objective
from tiny_pipeline import is_image_to_video, tiny_sizes, write_pipeline


PROMPT = "a red circle moves"
FRAMES, HEIGHT, WIDTH = 9, 32, 48  # pixels; 3x4x6 latents, which 1.5 pads to 4
LATENT_SIZE = (3, HEIGHT // 8, WIDTH // 8)
TEXT_LENGTH = 16  # tokens, of 226: a third of the time
CERTAIN = -30.0  # log-variance of a posterior that is its mean


class Recipe(NamedTuple):
    """How a kind learns in seconds."""

    sft_steps: int
    sft_lr: float
    sft_batch: int
    lora_steps: int


# A LoRA reaches positions through attention alone: easy with RoPE, slow for 2b, whose positions are in the hidden states
RECIPES = {
    "2b": Recipe(450, 2e-3, 8, 450),
    "5b": Recipe(350, 3e-3, 8, 200),
    "5b-i2v": Recipe(350, 3e-3, 8, 250),
    "1.5-5b": Recipe(300, 6e-3, 16, 300),
    "1.5-5b-i2v": Recipe(350, 6e-3, 16, 300),
}
RANK, ALPHA = 64, 512  # a result that is 8 times too small without alpha


# ---------------------------------------------------------------- model and data


def write_model(folder, kind):
    """A tiny pipeline of short prompts. 2b and 5b are trained at another size than their base, 64x96."""
    sizes = tiny_sizes(kind)
    sizes["transformer"]["max_text_seq_length"] = TEXT_LENGTH
    if kind == "2b":
        sizes["transformer"] |= {"num_attention_heads": 2, "attention_head_dim": 64}  # attention can be twice as sharp
    if kind == "5b-i2v":
        sizes["transformer"] |= {"sample_height": HEIGHT // 8, "sample_width": WIDTH // 8}
    write_pipeline(folder, kind, sizes)
    return folder


def random_video(seed, num_frames=LATENT_SIZE[0]):
    """Smooth scaled latents [F, C, H, W] of unit deviation; every frame differs from the others."""
    corners = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(seed))
    video = F.interpolate(corners, size=(num_frames, *LATENT_SIZE[1:]), mode="trilinear", align_corners=True)[0]
    return (video / video.std()).transpose(0, 1)


def load_pipeline(model_dir, kind):
    pipeline_class = CogVideoXImageToVideoPipeline if is_image_to_video(kind) else CogVideoXPipeline
    pipe = pipeline_class.from_pretrained(model_dir, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_prepared(root, pipe, videos, num_rows):
    """A folder as prepare_dataset.py writes it, of scaled latent `videos`, listed in turn until there are `num_rows`."""
    prompt_embeds = pipe.encode_prompt(PROMPT, False, max_sequence_length=TEXT_LENGTH)[0][0]
    for name in ("video_latents", "prompt_embeds", "image_latents"):
        (root / name).mkdir(parents=True)
    save_file({"prompt_embeds": prompt_embeds.contiguous()}, root / "prompt_embeds/clip.safetensors")
    for number, video in enumerate(videos):
        mean = (video / pipe.vae.config.scaling_factor).transpose(0, 1)
        moments = torch.cat([mean, torch.full_like(mean, CERTAIN)])  # [2C, F, H, W]
        save_file({"moments": moments.contiguous()}, root / f"video_latents/{number}.safetensors")
        variants = moments[None, :, :1].repeat(2, 1, 1, 1, 1)  # [K, 2C, 1, H, W]
        save_file({"moments": variants}, root / f"image_latents/{number}.safetensors")
    rows = [manifest_row(row % len(videos), (len(videos[0]) - 1) * 4 + 1) for row in range(num_rows)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def manifest_row(number, num_frames):
    return {
        "prompt": PROMPT,
        "prompt_embed": "prompt_embeds/clip.safetensors",
        "video": f"{number}.mp4",
        "video_latent": f"video_latents/{number}.safetensors",
        "image_latent": f"image_latents/{number}.safetensors",
        "metadata": {"num_frames": num_frames, "height": HEIGHT, "width": WIDTH},
    }


# ---------------------------------------------------------------- train and render


def script_of(kind, method):
    """(module, key of its flags) of the script that trains `kind`."""
    task = "image_to_video" if is_image_to_video(kind) else "text_to_video"
    return importlib.import_module(f"cogvideox_{task}_{method}"), f"{task[0]}2v_{method}"


def train(kind, method, model_dir, data, out, *flags):
    """Run a training script in this process, in fp32 unless `flags` say otherwise."""
    module, key = script_of(kind, method)
    argv = ["--pretrained_model_name_or_path", model_dir, "--data_root", data, "--output_dir", out, "--load_tensors"]
    argv += ["--mixed_precision", "no", "--optimizer", "adamw", "--seed", "0", "--checkpointing_steps", 100000]
    if is_image_to_video(kind):
        argv += ["--noised_image_dropout", 0]
    module.main(parse_training_args(key, list(map(str, [*argv, *flags]))))
    return out


def learning_flags(steps, lr, batch):
    return [
        "--max_train_steps", steps, "--learning_rate", lr, "--train_batch_size", batch, "--stratified_timesteps",
        "--lr_scheduler", "cosine", "--lr_warmup_steps", 25,
    ]  # fmt: skip


def train_sft(kind, model_dir, data, out, *flags):
    recipe = RECIPES[kind]
    learning = learning_flags(recipe.sft_steps, recipe.sft_lr, recipe.sft_batch)
    return train(kind, "sft", model_dir, data, out, *learning, "--save_dtype", "fp32", *flags)


def with_transformer(pipe, out):
    pipe.transformer = CogVideoXTransformer3DModel.from_pretrained(out, subfolder="transformer", dtype=torch.float32)
    return pipe


def render(monkeypatch, pipe, video):
    """Scaled latents [F, C, H, W] that the stock pipeline makes; an image-to-video one gets the first frame of `video`.

    The frame's latent is handed over where the pipeline takes it from the VAE, before it is scaled.
    """
    more = {}
    if isinstance(pipe, CogVideoXImageToVideoPipeline):
        first = video[None, :1].transpose(1, 2) / pipe.vae.config.scaling_factor  # [1, C, 1, H, W]
        monkeypatch.setattr(pipeline_cogvideox_image2video, "retrieve_latents", lambda output, generator: first)
        more["image"] = Image.new("RGB", (WIDTH, HEIGHT))
    latents = pipe(
        prompt=PROMPT, num_frames=(len(video) - 1) * 4 + 1, height=HEIGHT, width=WIDTH, num_inference_steps=30,
        guidance_scale=1.0, max_sequence_length=TEXT_LENGTH, generator=torch.Generator().manual_seed(7),
        output_type="latent", **more,
    ).frames[0]  # fmt: skip
    return latents[len(latents) - len(video) :]  # 1.5: without the padding in front, as before decoding


def error(latents, video):
    return float((latents - video).norm() / video.norm())


# ---------------------------------------------------------------- the loop


# The two that differ most stand for the five in `make test`; what each kind computes is in test_parity.py there
QUICK = ("2b",)
ALL_KINDS = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in RECIPES]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_what_is_trained_is_what_the_pipeline_renders(monkeypatch, tmp_path, record_property, kind):
    model_dir, first, second = write_model(tmp_path / "model", kind), random_video(1), random_video(2)
    pipe, recipe = load_pipeline(model_dir, kind), RECIPES[kind]
    data = write_prepared(tmp_path / "first", pipe, [first], recipe.sft_batch)
    sft = train_sft(kind, model_dir, data, tmp_path / "sft")
    with_transformer(pipe, sft)
    learned = error(render(monkeypatch, pipe, first), first)
    before = error(render(monkeypatch, pipe, second), second)

    base = tmp_path / "base"
    base.mkdir()
    for part in model_dir.iterdir():
        (base / part.name).symlink_to(sft / "transformer" if part.name == "transformer" else part)
    data = write_prepared(tmp_path / "second", pipe, [second], 8)
    learning = learning_flags(recipe.lora_steps, 2.5e-3, 8)
    lora = train(kind, "lora", base, data, tmp_path / "lora", *learning, "--rank", RANK, "--lora_alpha", ALPHA)
    pipe.load_lora_weights(lora)
    after = error(render(monkeypatch, pipe, second), second)

    record_property("errors", {"sft": learned, "before": before, "lora": after})
    print(f"\n{kind}: SFT {learned:.4f}; second video: {before:.3f} before, {after:.3f} with the LoRA")
    assert learned < 0.1
    assert before > 1
    assert after < 0.35


# ---------------------------------------------------------------- conventions broken on purpose


def do_not_scale(monkeypatch):
    sample_latents = inputs.sample_latents
    monkeypatch.setattr(inputs, "sample_latents", lambda *given: sample_latents(*given[:2], VaeConfig(1.0, False)))


def divide_by_the_scale(monkeypatch):
    """What invert_scale_latents seems to ask for; it concerns image latents alone."""
    sample_latents = inputs.sample_latents

    def inverted(moments, noise, vae_config):
        return sample_latents(moments, noise, VaeConfig(1 / vae_config.scaling_factor, False))

    monkeypatch.setattr(inputs, "sample_latents", inverted)


def pad_at_the_end(monkeypatch):
    pad_frames = inputs.pad_frames
    monkeypatch.setattr(inputs, "pad_frames", lambda latents, size: pad_frames(latents.flip(1), size).flip(1))


def image_in_the_last_frame(monkeypatch):
    condition = inputs.condition_on_first_frame
    monkeypatch.setattr(
        inputs, "condition_on_first_frame", lambda latents, image: condition(latents.flip(1), image).flip(1)
    )


def no_positions(monkeypatch):
    monkeypatch.setattr(inputs, "rotary_embeddings", lambda config, latents: None)


def positions_of_the_other_version(monkeypatch):
    """1.0 with a slice of the base grid, 1.5 with the base grid stretched."""

    def other(config, latents):
        num_frames, _, height, width = latents.shape[1:]
        grid, base = (height // 2, width // 2), (config.sample_height // 2, config.sample_width // 2)
        patch_size_t = 1 if config.patch_size_t is None else None
        num_frames //= config.patch_size_t or 1
        return rotary_grid(config.attention_head_dim, patch_size_t, num_frames, grid, base, latents.device)

    monkeypatch.setattr(inputs, "rotary_embeddings", other)


def schedule_of_2b(monkeypatch):
    load_scheduler = models.load_scheduler

    def shifted(model_dir):
        return CogVideoXDPMScheduler.from_config(load_scheduler(model_dir).config, snr_shift_scale=3.0)

    monkeypatch.setattr(models, "load_scheduler", shifted)


def counted_backwards(monkeypatch):
    """Timesteps that run from noise to video, as flow matching counts them."""
    load_scheduler = models.load_scheduler

    def reversed_schedule(model_dir):
        scheduler = load_scheduler(model_dir)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.flip(0)
        return scheduler

    monkeypatch.setattr(models, "load_scheduler", reversed_schedule)


def predict_x0(monkeypatch):
    def loss(prediction, latents, noise, timesteps, alphas_cumprod):
        return (prediction - latents).square().flatten(1).mean(1)

    monkeypatch.setattr(objective, "v_prediction_loss", loss)


def predict_noise(monkeypatch):
    def loss(prediction, latents, noise, timesteps, alphas_cumprod):
        return (prediction - noise).square().flatten(1).mean(1)

    monkeypatch.setattr(objective, "v_prediction_loss", loss)


# Error that the break makes at least; measured: 0.45, 1.08, 0.62, 1.03, 1.10, 0.53, 0.93, 2.99, 0.39, 0.17, 0.98
# (whole: 0.07).
# A model of one video finds it at any noise level: under another schedule only the noise is taken off wrongly, by
# a - s a'/s' of it (a^2 + s^2 = 1, a' and s' of training), which for the shift of 2b is 0.2 at most.
BROKEN = [
    ("5b", do_not_scale, 0.3),
    ("1.5-5b", divide_by_the_scale, 0.3),
    ("1.5-5b", pad_at_the_end, 0.3),
    ("1.5-5b-i2v", image_in_the_last_frame, 0.3),
    ("5b", no_positions, 0.3),
    ("5b", positions_of_the_other_version, 0.3),
    ("1.5-5b", positions_of_the_other_version, 0.3),
    ("5b", predict_x0, 0.3),
    ("5b", predict_noise, 0.3),
    ("5b", schedule_of_2b, 0.12),
    ("5b", counted_backwards, 0.3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "break_it", "at_least"), BROKEN)
def test_a_broken_convention_shows(monkeypatch, tmp_path, kind, break_it, at_least):
    model_dir, video = write_model(tmp_path / "model", kind), random_video(1)
    pipe = load_pipeline(model_dir, kind)
    data = write_prepared(tmp_path / "data", pipe, [video], RECIPES[kind].sft_batch)
    with monkeypatch.context() as broken:
        break_it(broken)
        train_sft(kind, model_dir, data, tmp_path / "out")
    found = error(render(monkeypatch, with_transformer(pipe, tmp_path / "out"), video), video)
    print(f"\n{kind}, {break_it.__name__}: {found:.3f}")
    assert found > at_least


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "lower", "upper"), [("pipeline", 0, 0.2), ("raw", 0.3, 1)])
def test_the_scale_of_image_latents_shows(monkeypatch, tmp_path, scale, lower, upper):
    """A model of one video hardly looks at its image (raw: 0.28). One of many stills copies it: 0.13, raw 0.48."""
    kind, stills = "1.5-5b-i2v", [random_video(100 + number, num_frames=1) for number in range(256)]
    model_dir = write_model(tmp_path / "model", kind)
    pipe, unseen = load_pipeline(model_dir, kind), random_video(1, num_frames=1)
    data = write_prepared(tmp_path / "data", pipe, stills, len(stills))
    train_sft(kind, model_dir, data, tmp_path / "out", "--image_latent_scale", scale)
    found = error(render(monkeypatch, with_transformer(pipe, tmp_path / "out"), unseen), unseen)
    print(f"\nstills, {scale}: {found:.3f}")
    assert lower < found < upper
