"""What lies in a prepared folder: the key of each file, whether it still holds, and files that no row names.

A key is JSON of everything that decides a file's content. What does not is left out: batch size, slicing, threads, device
and the libraries' versions change rounding at most; bucket lists and --max_num_frames act through the bucket that a clip
gets; the VAE's tile sizes follow from its config.json, which is hashed. The code's own rules, as the filter of resizing,
are the key's version.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from base.hashes import Hashes
from data.artifacts import is_intact, recorded_key


logger = logging.getLogger(__name__)

VERSION = 2
CURRENT, EARLIER, MISSING = "current", "earlier", "missing"
EMPTY = "prompt_embeds/_empty.safetensors"
# The folders that preparing writes; a video has no key, the image written after it vouches for it
SUFFIXES = {
    "videos": ".mp4", "images": ".png", "video_latents": ".safetensors", "image_latents": ".safetensors",
    "prompt_embeds": ".safetensors",
}  # fmt: skip
STEM = re.compile(r".*[0-9a-f]{8}(-\d+)?")  # clip_lists.unique_stems


# ---------------------------------------------------------------- keys


class Key(NamedTuple):
    """What a file is written with, and what version 1 wrote for the same flags and files."""

    now: str
    earlier: str


class Component(NamedTuple):
    """Hashes of a model's part: of all that it loads, and as version 1 took it."""

    now: str
    earlier: str


def hash_component(folder: Path, loaded: Iterable[Path], hashes: Hashes) -> Component:
    """`loaded` are the files of `folder` that decide what the part computes."""
    digest = hashlib.sha256()
    for path in sorted(loaded):
        digest.update(f"{path.name} {hashes.of(path, 'sha256')}\n".encode())
    return Component(digest.hexdigest()[:32], earlier_weights_hash(folder))


def pixels_key(earlier: dict, place: str, decoder: str) -> dict:
    """Of the frames of a clip, from the key of version 1, which lacked what draws depend on."""
    return {
        "version": VERSION, **earlier, "reshape": earlier["reshape"] or "center", "flip": earlier["flip"] or 0.0,
        "place": place, "decoder": decoder,
    }  # fmt: skip


def file_key(now: dict, earlier: dict) -> Key:
    return Key(json.dumps(now, sort_keys=True), json.dumps(earlier, sort_keys=True))


def state_of(output_dir: Path, path: str, key: Key, in_full: bool = False) -> str:
    """CURRENT if the file is there, readable and made from the same content with the same settings; EARLIER if so by the
    rules of version 1; else MISSING. `in_full`: and if it still holds what was written.
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
    """As version 1 took it: names, sizes and the first MiB of each file."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()


def content_hash(output_dir: Path, path: str) -> str:
    """Of what a file holds beside its key; an image stands for its video too."""
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
    """The video that `images/<stem>.png` is the first frame of."""
    return output_dir / "videos" / f"{Path(image).stem}.mp4"


# ---------------------------------------------------------------- files that no row names


def named_files(paths: Iterable[str]) -> set[str]:
    """`paths`, the video of each image among them, and the empty prompt's embedding."""
    paths = set(paths)
    videos = {f"videos/{Path(path).stem}.mp4" for path in paths if path.startswith("images/")}
    return paths | videos | {EMPTY}


def unnamed_files(output_dir: Path, named: set[str]) -> list[Path]:
    """Files that are named as preparing names them and are not `named`; links and linked folders are somebody else's."""
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
    """Remove what is not `named` and has a key, or is a video whose image has one; returns how many files."""
    removed = 0
    for path in keyed(output_dir, unnamed_files(output_dir, named)):  # a video goes before its image
        path.unlink()
        removed += 1
    return removed


def keyed(output_dir: Path, paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        voucher = output_dir / "images" / f"{path.stem}.png" if path.suffix == ".mp4" else path
        if recorded_key(voucher) is not None:
            yield path
