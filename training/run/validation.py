"""Validation at set steps of a run: sample videos with fixed prompts and noise, and the held-out loss.

Training is not affected: weights, train mode, devices and random state are restored, and a failure is only a warning.
"""

import io
import logging
import re
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image, ImageOps

from base.errors import UsageError, first_line, named_line
from base.ranks import exchange_on_host
from base.signals import INTERRUPTION
from data.buckets import Bucket
from run.held_out import HeldOut, HeldOutClips, mean_losses, read_clips, sum_losses
from run.metrics import StepMeter, report_memory
from run.render import Samples, preserved_random_state, render_videos
from run.steps import StepPlan
from run.tracking import log_values, log_videos


logger = logging.getLogger(__name__)

CUT_SHORT = "ended by"  # a signal
FETCH_BYTES, FETCH_SECONDS = 64 * 2**20, 60  # limits for downloading an image


# ---------------------------------------------------------------- before training


class ValidationSet(NamedTuple):
    """What every validation renders and evaluates; nothing without --validation_prompt and --validation_data_root."""

    prompts: list[str]
    images: list[Image.Image]  # first frames, one per prompt; empty for text-to-video
    held_out: HeldOutClips
    size: Bucket  # of the videos


def read_set(args, model, seed: int, clip_buckets: list[Bucket]) -> ValidationSet:
    """The validation set of a run on clips of these sizes, checked before any weights are fetched."""
    prompts, images = read_prompts(args, model.image_to_video)
    return ValidationSet(prompts, images, read_clips(args, model, seed), sample_size(args, clip_buckets))


def read_prompts(args, image_to_video: bool) -> tuple[list[str], list[Image.Image]]:
    """--validation_prompt and --validation_images, split, checked and opened; empty without a prompt."""
    if args.validation_prompt is None:
        return [], []
    prompts = split(args.validation_prompt, args.validation_prompt_separator)
    if "" in prompts:
        raise UsageError(f"--validation_prompt: prompt {prompts.index('') + 1} of {len(prompts)} is empty")
    if not image_to_video:
        return prompts, []
    if args.validation_images is None:
        raise UsageError(
            "--validation_prompt: this model starts from an image; give --validation_images, one per prompt"
        )
    sources = split(args.validation_images, args.validation_prompt_separator)
    if len(sources) != len(prompts):
        raise UsageError(
            f"--validation_images: {len(sources)} for {len(prompts)} prompts, split at "
            f"{args.validation_prompt_separator}; give one per prompt"
        )
    return prompts, [open_image(source) for source in sources]


def split(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator)]


def open_image(source: str) -> Image.Image:
    """An RGB image, rotated as its EXIF data says, from a path or an http(s) URL."""
    protocol = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if protocol and protocol[1].lower() not in ("http", "https"):
        raise UsageError(f"--validation_images {source}: only paths and http(s) URLs are read")
    try:
        with Image.open(io.BytesIO(fetch(source)) if protocol else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"--validation_images {source}: cannot be read ({named_line(error)})") from error


def fetch(url: str) -> bytes:
    """The content of an http(s) URL, redirects included. OSError if it fails, is too large or too slow."""
    import httpx  # here, since most runs fetch nothing

    deadline = time.monotonic() + FETCH_SECONDS
    options = {"timeout": FETCH_SECONDS / 2, "verify": ssl.create_default_context()}  # the system's certificates
    try:
        with httpx.stream("GET", url, follow_redirects=True, **options) as response:
            response.raise_for_status()
            return join_pieces(response.iter_bytes(), deadline)
    except (httpx.HTTPError, httpx.InvalidURL, ImportError) as error:  # a SOCKS proxy needs another package
        raise OSError(first_line(error)) from error


def join_pieces(pieces: Iterable[bytes], deadline: float) -> bytes:
    content = bytearray()
    for piece in pieces:
        content += piece
        if len(content) > FETCH_BYTES:
            raise OSError(f"larger than {FETCH_BYTES // 2**20} MiB")
        if time.monotonic() > deadline:
            raise OSError(f"not complete after {FETCH_SECONDS} s")
    return bytes(content)


def sample_size(args, clip_buckets: list[Bucket]) -> Bucket:
    """--max_num_frames, --height and --width if given, else those of the most common bucket, of images only if there
    are no videos.
    """
    counts = Counter(bucket for bucket in clip_buckets if bucket.frames > 1) or Counter(clip_buckets)
    usual = max(counts, key=lambda bucket: (counts[bucket], bucket))
    given = {"frames": "max_num_frames", "height": "height", "width": "width"}
    size = usual._replace(**{name: getattr(args, flag) for name, flag in given.items() if flag in args.given})
    return size._replace(frames=(size.frames - 1) // 4 * 4 + 1)  # as the pipelines round other counts


def make_samples(args, run, model, validation_set: ValidationSet, vae, embeds: dict) -> Samples:
    """What every validation renders."""
    prompts, images, _, size = validation_set
    fps = args.fps if "fps" in args.given else model.fps
    make_pipeline = partial(model.make_pipeline, vae, args.image_latent_scale)  # from a transformer
    return Samples(prompts, images, size, fps, run.seed, embeds, make_pipeline)


# ---------------------------------------------------------------- a validation


def is_due(args, plan: StepPlan, step: int) -> bool:
    """True after the updates that --validation_steps or --validation_epochs name.

    An epoch ends with the first update at or after its last batch. The run's last update is left to the validation
    after training.
    """
    if step == plan.num_steps:
        return False
    if args.validation_steps:
        return step % args.validation_steps == 0
    before, now = ((step - back) * plan.accumulation // plan.batches_per_epoch for back in (1, 0))
    return before // args.validation_epochs != now // args.validation_epochs


def validate(args, run, meter: StepMeter, engine, samples: Samples, held_out: HeldOut, step: int) -> None:
    """Held-out loss and sample videos of the weights after `step` updates; all ranks must call it."""
    if not (samples.prompts or held_out.num_clips):
        return
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # training's unused cache is not part of validation's peak
    report_memory(meter, step, "before_validation")
    accelerator, directory = run.accelerator, run.output_dir / "samples" / f"step_{step}"
    with preserved_random_state(run.device), engine.inference():
        sums, loss_problem = attempt(lambda: sum_losses(held_out))
        _, render_problem = attempt(lambda: render_videos(args, run, engine, samples, directory))
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    # Ranks finish at different times: wait for all on the host, before the collectives below
    loss_problems = exchange_on_host(f"held-out-{step}", loss_problem)
    warn_of(step, "the held-out loss", loss_problems)
    warn_of(step, "validation videos", exchange_on_host(f"rendered-{step}", render_problem))
    if held_out.num_clips and not any(loss_problems):
        log_held_out(accelerator, meter, step, mean_losses(accelerator, held_out, sums))
    if run.rank == 0 and samples.prompts:
        warn_of(step, "sending videos to the trackers", [attempt(lambda: log_videos(accelerator, directory, step))[1]])
    report_memory(meter, step, "after_validation")


def attempt(work: Callable) -> tuple:
    """(its result, "") or (None, why it failed, in one line): a sample is never worth a run.

    A signal ends it early; the ranks then leave together, at the end of the step.
    """
    try:
        with INTERRUPTION.interruptible():
            if INTERRUPTION.reason is None:
                return work(), ""
        return None, f"{CUT_SHORT} {INTERRUPTION.reason}"
    except Exception as error:  # noqa: BLE001 - of models, codecs or disks; warn_of names it
        return None, named_line(error)


def warn_of(step: int, what: str, problems: list[str]) -> None:
    """One line for all ranks; only the main process shows it."""
    named = [f"{problem} (process {rank})" if rank else problem for rank, problem in enumerate(problems) if problem]
    if named:
        is_cut = any(CUT_SHORT in problem for problem in named)  # then training is about to stop, too
        outcome = "incomplete" if is_cut else "failed, training continues"
        logger.warning("step %d: %s %s: %s", step, what, outcome, "; ".join(named))


def log_held_out(accelerator, meter: StepMeter, step: int, losses: dict) -> None:
    meter.write_event(step, "held_out_loss", **losses)
    values = {f"validation/loss_{name}": value for name, value in losses["bins"].items()}
    log_values(accelerator, {"validation/loss": losses["loss"], **values}, step)
    logger.info("step %d: held-out loss %.4f", step, losses["loss"])
