"""AdamW's states and the remainders of split masters: of each block, every kind in one flat buffer, cut into chunks."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from memory.host import aligned, pinned_memory


STATES = {"remainders": torch.int16, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names
AVERAGE = "average"  # of the fp32 masters, if it is asked for
GRADIENTS = "gradients"  # on the host, if the states are


class Piece(NamedTuple):
    """What a chunk holds of one weight."""

    index: int  # of the weight
    inside: slice  # of the chunk
    part: slice  # of the flattened weight


class Chunk(NamedTuple):
    """A stretch of a block's buffers."""

    inside: slice
    size: int
    pieces: list[Piece]


class BlockStates:
    """The states of a few weights, each kind in one flat buffer on the host or the GPU."""

    def __init__(self, weights: dict[int, nn.Parameter], on_host: bool, chunk: int):
        self.weights, self.on_host = weights, on_host  # by index among the model's weights
        # Weights start at multiples of 128, so that a vector of the kernel never holds two
        self.start_of, self.size = {}, 0
        for index, weight in weights.items():
            self.start_of[index] = self.size
            self.size += aligned(weight.numel() * 2) // 2
        self.chunks = list(self.cut(chunk))
        self.buffers: dict[str, torch.Tensor] = {}
        self.gradients: dict[int, torch.Tensor] = {}  # on the GPU, if the states are
        self.due = None  # the Step that is still to be applied
        self.updated = None  # event: it has been

    def cut(self, size: int) -> Iterator[Chunk]:
        for start in range(0, self.size, size):
            stop = min(start + size, self.size)
            pieces = []
            for index, at in self.start_of.items():
                low, high = max(start, at), min(stop, at + self.weights[index].numel())
                if low < high:
                    pieces.append(Piece(index, slice(low - start, high - start), slice(low - at, high - at)))
            yield Chunk(slice(start, stop), stop - start, pieces)

    def allocate(self, kinds: dict[str, torch.dtype], device: torch.device) -> None:
        sizes = [aligned(self.size * dtype.itemsize) for dtype in kinds.values()]
        if self.on_host:
            memory = pinned_memory(sum(sizes), device)
        else:
            memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        for (name, dtype), flat in zip(kinds.items(), memory.split(sizes), strict=True):
            self.buffers[name] = flat.view(dtype)[: self.size]

    def view(self, name: str, index: int) -> torch.Tensor:
        """A weight's part of a buffer, in its shape."""
        weight, start = self.weights[index], self.start_of[index]
        return self.buffers[name][start : start + weight.numel()].view(weight.shape)


def divide(weights: list[nn.Parameter], blocks: nn.ModuleList, on_host: bool, chunk: int) -> list[BlockStates]:
    """The weights of each block, then those around the blocks."""
    rest = {id(weight): index for index, weight in enumerate(weights)}
    divided = []
    for block in blocks:
        indices = [rest.pop(id(weight)) for weight in block.parameters()]
        divided.append(BlockStates({index: weights[index] for index in indices}, on_host, chunk))
    return [*divided, BlockStates({index: weights[index] for index in rest.values()}, False, chunk)]
