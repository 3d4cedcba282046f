"""Render sample videos with the model in training, in the memory that is left.

Devices are restored here; weights, train mode and random state by `validate`. Sizes are (frames, height, width) in
pixels.
"""

import contextlib
import logging
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from attention.kernels import sage_attention
from base.bars import LOG_SECONDS, with_progress
from base.errors import named_line
from base.files import write_text
from base.memory_levels import HOST_LEVELS
from data.artifacts import write_video
from data.buckets import Bucket
from engine.objective import draw_generator
from memory import estimate
from memory.host import free_gpu_bytes, room_given_up


logger = logging.getLogger(__name__)


@dataclass
class Samples:
    """What every validation renders, built once before training; empty without prompts."""

    prompts: list[str]
    images: list[Image.Image]  # first frames; empty for text-to-video
    size: Bucket
    fps: int
    seed: int
    embeds: dict[str, torch.Tensor]  # [S, D] per prompt, the empty one included, on the CPU
    make_pipeline: Callable[[nn.Module], object]  # from a transformer


@contextlib.contextmanager
def preserved_random_state(device: torch.device):
    """Restore the generators of torch, Python and numpy on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def render_videos(args, run, engine, samples: Samples, directory: Path) -> None:
    """Write this rank's share of the videos, each with its prompt beside it: <prompt>_<video>.mp4 and .txt.

    The transformer stays where it is, or moves so that only the running model is on the GPU (`placed`): with
    --enable_model_cpu_offload, if the VAE has no room beside it at `offload` or `stream`, or if memory ran out.
    """
    transformer, saves_memory = engine.transformer, engine.level in HOST_LEVELS
    jobs = [(number, video) for number in range(len(samples.prompts)) for video in range(args.num_validation_videos)]
    own_jobs = jobs[run.rank :: run.num_ranks]
    if not own_jobs:
        return
    pipe = samples.make_pipeline(transformer)
    shows_bar = run.rank == 0 and sys.stderr.isatty()
    pipe.set_progress_bar_config(disable=not shows_bar, leave=False, desc="validation")
    sage = args.validation_attention == "sage"
    if saves_memory:
        logger.info("at --memory %s guidance's two samples are denoised one after the other", engine.level)
    with sage_attention(transformer) if sage else contextlib.nullcontext():
        # Not tried where there is no room: what runs out of memory in decoding is denoised twice
        if not saves_memory or has_room_to_decode(pipe.vae, samples.size, run.device):
            try:
                render_jobs(args, pipe, samples, run.device, directory, own_jobs, saves_memory, moves=False)
                return
            except torch.cuda.OutOfMemoryError as error:
                logger.warning(
                    "validation: %s; tried again with one sample and one model at a time on the GPU", named_line(error)
                )
        render_jobs(args, pipe, samples, run.device, directory, own_jobs, one_by_one=True, moves=True)


def has_room_to_decode(vae, size: Bucket, device: torch.device) -> bool:
    """Can the transformer stay on the GPU meanwhile? On its way to the host and back it takes seconds and host memory."""
    if device.type != "cuda":
        return False
    torch.cuda.empty_cache()
    frames, height, width = size
    needed = estimate.room_to_decode(height * width, frames * height * width, vae.dtype.itemsize, vae.use_tiling)
    return needed <= free_gpu_bytes(device)


def render_jobs(
    args,
    pipe,
    samples: Samples,
    device: torch.device,
    directory: Path,
    jobs: list[tuple[int, int]],
    one_by_one: bool,
    moves: bool,
) -> None:
    """`one_by_one`: one sample at a time is on the GPU; `moves`: one model."""
    offload = args.enable_model_cpu_offload or (moves and device.type == "cuda")
    denoising = one_sample_at_a_time(pipe.transformer) if one_by_one else contextlib.nullcontext()
    with denoising, placed(pipe, device, offload):
        # On a terminal, the pipeline shows its own bar
        for number, video in with_progress(jobs, "validation videos", disable=sys.stderr.isatty(), delay=LOG_SECONDS):
            frames = render_one(args, pipe, samples, device, number, video)
            path = directory / f"{number}_{video}.mp4"
            write_video(path, frames, samples.fps)
            write_text(path.with_suffix(".txt"), samples.prompts[number] + "\n")


@contextlib.contextmanager
def one_sample_at_a_time(transformer):
    """The transformer takes the pipeline's batch sample by sample, which keeps activations to those of one sample.

    `ofs` and RoPE are the same for all. Streamed weights are copied once per sample.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    forward, own = transformer.forward, vars(transformer).get("forward")

    def forward_each(hidden_states, encoder_hidden_states, timestep, return_dict=False, **shared):
        velocities = []
        for sample in zip(*(x.split(1) for x in (hidden_states, encoder_hidden_states, timestep)), strict=True):
            velocities += forward(*sample, return_dict=False, **shared)
        return (torch.cat(velocities),)

    transformer.forward = forward_each
    try:
        yield
    finally:
        del transformer.forward
        if own is not None:
            transformer.forward = own


def render_one(args, pipe, samples: Samples, device: torch.device, number: int, video: int) -> np.ndarray:
    """uint8 frames [F', h, w, 3]. The noise depends only on seed, prompt and video, so validations can be compared."""
    num_frames, height, width = samples.size
    more = {}
    if samples.images:  # resized as clips are: scaled to cover, center-cropped
        more["image"] = ImageOps.fit(samples.images[number], (width, height), Image.Resampling.LANCZOS)
    began = time.perf_counter()
    with noted_decoding(pipe, device) as starts:
        frames = pipe(
            prompt_embeds=samples.embeds[samples.prompts[number]][None].to(device),
            negative_prompt_embeds=samples.embeds[""][None].to(device),
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            use_dynamic_cfg=args.use_dynamic_cfg,
            generator=draw_generator(samples.seed, "validation", number, video),
            output_type="pt",
            **more,
        ).frames[0]
    if not torch.isfinite(frames).all():
        raise ValueError(f"the frames of {number}_{video} are not finite")
    frames, ended = to_uint8(frames), time.perf_counter()
    logger.info(
        "validation video %d_%d: denoised in %.2f s, decoded in %.2f s", number, video, starts[0] - began, ended - starts[0]
    )  # fmt: skip
    return frames


@contextlib.contextmanager
def noted_decoding(pipe, device: torch.device) -> Iterator[list[float]]:
    """Yields a list of the times at which the latents of a video were there, one for each call of `pipe`.

    The VAE then has the memory that the transformer's blocks need for their passes.
    """
    decode_latents, starts = pipe.decode_latents, []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        starts.append(time.perf_counter())
        with room_given_up(pipe.transformer.transformer_blocks):
            return decode_latents(latents)

    pipe.decode_latents = decode
    try:
        yield starts
    finally:
        pipe.decode_latents = decode_latents


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """[F', h, w, 3] of frames [F', 3, h, w] in [0, 1]; on their device and one by one, in fp32."""
    pixels = torch.stack([(frame.float() * 255).round().to(torch.uint8) for frame in frames])
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextlib.contextmanager
def placed(pipe, device: torch.device, offload: bool):
    """The VAE on `device`, or with `offload` each model only while it runs; all devices are restored."""
    vae_device = pipe.vae.device
    if offload and not may_move(pipe.transformer, device):
        logger.warning(
            "validation: the transformer stays on the GPU, because the optimizer holds its weights in one buffer"
        )
        offload = False
    try:
        if offload:
            pipe.enable_model_cpu_offload(device=device)  # no .to() after this: it would move everything to the GPU
        else:
            pipe.vae.to(device)
        yield
    except Exception as error:
        # The traceback's frames would keep the pipeline's tensors while the weights come back
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if offload:
            pipe.remove_all_hooks()
        pipe.vae.to(vae_device)
        if offload:
            nn.Module.to(pipe.transformer, device)  # keeps the Parameter objects, which the optimizer holds


def may_move(model: nn.Module, device: torch.device) -> bool:
    """False if trained weights on `device` are views of one buffer, as with DeepSpeed: moved, they would be copies.

    Those that are streamed from host memory stay there, whoever moves the model.
    """
    there = [param for param in model.parameters() if param.requires_grad and param.device.type == device.type]
    return all(param.untyped_storage().nbytes() == param.nbytes for param in there)
