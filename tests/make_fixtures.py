#!/usr/bin/env python3
"""Write what a checkout's own code makes, on models of some 10,000 weights: a run of every script as one killed after
step 2 leaves it, prepared folders, a LoRA.

    git worktree add /tmp/old 51e4482
    python tests/make_fixtures.py /tmp/old tests/fixtures/51e4482

All paths in the runs' flags are relative to the new folder: what is made stands there whole, pipelines and clips included.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path


BUCKET = ["--height_buckets", "32", "--width_buckets", "48", "--frame_buckets", "5"]
LISTS = ["--video_column", "videos.txt", "--caption_column", "prompts.txt"]
ONE_LENGTH = ["--video_column", "short-videos.txt", "--caption_column", "short-prompts.txt"]  # nothing is drawn
DRAWS = ["--random_flip", "0.5", "--video_reshape_mode", "random"]
TRAINING = [
    "--seed", "1", "--max_train_steps", "4", "--checkpointing_steps", "2", "--optimizer", "adamw", "--learning_rate", "1e-2",
    "--lr_warmup_steps", "0", "--train_batch_size", "1",
]  # fmt: skip
RAW = ["--data_root", "clips", "--fps", "8", *BUCKET]
LORA, SFT = ["--rank", "2", "--lora_alpha", "2"], ["--save_dtype", "fp32"]
PREPARED = {
    "prepared": ["--model_id", "t2v"],
    "prepared-images": [
        "--model_id", "i2v", "--save_image_latents", "--num_image_variants", "2", "--save_previews", *DRAWS,
    ],
}  # fmt: skip
# run -> script, pipeline, flags
RUNS = {
    "t2v_lora": ("text_to_video_lora", "t2v", ["--data_root", "prepared", "--load_tensors", *LORA]),
    "t2v_sft": ("text_to_video_sft", "t2v", ["--data_root", "prepared", "--load_tensors", *SFT]),
    "i2v_lora": ("image_to_video_lora", "i2v", ["--data_root", "prepared-images", "--load_tensors", *LORA]),
    "i2v_sft": ("image_to_video_sft", "i2v", ["--data_root", "prepared-images", "--load_tensors", *SFT]),
    "raw": ("text_to_video_lora", "t2v", [*RAW, *ONE_LENGTH, *LORA]),
    "raw-drawn": ("text_to_video_lora", "t2v", [*RAW, *LISTS, *LORA, *DRAWS]),
}


def prepare_argv(name: str) -> list[str]:
    """Flags of prepare_dataset.py for a folder of PREPARED."""
    lists = ["--data_root", "clips", *LISTS, *BUCKET]
    return [*PREPARED[name], *lists, "--save_latents_and_embeddings", "--output_dir", name]


def train_argv(name: str) -> list[str]:
    """Flags of a run of RUNS."""
    _, model, flags = RUNS[name]
    return ["--pretrained_model_name_or_path", model, "--output_dir", name, *TRAINING, *flags]


def make_pipelines(out: Path) -> None:
    """Of one attention head and one layer; both tasks have the same encoders."""
    from tiny_pipeline import tiny_sizes, write_pipeline

    for name, kind in (("t2v", "5b"), ("i2v", "5b-i2v")):
        sizes = tiny_sizes(kind)
        small = {"num_attention_heads": 1, "num_layers": 1, "sample_height": 4, "sample_width": 6, "sample_frames": 5}
        write_pipeline(out / name, kind, sizes | {"transformer": sizes["transformer"] | small})
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(out / "i2v" / part)
        shutil.copytree(out / "t2v" / part, out / "i2v" / part)


def make_clips(folder: Path) -> None:
    """Three clips with room for a crop, one of them longer than the bucket."""
    from conftest import write_clip

    folder.mkdir(parents=True)
    for seed, (name, num_frames) in enumerate({"a": 5, "b": 5, "c": 12}.items()):
        write_clip(folder / f"{name}.mp4", num_frames, 40, 56, seed=seed)
    lists = {"videos": ["a.mp4", "b.mp4", "c.mp4"], "prompts": ["A red circle.", "A blue square.", "A white cat."]}
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        (folder / f"short-{name}.txt").write_text("\n".join(lines[:2]) + "\n")


def run(checkout: Path, out: Path, script: str, argv: list[str]) -> None:
    subprocess.run([sys.executable, str(checkout / f"training/{script}.py"), *argv], cwd=out, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the code that makes them")
    parser.add_argument("out", type=Path, help="a new folder")
    flags = parser.parse_args()
    checkout, out = flags.checkout.resolve(), flags.out.resolve()
    sys.path.insert(0, str(checkout / "tests"))
    make_pipelines(out)
    make_clips(out / "clips")
    for name in PREPARED:
        run(checkout, out, "prepare_dataset", prepare_argv(name))
    for name, (script, _, _) in RUNS.items():
        run(checkout, out, f"cogvideox_{script}", train_argv(name))
    (out / "lora").mkdir()
    shutil.copy(out / "t2v_lora/pytorch_lora_weights.safetensors", out / "lora")
    for name in RUNS:  # now as one killed after step 2, but for the losses of the steps after it
        kept = {"args.json", "metrics.jsonl", "checkpoint-2"}
        for path in (path for path in (out / name).iterdir() if path.name not in kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for lock in out.rglob(".lock"):
        lock.unlink()


if __name__ == "__main__":
    main()
