"""What the training scripts feed the transformer is what the stock diffusers pipelines feed it, for every checkpoint.

A script trains one step on real clips while its transformer's inputs are recorded; the pipeline then gets the same
prompts, first frames and initial noise. At the last timestep abar is 0, so that training's noisy latents are the noise
that the pipeline starts from: everything can be compared bit for bit, in fp32.
"""

import importlib

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from diffusers.pipelines.cogvideo import pipeline_cogvideox_image2video
from PIL import Image

from args import parse_training_args
from cogvideox import encoding, loading
from data.decode import read_frames
from engine import objective


PROMPTS = ["A red square moves right.", "a green circle grows, slowly"]
KINDS = ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
SIZES = {"base": (9, 64, 96), "square": (9, 64, 64), "longer": (17, 96, 64)}  # frames, height, width
FPS = 8


class Recorder:
    """Keeps the keyword arguments of a transformer's first call."""

    def __init__(self):
        self.inputs = None

    def wrap(self, transformer):
        forward = transformer.forward

        def recording(*args, **kwargs):
            if self.inputs is None:
                self.inputs = kwargs
            return forward(*args, **kwargs)

        transformer.forward = recording
        return transformer


@pytest.fixture
def clips(tmp_path, write_clip):
    def make(num_clips, frames, height, width):
        root = tmp_path / "clips"
        root.mkdir()
        names = [f"{i}.mp4" for i in range(num_clips)]
        for i, name in enumerate(names):
            write_clip(root / name, num_frames=frames, height=height, width=width, fps=FPS, seed=i)
        (root / "videos.txt").write_text("".join(f"{name}\n" for name in names))
        (root / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS[:num_clips]))
        return root

    return make


def record_training(monkeypatch, script, model_dir, root, out, bucket, num_clips, more=()):
    """(inputs of the transformer in the script's first step, its draws by name)."""
    module = importlib.import_module(f"cogvideox_{script}")
    recorder, draws = Recorder(), {}
    draw_normal, load_transformer = objective.draw_normal, loading.load_transformer

    def keep(seed, name, *given):
        draws[name] = draw_normal(seed, name, *given)
        return draws[name]

    monkeypatch.setattr(objective, "draw_normal", keep)
    monkeypatch.setattr(loading, "load_transformer", lambda *given: recorder.wrap(load_transformer(*given)))
    monkeypatch.setattr(
        objective, "draw_timesteps", lambda seed, sample_ids, *rest: torch.full((len(sample_ids),), 999)
    )
    if "image" in script:  # the noise of training has no counterpart at inference
        monkeypatch.setattr(encoding, "IMAGE_NOISE_MEAN", -torch.inf)
    key = {"text_to_video_lora": "t2v_lora", "text_to_video_sft": "t2v_sft"}.get(
        script, script.replace("image_to_video", "i2v")
    )
    frames, height, width = map(str, bucket)
    flags = ["--pretrained_model_name_or_path", str(model_dir), "--data_root", str(root), "--output_dir", str(out)]
    flags += ["--caption_column", "prompts.txt", "--video_column", "videos.txt", "--fps", str(FPS), "--seed", "0"]
    flags += ["--frame_buckets", frames, "--height_buckets", height, "--width_buckets", width]
    flags += [*(["--noised_image_dropout", "0"] if "image" in script else []), *more]
    module.main(parse_training_args(key, [*flags, "--train_batch_size", str(num_clips), "--max_train_steps", "1"]))
    return recorder.inputs, draws


def record_pipeline(monkeypatch, kind, model_dir, prompts, bucket, noise, first_frames, image_noise, drop_positions):
    """Inputs of the transformer in the stock pipeline's first step, with guidance: [unconditional, conditional]."""
    image_to_video = "i2v" in kind
    pipeline_class = CogVideoXImageToVideoPipeline if image_to_video else CogVideoXPipeline
    pipe = pipeline_class.from_pretrained(model_dir, dtype=torch.float32)
    if drop_positions:
        pipe.transformer = type(pipe.transformer).from_pretrained(
            model_dir, subfolder="transformer", use_learned_positional_embeddings=False, dtype=torch.float32
        )
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder()
    recorder.wrap(pipe.transformer)
    more = {}
    if image_to_video:
        more["image"] = [Image.fromarray(frame) for frame in first_frames]
        latents = iter(image_noise)  # [1, C, H, W] each

        def with_the_noise_of_training(output, generator):
            posterior = output.latent_dist
            return posterior.mean + posterior.std * next(latents).transpose(0, 1)[None]

        monkeypatch.setattr(pipeline_cogvideox_image2video, "retrieve_latents", with_the_noise_of_training)
    frames, height, width = bucket
    pipe(
        prompt=prompts, height=height, width=width, num_frames=frames, num_inference_steps=2, guidance_scale=6.0,
        latents=noise, output_type="latent", **more,
    )  # fmt: skip
    return recorder.inputs


def assert_same_inputs(trained, rendered, order):
    """Bit-equal, row by row, to the conditional half of the pipeline's batch."""
    num = len(order)
    for name in ("hidden_states", "encoder_hidden_states"):
        theirs = rendered[name][num:][order]
        assert trained[name].shape == theirs.shape
        assert torch.equal(trained[name], theirs), (name, (trained[name] - theirs).abs().max())
    assert torch.equal(trained["timestep"], rendered["timestep"][num:])
    ours, theirs = trained["image_rotary_emb"], rendered["image_rotary_emb"]
    assert (ours is None) == (theirs is None)
    assert ours is None or all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    ours, theirs = trained.get("ofs"), rendered.get("ofs")
    assert (ours is None) == (theirs is None)
    assert ours is None or torch.equal(ours, theirs)


def check_parity(monkeypatch, tiny, clips, tmp_path, kind, script, size, num_clips):
    bucket = SIZES[size]
    root = clips(num_clips, *bucket)
    drop = kind == "5b-i2v" and size != "base"
    more = ["--drop_learned_positions"] if drop else []
    trained, draws = record_training(monkeypatch, script, tiny(kind), root, tmp_path / "out", bucket, num_clips, more)

    # Training shuffles: which caption came first shows in the text states, in the pipeline's order they are as written
    first_frames = [read_frames(root / f"{i}.mp4", [0.0])[0] for i in range(num_clips)]
    from cogvideox.encoding import encode_prompts
    from cogvideox.loading import load_text_encoder

    ours = encode_prompts(*load_text_encoder(tiny(kind), torch.float32), PROMPTS[:num_clips])
    order = [
        min(range(num_clips), key=lambda i: (ours[i] - row).abs().max()) for row in trained["encoder_hidden_states"]
    ]
    assert sorted(order) == list(range(num_clips))
    unshuffle = [order.index(i) for i in range(num_clips)]
    image_noise = draws["image_posterior"][unshuffle] if "i2v" in kind else None
    rendered = record_pipeline(
        monkeypatch, kind, tiny(kind), PROMPTS[:num_clips], bucket, draws["noise"][unshuffle], first_frames,
        image_noise, drop,
    )  # fmt: skip
    assert_same_inputs(trained, rendered, order)


SCRIPT_OF = {kind: "image_to_video_lora" if "i2v" in kind else "text_to_video_lora" for kind in KINDS}


@pytest.mark.parametrize(("size", "num_clips"), [("base", 1), ("base", 2), ("square", 2), ("longer", 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_training_feeds_what_the_pipeline_feeds(monkeypatch, tiny, clips, tmp_path, kind, size, num_clips):
    check_parity(monkeypatch, tiny, clips, tmp_path, kind, SCRIPT_OF[kind], size, num_clips)


@pytest.mark.parametrize("kind", ["5b", "1.5-5b-i2v"])
def test_full_fine_tuning_feeds_the_same(monkeypatch, tiny, clips, tmp_path, kind):
    check_parity(monkeypatch, tiny, clips, tmp_path, kind, SCRIPT_OF[kind].replace("lora", "sft"), "base", 2)


def test_a_dropped_caption_is_the_pipelines_negative_prompt(monkeypatch, tiny, clips, tmp_path):
    bucket = SIZES["base"]
    root = clips(1, *bucket)
    more = ["--text_dropout", "1.0"]
    trained, draws = record_training(
        monkeypatch, "text_to_video_lora", tiny("5b"), root, tmp_path / "out", bucket, 1, more
    )
    rendered = record_pipeline(
        monkeypatch, "5b", tiny("5b"), PROMPTS[:1], bucket, draws["noise"], None, None, drop_positions=False
    )
    assert torch.equal(trained["encoder_hidden_states"], rendered["encoder_hidden_states"][:1])
    assert not torch.equal(rendered["encoder_hidden_states"][:1], rendered["encoder_hidden_states"][1:])
