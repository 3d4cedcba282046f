"""Keeps weights in host memory and streams them to the GPU block by block, in both passes.

`stream_weights` takes a list of blocks that are called in order, compiled or not. With 17,776 tokens per video,
copying a block takes a fifth of the time of computing it. Frozen weights never come back; whoever trains weights
(engine/state_ring.py) changes them in their slot on the GPU, and copies them to the host.
"""

import functools
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed
from safetensors import safe_open
from torch import nn

from base.errors import UsageError
from base.ranks import all_gather_objects
from memory.host import (
    TransferStream,
    after_backward,
    aligned,
    before_backward,
    pinned_memory,
    storage_bytes,
    wait,
    wrap_blocks,
)


logger = logging.getLogger(__name__)

NUM_SLOTS = 3  # blocks of weights on the GPU: the one in use, and two being prefetched


class WeightRing:
    """Weights and buffers in host memory, one flat buffer per block, and a ring of slots on the GPU.

    Block i always uses slot i % slots, so each tensor has a fixed GPU address: what autograd or compiled code saved in
    the forward pass is valid again in the backward pass. Outside its block's pass every tensor points to host memory,
    so state dicts and adapters see the real weights.
    """

    def __init__(self, tensors: list[list[torch.Tensor]], device: torch.device, num_slots: int):
        self.tensors, self.device = tensors, device  # tensors of each block
        self.host = [host_buffer(tensors, device) for tensors in self.tensors]
        self.copies = TransferStream(device)
        # Each tensor at both places: a pass only swaps `.data` between them
        self.host_views = [[tensor.data for tensor in tensors] for tensors in self.tensors]
        self.num_slots = min(num_slots, len(self.host))
        self.inside: int | None = None  # the block whose tensors are on the GPU
        self.make_room()

    def make_room(self) -> None:
        """The slots, empty. Between passes only."""
        size = max(buffer.nbytes for buffer in self.host)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(self.num_slots)]
        self.slot_views = [
            [
                view_in(self.slots[index % self.num_slots], byte_offset(tensor) - buffer.storage_offset(), tensor)
                for tensor in tensors
            ]
            for index, (tensors, buffer) in enumerate(zip(self.host_views, self.host, strict=True))
        ]
        self.holds: list[int | None] = [None] * self.num_slots  # index of the block that is there or in flight
        self.free = [self.copies.mark() for _ in self.slots]  # events: the slot's block has been computed
        self.ready = list(self.free)  # events: the slot's copy is done
        self.kept = list(self.free)  # events: what was changed in the slot is on the host

    def give_up_room(self) -> None:
        """Free the slots until `make_room`. Between passes only."""
        self.leave()
        self.copies.synchronize()
        self.slots, self.slot_views = [], []

    def forward(self, index: int, call: Callable, *args, **kwargs):
        self.enter(index)
        try:
            outputs = call(*args, **kwargs)
        finally:
            self.leave()
        following = index + len(self.slots)  # the next block for the slot that was just freed
        if following < len(self.host):
            self.fetch(following)
        elif not torch.is_grad_enabled():  # the next pass is a forward; a backward starts with the blocks in the slots
            self.fetch(index % len(self.slots))
        before_backward(outputs, functools.partial(self.enter_backward, index))
        return outputs

    def enter_backward(self, index: int) -> None:
        left = self.inside
        if left is None:
            after_backward(self.finish_backward)
        self.enter(index)
        if left is not None and left >= len(self.slots):
            self.fetch(left - len(self.slots))

    def finish_backward(self) -> None:
        self.leave()
        for index in range(len(self.slots)):  # the first blocks of the next forward pass, mostly there already
            self.fetch(index)

    def enter(self, index: int) -> None:
        """Point the tensors of block `index` to its slot on the GPU, and those of the block before to host memory."""
        self.leave()
        self.fetch(index)
        wait(self.ready[index % len(self.slots)])
        self.inside = index
        set_data(self.tensors[index], self.slot_views[index])

    def leave(self) -> None:
        if self.inside is None:
            return
        set_data(self.tensors[self.inside], self.host_views[self.inside])
        self.free[self.inside % len(self.slots)] = self.copies.mark()
        self.inside = None

    def fetch(self, index: int) -> None:
        """Start copying block `index` to its slot, unless it is there."""
        place = index % len(self.slots)
        if self.holds[place] == index:
            return
        buffer, after = self.host[index], [self.free[place], self.kept[place]]
        self.ready[place] = self.copies.start([(self.slots[place][: buffer.nbytes], buffer)], after)
        self.holds[place] = index

    # ---- for weights that are trained

    def lend(self, index: int) -> tuple[torch.Tensor, object]:
        """(the slot with block `index`, uint8 [bytes], an event after which it may be changed)."""
        self.fetch(index)
        place = index % len(self.slots)
        return self.slots[place][: self.host[index].nbytes], self.ready[place]

    def give_back(self, index: int, kept) -> None:
        """The slot of block `index` has been changed; after the event `kept`, so has its buffer on the host."""
        self.kept[index % len(self.slots)] = kept

    def forget(self) -> None:
        """What is on the host has been changed: the slots no longer hold it."""
        self.holds = [None] * len(self.slots)


def is_frozen(tensor: torch.Tensor) -> bool:
    return not tensor.requires_grad


def stream_weights(
    blocks: nn.ModuleList,
    device: torch.device,
    num_slots: int = NUM_SLOTS,
    streams: Callable[[torch.Tensor], bool] = is_frozen,
) -> WeightRing:
    """Keep the weights of `blocks` that `streams` picks in host memory, with at most `num_slots` blocks on `device`.

    Others are not streamed; `.to()` still moves them, and leaves streamed tensors alone.
    """
    places = [list(streamed_tensors(block, streams)) for block in blocks]
    ring = WeightRing([[tensor for *_, tensor in of_block] for of_block in places], device, num_slots)
    for block, of_block in zip(blocks, places, strict=True):
        block._apply = functools.partial(apply_except_streamed, block, of_block)
    wrap_blocks(blocks, ring)
    return ring


def streamed_tensors(
    block: nn.Module, streams: Callable[[torch.Tensor], bool] = is_frozen
) -> Iterator[tuple[dict, str, torch.Tensor]]:
    """(the module's dict that holds it, its name there, tensor) of each weight and buffer, in a fixed order."""
    seen = set()
    for module in block.modules():
        for owner in (module._parameters, module._buffers):
            for name, tensor in owner.items():
                if tensor is None or not streams(tensor) or id(tensor) in seen:
                    continue
                if type(tensor) not in (nn.Parameter, torch.Tensor):
                    raise UsageError(f"--memory stream: weights of type {type(tensor).__name__} cannot be streamed")
                seen.add(id(tensor))
                yield owner, name, tensor


def apply_except_streamed(block: nn.Module, streamed: list, function: Callable, recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which `.to()` and the like call, on all but the streamed tensors."""
    for owner, name, _ in streamed:  # _apply skips None
        owner[name] = None
    try:
        return type(block)._apply(block, function, recurse)
    finally:
        for owner, name, tensor in streamed:
            owner[name] = tensor


def host_buffer(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The flat host buffer that holds `tensors` back to back; moves them to a new one if they do not share one."""
    if not is_host_buffer(tensors, device):
        flat = pinned_memory(flat_bytes(tensors), device)
        for tensor, view in zip(tensors, views_in(flat, tensors), strict=True):
            view.copy_(tensor.data)
            tensor.data = view
    start = byte_offset(tensors[0])
    return storage_bytes(tensors[0])[start : start + flat_bytes(tensors)]


def is_host_buffer(tensors: list[torch.Tensor], device: torch.device) -> bool:
    if tensors[0].device.type != "cpu" or (device.type == "cuda" and not tensors[0].is_pinned()):
        return False
    addresses = [tensor.data_ptr() for tensor in views_in(storage_bytes(tensors[0]), tensors, byte_offset(tensors[0]))]
    return addresses == [tensor.data_ptr() for tensor in tensors]


def set_data(tensors: list[torch.Tensor], views: list[torch.Tensor]) -> None:
    for tensor, view in zip(tensors, views, strict=True):
        tensor.data = view


def byte_offset(tensor: torch.Tensor) -> int:
    return tensor.storage_offset() * tensor.element_size()


def extent_bytes(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last, whatever its strides."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def flat_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(aligned(extent_bytes(tensor)) for tensor in tensors)


def view_in(flat: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """A view of `flat` at byte `offset`, with the dtype, shape and strides of `like`."""
    piece = flat[offset : offset + extent_bytes(like)].view(like.dtype)
    return piece.as_strided(like.shape, like.stride())


def views_in(flat: torch.Tensor, tensors: list[torch.Tensor], offset: int = 0) -> Iterator[torch.Tensor]:
    """Views for `tensors` back to back from byte `offset`, as far as they fit."""
    for tensor in tensors:
        if offset + extent_bytes(tensor) > flat.nbytes:
            return
        yield view_in(flat, offset, tensor)
        offset += aligned(extent_bytes(tensor))


def load_blocks(
    blocks: nn.ModuleList, prefix: str, files: list[Path], dtype: torch.dtype, device: torch.device
) -> None:
    """Load `blocks`, built on the meta device, in `dtype`, from safetensors `files` whose keys start with `prefix`.

    Loads straight into the memory that `stream_weights` uses for `device`: no second copy in host memory, none on the
    GPU. The ranks of a machine share that memory; one of them reads the files.
    """
    places = [place for block in blocks.to(dtype).requires_grad_(False) for place in streamed_tensors(block)]
    tensors = [tensor for *_, tensor in places]
    file, fills = shared_memory_file(flat_bytes(tensors))
    views = views_in(pinned_memory(flat_bytes(tensors), device, file), tensors)
    if file >= 0:
        os.close(file)  # the memory lives as long as a process has it mapped
    for (owner, name, tensor), view in zip(places, views, strict=True):
        owner[name] = nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view
    # Every rank checks keys and shapes, which reads headers only; one of them copies the weights
    wanted = {f"{prefix}{name}": tensor for name, tensor in [*blocks.named_parameters(), *blocks.named_buffers()]}
    for path in files:
        with safe_open(path, framework="pt") as weights:
            for key in sorted(wanted.keys() & set(weights.keys())):
                target, shape = wanted.pop(key), weights.get_slice(key).get_shape()
                if shape != list(target.shape):
                    raise UsageError(f"{path}: {key} is {shape}, and the configuration says {list(target.shape)}")
                if fills:
                    target.copy_(weights.get_tensor(key))
    if wanted:
        raise UsageError(f"{files[0].parent}: lacks {min(wanted)}; download the model again")
    all_gather_objects(None)  # barrier: no rank uses the shared memory before it is filled


def shared_memory_file(num_bytes: int) -> tuple[int, bool]:
    """(memfd, whether this rank fills it): one file for all ranks of a machine if the system allows it, else one each.

    A memfd, not /dev/shm, which is small in containers; freed with the last process that maps it. -1 without ranks.
    """
    if not torch.distributed.is_initialized():
        return -1, True
    name = f"weights-{secrets.token_hex(8)}"
    own = os.memfd_create(name)
    os.ftruncate(own, max(num_bytes, 1))
    offers = all_gather_objects((socket.gethostname(), f"/proc/{os.getpid()}/fd/{own}", name))
    path, name_there = next(offer[1:] for offer in offers if offer[0] == socket.gethostname())
    shared = own
    try:
        # Containers may share a hostname but not /proc: check that the file is the one that was offered
        if name_there != name and name_there in os.readlink(path):
            shared = os.open(path, os.O_RDWR)
    except OSError as error:
        logger.warning("this process keeps its own copy of the frozen weights: cannot open %s (%s)", path, error)
    all_gather_objects(None)  # barrier: the offering rank keeps its file open until all have opened it
    if shared != own:
        os.close(own)
    return shared, shared == own
