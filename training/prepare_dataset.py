#!/usr/bin/env python
"""Precompute what training reads: VAE moments of every clip and T5 embeddings of every caption.

python training/prepare_dataset.py --model_id zai-org/CogVideoX-2b \\
    --data_root video-dataset-disney --output_dir disney-prepared \\
    --height_buckets 480 --width_buckets 720 --frame_buckets 49 --save_latents_and_embeddings

torchrun --nproc_per_node 2 training/prepare_dataset.py ... splits the clips over two GPUs. A second run of the same
command does only what is missing or has changed. Bad clips are named and left out; the rest is finished, exit code 65.
--check encodes nothing: it reads all captions, samples all clips, and writes dataset_report.html.
"""

from args import parse_prepare_args
from base import console, startup
from data import read_ahead


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    ARGS = parse_prepare_args()
    console.set_up(ARGS.verbose)
    startup.expect_imports()
    read_ahead.start_from_args(ARGS, uses_cache=not ARGS.verify)

import functools
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed

from base.bars import progress, with_progress
from base.dtypes import DTYPES
from base.errors import DataError, Interrupted, UsageError
from base.files import forget_undo, lock_folder, make_folder, remove_unfinished
from base.hashes import HashCache
from base.ranks import all_gather_objects, on_main_process
from base.signals import INTERRUPTION
from base.status import begin_run, write_status
from cogvideox.config import CONFIGS, default_fps, load_vae_config, num_parameters, read_config, text_length
from cogvideox.encoding import (
    IMAGE_NOISE_MEAN,
    IMAGE_NOISE_STD,
    encode_by_passes,
    encode_noised_images,
    encode_videos,
    free_memory,
    pixels_to_unit,
    place_text_encoder,
)
from cogvideox.folder import files_that_load, resolve_model_dir
from cogvideox.loading import load_text_encoder, load_vae
from data.artifacts import WriterPool, write_tensors
from data.captions import warn_of_texts_from_args
from data.clip_lists import unique_stems
from data.dataset import build_videos_from_args
from data.loader import tolerant_loader
from data.prepared import content_hash, hash_component
from engine.objective import draw_generator
from memory.allocator import expand_segments
from memory.host import HostCopy, to_device
from run import check_data
from run.exits import run_script
from run.launch import agree_on_run, check_device
from run.prepare_plan import (
    ModelIdentity,
    image_latent,
    is_embedding,
    is_made,
    mark_missing,
    plan_clip,
    plan_empty,
    prune_unused,
    report_verified,
    video_latent,
    warn_of_unused,
    write_manifest,
    write_preview,
)


logger = logging.getLogger(__name__)

RESUME_ADVICE = "the same command does what is missing"


def main(args) -> None:
    if args.check:
        return check(args)

    # ---------------------------------------------------------------- set-up
    rank, num_ranks, device = init_processes()
    ranks = SimpleNamespace(is_main_process=rank == 0, num_processes=num_ranks)
    output_dir = on_main_process(ranks, lambda: claim_output_dir(args))  # if one rank is refused, all are
    source = args.revision, args.cache_dir
    config = read_config(resolve_model_dir(args.model_id, CONFIGS, *source), "transformer")
    if args.save_latents_and_embeddings:
        check_device(args, num_parameters(config), device)

    # ---------------------------------------------------------------- clips, read and hashed by one for all
    videos = on_main_process(ranks, lambda: build_videos_from_args(args, default_fps(config)))
    # Gigabytes, now that the data was found
    model_dir = resolve_model_dir(args.model_id, components(args), *source)
    plan, empty, kept, problems = on_main_process(ranks, lambda: make_plan(args, output_dir, model_dir, videos))
    todo = [item for item in plan if item["missing"]]
    old_content = {path: content_hash(output_dir, path) for path in kept if args.verify and rank == 0}
    forget_undo()
    if rank == 0:
        warn_of_unused(args, output_dir, plan)
        for folder in (output_dir, *filter(Path.is_dir, output_dir.iterdir())):
            remove_unfinished(folder)
    all_gather_objects(None)  # barrier: no rank writes before this
    begin_run(output_dir, rank == 0)
    if todo and rank == 0:
        (output_dir / "data.jsonl").unlink(missing_ok=True)  # it would describe files that are now replaced

    # ---------------------------------------------------------------- captions, then pixels: never both on the GPU
    mine = todo[rank::num_ranks]
    decoded = start_decoding(args, videos, mine)  # prefetched while captions are encoded
    if args.save_latents_and_embeddings:
        if rank == 0:
            warn_of_captions(args, model_dir, todo)
        captions = [*empty, *mine] if rank == 0 else mine
        write_embeddings(args, output_dir, model_dir, captions, config, device, rank)
    unreadable = write_pixels(args, output_dir, model_dir, decoded, mine, device, rank)

    # ---------------------------------------------------------------- manifest
    problems += [line for lines in all_gather_objects(unreadable) for line in lines]
    if rank > 0:
        return  # rank 0 reports: the launcher ends all processes as soon as one fails
    made = {item["index"] for item in todo if is_made(output_dir, item)}
    done = [item for item in plan if not item["missing"] or item["index"] in made]
    write_manifest(output_dir, done)
    logger.info("%s: %d clips, %d prepared now, %d left out", output_dir, len(done), len(made), len(problems))
    report_verified(args, output_dir, old_content)
    prune_unused(args, output_dir, done, problems)
    for line in problems:
        logger.warning("left out: %s", line)
    if problems:
        named = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        num_clips = len(videos) + len(videos.problems)
        raise DataError(f"{len(problems)} of {num_clips} clips left out, the others are in {output_dir}: {named}")
    write_status(output_dir, "complete", 0)


def check(args) -> None:
    """--check: of the model only its config and tokenizer are read, if they can be had."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        model_dir = resolve_model_dir(args.model_id, [*CONFIGS, "tokenizer"], args.revision, args.cache_dir)
        fps = default_fps(read_config(model_dir, "transformer"))
    except UsageError as error:
        model_dir, fps = None, args.target_fps
        logger.warning(
            "captions are not counted in tokens, and clips are read at %g frames per second: %s", fps, error
        )
    check_data.check(args, fps, model_dir)


def init_processes() -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device). Ranks exchange only a few lines of text, so gloo is enough."""
    console.log_to_stderr()
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        agree_on_run()
    if rank > 0:
        console.log_errors_only()
    # LOCAL_RANK, because a global rank is no device index on a second machine
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton's kernels and new streams go to the current device
    return rank, num_ranks, device


def claim_output_dir(args) -> Path:
    """Create the output folder and lock it until this process ends."""
    output_dir = Path(args.output_dir)
    if output_dir.resolve() == Path(args.data_root).resolve():
        raise UsageError(f"--output_dir {output_dir} is --data_root, whose lists would be overwritten; give another")
    forget_undo()  # left by an earlier run in this process
    make_folder(output_dir)
    lock_folder(output_dir)
    return output_dir


def components(args) -> list[str]:
    weights = ["vae", "text_encoder", "tokenizer"] if args.save_latents_and_embeddings else []
    return [*CONFIGS, *weights]


# ---------------------------------------------------------------- needed and existing files


def hash_models(args, model_dir: Path, hashes: HashCache) -> ModelIdentity:
    scaling_factor = load_vae_config(model_dir).scaling_factor
    if not args.save_latents_and_embeddings:
        return ModelIdentity(scaling_factor)
    parts = [model_dir / name for name in ("vae", "text_encoder", "tokenizer")]
    return ModelIdentity(
        scaling_factor,
        *(hash_component(part, files_that_load(part, args.variant), hashes) for part in parts),
        image_noise=(IMAGE_NOISE_MEAN, IMAGE_NOISE_STD),
    )


def make_plan(args, output_dir: Path, model_dir: Path, videos) -> tuple[list, list, list, list]:
    """(items of the clips, of the empty prompt, files kept from an earlier version, a line for each clip left out).

    The work to do, from everything that determines it.
    """
    stems, plan, problems = (
        unique_stems(videos.sources, [clip.window for clip in videos.clips]),
        [],
        list(videos.problems),
    )
    with HashCache(use_cache=not args.verify) as hashes:
        model = hash_models(args, model_dir, hashes)
        for index, stem in enumerate(with_progress(stems, "comparing", delay=5)):
            try:
                plan.append(plan_clip(args, model, videos, index, stem, hashes))
            except OSError as error:  # a bad sector, or a clip deleted since
                problems.append(f"{videos.clips[index].video}: cannot be read ({error.strerror})")
    empty = plan_empty(args, model)
    return plan, empty, mark_missing(args, output_dir, [*plan, *empty]), problems


# ---------------------------------------------------------------- captions


def warn_of_captions(args, model_dir: Path, items: list[dict]) -> None:
    """Warn about captions that any rank will encode."""
    texts: dict[str, list[str]] = {}
    for item in items:
        if any(map(is_embedding, item["missing"])):
            texts.setdefault(item["prompt"], []).append(item["source"])
    if texts:
        warn_of_texts_from_args(args, model_dir, texts, args.max_sequence_length)


def write_embeddings(args, output_dir: Path, model_dir: Path, items, config: dict, device, rank: int) -> None:
    """Write T5 embeddings of the captions that lack one."""
    wanted: dict[str, list] = {}  # prompt -> [(path, key)]
    for item in items:
        for path in filter(is_embedding, sorted(item["missing"])):
            wanted.setdefault(item["prompt"], []).append((path, item["files"][path].now))
    if not wanted:
        return
    max_length = args.max_sequence_length
    if max_length != text_length(config):
        logger.warning("--max_sequence_length %d: this checkpoint was made for %d", max_length, text_length(config))
    tokenizer, text_encoder = load_text_encoder(model_dir, DTYPES[args.dtype], args.variant)
    expand_segments(device)
    at_once = place_text_encoder(text_encoder, device)
    embeds = encode_by_passes(tokenizer, text_encoder, list(wanted), max_length, at_once)
    with WriterPool(args.num_artifact_workers) as writer:
        for files in with_progress(wanted.values(), "captions", disable=rank > 0):
            prompt_embeds = next(embeds)
            for path, key in files:
                writer.submit(write_tensors, output_dir / path, {"prompt_embeds": prompt_embeds}, key)
    del text_encoder, embeds
    free_memory(device)


# ---------------------------------------------------------------- pixels


def start_decoding(args, videos, items) -> Iterator[dict]:
    """Batches of the clips that lack moments or previews; workers start on them now, as far as they prefetch."""
    indices = [item["index"] for item in items if needs_pixels(item)]
    if not indices:
        return iter(())
    return iter(tolerant_loader(videos, indices, args.batch_size, args.dataloader_num_workers, args.pin_memory))


def needs_pixels(item: dict) -> bool:
    return any(not is_embedding(path) for path in item["missing"])


def write_pixels(args, output_dir: Path, model_dir: Path, decoded, items, device, rank: int) -> list[str]:
    """Write the moments and previews of `decoded`, batches of the clips that lack them; a line for each that failed."""
    pending = {item["index"]: item for item in items if needs_pixels(item)}
    if not pending:
        return []
    vae = None
    if any("latents/" in path for item in pending.values() for path in item["missing"]):
        dtype = DTYPES[args.dtype]
        expand_segments(device)
        vae = load_vae(model_dir, dtype, args.variant, slicing=args.use_slicing, tiling=args.use_tiling).to(device)
    problems = []
    bar = progress(len(pending), "clips", disable=rank > 0)
    with bar, WriterPool(args.num_artifact_workers) as writer:
        for batch in INTERRUPTION.until_interrupted(decoded):
            problems += batch["problems"]
            batch_items = [pending[index] for index in batch["index"]]
            if batch_items:
                for path, moments, item in make_moments(args, vae, batch["pixels"], batch_items, device):
                    writer.submit(write_moments, output_dir / path, moments, item["files"][path].now)
                for pixels, item in zip(batch["pixels"], batch_items, strict=True):
                    if f"images/{item['stem']}.png" in item["missing"]:
                        writer.submit(write_preview, output_dir, item, pixels)
            bar.update(len(batch_items) + len(batch["problems"]))
    if INTERRUPTION.reason:
        raise Interrupted(f"stopped by {INTERRUPTION.reason}; {RESUME_ADVICE}")
    return problems


def write_moments(path: Path, moments: HostCopy, key: str) -> None:
    """In a writer's thread: the main thread goes on to the next clip while the GPU is still at this one."""
    write_tensors(path, {"moments": moments.wait()}, key)


def make_moments(args, vae, pixels: torch.Tensor, items: list[dict], device) -> Iterator[tuple[str, HostCopy, dict]]:
    """Yield (path, moments, item) for what is missing; `pixels`: uint8 [B, F', 3, h, w] of one bucket.

    The GPU is not waited for.
    """
    if vae is None:
        return
    pixels = to_device(pixels, device)
    wanted = [place for place, item in enumerate(items) if video_latent(item) in item["missing"]]
    of_images = [place for place, item in enumerate(items) if image_latent(item) in item["missing"]]
    with ThreadPoolExecutor(1) as drawer:
        draw = functools.partial(draw_image_noise, args, pixels.shape[2:])
        noises = drawer.map(draw, [items[place] for place in of_images])
        if wanted:
            videos = pixels if len(wanted) == len(items) else pixels[wanted]
            moments = encode_videos(
                vae, pixels_to_unit(videos).to(vae.dtype)
            )  # not kept in fp32 while they are encoded
            for place, own in zip(wanted, moments, strict=True):
                yield video_latent(items[place]), HostCopy(own), items[place]
        for place, noise in zip(of_images, noises, strict=True):
            moments = encode_noised_frames(vae, pixels_to_unit(pixels[place, 0]), *noise)
            yield image_latent(items[place]), HostCopy(moments), items[place]


def draw_image_noise(args, shape: torch.Size, item: dict) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The noise [3, h, w] of each variant, and their log_sigma [K]. A variant's takes a core 10 ms at 480x720."""
    generator = draw_generator(args.seed, f"image_noise/{item['stem']}")
    log_sigma = torch.randn(args.num_image_variants, generator=generator) * IMAGE_NOISE_STD + IMAGE_NOISE_MEAN
    return [torch.randn(shape, generator=generator) for _ in log_sigma], log_sigma


def encode_noised_frames(vae, frame: torch.Tensor, noise: list, log_sigma: torch.Tensor) -> torch.Tensor:
    """Moments [K, 2C, 1, H, W] of K differently noised copies of the first frame [3, h, w].

    One at a time: the memory peak stays that of the video.
    """
    log_sigma = to_device(log_sigma, frame.device)
    return torch.cat(
        [
            encode_noised_images(vae, frame[None], to_device(noise[k], frame.device)[None], log_sigma[k : k + 1])
            for k in range(len(noise))
        ]
    )


if __name__ == "__main__":
    run_script(lambda: main(ARGS), ARGS.output_dir, RESUME_ADVICE)
