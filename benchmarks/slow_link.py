#!/usr/bin/env python3
"""Run the engine's copies between GPU and host at a slower link's rate, and measure what rate that gives.

    python benchmarks/slow_link.py 12 25

For the step time that a card on PCIe 3 x16 (about 12 GB/s) or PCIe 4 x16 (25 GB/s) would wait for, on a card with a
faster link: `step_time.py --link`, rows `+link25` of bench.py. Each direction is one link that carries one copy at a
time. A copy takes the link, copies at full speed and keeps it until the slower link would be done, on streams of its
own: compute, and the other direction, go on meanwhile. Only copies of memory/host.py's TransferStream are slowed down:
weights, activations, gradients and optimizer states; not batches, and not gradients that accumulate on the host.
"""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import torch


try:
    import triton
except ImportError:
    sys.exit("slower links need a GPU and Triton, which this torch has not: install torch for CUDA")
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from base import console
from memory import host


MEBIBYTES = 256  # of a copy that is measured
QUEUES = "32"  # of the GPU; with the default of 8, a waiting kernel can keep the one that it waits for from starting


@triton.jit
def take(lock, began):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(began, globaltimer())


@triton.jit
def keep(lock, began, nanoseconds):
    end = tl.load(began) + nanoseconds
    while globaltimer() < end:
        pass
    tl.atomic_xchg(lock, 0)


class SlowLink:
    """One direction of a link at `rate` GB/s (1e9 bytes)."""

    def __init__(self, rate: float):
        self.rate = rate
        self.lock, self.began = (torch.zeros(1, dtype=dtype, device="cuda") for dtype in (torch.int32, torch.int64))
        torch.cuda.synchronize()
        self.streams = {}  # of the caller -> ours; high priority, so that small kernels do not queue behind large ones

    def carry(self, pairs, copy) -> None:
        """Call `copy(pairs)`, as if on the current stream."""
        outer = torch.cuda.current_stream()
        if outer not in self.streams:
            self.streams[outer] = torch.cuda.Stream(priority=-1)
        stream = self.streams[outer]
        stream.wait_stream(outer)
        num_bytes = sum(source.nbytes for _, source in pairs)
        with torch.cuda.stream(stream):
            take[(1,)](self.lock, self.began, num_warps=1)
            copy(pairs)
            keep[(1,)](self.lock, self.began, int(num_bytes / self.rate), num_warps=1)
        outer.wait_stream(stream)


def slow_down(rate: float) -> None:
    """From now on, copies of each TransferStream take at least what a link of `rate` GB/s takes. Before CUDA starts."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = QUEUES
    if not torch.cuda.is_available():
        sys.exit("slower links need a GPU, and none is available")
    links, copy = {}, host.copy_all

    def copy_slowly(pairs):
        pairs = list(pairs)
        way = "up" if pairs[0][1].device.type == "cpu" else "down"
        if way not in links:
            links[way] = SlowLink(rate)
        links[way].carry(pairs, copy)

    host.copy_all = copy_slowly


def measured_rates(num_streams: int = 2) -> dict[str, float]:
    """GB/s of TransferStream: each way alone, both at once (each), and several streams of one way (together)."""
    device = torch.device("cuda")
    num_bytes = MEBIBYTES << 20
    streams = [host.TransferStream(device) for _ in range(max(num_streams, 2))]
    on_host = [host.pinned_memory(num_bytes, device) for _ in streams]
    on_gpu = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in streams]
    up = [[(there, here)] for here, there in zip(on_host, on_gpu, strict=True)]
    down = [[(here, there)] for here, there in zip(on_host, on_gpu, strict=True)]
    cases = {"up": up[:1], "down": down[:1], "both": [up[0], down[1]], "shared": up[:num_streams]}
    rates = {}
    for name, copies in cases.items():
        seconds = min(seconds_of(streams, copies) for _ in range(4))  # the first one compiles kernels
        rates[name] = num_bytes / 1e9 / seconds * (num_streams if name == "shared" else 1)
    return rates


def seconds_of(streams, copies) -> float:
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for event in [stream.start(pairs, [begin]) for stream, pairs in zip(streams, copies, strict=False)]:
        event.wait()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def main():
    parser = console.Parser(description=__doc__)
    parser.add_argument("rates", nargs="+", type=float, help="GB/s")
    rates = parser.parse_args().rates
    copy = host.copy_all
    for rate in rates:
        host.copy_all = copy
        slow_down(rate)
        figures = ", ".join(f"{name} {value:.2f}" for name, value in measured_rates().items())
        print(f"{rate:g} GB/s asked for: {figures}")


if __name__ == "__main__":
    main()
