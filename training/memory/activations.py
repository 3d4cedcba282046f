"""`offload_activations`: what autograd saves of a block lies in host memory until the backward pass comes to it.

It acts on a list of blocks that are called one after the other, compiled or not; with `stream_weights`, it goes first.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from memory.host import (
    NO_OUTER_CHECKPOINT,
    Copies,
    after_backward,
    aligned,
    before_backward,
    page_locked,
    storage_bytes,
    wait,
    watch,
)


MIN_BYTES = 2**20  # of a saved tensor that is worth a copy


@dataclass(eq=False)
class SavedBlock:
    """What autograd saved of one block in one forward pass."""

    index: int
    tensors: list["SavedTensor"] = field(default_factory=list)  # until the block's end decides what is sent
    pieces: dict[int, "Piece"] = field(default_factory=dict)  # by address
    num_bytes: int = 0  # of all pieces, as they come back
    sent: object = None  # event: the host has them
    arrived: object = None  # event: they are back


@dataclass(eq=False)
class SavedTensor:
    """In autograd's hands for a tensor: still the tensor itself, or where in the block's memory it is to be found."""

    block: SavedBlock
    tensor: torch.Tensor | None
    view: tuple | None = None  # dtype, size, stride, offset in elements


@dataclass(eq=False)
class Piece:
    """The memory of one or several saved tensors."""

    source: torch.Tensor | None  # on the GPU, kept until it has been copied
    host: torch.Tensor
    offset: int  # in bytes, among all that comes back for the block


class HostActivations:
    """Saved tensors of blocks in host memory; two buffers on the GPU take in turn what comes back.

    One forward pass at a time: its backward pass comes before the next forward pass with gradients.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device, min_bytes: int):
        self.blocks, self.device, self.min_bytes = blocks, device, min_bytes
        self.outward, self.inward = Copies(device), Copies(device)
        self.host: list[torch.Tensor | None] = [None] * len(blocks)
        self.slots: list[torch.Tensor | None] = [None, None]  # of blocks with an even and an odd number
        self.free = [self.inward.mark(), self.inward.mark()]
        self.saved: list[SavedBlock | None] = [None] * len(blocks)
        self.block: SavedBlock | None = None  # that the forward pass is in
        self.inside: int | None = None  # that the backward pass is in

    # ---- forward

    def forward(self, index: int, call: Callable, *args, **kwargs):
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        if torch._C._autograd._top_saved_tensors_default_hooks(True):
            raise RuntimeError(f"something else keeps what autograd saves of the blocks: {NO_OUTER_CHECKPOINT}")
        if index == 0:
            self.forget()
        self.block = self.saved[index] = SavedBlock(index)
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            outputs = call(*args, **kwargs)
        if index + 1 < len(self.saved):  # the last block's are needed at once: they stay
            self.send(self.block, fixed_storages(self.blocks[index], (args, kwargs), outputs))
        self.block.tensors.clear()
        if index and self.saved[index - 1]:
            self.release(self.saved[index - 1])
        before_backward(outputs, functools.partial(self.enter_backward, index))
        return outputs

    def forget(self) -> None:
        """Be done with a pass, which an error may have ended anywhere."""
        for block in filter(None, self.saved):
            self.release(block)
            if block.arrived:
                wait(block.arrived)
        self.saved = [None] * len(self.saved)
        self.inside = None
        self.free = [self.inward.mark(), self.inward.mark()]

    def pack(self, tensor: torch.Tensor):
        plain = type(tensor) is torch.Tensor and tensor.device.type == self.device.type  # cuda is cuda:0
        if not plain or tensor.untyped_storage().nbytes() < self.min_bytes:
            return tensor
        saved = SavedTensor(self.block, tensor)
        self.block.tensors.append(saved)
        return saved

    def send(self, block: SavedBlock, fixed: set[int]) -> None:
        """Start the copies of all that `block` saved, but for `fixed` memory. The same memory is copied once."""
        previous = self.saved[block.index - 1] if block.index else None
        before = previous.pieces if previous else {}
        new_bytes, new = 0, []
        for saved in block.tensors:
            tensor, address = saved.tensor, saved.tensor.untyped_storage().data_ptr()
            if address in fixed:
                continue
            if address not in block.pieces:
                source = storage_bytes(tensor)
                block.pieces[address] = Piece(source, None, block.num_bytes)
                block.num_bytes += aligned(source.nbytes)
                if address in before:
                    block.pieces[address].host = before[address].host
                else:
                    new.append((block.pieces[address], new_bytes))
                    new_bytes += aligned(source.nbytes)
            offset = block.pieces[address].offset // tensor.element_size() + tensor.storage_offset()
            saved.view = (tensor.dtype, tensor.size(), tensor.stride(), offset)
            saved.tensor = None
        host = self.host_memory(block.index, new_bytes)
        for piece, start in new:
            piece.host = host[start : start + piece.source.nbytes]
        pairs = [(piece.host, piece.source) for piece, _ in new]
        block.sent = self.outward.start(pairs, after=[self.outward.mark()])

    def host_memory(self, index: int, num_bytes: int) -> torch.Tensor:
        """At least so much for block `index`, the same every step; more only for a larger video than before."""
        host = self.host[index]
        if host is None or host.nbytes < num_bytes:
            self.outward.api.synchronize()  # before memory goes that copies may still use
            self.host[index] = host = None
            self.host[index] = host = page_locked(num_bytes, self.device)
        return host

    def release(self, block: SavedBlock) -> None:
        """Give back the GPU's memory of what was sent, one block later, when that does not have to be waited for."""
        if block.sent:
            wait(block.sent)
        for piece in block.pieces.values():
            piece.source = None

    # ---- backward

    def enter_backward(self, index: int) -> None:
        if self.inside is None:
            after_backward(self.forget)
        else:
            self.free[self.inside % 2] = self.inward.mark()
        self.inside = index
        self.fetch(index)
        self.fetch(index - 1)
        block = self.saved[index]
        if block and block.arrived:
            wait(block.arrived)

    def fetch(self, index: int) -> None:
        """Start bringing block `index` back, unless that has been done."""
        block = self.saved[index] if index >= 0 else None
        if block is None or not block.pieces or block.arrived:
            return
        slot = self.slot_memory(index % 2)
        pairs = [
            (slot[piece.offset : piece.offset + piece.host.nbytes], piece.host) for piece in block.pieces.values()
        ]
        block.arrived = self.inward.start(pairs, after=[self.free[index % 2], block.sent])

    def slot_memory(self, place: int) -> torch.Tensor:
        needed = max(block.num_bytes for block in self.saved if block)
        if self.slots[place] is None or self.slots[place].nbytes < needed:
            self.slots[place] = None
            self.slots[place] = torch.empty(needed, dtype=torch.uint8, device=self.device)
            self.free[place] = self.inward.mark()  # what the memory was before may still be in use
        return self.slots[place]

    def unpack(self, saved) -> torch.Tensor:
        if not isinstance(saved, SavedTensor):
            return saved
        if saved.tensor is not None:
            return saved.tensor
        index = saved.block.index
        if self.saved[index] is not saved.block or self.inside != index:
            raise RuntimeError(
                f"the activations of block {index} are gone: with offloaded activations, each forward pass has one "
                "backward pass, before the next forward pass"
            )
        dtype, size, stride, offset = saved.view
        return self.slots[index % 2].view(dtype).as_strided(size, stride, offset)


def fixed_storages(block: nn.Module, inputs, outputs) -> set[int]:
    """Addresses of what lives longer than a block's pass: its weights, and inputs that all blocks share.

    An input that the block hands on, changed, has the shape of an output; others, such as rotary tables, are shared.
    """
    shapes = {leaf.shape for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)}
    shared = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.shape not in shapes]
    tensors = [*block.parameters(), *block.buffers(), *shared]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if type(tensor) in (torch.Tensor, nn.Parameter)}


def offload_activations(blocks: nn.ModuleList, device: torch.device, min_bytes: int = MIN_BYTES) -> HostActivations:
    """Keep in host memory what autograd saves of `blocks`, from `min_bytes` on. Losses and gradients stay the same bits."""
    activations = HostActivations(blocks, device, min_bytes)
    watch(blocks, activations)
    return activations
