"""What an earlier version made is still good: its checkpoints go on, its prepared folders and its LoRA are taken as they are.

Each folder of tests/fixtures is named after the commit that made it, see make_fixtures.py.
"""

import importlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline

import prepare_dataset
from args import parse_prepare_args, parse_training_args
from make_fixtures import PREPARED, RUNS, prepare_argv, train_argv


FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir() if (path / "clips").is_dir())
STEPS_AFTER = {3, 4}  # of the unbroken run, behind the checkpoint


@pytest.fixture(params=VERSIONS)
def old(request, tmp_path, monkeypatch, caplog):
    """A copy of what that version made, the working folder of the test: the flags' paths are relative to it."""
    folder = shutil.copytree(FIXTURES / request.param, tmp_path / "old")
    monkeypatch.chdir(folder)
    caplog.set_level(logging.INFO)
    return folder


def train(name):
    key = name if name in ("t2v_lora", "t2v_sft", "i2v_lora", "i2v_sft") else "t2v_lora"
    module = importlib.import_module(f"cogvideox_{RUNS[name][0]}")
    module.main(parse_training_args(key, train_argv(name)))


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_goes_on_to_the_end(old, name, caplog):
    before = losses(old / name)
    assert before.keys() >= STEPS_AFTER
    train(name)
    assert f"continuing from {name}/checkpoint-2 at step 2" in caplog.text
    assert json.loads((old / name / "status.json").read_text())["state"] == "complete"
    is_random = name == "raw-drawn" or name.startswith("i2v")  # whose draws follow another rule now
    assert caplog.text.count("from here on they are drawn by its path") == is_random
    if not is_random:
        assert losses(old / name) == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("name", PREPARED)
def test_a_prepared_folder_needs_nothing_anew(old, name, caplog):
    before = {path: path.read_bytes() for path in (old / name).rglob("*.*") if path.parent != old / name}
    prepare_dataset.main(parse_prepare_args(prepare_argv(name)))
    assert f"{name}: 3 clips, 0 prepared now, 0 left out" in caplog.text
    assert {path: path.read_bytes() for path in before} == before


def test_a_lora_is_read_by_the_stock_pipeline(old):
    pipe = CogVideoXPipeline.from_pretrained(old / "t2v", dtype=torch.float32)
    pipe.load_lora_weights(old / "lora")
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    assert layer.scaling["default_0"] == 1.0 and layer.lora_B["default_0"].weight.abs().max() > 0
