"""The original's quick start: a data set downloaded in its layout, its block of settings in the wrapper, the wrapper run.

Whole processes, launched as users launch them, on real clips: what is tested is that nothing else is needed.
"""

import json
import os
import shutil
import subprocess

import pytest
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from test_shell import ROOT, edited  # noqa: F401, a fixture


SMALL = {"text": ROOT / "assets/tiny-cogvideox", "image": ROOT / "assets/tiny-cogvideox-i2v"}
WRAPPERS = ["text_to_video_lora", "text_to_video_sft", "image_to_video_lora"]  # those that the original had
BLOCK = """\
GPU_IDS="0"
LEARNING_RATES=("1e-4")
LR_SCHEDULES=("cosine_with_restarts")
OPTIMIZERS=("adamw")
MAX_TRAIN_STEPS=("2")
ACCELERATE_CONFIG_FILE="accelerate_configs/uncompiled_1.yaml"
DATA_ROOT="{data_root}"
CAPTION_COLUMN="prompts.txt"
VIDEO_COLUMN="videos.txt"
"""
# What a small model on a CPU asks for and a real one on a GPU does not
SIZES = {"HEIGHT_BUCKETS": "64", "WIDTH_BUCKETS": "64", "FRAME_BUCKETS": "9", "MAX_NUM_FRAMES": "9"}
ON_A_CPU = {**SIZES, "MIXED_PRECISION": "no", "MEMORY": "", "NUM_WORKERS": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def quick_start(edited, tmp_path, real_clips):  # noqa: F811
    """(wrapper, "videos" or "prepared") -> the folder of the run that the wrapper made."""

    def run(wrapper, *arguments, **settings):
        command = [str(wrapper), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | ON_A_CPU | settings, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def start(name, kind):
        model, data = SMALL[name.split("_")[0]], real_clips
        if kind == "prepared":
            data = tmp_path / "prepared"
            images = {"IMAGE_LATENTS": "true"} if name.startswith("image") else {}
            settings = {"DATA_ROOT": str(real_clips), "OUTPUT_ROOT": str(data), "DTYPE": "fp32", "MODEL": str(model)}
            run(ROOT / "prepare_dataset.sh", "--max_sequence_length", "32", **settings, **images)
        wrapper = edited(ROOT / f"train_{name}.sh", BLOCK.format(data_root=data), "over")
        for entry in ("training", "accelerate_configs"):  # the copy runs this repository's scripts
            shutil.rmtree(wrapper.parent / entry)
            (wrapper.parent / entry).symlink_to(ROOT / entry)
        run(wrapper, MODEL=str(model))
        [output_dir] = (tmp_path / "outputs").iterdir()
        return output_dir

    return start


def check_result(output_dir, name):
    status = json.loads((output_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("complete", 0, 2)
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    if name.endswith("lora"):
        assert load_file(output_dir / "pytorch_lora_weights.safetensors")
    else:
        CogVideoXTransformer3DModel.from_pretrained(output_dir, subfolder="transformer")


@pytest.mark.slow  # the wrapper, the launcher and the script, as users start them
def test_the_quick_start_trains_on_videos(quick_start):
    check_result(quick_start("text_to_video_lora", "videos"), "text_to_video_lora")


@pytest.mark.slow  # as above
@pytest.mark.parametrize("kind", ["videos", "prepared"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_quick_start_trains_on_both_kinds_of_data(quick_start, name, kind):
    check_result(quick_start(name, kind), name)
