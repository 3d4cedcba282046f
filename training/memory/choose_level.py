"""The fastest memory level that fits, by the formula, and a table of what each needs."""

import math

from base.memory_levels import HOST_LEVELS, LEVELS
from memory.estimate import CHECKPOINTING, GIB, MemoryPeaks, Workload, memory_peaks


def levels_of(workload: Workload) -> tuple[str, ...]:
    """The levels available for this task, fastest first."""
    if workload.is_lora and not workload.deepspeed:
        return LEVELS
    return LEVELS if workload.rings else LEVELS[:2]


def fits(needed: MemoryPeaks, gpu_bytes: float, host_bytes: float) -> bool:
    """Leaves 5 % free, since these are estimates."""
    return needed.reserved * 1.05 <= gpu_bytes and needed.host * 1.05 <= host_bytes


def fastest_that_fits(workload: Workload, gpu_bytes: float, host_bytes: float) -> tuple[str, float] | None:
    """The fastest level that fits, and the largest share of states on the GPU that does; or None."""
    for level in levels_of(workload):
        for share in shares_of(workload, level):
            needed = memory_peaks(workload._replace(share=share), level, gpu_bytes=gpu_bytes)
            if fits(needed, gpu_bytes, host_bytes):
                return level, share
    return None


def shares_of(workload: Workload, level: str) -> list[float]:
    """The shares of blocks that may have their states on the GPU, the largest first: unless one is asked for."""
    has_choice = level in HOST_LEVELS and not workload.is_lora and not workload.share
    blocks = workload.num_blocks
    return [count / blocks for count in range(blocks, -1, -1)] if has_choice else [workload.share]


def nearest_level(workload: Workload, gpu_bytes: float, host_bytes: float) -> tuple[str, MemoryPeaks]:
    """The level that is least short of memory, and what it needs."""
    needs = {level: memory_peaks(workload, level, gpu_bytes=gpu_bytes) for level in levels_of(workload)}
    level = min(needs, key=lambda level: max(needs[level].reserved / gpu_bytes, needs[level].host / host_bytes))
    return level, needs[level]


def table(workload: Workload, gpu_bytes: float | None, host_bytes: float) -> str:
    """One line per level; `gpu_bytes` is None without a GPU."""
    width = 30 if workload.rings else 12
    lines = [f"{'--memory':{width}} {'GPU, reserved':>14} {'allocated':>12} {'host':>12}  fits here"]
    for level, share in rows_of(workload, gpu_bytes, host_bytes):
        needed = memory_peaks(workload._replace(share=share), level, gpu_bytes=gpu_bytes or math.inf)
        sizes = [f"{size / GIB:.1f} GiB" for size in (needed.reserved, needed.allocated, needed.host)]
        if gpu_bytes is None:
            verdict = "no GPU"
        elif fits(needed, gpu_bytes, host_bytes):
            verdict = "yes"
        elif fits(needed, gpu_bytes, math.inf):
            verdict = f"no, {host_bytes / GIB:.1f} GiB are free on the host"
        else:
            verdict = f"no, {gpu_bytes / GIB:.1f} GiB are free on the GPU"
        name = "(checkpoints)" if level == CHECKPOINTING else level
        name += f" --states_on_gpu {share:.3g}" if share and level in HOST_LEVELS else ""
        lines.append(f"{name:{width + 1}}{sizes[0]:>14} {sizes[1]:>12} {sizes[2]:>12}  {verdict}")
    return "\n".join(lines)


def rows_of(workload: Workload, gpu_bytes: float | None, host_bytes: float) -> list[tuple[str, float]]:
    """(level, share) of each line: also of what --memory auto would choose, if that is another share."""
    rows = [(level, workload.share) for level in (CHECKPOINTING, *levels_of(workload))]
    best = fastest_that_fits(workload, gpu_bytes, host_bytes) if gpu_bytes else None
    if best and best not in rows:
        rows.insert([level for level, _ in rows].index(best[0]), best)
    return rows
