"""Safetensors files, written and read one tensor at a time; a checkpoint's are hashed on the way.

The format: length of the header, header in JSON, tensors without gaps. The library's own writer takes all tensors at
once, orders several metadata entries at random and creates files that only their owner can read. Its reader maps the
file: hashing it would be a second read.
"""

import hashlib
import json
import math
import mmap
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from base.dtypes import FILE_DTYPES
from base.files import file_identity, hashes_for_manifest
from base.manifest import DamagedFile, changed, unverified


# The library orders tensors from the widest dtype to the narrowest, so that each is aligned. `save_tensors` does the
# same: its bytes are the library's.
CODES = {dtype: code for code, dtype in FILE_DTYPES.items()}
WIDTH = {code: number for number, code in enumerate(FILE_DTYPES)}
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # diffusers' name for a model's weights
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"  # and for the index of several such files
CHUNK_BYTES = 2**24  # read, or copied from the GPU, while the chunk before is hashed or written
SMALL_BYTES = 2**18
MAX_HEADER_BYTES = 100_000_000  # the library's limit

Sizes = dict[str, tuple[torch.dtype, Iterable[int]]]  # name -> dtype, shape


class InThread:
    """Gives pieces to `action`, large ones in a thread of `pool` while the caller goes on; they must not change then."""

    def __init__(self, pool: ThreadPoolExecutor, action: Callable):
        self.pool, self.action = pool, action
        self.piece, self.last = None, None  # at work

    def update(self, piece) -> None:
        self.wait()
        if len(piece) < SMALL_BYTES:  # sooner done than handed over
            self.action(piece)
            return
        self.piece = piece
        self.last = self.pool.submit(self.act)

    def act(self) -> None:
        self.action(self.piece)
        self.piece = None  # its memory is free as soon as `wait` returns

    def wait(self) -> None:
        """Until it is done with all pieces; raises what `action` raised."""
        if self.last:
            self.last.result()


class Hasher(InThread):
    """SHA-256 of pieces."""

    def __init__(self, pool: ThreadPoolExecutor):
        self.sha256 = hashlib.sha256()
        super().__init__(pool, self.sha256.update)

    def hexdigest(self) -> str:
        self.wait()
        return self.sha256.hexdigest()


# ---------------------------------------------------------------- write


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write the very bytes of the library's `save_file`; each tensor leaves its device only when it is written."""
    sizes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_as_library(path, sizes, tensors.__getitem__, metadata)


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
    """The header, then the tensors, each requested while the one before is written: never three in memory."""
    with written_pieces(path) as write:
        write(header)
        for name in names:
            for piece in pieces_of(tensor_of(name)):
                write(piece)


def pieces_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes; from a GPU in chunks, through memory that torch has pinned and uses again: new pages are slow."""
    if not tensor.is_cuda:
        yield bytes_of(tensor)
        return
    for chunk in tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(CHUNK_BYTES):
        yield bytes_of(torch.empty(len(chunk), dtype=torch.uint8, pin_memory=True).copy_(chunk))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def written_pieces(path: Path):
    """A function that appends to the new file, and hashes for the manifest if one is asked for, in other threads."""
    hashes = hashes_for_manifest(path)
    with open(path, "wb") as file, ThreadPoolExecutor(2) as pool:
        writer, hasher = InThread(pool, file.write), None if hashes is None else Hasher(pool)

        def write(piece) -> None:
            writer.wait()
            if hasher:
                hasher.update(piece)
            writer.update(piece)

        yield write
        writer.wait()
    if hasher:
        hashes[file_identity(path)] = hasher.hexdigest()


# ---------------------------------------------------------------- read


def read_tensors(path: Path, digest: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The file's tensors by name, front to back, one in memory at a time; DamagedFile if it is not as written.

    `digest`: the SHA-256 that it must have; by default, in a `verified_folder`, that of the manifest. It is compared at
    the end: until then, what was read may be wrong.
    """
    digest = digest or unverified.get(path)
    with open(path, "rb") as file, ThreadPoolExecutor(1) as pool:
        hasher = Hasher(pool) if digest else None
        sizes, _ = read_header(file, hasher)
        for name, (dtype, shape) in sizes.items():
            yield name, read_tensor(file, dtype, shape, hasher)
            if hasher:
                hasher.wait()
        if hasher and hasher.hexdigest() != digest:
            raise DamagedFile(changed(path.name))
    unverified.pop(path, None)


def read_tensor(file: BinaryIO, dtype: torch.dtype, shape: list[int], hasher: Hasher | None) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    memory = bytes_of(tensor)
    for start in range(0, len(memory), CHUNK_BYTES):
        piece = memory[start : start + CHUNK_BYTES]
        if file.readinto(piece) != len(piece):
            raise DamagedFile(f"{Path(file.name).name} has become shorter")
        if hasher:
            hasher.update(piece)
    return tensor


def map_tensor(path: Path, name: str) -> torch.Tensor:
    """The tensor `name`, mapped read-only: never write to it.

    The library maps privately, for which the system wants memory or swap as large as the file: a table of 36 GiB could
    not be opened on a smaller machine.
    """
    with open(path, "rb") as file:
        sizes, _ = read_header(file)
        start = file.tell()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for other, (dtype, shape) in sizes.items():
        if other == name:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it cannot be written to
                return torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=start).view(*shape)
        start += math.prod(shape) * dtype.itemsize
    raise KeyError(f"{path} holds no {name}")


def open_header(path: Path) -> tuple[Sizes, dict[str, str]]:
    """(dtypes and shapes in the order of the file, metadata)."""
    with open(path, "rb") as file:
        return read_header(file)


def read_header(file: BinaryIO, hasher: Hasher | None = None) -> tuple[Sizes, dict[str, str]]:
    """The same from an open file, which is then at its first tensor. DamagedFile unless it fills the file exactly."""
    num_bytes = os.fstat(file.fileno()).st_size
    try:
        start = file.read(8)
        if (length := int.from_bytes(start, "little")) > min(num_bytes, MAX_HEADER_BYTES):
            raise ValueError(f"it would have {length} bytes")
        text = file.read(length)
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        sizes = sizes_in(header, num_bytes - 8 - len(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{Path(file.name).name} has no valid safetensors header ({error})") from error
    if hasher:
        hasher.update(start + text)
    return sizes, metadata


def sizes_in(header: dict, num_bytes: int) -> Sizes:
    """Dtypes and shapes in the order of the tensors; ValueError unless these follow one another up to `num_bytes`."""
    sizes, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = FILE_DTYPES[entry["dtype"]], [operator.index(size) for size in entry["shape"]]
        offsets = [end, end + math.prod(shape) * dtype.itemsize]
        if entry["data_offsets"] != offsets or min(shape, default=0) < 0:
            raise ValueError(f"{name} is said to lie elsewhere")
        sizes[name], end = (dtype, shape), offsets[1]
    if end != num_bytes:
        raise ValueError(f"it describes {end} bytes of {num_bytes}")
    return sizes


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a model saved by diffusers, one or several; those of `variant` if given."""
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if variant:
        single, index = (path.with_suffix(f".{variant}{path.suffix}") for path in (single, index))
    if not index.exists():
        return [single]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]
