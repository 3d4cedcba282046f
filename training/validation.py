"""Validation: sample videos of fixed prompts and noise, and the held-out loss, at set steps of a run.

Training never notices: weights, train mode, devices and random state are as before, and a failure is one warning.
Sizes are (frames, height, width) in pixels.
"""

import contextlib
import http.client
import io
import logging
import random
import re
import sys
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from attention import check_sage, sage_attention
from bars import LOG_SECONDS, tracked
from buckets import Bucket
from cache import write_video
from durable import write_text
from errors import UsageError
from held_out import HeldOut, mean_losses, sum_losses
from meter import StepMeter, report_memory
from objective import draw_generator
from runtime import StepPlan, meet
from signals import INTERRUPTION
from tracking import log_values


logger = logging.getLogger(__name__)

# Of small tiles: side, of diffusers' tiles; overlap; and pixels of five latents, so that a fifth is whole ones, as
# diffusers' blending needs
SMALL, SMALLEST = 2 / 3, 1 / 2
TILE_OVERLAP, TILE_STEP = 1 / 5, 40
FETCH_BYTES, FETCH_SECONDS = 64 * 2**20, 60  # the most that an image's URL may give and take
GIF_SIDE = 320  # pixels: longest side of the pictures that tensorboard gets


@dataclass
class Samples:
    """What every validation renders, made once before training; without prompts nothing."""

    prompts: list[str]
    images: list[Image.Image]  # first frames; none in text-to-video
    size: Bucket
    fps: int
    seed: int
    embeds: dict[str, torch.Tensor]  # [S, D] of each prompt and of the empty one, on the CPU
    make_pipeline: Callable[[nn.Module], object]  # of a transformer


# ---------------------------------------------------------------- before training


def read_prompts_from_args(args, image_to_video: bool) -> tuple[list[str], list[Image.Image]]:
    """--validation_prompt and --validation_images, split, checked and opened; nothing without a prompt."""
    if args.validation_prompt is None:
        return [], []
    prompts = split(args.validation_prompt, args.validation_prompt_separator)
    if "" in prompts:
        raise UsageError(f"--validation_prompt: prompt {prompts.index('') + 1} of {len(prompts)} is empty")
    if not image_to_video:
        return prompts, []
    if args.validation_images is None:
        raise UsageError(
            "--validation_prompt: this model starts from an image; give --validation_images, one a prompt"
        )
    sources = split(args.validation_images, args.validation_prompt_separator)
    if len(sources) != len(prompts):
        raise UsageError(
            f"--validation_images: {len(sources)} for {len(prompts)} prompts, split at "
            f"{args.validation_prompt_separator}; give one for each"
        )
    return prompts, [open_image(source) for source in sources]


def split(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator)]


def open_image(source: str) -> Image.Image:
    """An RGB image, turned as its EXIF data says, from a path or an http(s) URL."""
    protocol = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if protocol and protocol[1].lower() not in ("http", "https"):
        raise UsageError(f"--validation_images {source}: only paths and http(s) URLs are read")
    try:
        with Image.open(io.BytesIO(fetch(source)) if protocol else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, http.client.HTTPException, Image.DecompressionBombError) as error:
        raise UsageError(f"--validation_images {source}: cannot be read ({one_line(error)})") from error


def fetch(url: str) -> bytes:
    """The content of an http(s) URL; redirects stay within these protocols. OSError if it is too large or too slow."""
    opener, deadline, content = urllib.request.OpenerDirector(), time.monotonic() + FETCH_SECONDS, bytearray()
    for name in (
        "ProxyHandler", "HTTPHandler", "HTTPSHandler", "HTTPRedirectHandler", "HTTPDefaultErrorHandler",
        "HTTPErrorProcessor", "UnknownHandler",
    ):  # fmt: skip
        opener.add_handler(getattr(urllib.request, name)())
    with opener.open(url, timeout=FETCH_SECONDS / 2) as response:
        while piece := response.read1(2**20):
            content += piece
            if len(content) > FETCH_BYTES:
                raise OSError(f"larger than {FETCH_BYTES // 2**20} MiB")
            if time.monotonic() > deadline:
                raise OSError(f"not complete after {FETCH_SECONDS} s")
    return bytes(content)


def sample_size_from_args(args, bucket_of: list[Bucket]) -> Bucket:
    """--max_num_frames, --height and --width where given, else those of the bucket that most clips use."""
    counts = Counter(bucket_of)
    usual = max(counts, key=lambda bucket: (counts[bucket], bucket))
    given = {"frames": "max_num_frames", "height": "height", "width": "width"}
    size = usual._replace(**{name: getattr(args, flag) for name, flag in given.items() if flag in args.given})
    return size._replace(frames=(size.frames - 1) // 4 * 4 + 1)  # what the pipelines make of other counts


def check_attention_from_args(args, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse --validation_attention where it cannot run."""
    if args.validation_prompt is not None and args.validation_attention == "sage":
        check_sage(dtype, device)


# ---------------------------------------------------------------- a validation


def is_due_from_args(args, plan: StepPlan, batches_per_epoch: int, step: int) -> bool:
    """True after the updates that --validation_steps or --validation_epochs name. An epoch is over with the first update
    at or after its last batch. The run's last update is left to the test after training.
    """
    if step == plan.num_steps:
        return False
    if args.validation_steps:
        return step % args.validation_steps == 0
    before, now = ((step - back) * plan.accumulation // batches_per_epoch for back in (1, 0))
    return before // args.validation_epochs != now // args.validation_epochs


def validate_from_args(
    args, accelerator, meter: StepMeter, engine, samples: Samples, held_out: HeldOut, step: int
) -> None:
    """Held-out loss and sample videos of the weights after `step` updates; all ranks take part."""
    if not (samples.prompts or held_out.num_clips):
        return
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()  # what training holds and does not use is no part of validation's peak
    report_memory(meter, step, "before_validation")
    directory = Path(args.output_dir, "samples", f"step_{step}")
    with keep_random_state(accelerator.device), engine.inference():
        sums, loss_problem = attempt(lambda: sum_losses(held_out))
        _, render_problem = attempt(lambda: render_from_args(args, accelerator, engine, samples, directory))
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    # Ranks finish at different times; what follows may wait for all of them in a collective
    loss_problems = meet(f"held-out-{step}", loss_problem)
    warn_of(step, "the held-out loss", loss_problems)
    warn_of(step, "validation videos", meet(f"rendered-{step}", render_problem))
    if held_out.num_clips and not any(loss_problems):
        log_held_out(accelerator, meter, step, mean_losses(accelerator, held_out, sums))
    if accelerator.is_main_process and samples.prompts:
        warn_of(step, "sending videos to the trackers", [attempt(lambda: log_videos(accelerator, directory, step))[1]])
    report_memory(meter, step, "after_validation")


def attempt(work: Callable) -> tuple:
    """(what it returned, "") or (None, why it failed, in one line): a sample is never worth a run.

    A signal ends it: the ranks leave together, which is for the loop to do.
    """
    try:
        with INTERRUPTION.ending_body():
            if INTERRUPTION.reason is None:
                return work(), ""
        return None, f"ended by {INTERRUPTION.reason}"
    except Exception as error:  # of models, codecs or disks; warn_of names it
        return None, one_line(error)


def one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def warn_of(step: int, what: str, problems: list[str]) -> None:
    """One line for all ranks; those other than the main process are silent."""
    named = [f"{problem} (process {rank})" if rank else problem for rank, problem in enumerate(problems) if problem]
    if named:
        logger.warning("step %d: %s failed, training goes on: %s", step, what, "; ".join(named))


def log_held_out(accelerator, meter: StepMeter, step: int, losses: dict) -> None:
    meter.write_event(step, "held_out_loss", **losses)
    values = {f"validation/loss_{name}": value for name, value in losses["bins"].items()}
    log_values(accelerator, {"validation/loss": losses["loss"], **values}, step)
    logger.info("step %d: held-out loss %.4f", step, losses["loss"])


@contextlib.contextmanager
def keep_random_state(device: torch.device):
    """The generators of torch, Python and numpy as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


# ---------------------------------------------------------------- rendering


def render_from_args(args, accelerator, engine, samples: Samples, directory: Path) -> None:
    """Write this rank's share of the videos, each with its prompt beside it: <prompt>_<video>.mp4 and .txt."""
    transformer, is_thrifty = engine.transformer, engine.level in ("offload", "stream")
    jobs = [(number, video) for number in range(len(samples.prompts)) for video in range(args.num_validation_videos)]
    own_jobs = jobs[accelerator.process_index :: accelerator.num_processes]
    if not own_jobs:
        return
    pipe = samples.make_pipeline(transformer)
    shows_bar = accelerator.is_main_process and sys.stderr.isatty()
    pipe.set_progress_bar_config(disable=not shows_bar, leave=False, desc="validation")
    sage = args.validation_attention == "sage"
    offload, device = args.enable_model_cpu_offload, accelerator.device
    if is_thrifty:
        logger.info("at --memory %s videos are rendered in small pieces", engine.level)
    tiles = SMALLEST if is_thrifty else SMALL  # of the second attempt
    with sage_attention(transformer) if sage else contextlib.nullcontext():
        try:
            with in_small_pieces(pipe, SMALL) if is_thrifty else contextlib.nullcontext():
                render_jobs_from_args(args, pipe, samples, device, directory, own_jobs, offload)
            return
        except torch.cuda.OutOfMemoryError as error:
            logger.warning(
                "validation: %s; tried again in small pieces, with one model at a time on the GPU", one_line(error)
            )
        with in_small_pieces(pipe, tiles):
            offload = offload or device.type == "cuda"
            render_jobs_from_args(args, pipe, samples, device, directory, own_jobs, offload)


def render_jobs_from_args(
    args, pipe, samples: Samples, device: torch.device, directory: Path, jobs: list[tuple[int, int]], offload: bool
) -> None:
    with placed(pipe, device, offload):
        # On a terminal the pipeline shows a bar of its own
        for number, video in tracked(jobs, "validation videos", disable=sys.stderr.isatty(), delay=LOG_SECONDS):
            frames = render_one_from_args(args, pipe, samples, device, number, video)
            path = directory / f"{number}_{video}.mp4"
            write_video(path, frames, samples.fps)
            write_text(path.with_suffix(".txt"), samples.prompts[number] + "\n")


@contextlib.contextmanager
def in_small_pieces(pipe, tiles: float):
    """Guidance's two samples pass through the transformer one by one, and the VAE works on SMALL or SMALLEST tiles."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with one_sample_at_a_time(pipe.transformer), in_small_tiles(pipe.vae, tiles):
        yield


@contextlib.contextmanager
def one_sample_at_a_time(transformer):
    """A transformer that takes the batch of a pipeline's call in parts: a block's activations are of one sample.

    `ofs` and RoPE are the same for all. Streamed weights pass once for each sample.
    """
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


@contextlib.contextmanager
def in_small_tiles(vae, tiles: float):
    """A VAE that works on small tiles, as it was again afterwards: training may encode with it.

    SMALL are 160x240 for 480x720, less than half of the memory of diffusers' tiles, SMALLEST 120x160, a quarter. Group
    norms are of a tile, so that brightness may differ between tiles.
    """
    names = [name for name in vars(vae) if name.startswith("tile_") or name in ("use_slicing", "use_tiling")]
    before = {name: getattr(vae, name) for name in names}
    sides = (vae.tile_sample_min_height, vae.tile_sample_min_width)
    height, width = (max(TILE_STEP, int(side * tiles) // TILE_STEP * TILE_STEP) for side in sides)
    vae.enable_slicing()
    vae.enable_tiling(height, width, TILE_OVERLAP, TILE_OVERLAP)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def render_one_from_args(args, pipe, samples: Samples, device: torch.device, number: int, video: int) -> np.ndarray:
    """uint8 frames [F', h, w, 3]. The noise depends on seed, prompt and video alone: validations can be compared."""
    num_frames, height, width = samples.size
    more = {}
    if samples.images:  # brought to size as clips are: covering it, cut at the middle
        more["image"] = ImageOps.fit(samples.images[number], (width, height), Image.Resampling.LANCZOS)
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
        output_type="np",
        **more,
    ).frames[0]
    if not np.isfinite(frames).all():
        raise ValueError(f"the frames of {number}_{video} are not finite")
    return (frames * 255).round().astype(np.uint8)


@contextlib.contextmanager
def placed(pipe, device: torch.device, offload: bool):
    """The VAE on `device`, or with `offload` each model only while it works; all where they were afterwards."""
    vae_home = pipe.vae.device
    if offload and not may_move(pipe.transformer):
        logger.warning(
            "validation: the transformer stays on the GPU, because the optimizer holds its weights in one piece"
        )
        offload = False
    try:
        if offload:
            pipe.enable_model_cpu_offload(device=device)  # no .to() after this: it would load all at once again
        else:
            pipe.vae.to(device)
        yield
    except Exception as error:
        # What the pipeline held would still be there when the weights come back
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if offload:
            pipe.remove_all_hooks()
        pipe.vae.to(vae_home)
        if offload:
            nn.Module.to(pipe.transformer, device)  # the parameters stay the same objects: the optimizer holds them


def may_move(model: nn.Module) -> bool:
    """False if trained weights are parts of a buffer, as DeepSpeed makes them: elsewhere they would be copies of it."""
    trained = [param for param in model.parameters() if param.requires_grad]
    return all(param.untyped_storage().nbytes() == param.nbytes for param in trained)


# ---------------------------------------------------------------- trackers


def log_videos(accelerator, directory: Path, step: int) -> None:
    """Send a step's videos and their prompts to the trackers that show videos. The main process calls it."""
    paths = sorted(directory.glob("*.mp4"))
    prompts = [path.with_suffix(".txt").read_text(encoding="utf-8").rstrip("\n") for path in paths]
    videos = {f"validation/{path.stem}": (path, prompt) for path, prompt in zip(paths, prompts, strict=True)}
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({key: wandb.Video(str(path), caption=text) for key, (path, text) in videos.items()}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log(
                {key: trackio.Video(str(path), caption=text) for key, (path, text) in videos.items()}, step=step
            )
        elif tracker.name == "tensorboard":
            for key, (path, text) in videos.items():
                add_gif(tracker.writer, key, path, step)
                tracker.writer.add_text(f"{key}/prompt", text, step)


def add_gif(writer, tag: str, path: Path, step: int) -> None:
    """An animated picture, shown as such by tensorboard; its own add_video needs moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate)
        frames = [frame.to_image() for frame in container.decode(video=0)]
    for frame in frames:
        frame.thumbnail((GIF_SIDE, GIF_SIDE))
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    width, height = frames[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content.getvalue())
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
