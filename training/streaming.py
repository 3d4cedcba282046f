"""What a GPU does not need all the time lies in host memory and travels behind the compute.

`offload_activations`: what autograd saves of a block goes out as the forward pass leaves it, and is back when the
backward pass comes to it. `stream_weights`: frozen weights come block by block, in the order of either pass.
Both act on a list of blocks that are called one after the other, compiled or not; with both, offload first. A video's
17,776 tokens use every weight so often that the copies take a fifth of the time of the compute.

No stream is left to the allocator (record_stream returns memory late): a buffer is used again once the stream that
uses it next waits for an event of the one that used it last. On a CPU the copies are done at once.
"""

import functools
import logging
import mmap
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed
from safetensors import safe_open
from torch import nn
from torch.utils._pytree import tree_leaves

from errors import MemoryFullError, UsageError


logger = logging.getLogger(__name__)

NUM_SLOTS = 3  # blocks of weights on the GPU: the one at work, and two on their way
MIN_BYTES = 2**20  # of a saved tensor that is worth a copy
ALIGNMENT = 256  # bytes; what CUDA's own allocator promises, so that kernels see no difference
NO_OUTER_CHECKPOINT = "with streaming, checkpoints are inside of the blocks, not around them"


# ---------------------------------------------------------------- host memory and copies


def free_on_gpu(device: torch.device) -> float:
    """Bytes that this process may still take there, at most its share of the card if one is set."""
    free, total = torch.cuda.mem_get_info(device)
    # By its index: a plain "cuda" is refused there
    fraction = torch.cuda.get_per_process_memory_fraction(device.index)
    share = total * fraction - torch.cuda.memory_reserved(device)
    return min(free, share)


class PageLocked(mmap.mmap):
    """Memory of its own pages, so that CUDA can lock it: torch's allocator would round up to a power of two."""

    address = None  # where CUDA has locked it

    def __del__(self):
        if self.address is not None and not sys.is_finalizing():
            torch.cuda.synchronize()  # a copy may be on its way
            torch.cuda.cudart().cudaHostUnregister(self.address)


def page_locked(num_bytes: int, device: torch.device, file: int = -1) -> torch.Tensor:
    """uint8 [num_bytes] in host memory, from which `device` copies without the CPU; that of a `file` in memory, if given."""
    memory = PageLocked(file, max(num_bytes, 1))
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    if device.type == "cuda":
        if file < 0 and torch.get_num_threads() > 1:  # what ranks share may hold weights by now
            flat.zero_()  # by all cores; cudaHostRegister touches one page after another: 5.2 s for 10 GiB, 2.8 so
        error = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
        if error:
            raise MemoryFullError(f"{flat.nbytes / 2**30:.2f} GiB of host memory cannot be page-locked (CUDA {error})")
        memory.address = flat.data_ptr()
    return flat


class Copies:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device):
        self.api = torch.get_device_module(device)
        self.stream = self.api.Stream()

    def mark(self):
        """An event: what the compute stream has been given so far is done."""
        event = self.api.Event()
        event.record()
        return event

    def start(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after: list):
        """Copy to the first of each pair once the events `after` have come. Returns the event of the copies' end."""
        with self.api.stream(self.stream):
            for event in after:
                event.wait()
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self.mark()


def wait(event) -> None:
    """The compute stream goes on after `event`; the CPU does not wait."""
    event.wait()


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 of all memory that `tensor` is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


# ---------------------------------------------------------------- passes through the blocks


class WatchedBlock:
    """Mixed into a block's class: its techniques run around the call.

    Not by module hooks: `block.compile()` takes those into its graph, and none holds a context around the call.
    """

    def __call__(self, *args, **kwargs):
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(f"a block was called in the backward pass: {NO_OUTER_CHECKPOINT}")
        index, techniques = self.watched
        run = super().__call__
        for technique in techniques:
            run = functools.partial(technique.forward, index, run)
        return run(*args, **kwargs)


@functools.cache
def watched_class(block_class: type) -> type:
    """One for all blocks: they share compiled code, which depends on the class."""
    return type(block_class.__name__, (WatchedBlock, block_class), {})


def watch(blocks: nn.ModuleList, technique) -> None:
    """Run `technique.forward(index, call, *args, **kwargs)` in place of every block's call, around earlier techniques."""
    for index, block in enumerate(blocks):
        if not isinstance(block, WatchedBlock):
            block.watched = (index, [])
            block.__class__ = watched_class(type(block))
        block.watched[1].append(technique)


def before_backward(outputs, action: Callable[[], None]) -> None:
    """Call `action()` when the backward pass is about to enter the block that gave `outputs`."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if tensors:
        torch.autograd.graph.register_multi_grad_hook(tensors, lambda grad: action(), mode="any")


def after_backward(action: Callable[[], None]) -> None:
    """Call `action()` at the end of the backward pass that is going on."""
    torch.autograd.Variable._execution_engine.queue_callback(action)


# ---------------------------------------------------------------- activations


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


# ---------------------------------------------------------------- weights


class WeightRing:
    """Frozen weights and buffers of blocks in host memory, one flat piece a block; a few slots on the GPU take turns.

    Block i always comes to slot i % slots, so that each tensor has one address on the GPU: what autograd or compiled
    code holds of it in the forward pass is right again in the backward pass. Outside of its block's pass every tensor
    is in host memory, so that state dicts and adapters see the weights as they are.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device, num_slots: int):
        self.tensors = [[tensor for *_, tensor in streamed_tensors(block)] for block in blocks]
        self.host = [host_home(tensors, device) for tensors in self.tensors]
        self.copies = Copies(device)
        size = max(home.nbytes for home in self.host)
        num_slots = min(num_slots, len(blocks))
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        self.host_views = [[tensor.data for tensor in tensors] for tensors in self.tensors]
        self.slot_views = [
            [
                view_in(self.slots[index % num_slots], byte_offset(tensor) - home.storage_offset(), tensor)
                for tensor in tensors
            ]
            for index, (tensors, home) in enumerate(zip(self.tensors, self.host, strict=True))
        ]
        self.holds: list[int | None] = [None] * num_slots  # number of the block that is there or on its way
        self.free = [self.copies.mark() for _ in self.slots]
        self.ready = list(self.free)
        self.inside: int | None = None  # the block whose tensors are on the GPU

    def forward(self, index: int, call: Callable, *args, **kwargs):
        self.enter(index)
        try:
            outputs = call(*args, **kwargs)
        finally:
            self.leave()
        following = index + len(self.slots)
        if following < len(self.host):
            self.fetch(following)
        elif not torch.is_grad_enabled():  # the next pass starts anew; a backward pass starts with what is here
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
        for index in range(len(self.slots)):  # what the next pass starts with: mostly there
            self.fetch(index)

    def enter(self, index: int) -> None:
        """The tensors of block `index` on the GPU; those of any other in host memory."""
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
        """Start the copy of block `index` to its slot, unless it is there."""
        place = index % len(self.slots)
        if self.holds[place] == index:
            return
        home = self.host[index]
        self.ready[place] = self.copies.start([(self.slots[place][: home.nbytes], home)], after=[self.free[place]])
        self.holds[place] = index


def stream_weights(blocks: nn.ModuleList, device: torch.device, num_slots: int = NUM_SLOTS) -> WeightRing:
    """Keep the frozen weights of `blocks` in host memory, exact, and at most `num_slots` blocks of them on `device`.

    What is trainable is left alone, and all that `.to()` moves.
    """
    ring = WeightRing(blocks, device, num_slots)
    for block in blocks:
        block._apply = functools.partial(apply_to_rest, block, list(streamed_tensors(block)))
    watch(blocks, ring)
    return ring


def streamed_tensors(block: nn.Module) -> Iterator[tuple[dict, str, torch.Tensor]]:
    """(dictionary of its module, name there, tensor) of each frozen weight and buffer, in a fixed order."""
    seen = set()
    for module in block.modules():
        for owner in (module._parameters, module._buffers):
            for name, tensor in owner.items():
                if tensor is None or tensor.requires_grad or id(tensor) in seen:
                    continue
                if type(tensor) not in (nn.Parameter, torch.Tensor):
                    raise UsageError(f"--memory stream: weights of type {type(tensor).__name__} cannot be streamed")
                seen.add(id(tensor))
                yield owner, name, tensor


def apply_to_rest(block: nn.Module, streamed: list, function: Callable, recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which `.to()` and its like use, on all but the streamed tensors."""
    for owner, name, _ in streamed:
        owner[name] = None
    try:
        return type(block)._apply(block, function, recurse)
    finally:
        for owner, name, tensor in streamed:
            owner[name] = tensor


def host_home(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The flat piece of host memory that holds `tensors` one after the other; unless one does, they move into a new one."""
    if not is_home(tensors, device):
        flat = page_locked(flat_bytes(tensors), device)
        for tensor, view in zip(tensors, views_in(flat, tensors), strict=True):
            view.copy_(tensor.data)
            tensor.data = view
    start = byte_offset(tensors[0])
    return storage_bytes(tensors[0])[start : start + flat_bytes(tensors)]


def is_home(tensors: list[torch.Tensor], device: torch.device) -> bool:
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
    """From a tensor's first element to its last, whatever its strides."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def flat_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(aligned(extent_bytes(tensor)) for tensor in tensors)


def view_in(flat: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """A view of `flat` from byte `offset` on, with the dtype, shape and strides of `like`."""
    piece = flat[offset : offset + extent_bytes(like)].view(like.dtype)
    return piece.as_strided(like.shape, like.stride())


def views_in(flat: torch.Tensor, tensors: list[torch.Tensor], offset: int = 0) -> Iterator[torch.Tensor]:
    """One after the other, from byte `offset` on, as far as there is room."""
    for tensor in tensors:
        if offset + extent_bytes(tensor) > flat.nbytes:
            return
        yield view_in(flat, offset, tensor)
        offset += aligned(extent_bytes(tensor))


# ---------------------------------------------------------------- loading


def load_blocks(
    blocks: nn.ModuleList, prefix: str, files: list[Path], dtype: torch.dtype, device: torch.device
) -> None:
    """Fill `blocks`, built on the meta device, from safetensors `files`, whose keys start with `prefix`, in `dtype`.

    Straight into the memory that `stream_weights` uses for `device`: never twice in host memory, never on the GPU. The
    ranks of one machine share it, and one of them reads the files.
    """
    places = [place for block in blocks.to(dtype).requires_grad_(False) for place in streamed_tensors(block)]
    tensors = [tensor for *_, tensor in places]
    file, fills = memory_file(flat_bytes(tensors))
    views = views_in(page_locked(flat_bytes(tensors), device, file), tensors)
    if file >= 0:
        os.close(file)  # the memory stays as long as somebody has it mapped
    for (owner, name, tensor), view in zip(places, views, strict=True):
        owner[name] = nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view
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
    gather_objects(None)  # not before the memory is filled


def memory_file(num_bytes: int) -> tuple[int, bool]:
    """(a file in memory, whether this rank is to fill it): one for all ranks of a machine, where the system lets them.

    Not in /dev/shm, which containers make small. It goes with the last process that has it. -1 for a single process.
    """
    if not torch.distributed.is_initialized():
        return -1, True
    name = f"weights-{secrets.token_hex(8)}"
    own = os.memfd_create(name)
    os.ftruncate(own, max(num_bytes, 1))
    offers = gather_objects((socket.gethostname(), f"/proc/{os.getpid()}/fd/{own}", name))
    path, name_there = next(offer[1:] for offer in offers if offer[0] == socket.gethostname())
    shared = own
    try:
        # Containers may share a host's name and not its processes: only the file itself says which it is
        if name_there != name and name_there in os.readlink(path):
            shared = os.open(path, os.O_RDWR)
    except OSError as error:
        logger.warning("this process holds frozen weights of its own, those of %s are out of reach (%s)", path, error)
    gather_objects(None)  # who offers keeps the file open until here
    if shared != own:
        os.close(own)
    return shared, shared == own


def gather_objects(value) -> list:
    """`value` of every rank, by rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
