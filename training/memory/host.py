"""Page-locked host memory, asynchronous copies that overlap with compute, and hooks around a block's passes.

Buffers are synchronized by events, not by `record_stream`, which returns memory late: the stream that reuses a buffer
first waits for an event of the stream that used it last. On a CPU the copies are synchronous.
"""

import contextlib
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from base.errors import MemoryFullError


ALIGNMENT = 512  # bytes; as torch's CUDA allocator, so kernels see no difference
NO_OUTER_CHECKPOINT = "with streaming, checkpoints are inside of the blocks, not around them"


# ---------------------------------------------------------------- host memory and copies


def free_gpu_bytes(device: torch.device) -> float:
    """Bytes this process can still allocate on `device`, within its per-process memory fraction if one is set."""
    free, total = torch.cuda.mem_get_info(device)
    # Takes an index: a plain "cuda" is refused
    fraction = torch.cuda.get_per_process_memory_fraction(device.index)
    share = total * fraction - torch.cuda.memory_reserved(device)
    return min(free, share)


class PinnedMemory(mmap.mmap):
    """Whole pages that CUDA can pin; torch's pinned allocator would round the size up to a power of two."""

    address = None  # set once CUDA has pinned it

    def __del__(self):
        if self.address is not None and not sys.is_finalizing():
            torch.cuda.synchronize()  # a copy may be in flight
            torch.cuda.cudart().cudaHostUnregister(self.address)


def pinned_memory(num_bytes: int, device: torch.device, file: int = -1) -> torch.Tensor:
    """uint8 [num_bytes] in host memory, pinned if `device` is a GPU; `file`: descriptor to map, else new memory."""
    memory = PinnedMemory(file, max(num_bytes, 1))
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    if device.type == "cuda":
        if file < 0 and torch.get_num_threads() > 1:  # a shared file may hold weights already
            # Fault the pages in on all cores: cudaHostRegister does it page by page (10 GiB: 2.8 s instead of 5.2)
            flat.zero_()
        error = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
        if error:
            raise MemoryFullError(f"{flat.nbytes / 2**30:.2f} GiB of host memory cannot be page-locked (CUDA {error})")
        memory.address = flat.data_ptr()
    return flat


class TransferStream:
    """Asynchronous copies and kernels on a separate stream; with `priority` -1 its waiting kernels start before others."""

    def __init__(self, device: torch.device, priority: int = 0):
        self.api = torch.get_device_module(device)
        self.stream = self.api.Stream(priority=priority)

    def mark(self):
        """Record an event on the current stream: it fires when everything queued so far is done."""
        event = self.api.Event()
        event.record()
        return event

    def start(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after: list):
        """Queue a copy for each (target, source), after the events `after`; returns an event for their completion."""
        return self.run(functools.partial(copy_all, pairs), after)

    def synchronize(self) -> None:
        """Block until everything queued here is done."""
        self.api.synchronize()

    def run(self, action: Callable[[], None], after: list):
        """Call `action`, which queues work, with this stream as the current one; otherwise as `start`."""
        with self.api.stream(self.stream):
            for event in after:
                event.wait()
            action()
            return self.mark()


def copy_all(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def to_device(values, device: torch.device):
    """A tensor, or the tensors of a batch, on `device`: from page-locked memory, so that the host waits for no GPU."""
    if isinstance(values, dict):
        return {name: to_device(value, device) for name, value in values.items()}
    if not torch.is_tensor(values):
        return values
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # kept by torch until the copy is made, then used again
    return values.to(device, non_blocking=True)


class HostCopy:
    """A copy of `tensor` in host memory, made behind what the GPU has queued: only `wait` blocks, in any thread."""

    def __init__(self, tensor: torch.Tensor):
        self.source_device, self.copy = tensor.device, tensor
        if tensor.device.type == "cuda":
            self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.copy.copy_(tensor, non_blocking=True)
            self.arrived = torch.cuda.Event(blocking=True)  # waits without keeping a core busy
            self.arrived.record()

    def wait(self) -> torch.Tensor:
        if self.source_device.type == "cuda":
            with torch.cuda.device(self.source_device):  # a new thread's device is 0: it would get a context there
                self.arrived.synchronize()
        return self.copy


def wait(event) -> None:
    """Make the compute stream wait for `event`; the CPU does not block."""
    event.wait()


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage behind `tensor` as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


# ---------------------------------------------------------------- passes through the blocks


class WrappedBlock:
    """Mixin for a block's class that runs its techniques around each call.

    Not module hooks: `block.compile()` would trace them into its graph, and no hook can hold a context open during the
    call.
    """

    def __call__(self, *args, **kwargs):
        index, techniques = self.wrapped
        # Inside a backward pass: recompute around the block
        if torch._C._current_graph_task_id() != -1 and not all(
            getattr(technique, "may_recompute", False) for technique in techniques
        ):
            raise RuntimeError(f"a block was called in the backward pass: {NO_OUTER_CHECKPOINT}")
        run = super().__call__
        for technique in techniques:
            run = functools.partial(technique.forward, index, run)
        return run(*args, **kwargs)


@functools.cache
def wrapped_class(block_class: type) -> type:
    """Cached, so that all blocks get the same class and share compiled code, which is guarded on the class."""
    return type(block_class.__name__, (WrappedBlock, block_class), {})


def wrap_blocks(blocks: nn.ModuleList, technique) -> None:
    """Replace every block's call by `technique.forward(index, call, *args, **kwargs)`, around earlier techniques.

    `technique.may_recompute`: True if a checkpoint around the block may call it again in the backward pass. A technique
    with `give_up_room` and `make_room` frees GPU memory while it is not needed, see `room_given_up`.
    """
    for index, block in enumerate(blocks):
        if not isinstance(block, WrappedBlock):
            block.wrapped = (index, [])
            block.__class__ = wrapped_class(type(block))
        block.wrapped[1].append(technique)


@contextlib.contextmanager
def room_given_up(blocks: nn.ModuleList):
    """No block is called meanwhile, and what their techniques hold on the GPU for passes is free for others."""
    techniques = blocks[0].wrapped[1] if isinstance(blocks[0], WrappedBlock) else []
    rooms = [technique for technique in techniques if hasattr(technique, "give_up_room")]
    for technique in rooms:
        technique.give_up_room()
    try:
        yield
    finally:
        for technique in rooms:
            technique.make_room()


def before_backward(outputs, action: Callable[[], None]) -> None:
    """Call `action()` when the backward pass is about to enter the block that returned `outputs`."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if tensors:
        torch.autograd.graph.register_multi_grad_hook(tensors, lambda grad: action(), mode="any")


def after_backward(action: Callable[[], None]) -> None:
    """Call `action()` at the end of the current backward pass."""
    torch.autograd.Variable._execution_engine.queue_callback(action)
