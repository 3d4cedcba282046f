#!/usr/bin/env python3
"""Where the milliseconds of a training step are: what the GPU's streams do, and what the training's own waits for.

    python benchmarks/bench.py 5b-stream+sft@fa4 --steps 8 --profile
    python benchmarks/step_time.py --profile -- training/cogvideox_text_to_video_lora.py FLAGS

Of a few steps in the middle of a run, by torch.profiler. The training's stream is the one with the most kernels. While
it is idle it waits for others (copies, updates of optimizer states, other GPUs), or for the host, if nothing runs.
"""

import re
from collections import Counter, defaultdict
from typing import NamedTuple


FIRST, NUM_STEPS = 3, 3  # steps that are profiled
KINDS = {  # the first pattern in an event's name
    "copies to the GPU": "Memcpy HtoD",
    "copies to the host": "Memcpy DtoH",
    "NCCL": "^nccl",
    "updates": "[Aa]dam|[Oo]ptimizer",
    "matrix products": "gemm|nvjet|cutlass(?!.*flash)|xmma",
    "attention": "flash|fmha|sdpa|attention",
}
TRANSFERS = ("copies to the GPU", "copies to the host", "NCCL")
REST = "other kernels"
BESIDE = "kernels of other streams"  # with the ring, updates
NUM_KERNELS = 8  # of the list of the longest


class Event(NamedTuple):
    """Something that ran on the GPU; times in seconds."""

    name: str
    stream: int
    start: float
    end: float


class StepProfiler:
    """Profiles the steps FIRST to FIRST + NUM_STEPS - 1 of the optimizer that `step_time.py` watches."""

    def __init__(self, torch):
        self.torch, self.num_steps, self.profile, self.events = torch, 0, None, []

    def on_step(self):
        """After each step."""
        self.num_steps += 1
        if self.num_steps == FIRST - 1:
            self.torch.cuda.synchronize()
            self.profile = self.torch.profiler.profile(activities=[self.torch.profiler.ProfilerActivity.CUDA])
            self.profile.start()
        if self.num_steps == FIRST - 1 + NUM_STEPS:
            self.torch.cuda.synchronize()
            self.profile.stop()
            recorded = (
                self.profile.profiler.kineto_results.events()
            )  # profile.events() would take a minute to order them
            self.events = events_of(recorded, self.torch.autograd.DeviceType.CUDA)

    def report(self) -> str:
        if not self.events:
            return f"no profile: it needs a GPU and {FIRST - 1 + NUM_STEPS} steps or more"
        return "\n".join(lines_of(self.events, NUM_STEPS))


def events_of(recorded, device_type) -> list[Event]:
    """Of torch.profiler's raw events, those of one kind of device; from the first one's start."""
    events = [event for event in recorded if event.device_type() == device_type]
    start = min((event.start_ns() for event in events), default=0)
    spans = [((event.start_ns() - start) / 1e9, (event.end_ns() - start) / 1e9) for event in events]
    return [Event(event.name(), event.device_resource_id(), *span) for event, span in zip(events, spans, strict=True)]


def kind_of(event: Event, training: int) -> str:
    """`training`: the stream of the training."""
    kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.name)), REST)
    return BESIDE if event.stream != training and kind not in TRANSFERS else kind


def union(spans) -> list[tuple[float, float]]:
    """Disjoint spans in order."""
    merged = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def gaps(spans, begin: float, end: float) -> list[tuple[float, float]]:
    """What disjoint spans leave of begin to end."""
    edges = [begin, *(edge for span in spans for edge in span), end]
    return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if stop > start]


def shared(first, second) -> float:
    """Seconds that are in both of two lists of disjoint spans."""
    total, position = 0.0, 0
    for start, end in first:
        while position < len(second) and second[position][1] <= start:
            position += 1
        for other_start, other_end in second[position:]:
            if other_start >= end:
                break
            total += min(end, other_end) - max(start, other_start)
    return total


def seconds(spans) -> float:
    return sum(end - start for start, end in spans)


def lines_of(events: list[Event], num_steps: int) -> list[str]:
    """The report: per step, in seconds."""
    begin, end = min(event.start for event in events), max(event.end for event in events)
    training = Counter(event.stream for event in events if not event.name.startswith("Mem")).most_common(1)[0][0]
    kinds, kernels = defaultdict(list), defaultdict(float)
    for event in events:
        kinds[kind_of(event, training)].append((event.start, event.end))
        kernels[event.name] += event.end - event.start
    busy = union((event.start, event.end) for event in events if event.stream == training)
    idle = gaps(busy, begin, end)
    anything = union((event.start, event.end) for event in events)

    lines = [f"profile of {num_steps} steps, seconds per step: {(end - begin) / num_steps:.3f}"]
    lines += [f"  the training's stream: busy {seconds(busy) / num_steps:.3f}, idle {seconds(idle) / num_steps:.3f}"]
    others = {kind: union(spans) for kind, spans in kinds.items()}
    for kind in [*KINDS, BESIDE, REST]:
        if kind in others:
            took, alone = seconds(others[kind]) / num_steps, shared(idle, others[kind]) / num_steps
            lines += [f"  {kind}: {took:.3f}, of it {alone:.3f} while the training's stream is idle"]
    lines += [f"  nothing at all: {seconds(gaps(anything, begin, end)) / num_steps:.3f}"]
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:NUM_KERNELS]
    return lines + [f"    {total / num_steps:.3f} {name[:90]}" for name, total in longest]
