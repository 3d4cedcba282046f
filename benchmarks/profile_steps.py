"""Where the time of a training step goes: what the GPU's streams do, and what the training's own waits for.

    python benchmarks/bench.py 5b-stream+sft@fa4 --steps 6 --warmup 1 --profile
    python benchmarks/step_time.py --profile -- training/cogvideox_text_to_video_lora.py FLAGS

By torch.profiler, which makes steps a little longer. The training's stream is the one with the most kernels. While it is
idle it waits for others (copies, updates of optimizer states, other GPUs), or for the host, if nothing runs.
"""

import re
from collections import Counter, defaultdict
from typing import NamedTuple


FIRST, NUM_STEPS = 3, 3  # steps that are profiled
LAST = FIRST + NUM_STEPS - 1
TRANSFERS = {"copies to the GPU": "^Memcpy HtoD", "copies to the host": "^Memcpy DtoH", "NCCL": "^nccl"}
BESIDE = "kernels of other streams"  # the ring's updates among them
KERNELS = {  # of the training's stream; the first whose pattern is in the name
    "updates": "[Aa]dam|[Oo]ptimizer",
    "attention": "flash|fmha|sdpa|attention",
    "matrix products": "gemm|nvjet|cutlass|xmma",
    "other kernels": "",
}
NUM_LONGEST = 8


class Event(NamedTuple):
    """Something that ran on the GPU; times in seconds."""

    name: str
    stream: int
    start: float
    end: float


class StepProfiler:
    """Profiles the steps FIRST to LAST of the optimizer that `step_time.py` watches."""

    def __init__(self, torch):
        self.torch, self.num_steps, self.profile, self.events = torch, 0, None, []

    def on_step(self):
        """After each step."""
        self.num_steps += 1
        if self.num_steps == FIRST - 1:
            self.torch.cuda.synchronize()
            self.profile = self.torch.profiler.profile(activities=[self.torch.profiler.ProfilerActivity.CUDA])
            self.profile.start()
        if self.num_steps == LAST:
            self.torch.cuda.synchronize()
            self.profile.stop()
            # Undocumented, but profile.events() would take a minute to order them
            recorded = self.profile.profiler.kineto_results.events()
            self.events = events_of(recorded, self.torch.autograd.DeviceType.CUDA)

    def report(self) -> str:
        if not self.events:
            return f"no profile: it needs a GPU that torch.profiler can record, and {LAST} steps or more"
        return "\n".join(lines_of(self.events, NUM_STEPS))


def events_of(recorded, device_type) -> list[Event]:
    """Of torch.profiler's raw events, those of one kind of device; from the first one's start."""
    events = [event for event in recorded if event.device_type() == device_type]
    start = min((event.start_ns() for event in events), default=0)
    spans = [((event.start_ns() - start) / 1e9, (event.end_ns() - start) / 1e9) for event in events]
    return [Event(event.name(), event.device_resource_id(), *span) for event, span in zip(events, spans, strict=True)]


def kind_of(event: Event, training: int) -> str:
    """`training`: the stream of the training."""
    kinds = TRANSFERS | (KERNELS if event.stream == training else {BESIDE: ""})
    return next(kind for kind, pattern in kinds.items() if re.search(pattern, event.name))


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
    """Seconds that are in both of two lists of disjoint spans in order."""
    total, one, other = 0.0, 0, 0
    while one < len(first) and other < len(second):
        (start, end), (other_start, other_end) = first[one], second[other]
        total += max(0.0, min(end, other_end) - max(start, other_start))
        if end < other_end:
            one += 1
        else:
            other += 1
    return total


def seconds(spans) -> float:
    return sum(end - start for start, end in spans)


def lines_of(events: list[Event], num_steps: int) -> list[str]:
    """The report: per step, in seconds."""
    begin, end = min(event.start for event in events), max(event.end for event in events)
    kernels = [event for event in events if not event.name.startswith("Mem")] or events
    training = Counter(event.stream for event in kernels).most_common(1)[0][0]
    kinds, names = defaultdict(list), defaultdict(float)
    for event in events:
        kinds[kind_of(event, training)].append((event.start, event.end))
        names[event.name] += event.end - event.start
    busy = union((event.start, event.end) for event in events if event.stream == training)
    idle = gaps(busy, begin, end)
    anything = union((event.start, event.end) for event in events)

    lines = [f"profile of {num_steps} steps, seconds per step: {(end - begin) / num_steps:.3f}"]
    lines += [f"  the training's stream: busy {seconds(busy) / num_steps:.3f}, idle {seconds(idle) / num_steps:.3f}"]
    for kind in [*TRANSFERS, BESIDE, *KERNELS]:
        spans = union(kinds[kind])
        alone = f", of it {shared(idle, spans) / num_steps:.3f} while the training's stream is idle"
        if spans:
            lines += [f"  {kind}: {seconds(spans) / num_steps:.3f}" + ("" if kind in KERNELS else alone)]
    lines += [f"  nothing at all: {seconds(gaps(anything, begin, end)) / num_steps:.3f}", "  longest:"]
    longest = sorted(names.items(), key=lambda item: -item[1])[:NUM_LONGEST]
    return lines + [f"    {total / num_steps:.3f} {name[:90]}" for name, total in longest]
