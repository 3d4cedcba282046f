"""AdamW's states and the remainders of split masters: of each block, every kind in one flat buffer, cut into chunks."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from memory.host import aligned, pinned_memory


STATES = {"remainders": torch.int16, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
# As bitsandbytes keeps them: codes, and the largest absolute value of every 256 of them
STATES_8BIT = STATES | {"exp_avg": torch.uint8, "exp_avg_sq": torch.uint8}
STATES_8BIT |= {"absmax1": torch.float32, "absmax2": torch.float32}
PER = {"absmax1": 256, "absmax2": 256}  # weights that share a number
MIN_8BIT = 4096  # weights of a tensor; the states of smaller ones stay fp32, as bitsandbytes has it
AVERAGE = "average"  # of the fp32 masters, if it is asked for
GRADIENTS = "gradients"  # on the host, if the states are


class Storage(NamedTuple):
    """Where and how states are kept."""

    share: float = 0.0  # of the blocks whose states are on the GPU
    streams: bool = False  # the blocks' weights are in host memory, too
    low_bit: bool = False  # moments as bitsandbytes' 8-bit codes


ON_HOST = Storage()


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
    """The states `kinds` of a few weights, each kind in one flat buffer on the host or the GPU."""

    def __init__(self, weights: dict[int, nn.Parameter], kinds: dict[str, torch.dtype], on_host: bool, chunk: int):
        self.weights, self.kinds, self.on_host = weights, kinds, on_host  # weights by index among the model's
        # Weights start at multiples of 256, so that neither a vector of the kernel nor 8-bit codes' maximum has two
        self.start_of, self.size = {}, 0
        for index, weight in weights.items():
            self.start_of[index] = self.size
            self.size += aligned(weight.numel() * 2) // 2
        self.chunks = list(self.cut(chunk))
        self.buffers: dict[str, torch.Tensor] = {}
        self.streamed: torch.Tensor | None = None  # the weights, if they are on the host
        self.gradients: dict[int, torch.Tensor] = {}  # on the GPU, if the states are
        self.due = None  # the Step that is still to be applied
        self.updated = None  # event: it has been
        self.kept = None  # event: what it changed is on the host, where that is its place

    def cut(self, size: int) -> Iterator[Chunk]:
        for start in range(0, self.size, size):
            stop = min(start + size, self.size)
            pieces = []
            for index, at in self.start_of.items():
                low, high = max(start, at), min(stop, at + self.weights[index].numel())
                if low < high:
                    pieces.append(Piece(index, slice(low - start, high - start), slice(low - at, high - at)))
            if pieces:  # else all padding
                yield Chunk(slice(start, stop), stop - start, pieces)

    def allocate(self, device: torch.device, streams: bool) -> None:
        """`streams`: room for the weights, too, on the host."""
        self.buffers = allocate(self.kinds, self.size, device, self.on_host)
        if streams:
            self.streamed = allocate({"weights": torch.bfloat16}, self.size, device, on_host=True)["weights"]

    def parts(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """A chunk's stretch of every buffer."""
        return {name: flat[within(chunk.inside, name)] for name, flat in self.buffers.items()}

    def view(self, name: str, index: int) -> torch.Tensor:
        """A weight's part of a buffer: in its shape, or [groups]."""
        part = self.buffers[name][within(self.place_of(index), name)]
        return part if name in PER else part.view(self.weights[index].shape)

    def new_weight(self, index: int, device: torch.device) -> torch.Tensor:
        """Room for a weight in bf16."""
        shape = self.weights[index].shape
        if self.streamed is None:
            return torch.empty(shape, dtype=torch.bfloat16, device=device)
        return self.streamed[self.place_of(index)].view(shape)

    def place_of(self, index: int) -> slice:
        return slice(self.start_of[index], self.start_of[index] + self.weights[index].numel())


def allocate(
    kinds: dict[str, torch.dtype], num_weights: int, device: torch.device, on_host: bool = False
) -> dict[str, torch.Tensor]:
    """A flat buffer of each kind for so many weights, zeros, in one piece of memory."""
    lengths = {name: num_weights // PER.get(name, 1) for name in kinds}
    sizes = [aligned(lengths[name] * dtype.itemsize) for name, dtype in kinds.items()]
    if on_host:
        memory = pinned_memory(sum(sizes), device)
    else:
        memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    flats = zip(kinds.items(), memory.split(sizes), strict=True)
    return {name: flat.view(dtype)[: lengths[name]] for (name, dtype), flat in flats}


def within(weights: slice, name: str) -> slice:
    """The numbers of a kind that belong to a stretch of weights, which starts with a group."""
    per = PER.get(name, 1)
    return slice(weights.start // per, math.ceil(weights.stop / per))


def moments(states: dict) -> list[str]:
    """The names of what a rule of Adam keeps in `states`."""
    return [name for name in states if name in STATES_8BIT and name != "remainders"]


def divide(
    params: list[nn.Parameter], blocks: nn.ModuleList, states: dict, gradients: dict, share: float, chunk: int
) -> tuple[list[BlockStates], list[BlockStates]]:
    """(the weights of each block, those around the blocks); of 8-bit states, small weights of blocks are around them.

    `states` of a `share` of the blocks are on the GPU; those of the others on the host, their `gradients` too. Both are
    spread evenly, so that the link always has a block to work for.
    """
    rest = {id(weight): index for index, weight in enumerate(params)}
    low_bit = states["exp_avg"] == torch.uint8
    in_full = {name: STATES.get(name, dtype) for name, dtype in states.items() if name not in PER}

    def take(indices: list[int], kinds: dict, on_host: bool = False) -> BlockStates:
        return BlockStates({index: params[index] for index in indices}, kinds, on_host, chunk)

    divided = []
    for block, on_host in zip(blocks, spread(len(blocks) - round(share * len(blocks)), len(blocks)), strict=True):
        large = [weight for weight in block.parameters() if not low_bit or weight.numel() >= MIN_8BIT]
        divided.append(
            take([rest.pop(id(weight)) for weight in large], states | (gradients if on_host else {}), on_host)
        )
    small = [index for index in rest.values() if not low_bit or params[index].numel() < MIN_8BIT]
    large = sorted(set(rest.values()) - set(small))
    return divided, [take(small, in_full), *([take(large, states)] if large else [])]


def spread(count: int, places: int) -> list[bool]:
    """`count` of `places`, evenly, never the first one if that can be."""
    return [(place + 1) * count // places > place * count // places for place in range(places)]
