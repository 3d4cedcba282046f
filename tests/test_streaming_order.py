"""Who may touch which memory when: copies and compute of streamed blocks, as a GPU with streams of its own would run them.

On a CPU everything is done at once and in order, so that a missing wait goes unseen. Here each stream has a vector
clock: an access is right only if it comes after every earlier one of the same bytes that it could disturb.
"""

from collections import Counter

import pytest
import torch
from torch import nn

from cogvideox import vae_memory
from memory import activations, host, streaming


CPU = torch.device("cpu")
COMPUTE = "compute"


class Race(AssertionError):
    """Two streams use the same bytes, one of them writes, and neither waits for the other."""


class Streams:
    """What each stream knows to be done: {stream: {stream: accesses}}."""

    def __init__(self):
        self.known: dict[object, Counter] = {COMPUTE: Counter()}
        self.accesses = []  # (first byte, last byte, writes, stream, its clock)

    def join(self, stream, event) -> None:
        self.known.setdefault(stream, Counter())
        self.known[stream] |= event.done

    def access(self, stream, tensor, writes: bool) -> None:
        clock = self.known.setdefault(stream, Counter())
        clock[stream] += 1
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        for start, end, wrote, other, when in self.accesses:
            if start < last and first < end and (wrote or writes) and clock[other] < when:
                raise Race(f"{stream} {'writes' if writes else 'reads'} what {other} may still be using")
        self.accesses.append((first, last, writes, stream, clock[stream]))


class Event:
    def __init__(self, streams, stream):
        self.streams, self.done = streams, Counter(streams.known.setdefault(stream, Counter()))

    def wait(self) -> None:
        self.streams.join(COMPUTE, self)


@pytest.fixture
def streams(monkeypatch):
    """All copies are on record, each on its own stream."""
    record = Streams()

    class TransferStream:
        def __init__(self, device):
            self.api = torch.get_device_module(device)

        def mark(self):
            return Event(record, COMPUTE)

        def start(self, pairs, after):
            for event in after:
                record.join(self, event)
            for target, source in pairs:
                record.access(self, source, writes=False)
                record.access(self, target, writes=True)
                target.copy_(source)
            return Event(record, self)

    monkeypatch.setattr(host, "TransferStream", TransferStream)
    monkeypatch.setattr(activations, "TransferStream", TransferStream)
    monkeypatch.setattr(streaming, "TransferStream", TransferStream)
    monkeypatch.setattr(vae_memory, "TransferStream", TransferStream)
    return record


def make_blocks(streams, num_blocks):
    """Blocks x -> x * weight, with frozen weights, whose every use of memory is on record."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states, weight):
            ctx.save_for_backward(states, weight)
            product = states * weight
            for tensor, writes in ((states, False), (weight, False), (product, True)):
                streams.access(COMPUTE, tensor, writes)
            return product

        @staticmethod
        def backward(ctx, grad):
            states, weight = ctx.saved_tensors
            grad_of_states = grad * weight + 0 * states
            for tensor, writes in ((states, False), (weight, False), (grad_of_states, True)):
                streams.access(COMPUTE, tensor, writes)
            return grad_of_states, None

    class Block(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.weight = nn.Parameter(torch.full((64,), 1.0 + index), requires_grad=False)

        def forward(self, states):
            return Product.apply(states, self.weight)

    return nn.ModuleList(Block(index) for index in range(num_blocks))


def run(blocks, size=1, backward=True):
    """One pass through the blocks; the gradient of its input."""
    states = inputs = torch.ones(16 * size, 64, requires_grad=backward)
    for block in blocks:
        states = block(states)
    if not backward:
        return None
    states.sum().backward()
    return inputs.grad


LEVELS = {
    "weights": lambda blocks: streaming.stream_weights(blocks, CPU, num_slots=3),
    "two slots": lambda blocks: streaming.stream_weights(blocks, CPU, num_slots=2),
    "activations": lambda blocks: activations.offload_activations(blocks, CPU, min_bytes=1),
}


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 7])
@pytest.mark.parametrize("level", [*LEVELS, "both"])
def test_no_memory_is_filled_while_somebody_uses_it(level, num_blocks, streams):
    blocks = make_blocks(streams, num_blocks)
    for name in ("activations", "weights") if level == "both" else (level,):
        LEVELS[name](blocks)
    expected = torch.full((64,), 1.0)
    for index in range(num_blocks):
        expected *= 1.0 + index
    for size, backward in ((1, True), (1, True), (2, True), (1, False), (1, False), (2, True)):  # 2: a larger video
        gradient = run(blocks, size, backward)
        assert gradient is None or torch.equal(gradient, expected.expand_as(gradient))


@pytest.mark.parametrize("bytes_left", [0, 1000, 1e9])
@pytest.mark.parametrize("num_keys", [1, 2, 3, 4, 9])
def test_no_kept_frames_are_filled_while_somebody_uses_them(streams, monkeypatch, num_keys, bytes_left):
    """Of the VAE's causal convolutions, over the passes of two videos."""
    vae, like, passes = nn.Module(), torch.zeros(1), 4
    monkeypatch.setattr(vae_memory, "bytes_left", lambda device: bytes_left)
    for _ in range(2):
        with vae_memory.KeptFrames(vae, like) as kept:
            for number in range(passes):
                for key in range(num_keys):
                    older = kept.older(key)
                    if older is not None:
                        streams.access(COMPUTE, older, writes=False)
                        assert older.tolist() == [10 * (number - 1) + key] * 50
                    assert (older is None) == (number == 0)
                    if number < passes - 1:
                        newer = kept.newer(key, (50,))
                        streams.access(COMPUTE, newer, writes=True)
                        newer.fill_(10 * number + key)
                        kept.written(key)


def test_a_race_is_seen(streams):
    copies, memory = host.TransferStream(CPU), torch.zeros(4)
    copied = copies.start([(memory, torch.ones(4))], after=[])
    with pytest.raises(Race):
        streams.access(COMPUTE, memory, writes=False)
    copied.wait()
    streams.access(COMPUTE, memory, writes=False)
    with pytest.raises(Race):
        copies.start([(memory, torch.ones(4))], after=[])
    copies.start([(memory, torch.ones(4))], after=[copies.mark()])
