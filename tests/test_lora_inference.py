#!/usr/bin/env python
"""Render a prompt with a trained LoRA or transformer; as a test, show that the LoRA changes the video.

python tests/test_lora_inference.py --prompt "a red square moves left" --model_path zai-org/CogVideoX-2b \\
    --lora_path cogvideox-lora --lora_name my-lora --output_file output.mp4 --fps 8

An image-to-video model also takes --image. What training recorded in its result (dropped learned positions, raw image
latents) is applied here by itself. On a GPU the pipeline is offloaded to the CPU part by part and the video decoded in
tiles: 5b fits a 24 GB card.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from diffusers.utils import export_to_video, load_image
from safetensors import safe_open


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from cogvideox.pipeline import use_raw_image_latents


LORA_FILE = "pytorch_lora_weights.safetensors"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", required=True, help="what the video shows")
    parser.add_argument("--model_path", required=True, help="the base model: a folder or a hub id")
    parser.add_argument("--image", default=None, help="first frame, for an image-to-video model: a path or a URL")
    parser.add_argument("--lora_path", default=None, help="folder or file of the LoRA; none: the base model alone")
    parser.add_argument("--lora_name", default="lora", help="a name for the adapter")
    parser.add_argument("--lora_weight", type=float, default=1.0, help="strength; 1.0 is what was trained")
    parser.add_argument("--transformer_path", default=None, help="output_dir of a full fine-tuning run")
    parser.add_argument("--output_file", default="output.mp4", help="the video to write")
    parser.add_argument("--fps", type=int, default=8, help="frames per second of the video: 8 (1.0) or 16 (1.5)")
    parser.add_argument("--num_frames", type=int, default=None, help="default: 49 (1.0) or 81 (1.5)")
    parser.add_argument("--height", type=int, default=None, help="pixels; default: 480 (1.0) or 768 (1.5)")
    parser.add_argument("--width", type=int, default=None, help="pixels; default: 720 (1.0) or 1360 (1.5)")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default=None, help="default: bf16, on a CPU fp32")
    args = parser.parse_args(argv)
    for flag in ("lora_path", "transformer_path"):
        if getattr(args, flag) and not Path(getattr(args, flag)).exists():
            parser.error(f"--{flag} {getattr(args, flag)}: no such file or folder")
    return args


def recorded_facts(args) -> dict:
    """What training noted in its result for inference to repeat; {} where a plain load says all."""
    if args.transformer_path:
        facts = Path(args.transformer_path, "transformer", "training.json")
        return json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
    if not args.lora_path:
        return {}
    path = Path(args.lora_path)
    with safe_open(path / LORA_FILE if path.is_dir() else path, framework="pt") as lora:
        return json.loads((lora.metadata() or {}).get("training", "{}"))


def load_pipeline(args) -> DiffusionPipeline:
    """The stock pipeline with the LoRA or transformer, arranged so that it fits a small card."""
    on_gpu, facts = torch.cuda.is_available(), recorded_facts(args)
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes[args.dtype or ("bf16" if on_gpu else "fp32")]
    parts = {}
    if args.transformer_path or facts.get("drop_learned_positions"):
        changes = {"use_learned_positional_embeddings": False} if facts.get("drop_learned_positions") else {}
        parts["transformer"] = CogVideoXTransformer3DModel.from_pretrained(
            args.transformer_path or args.model_path, subfolder="transformer", dtype=dtype, **changes
        )
    pipe = DiffusionPipeline.from_pretrained(args.model_path, dtype=dtype, **parts)
    if args.lora_path:
        adapter = re.sub(r"\W", "_", args.lora_name) or "lora"  # peft takes it for the name of a module: without dots
        pipe.load_lora_weights(args.lora_path, adapter_name=adapter)
        pipe.set_adapters([adapter], [args.lora_weight])
    if facts.get("image_latent_scale") == "raw":
        use_raw_image_latents(pipe)
    if on_gpu:
        pipe.enable_model_cpu_offload()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    return pipe


@torch.no_grad()
def render(args, output_type: str = "np"):
    """Frames [F', h, w, 3] of the prompt, in [0, 1]."""
    pipe = load_pipeline(args)
    more = {"image": load_image(args.image)} if args.image else {}
    new = pipe.transformer.config.patch_size_t is not None  # CogVideoX 1.5, whose configured size is no default
    return pipe(
        prompt=args.prompt,
        num_frames=args.num_frames or (81 if new else 49),
        height=args.height or (768 if new else 480),
        width=args.width or (1360 if new else 720),
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(args.seed),
        output_type=output_type,
        **more,
    ).frames[0]


def main(argv=None) -> None:
    args = parse_args(argv)
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    export_to_video(list(render(args)), args.output_file, fps=args.fps)
    print(args.output_file)


def test_the_lora_changes_the_video_and_weight_0_does_not(tiny, tmp_path, capsys):
    import numpy as np

    from cogvideox.config import TEXT_TO_VIDEO_PIPELINE
    from engine.lora import save_lora
    from test_lora import trained_transformer

    save_lora(trained_transformer(tiny("5b")), tmp_path / "lora", TEXT_TO_VIDEO_PIPELINE)

    def frames(*flags):
        size = ["--num_frames", "9", "--height", "32", "--width", "48", "--num_inference_steps", "2"]
        return render(parse_args(["--prompt", "a red square", "--model_path", str(tiny("5b")), *size, *flags]))

    lora = ["--lora_path", str(tmp_path / "lora"), "--lora_name", "shape"]
    base = frames()
    assert base.shape == (9, 32, 48, 3)
    assert np.array_equal(base, frames())
    assert np.array_equal(base, frames(*lora, "--lora_weight", "0"))
    assert np.abs(base - frames(*lora)).max() > 1e-3
    assert np.abs(base - frames("--seed", "43")).max() > 1e-3


@pytest.mark.parametrize("name", ["my-style-v1.0", "a/b", "", "\u98ce\u683c", "lora_A", "2"])
def test_any_name_will_do_for_the_adapter(tiny, tmp_path, name):
    from cogvideox.config import TEXT_TO_VIDEO_PIPELINE
    from engine.lora import save_lora
    from test_lora import trained_transformer

    save_lora(trained_transformer(tiny("5b")), tmp_path / "lora", TEXT_TO_VIDEO_PIPELINE)
    flags = ["--prompt", "a dog", "--model_path", str(tiny("5b")), "--lora_path", str(tmp_path / "lora")]
    pipe = load_pipeline(parse_args([*flags, "--lora_name", name, "--lora_weight", "0.5"]))
    assert len(pipe.get_active_adapters()) == 1


def test_the_command_line_writes_a_video(tiny, tmp_path):
    import av

    out = tmp_path / "out" / "video.mp4"
    size = ["--num_frames", "9", "--height", "32", "--width", "48", "--num_inference_steps", "1", "--fps", "8"]
    main(["--prompt", "a dog", "--model_path", str(tiny("2b")), "--output_file", str(out), *size])
    with av.open(out) as video:
        assert sum(1 for _ in video.decode(video=0)) == 9
        assert video.streams.video[0].average_rate == 8


if __name__ == "__main__":
    sys.exit(main())
