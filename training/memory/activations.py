"""Offloads the tensors that autograd saves per block to host memory and prefetches them for the backward pass.

`offload_activations` takes a list of blocks that are called in order, compiled or not. Apply it before
`stream_weights`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from memory.host import (
    NO_OUTER_CHECKPOINT,
    TransferStream,
    after_backward,
    aligned,
    before_backward,
    pinned_memory,
    storage_bytes,
    wait,
    wrap_blocks,
)


MIN_BYTES = 2**20  # smaller saved tensors are not worth a copy


@dataclass(eq=False)
class SavedBlock:
    """What autograd saved for one block in one forward pass."""

    index: int
    tensors: list["SavedTensor"] = field(default_factory=list)  # until the end of the block decides what is sent
    pieces: dict[int, "Piece"] = field(default_factory=dict)  # by address
    num_bytes: int = 0  # of all pieces, once back on the GPU
    sent: object = None  # event: the copy to the host is done
    arrived: object = None  # event: the copy back to the GPU is done


@dataclass(eq=False)
class SavedTensor:
    """What autograd holds in place of a tensor: the tensor itself, or its view into the block's memory."""

    block: SavedBlock
    tensor: torch.Tensor | None
    view: tuple | None = None  # dtype, size, stride, offset in elements


@dataclass(eq=False)
class Piece:
    """One storage, shared by one or more saved tensors."""

    source: torch.Tensor | None  # on the GPU, kept until the copy is done
    host: torch.Tensor
    offset: int  # bytes from the start of the block's slot


class HostActivations:
    """The blocks' saved tensors in host memory, fetched back into two alternating GPU buffers.

    One forward pass at a time: its backward pass must run before the next forward pass with gradients.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device, min_bytes: int):
        self.blocks, self.device, self.min_bytes = blocks, device, min_bytes
        self.outward, self.inward = TransferStream(device), TransferStream(device)
        self.host: list[torch.Tensor | None] = [None] * len(blocks)
        self.slots: list[torch.Tensor | None] = [None, None]  # for blocks with an even and an odd index
        self.free = [self.inward.mark(), self.inward.mark()]
        self.saved: list[SavedBlock | None] = [None] * len(blocks)
        self.block: SavedBlock | None = None  # the block the forward pass is in
        self.inside: int | None = None  # index of the block the backward pass is in

    # ---- forward

    def forward(self, index: int, call: Callable, *args, **kwargs):
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        if torch._C._autograd._top_saved_tensors_default_hooks(True):
            raise RuntimeError(f"something else keeps what autograd saves of the blocks: {NO_OUTER_CHECKPOINT}")
        if index == 0:  # a new forward pass
            self.reset()
        self.block = self.saved[index] = SavedBlock(index)
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            outputs = call(*args, **kwargs)
        if index + 1 < len(self.saved):  # the backward pass starts with the last block, so its tensors stay
            self.send(self.block, fixed_storages(self.blocks[index], (args, kwargs), outputs))
        self.block.tensors.clear()
        # One block later its copy has had the time of a block to finish: waiting for it costs nothing
        if index and self.saved[index - 1]:
            self.release(self.saved[index - 1])
        before_backward(outputs, functools.partial(self.enter_backward, index))
        return outputs

    def reset(self) -> None:
        """Reset after a pass, which an error may have ended anywhere."""
        for block in filter(None, self.saved):
            self.release(block)
            if block.arrived:
                wait(block.arrived)
        self.saved = [None] * len(self.saved)
        self.inside = None
        self.free = [self.inward.mark(), self.inward.mark()]

    def give_up_room(self) -> None:
        """Free the slots, between passes; a backward pass allocates them."""
        self.reset()
        self.inward.synchronize()
        self.slots = [None, None]

    def make_room(self) -> None:
        pass

    def pack(self, tensor: torch.Tensor):
        plain = type(tensor) is torch.Tensor and tensor.device.type == self.device.type  # by type: "cuda" != "cuda:0"
        if not plain or tensor.untyped_storage().nbytes() < self.min_bytes:
            return tensor
        saved = SavedTensor(self.block, tensor)
        self.block.tensors.append(saved)
        return saved

    def send(self, block: SavedBlock, fixed: set[int]) -> None:
        """Start copying what `block` saved to the host, except `fixed` storages. Each storage is copied once.

        A storage that the previous block saved too (its output is this block's input) reuses that host copy.
        """
        previous = self.saved[block.index - 1] if block.index else None
        before = previous.pieces if previous else {}
        new_bytes, new = 0, []  # what this block has to copy itself
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
            # In elements of the slot viewed in this dtype; pieces are aligned, so the division is exact
            offset = block.pieces[address].offset // tensor.element_size() + tensor.storage_offset()
            saved.view = (tensor.dtype, tensor.size(), tensor.stride(), offset)
            saved.tensor = None
        host = self.host_memory(block.index, new_bytes)
        for piece, start in new:
            piece.host = host[start : start + piece.source.nbytes]
        pairs = [(piece.host, piece.source) for piece, _ in new]
        block.sent = self.outward.start(pairs, after=[self.outward.mark()])

    def host_memory(self, index: int, num_bytes: int) -> torch.Tensor:
        """The pinned buffer of block `index`, reused every step; it grows only for a larger video than before."""
        host = self.host[index]
        if host is None or host.nbytes < num_bytes:
            self.outward.api.synchronize()  # before memory goes that copies may still use
            self.host[index] = host = None
            self.host[index] = host = pinned_memory(num_bytes, self.device)
        return host

    def release(self, block: SavedBlock) -> None:
        """Free the GPU memory of what was sent: one block later, when the copy is done and nothing has to wait."""
        if block.sent:
            wait(block.sent)
        for piece in block.pieces.values():
            piece.source = None

    # ---- backward

    def enter_backward(self, index: int) -> None:
        if self.inside is None:  # the backward pass begins
            after_backward(self.reset)
        else:  # the block before has been computed: its slot may be overwritten after this event
            self.free[self.inside % 2] = self.inward.mark()
        self.inside = index
        self.fetch(index)  # a no-op, unless it was not prefetched
        self.fetch(index - 1)  # prefetch for the next block
        block = self.saved[index]
        if block and block.arrived:
            wait(block.arrived)

    def fetch(self, index: int) -> None:
        """Start copying block `index` back to the GPU, unless that has been done."""
        block = self.saved[index] if index >= 0 else None
        if block is None or not block.pieces or block.arrived:
            return
        slot = self.slot_memory(index % 2)
        pairs = [
            (slot[piece.offset : piece.offset + piece.host.nbytes], piece.host) for piece in block.pieces.values()
        ]
        block.arrived = self.inward.start(pairs, after=[self.free[index % 2], block.sent])

    def slot_memory(self, slot: int) -> torch.Tensor:
        needed = max(block.num_bytes for block in self.saved if block)
        if self.slots[slot] is None or self.slots[slot].nbytes < needed:
            self.slots[slot] = None  # free the old slot first: both need not exist at once
            self.slots[slot] = torch.empty(needed, dtype=torch.uint8, device=self.device)
            self.free[slot] = self.inward.mark()  # the memory's previous use may still be running
        return self.slots[slot]

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
    """Addresses of storages that outlive a block's pass: its weights, and inputs that all blocks share.

    Inputs shaped like an output are activations, different for every block; others, such as RoPE tables, are shared.
    """
    shapes = {leaf.shape for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)}
    shared = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.shape not in shapes]
    tensors = [*block.parameters(), *block.buffers(), *shared]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if type(tensor) in (torch.Tensor, nn.Parameter)}


def offload_activations(blocks: nn.ModuleList, device: torch.device, min_bytes: int = MIN_BYTES) -> HostActivations:
    """Offload tensors of `min_bytes` or more that autograd saves for `blocks`; losses and gradients stay bit-equal."""
    activations = HostActivations(blocks, device, min_bytes)
    wrap_blocks(blocks, activations)
    return activations
