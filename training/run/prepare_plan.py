"""Planning for prepare_dataset.py: the files that each clip needs, which of them exist, and the manifest."""

import json
import logging
import re
from pathlib import Path
from typing import NamedTuple

import torch

from base.files import written_beside
from base.hashes import HashCache
from data.artifacts import write_image, write_video
from data.clip_lists import with_id_token
from data.prepared import (
    CURRENT,
    EARLIER,
    EMPTY,
    MISSING,
    VERSION,
    Component,
    FileKey,
    content_hash,
    file_key,
    file_state,
    pixels_key,
    prune,
    unused_files,
    used_files,
)


logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- needed and existing files


class ModelIdentity(NamedTuple):
    """What keys and manifest rows need to know about the model; hashes only if latents are prepared."""

    scaling_factor: float
    vae: Component | None = None
    text_encoder: Component | None = None
    tokenizer: Component | None = None
    image_noise: tuple[float, float] | None = None  # mean and standard deviation of log sigma


def plan_clip(args, model: ModelIdentity, videos, index: int, stem: str, hashes: HashCache) -> dict:
    """The files that a clip needs, each with its cache key."""
    clip, bucket = videos.clips[index], videos.clip_buckets[index]
    earlier = {
        "source": hashes.hash(clip.video), "bucket": list(bucket), "fps": videos.fps, "reshape": args.video_reshape_mode,
        "flip": args.random_flip, "seed": args.seed,
    }  # fmt: skip
    now = pixels_key(earlier, videos.draw_keys[index], "decord" if args.video_backend == "decord" else "pyav")
    item = {"index": index, "stem": stem, "bucket": bucket, "fps": videos.fps, "source": clip.source}
    item |= {"repeats": clip.repeats, "window": clip.window}
    item |= {"caption": clip.prompt, "prompt": with_id_token(clip.prompt, args.id_token), "id_token": args.id_token}
    item |= {"scaling_factor": model.scaling_factor, "files": {}}
    if args.save_previews or not args.save_latents_and_embeddings:
        item["files"][f"images/{stem}.png"] = file_key(now, earlier)  # written after the video: stands for both
    if args.save_latents_and_embeddings:
        item["files"] |= tensor_keys(args, model, item, now, earlier)
    return item


def tensor_keys(args, model: ModelIdentity, item: dict, now: dict, earlier: dict) -> dict:
    """Keys of a clip's moments and prompt embedding, derived from the keys of its pixels."""
    both = {"dtype": args.dtype, "tiling": args.use_tiling}
    earlier = {**earlier, **both, "vae": model.vae.earlier, "variant": args.variant}
    now = {**now, **both, "vae": model.vae.now}
    keys = {video_latent(item): file_key(now, earlier)}
    if args.save_image_latents:
        variants = {"variants": args.num_image_variants}
        noise = {"noise": list(model.image_noise)}
        keys[image_latent(item)] = file_key({**now, **variants, **noise}, {**earlier, **variants})
    keys[f"prompt_embeds/{item['stem']}.safetensors"] = prompt_key(args, model, item["prompt"])
    return keys


def prompt_key(args, model: ModelIdentity, prompt: str) -> FileKey:
    both = {"prompt": prompt, "dtype": args.dtype, "tokens": args.max_sequence_length}
    now = {"version": VERSION, "text_encoder": model.text_encoder.now, "tokenizer": model.tokenizer.now}
    earlier = {
        "text_encoder": model.text_encoder.earlier,
        "tokenizer": model.tokenizer.earlier,
        "variant": args.variant,
    }
    return file_key({**both, **now}, {**both, **earlier})


def plan_empty(args, model: ModelIdentity) -> list[dict]:
    """The empty prompt, for text dropout; nothing if captions are not encoded."""
    if not args.save_latents_and_embeddings:
        return []
    return [{"prompt": "", "files": {EMPTY: prompt_key(args, model, "")}}]


def mark_missing(args, output_dir: Path, items: list[dict]) -> list[str]:
    """Set each item's "missing" files; returns those kept from an earlier version with the same flags and content."""
    accepted, kept = {CURRENT} if args.verify else {CURRENT, EARLIER}, []
    for item in items:
        states = {path: file_state(output_dir, path, key, args.verify) for path, key in item["files"].items()}
        if any(state == MISSING and not is_embedding(path) for path, state in states.items()):
            # Version 1 may have started the clip elsewhere: its latents, first frames and preview are remade together
            states |= {path: MISSING for path in states if not is_embedding(path) and states[path] == EARLIER}
        item["missing"] = {path for path, state in states.items() if state not in accepted}
        kept += [path for path, state in states.items() if state == EARLIER]
    if kept and not args.verify:
        logger.info(
            "%d files were prepared by an earlier version and are kept; --verify checks them in full", len(kept)
        )
    return kept


def report_verified(args, output_dir: Path, old_content: dict[str, str]) -> None:
    """`old_content`: {path: content hash} of files prepared by an earlier version."""
    if args.verify:
        kept = [path for path in old_content if (output_dir / path).exists()]
        num_differing = sum(content_hash(output_dir, path) != old_content[path] for path in kept)
        logger.info(
            "--verify: %d files of an earlier version were made again, %d of them were different",
            len(kept),
            num_differing,
        )


def warn_of_unused(args, output_dir: Path, plan: list[dict]) -> None:
    unused = unused_files(output_dir, files_of(plan))
    if unused and not args.prune:
        logger.warning(
            "%s: holds %d files (of %d clips) that this command does not use; data.jsonl will not name them, and they stay: "
            "--prune removes them, another --output_dir keeps both sets",
            output_dir, len(unused), len({path.stem for path in unused}),
        )  # fmt: skip


def prune_unused(args, output_dir: Path, done: list[dict], problems: list[str]) -> None:
    """With --prune, delete files that no row uses; not while clips are skipped, since those may be fixed later."""
    if args.prune and problems:
        logger.warning("--prune: nothing is removed while %d clips are left out", len(problems))
    elif args.prune:
        num_removed = prune(output_dir, files_of(done))
        logger.info("--prune: %d files removed that no row of data.jsonl names", num_removed)


def files_of(items: list[dict]) -> set[str]:
    return used_files(path for item in items for path in item["files"])


def is_made(output_dir: Path, item: dict) -> bool:
    """True once all missing files of the item have been written."""
    return all(file_state(output_dir, path, item["files"][path]) == CURRENT for path in item["missing"])


def is_embedding(path: str) -> bool:
    return path.startswith("prompt_embeds/")


def video_latent(item: dict) -> str:
    return f"video_latents/{item['stem']}.safetensors"


def image_latent(item: dict) -> str:
    return f"image_latents/{item['stem']}.safetensors"


# ---------------------------------------------------------------- lists and previews


def write_preview(output_dir: Path, item: dict, pixels: torch.Tensor) -> None:
    """Write the clip as the model sees it, uint8 [F', 3, h, w]: an mp4, then its first frame as a PNG with the key."""
    frames = pixels.permute(0, 2, 3, 1).numpy()
    write_video(output_dir / f"videos/{item['stem']}.mp4", frames, item["fps"])
    image = f"images/{item['stem']}.png"
    write_image(output_dir / image, frames[0], item["files"][image].now)


def write_manifest(output_dir: Path, items: list[dict]) -> None:
    """Write data.jsonl, one object per clip, and the same clips as prompts.txt and videos.txt."""
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
    use = {"repeats": item["repeats"]} if item["repeats"] > 1 else {}
    use |= {} if item["window"] is None else {"window": item["window"]}
    return {
        "prompt": item["caption"],
        "prompt_embed": path("prompt_embeds", ".safetensors"),
        "image": image,
        "image_latent": path("image_latents", ".safetensors"),
        "video": f"videos/{stem}.mp4" if image else item["source"],
        "video_latent": path("video_latents", ".safetensors"),
        "metadata": {
            "num_frames": frames, "height": height, "width": width, "fps": item["fps"], "source": item["source"],
            "id_token": item["id_token"], "scaling_factor": item["scaling_factor"], **use,
        },
    }  # fmt: skip
