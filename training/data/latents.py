"""Dataset of prepared latents and embeddings, written by prepare_dataset.py or in the original's .pt layout.

Sizes come from the manifest. Axes: F latent frames, C latent channels, H/W latent size, S text tokens, D text width, K
noised variants of the first frame.
"""

import json
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from base.draws import draw_seed
from base.errors import DataError, first_few, first_line
from base.file_kinds import placeholder
from base.hashes import hash_files, hash_rows
from data.buckets import SIZE_FLAGS, Bucket, image_buckets
from data.clip_lists import as_on_disk, draw_keys, repeated_keys, resolve_inside, windowed
from data.headers import is_image
from data.layouts import read_text_rows
from data.tables import MAX_REPEATS, Row, read_text
from data.videos import log_images_left_out


logger = logging.getLogger(__name__)

PREPARE_AGAIN = "run prepare_dataset.py --save_latents_and_embeddings --output_dir {} again"


class Latent(NamedTuple):
    """The files of a prepared clip, and where it came from."""

    moments: Path
    prompt_embeds: Path
    image_moments: Path | None
    source: str
    prompt: str
    bucket: Bucket
    clip: str  # the path in the list that it was prepared from
    repeats: int | None = None  # how often it is used per epoch, if that was said when it was prepared
    window: int | None = None  # clip_lists.Clip.window


class LatentDataset(Dataset):
    """Moments and prompt embeddings from a folder of prepare_dataset.py, or .pt files in the original's layout.

    `image_moments` is included if every clip has them, unless `with_images` is off: one of the K variants, drawn per
    epoch. With them, for image-to-video, clips prepared from still images are left out.
    """

    def __init__(  # noqa: PLR0913 - by keyword, one a flag
        self,
        root,
        *,
        buckets: Sequence[Bucket] | None = None,
        caption_column: str = "prompts.txt",
        video_column: str = "videos.txt",
        seed: int = 0,
        id_token: str | None = None,
        text_dropout: bool = False,
        scaling_factor: float | None = None,
        allow_outside: bool = False,
        with_images: bool = True,
    ):
        self.root, self.seed = Path(root), seed
        if not self.root.is_dir():
            what = "a file" if self.root.is_file() else "no such folder"
            raise DataError(
                f"{root}: {what} (--data_root); give the folder that prepare_dataset.py wrote, or one of videos"
            )
        manifest = self.root / "data.jsonl"
        if not manifest.is_file() and not (self.root / "video_latents").is_dir():
            raise DataError(
                f"{root}: not a prepared folder, it holds neither data.jsonl nor video_latents/; prepare the clips with "
                "prepare_dataset.py --save_latents_and_embeddings, or leave out --load_tensors to train on videos"
            )
        rows = read_manifest(manifest) if manifest.is_file() else []
        if rows and not all(str(row.get("video_latent")).endswith(".pt") for _, row in rows):
            prepared_for = id_token, scaling_factor, allow_outside
            self.latents = [manifest_latent(manifest, number, row, *prepared_for) for number, row in rows]
            refuse_missing(self.root, self.latents)
        else:
            self.latents = original_latents(self.root, caption_column, video_column, allow_outside)
        if with_images:
            self.latents = without_images(self.latents)
        self.clip_buckets = [latent.bucket for latent in self.latents]
        self.prompts = [latent.prompt for latent in self.latents]
        self.sources = [latent.source for latent in self.latents]
        self.draw_keys = draw_keys(windowed(latent.clip, latent.window) for latent in self.latents)
        self.has_image_latents = with_images and all(latent.image_moments for latent in self.latents)
        refuse_unknown_buckets(self.latents, buckets)
        if text_dropout:
            self.empty_prompt_embeds()

    def repeat(self, default: int = 1) -> None:
        """Use each clip as often per epoch as the manifest says, or `default` times."""
        repeats = [latent.repeats or default for latent in self.latents]
        pairs = zip(self.latents, repeats, strict=True)
        self.latents = [latent for latent, count in pairs for _ in range(count)]
        self.clip_buckets = [latent.bucket for latent in self.latents]
        self.prompts = [latent.prompt for latent in self.latents]
        self.sources = [latent.source for latent in self.latents]
        self.draw_keys = repeated_keys(self.draw_keys, repeats)

    def require_image_latents(self) -> None:
        """Raise DataError unless image-to-video can train on the folder."""
        if not self.has_image_latents:
            raise DataError(
                f"{self.root}: holds no image latents for some clips; run the prepare_dataset.py command that made it "
                "again with --save_image_latents"
            )
        if any(latent.image_moments.suffix == ".pt" for latent in self.latents):
            logger.warning("%s: first frames without noise, while CogVideoX trains on noised ones", self.root)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, key: int) -> dict:
        """{"moments": [2C, F, H, W], "prompt_embeds": [S, D], "index"} and "image_moments" [2C, 1, H, W], as stored."""
        epoch, index = divmod(key, len(self))
        latent = self.latents[index]
        sample = {
            "moments": read_tensor(latent.moments, "moments"),
            "prompt_embeds": read_tensor(latent.prompt_embeds, "prompt_embeds"),
            "index": index,
        }
        if self.has_image_latents:
            variants = self.image_variants(index)
            draw = random.Random(draw_seed(self.seed, "image_variant", epoch, self.draw_keys[index]))
            sample["image_moments"] = variants[draw.randrange(len(variants))].clone()
        return sample

    def image_variants(self, index: int) -> torch.Tensor:
        """Moments [K, 2C, 1, H, W] of the first frame; [2C, 1, H, W] in the original's layout, K = 1."""
        variants = read_tensor(self.latents[index].image_moments, "moments")
        return variants[None] if variants.ndim == 4 else variants

    def is_random(self) -> bool:
        """True if the first frame has several variants; all clips of a folder have the same number."""
        return self.has_image_latents and len(self.image_variants(0)) > 1

    def empty_prompt_embeds(self) -> torch.Tensor:
        """[S, D] of the empty prompt, for text dropout; DataError if the folder has none."""
        path = self.root / "prompt_embeds/_empty.safetensors"
        if not path.is_file():
            raise DataError(f"{path}: missing, and --text_dropout needs it; {PREPARE_AGAIN.format(self.root)}")
        return read_tensor(path, "prompt_embeds")

    def fingerprint(self, as_written: bool = True) -> str:
        """Hash of the clips, captions and sizes in their order; paths as written in the manifest."""
        return hash_rows(
            (windowed(latent.source, latent.window), latent.prompt, latent.bucket) for latent in self.latents
        )

    def hash_files(self) -> str:
        """Hash of the content of all files read, independent of their location."""
        files = (path for latent in self.latents for path in (latent.moments, latent.prompt_embeds))
        images = (latent.image_moments for latent in self.latents) if self.has_image_latents else ()
        return hash_files([*files, *images])


def read_manifest(path: Path) -> list[tuple[int, dict]]:
    """(line number, object) of every non-blank line."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, dict(json.loads(line))))
        except (ValueError, TypeError) as error:
            message = f"{path}:{number}: not a JSON object; {PREPARE_AGAIN.format(path.parent)}"
            raise DataError(message) from error
    return rows


def manifest_latent(
    manifest: Path, number: int, row: dict, id_token: str | None, scaling_factor: float | None, allow_outside: bool
) -> Latent:
    root, place = manifest.parent, f"{manifest}:{number}"
    try:
        files = [row["video_latent"], row["prompt_embed"], row.get("image_latent")]
        sizes = row["metadata"]
        bucket = Bucket(int(sizes["num_frames"]), int(sizes["height"]), int(sizes["width"]))
        source, prompt = str(row.get("video")), row["prompt"]
        clip, repeats, window = str(sizes.get("source", source)), sizes.get("repeats"), sizes.get("window")
        if repeats is not None and not (isinstance(repeats, int) and 1 <= repeats <= MAX_REPEATS):
            raise ValueError(f"metadata.repeats ({repeats})")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: {error} is missing or wrong; {PREPARE_AGAIN.format(root)}") from error
    if not files[0] or not files[1]:
        raise DataError(f"{place}: prepared without latents and embeddings; {PREPARE_AGAIN.format(root)}")
    stored = sizes.get("id_token")
    if id_token and id_token != stored:
        raise DataError(
            f"{place}: prepared with --id_token {stored or '(none)'}, not {id_token}; "
            "prepare again with the token, or leave the flag out"
        )
    prepared_for = sizes.get("scaling_factor")
    if scaling_factor and prepared_for and prepared_for != scaling_factor:
        raise DataError(
            f"{place}: prepared with another model's VAE (scaling factor {prepared_for}, this model's is "
            f"{scaling_factor}); prepare the clips with the model that is trained"
        )
    moments, prompt_embeds, image = [
        resolve_inside(root, name, place, allow_outside) if name else None for name in files
    ]
    return Latent(moments, prompt_embeds, image, source, prompt, bucket, clip, repeats, window)


def refuse_missing(root: Path, latents: list[Latent]) -> None:
    files = [path for latent in latents for path in latent[:3] if path is not None]
    missing = [os.path.relpath(path, root) for path in files if not path.is_file()]
    if missing:
        raise DataError(f"{root}: {first_few(missing)} not found; {PREPARE_AGAIN.format(root)}")


def original_latents(root: Path, caption_column: str, video_column: str, allow_outside: bool) -> list[Latent]:
    """Clips in the original's layout: text files, and .pt files named after the videos."""
    if not (root / caption_column).is_file() and not (root / video_column).is_file():
        caption_column, video_column = "prompts.txt", "videos.txt"
    rows = read_text_rows(root, caption_column, video_column)
    logger.warning(
        "%s: .pt files without a manifest; sizes are taken from the tensors, and that they were made with this model's "
        "VAE cannot be checked", root
    )  # fmt: skip
    names = [pt_name(root, row.source) for row in rows]
    folders = ("video_latents", "prompt_embeds")
    missing = [f"{folder}/{name}" for name in names for folder in folders if not (root / folder / name).is_file()]
    if missing:
        raise DataError(f"{root}: {first_few(missing)} not found; {PREPARE_AGAIN.format(root)}")
    refuse_shared(root, rows, names)
    latents = []
    for row, name in zip(rows, names, strict=True):
        moments, prompt_embeds, image = [root / folder / name for folder in (*folders, "image_latents")]
        for path in (moments, prompt_embeds, image):
            resolve_inside(root, str(path.relative_to(root)), f"{video_column}:{row.row}", allow_outside)
        _, frames, height, width = read_pt(moments, 4).shape
        bucket = Bucket((frames - 1) * 4 + 1, height * 8, width * 8)  # the VAE's factors: 4 in time, 8 in space
        image = image if image.is_file() else None
        latents.append(Latent(moments, prompt_embeds, image, row.source, row.prompt, bucket, row.source))
    return latents


def pt_name(root: Path, source: str) -> str:
    """<stem>.pt, or, as the original named files with several dots, the name up to the first dot."""
    folder = root / "video_latents"
    names = f"{Path(source).stem}.pt", f"{Path(source).name.split('.')[0]}.pt"
    whole, cut = (as_on_disk(folder, name) for name in names)
    return cut if (folder / cut).is_file() and not (folder / whole).is_file() else whole


def refuse_shared(root: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """DataError if the original gave the same name to two clips, or to two captions of one clip."""
    owners: dict[str, Row] = {}
    for row, name in zip(rows, names, strict=True):
        first = owners.setdefault(name, row)
        if (first.source, first.prompt) != (row.source, row.prompt):
            raise DataError(
                f"{root}: rows {first.row} and {row.row} ('{first.source}', '{row.source}') both lead to {name}, which "
                f"holds only one of them; {PREPARE_AGAIN.format(root)}"
            )


def without_images(latents: list[Latent]) -> list[Latent]:
    stills = [latent.source for latent in latents if is_image(latent.clip, latent.bucket.frames)]
    log_images_left_out(stills, len(latents))
    return [latent for latent in latents if not is_image(latent.clip, latent.bucket.frames)]


def refuse_unknown_buckets(latents: list[Latent], buckets: Sequence[Bucket] | None) -> None:
    if buckets is None:
        return
    known = {*buckets, *image_buckets(buckets)}
    unknown = [
        f"{latent.moments} ({latent.bucket.frames} frames of {latent.bucket.height}x{latent.bucket.width})"
        for latent in latents
        if latent.bucket not in known
    ]
    if unknown:
        raise DataError(
            f"unknown bucket: {first_few(unknown)}; add these sizes to {SIZE_FLAGS} or leave the flags out"
        )


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """The tensor `name` of a .safetensors file, or the one tensor of a .pt file; DataError if it is not finite."""
    if path.suffix == ".pt":
        tensor = read_pt(path).clone()  # copy out of the memory map
    else:
        try:
            with safe_open(path, framework="pt") as tensors:
                tensor = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            reason = placeholder(path) or f"damaged ({error}); delete it and run prepare_dataset.py again"
            raise DataError(f"{path}: {reason}") from error
    if not torch.isfinite(tensor).all():
        raise DataError(f"{path}: holds values that are not finite; delete it and run prepare_dataset.py again")
    return tensor


def read_pt(path: Path, ndim: int | None = None) -> torch.Tensor:
    """The tensor of a .pt file, memory-mapped; never executes code from it (weights_only)."""
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, OSError, EOFError, ValueError) as error:
        damaged = f"damaged or no tensor ({first_line(error)}); delete it and run prepare_dataset.py again"
        raise DataError(f"{path}: {placeholder(path) or damaged}") from error
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != (ndim or tensor.ndim):
        raise DataError(f"{path}: not a tensor of the expected shape; delete it and run prepare_dataset.py again")
    return tensor
