#!/usr/bin/env python
"""Check the scripts against real weights: the transformer's inputs, and whether a LoRA learns one clip.

    make real MODEL=zai-org/CogVideoX-2b
    python benchmarks/real_model.py --model zai-org/CogVideoX-5b --out outputs/real

Draws a clip, prepares it, trains a LoRA on it with the wrappers, and writes report.md with
- the difference between the transformer's inputs in training and in the stock pipeline,
- the base model's loss on the clip: above 0.5, latents, positions or noise are not what it was trained with,
- the loss with the LoRA, and how close a sample is to the clip before and after.

Exit code 1 if an input differs or the loss does not fall. Axes: B batch, F latent frames, C latent channels.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console


if __name__ == "__main__":
    console.set_up()  # before the libraries are imported

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "assets" / "tests"))

from make_clips import draw_frame, encode_video, write_lists
from PIL import Image
from safetensors.torch import load_file

from base.draws import draw_seed
from cogvideox.config import (
    base_size,
    default_fps,
    load_scheduler,
    load_vae_config,
    read_config,
    takes_image,
    text_length,
)
from cogvideox.folder import resolve_model_dir
from cogvideox.inputs import pad_frames, rotary_embeddings, sample_image_latents, sample_latents
from run.output_dir import PACKAGES
from test_lora_inference import load_pipeline
from test_lora_inference import parse_args as inference_args


ROOT = Path(__file__).resolve().parents[1]
CAPTION = "A red circle moves from left to right over a dark blue background."
CLIP = {
    "background": (16, 24, 96),
    "shapes": [("circle", (224, 32, 32), (0.5, 0.2), (0.5, 0.8), (0.22, 0.22))],
}
NOISE_LEVELS = (100, 300, 500, 700, 900)  # timesteps of 1000
# Relative differences of inputs. bf16 rounds to 0.004. The image is noised in training, so only its scale is compared.
MAX_DIFFERENCES = {
    "prompt embeddings": 0.03,
    "shape of the latents": 0,
    "rotary positions": 0.03,
    "scale of the image": 0.3,
}


class FirstCall(Exception):
    """Aborts a pipeline once its transformer's inputs are known."""


# ---------------------------------------------------------------- clip, preparation, training


def write_clip(out: Path, size: tuple[int, int, int], fps: int) -> np.ndarray:
    """Write a dataset folder with one clip; returns its frames, uint8 [F', h, w, 3]."""
    (out / "videos").mkdir(parents=True, exist_ok=True)
    frames = np.stack([draw_frame({**CLIP, "size": size}, place / (size[0] - 1)) for place in range(size[0])])
    encode_video(out / "videos/clip.mp4", frames, fps)
    write_lists(out, [("videos/clip.mp4", CAPTION)])
    return frames


def run_wrapper(name: str, *flags: str, **settings) -> None:
    environment = {**os.environ, **{key: str(value) for key, value in settings.items()}}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # the Python that runs this script
    subprocess.run([str(ROOT / name), *flags], env=environment, check=True)


def prepare_and_train(args, size: tuple[int, int, int], config: dict, dtype: str) -> Path:
    """Run the wrappers; returns the LoRA's folder."""
    (frames, height, width), image_to_video = size, takes_image(config)
    run_wrapper(
        "prepare_dataset.sh", "--max_sequence_length", str(text_length(config)), MODEL=args.model, DATA_ROOT=args.out / "clip", OUTPUT_ROOT=args.out / "prepared",
        HEIGHT_BUCKETS=height, WIDTH_BUCKETS=width, FRAME_BUCKETS=frames, MAX_NUM_FRAMES=frames, NUM_WORKERS=0,
        DTYPE=dtype, IMAGE_LATENTS=str(image_to_video).lower(),
    )  # fmt: skip
    run_wrapper(
        f"train_{'image' if image_to_video else 'text'}_to_video_lora.sh", MODEL=args.model, NUM_WORKERS=0,
        DATA_ROOT=args.out / "prepared", OUTPUT_ROOT=args.out / "run", MIXED_PRECISION="no" if dtype == "fp32" else dtype,
        MAX_TRAIN_STEPS=args.steps, LEARNING_RATES=args.learning_rate, LR_SCHEDULES="constant", OPTIMIZERS="adamw",
        LR_WARMUP_STEPS=0, CHECKPOINTING_STEPS=1000000,
    )  # fmt: skip
    return next((args.out / "run").iterdir())


def read_prepared(prepared: Path) -> dict[str, torch.Tensor]:
    """moments, prompt_embeds and, for image-to-video, image_moments, each [1, ...]."""
    tensors = {}
    for name in ("video_latents", "prompt_embeds", "image_latents"):
        for path in sorted((prepared / name).glob("[!_]*.safetensors")):
            tensors |= {f"{name}/{key}": value for key, value in load_file(path).items()}
    batch = {"moments": tensors["video_latents/moments"], "prompt_embeds": tensors["prompt_embeds/prompt_embeds"]}
    if "image_latents/moments" in tensors:
        batch["image_moments"] = tensors["image_latents/moments"][0]  # the first noised variant
    return {name: value[None].float() for name, value in batch.items()}


# ---------------------------------------------------------------- measurements


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float().cpu() - theirs.float().cpu()).norm() / theirs.float().cpu().norm().clamp(min=1e-9))


def pipeline_inputs(pipe, options: dict) -> dict:
    """The keyword arguments of the transformer's first call in the stock pipeline."""
    inputs = {}

    def keep(module, positional, named):
        inputs.update(named)
        raise FirstCall

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipe(prompt=CAPTION, guidance_scale=1.0, num_inference_steps=2, **options)
    except FirstCall:
        return inputs
    finally:
        handle.remove()


def differences(pipe, batch: dict, vae_config, options: dict) -> dict[str, float]:
    """Relative differences between the transformer's inputs in training and in the pipeline."""
    theirs, config = pipeline_inputs(pipe, options), pipe.transformer.config
    latents = pad_frames(sample_latents(batch["moments"], torch.zeros(1), vae_config), config.patch_size_t)
    found = {
        "prompt embeddings": relative(batch["prompt_embeds"], theirs["encoder_hidden_states"]),
        "shape of the latents": float(latents.shape[:2] != theirs["hidden_states"].shape[:2]),
    }
    positions = rotary_embeddings(config, latents)
    if positions is not None:
        pairs = zip(positions, theirs["image_rotary_emb"], strict=True)
        found["rotary positions"] = max(relative(*pair) for pair in pairs)
    if "image_moments" in batch:
        ours = sample_image_latents(batch["image_moments"], torch.zeros(1), vae_config)[:, 0]
        image = theirs["hidden_states"][:, 0, latents.shape[2] :]  # [B, C, H, W]
        found["scale of the image"] = abs(float(ours.std()) / float(image.float().std()) - 1)
    return found


@torch.no_grad()
def clip_loss(pipe, batch: dict, vae_config, alphas_cumprod: torch.Tensor, dtype: torch.dtype) -> float:
    """The training script's loss on the clip with fixed noise, averaged over NOISE_LEVELS."""
    task = "image" if "image_moments" in batch else "text"
    compute_losses = importlib.import_module(f"cogvideox_{task}_to_video_lora").compute_losses
    device, config = pipe._execution_device, pipe.transformer.config
    generator = torch.Generator().manual_seed(0)
    moments = batch["moments"]
    latents = pad_frames(sample_latents(moments, torch.zeros(1), vae_config), config.patch_size_t).to(device)
    images = (
        [sample_image_latents(batch["image_moments"], torch.zeros(1), vae_config).to(device)]
        if task == "image"
        else []
    )
    losses = []
    for level in NOISE_LEVELS:
        noise = torch.randn(latents.shape, generator=generator).to(device)
        given = (latents, batch["prompt_embeds"].to(device), *images, noise, torch.tensor([level], device=device))
        losses.append(float(compute_losses(pipe.transformer, alphas_cumprod.to(device), dtype, *given)))
    return sum(losses) / len(losses)


def sample_psnr(pipe, frames: np.ndarray, options: dict, steps: int) -> float:
    """PSNR in dB between a sample for the caption and the clip."""
    generator = torch.Generator().manual_seed(draw_seed(0, "sample"))
    video = pipe(prompt=CAPTION, num_inference_steps=steps, generator=generator, output_type="np", **options).frames[0]
    return float(-10 * np.log10(np.square(video[: len(frames)] - frames / 255).mean()))


# ---------------------------------------------------------------- the report


def machine() -> str:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"{card}; Python {platform.python_version()}, {versions}"


def report(args, size, dtype: str, inputs: dict[str, float], numbers: dict[str, float], seconds: float) -> str:
    rows = [f"| difference of {name} | {value:.4f} |" for name, value in inputs.items()]
    rows += [f"| {name} | {value:.3f} |" for name, value in numbers.items()]
    lines = [
        f"### {args.model}: {args.steps} steps of a LoRA on one clip", "",
        f"{size[0]} frames of {size[1]}x{size[2]}, {dtype}, learning rate {args.learning_rate}. {machine()}. "
        f"{seconds / 60:.0f} minutes.", "",
        "| | |", "|---|---|", *rows, "",
    ]  # fmt: skip
    return "\n".join(lines)


def parse_args(argv=None) -> argparse.Namespace:
    parser = console.Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--out", type=Path, default=Path("outputs/real"), help="folder to write, which must not exist")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning_rate", default="5e-4")
    parser.add_argument("--num_inference_steps", type=int, default=30)
    parser.add_argument(
        "--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"), help="default: the model's"
    )
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: bf16, on a CPU fp32")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"--out {args.out} exists: name another folder or remove it")
    return args


def main(argv=None) -> int:
    args, started = parse_args(argv), time.monotonic()
    dtype = args.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    model_dir = resolve_model_dir(args.model, ["transformer", "scheduler", "vae", "text_encoder", "tokenizer"])
    config = read_config(model_dir, "transformer")
    size, image_to_video = tuple(args.size or base_size(config)), takes_image(config)
    frames = write_clip(args.out / "clip", size, default_fps(config))
    lora = prepare_and_train(args, size, config, dtype)

    batch, vae_config = read_prepared(args.out / "prepared"), load_vae_config(model_dir)
    alphas_cumprod = load_scheduler(model_dir).alphas_cumprod
    options = {"num_frames": size[0], "height": size[1], "width": size[2], "max_sequence_length": text_length(config)}
    if image_to_video:
        options["image"] = Image.fromarray(frames[0])
    numbers = {}
    for name, more in (("without the LoRA", []), ("with the LoRA", ["--lora_path", str(lora)])):
        pipe = load_pipeline(
            inference_args(["--prompt", CAPTION, "--model_path", str(model_dir), "--dtype", dtype, *more])
        )
        pipe.set_progress_bar_config(disable=True)
        if not more:
            inputs = differences(pipe, batch, vae_config, options)
        numbers[f"loss {name}"] = clip_loss(pipe, batch, vae_config, alphas_cumprod, pipe.transformer.dtype)
        numbers[f"PSNR of a sample {name}, dB"] = sample_psnr(pipe, frames, options, args.num_inference_steps)
        del pipe
    text = report(args, size, dtype, inputs, numbers, time.monotonic() - started)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{args.out / 'report.md'}")
    problems = [f"{name} differ" for name, value in inputs.items() if value > MAX_DIFFERENCES[name]]
    if numbers["loss with the LoRA"] >= numbers["loss without the LoRA"]:
        problems.append("the LoRA did not learn the clip")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
