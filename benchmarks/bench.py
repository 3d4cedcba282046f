#!/usr/bin/env python3
"""Benchmark training runs, one CSV row per run: time, memory, model FLOP utilization, versions, GPU.

    python benchmarks/bench.py 5b-reference 5b-balanced 5b-balanced+fp8@fa4 2b-speed+batch4
    python benchmarks/bench.py 5b-stream+validated+cap5.5 5b-offload+sft+accum4+cap15.5 5b-offload+sft+share0.5
    python benchmarks/bench.py 5b-balanced 5b-balanced+gpus2 2b-checkpointing+sft+zero2+gpus2 5b-offload+sft+link25

A row is MODEL-LEVEL plus additions, see the tables at the top of this file. Each runs in its own process under
step_time.py, on a model of the real size with random weights and random prepared data, made once in the work folder.
Only a +validated row writes its result. With +gpusN, a batch per GPU and figures of the first; host memory is then the
sum over the processes after the first step. Rows that the CSV already has for this GPU are skipped. A failed row is
reported with the last line of its log and not written; the others continue, and the exit code is 1.

With --profile, rows are run to say where the time of a few steps goes (profile_steps.py), and none is written.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console
from flops import step_flops
from profile_steps import FIRST, LAST
from step_time import PROFILE, ROOT, append_row, check_csv


SIZE_1_0, SIZE_1_5 = (49, 480, 720), (81, 768, 1360)  # frames, height, width in pixels
# {kind of random_pipeline.py: video size}
MODELS = {"2b": SIZE_1_0, "5b": SIZE_1_0, "5b-i2v": SIZE_1_0, "1.5-5b": SIZE_1_5, "1.5-5b-i2v": SIZE_1_5}
LEVELS = {
    "reference": "",  # reference.py, not a script of training/
    "checkpointing": "--gradient_checkpointing",
    "balanced": "--memory balanced",
    "speed": "--memory speed",
    "offload": "--memory offload",
    "stream": "--memory stream",
}
ADDITIONS = {
    "+fp8": "--base_precision fp8",
    "+int8": "--base_precision int8",
    "+nf4": "--base_precision nf4",
    "+compiled": "--compile_blocks",
    "+eager": "--no_compile_blocks",
    "+8bit": "--use_8bit",
    "+hostadam": "--use_cpu_offload_optimizer --offload_gradients",
    "+validated": "--num_inference_steps 2 --enable_slicing",  # and a prompt, in script_flags() below
    "+tiled": "--enable_tiling",  # the VAE's tiles instead of whole frames
    "+xxl": "",  # full-size T5 instead of a tiny one: 9 GiB on disk; matters with +validated
    "+sft": "",  # full fine-tuning instead of a LoRA
    "+raw": "",  # videos instead of prepared data; 8 workers decode
    "+zero2": "",  # DeepSpeed, with accelerate_configs/deepspeed.yaml
    "@cudnn": "--attention cudnn",
    "@flash": "--attention flash",
    "@fa4": "--attention fa4",
    "@math": "--attention math",
}
# With defaults; +accum4: micro-steps per update; +cap5.5: torch may reserve 5.5 GiB on the GPU; +share0.5: half of the
# blocks have their optimizer states on the GPU; +link25: copies between GPU and host at 25 GB/s each way, slow_link.py
COUNTS = {"+batch": 1, "+rank": 64, "+accum": 1, "+cap": None, "+share": None, "+gpus": 1, "+link": None}
WITH_FRACTION = ("+cap", "+share", "+link")
PROMPT = "A red ball rolls over the grass."
NUM_CLIPS = 8
RAW_FLAGS = ["--caption_column", "prompts.txt", "--video_column", "videos.txt"]


class Row(NamedTuple):
    label: str
    model: str
    level: str
    additions: tuple[str, ...]
    batch: int
    rank: int
    accumulation: int
    cap: float | None  # GiB
    share: float | None
    gpus: int
    link: float | None  # GB/s each way

    @property
    def is_sft(self):
        return "+sft" in self.additions

    @property
    def is_validated(self):
        return "+validated" in self.additions


class RowError(Exception):
    """A row could not be measured; the message is one line."""


# ---------------------------------------------------------------- a row


def parse_row(label):
    """Parse a label, sorting its additions so that a row has one label; ValueError for anything not in the tables."""
    head, *additions = re.split(r"(?=[+@])", label)
    model, _, level = head.rpartition("-")
    if model not in MODELS or level not in LEVELS:
        raise ValueError(f"{label}: {head} is no MODEL-LEVEL of {', '.join(MODELS)} and {', '.join(LEVELS)}")
    if level == "reference" and "+raw" in additions:
        raise ValueError(f"{label}: the reference trains on prepared data")
    counts = dict(COUNTS)
    for addition in additions:
        counted = re.fullmatch(r"(\+[a-z]+)(\d+(?:\.\d+)?)", addition)
        if counted and counted[1] in COUNTS:
            counts[counted[1]] = float(counted[2]) if counted[1] in WITH_FRACTION else int(counted[2])
        elif addition not in ADDITIONS:
            raise ValueError(
                f"{label}: {addition} is none of {', '.join([*ADDITIONS, *(f'{key}N' for key in COUNTS)])}"
            )
    if level == "reference" and ("+sft" in additions or counts["+accum"] > 1):
        raise ValueError(f"{label}: the reference trains a LoRA, one batch per update")
    if counts["+share"] is not None and not (level in ("offload", "stream") and "+sft" in additions):
        raise ValueError(f"{label}: only full fine-tuning at offload and stream has a share of states on the GPU")
    if counts["+link"] is not None and (level == "reference" or "+hostadam" in additions or counts["+accum"] > 1):
        raise ValueError(f"{label}: copies of that row are not all slowed down, see slow_link.py")
    if level == "reference" and ("+zero2" in additions or counts["+gpus"] > 1):
        raise ValueError(f"{label}: the reference trains on one GPU")
    additions = tuple(sorted(additions))
    return Row(head + "".join(additions), model, level, additions, *counts.values())


def script_of(row):
    if row.level == "reference":
        return ROOT / "benchmarks/reference.py"
    task = "image" if row.model.endswith("i2v") else "text"
    return ROOT / f"training/cogvideox_{task}_to_video_{'sft' if row.is_sft else 'lora'}.py"


def model_folder(row):
    return f"models/{row.model}{'-xxl' if '+xxl' in row.additions else ''}"


def data_folder(row):
    return ("clips/" if "+raw" in row.additions else "data/") + "x".join(map(str, MODELS[row.model]))


def size_flags(row):
    names = ("--frames", "--height", "--width")
    return [word for name, pixels in zip(names, MODELS[row.model], strict=True) for word in (name, str(pixels))]


def bucket_flags(size):
    names = ("--frame_buckets", "--height_buckets", "--width_buckets")
    return [word for name, pixels in zip(names, size, strict=True) for word in (name, str(pixels))]


def data_flags(row):
    if "+raw" not in row.additions:
        return ["--data_root", data_folder(row), "--load_tensors", "--dataloader_num_workers", "2"]
    flags = ["--data_root", data_folder(row), *RAW_FLAGS, *bucket_flags(MODELS[row.model]), "--fps", "8"]
    return [*flags, "--dataloader_num_workers", "8", "--pin_memory"]


def script_flags(row, steps):
    """The flags of the row's script; paths are relative to the work folder."""
    flags = ["--pretrained_model_name_or_path", model_folder(row), "--max_train_steps", str(steps), "--seed", "42"]
    flags += ["--train_batch_size", str(row.batch)] + ([] if row.is_sft else ["--rank", str(row.rank)])
    added = " ".join([LEVELS[row.level], *(ADDITIONS.get(name, "") for name in row.additions)]).split()
    if row.level == "reference":
        return [*flags, *size_flags(row), *added]
    flags += [*data_flags(row), "--mixed_precision", "bf16", "--optimizer", "adamw"]
    flags += ["--gradient_accumulation_steps", str(row.accumulation)] if row.accumulation > 1 else []
    flags += [] if row.share is None else ["--states_on_gpu", str(row.share)]
    flags += ["--learning_rate", "1e-5" if row.is_sft else "1e-4", "--lr_warmup_steps", "0", "--allow_tf32"]
    flags += ["--checkpointing_steps", "100000", "--output_dir", f"runs/{row.label}"]
    if row.is_validated:
        flags += ["--validation_prompt", PROMPT, "--validation_steps", str(steps // 2)]
    return flags + added


# ---------------------------------------------------------------- running


def run_logged(command, log_path, cwd=None):
    """Run `command`, appending its output to a file; RowError with the file's last line unless it exits with 0."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "a") as log:
        exit_code = subprocess.run(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, cwd=cwd).returncode
    if exit_code:
        ended = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        raise RowError(f"{ended}: {last_line(log_path)} ({log_path})")


def last_line(log_path):
    """The last line of a script's output before step_time's row."""
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith('{"label"')), "nothing said")


def make_once(folder, script, log_path, *flags):
    """Make a folder with a script of benchmarks/, atomically, unless it exists."""
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    run_logged([sys.executable, ROOT / "benchmarks" / script, partial, *flags], log_path)
    partial.rename(folder)


def make_inputs(row, work, log_path, card):
    """Make the row's model and data in the work folder; returns the transformer's config.

    The VAE has the real size, since validation decodes with it.
    """
    model = work / model_folder(row)
    if card == "cpu" and not model.exists():
        raise RowError(f"a model of real size needs a GPU; on a CPU, put a tiny pipeline at {model}")
    text_encoder = "xxl" if "+xxl" in row.additions else "tiny"
    make_once(model, "random_pipeline.py", log_path, "--kind", row.model, "--text_encoder", text_encoder)
    config = json.loads((model / "transformer/config.json").read_text())
    if "+raw" in row.additions:
        make_once(work / data_folder(row), "random_clips.py", log_path, *size_flags(row))
        return config
    texts = ["--text_width", config["text_embed_dim"], "--num_clips", NUM_CLIPS]
    make_once(work / data_folder(row), "random_dataset.py", log_path, *size_flags(row), *texts)
    return config


def launcher(gpus=1, deepspeed=False):
    """What starts a Python script on so many GPUs."""
    if gpus == 1 and not deepspeed:
        return [sys.executable]
    config = ROOT / "accelerate_configs" / ("deepspeed.yaml" if deepspeed else "uncompiled_2.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    launch += ["--num_processes", str(gpus), "--gpu_ids", ",".join(map(str, range(gpus)))]
    return [*launch, "--main_process_port", "0"]  # any that is free, so that several rows can run at once


def measure(row, args, card):
    """Run one row; returns it, and its profile if there is one. Its output is kept in <work>/logs/<label>.log."""
    work, log_path = args.work, args.work / "logs" / f"{row.label}.log"
    log_path.unlink(missing_ok=True)
    shutil.rmtree(work / "runs" / row.label, ignore_errors=True)
    config = make_inputs(row, work, log_path, card)
    tflop = row.accumulation * step_flops(config, MODELS[row.model], row.batch, not row.is_sft) / 1e12
    command = [
        *launcher(row.gpus, "+zero2" in row.additions),
        ROOT / "benchmarks/step_time.py",
        "--warmup",
        args.warmup,
        "--label",
        row.label,
    ]
    command += ["--model_tflop", tflop] + (["--memory_cap", row.cap] if row.cap else [])
    command += ["--link", row.link] if row.link else []
    command += [] if row.is_validated or row.level == "reference" else ["--no_result"]
    command += ["--profile"] if args.profile else []
    run_logged([*command, "--", script_of(row), *script_flags(row, args.steps)], log_path, cwd=work)
    check_videos(row, args, log_path)
    shutil.rmtree(work / "runs" / row.label, ignore_errors=True)  # gigabytes for full fine-tuning
    printed, _, profile = log_path.read_text(errors="replace").partition(PROFILE)
    return json.loads(next(line for line in reversed(printed.splitlines()) if line.startswith('{"label"'))), profile


def check_videos(row, args, log_path):
    """RowError if a validated row has no videos: in a run, a failed validation is only a warning."""
    if not row.is_validated:
        return
    samples = args.work / "runs" / row.label / "samples"
    missing = [step for step in (0, args.steps // 2, args.steps) if not (samples / f"step_{step}/0_0.mp4").exists()]
    if missing:
        warnings = [line for line in log_path.read_text(errors="replace").splitlines() if "validation" in line]
        raise RowError(f"no video of step {missing[0]}: {(warnings or ['nothing said'])[-1]} ({log_path})")


def card_name():
    """The GPU's name, from a subprocess: initializing CUDA here would take memory from the rows."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return asked.stdout.splitlines()[-1]


def rows_in(path):
    """The successful rows of a CSV; none if the file does not exist."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if row["exit_code"] == "0"]


def describe_row(measured):
    figures = f"{measured['allocated_gib']:.2f} GiB allocated, {measured['reserved_gib']:.2f} reserved"
    speed = f"{measured['median_s']} s/step ({measured['p10_s']} to {measured['p90_s']})"
    share = f", MFU {measured['mfu']:.1%}" if measured["mfu"] else ""
    start = f"first step after {measured['first_step_s']:.0f} s"
    return f"{speed}, {figures}, {measured['host_gib']:.1f} of the host{share}, {start}"


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = console.Parser(description=__doc__)
    parser.add_argument("rows", nargs="+", metavar="ROW", help="such as 5b-balanced+fp8")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/speed.csv", help="file to go on with")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/bench", help="folder of models, data and logs")
    parser.add_argument("--steps", type=int, default=20, help="updates of a row (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="of them not timed (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure rows that the file has, too")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes, and write no rows")
    args = parser.parse_args(argv)
    if not 0 < args.warmup < args.steps:
        parser.error("--warmup: at least 1, and less than --steps")
    if args.profile and args.steps < LAST:
        parser.error(f"--profile: at least {LAST} --steps, of which {FIRST} to {LAST} are profiled")
    try:
        args.rows = list(dict.fromkeys(map(parse_row, args.rows)))
    except ValueError as error:
        parser.error(str(error))
    return args


def main():
    args = parse_args()
    args.work = args.work.resolve()
    check_csv(args.csv)
    card = card_name()
    done = {row["label"] for row in rows_in(args.csv) if row["card"] == card}
    added, failed = 0, 0
    for row in args.rows:
        if row.label in done and not (args.again or args.profile):
            print(f"{row.label}: in {args.csv} already")
            continue
        try:
            measured, profile = measure(row, args, card)
            print(f"{row.label}: {profile.strip() or describe_row(measured)}", flush=True)
            if not args.profile:
                append_row(args.csv, measured)
                added += 1
        except RowError as error:
            failed += 1
            print(f"{row.label}: FAILED, {error}", flush=True)
    if added:
        lines = args.csv.read_text().splitlines()[-added:]
        print("to send in, for the tables: " + "\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
