#!/usr/bin/env python3
"""Train a LoRA, or every weight, several times at several memory levels and check that the files are byte-identical.

    python benchmarks/same_files.py 2b 5b --jobs 3
    python benchmarks/same_files.py 2b --sft --accumulation 1

Hashes detect an asynchronous copy that is occasionally late; a similarity measure would not. Models have the real size
and random weights; clips of two lengths alternate, by default two per update, with torch's deterministic algorithms.
With --sft the fp32 weights are compared: all on the GPU (balanced), with optimizer states and gradients in host memory
(+hostadam), with activations there too (offload), with the states of some blocks on the GPU (+share), and with weights
on the host (stream). Runs already in the CSV are skipped, so several calls can fill it. The exit code is 1 unless every
model has a single hash.
"""

import csv
import hashlib
import itertools
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console
from bench import ADDITIONS, MODELS, RowError, card_name, make_once, parse_row, run_logged, script_of
from step_time import ROOT, append_row, check_csv, command_line, package_versions


LEVELS = ("balanced", "offload", "stream")
SFT_LEVELS = ("balanced", "balanced+hostadam", "offload", "offload+share0.5", "offload+share1", "stream")
FIELDS = ["model", "level", "attention", "steps", "frames", "run", "sha256", "card", *package_versions(), "command"]


def runs_of(args):
    """The CSV's identifying columns of each run; levels alternate, so that an unfinished file is useful too."""
    added = ("" if args.accumulation == 2 else f"+accum{args.accumulation}") + ("+sft" if args.sft else "")
    kinds = itertools.product(args.models, range(1, args.times + 1), [level + added for level in args.levels])
    fixed = {"attention": args.attention, "steps": str(args.steps), "frames": "+".join(map(str, args.frames))}
    return [{"model": model, "level": level, **fixed, "run": str(number)} for model, number, level in kinds]


def key_of(run):
    return tuple(run[name] for name in ("model", "level", "attention", "steps", "frames", "run"))


def command_of(run, args, output_dir):
    row = parse_row(f"{run['model']}-{run['level']}")
    command = [sys.executable, ROOT / "benchmarks/step_time.py", "--deterministic", "--", script_of(row)]
    command += ["--pretrained_model_name_or_path", f"models/{row.model}", "--data_root", data_folder(row.model, args)]
    command += ["--load_tensors", "--output_dir", output_dir, "--memory", row.level, "--attention", args.attention]
    command += ["--save_dtype", "fp32"] if row.is_sft else ["--rank", 64, "--lora_alpha", 64]
    command += ["--train_batch_size", 1, "--gradient_accumulation_steps", args.accumulation]
    command += ["--max_train_steps", args.steps, "--mixed_precision", "bf16", "--optimizer", "adamw", "--seed", 42]
    command += ["--learning_rate", "1e-5" if row.is_sft else "1e-4", "--lr_warmup_steps", 0]
    command += ["--checkpointing_steps", 100000]
    command += [] if row.share is None else ["--states_on_gpu", row.share]
    command += [flag for name in row.additions for flag in ADDITIONS.get(name, "").split()]
    return [str(word) for word in command]


def data_folder(model, args):
    return "data/" + "x".join(["+".join(map(str, args.frames)), *map(str, MODELS[model][1:])])


def make_inputs(model, args):
    """Make models and data in the same way, and in the same work folder, as bench.py."""
    log_path = args.work / "logs" / f"same_files-{model}.log"
    make_once(args.work / f"models/{model}", "random_pipeline.py", log_path, "--kind", model, "--text_encoder", "tiny")
    size = ["--frames", *args.frames, "--height", MODELS[model][1], "--width", MODELS[model][2]]
    make_once(args.work / data_folder(model, args), "random_dataset.py", log_path, *size, "--num_clips", 8)


def train(run, args, card):
    """Run one training and append its hash to the CSV."""
    name = f"same_files-{run['model']}-{run['level']}-{run['run']}"
    output_dir, log_path = args.work / "runs" / name, args.work / "logs" / f"{name}.log"
    shutil.rmtree(output_dir, ignore_errors=True)
    log_path.unlink(missing_ok=True)
    command = command_of(run, args, f"runs/{name}")
    run_logged(command, log_path, cwd=args.work)
    digest = digest_of(output_dir)
    typed = command_line(["python", *command[1:]])
    append_row(args.csv, run | {"sha256": digest, "card": card, **package_versions(), "command": typed}, FIELDS)
    shutil.rmtree(output_dir)


def digest_of(output_dir):
    """The SHA-256 of the result's weights: a LoRA's file, or the transformer's, one after the other."""
    digest = hashlib.sha256()
    for path in sorted([*output_dir.glob("*.safetensors"), *output_dir.glob("transformer/*.safetensors")]):
        with open(path, "rb") as file:
            while piece := file.read(2**24):
                digest.update(piece)
    return digest.hexdigest()


def read_rows(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def report(rows, wanted):
    """Print the hashes per level; returns the models with several hashes or missing runs."""
    rows = [row for row in rows if key_of(row) in wanted]
    bad = []
    width = max(len(key[1]) for key in wanted)
    print(f"{'model':11} {'level':{width}} runs  sha256")
    for model in dict.fromkeys(key[0] for key in wanted):
        ours = [row for row in rows if row["model"] == model]
        for level in dict.fromkeys(key[1] for key in wanted):
            hashes = [row["sha256"][:16] for row in ours if row["level"] == level]
            print(f"{model:11} {level:{width}} {len(hashes):4}  {' '.join(dict.fromkeys(hashes))}")
        is_whole = len(ours) == sum(key[0] == model for key in wanted)
        if len({row["sha256"] for row in ours}) != 1 or not is_whole:
            bad.append(model)
    return bad


def parse_args(argv=None):
    parser = console.Parser(description=__doc__)
    parser.add_argument("models", nargs="+", choices=MODELS, metavar="MODEL", help="such as 5b")
    parser.add_argument("--sft", action="store_true", help="full fine-tuning instead of a LoRA")
    parser.add_argument(
        "--levels", nargs="+", choices=dict.fromkeys([*LEVELS, *SFT_LEVELS]), help="of --memory (default: all)"
    )
    parser.add_argument("--accumulation", type=int, default=2, help="clips per update (default: %(default)s)")
    parser.add_argument("--times", type=int, default=3, help="runs at each level (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="updates of a run (default: %(default)s)")
    parser.add_argument("--frames", type=int, nargs=2, default=(49, 25), help="of the clips (default: 49 25)")
    parser.add_argument("--attention", default="fa4", help="a kernel with a deterministic backward pass")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once on the GPU")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/same_files.csv", help="file to go on with")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/bench", help="folder of models, data and logs")
    args = parser.parse_args(argv)
    args.levels = args.levels or (SFT_LEVELS if args.sft else LEVELS)
    return args


def main():
    args = parse_args()
    args.work, args.csv = args.work.resolve(), args.csv.resolve()
    check_csv(args.csv, FIELDS)
    for model in args.models:
        make_inputs(model, args)
    done = {key_of(row) for row in read_rows(args.csv)}
    runs, card = runs_of(args), card_name()

    def attempt(run):
        try:
            train(run, args, card)
        except RowError as error:
            print(f"{run['model']} {run['level']} {run['run']}: FAILED, {error}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(attempt, [run for run in runs if key_of(run) not in done]))
    bad = report(read_rows(args.csv), {key_of(run): None for run in runs})
    for model in bad:
        print(f"{model}: not proven, hashes differ or runs are missing")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
