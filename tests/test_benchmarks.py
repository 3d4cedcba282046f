import csv
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from random_dataset import write_dataset
from random_pipeline import real_sizes
from tiny_pipeline import KINDS, kind_transformer


STEP_TIME = Path(__file__).resolve().parents[1] / "benchmarks" / "step_time.py"

TOY = """
import sys, time, torch
from toy_helper import SLEEP
print("flags", sys.argv[1:])
weight = torch.nn.Parameter(torch.ones(1))
first, second = (torch.optim.SGD([weight], lr=0.1) for _ in range(2))
for step in range(int(sys.argv[1])):
    time.sleep(1.0 if step < 2 else SLEEP)
    weight.sum().backward()
    first.step()
    second.step()
if "--fail" in sys.argv:
    sys.exit(65)
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy_helper.py").write_text("SLEEP = 0.05\n")
    (tmp_path / "toy.py").write_text(TOY)
    return tmp_path / "toy.py"


def run_step_time(*args):
    return subprocess.run([sys.executable, STEP_TIME, *map(str, args)], capture_output=True, text=True)


def test_step_time_measures_an_unchanged_script(toy, tmp_path):
    rows_path = tmp_path / "rows.csv"
    result = run_step_time("--warmup", 2, "--label", "toy", "--csv", rows_path, "--", toy, 6, "--rank", 4)
    assert result.returncode == 0, result.stderr
    first_line, *_, last_line = result.stdout.splitlines()
    row = json.loads(last_line)
    assert first_line == "flags ['6', '--rank', '4']"
    assert row["steps"] == 4  # 6 less the warm-up; a second optimizer's steps are not counted
    assert 0.05 <= row["p10_s"] <= row["median_s"] <= row["p90_s"] < 0.9
    assert row["torch"] == importlib.metadata.version("torch")
    assert row["host_gib"] > 0.05
    if not torch.cuda.is_available():
        assert (row["allocated_gib"], row["reserved_gib"], row["card"]) == (0, 0, "cpu")

    assert run_step_time("--csv", rows_path, "--", toy, 1, "--fail").returncode == 65
    with open(rows_path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["exit_code"], row["steps"]) for row in rows] == [("toy", "0", "4"), ("", "65", "0")]
    assert [row["median_s"] for row in rows] == [str(json.loads(last_line)["median_s"]), ""]


def test_step_time_refuses_a_csv_of_other_columns_before_running(toy, tmp_path):
    rows_path = tmp_path / "rows.csv"
    rows_path.write_text("name,seconds\n")
    result = run_step_time("--csv", rows_path, "--", toy, 1)
    assert result.returncode == 1
    assert "other columns" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("kind", KINDS)
def test_real_sizes_have_the_checkpoints_parameter_counts(kind):
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**kind_transformer(kind), **real_sizes(kind)["transformer"])
    billions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    assert 1.6 < billions < 1.8 if kind == "2b" else 5.5 < billions < 5.7
    assert transformer.config.text_embed_dim == 4096


def test_random_dataset_layout(tmp_path):
    write_dataset(tmp_path, num_clips=3, frames=9, height=64, width=96, text_shape=(226, 32))
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert [row["prompt"] for row in rows] == (tmp_path / "prompts.txt").read_text().splitlines()
    assert [row["video"] for row in rows] == (tmp_path / "videos.txt").read_text().splitlines()
    for row in rows:
        assert row["metadata"] == {"num_frames": 9, "height": 64, "width": 96}
        assert load_file(tmp_path / row["image_latent"])["moments"].shape == (2, 32, 1, 8, 12)
        moments = load_file(tmp_path / row["video_latent"])["moments"]
        assert moments.shape == (32, 3, 8, 12)
        assert load_file(tmp_path / row["prompt_embed"])["prompt_embeds"].shape == (226, 32)
    assert load_file(tmp_path / "prompt_embeds" / "_empty.safetensors")["prompt_embeds"].shape == (226, 32)


def test_random_dataset_refuses_sizes_the_vae_does_not_take(tmp_path):
    with pytest.raises(ValueError, match="4k\\+1"):
        write_dataset(tmp_path, num_clips=1, frames=10, height=64, width=96)
