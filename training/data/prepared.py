"""Cache keys of a prepared folder: the key of each file, whether the file is up to date, and files that no row uses.

A key is JSON of everything that determines a file's content. Left out: batch size, slicing, threads, device and
library versions, which change rounding at most; bucket lists and --max_num_frames, which act through the clip's
bucket; and the VAE's tile sizes, which follow from its config.json, which is hashed. Rules in the code, such as the
resize filter, are covered by the key's version.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from base.hashes import HashCache
from data.artifacts import is_intact, recorded_key


logger = logging.getLogger(__name__)

VERSION = 2
CURRENT, EARLIER, MISSING = "current", "earlier", "missing"
EMPTY = "prompt_embeds/_empty.safetensors"
# Output folders; a video has no key of its own: the image, written after it, stands for both
SUFFIXES = {
    "videos": ".mp4", "images": ".png", "video_latents": ".safetensors", "image_latents": ".safetensors",
    "prompt_embeds": ".safetensors",
}  # fmt: skip
STEM = re.compile(r".*[0-9a-f]{8}(@\d+)?(-\d+)?")  # clip_lists.unique_stems


# ---------------------------------------------------------------- keys


class FileKey(NamedTuple):
    """The key that is written now, and the one that version 1 wrote for the same flags and inputs."""

    now: str
    earlier: str


class Component(NamedTuple):
    """Hashes of a model component: of all files that it loads, and as version 1 computed it."""

    now: str
    earlier: str


def hash_component(folder: Path, loaded: Iterable[Path], hashes: HashCache) -> Component:
    """`loaded`: the files of `folder` that determine what the component computes."""
    digest = hashlib.sha256()
    for path in sorted(loaded):
        digest.update(f"{path.name} {hashes.hash(path, 'sha256')}\n".encode())
    return Component(digest.hexdigest()[:32], earlier_weights_hash(folder))


def pixels_key(earlier: dict, place: str, decoder: str) -> dict:
    """Key of a clip's frames: that of version 1, plus what the random draws depend on, which version 1 lacked."""
    return {
        "version": VERSION, **earlier, "reshape": earlier["reshape"] or "center", "flip": earlier["flip"] or 0.0,
        "place": place, "decoder": decoder,
    }  # fmt: skip


def file_key(now: dict, earlier: dict) -> FileKey:
    return FileKey(json.dumps(now, sort_keys=True), json.dumps(earlier, sort_keys=True))


def file_state(output_dir: Path, path: str, key: FileKey, in_full: bool = False) -> str:
    """CURRENT if the file is readable and made from the same content and settings; EARLIER if so by version 1's key;
    else MISSING. `in_full`: also verify the content hash.
    """
    if path.startswith("images/") and not video_of(output_dir, path).exists():
        return MISSING
    recorded = recorded_key(output_dir / path)
    state = {key.now: CURRENT, key.earlier: EARLIER}.get(recorded, MISSING)
    if in_full and state == CURRENT and not is_intact(output_dir / path):
        logger.warning("%s: no longer what was written, made again", output_dir / path)
        return MISSING
    return state


def earlier_weights_hash(folder: Path) -> str:
    """Version 1's hash: names, sizes and the first MiB of each file."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()


def content_hash(output_dir: Path, path: str) -> str:
    """Hash of a file's content without its key; for an image, its video is included."""
    if path.startswith("images/"):
        with Image.open(output_dir / path) as image:
            content = image.tobytes() + video_of(output_dir, path).read_bytes()
    else:  # safetensors: the length of the header, the header, the tensors
        content = (output_dir / path).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        header.pop("__metadata__", None)
        content = json.dumps(header, sort_keys=True).encode() + content[end:]
    return hashlib.sha256(content).hexdigest()


def video_of(output_dir: Path, image: str) -> Path:
    """The video whose first frame is `images/<stem>.png`."""
    return output_dir / "videos" / f"{Path(image).stem}.mp4"


# ---------------------------------------------------------------- files that no row uses


def used_files(paths: Iterable[str]) -> set[str]:
    """`paths`, plus the video of each image and the empty prompt's embedding."""
    paths = set(paths)
    videos = {f"videos/{Path(path).stem}.mp4" for path in paths if path.startswith("images/")}
    return paths | videos | {EMPTY}


def unused_files(output_dir: Path, named: set[str]) -> list[Path]:
    """Files that look like ours by name but are not in `named`; symlinks, and linked folders, are left alone."""
    found = []
    for folder, suffix in SUFFIXES.items():
        if (output_dir / folder).is_symlink():
            continue
        for path in sorted((output_dir / folder).glob(f"*{suffix}")):
            is_own = STEM.fullmatch(path.stem) and path.is_file() and not path.is_symlink()
            if is_own and f"{folder}/{path.name}" not in named:
                found.append(path)
    return found


def prune(output_dir: Path, named: set[str]) -> int:
    """Delete files not in `named` that have a key, or whose image has one; returns how many."""
    removed = 0
    for path in with_keys(output_dir, unused_files(output_dir, named)):  # videos precede images, which hold their keys
        path.unlink()
        removed += 1
    return removed


def with_keys(output_dir: Path, paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        voucher = output_dir / "images" / f"{path.stem}.png" if path.suffix == ".mp4" else path
        if recorded_key(voucher) is not None:
            yield path
