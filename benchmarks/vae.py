#!/usr/bin/env python3
"""Measure the VAE at its real size with random weights: the stock module's passes and ours, in time, memory and error.

    python benchmarks/vae.py --sizes 49x480x720 81x768x1360 --error --profile 12

Ways: the stock module, ours, and ours with all kept frames in host memory, as on a GPU without room for them (`host`).
--cap leaves torch so many GiB of the GPU: ours then keeps on it what there is room for. Seconds are the median of --repeats calls after one to warm up; GiB are the peak of a call, weights included. --error
compares a clip of 17x240x360 with the stock module in fp32: the norm of the difference over the norm of the result.
"""

import statistics
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console
from step_time import GIB, append_row, check_csv, command_line, package_versions


SIZES = ["49x480x720"]
ERROR_SIZE = "17x240x360"
STEPS, WAYS = ("encode", "decode"), ("stock", "ours", "host")
FIELDS = ["size", "step", "way", "seconds", "allocated_gib", "reserved_gib", "error"]
FIELDS += ["card", *package_versions(), "command"]


def size_of(text: str) -> tuple[int, int, int]:
    """FRAMESxHEIGHTxWIDTH in pixels."""
    frames, height, width = (int(number) for number in text.split("x"))
    return frames, height, width


def parse_args(argv):
    parser = console.Parser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="FRAMESxHEIGHTxWIDTH each (default: %(default)s)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="default: both")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="default: all")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--error", action="store_true", help="compare each way with the stock module in fp32")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="the N longest kernels of our way, one call"
    )
    parser.add_argument("--cap", type=float, metavar="GIB", help="of the GPU that torch may use; unset: all")
    parser.add_argument("--slab_values", type=int, help="of a frame's activations, in a slab; unset: the walk's own")
    parser.add_argument("--cudnn_benchmark", action="store_true", help="let cuDNN try its algorithms")
    parser.add_argument("--tiny", action="store_true", help="few channels: for a look without a GPU")
    parser.add_argument("--csv", type=Path, help="file to append a row to for each line of the table")
    args = parser.parse_args(argv)
    for size in args.sizes:
        try:
            size_of(size)
        except ValueError:
            parser.error(f"--sizes {size}: give FRAMESxHEIGHTxWIDTH, as in 49x480x720")
    return args


def make_vae(torch, device, dtype, tiny):
    from diffusers import AutoencoderKLCogVideoX

    from tiny_pipeline import TINY_VAE

    torch.manual_seed(0)
    with device:
        vae = AutoencoderKLCogVideoX(**({**TINY_VAE, "sample_height": 480, "sample_width": 720} if tiny else {}))
    return vae.to(dtype).eval().requires_grad_(False)


class Measure:
    """The VAE, and each step on random inputs in each way."""

    def __init__(self, torch, args):
        from cogvideox import vae as walk
        from cogvideox import vae_memory

        self.torch, self.args, self.walk, self.memory = torch, args, walk, vae_memory
        self.bytes_left = vae_memory.bytes_left
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
        self.vae = make_vae(torch, self.device, self.dtype, args.tiny)
        if args.slab_values:
            walk.SLAB_VALUES = args.slab_values
        if args.cap and self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(args.cap * GIB / torch.cuda.mem_get_info()[1])
        torch.backends.cudnn.benchmark = args.cudnn_benchmark
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def inputs(self, step, size, dtype=None):
        """Pixels in [-1, 1], or standard normal latents; drawn in fp32, the same for every dtype."""
        frames, height, width = size
        generator = self.torch.Generator(self.device).manual_seed(1)
        shape = (
            (1, 3, frames, height, width) if step == "encode" else (1, 16, (frames + 3) // 4, height // 8, width // 8)
        )
        values = self.torch.randn(shape, generator=generator, device=self.device)
        return (values.clamp(-1, 1) if step == "encode" else values).to(dtype or self.dtype)

    def call(self, step, way, inputs):
        self.memory.bytes_left = self.bytes_left if way == "ours" else lambda device: 0
        with self.torch.no_grad():
            if way != "stock":
                return getattr(self.walk, step)(self.vae, inputs)
            result = getattr(self.vae, step)(inputs)
            return result.latent_dist.parameters if step == "encode" else result.sample

    def synchronize(self):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def peaks(self):
        """(allocated, reserved) GiB at most since the last reset."""
        if self.device.type != "cuda":
            return 0.0, 0.0
        return self.torch.cuda.max_memory_allocated() / GIB, self.torch.cuda.max_memory_reserved() / GIB

    def figures(self, step, way, size):
        """Seconds, and the peak of memory of a call that starts with an empty cache."""
        inputs, seconds = self.inputs(step, size), []
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()
        for _ in range(1 + self.args.repeats):
            start = time.perf_counter()
            self.call(step, way, inputs)
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        allocated, reserved = self.peaks()
        return {
            "seconds": round(statistics.median(seconds[1:]), 3),
            "first": round(seconds[0], 2),
            "allocated_gib": round(allocated, 2),
            "reserved_gib": round(reserved, 2),
        }

    def errors(self, step):
        """{way: relative error} against the stock module in fp32."""
        size = size_of(ERROR_SIZE)
        results = {way: self.call(step, way, self.inputs(step, size)) for way in self.args.ways}
        again = {way: self.call(step, way, self.inputs(step, size)) for way in self.args.ways}
        for way in self.args.ways:
            if not self.torch.equal(results[way], again[way]):
                print(f"{step}, {way}: two calls differ in their bits", flush=True)
        if {"ours", "host"} <= set(results) and not self.torch.equal(results["ours"], results["host"]):
            print(f"{step}: frames kept on the host change bits", flush=True)
        self.vae.float()
        exact = self.call(step, "stock", self.inputs(step, size, self.dtype).float())
        self.vae.to(self.dtype)
        return {way: float((result.float() - exact).norm() / exact.norm()) for way, result in results.items()}

    def profile(self, step, size):
        """The longest kernels of our way."""
        from torch.profiler import ProfilerActivity, profile

        inputs = self.inputs(step, size)
        self.call(step, "ours", inputs)
        self.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
            self.call(step, "ours", inputs)
            self.synchronize()
        rows = [row for row in run.key_averages() if row.device_type.name == "CUDA"]
        rows.sort(key=lambda row: -row.self_device_time_total)
        total = sum(row.self_device_time_total for row in rows) / 1000
        print(f"{step}: {total:.0f} ms on the GPU", flush=True)
        for row in rows[: self.args.profile]:
            print(f"  {row.self_device_time_total / 1000:8.1f} ms  {row.count:5d} calls  {row.key[:100]}", flush=True)


def said(row):
    error = f"{row['error']:.2e}" if row["error"] else ""
    first = f"  ({row['first']:.2f} s the first call)" if "first" in row else ""
    memory = f"{row['allocated_gib']:6.2f} {row['reserved_gib']:6.2f}"
    return f"{row['size']:12s} {row['step']:7s} {row['way']:6s} {row['seconds']:8.3f} {memory}  {error}{first}"


def main():
    args = parse_args(sys.argv[1:])
    if args.csv:
        check_csv(args.csv, FIELDS)
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    measure = Measure(torch, args)
    capped = f", {args.cap} GiB of it" if args.cap else ""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{card}{capped}, {args.dtype}, slabs of {measure.walk.SLAB_VALUES} values a frame", flush=True)
    errors = {step: measure.errors(step) if args.error else {} for step in args.steps}
    for step, ways in errors.items():
        if ways:
            print(f"{ERROR_SIZE} {step}: error " + ", ".join(f"{way} {error:.2e}" for way, error in ways.items()))
    print("size         step    way     seconds  alloc  reserved GiB  error", flush=True)
    for size in args.sizes:
        for step in args.steps:
            for way in args.ways:
                figures = measure.figures(step, way, size_of(size))
                row = {"size": size, "step": step, "way": way, **figures, "error": errors[step].get(way)}
                print(said(row), flush=True)
                if args.csv:
                    del row["first"]
                    about = {"card": card, **package_versions(), "command": command_line(["python", *sys.argv])}
                    append_row(args.csv, row | about, FIELDS)
            if args.profile:
                measure.profile(step, size_of(size))


if __name__ == "__main__":
    console.set_up()
    main()
