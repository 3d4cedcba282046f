"""Memory of the walk through the VAE: room for the activations in flight, and frames that causal convolutions keep.

Kept frames lie on the GPU if there is plenty of room, else in pinned host memory, copied while the GPU computes: the
same bits either way.
"""

import logging
import math
import weakref

import torch

from base.errors import MemoryFullError
from memory.host import TransferStream, free_gpu_bytes, pinned_memory, wait


logger = logging.getLogger(__name__)

ALIGNMENT = 128  # values: as aligned as memory from torch's allocator, whatever the kernels make of it
SLOTS = 3  # buffers in turn, for each direction: one in use, two prefetched or on their way out
# Host memory takes no more time (H200, PCIe 5), so kept frames lie on the GPU only where there is plenty: they leave half
# of what is free, and MARGIN bytes, for slots, a slab's convolution, and fragments
MARGIN = 2**30

# {vae: flat host memory, in the order in which a video asks for it}, for as long as the VAE lives: pinning takes
# longer than decoding a video. Videos of all sizes share it, and so do encoder and decoder
PAGES = weakref.WeakKeyDictionary()


class Room:
    """One block of memory for two activations, one at each end, and one for slabs.

    Asked for each of them anew, torch's allocator holds a third more, in fragments.
    """

    def __init__(self, like: torch.Tensor, num_values: int, num_slab_values: int):
        self.values = like.new_empty(padded(num_values))
        self.used = [0, 0]
        self.slabs = like.new_empty(num_slab_values)

    def place(self, shape: tuple[int, ...], end: int) -> torch.Tensor:
        """Memory for an activation at `end` 0 or 1; what was there before is no longer needed."""
        self.used[end] = count = math.prod(shape)
        if sum(self.used) > self.values.numel():  # what lies at the other end stays in the old block
            self.values = self.values.new_empty(padded(sum(self.used)))
        return (self.values[-count:] if end else self.values[:count]).view(shape)

    def slab(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for a slab; the one before is no longer needed."""
        count = math.prod(shape)
        if count > self.slabs.numel():
            self.slabs = self.slabs.new_empty(count)
        return self.slabs[:count].view(shape)


def padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class KeptFrames:
    """The two frames that each causal convolution read last of each of its slabs, for the next pass of the video."""

    def __init__(self, vae, like: torch.Tensor):
        self.like = like
        self.on_gpu = {}
        self.left = bytes_left(like.device)
        self.on_host = HostFrames(like, PAGES.setdefault(vae, []))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.on_host.finish()

    def older(self, key: tuple) -> torch.Tensor | None:
        """What the pass before wrote for `key`; None in a video's first pass."""
        if key not in self.on_gpu:
            return self.on_host.fetch(key)
        frames = self.on_gpu.pop(key)
        self.left += frames.nbytes
        return frames

    def newer(self, key: tuple, shape: tuple[int, ...]) -> torch.Tensor:
        """Where this pass writes: on the GPU or not, as decided in the first pass. `written` comes next."""
        num_bytes = math.prod(shape) * self.like.element_size()
        if key in self.on_host.homes or num_bytes > self.left:
            try:
                return self.on_host.slot(key, shape)
            except MemoryFullError as error:  # a container's limit, perhaps: the GPU may have room all the same
                logger.warning("%s: the VAE's frames stay on the GPU", error)
                self.left = math.inf
        self.left -= num_bytes
        self.on_gpu[key] = self.like.new_empty(shape)
        return self.on_gpu[key]

    def written(self, key: tuple) -> None:
        if key not in self.on_gpu:
            self.on_host.store(key)


def bytes_left(device: torch.device) -> float:
    """What kept frames may take of `device`."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # given back where it is needed
    return (free_gpu_bytes(device) + unused) / 2 - MARGIN


class HostFrames:
    """Kept frames in host memory; each next pass asks for them in the order in which they came."""

    def __init__(self, like: torch.Tensor, pages: list):
        self.pages = pages
        self.inward, self.outward = (
            TransferStream(like.device),
            TransferStream(like.device),
        )  # at once: a PCIe link has two directions
        self.incoming, self.outgoing = Slots(like), Slots(like)
        self.homes = {}  # the host's frames of each key
        self.stored = {}  # event of each key: its copy to the host is made
        self.fetched = {}  # (frames, event) of the keys that are being prefetched

    def slot(self, key: tuple, shape: tuple[int, ...]) -> torch.Tensor:
        """GPU memory to write the frames of `key` to, before `store`."""
        frames = self.outgoing.next(shape)
        if key not in self.homes:
            self.homes[key] = self.page(len(self.homes), frames)
        return frames

    def page(self, number: int, frames: torch.Tensor) -> torch.Tensor:
        if number == len(self.pages):
            self.pages.append(pinned_memory(frames.nbytes, frames.device))
        elif self.pages[number].nbytes < frames.nbytes:
            self.pages[number] = pinned_memory(frames.nbytes, frames.device)
        return self.pages[number][: frames.nbytes].view(frames.dtype).view(frames.shape)

    def store(self, key: tuple) -> None:
        pair = (self.homes[key], self.outgoing.latest)
        self.stored[key] = self.outward.start([pair], after=[self.outward.mark()])
        self.outgoing.release(self.stored[key])

    def fetch(self, key: tuple) -> torch.Tensor | None:
        """The frames of `key` on the GPU until SLOTS more are fetched; the next ones are prefetched."""
        if key not in self.homes:
            return None
        keys = list(self.homes)
        first = keys.index(key)
        for ahead in keys[first : first + SLOTS]:
            if ahead not in self.fetched:
                self.fetched[ahead] = self.prefetch(ahead)
        frames, arrived = self.fetched.pop(key)
        wait(arrived)
        return frames

    def prefetch(self, key: tuple):
        """(frames, event). Its slot was read last by a convolution that is queued already: the copy waits for it."""
        frames = self.incoming.next(self.homes[key].shape)
        return frames, self.inward.start([(frames, self.homes[key])], after=[self.inward.mark(), self.stored[key]])

    def finish(self) -> None:
        """Slots go back to torch's allocator when their copies are made, after an error too."""
        for _, arrived in self.fetched.values():
            wait(arrived)
        for event in self.stored.values():
            wait(event)


class Slots:
    """GPU buffers in turn, each used again once its release's event has fired."""

    def __init__(self, like: torch.Tensor):
        self.like = like
        self.buffers = [like.new_empty(0)] * SLOTS
        self.views: list[torch.Tensor | None] = [None] * SLOTS  # a copy's source stays until the copy is made
        self.released = [None] * SLOTS
        self.index = -1

    @property
    def latest(self) -> torch.Tensor:
        return self.views[self.index]

    def next(self, shape: tuple[int, ...]) -> torch.Tensor:
        self.index = (self.index + 1) % SLOTS
        if self.released[self.index] is not None:
            wait(self.released[self.index])
            self.released[self.index] = None
        count = math.prod(shape)
        if self.buffers[self.index].numel() < count:
            self.buffers[self.index] = self.like.new_empty(count)
        self.views[self.index] = self.buffers[self.index][:count].view(shape)
        return self.latest

    def release(self, event) -> None:
        self.released[self.index] = event
