#!/usr/bin/env python3
"""Train with every optimizer for a few updates and keep the memory figures that the scripts report, a CSV row each.

    python benchmarks/random_pipeline.py models/2b --kind 2b --text_encoder tiny
    python benchmarks/random_dataset.py data/random --num_clips 8
    python benchmarks/memory_rows.py benchmarks/optimizers.csv --model models/2b --data data/random --label 2b

Each row trains, validates in the middle and tests at the end, rendering 2 denoising steps: the peak does not depend on
their number. Its loss on fixed noise and timesteps is taken before and after. Rows that the file has already are left
out, so that several calls may fill it.
"""

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from step_time import package_versions


ROOT = Path(__file__).resolve().parents[1]
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
MOMENTS = ("before_training", "before_validation", "after_validation", "after_testing")
FIGURES = ("allocated_gib", "reserved_gib", "peak_allocated_gib", "peak_reserved_gib")
FIELDS = ["label", "exit_code", "median_s", "loss_before", "loss_after", "total_s"]
FIELDS += [f"{when}_{figure}" for when in MOMENTS for figure in FIGURES]
FIELDS += ["host_peak_gib", "card", "torch", "diffusers", "transformers", "accelerate", "peft", "command"]


def command_of(args, task, optimizer, output_dir):
    """argv of one row."""
    command = [sys.executable]
    if optimizer == "deepspeed":
        config = str(ROOT / "accelerate_configs" / "deepspeed.yaml")
        command += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", config]
    command += [str(ROOT / "training" / SCRIPTS[task]), "--pretrained_model_name_or_path", args.model]
    command += ["--data_root", args.data, "--load_tensors", "--output_dir", str(output_dir), "--overwrite"]
    command += ["--mixed_precision", "bf16", "--gradient_checkpointing", "--train_batch_size", "1", "--seed", "42"]
    command += ["--max_train_steps", str(args.steps), "--lr_warmup_steps", "0", "--log_every", "1"]
    command += ["--checkpointing_steps", str(10 * args.steps), "--enable_slicing", "--enable_tiling"]
    command += ["--validation_prompt", "A red ball rolls over the grass.", "--num_inference_steps", "2"]
    command += ["--validation_steps", str(args.steps // 2), "--validation_data_root", args.data]
    command += ["--validation_num_clips", "1", "--learning_rate", LEARNING_RATES[task], *OPTIMIZERS[optimizer]]
    return command


def row_of(label, command, exit_code, total, output_dir):
    """The figures of a finished run."""
    path = output_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    updates = [row["seconds"] for row in rows if "event" not in row]
    held_out = [row["loss"] for row in rows if row.get("event") == "held_out_loss"]
    memory = {row["when"]: row for row in rows if row.get("event") == "memory"}
    shown = shlex.join(["python", *command[1:]]).replace(f"{ROOT}/", "")  # of any machine
    row = {"label": label, "exit_code": exit_code, "total_s": round(total, 1), "command": shown}
    row["median_s"] = round(statistics.median(updates[2:]), 4) if len(updates) > 2 else None
    row["loss_before"], row["loss_after"] = (held_out[0], held_out[-1]) if held_out else (None, None)
    for when in MOMENTS:
        row |= {f"{when}_{figure}": memory.get(when, {}).get(figure) for figure in FIGURES}
    row["host_peak_gib"] = memory.get("after_testing", {}).get("host_peak_gib")
    return row | {name: version for name, version in package_versions().items() if name in FIELDS}


def card_name():
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="file to write or to go on with")
    parser.add_argument("--model", required=True, help="pipeline folder")
    parser.add_argument("--data", required=True, help="prepared data")
    parser.add_argument("--label", required=True, help="what the model is called in the file")
    parser.add_argument("--tasks", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=10, help="updates (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("outputs/memory_rows"), help="folder of the runs")
    args = parser.parse_args()
    done = set()
    if args.csv.exists():
        with open(args.csv, newline="") as file:
            done = {row["label"] for row in csv.DictReader(file)}
    for task in args.tasks:
        for optimizer in args.optimizers:
            label = f"{args.label} {task} {optimizer}"
            if label not in done:
                measure(args, label, task, optimizer)


def measure(args, label, task, optimizer):
    """Run one row and append it; what it printed stays in <work>/<label>.log."""
    output_dir = args.work / label.replace(" ", "-")
    command = command_of(args, task, optimizer, output_dir)
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(f"{output_dir}.log", "w") as log:
        exit_code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    row = row_of(label, command, exit_code, time.perf_counter() - start, output_dir) | {"card": card_name()}
    is_new = not args.csv.exists()
    with open(args.csv, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(
        f"{label}: exit code {exit_code}, {row['median_s']} s/step, peak "
        f"{row['before_validation_peak_reserved_gib']} / {row['after_testing_peak_reserved_gib']} GiB reserved, loss "
        f"{row['loss_before']} -> {row['loss_after']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
