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
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from diffusers.utils import export_to_video
from tqdm import tqdm

from cache import (
    Writer,
    file_hash,
    recorded_key,
    weights_hash,
    write_image,
    write_tensors,
    written_beside,
)
from cogvideox import (
    default_fps,
    encode_captions,
    encode_images,
    encode_videos,
    load_vae,
    load_vae_config,
    num_parameters,
    pixels_to_unit,
    read_config,
    resolve_model_dir,
    text_length,
)
from dataset import build_videos_from_args, tolerant_loader
from errors import DataError
from formats import unique_stems, with_id_token
from objective import draw_generator
from runtime import check_device_from_args, run_script


logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IMAGE_NOISE_MEAN, IMAGE_NOISE_STD = -3.0, 0.5  # log sigma of the noise on I2V's first frame


def main(args) -> None:
    # ---------------------------------------------------------------- set-up
    rank, num_ranks, device = init_processes()
    output_dir = Path(args.output_dir)
    model_dir = resolve_model_dir(args.model_id, components_from_args(args), args.revision, args.cache_dir)
    config = read_config(model_dir, "transformer")
    check_device_from_args(args, num_parameters(config), device)
    fps = args.target_fps if "target_fps" in args.given else default_fps(config)
    if "target_fps" not in args.given:
        logger.info("clips are sampled at %d frames per second (this checkpoint's rate; --target_fps changes it)", fps)

    # ---------------------------------------------------------------- clips
    videos = build_videos_from_args(args, fps)
    problems = list(videos.problems)
    stems = unique_stems([clip.source for clip in videos.clips])
    plan = [plan_clip_from_args(args, model_dir, videos, index, stem, fps) for index, stem in enumerate(stems)]
    for name in sorted({Path(path).parent for item in plan for path in item["files"]}):
        (output_dir / name).mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------- captions, then pixels: never both on the GPU
    if args.save_latents_and_embeddings:
        write_embeddings_from_args(args, output_dir, model_dir, plan[rank::num_ranks], config, device)
    pending = [item for item in plan if not all(is_current(output_dir, path, item) for path in item["pixel_files"])]
    problems += write_pixels_from_args(args, output_dir, model_dir, videos, pending[rank::num_ranks], fps, device)

    # ---------------------------------------------------------------- manifest
    problems = gather(problems, num_ranks)
    done = [item for item in plan if all(is_current(output_dir, path, item) for path in item["files"])]
    if rank == 0:
        write_manifest(output_dir, done)
        logger.info(
            "%s: %d clips, %d of them prepared now, %d left out",
            output_dir, len(done), len(pending) - (len(plan) - len(done)), len(problems),
        )  # fmt: skip
    if problems:
        raise DataError(f"{len(problems)} clips left out, the rest is in {output_dir}: " + "; ".join(problems[:5]))


def init_processes() -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device); ranks meet only twice, at the end, so gloo serves."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    if rank > 0:
        logging.getLogger().setLevel(logging.ERROR)
    # LOCAL_RANK: the global rank names no device of the second machine
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return rank, num_ranks, torch.device(device)


def components_from_args(args) -> list[str]:
    weights = ["vae", "text_encoder", "tokenizer"] if args.save_latents_and_embeddings else []
    return ["transformer/config.json", "vae/config.json", *weights]


def gather(problems: list[str], num_ranks: int) -> list[str]:
    """Everybody's problems, once each; also the barrier before the manifest is written."""
    if num_ranks == 1:
        return problems
    everybody = [None] * num_ranks
    torch.distributed.all_gather_object(everybody, problems)
    return list(dict.fromkeys(line for lines in everybody for line in lines))


# ---------------------------------------------------------------- what a clip needs, and what is there


def plan_clip_from_args(args, model_dir: Path, videos, index: int, stem: str, fps: float) -> dict:
    """The files that a clip needs and, for each kind, a key of everything that decides its content."""
    clip, bucket = videos.clips[index], videos.bucket_of[index]
    pixels_key = {
        "source": file_hash(clip.video), "bucket": list(bucket), "fps": fps, "reshape": args.video_reshape_mode,
        "flip": args.random_flip, "seed": args.seed,
    }  # fmt: skip
    latents_key = {
        **pixels_key, "vae": weights_hash(model_dir / "vae"), "dtype": args.dtype, "tiling": args.use_tiling,
    }  # fmt: skip
    item = {"index": index, "stem": stem, "bucket": bucket, "fps": fps, "source": clip.source}
    item |= {"caption": clip.prompt, "prompt": with_id_token(clip.prompt, args.id_token), "id_token": args.id_token}
    item["scaling_factor"] = load_vae_config(model_dir).scaling_factor
    keys = {}
    if args.save_latents_and_embeddings:
        keys[f"video_latents/{stem}.safetensors"] = latents_key
        if args.save_image_latents:
            keys[f"image_latents/{stem}.safetensors"] = {**latents_key, "variants": args.num_image_variants}
    if args.save_previews or not args.save_latents_and_embeddings:
        keys[f"images/{stem}.png"] = pixels_key  # written after videos/<stem>.mp4: it vouches for both
    item["pixel_files"] = list(keys)
    if args.save_latents_and_embeddings:
        keys[f"prompt_embeds/{stem}.safetensors"] = prompt_key_from_args(args, model_dir, item["prompt"])
    item["files"] = {path: json.dumps(key, sort_keys=True) for path, key in keys.items()}
    return item


def prompt_key_from_args(args, model_dir: Path, prompt: str) -> dict:
    return {
        "prompt": prompt, "text_encoder": weights_hash(model_dir / "text_encoder"), "dtype": args.dtype,
        "tokens": args.max_sequence_length,
    }  # fmt: skip


def is_current(output_dir: Path, path: str, item: dict) -> bool:
    """True if the file is there, readable and made from the same content with the same settings."""
    return recorded_key(output_dir / path) == item["files"][path]


# ---------------------------------------------------------------- captions


def write_embeddings_from_args(args, output_dir: Path, model_dir: Path, plan, config: dict, device) -> None:
    """T5 embeddings of the captions that lack one, and of the empty prompt, which text dropout trains on."""
    empty_key = json.dumps(prompt_key_from_args(args, model_dir, ""), sort_keys=True)
    empty = {"prompt": "", "files": {"prompt_embeds/_empty.safetensors": empty_key}}
    wanted = [(item, path) for item in [empty, *plan] for path in item["files"] if path.startswith("prompt_embeds/")]
    wanted = [(item, path) for item, path in wanted if not is_current(output_dir, path, item)]
    if not wanted:
        return
    max_length = args.max_sequence_length
    if max_length != text_length(config):
        logger.warning("--max_sequence_length %d: this checkpoint was made for %d", max_length, text_length(config))
    table = encode_captions(
        model_dir, [item["prompt"] for item, _ in wanted], DTYPES[args.dtype], device, max_length, args.variant
    )
    for item, path in wanted:
        write_tensors(output_dir / path, {"prompt_embeds": table[item["prompt"]]}, item["files"][path])


# ---------------------------------------------------------------- pixels


def write_pixels_from_args(args, output_dir: Path, model_dir: Path, videos, pending, fps: float, device) -> list[str]:
    """Decode the pending clips and write moments and previews; returns one line for each clip that failed."""
    if not pending:
        return []
    vae = None
    if args.save_latents_and_embeddings:
        dtype = DTYPES[args.dtype]
        vae = load_vae(model_dir, dtype, args.variant, slicing=args.use_slicing, tiling=args.use_tiling).to(device)
    items = {item["index"]: item for item in pending}
    loader = tolerant_loader(
        videos, list(items), args.batch_size, num_workers=args.dataloader_num_workers, pin_memory=args.pin_memory
    )
    problems = []
    with Writer(args.num_artifact_workers) as writer, tqdm(total=len(pending), desc="clips") as bar:
        for batch in loader:
            problems += batch["problems"]
            if batch["index"]:
                batch_items = [items[index] for index in batch["index"]]
                for path, tensors, item in make_tensors_from_args(args, vae, batch["pixels"], batch_items, device):
                    writer.submit(write_tensors, output_dir / path, tensors, item["files"][path])
                for pixels, item in zip(batch["pixels"], batch_items, strict=True):
                    if f"images/{item['stem']}.png" in item["files"]:
                        writer.submit(write_preview, output_dir, item, pixels, fps)
            bar.update(len(batch["index"]) + len(batch["problems"]))
    return problems


def make_tensors_from_args(args, vae, pixels: torch.Tensor, items: list[dict], device):
    """(path, tensors on the CPU, item) for a batch of uint8 pixels [B, F', 3, h, w] of one bucket."""
    if vae is None:
        return
    units = pixels_to_unit(pixels.to(device))
    for moments, item in zip(encode_videos(vae, units).cpu(), items, strict=True):
        yield f"video_latents/{item['stem']}.safetensors", {"moments": moments}, item
    if not args.save_image_latents:
        return
    for frames, item in zip(units, items, strict=True):
        moments = encode_noised_frames(vae, frames[0], args.num_image_variants, args.seed, item["stem"])
        yield f"image_latents/{item['stem']}.safetensors", {"moments": moments.cpu()}, item


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


def write_preview(output_dir: Path, item: dict, pixels: torch.Tensor, fps: float) -> None:
    """The clip as the model sees it, [F', 3, h, w] uint8: an mp4, then its first frame as a PNG with the key in it."""
    frames = pixels.permute(0, 2, 3, 1).numpy()
    with written_beside(output_dir / f"videos/{item['stem']}.mp4") as temporary:
        export_to_video(list(frames / 255.0), str(temporary), fps=round(fps))
    image = f"images/{item['stem']}.png"
    write_image(output_dir / image, frames[0], item["files"][image])


def write_manifest(output_dir: Path, items: list[dict]) -> None:
    """data.jsonl, one object a clip, and the same as prompts.txt and videos.txt, line by line."""
    rows = [manifest_row(item) for item in items]
    one_line = [" ".join(row["prompt"].split("\n")) for row in rows]
    texts = {
        "data.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "prompts.txt": "".join(f"{prompt}\n" for prompt in one_line),
        "videos.txt": "".join(f"{row['video']}\n" for row in rows),
    }
    for name, text in texts.items():
        with written_beside(output_dir / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


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
    run_script(lambda: main(ARGS), ARGS.output_dir)
