"""Files of a prepared dataset: written beside and renamed, each with a key of everything that decided its content."""

import contextlib
import functools
import hashlib
import logging
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from errors import NumbersError


logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- keys


@functools.lru_cache
def weights_hash(directory: Path) -> str:
    """A fingerprint of a model's files: names, sizes and the first MiB of each (T5-XXL whole would take a minute)."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def recorded_key(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                return image.text.get("key")
        with safe_open(path, framework="pt") as tensors:
            return (tensors.metadata() or {}).get("key")
    except (SafetensorError, OSError, SyntaxError) as error:  # PIL raises SyntaxError on a broken PNG
        logger.warning("%s: not readable (%s), made again", path, error)
        return None


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def written_beside(path: Path):
    """A temporary path that becomes `path` on success: a reader never sees half a file."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NumbersError(f"{path}: {name} is not finite; run again with --dtype bf16 or fp32")
    content = serialize(tensors, metadata={"key": key})
    with written_beside(path) as temporary:
        temporary.write_bytes(content)  # not save_file, which makes files that only their owner can read


def write_image(path: Path, pixels, key: str) -> None:
    """A PNG of uint8 pixels [h, w, 3] with the key in its text."""
    info = PngImagePlugin.PngInfo()
    info.add_text("key", key)
    with written_beside(path) as temporary:
        Image.fromarray(pixels).save(temporary, pnginfo=info)


class Writer:
    """A few writing threads with a bounded queue: the first error ends the run, and nothing piles up in memory."""

    def __init__(self, num_threads: int):
        self.pool, self.limit = ThreadPoolExecutor(num_threads), 2 * num_threads
        self.waiting: deque = deque()

    def submit(self, function, *values) -> None:
        self.waiting.append(self.pool.submit(function, *values))
        while len(self.waiting) > self.limit:
            self.waiting.popleft().result()

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, trace) -> None:
        try:
            while self.waiting and error is None:
                self.waiting.popleft().result()
        finally:
            self.pool.shutdown(cancel_futures=True)
