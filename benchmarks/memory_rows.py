#!/usr/bin/env python3
"""Train for a few updates and save the memory figures that the scripts report, one CSV row per run.

    python benchmarks/random_pipeline.py models/2b --kind 2b --text_encoder tiny
    python benchmarks/random_dataset.py data/random --num_clips 8
    python benchmarks/memory_rows.py benchmarks/optimizers.csv --model models/2b --data data/random --label 2b
    python benchmarks/memory_rows.py benchmarks/lora_memory.csv --model models/2b --data data/random --label 2b --original
    python benchmarks/memory_rows.py benchmarks/sft_memory.csv --model models/2b --data data/random --label 2b --original \
        --tasks sft
    python benchmarks/memory_rows.py benchmarks/deepspeed_memory.csv --model models/2b --data data/random --label 2b \
        --original --gpus 2 --tasks lora sft

Each row is an optimizer, with the loss on fixed noise and timesteps before and after. With --original, rows are the
LoRAs of original_memory.csv (the original's published figures for one GPU), with the same optimizer, batch size and
rank. What the original trained with checkpointing runs at --level, what it trained without runs at --memory speed. With
--tasks sft they are those of its full fine-tuning, at offload. With --gpus 2 they are those that it trained with
DeepSpeed on as many; figures are of the first GPU. Full fine-tuning writes no result.

Each run trains, validates halfway (after at least two updates, since optimizer states are allocated at the first), and
tests at the end, with 2 denoising steps: the peak does not depend on their number. The text encoder may be tiny, since
prompts are encoded before the transformer is loaded. Rows already in the file are skipped, so several calls can fill
it. A failed row is reported and not written; the others continue, and the exit code is 1.
"""

import csv
import json
import shutil
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console
from bench import RowError, card_name, launcher, rows_in, run_logged
from step_time import ROOT, append_row, check_csv, command_line, package_versions


SCRIPTS = {"lora": "cogvideox_text_to_video_lora.py", "sft": "cogvideox_text_to_video_sft.py"}
LEARNING_RATES = {"lora": "1e-4", "sft": "1e-5"}
OPTIMIZERS = {
    "adamw": ["--optimizer", "adamw"],
    "adamw-8bit": ["--optimizer", "adamw", "--use_8bit"],
    "adamw-8bit-torchao": ["--optimizer", "adamw", "--use_8bit", "--use_torchao"],
    "adamw-4bit": ["--optimizer", "adamw", "--use_4bit"],
    "adamw-fp8": ["--optimizer", "adamw", "--use_fp8"],
    "came": ["--optimizer", "came"],
    "prodigy": ["--optimizer", "prodigy", "--learning_rate", "1"],
    "offload": ["--optimizer", "adamw", "--use_cpu_offload_optimizer"],
    "offload-gradients": ["--optimizer", "adamw", "--use_cpu_offload_optimizer", "--offload_gradients"],
    "deepspeed": ["--optimizer", "adamw"],
}
# {the original's name of an optimizer: ours}
ORIGINAL_OPTIMIZERS = {
    "AdamW": "adamw",
    "AdamW (8-bit bitsandbytes)": "adamw-8bit",
    "AdamW + CPUOffloadOptimizer (with gradient offloading)": "offload-gradients",
}
ORIGINAL_DEEPSPEED, DEEPSPEED_RANK = "DeepSpeed (AdamW + CPU/Parameter offloading)", "256"  # its rank is not published
ORIGINAL_ROWS = ROOT / "benchmarks/original_memory.csv"
LEVELS = ("stream", "offload", "balanced")
STAGES = ("before_training", "before_validation", "after_validation", "after_testing")
FIGURES = ("allocated_gib", "reserved_gib", "peak_allocated_gib", "peak_reserved_gib")
FIELDS = ["label", "exit_code", "median_s", "loss_before", "loss_after", "total_s"]
FIELDS += [f"{when}_{figure}" for when in STAGES for figure in FIGURES]
FIELDS += ["host_peak_gib", "card", "torch", "diffusers", "transformers", "accelerate", "peft", "command"]


WRITING = threading.Lock()


class Row(NamedTuple):
    label: str
    task: str
    optimizer: str
    flags: list[str]


# ---------------------------------------------------------------- which rows


def optimizer_rows(args):
    """One row per task and optimizer."""
    flags = ["--gradient_checkpointing", "--train_batch_size", "1"]
    flags += ["--validation_data_root", args.data, "--validation_num_clips", "1"]
    return [
        Row(f"{args.label} {task} {optimizer}", task, optimizer, flags)
        for task in args.tasks
        for optimizer in args.optimizers
    ]


def read_originals(model, task="lora", gpus=1):
    """The original's rows for one GPU, or DeepSpeed's for two."""
    with open(ORIGINAL_ROWS, newline="") as file:
        rows = list(csv.DictReader(file))
    optimizers = ORIGINAL_OPTIMIZERS if gpus == 1 else [ORIGINAL_DEEPSPEED]
    kept = [row for row in rows if row["method"] == task and row["optimizer"] in optimizers]
    return [row for row in kept if row["model"] == f"CogVideoX-{model}"]


def name_of(original):
    """The label of our counterpart to an original row, without the level."""
    model = original["model"].removeprefix("CogVideoX-")
    rank = f" rank {rank_of(original)}" if original["method"] == "lora" else ""
    return f"{model} {original['method']} {optimizer_of(original)} batch {original['batch']}{rank}"


def optimizer_of(original):
    return ORIGINAL_OPTIMIZERS.get(original["optimizer"], "deepspeed")


def rank_of(original):
    return original["lora_rank"] or DEEPSPEED_RANK


def levels_of(original):
    """The levels that our counterpart may have run at."""
    if optimizer_of(original) == "deepspeed":
        return ("checkpointing",)
    if original["method"] == "sft":
        return ("offload",)
    return LEVELS if original["gradient_checkpointing"] == "True" else ("speed",)


def original_rows(args):
    return [
        original_row(original, args.level if args.level in levels_of(original) else levels_of(original)[0])
        for task in args.tasks
        for original in read_originals(args.label, task, args.gpus)
        if optimizer_of(original) in args.optimizers
    ]


def original_row(original, level):
    flags = ["--gradient_checkpointing"] if level == "checkpointing" else ["--memory", level]
    flags += ["--train_batch_size", original["batch"]]
    if original["method"] == "lora":
        flags += ["--rank", rank_of(original), "--lora_alpha", rank_of(original)]
    flags.append("--no_first_validation")  # as the original
    return Row(f"{name_of(original)} {level}", original["method"], optimizer_of(original), flags)


def side_by_side(model, rows, task="lora", gpus=1):
    """(the original's row, ours) for rows that both have; ours is the last in the file, at any level."""
    pairs = []
    for original in read_originals(model, task, gpus):
        labels = [f"{name_of(original)} {level}" for level in levels_of(original)]
        ours = [row for row in rows if row["label"] in labels]
        pairs += [(original, ours[-1])] if ours else []
    return pairs


# ---------------------------------------------------------------- a row


def middle_of(steps):
    return max(2, steps // 2)


def command_of(args, row, output_dir):
    """The command line of one row, as argv."""
    command = launcher(args.gpus, deepspeed=row.optimizer == "deepspeed")
    if row.task == "sft":  # a result of gigabytes
        command += [str(ROOT / "benchmarks/step_time.py"), "--no_result", "--"]
    command += [str(ROOT / "training" / SCRIPTS[row.task]), "--pretrained_model_name_or_path", args.model]
    command += ["--data_root", args.data, "--load_tensors", "--output_dir", str(output_dir)]
    command += ["--mixed_precision", "bf16", "--seed", "42"]
    command += ["--max_train_steps", str(args.steps), "--lr_warmup_steps", "0", "--log_every", "1"]
    command += ["--checkpointing_steps", str(10 * args.steps), "--enable_slicing"]
    command += ["--validation_prompt", "A red ball rolls over the grass.", "--num_inference_steps", "2"]
    command += ["--validation_steps", str(middle_of(args.steps)), "--learning_rate", LEARNING_RATES[row.task]]
    return [*command, *row.flags, *OPTIMIZERS[row.optimizer]]


def memory_figures(events, middle):
    """STAGES x FIGURES from the memory events of a run that validated after `middle` updates.

    Peaks cover everything before; those of the last moment cover only the test if the script resets its counters
    there, as the original did. Rendering with the untrained model, which the original did not do, is ignored.
    """
    events = [event for event in events if (event["step"], event["when"]) != (0, "after_validation")]
    names = [(event["step"], event["when"]) for event in events]
    steps = {"before_training": 0, "before_validation": middle, "after_validation": middle}
    ends = {when: names.index((step, when)) + 1 for when, step in steps.items() if (step, when) in names}
    seen = {when: events[: ends.get(when, 0)] for when in steps}
    seen["after_testing"] = [event for event in events if event["step"] > middle and event["when"].startswith("after")]
    figures = {}
    for when in STAGES:
        for figure in FIGURES:
            values = [event[figure] for event in seen[when] if figure in event]
            value = (max(values) if figure.startswith("peak") else values[-1]) if values else None
            figures[f"{when}_{figure}"] = value
    return figures


def row_of(row, args, command, total, output_dir):
    """The CSV row of a finished run."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    updates = [line["seconds"] for line in rows if "event" not in line]
    held_out = [line["loss"] for line in rows if line.get("event") == "held_out_loss"]
    memory = [line for line in rows if line.get("event") == "memory"]
    typed = command_line(["python", *command[1:]])
    figures = {"label": row.label, "exit_code": 0, "total_s": round(total, 1), "command": typed}
    alone = args.jobs == 1  # concurrent runs share the GPU: no timing
    figures["median_s"] = round(statistics.median(updates[2:]), 4) if alone and len(updates) > 2 else None
    figures["loss_before"], figures["loss_after"] = (held_out[0], held_out[-1]) if held_out else (None, None)
    figures["host_peak_gib"] = memory[-1].get("host_peak_gib")
    figures |= memory_figures(memory, middle_of(args.steps))
    return figures | {name: version for name, version in package_versions().items() if name in FIELDS}


def measure(args, row, card):
    """Run one row and append it to the CSV; its output is kept in <work>/<label>.log."""
    output_dir = (args.work / row.label.replace(" ", "-")).resolve()
    log_path = Path(f"{output_dir}.log")
    command = command_of(args, row, output_dir)
    log_path.unlink(missing_ok=True)
    shutil.rmtree(output_dir, ignore_errors=True)
    start = time.perf_counter()
    run_logged(command, log_path)
    figures = row_of(row, args, command, time.perf_counter() - start, output_dir) | {"card": card}
    steps = [middle_of(args.steps), args.steps] + ([] if "--no_first_validation" in command else [0])
    videos = [output_dir / f"samples/step_{step}/0_0.mp4" for step in steps]
    if missing := [video for video in videos if not video.exists()]:
        raise RowError(f"validation left no {missing[0]}; see {log_path}")
    shutil.rmtree(output_dir)  # gigabytes for full fine-tuning
    with WRITING:
        append_row(args.csv, figures, FIELDS)
    peaks = [figures[f"{when}_peak_reserved_gib"] for when in STAGES]
    print(f"{row.label}: {figures['median_s']} s/step, peaks {peaks} GiB reserved, loss "
          f"{figures['loss_before']} -> {figures['loss_after']}", flush=True)  # fmt: skip


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = console.Parser(description=__doc__)
    parser.add_argument("csv", type=Path, help="file to write or to go on with")
    parser.add_argument("--model", required=True, help="pipeline folder")
    parser.add_argument("--data", required=True, help="prepared data")
    parser.add_argument("--label", required=True, help="what the model is called in the file: 2b, 5b")
    parser.add_argument("--original", action="store_true", help="the rows of original_memory.csv for this model")
    parser.add_argument(
        "--level", choices=LEVELS, default="stream", help="--memory beside the original's checkpointing"
    )
    parser.add_argument("--tasks", nargs="+", choices=SCRIPTS, help="default: both, with --original lora")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1, help="2: DeepSpeed's rows of the original")
    parser.add_argument("--steps", type=int, default=10, help="updates, at least 3 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once on one GPU: memory is measured, time is not")
    parser.add_argument("--work", type=Path, default=Path("outputs/memory_rows"), help="folder of the runs")
    args = parser.parse_args(argv)
    args.tasks = args.tasks or (["lora"] if args.original else list(SCRIPTS))
    if args.steps < 3:
        parser.error("--steps: at least 3, validation is in the middle")
    if args.gpus > 1 and not args.original:
        parser.error("--gpus: with --original")
    if args.original and not read_originals(args.label):
        parser.error(f"--original --label {args.label}: {ORIGINAL_ROWS.name} has no such model")
    return args


def main():
    args = parse_args()
    check_csv(args.csv, FIELDS)
    for flag, folder, maker in (("model", args.model, "pipeline"), ("data", args.data, "dataset")):
        if not Path(folder).is_dir():
            sys.exit(f"--{flag} {folder}: no such folder; benchmarks/random_{maker}.py makes one")
    done = {row["label"] for row in rows_in(args.csv)}
    rows = original_rows(args) if args.original else optimizer_rows(args)
    rows, card = [row for row in rows if row.label not in done], card_name()

    def succeeded(row):
        try:
            measure(args, row, card)
            return True
        except RowError as error:
            print(f"{row.label}: FAILED, {error}", flush=True)
            return False

    with ThreadPoolExecutor(args.jobs) as pool:
        return 0 if all(list(pool.map(succeeded, rows))) else 1


if __name__ == "__main__":
    sys.exit(main())
