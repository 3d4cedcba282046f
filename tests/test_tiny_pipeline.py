import csv
import sys

import av
import diffusers
import numpy as np
import pytest
import torch
from make_clips import CLIPS, FPS, make_clips
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5EncoderModel

import tiny_pipeline
from tiny_pipeline import KINDS, make_tiny_pipeline


PROMPT = "A red circle moves from left to right over a dark blue background."
OTHER_PROMPT = "A white square falls from top to bottom over a grey background."


def load_pipeline(folder):
    class_name = diffusers.DiffusionPipeline.load_config(folder)["_class_name"]
    pipeline = getattr(diffusers, class_name).from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def render(pipeline, prompt, **kwargs):
    """A video [F', 3, h, w] of 9 frames of 64x96, the size that every kind takes."""
    if "ImageToVideo" in type(pipeline).__name__:
        kwargs["image"] = Image.new("RGB", (96, 64), (200, 40, 40))
    generator = torch.Generator().manual_seed(0)
    size = {"num_frames": 9, "height": 64, "width": 96, "num_inference_steps": 2}
    return pipeline(prompt=prompt, generator=generator, output_type="pt", **size, **kwargs).frames[0]


@pytest.mark.parametrize("kind", KINDS)
def test_stock_pipeline_renders_what_the_prompt_changes(tiny, kind):
    pipeline = load_pipeline(tiny(kind))
    assert ("ImageToVideo" in type(pipeline).__name__) == kind.endswith("i2v")
    video, other = render(pipeline, PROMPT), render(pipeline, OTHER_PROMPT)
    assert video.shape == (9, 3, 64, 96)
    assert video.isfinite().all()
    assert 0.05 < video.std() < 0.45  # neither one flat colour nor black and white only
    assert (video - other).abs().mean() > 1e-3


def test_1_0_pipelines_need_no_size(tiny):
    frames = load_pipeline(tiny("5b"))(PROMPT, num_inference_steps=1, output_type="np").frames
    assert frames.shape == (1, 9, 64, 96, 3)


def test_off_default_sizes_render(tiny):
    pipeline = load_pipeline(tiny("1.5-5b"))
    video = pipeline(PROMPT, num_frames=17, height=64, width=64, num_inference_steps=1, output_type="pt").frames
    assert video.shape == (1, 17, 3, 64, 64)
    assert video.isfinite().all()


def test_prompts_give_different_ids_and_embeddings(tiny):
    folder = tiny("5b")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer([PROMPT, OTHER_PROMPT], padding="max_length", max_length=226, return_tensors="pt").input_ids
    assert ids.shape == (2, 226)
    assert (ids[0] != ids[1]).any()
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    assert ids.max() < encoder.config.vocab_size
    with torch.no_grad():
        embeds = encoder(ids)[0]
    assert embeds.isfinite().all()
    assert 0.1 < embeds.std() < 10
    assert (embeds[0] - embeds[1])[:20].std() > 0.1


def test_ordinary_english_has_no_unknown_token(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("2b") / "tokenizer")
    text = """Zoë's "quick" fox (aged 3) jumps: WHAT a view @ 24 fps & 100% sharp!"""
    unknown = [piece for piece in tokenizer.tokenize(text) if tokenizer.convert_tokens_to_ids(piece) == 2]
    assert unknown == ["ë"]


def test_kinds_differ_as_the_released_checkpoints_do(tiny):
    expected = {
        # kind: rope, learned, in_channels, patch_size_t, ofs, scaling factor, invert, snr shift
        "2b": (False, False, 16, None, False, 1.15258426, False, 3.0),
        "5b": (True, False, 16, None, False, 0.7, False, 1.0),
        "5b-i2v": (True, True, 32, None, False, 0.7, False, 1.0),
        "1.5-5b": (True, False, 16, 2, False, 0.7, True, 1.0),
        "1.5-5b-i2v": (True, False, 32, 2, True, 0.7, True, 1.0),
    }
    for kind, values in expected.items():
        pipeline = load_pipeline(tiny(kind))
        config, vae = pipeline.transformer.config, pipeline.vae.config
        assert values == (
            config.use_rotary_positional_embeddings,
            config.use_learned_positional_embeddings,
            config.in_channels,
            config.patch_size_t,
            config.ofs_embed_dim is not None,
            vae.scaling_factor,
            vae.invert_scale_latents,
            pipeline.scheduler.config.snr_shift_scale,
        ), kind
        assert config.patch_bias == (not kind.startswith("1.5"))
        assert (pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal) == (8, 4)
        assert vae.latent_channels == 16
        assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_learned_positions_are_loaded_not_sincos(tiny):
    transformer = load_pipeline(tiny("5b-i2v")).transformer
    patch_embed = transformer.patch_embed
    sincos = patch_embed._get_positional_embeddings(8, 12, 9)
    assert patch_embed.pos_embedding.abs().max() < 0.2 < (sincos - patch_embed.pos_embedding).abs().max()


@pytest.mark.parametrize("kind", ["2b", "1.5-5b-i2v"])
def test_all_weights_are_stored_in_the_checkpoint_dtype(tiny, kind):
    files = sorted(tiny(kind).rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"transformer", "vae", "text_encoder"}
    dtypes = {tensor.dtype for file in files for tensor in load_file(file).values()}
    assert dtypes == {torch.float16 if kind == "2b" else torch.bfloat16}


def folder_bytes(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_same_seed_same_bytes(tiny, tmp_path, monkeypatch):
    torch.manual_seed(123)  # neither read nor changed
    state = torch.get_rng_state()
    monkeypatch.setattr(sys, "argv", ["tiny_pipeline.py", str(tmp_path / "again"), "--kind", "5b"])
    tiny_pipeline.main()
    make_tiny_pipeline(tmp_path / "other", "5b", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert folder_bytes(tmp_path / "again") == folder_bytes(tiny("5b"))
    assert folder_bytes(tmp_path / "other") != folder_bytes(tiny("5b"))


def decode_frames(path):
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return rate, np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_sample_data_is_what_its_script_says(sample_data, tmp_path):
    videos = (sample_data / "videos.txt").read_text().splitlines()
    prompts = (sample_data / "prompts.txt").read_text().splitlines()
    with open(sample_data / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["video"], row["caption"]) for row in rows] == list(zip(videos, prompts, strict=True))
    assert prompts == [clip["caption"] for clip in CLIPS]
    assert sum(file.stat().st_size for file in sample_data.rglob("*.mp4")) < 300 * 1024

    make_clips(tmp_path)
    for video, clip in zip(videos, CLIPS, strict=True):
        rate, frames = decode_frames(sample_data / video)
        assert (rate, frames.shape) == (FPS, (*clip["size"], 3))
        assert np.abs(frames[-1].astype(int) - frames[0]).mean() > 5  # something moves
        _, redrawn = decode_frames(tmp_path / video)
        assert np.abs(redrawn.astype(int) - frames).mean() < 2  # another encoder may round otherwise


def test_write_clip(write_clip, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", num_frames=11, height=48, width=80, fps=12, seed=3)
    rate, frames = decode_frames(path)
    assert (rate, frames.shape) == (12, (11, 48, 80, 3))
    assert all(np.abs(a.astype(int) - b).max() > 20 for a, b in zip(frames, frames[1:], strict=False))
