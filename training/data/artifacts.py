"""Reads and writes the files of a prepared dataset, atomically and with a cache key in each."""

import hashlib
import io
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import torch
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError, safe_open

from base.errors import NumbersError
from base.files import written_beside
from base.tensor_file import bytes_of, save_tensors


logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- keys


def recorded_key(path: Path) -> str | None:
    """The key that the file was written with; None if it is missing, damaged or has none."""
    if not path.exists():
        return None
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                return image.text.get("key")
        with safe_open(path, framework="pt") as tensors:
            key = (tensors.metadata() or {}).get("key")
            return key and key.partition("\n")[0]  # first line: the key as JSON; second: hash of the content
    except (SafetensorError, OSError, SyntaxError) as error:  # PIL raises SyntaxError on a broken PNG
        logger.warning("%s: not readable (%s), made again", path, error)
        return None


def is_intact(path: Path) -> bool:
    """False if the tensors no longer match the recorded hash; files without one, from earlier versions, are intact."""
    if path.suffix != ".safetensors":
        return True
    with safe_open(path, framework="pt") as file:
        recorded = (file.metadata() or {}).get("key", "").partition("\n")[2]
        return not recorded or recorded == tensors_hash({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


# ---------------------------------------------------------------- writing


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], key: str) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            advice = (
                "the model's files are damaged" if tensor.dtype == torch.float32 else "run again with --dtype fp32"
            )
            raise NumbersError(f"{path}: {name} is not finite in {tensor.dtype}; {advice}")
    with written_beside(path) as temporary:
        save_tensors(temporary, tensors, {"key": f"{key}\n{tensors_hash(tensors)}"})


def write_image(path: Path, pixels, key: str) -> None:
    """Write a PNG of uint8 pixels [h, w, 3] with the key in a text chunk."""
    info = PngImagePlugin.PngInfo()
    info.add_text("key", key)
    with written_beside(path) as temporary:
        Image.fromarray(pixels).save(temporary, pnginfo=info)


def write_video(path: Path, frames, fps: int) -> None:
    """Write an mp4 of uint8 frames [F', h, w, 3], lightly compressed; the same frames give the same bytes."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    # A constant quantizer, not crf: x264's macroblock tree is not always deterministic (seen with 32x48 frames)
    options = {"threads": "1", **({"qp": "16"} if codec == "libx264" else {"qscale": "2"})}
    content = io.BytesIO()  # in memory: an encoder that writes files itself loses the error of a full disk
    with av.open(content, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with written_beside(path) as temporary:
        temporary.write_bytes(content.getvalue())


class WriterPool:
    """A pool of writer threads with a bounded queue: errors surface early, and memory stays bounded."""

    def __init__(self, num_threads: int):
        self.pool, self.limit = ThreadPoolExecutor(num_threads), 2 * num_threads
        self.waiting: deque = deque()

    def submit(self, function, *values) -> None:
        self.waiting.append(self.pool.submit(function, *values))
        while len(self.waiting) > self.limit or (self.waiting and self.waiting[0].done()):
            self.waiting.popleft().result()

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, trace) -> None:
        try:
            while self.waiting and error is None:
                self.waiting.popleft().result()
        finally:
            self.pool.shutdown(cancel_futures=True)
