"""Trackers get what metrics.jsonl holds, and none of them can end a run."""

import json
import logging
import sys

import pytest

import cogvideox_text_to_video_lora as script
import tracking
from args import parse_training_args
from errors import UsageError


FLAGS = ["--rank", "4", "--lora_alpha", "4", "--optimizer", "adamw", "--lr_warmup_steps", "0", "--seed", "0"]


@pytest.fixture
def train(tiny, prepared_data, tmp_path):
    """Three updates of a tiny LoRA; returns the output folder."""

    def run(*flags):
        argv = [
            "--pretrained_model_name_or_path",
            str(tiny("5b")),
            "--data_root",
            str(prepared_data),
            "--load_tensors",
        ]
        argv += [*FLAGS, "--train_batch_size", "1", "--max_train_steps", "3", "--output_dir", str(tmp_path / "run")]
        script.main(parse_training_args("t2v_lora", [*argv, *flags]))
        return tmp_path / "run"

    return run


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "event" not in row]


def test_tensorboard_holds_the_losses_and_the_flags(train):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = train("--report_to", "tensorboard", "--tracker_name", "mine", "--logging_dir", "trackers")
    folder = out / "trackers" / "mine"
    reader = events.EventAccumulator(str(folder)).Reload()
    logged = reader.Scalars("loss")
    assert [event.step for event in logged] == [1, 2, 3]
    assert [event.value for event in logged] == pytest.approx(losses(out))
    assert len(reader.Scalars("lr")) == len(reader.Scalars("grad_norm")) == 3
    hparams = next(folder.rglob("hparams.yml")).read_text()
    assert "rank: 4" in hparams and "height_buckets" in hparams and "hub_token" not in hparams


def test_wandb_runs_offline_in_the_output_folder(train, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = train("--report_to", "wandb")
    assert list((out / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(losses(out)) == 3


def test_no_tracker_leaves_no_folder(train):
    out = train()
    assert not (out / "logs").exists()


@pytest.mark.parametrize(
    ("method", "consequence"),
    [
        ("start", "tracking stops, metrics.jsonl goes on"),
        ("log", "tracking stops, metrics.jsonl goes on"),
        ("finish", "tensorboard was not closed, metrics.jsonl is complete"),
    ],
)
def test_a_tracker_that_fails_does_not_end_the_run(method, consequence, train, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    def fail(*values, **options):
        raise RuntimeError("the server is down\nand more")

    monkeypatch.setattr(TensorBoardTracker, method, fail)
    caplog.set_level(logging.WARNING)
    out = train("--report_to", "tensorboard")
    assert len(losses(out)) == 3
    assert [line for line in caplog.messages if "metrics.jsonl" in line] == [f"{consequence}: the server is down"]
    assert json.loads((out / "status.json").read_text())["state"] == "complete"


def test_a_missing_tracker_is_refused_with_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    args = parse_training_args("t2v_lora", ["--pretrained_model_name_or_path", "m", "--data_root", "d",
                                            "--report_to", "trackio"])  # fmt: skip
    with pytest.raises(UsageError, match="--report_to trackio: not installed; pip install trackio"):
        tracking.tracker_names_from_args(args)


def test_all_is_what_is_installed(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: name != "trackio" or None)
    args = parse_training_args("t2v_lora", ["--pretrained_model_name_or_path", "m", "--data_root", "d",
                                            "--report_to", "all"])  # fmt: skip
    assert tracking.tracker_names_from_args(args) == ["wandb", "tensorboard"]
