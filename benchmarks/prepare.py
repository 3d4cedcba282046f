#!/usr/bin/env python3
"""Benchmark prepare_dataset.py, one CSV row per run: seconds a clip, memory, versions, GPU; and from clips to a LoRA.

    python benchmarks/prepare.py prepare prepare+variants8 prepare+xxl prepare+xxl+cap5.5
    python benchmarks/prepare.py clips-to-lora+xxl

Additions: +xxl (T5 of the real size, 9 GiB on disk, in place of a tiny one), +variantsN (noised first frames), +capN
(torch may reserve N GiB on the GPU), +gpusN (N processes share the clips; memory is that of one). Each row runs in its
own process under step_time.py, on synthetic clips and a 2b pipeline of the real size with random weights, made once in
the work folder.

`caption_s` and `clip_s` are the steady state by the times of the files: what passes after the first 16 embeddings, and
after the first 10 latents, per file; `seconds_a_clip` is their sum. `prepare_s` is the whole process, hashing of the
model's files included. The files of a capped row are compared with those of the same row without a cap, if that was run
in the same work folder. clips-to-lora prepares the clips, then trains on them: `train_s` is that process, `step_s` its
median update. A failed row is not written; the exit code is then 1.
"""

import hashlib
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import bench
from base import console
from random_clips import NUM_CLIPS
from step_time import PACKAGES, ROOT, append_row, check_csv


MODEL, LEVEL = "2b", "speed"  # the level of clips-to-lora
TASKS = ("prepare", "clips-to-lora")
FIRST_CAPTIONS, FIRST_CLIPS = 16, 10  # not counted; a streamed T5 takes 16 captions at once
COPIED = (
    "allocated_gib",
    "reserved_gib",
    "host_gib",
    "memory_cap_gib",
    "card",
    "python",
    *PACKAGES,
    "cuda",
    "command",
)
FIELDS = ("label", "clips", "size", "workers", "seconds_a_clip", "caption_s", "clip_s", "prepare_s")
FIELDS += ("updates", "step_s", "train_s", "total_s", "same_files", *COPIED)


class Row(NamedTuple):
    label: str
    task: str
    has_xxl: bool
    variants: int
    cap: float | None  # GiB
    gpus: int

    @property
    def uncapped(self):
        return re.sub(r"\+cap[\d.]+", "", self.label)


# ---------------------------------------------------------------- a row


def parse_row(label):
    """ValueError for what is no task with additions."""
    head, *additions = re.split(r"(?=\+)", label)
    if head not in TASKS:
        raise ValueError(f"{label}: {head} is none of {', '.join(TASKS)}")
    variants, cap, gpus = 0, None, 1
    for addition in additions:
        if counted := re.fullmatch(r"\+variants(\d+)", addition):
            variants = int(counted[1])
        elif counted := re.fullmatch(r"\+cap(\d+(?:\.\d+)?)", addition):
            cap = float(counted[1])
        elif counted := re.fullmatch(r"\+gpus(\d+)", addition):
            gpus = int(counted[1])
        elif addition != "+xxl":
            raise ValueError(f"{label}: {addition} is none of +xxl, +variantsN, +capN, +gpusN")
    if gpus > 1 and head != "prepare":
        raise ValueError(f"{label}: {head} trains on one GPU")
    return Row(head + "".join(sorted(additions)), head, "+xxl" in additions, variants, cap, gpus)


def model_folder(row):
    return f"models/{MODEL}{'-xxl' if row.has_xxl else ''}"


def clips_folder(args):
    """bench.py's +raw has the same."""
    return f"clips/{args.size_name}{'' if args.clips == NUM_CLIPS else f'-{args.clips}'}"


def make_inputs(row, args, log_path, card):
    model = args.work / model_folder(row)
    if card == "cpu" and not model.exists():
        raise bench.RowError(f"a model of real size needs a GPU; on a CPU, put a tiny pipeline at {model}")
    text_encoder = "xxl" if row.has_xxl else "tiny"
    bench.make_once(model, "random_pipeline.py", log_path, "--kind", MODEL, "--text_encoder", text_encoder)
    frames, height, width = args.size
    clips = ["--num_clips", args.clips, "--frames", frames, "--height", height, "--width", width]
    bench.make_once(args.work / clips_folder(args), "random_clips.py", log_path, *clips)


def prepare_flags(row, args):
    """Paths are relative to the work folder."""
    flags = ["--model_id", model_folder(row), "--output_dir", f"runs/{row.label}", "--target_fps", "8"]
    flags += ["--data_root", clips_folder(args), *bench.RAW_FLAGS, *bench.bucket_flags(args.size)]
    flags += ["--save_latents_and_embeddings", "--dtype", "bf16"]
    flags += ["--dataloader_num_workers", args.workers, "--pin_memory"]
    return flags + (["--save_image_latents", "--num_image_variants", row.variants] if row.variants else [])


def train_flags(row, args):
    flags = bench.script_flags(bench.parse_row(f"{MODEL}-{LEVEL}"), args.updates)
    given = {"--pretrained_model_name_or_path": model_folder(row), "--data_root": f"runs/{row.label}"}
    given["--output_dir"] = f"runs/{row.label}-lora"
    return [given.get(before, flag) for before, flag in zip([None, *flags], flags, strict=False)]


# ---------------------------------------------------------------- running


def run_timed(row, script, flags, args, log_path):
    """(seconds of the process, step_time.py's row)"""
    launcher = [sys.executable]
    if row.gpus > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", row.gpus]
    command = [*launcher, ROOT / "benchmarks/step_time.py", "--label", row.label]
    command += ["--memory_cap", row.cap] if row.cap else []
    began = time.perf_counter()
    bench.run_logged([*command, "--", script, *flags], log_path, cwd=args.work)
    seconds = time.perf_counter() - began
    lines = log_path.read_text(errors="replace").splitlines()
    return seconds, json.loads(next(line for line in reversed(lines) if line.startswith('{"label"')))


def steady_seconds(folder, num_first):
    """Seconds from file to file by their times, without the first `num_first`."""
    times = sorted(path.stat().st_mtime for path in folder.glob("*.safetensors"))
    if len(times) <= num_first:
        raise bench.RowError(f"{folder}: {len(times)} files, more than {num_first} are needed: give more --clips")
    return (times[-1] - times[num_first - 1]) / (len(times) - num_first)


def digests(folder):
    paths = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", "status.json")
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def check_same_files(row, args):
    """Keep the files' digests; of a capped row, whether they are those of the same row without a cap, None if unknown."""
    folder = args.work / "digests" / clips_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    own, other = digests(args.work / "runs" / row.label), folder / f"{row.uncapped}.json"
    (folder / f"{row.label}.json").write_text(json.dumps(own))
    if row.cap is None or not other.exists():
        return None
    uncapped = json.loads(other.read_text())
    differing = [path for path in sorted(own.keys() | uncapped.keys()) if own.get(path) != uncapped.get(path)]
    if differing:
        raise bench.RowError(
            f"{len(differing)} of {len(own)} files differ from those of {row.uncapped}: {differing[0]}"
        )
    return True


def measure(row, args, card):
    """Run one row, append it to the CSV and return it; its output is kept in <work>/logs/<label>.log."""
    log_path, out = args.work / "logs" / f"{row.label}.log", args.work / "runs" / row.label
    log_path.unlink(missing_ok=True)
    for folder in (out, out.with_name(f"{out.name}-lora")):
        shutil.rmtree(folder, ignore_errors=True)
    make_inputs(row, args, log_path, card)
    prepare_s, ran = run_timed(row, ROOT / "training/prepare_dataset.py", prepare_flags(row, args), args, log_path)
    caption_s = steady_seconds(out / "prompt_embeds", FIRST_CAPTIONS)
    clip_s = steady_seconds(out / "video_latents", FIRST_CLIPS)
    measured = {
        "label": row.label, "clips": args.clips, "size": args.size_name, "workers": args.workers,
        "seconds_a_clip": round(caption_s + clip_s, 4), "caption_s": round(caption_s, 4), "clip_s": round(clip_s, 4),
        "prepare_s": round(prepare_s, 2), "total_s": round(prepare_s, 2), "same_files": check_same_files(row, args),
    }  # fmt: skip
    if row.task == "clips-to-lora":
        script = ROOT / "training/cogvideox_text_to_video_lora.py"
        train_s, ran = run_timed(row, script, train_flags(row, args), args, log_path)
        measured |= {"updates": args.updates, "step_s": ran["median_s"], "train_s": round(train_s, 2)}
        measured["total_s"] = round(prepare_s + train_s, 2)
    measured |= {name: ran[name] for name in COPIED}
    append_row(args.csv, measured, FIELDS)
    shutil.rmtree(out)
    return measured


def describe(measured):
    speed = f"{measured['seconds_a_clip']:.3f} s a clip (caption {measured['caption_s']:.3f}, rest {measured['clip_s']:.3f})"
    memory = f"{measured['allocated_gib']:.2f} GiB allocated, {measured['reserved_gib']:.2f} reserved"
    text = f"{speed}, {memory}, {measured['host_gib']:.1f} of the host, {measured['prepare_s']:.0f} s in all"
    if measured["same_files"]:
        text += ", the same files as without the cap"
    if "train_s" in measured:
        text += f"; then {measured['updates']} updates of {measured['step_s']} s: {measured['total_s']:.0f} s in all"
    return text


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = console.Parser(description=__doc__)
    parser.add_argument("rows", nargs="+", metavar="ROW", help="such as prepare+variants8")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/prepare.csv", help="file to go on with")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/bench", help="folder of models, clips and logs")
    parser.add_argument("--clips", type=int, default=NUM_CLIPS, help="synthetic clips (default: %(default)s)")
    parser.add_argument("--size", default="49x480x720", help="FRAMESxHEIGHTxWIDTH of a clip (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=500, help="of clips-to-lora (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        args.rows = list(dict.fromkeys(map(parse_row, args.rows)))
        frames, height, width = map(int, args.size.split("x"))
    except ValueError as error:
        parser.error(str(error))
    args.size_name, args.size = args.size, (frames, height, width)
    return args


def main():
    args = parse_args()
    args.work = args.work.resolve()
    check_csv(args.csv, FIELDS)
    card, failed = bench.card_name(), 0
    for row in args.rows:
        try:
            print(f"{row.label}: {describe(measure(row, args, card))}", flush=True)
        except bench.RowError as error:
            failed += 1
            print(f"{row.label}: FAILED, {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
