"""Chooses the attention kernel of a run: checks the one asked for, or times all and takes the fastest.

Timed on the run's own shape, which takes a few seconds; results are cached per GPU, versions, dtype and shape.
"""

import importlib.metadata
import json
import logging
import os
import statistics
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from attention.kernels import make_attend
from base.errors import UsageError, first_line
from base.files import write_shared


logger = logging.getLogger(__name__)

# The first that runs is the reference for the others. math is no candidate: it materializes S x S values per head.
MIN_CAPABILITY = {"flash": 8, "cudnn": 8, "fa4": 9}  # major; FlashAttention-4 has no backward before Hopper
MIN_COSINE = 0.99  # of output and gradients to the reference's: correct kernels differ by rounding, about 1e-5
ROUNDS = 5  # timings per kernel; the median counts


def pick_attention(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> str:
    """Resolve --attention `name` (auto included) to a name for make_attend; UsageError if it cannot run here.

    `shape` is the run's largest [B, S, heads, head_dim]. Call it before the model is on the GPU: it briefly takes
    about 20 times the size of a query, 2 GiB for 5b's 17,776 tokens.
    """
    fused = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if name == "auto":
        return pick_fastest(shape, dtype, device) if fused else "sdpa"
    if name == "math":
        return name
    if not fused:
        raise UsageError(f"--attention {name}: computes on CUDA in bf16 or fp16 only; leave it out here")
    make_attend(name)  # a missing package raises its own error
    results = try_kernel(name, make_inputs(shape, dtype, device))
    if isinstance(results, str):
        raise UsageError(f"--attention {name} does not run here: {results}")
    return name


# ---------------------------------------------------------------- the trial


def pick_fastest(shape: tuple, dtype: torch.dtype, device: torch.device) -> str:
    """The fastest kernel of those that run and agree with the reference; torch's own choice if there is none."""
    names = candidates(device)
    if not names:
        return "sdpa"
    path, key = cache_path(), trial_key(shape, dtype, device)
    timings = read_timings(path)
    if is_timing(timings.get(key), names):
        logger.info("attention: %s (timed before: %s)", fastest(timings[key]), format_times(timings[key]))
        return fastest(timings[key])
    times, left_out = time_kernels(names, shape, dtype, device)
    for name, reason in left_out.items():
        logger.warning("attention: %s is left out: %s", name, reason)
    if not times:
        logger.warning("attention: none of %s runs here; torch chooses", ", ".join(names))
        return "sdpa"
    logger.info("attention: %s (%s)", fastest(times), format_times(times))
    if not left_out:  # not cached otherwise: the failure may be fixed, or was a lack of memory
        write_timings(path, timings | {key: times})
    return fastest(times)


def candidates(device: torch.device) -> list[str]:
    """Kernels that are installed and support this GPU."""
    capability = torch.cuda.get_device_capability(device)[0]
    missing = {"cudnn": not torch.backends.cudnn.is_available(), "fa4": fa4_version() is None}
    return [name for name, least in MIN_CAPABILITY.items() if capability >= least and not missing.get(name)]


def time_kernels(
    names: list[str], shape: tuple, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """({kernel: milliseconds for forward and backward}, {kernel: why it was left out})."""
    inputs, reference, times, left_out = make_inputs(shape, dtype, device), None, {}, {}
    # This pass also compiles and warms up each kernel, so that the timings below do not include it
    for name in names:
        results = try_kernel(name, inputs)
        if isinstance(results, str):
            left_out[name] = results
        elif reference is not None and (agreement := min_cosine(results, reference)) < MIN_COSINE:
            left_out[name] = f"its results differ from those of {next(iter(times))} (cosine {agreement:.3f})"
        else:
            reference = results if reference is None else reference
            times[name] = []
    for _ in range(ROUNDS):  # interleaved, so that throttling affects all kernels alike
        for name, rounds in times.items():
            rounds.append(milliseconds(make_attend(name), inputs))
    del inputs, reference, results
    torch.cuda.empty_cache()
    return {name: statistics.median(rounds) for name, rounds in times.items()}, left_out


def make_inputs(shape: tuple, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Query, key, value and the output's gradient, laid out as in training: value is a slice of a fused projection."""
    generator = torch.Generator(device).manual_seed(0)  # leaves the global random state alone
    batch, tokens, heads, size = shape

    def draw(parts: int) -> Tensor:
        return torch.randn((batch, tokens, parts, heads, size), generator=generator, device=device, dtype=dtype)

    query, key, value = draw(3).unbind(2)
    return [query.contiguous(), key.contiguous(), value, draw(1)[:, :, 0]]


def try_kernel(name: str, inputs: list[Tensor]) -> list[Tensor] | str:
    """Output and gradients of the kernel, or one line saying why there are none."""
    try:
        results = run(make_attend(name), inputs)
        finite = all(torch.isfinite(result).all() for result in results)  # synchronizes: device errors surface here
    except torch.AcceleratorError:  # the device is unusable: every later kernel would fail and be blamed for it
        raise
    except Exception as error:  # noqa: BLE001 - JIT-compiled kernels can raise anything; the caller logs it
        return first_line(error)
    return results if finite else "its output or gradients are not finite"


def run(attend, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of query, key and value."""
    *leaves, grad = [part.detach() for part in inputs]
    leaves = [part.requires_grad_() for part in leaves]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def min_cosine(results: list[Tensor], reference: list[Tensor]) -> float:
    """The smallest cosine similarity over output and gradients, each flattened to one vector."""
    pairs = zip(results, reference, strict=True)
    return min(F.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0).item() for a, b in pairs)


def milliseconds(attend, inputs: list[Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(attend, inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def fastest(times: dict[str, float]) -> str:
    return min(times, key=times.get)


def format_times(times: dict[str, float]) -> str:
    return ", ".join(f"{name} {time:.1f}" for name, time in times.items()) + " ms forward and backward"


# ---------------------------------------------------------------- cache of earlier timings


def cache_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "cogvideox-factory" / "attention.json"


def trial_key(shape: tuple, dtype: torch.dtype, device: torch.device) -> str:
    """Everything that the timings depend on."""
    key_parts = [
        torch.cuda.get_device_name(device),
        f"torch {torch.__version__}",
        f"cuDNN {torch.backends.cudnn.version()}",
        f"CUDA {torch.version.cuda}",
        f"flash-attn-4 {fa4_version()}",
        str(dtype).removeprefix("torch."),
        "x".join(map(str, shape)),
    ]
    if torch.are_deterministic_algorithms_enabled():
        key_parts.append("deterministic")
    return ", ".join(key_parts)


def fa4_version() -> str | None:
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def read_timings(path: Path) -> dict:
    """{key: {kernel: milliseconds}}; empty if the file is missing or damaged."""
    try:
        timings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): attention is timed again", path, first_line(error))
        return {}
    if not isinstance(timings, dict):
        logger.warning("%s does not hold earlier timings: attention is timed again", path)
        return {}
    return timings


def is_timing(times, names: list[str]) -> bool:
    """True for a valid cache entry that covers exactly these kernels."""
    return isinstance(times, dict) and set(times) == set(names) and all(isinstance(t, float) for t in times.values())


def write_timings(path: Path, timings: dict) -> None:
    """Replace the file atomically; failing to write it is only a warning."""
    try:
        write_shared(path, json.dumps(timings, indent=2) + "\n")
    except OSError as error:
        logger.warning("%s cannot be written (%s): attention is timed again next time", path, error.strerror)
