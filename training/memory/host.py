"""Page-locked host memory, copies behind the compute, and hooks at a block's passes.

No stream is left to the allocator (record_stream returns memory late): a buffer is used again once the stream that
uses it next waits for an event of the one that used it last. On a CPU the copies are done at once.
"""

import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from base.errors import MemoryFullError


NUM_SLOTS = 3  # blocks of weights on the GPU: the one at work, and two on their way
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


def to_device(values, device: torch.device):
    """A tensor, or the tensors of a batch, on `device`: from page-locked memory, so that the host waits for no GPU."""
    if isinstance(values, dict):
        return {name: to_device(value, device) for name, value in values.items()}
    if not torch.is_tensor(values):
        return values
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # kept by torch until the copy is made, then used again
    return values.to(device, non_blocking=True)


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
