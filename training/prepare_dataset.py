#!/usr/bin/env python
"""Precompute what training reads: VAE moments of every clip and T5 embeddings of every caption.

python training/prepare_dataset.py --model_id zai-org/CogVideoX-2b --data_root video-dataset-disney \\
    --caption_column prompt.txt --video_column videos.txt --output_dir disney-prepared \\
    --height_buckets 480 --width_buckets 720 --frame_buckets 49 --save_latents_and_embeddings

torchrun --nproc_per_node 2 training/prepare_dataset.py ... splits the clips over two GPUs. A second run of the same
command does only what is missing or has changed. Bad clips are named and left out, the rest is finished, exit code 65.
"""

from args import parse_prepare_args


ARGS = parse_prepare_args() if __name__ == "__main__" else None  # before the heavy imports: --help answers at once

import json
import logging
import os
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed

from allocator import expand_segments
from bars import progress, tracked
from cache import (
    Writer,
    write_image,
    write_tensors,
    write_video,
)
from captions import warn_of_texts_from_args
from cogvideox import (
    CONFIGS,
    IMAGE_NOISE_MEAN,
    IMAGE_NOISE_STD,
    default_fps,
    encode_images,
    encode_prompts,
    encode_videos,
    files_that_load,
    free_memory,
    load_text_encoder,
    load_vae,
    load_vae_config,
    num_parameters,
    pixels_to_unit,
    place_text_encoder,
    read_config,
    resolve_model_dir,
    text_length,
)
from console import log_errors_only, log_to_stderr
from dataset import build_videos_from_args, tolerant_loader
from durable import TEMPORARY, keep, lock_folder, make_folder, written_beside
from errors import DataError, Interrupted, UsageError
from formats import unique_stems, with_id_token
from hashes import Hashes
from objective import draw_generator
from prepared import (
    CURRENT,
    EARLIER,
    EMPTY,
    MISSING,
    VERSION,
    Component,
    Key,
    content_hash,
    file_key,
    hash_component,
    named_files,
    pixels_key,
    prune,
    state_of,
    unnamed_files,
)
from runtime import agree_on_run, check_device_from_args, on_main_process, run_script
from signals import INTERRUPTION
from status import begin_run, write_status


logger = logging.getLogger(__name__)

GO_ON = "the same command does what is missing"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(args) -> None:
    # ---------------------------------------------------------------- set-up
    rank, num_ranks, device = init_processes()
    ranks = SimpleNamespace(is_main_process=rank == 0, num_processes=num_ranks)
    output_dir = on_main_process(ranks, lambda: output_dir_from_args(args))  # refused by one, refused by all
    source = args.revision, args.cache_dir
    config = read_config(resolve_model_dir(args.model_id, CONFIGS, *source), "transformer")
    if args.save_latents_and_embeddings:
        check_device_from_args(args, num_parameters(config), device)
    fps = args.target_fps if "target_fps" in args.given else default_fps(config)

    # ---------------------------------------------------------------- clips, read and hashed by one for all
    videos = on_main_process(ranks, lambda: build_videos_from_args(args, fps))
    tell_fps_from_args(args, default_fps(config))
    # Gigabytes, for data that is there
    model_dir = resolve_model_dir(args.model_id, components_from_args(args), *source)
    plan, empty, kept, problems = on_main_process(ranks, lambda: plan_from_args(args, output_dir, model_dir, videos))
    todo = [item for item in plan if item["missing"]]
    old_content = {path: content_hash(output_dir, path) for path in kept if args.verify and rank == 0}
    keep()
    if rank == 0:
        warn_of_unnamed_from_args(args, output_dir, plan)
        remove_unfinished(output_dir)
    gather([], num_ranks)  # nobody writes before that
    begin_run(output_dir, rank == 0)
    if todo and rank == 0:
        (output_dir / "data.jsonl").unlink(missing_ok=True)  # it would describe files that are now replaced

    # ---------------------------------------------------------------- captions, then pixels: never both on the GPU
    mine = todo[rank::num_ranks]
    if args.save_latents_and_embeddings:
        if rank == 0:
            warn_of_captions_from_args(args, model_dir, todo)
        captions = [*empty, *mine] if rank == 0 else mine
        write_embeddings_from_args(args, output_dir, model_dir, captions, config, device, rank)
    unreadable = write_pixels_from_args(args, output_dir, model_dir, videos, mine, device, rank)

    # ---------------------------------------------------------------- manifest
    problems += gather(unreadable, num_ranks)
    if rank > 0:
        return  # rank 0 reports: the launcher ends all processes as soon as one fails
    made = {item["index"] for item in todo if is_made(output_dir, item)}
    done = [item for item in plan if not item["missing"] or item["index"] in made]
    write_manifest(output_dir, done)
    logger.info("%s: %d clips, %d prepared now, %d left out", output_dir, len(done), len(made), len(problems))
    report_verified_from_args(args, output_dir, old_content)
    prune_from_args(args, output_dir, done, problems)
    for line in problems:
        logger.warning("left out: %s", line)
    if problems:
        named = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        num_clips = len(videos) + len(videos.problems)
        raise DataError(f"{len(problems)} of {num_clips} clips left out, the others are in {output_dir}: {named}")
    write_status(output_dir, "complete", 0)


def init_processes() -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device); ranks exchange a few lines of text, so gloo serves."""
    log_to_stderr()
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        agree_on_run()
    if rank > 0:
        log_errors_only()
    # LOCAL_RANK: the global rank names no device of the second machine
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return rank, num_ranks, torch.device(device)


def output_dir_from_args(args) -> Path:
    """The folder, held by this process until it ends."""
    output_dir = Path(args.output_dir)
    if output_dir.resolve() == Path(args.data_root).resolve():
        raise UsageError(f"--output_dir {output_dir} is --data_root, whose lists would be overwritten; give another")
    keep()  # of a run before it in this process
    make_folder(output_dir)
    lock_folder(output_dir)
    return output_dir


def remove_unfinished(output_dir: Path) -> None:
    """What killed processes left half written."""
    for left in [*output_dir.glob(f"{TEMPORARY}*"), *output_dir.glob(f"*/{TEMPORARY}*")]:
        left.unlink()


def tell_fps_from_args(args, checkpoint_fps: int) -> None:
    """At which rate clips are sampled: that of --target_fps, else the one that the checkpoint was made for."""
    if "target_fps" not in args.given:
        logger.info(
            "clips are sampled at %d frames per second (this checkpoint's rate; --target_fps changes it)",
            checkpoint_fps,
        )
    elif args.target_fps != checkpoint_fps:
        logger.warning("--target_fps %d: this checkpoint was made for %d", args.target_fps, checkpoint_fps)


def components_from_args(args) -> list[str]:
    weights = ["vae", "text_encoder", "tokenizer"] if args.save_latents_and_embeddings else []
    return [*CONFIGS, *weights]


def gather(lines: list[str], num_ranks: int) -> list[str]:
    """All ranks' lines; also a barrier."""
    if num_ranks == 1:
        return lines
    everybody = [None] * num_ranks
    torch.distributed.all_gather_object(everybody, lines)
    return [line for lines in everybody for line in lines]


# ---------------------------------------------------------------- what a clip needs, and what is there


class Model(NamedTuple):
    """What keys and rows must know of the model; without latents no hashes."""

    scaling_factor: float
    vae: Component | None = None
    text_encoder: Component | None = None
    tokenizer: Component | None = None


def hash_model_from_args(args, model_dir: Path, hashes: Hashes) -> Model:
    scaling_factor = load_vae_config(model_dir).scaling_factor
    if not args.save_latents_and_embeddings:
        return Model(scaling_factor)
    parts = [model_dir / name for name in ("vae", "text_encoder", "tokenizer")]
    return Model(
        scaling_factor, *(hash_component(part, files_that_load(part, args.variant), hashes) for part in parts)
    )


def plan_from_args(args, output_dir: Path, model_dir: Path, videos) -> tuple[list, list, list, list]:
    """(items of the clips, of the empty prompt, files that an earlier version prepared, a line for each clip that is
    left out): what there is to do, from everything that decides it.
    """
    stems, plan, problems = unique_stems([clip.source for clip in videos.clips]), [], list(videos.problems)
    with Hashes(believe=not args.verify) as hashes:
        model = hash_model_from_args(args, model_dir, hashes)
        for index, stem in enumerate(tracked(stems, "comparing", delay=5)):
            try:
                plan.append(plan_clip_from_args(args, model, videos, index, stem, hashes))
            except OSError as error:  # a bad sector, or a clip that has gone since
                problems.append(f"{videos.clips[index].video}: cannot be read ({error.strerror})")
    empty = plan_empty_from_args(args, model)
    return plan, empty, compare_from_args(args, output_dir, [*plan, *empty]), problems


def plan_clip_from_args(args, model: Model, videos, index: int, stem: str, hashes: Hashes) -> dict:
    """The files that a clip needs and, for each, the key of everything that decides its content."""
    clip, bucket = videos.clips[index], videos.bucket_of[index]
    earlier = {
        "source": hashes.of(clip.video), "bucket": list(bucket), "fps": videos.fps, "reshape": args.video_reshape_mode,
        "flip": args.random_flip, "seed": args.seed,
    }  # fmt: skip
    now = pixels_key(earlier, videos.places[index], "decord" if args.video_backend == "decord" else "pyav")
    item = {"index": index, "stem": stem, "bucket": bucket, "fps": videos.fps, "source": clip.source}
    item |= {"caption": clip.prompt, "prompt": with_id_token(clip.prompt, args.id_token), "id_token": args.id_token}
    item |= {"scaling_factor": model.scaling_factor, "files": {}}
    if args.save_previews or not args.save_latents_and_embeddings:
        item["files"][f"images/{stem}.png"] = file_key(now, earlier)  # written after the video: it vouches for both
    if args.save_latents_and_embeddings:
        item["files"] |= tensor_keys_from_args(args, model, item, now, earlier)
    return item


def tensor_keys_from_args(args, model: Model, item: dict, now: dict, earlier: dict) -> dict:
    """Keys of a clip's moments and embedding, from those of its pixels."""
    both = {"dtype": args.dtype, "tiling": args.use_tiling}
    earlier = {**earlier, **both, "vae": model.vae.earlier, "variant": args.variant}
    now = {**now, **both, "vae": model.vae.now}
    keys = {video_latent(item): file_key(now, earlier)}
    if args.save_image_latents:
        variants = {"variants": args.num_image_variants}
        noise = {"noise": [IMAGE_NOISE_MEAN, IMAGE_NOISE_STD]}
        keys[image_latent(item)] = file_key({**now, **variants, **noise}, {**earlier, **variants})
    keys[f"prompt_embeds/{item['stem']}.safetensors"] = prompt_key_from_args(args, model, item["prompt"])
    return keys


def prompt_key_from_args(args, model: Model, prompt: str) -> Key:
    both = {"prompt": prompt, "dtype": args.dtype, "tokens": args.max_sequence_length}
    now = {"version": VERSION, "text_encoder": model.text_encoder.now, "tokenizer": model.tokenizer.now}
    earlier = {
        "text_encoder": model.text_encoder.earlier,
        "tokenizer": model.tokenizer.earlier,
        "variant": args.variant,
    }
    return file_key({**both, **now}, {**both, **earlier})


def plan_empty_from_args(args, model: Model) -> list[dict]:
    """The empty prompt, which text dropout trains on; nothing where no captions are embedded."""
    if not args.save_latents_and_embeddings:
        return []
    return [{"prompt": "", "files": {EMPTY: prompt_key_from_args(args, model, "")}}]


def compare_from_args(args, output_dir: Path, items: list[dict]) -> list[str]:
    """Set what each item lacks; returns the files that an earlier version prepared, by the same flags and content."""
    accepted, kept = {CURRENT} if args.verify else {CURRENT, EARLIER}, []
    for item in items:
        states = {path: state_of(output_dir, path, key, args.verify) for path, key in item["files"].items()}
        if any(state == MISSING and not is_embedding(path) for path, state in states.items()):
            # Frames of version 1 may start elsewhere: a clip's video, first frames and preview are made together
            states |= {path: MISSING for path in states if not is_embedding(path) and states[path] == EARLIER}
        item["missing"] = {path for path, state in states.items() if state not in accepted}
        kept += [path for path, state in states.items() if state == EARLIER]
    if kept and not args.verify:
        logger.info(
            "%d files were prepared by an earlier version and are kept; --verify checks them in full", len(kept)
        )
    return kept


def report_verified_from_args(args, output_dir: Path, old_content: dict[str, str]) -> None:
    """`old_content`: hashes of what an earlier version had prepared, by path."""
    if args.verify:
        kept = [path for path in old_content if (output_dir / path).exists()]
        num_differing = sum(content_hash(output_dir, path) != old_content[path] for path in kept)
        logger.info(
            "--verify: %d files of an earlier version were made again, %d of them were different",
            len(kept),
            num_differing,
        )


def warn_of_unnamed_from_args(args, output_dir: Path, plan: list[dict]) -> None:
    unnamed = unnamed_files(output_dir, files_of(plan))
    if unnamed and not args.prune:
        logger.warning(
            "%s: holds %d files (of %d clips) that this command does not use; data.jsonl will not name them, and they stay: "
            "--prune removes them, another --output_dir keeps both sets",
            output_dir, len(unnamed), len({path.stem for path in unnamed}),
        )  # fmt: skip


def prune_from_args(args, output_dir: Path, done: list[dict], problems: list[str]) -> None:
    """With --prune, remove what no row names: not while clips are left out, which may be there again tomorrow."""
    if args.prune and problems:
        logger.warning("--prune: nothing is removed while %d clips are left out", len(problems))
    elif args.prune:
        num_removed = prune(output_dir, files_of(done))
        logger.info("--prune: %d files removed that no row of data.jsonl names", num_removed)


def files_of(items: list[dict]) -> set[str]:
    return named_files(path for item in items for path in item["files"])


def is_made(output_dir: Path, item: dict) -> bool:
    """True if all that the item lacked has been made."""
    return all(state_of(output_dir, path, item["files"][path]) == CURRENT for path in item["missing"])


def is_embedding(path: str) -> bool:
    return path.startswith("prompt_embeds/")


def video_latent(item: dict) -> str:
    return f"video_latents/{item['stem']}.safetensors"


def image_latent(item: dict) -> str:
    return f"image_latents/{item['stem']}.safetensors"


# ---------------------------------------------------------------- captions


def warn_of_captions_from_args(args, model_dir: Path, items: list[dict]) -> None:
    """Of all ranks' captions that are to be encoded."""
    texts: dict[str, list[str]] = {}
    for item in items:
        if any(map(is_embedding, item["missing"])):
            texts.setdefault(item["prompt"], []).append(item["source"])
    if texts:
        warn_of_texts_from_args(args, model_dir, texts, args.max_sequence_length)


def write_embeddings_from_args(
    args, output_dir: Path, model_dir: Path, items, config: dict, device, rank: int
) -> None:
    """T5 embeddings of the captions that lack one."""
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
    place_text_encoder(text_encoder, device)
    # One at a time: 226 tokens fill a GPU, and what a caption's neighbours are must not change its bits
    for prompt, files in tracked(wanted.items(), "captions", disable=rank > 0):
        prompt_embeds = encode_prompts(tokenizer, text_encoder, [prompt], max_length)[0].cpu()
        for path, key in files:
            write_tensors(output_dir / path, {"prompt_embeds": prompt_embeds}, key)
    del text_encoder
    free_memory(device)


# ---------------------------------------------------------------- pixels


def write_pixels_from_args(args, output_dir: Path, model_dir: Path, videos, items, device, rank: int) -> list[str]:
    """Decode what lacks moments or previews and write them; returns one line for each clip that failed."""
    pending = {item["index"]: item for item in items if any(not is_embedding(path) for path in item["missing"])}
    if not pending:
        return []
    vae = None
    if any("latents/" in path for item in pending.values() for path in item["missing"]):
        dtype = DTYPES[args.dtype]
        expand_segments(device)
        vae = load_vae(model_dir, dtype, args.variant, slicing=args.use_slicing, tiling=args.use_tiling).to(device)
    loader = tolerant_loader(
        videos, list(pending), args.batch_size, num_workers=args.dataloader_num_workers, pin_memory=args.pin_memory
    )
    problems = []
    bar = progress(len(pending), "clips", disable=rank > 0)
    with bar, Writer(args.num_artifact_workers) as writer:
        for batch in INTERRUPTION.until_asked(loader):
            problems += batch["problems"]
            batch_items = [pending[index] for index in batch["index"]]
            if batch_items:
                for path, tensors, item in make_tensors_from_args(args, vae, batch["pixels"], batch_items, device):
                    writer.submit(write_tensors, output_dir / path, tensors, item["files"][path].now)
                for pixels, item in zip(batch["pixels"], batch_items, strict=True):
                    if f"images/{item['stem']}.png" in item["missing"]:
                        writer.submit(write_preview, output_dir, item, pixels)
            bar.update(len(batch_items) + len(batch["problems"]))
    if INTERRUPTION.reason:
        raise Interrupted(f"stopped by {INTERRUPTION.reason}; {GO_ON}")
    return problems


def make_tensors_from_args(args, vae, pixels: torch.Tensor, items: list[dict], device):
    """(path, tensors on the CPU, item) of what is missing, for uint8 pixels [B, F', 3, h, w] of one bucket."""
    if vae is None:
        return
    units = pixels_to_unit(pixels.to(device))
    wanted = [place for place, item in enumerate(items) if video_latent(item) in item["missing"]]
    if wanted:
        for place, moments in zip(wanted, encode_videos(vae, units[wanted]).cpu(), strict=True):
            yield video_latent(items[place]), {"moments": moments}, items[place]
    for frames, item in zip(units, items, strict=True):
        path = image_latent(item)
        if path in item["missing"]:
            moments = encode_noised_frames(vae, frames[0], args.num_image_variants, args.seed, item["stem"])
            yield path, {"moments": moments.cpu()}, item


def encode_noised_frames(vae, frame: torch.Tensor, num_variants: int, seed: int, stem: str) -> torch.Tensor:
    """Moments [K, 2C, 1, H, W] of K differently noised copies of the first frame [3, h, w]."""
    generator = draw_generator(seed, f"image_noise/{stem}")
    log_sigma = torch.randn(num_variants, generator=generator) * IMAGE_NOISE_STD + IMAGE_NOISE_MEAN
    variants = []
    for k in range(num_variants):  # one at a time: the peak stays that of the video
        noise = torch.randn(frame.shape, generator=generator).to(frame.device)
        variants.append(encode_images(vae, frame[None], noise[None], log_sigma[k : k + 1].to(frame.device)))
    return torch.cat(variants)


# ---------------------------------------------------------------- files


def write_preview(output_dir: Path, item: dict, pixels: torch.Tensor) -> None:
    """The clip as the model sees it, [F', 3, h, w] uint8: an mp4, then its first frame as a PNG with the key in it."""
    frames = pixels.permute(0, 2, 3, 1).numpy()
    write_video(output_dir / f"videos/{item['stem']}.mp4", frames, item["fps"])
    image = f"images/{item['stem']}.png"
    write_image(output_dir / image, frames[0], item["files"][image].now)


def write_manifest(output_dir: Path, items: list[dict]) -> None:
    """data.jsonl, one object a clip, and the same as prompts.txt and videos.txt, line by line."""
    rows = [manifest_row(item) for item in items]
    texts = {
        "data.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "prompts.txt": "".join(one_line(row["prompt"]) for row in rows),
        "videos.txt": "".join(one_line(row["video"]) for row in rows),
    }
    for name, text in texts.items():
        with written_beside(output_dir / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def one_line(text: str) -> str:
    return re.sub(r"\r\n|\r|\n", " ", text) + "\n"


def manifest_row(item: dict) -> dict:
    stem, files = item["stem"], item["files"]

    def path(folder: str, suffix: str) -> str | None:
        return f"{folder}/{stem}{suffix}" if f"{folder}/{stem}{suffix}" in files else None

    image = path("images", ".png")
    frames, height, width = item["bucket"]
    return {
        "prompt": item["caption"],
        "prompt_embed": path("prompt_embeds", ".safetensors"),
        "image": image,
        "image_latent": path("image_latents", ".safetensors"),
        "video": f"videos/{stem}.mp4" if image else item["source"],
        "video_latent": path("video_latents", ".safetensors"),
        "metadata": {
            "num_frames": frames, "height": height, "width": width, "fps": item["fps"], "source": item["source"],
            "id_token": item["id_token"], "scaling_factor": item["scaling_factor"],
        },
    }  # fmt: skip


if __name__ == "__main__":
    run_script(lambda: main(ARGS), ARGS.output_dir, GO_ON)
