#!/usr/bin/env python
"""Measure on the small model how LoRA settings affect learning, forgetting and colours.

    OMP_NUM_THREADS=1 python tiny_model/recipes.py --csv tiny_model/recipes.csv

Runs the wrapper for every combination of learning rate, rank, text dropout and timestep sampling, on the same clips:
of the concept, and as many of what the model knows. Accuracies are on new captions. Runs already in the CSV are
skipped.
"""

import argparse
import csv
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console


if __name__ == "__main__":
    console.set_up()  # before the libraries are imported

import torch
from diffusers import CogVideoXPipeline

from judge import accuracy, colour_errors, judge
from measure import GUIDANCE, captions_of, check_pipeline, sample
from networks import TEXT_LENGTH
from world import CONCEPTS, test_contents


ROOT = Path(__file__).resolve().parents[1]
GRID = {
    "learning_rate": ("1e-4", "3e-4", "1e-3", "3e-3"),
    "rank": ("16", "64"),
    "text_dropout": ("0", "0.1"),
    "timesteps": ("uniform", "stratified"),
}
MEASURED_AT = (40, 80, 120)  # updates, multiples of the first
LEARNED, HIGH_GUIDANCE, SAMPLING_STEPS = 0.7, 6.0, 10
BATCH_SIZE = 4
RESULTS = ("steps_to_70", "seconds_to_70", "concept", "known", "colour_distance", "chroma")


def run_script(name: str, settings: dict, *flags: str) -> None:
    environment = {**os.environ, **{key: str(value) for key, value in settings.items()}}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # the Python that runs this script
    subprocess.run([str(ROOT / name), *flags], env=environment, check=True, capture_output=True, text=True)


def prepare(args) -> Path:
    """Write and prepare clips of the concept, and as many of what the model knows; returns the prepared folder."""
    clips, prepared = args.out / "clips", args.out / "prepared"
    world = [str(ROOT / "tiny_model/world.py"), str(clips), "--concept", args.concept, "--num_known", "12"]
    subprocess.run([sys.executable, *world], check=True)
    sizes = {"HEIGHT_BUCKETS": 64, "WIDTH_BUCKETS": 64, "FRAME_BUCKETS": 9, "MAX_NUM_FRAMES": 9}
    given = {"MODEL": args.model, "DATA_ROOT": clips, "OUTPUT_ROOT": prepared, "DTYPE": "fp32", "NUM_WORKERS": 0}
    run_script("prepare_dataset.sh", {**sizes, **given}, "--max_sequence_length", str(TEXT_LENGTH))
    return prepared


def train(model: Path, prepared: Path, out: Path, row: dict[str, str]) -> list[tuple[int, float, Path]]:
    """(update, training seconds up to it, folder of the LoRA) for each of MEASURED_AT."""
    settings = {
        "MODEL": model, "DATA_ROOT": prepared, "OUTPUT_ROOT": out, "MIXED_PRECISION": "no", "NUM_WORKERS": 0,
        "LEARNING_RATES": row["learning_rate"], "LR_SCHEDULES": "constant_with_warmup", "LR_WARMUP_STEPS": 10,
        "LORA_RANK": row["rank"], "LORA_ALPHA": row["rank"], "TEXT_DROPOUT": row["text_dropout"],
        "MAX_TRAIN_STEPS": MEASURED_AT[-1], "CHECKPOINTING_STEPS": MEASURED_AT[0],
    }  # fmt: skip
    more = ["--stratified_timesteps"] if row["timesteps"] == "stratified" else []
    run_script("train_text_to_video_lora.sh", settings, "--train_batch_size", str(BATCH_SIZE), *more)
    (run,) = out.iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [line["seconds"] for line in lines if "loss" in line]
    return [(step, sum(seconds[:step]), run / f"checkpoint-{step}") for step in MEASURED_AT]


def draw(pipe, contents: list, guidance: float = GUIDANCE) -> torch.Tensor:
    options = {"num_inference_steps": SAMPLING_STEPS, "max_sequence_length": TEXT_LENGTH, "guidance_scale": guidance}
    return sample(pipe, captions_of(contents), **options)


def caption_accuracy(pipe, contents: list) -> float:
    return accuracy(judge(draw(pipe, contents)), contents)["caption"]


def forgetting(pipe, num_clips: int) -> dict:
    """On captions that the model knew: the share obeyed, and the colour error at high guidance."""
    contents = test_contents(num_clips)
    errors = colour_errors(draw(pipe, contents, HIGH_GUIDANCE), contents)
    return {
        "known": caption_accuracy(pipe, contents),
        "colour_distance": errors["distance"],
        "chroma": errors["chroma"],
    }


def measure_row(args, prepared: Path, row: dict[str, str]) -> dict:
    """The row with its RESULTS, rounded."""
    torch.set_num_threads(1)
    pipe = CogVideoXPipeline.from_pretrained(args.model, dtype=torch.float32)
    contents, found = test_contents(args.num_clips, args.concept), {"steps_to_70": "", "seconds_to_70": ""}
    if not row["learning_rate"]:  # the model without a LoRA
        found["concept"] = caption_accuracy(pipe, contents)
        return row | rounded(found | forgetting(pipe, args.num_clips))
    out = args.out / "_".join(row.values())
    shutil.rmtree(out, ignore_errors=True)
    for step, seconds, lora in train(args.model, prepared, out, row):
        if found["steps_to_70"] and step != MEASURED_AT[-1]:
            continue
        pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
        found["concept"] = caption_accuracy(pipe, contents)
        if found["concept"] >= LEARNED and not found["steps_to_70"]:
            found |= {"steps_to_70": step, "seconds_to_70": seconds}
        if step != MEASURED_AT[-1]:
            pipe.unload_lora_weights()
    return row | rounded(found | forgetting(pipe, args.num_clips))


def rounded(values: dict) -> dict:
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in values.items()}


def rows_of(csv_path: Path) -> list[dict]:
    if not csv_path.exists():
        return []
    with csv_path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(csv_path: Path, rows: list[dict]) -> None:
    order = {tuple(row.values()): place for place, row in enumerate(grid())}
    rows = sorted(rows, key=lambda row: order.get(tuple(row[name] for name in GRID), len(order)))
    with csv_path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*GRID, *RESULTS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def grid() -> list[dict[str, str]]:
    base = dict.fromkeys(GRID, "")
    return [base, *(dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values()))]


def parse_args(argv=None) -> argparse.Namespace:
    parser = console.Parser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-cogvideox"))
    parser.add_argument("--concept", choices=CONCEPTS, default="pink")
    parser.add_argument("--out", type=Path, default=Path("outputs/recipes"), help="folder for data and runs")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--num_clips", type=int, default=16, help="of the concept, and as many of what was known")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args(argv)
    check_pipeline(parser, args.model)
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    done = rows_of(args.csv)
    missing = [row for row in grid() if row not in [{name: old[name] for name in GRID} for old in done]]
    shutil.rmtree(args.out, ignore_errors=True)
    prepared = prepare(args)
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(functools.partial(measure_row, args, prepared, row)) for row in missing]
        for number, run in enumerate(as_completed(runs), 1):
            done.append(run.result())
            write_rows(args.csv, done)
            print(f"{number}/{len(runs)}", *(f"{name}={value}" for name, value in done[-1].items()), flush=True)


if __name__ == "__main__":
    main()
