#!/usr/bin/env python3
"""Measure how fast a checkpoint of full fine-tuning is written and loaded, and what host memory that takes.

    python benchmarks/checkpoint_rate.py /a/disk/with/60/GB --csv benchmarks/checkpoint_rate.csv -- \\
        --use_cpu_offload_optimizer

Flags after -- are those of training. A model of 12 blocks of 5b's width, 1.6 billion random weights, makes one update
on noise. Its checkpoint, 22 GB with AdamW's states, is written; a model that has not been trained loads it, from the
disk and not from the page cache, and writes it again: the files must be the same. Growth is the peak of the process's
host memory above what training holds before or after, whichever is more. The seconds of 5b's 78 GB are in proportion.
"""

import contextlib
import gc
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("training", "tests")]

from base import console


if __name__ == "__main__":
    console.set_up()  # before the libraries are imported

from step_time import GIB, append_row, check_csv, command_line, package_versions


KIND, WEIGHTS_5B = "5b", 5.57e9
LATENTS = (1, 3, 16, 8, 12)  # [B, F, C, H, W]: small, since only the weights matter
INTERVAL = 0.005  # seconds between two looks at the memory
PROVENANCE = {"seed": 0}
FIELDS = ["label", "billions", "gb", "write_s", "write_gb_s", "write_growth_gib", "load_s", "load_gb_s"]
FIELDS += ["load_growth_gib", "write_5b_s", "load_5b_s", "card", *package_versions(), "command"]


class Phase:
    """Seconds of a `with` body, and the peak of the process's host memory in it, pinned memory included."""

    def __enter__(self):
        gc.collect()
        self.done, self.before = threading.Event(), host_bytes()
        self.peak, self.started = self.before, time.perf_counter()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self):
        while not self.done.wait(INTERVAL):
            self.peak = max(self.peak, host_bytes())

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self.started
        self.done.set()
        self.watcher.join()
        gc.collect()
        self.growth = max(self.peak - max(self.before, host_bytes()), 0) / GIB


def host_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_model(folder, num_layers, tiny):
    """A pipeline's folder, of which only the transformer is used."""
    import torch

    from random_pipeline import real_sizes
    from tiny_pipeline import make_tiny_pipeline, write_pipeline

    if tiny:
        make_tiny_pipeline(folder, KIND)
        return
    sizes = real_sizes(KIND, "tiny", "tiny")
    sizes["transformer"]["num_layers"] = num_layers
    write_pipeline(folder, KIND, sizes, device="cuda" if torch.cuda.is_available() else "cpu")


def make_state(flags, folder):
    """What the script has before its first update."""
    import torch

    from args import parse_training_args
    from cogvideox.loading import load_transformer
    from engine import compose, optimizers
    from engine.update import TrainingState

    given = ["--pretrained_model_name_or_path", str(folder), "--data_root", ".", "--load_tensors", "--memory"]
    given += ["balanced", "--mixed_precision", "bf16", "--optimizer", "adamw", "--lr_warmup_steps", "0", *flags]
    args = parse_training_args("t2v_sft", given)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    transformer = load_transformer(folder, torch.float32)
    heads = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    dtype = torch.bfloat16
    engine = compose.build_sft_engine_from_args(
        args, args.memory, 0.0, transformer, (1, 300, *heads), dtype, dtype, device
    )
    optimizer = compose.build_engine_optimizer_from_args(args, None, engine, args.learning_rate)
    return TrainingState(engine, optimizer, optimizers.make_lr_scheduler_from_args(args, optimizer, 100))


def make_update(state):
    """One update on noise: then the optimizer has its states."""
    import torch

    from cogvideox.inputs import rotary_embeddings
    from engine.update import update

    transformer = state.engine.transformer
    device, config = next(transformer.parameters()).device, transformer.config
    latents = torch.randn(LATENTS, device=device)
    velocity = transformer(
        hidden_states=latents.bfloat16(),
        encoder_hidden_states=torch.randn(1, 226, config.text_embed_dim, device=device).bfloat16(),
        timestep=torch.tensor([500], device=device),
        image_rotary_emb=rotary_embeddings(config, latents),
        return_dict=False,
    )[0]
    assert update((velocity.float() - latents).square().mean(), state, True, 1.0).stepped


def write(state, folder):
    """(the phase, the checkpoint's path): all of it is on the disk."""
    from run.checkpoints import write_checkpoint

    with Phase() as phase:
        state.complete()
        path = write_checkpoint(folder, 1, state, PROVENANCE)
    return phase, path


def load(state, path):
    """As a run resumes, from the disk."""
    from base.manifest import find_damage
    from run import checkpoints

    forget_pages(path)
    with Phase() as phase:
        assert find_damage(path, checkpoints.is_loaded) is None
        checkpoints.load(path, state, PROVENANCE)
        synchronize()
    return phase


def forget_pages(folder):
    """Drop the files from the page cache; they have been flushed."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def synchronize():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def files_of(path):
    return json.loads((path / "manifest.json").read_text())["files"]


def measure(flags, work):
    """The CSV's figures, with the model in `work`."""
    state = make_state(flags, work / "model")
    make_update(state)
    written, path = write(state, work)
    files = files_of(path)
    weights, num_bytes = sum(param.numel() for param in state.engine.params), sum(f["size"] for f in files.values())
    del state
    gc.collect()
    resumed = make_state(flags, work / "model")
    loaded = load(resumed, path)
    if files_of(write(resumed, work)[1]) != files:
        sys.exit("the loaded state is not the one that was written")
    return {
        "billions": round(weights / 1e9, 3),
        "gb": round(num_bytes / 1e9, 3),
        "write_s": round(written.seconds, 2),
        "write_gb_s": round(num_bytes / 1e9 / written.seconds, 2),
        "write_growth_gib": round(written.growth, 3),
        "load_s": round(loaded.seconds, 2),
        "load_gb_s": round(num_bytes / 1e9 / loaded.seconds, 2),
        "load_growth_gib": round(loaded.growth, 3),
        "write_5b_s": round(written.seconds * WEIGHTS_5B / weights, 1),
        "load_5b_s": round(loaded.seconds * WEIGHTS_5B / weights, 1),
    }


def describe_row(row):
    return (
        f"{row['gb']} GB of {row['billions']} billion weights: written in {row['write_s']} s, {row['write_gb_s']} GB/s, "
        f"host memory grew by {row['write_growth_gib']} GiB; loaded in {row['load_s']} s, {row['load_gb_s']} GB/s, by "
        f"{row['load_growth_gib']} GiB\n5b: written in {row['write_5b_s']} s, loaded in {row['load_5b_s']} s"
    )


def parse_args(argv):
    parser = console.Parser(description=__doc__, usage="%(prog)s [flags] FOLDER [-- flags of training]")
    parser.add_argument("folder", type=Path, help="on the disk to measure; what is written there is removed")
    parser.add_argument("--num_layers", type=int, default=12, help="blocks (default: %(default)s)")
    parser.add_argument("--label", default="", help="name of the row")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: for a look without a GPU")
    parser.add_argument("--csv", type=Path, help="file to append a row to")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.flags = argv[split + 1 :]
    return args


def main():
    args = parse_args(sys.argv[1:])
    if args.csv:
        check_csv(args.csv, FIELDS)
    import torch

    work = args.folder / "checkpoint-rate"
    work.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, work)
        make_model(work / "model", args.num_layers, args.tiny)
        row = {"label": args.label, **measure(args.flags, work)}
    print(describe_row(row), flush=True)
    if args.csv:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        typed = command_line(["python", "benchmarks/checkpoint_rate.py", *sys.argv[1:]])
        append_row(args.csv, row | {"card": card, **package_versions(), "command": typed}, FIELDS)


if __name__ == "__main__":
    main()
