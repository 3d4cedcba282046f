"""test_lora_inference.py renders what training recorded and what full fine-tuning wrote."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.utils import load_image
from PIL import Image

from cogvideox.config import IMAGE_TO_VIDEO_PIPELINE
from engine.lora import save_lora
from test_lora import trained_transformer
from test_lora_inference import load_pipeline, parse_args, render


@pytest.mark.parametrize("kind", ["5b-i2v", "1.5-5b-i2v"])
@torch.no_grad()
def test_recorded_choices_of_training_are_applied(tiny, tmp_path, kind):
    """Dropped learned positions make another size work; raw image latents reach the transformer unscaled."""

    first = kind == "5b-i2v"
    facts = {"drop_learned_positions": True} if first else {"image_latent_scale": "raw"}
    save_lora(trained_transformer(tiny(kind)), tmp_path, IMAGE_TO_VIDEO_PIPELINE, facts)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "first.png")
    flags = ["--prompt", "a red square", "--model_path", str(tiny(kind)), "--image", str(tmp_path / "first.png")]
    flags += ["--num_frames", "9", "--height", "64", "--width", "64", "--num_inference_steps", "1"]
    args = parse_args([*flags, "--lora_path", str(tmp_path)])
    assert render(args).shape == (9, 64, 64, 3)
    if first:
        with pytest.raises(ValueError, match="different resolution"):
            render(parse_args(flags))
        return
    ours, stock = load_pipeline(args), load_pipeline(parse_args(flags))
    image = stock.video_processor.preprocess(load_image(args.image), 64, 64)
    scaled, raw = (
        pipe.prepare_latents(
            image, 1, 16, 9, 64, 64, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0)
        )[1]
        for pipe in (stock, ours)
    )
    torch.testing.assert_close(raw, scaled * stock.vae.config.scaling_factor)


def test_a_fine_tuned_transformer_is_used(tiny, tmp_path):
    transformer = CogVideoXTransformer3DModel.from_pretrained(tiny("2b"), subfolder="transformer", dtype=torch.float32)
    for param in transformer.parameters():
        param.data *= 1.1
    transformer.save_pretrained(tmp_path / "transformer")
    flags = ["--prompt", "a dog", "--model_path", str(tiny("2b")), "--num_frames", "9", "--height", "32"]
    flags += ["--width", "48", "--num_inference_steps", "1"]
    tuned = render(parse_args([*flags, "--transformer_path", str(tmp_path)]))
    assert np.abs(tuned - render(parse_args(flags))).max() > 1e-3


def test_a_pretrained_model_draws_its_caption_and_a_lora_of_weight_0_leaves_it(tmp_path):
    """With a model that draws: what comes out is what the caption says, to the pixel with and without an idle LoRA."""
    import judge
    import world
    from cogvideox.config import TEXT_TO_VIDEO_PIPELINE
    from test_tiny_model import SHIPPED

    content = world.test_contents(1)[0]
    save_lora(trained_transformer(SHIPPED), tmp_path, TEXT_TO_VIDEO_PIPELINE)
    flags = ["--prompt", world.caption(content), "--model_path", str(SHIPPED), "--guidance_scale", "3"]
    flags += ["--num_frames", "9", "--height", "64", "--width", "64", "--num_inference_steps", "10"]
    drawn = render(parse_args(flags))
    [verdict] = judge.judge(torch.from_numpy(drawn).permute(0, 3, 1, 2)[None])
    assert verdict == world.words_of(content)
    flags += ["--lora_path", str(tmp_path)]
    assert np.array_equal(render(parse_args([*flags, "--lora_weight", "0"])), drawn)
    assert np.abs(render(parse_args(flags)) - drawn).mean() > 1e-3
