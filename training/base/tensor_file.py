"""Safetensors files, written one tensor at a time; a checkpoint's are hashed while they are written.

The format: length of the header, header in JSON, tensors without gaps. The library's own writer takes all tensors at
once, orders several metadata entries at random and creates files that only their owner can read.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from base.dtypes import FILE_DTYPES
from base.files import file_identity, hashes_for_manifest


# The library orders tensors from the widest dtype to the narrowest, so that each is aligned. `save_tensors` does the
# same: its bytes are the library's.
CODES = {dtype: code for code, dtype in FILE_DTYPES.items()}
WIDTH = {code: number for number, code in enumerate(FILE_DTYPES)}
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # diffusers' name for a model's weights
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"  # and for the index of several such files

Sizes = dict[str, tuple[torch.dtype, Iterable[int]]]  # name -> dtype, shape


def sizes_of(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> Sizes:
    """Dtypes and shapes of the tensors, as they are or converted to `dtype`."""
    return {name: (dtype or tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write the very bytes of the library's `save_file`; each tensor leaves its device only when it is written."""
    write_as_library(path, sizes_of(tensors), tensors.__getitem__, metadata)


def write_as_library(
    path: Path, sizes: Sizes, tensor_of: Callable[[str], torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """The same for tensors that are made one by one."""
    names = sorted(sizes, key=lambda name: (-WIDTH[CODES[sizes[name][0]]], name))
    ordered = {name: sizes[name] for name in names}
    write_file(path, encoded(describe(ordered, metadata)), ordered, tensor_of)


def describe(sizes: Sizes, metadata: dict[str, str] | None) -> dict:
    """The header for tensors in this order."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape) in sizes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    return header


def encoded(header: dict, alignment: int = 8, sort_keys: bool = False) -> bytes:
    """Length and header, padded so that the tensors start at a multiple of `alignment`."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, header: bytes, names: Iterable[str], tensor_of: Callable[[str], torch.Tensor]) -> None:
    """The header, then the tensors, requested one by one: never two in memory."""
    with written_pieces(path) as write:
        write(header)
        for name in names:
            write(bytes_of(tensor_of(name)))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def written_pieces(path: Path):
    """A function that appends to the new file. If a manifest needs its hash, a thread hashes while it is written."""
    hashes, digest = hashes_for_manifest(path), hashlib.sha256()
    if hashes is None:
        with open(path, "wb") as file:
            yield file.write
        return
    with open(path, "wb") as file, ThreadPoolExecutor(1) as pool:

        def write(piece) -> None:
            hashing = pool.submit(digest.update, piece)
            file.write(piece)
            hashing.result()

        yield write
    hashes[file_identity(path)] = digest.hexdigest()


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a model saved by diffusers, one or several; those of `variant` if given."""
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if variant:
        single, index = (path.with_suffix(f".{variant}{path.suffix}") for path in (single, index))
    if not index.exists():
        return [single]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]
