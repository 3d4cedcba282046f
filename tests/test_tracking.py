"""Trackers get what metrics.jsonl holds, and none of them can end a run."""

import importlib.machinery
import json
import logging
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

import cogvideox_text_to_video_lora as script
from args import parse_training_args
from base import console
from base.errors import UsageError
from run import tracking


FLAGS = ["--rank", "4", "--lora_alpha", "4", "--optimizer", "adamw", "--lr_warmup_steps", "0", "--seed", "0"]


@pytest.fixture
def train(tiny, prepared_data, tmp_path):
    """Three updates of a tiny LoRA; returns the output folder."""

    def run(*flags):
        if list(tmp_path.iterdir()):
            time.sleep(1.1)  # wandb and tensorboard name their files by the second
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
        ("start", "tracking stops, metrics.jsonl continues"),
        ("log", "tracking stops, metrics.jsonl continues"),
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
        tracking.tracker_names(args)


def test_all_is_what_is_installed(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: name != "trackio" or None)
    args = parse_training_args("t2v_lora", ["--pretrained_model_name_or_path", "m", "--data_root", "d",
                                            "--report_to", "all"])  # fmt: skip
    assert tracking.tracker_names(args) == ["wandb", "tensorboard"]


def test_a_tracker_finds_the_console_when_it_is_imported(monkeypatch, tmp_path, capsys):
    """wandb records what is written to the streams that it finds then; what it prints at its start is kept back."""
    (tmp_path / "trackio.py").write_text("import sys\nstreams = [sys.stdout, sys.stderr]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "trackio", None)
    del sys.modules["trackio"]
    monkeypatch.setattr(console, "IS_SET_UP", True)
    tracking.start_quietly(SimpleNamespace(name="trackio", start=lambda: print("* Welcome")))
    assert console.SUPPRESSED not in sys.modules["trackio"].streams
    assert capsys.readouterr() == ("", "") and "* Welcome" in console.SUPPRESSED.take()


def test_wandb_may_ask_for_a_key_at_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "IS_SET_UP", True)
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tracking.start_quietly(SimpleNamespace(name="wandb", start=lambda: print("Paste an API key")))
    assert capsys.readouterr().out == "Paste an API key\n"


@pytest.mark.parametrize(
    ("run", "place"),
    [
        ({"url": "https://wandb.ai/a/b", "disabled": False}, "https://wandb.ai/a/b"),
        ({"url": None, "disabled": False}, "offline; wandb sync '/my runs/offline-run-1'"),
        ({"url": None, "disabled": True}, ""),
    ],
)
def test_the_place_of_a_wandb_run(run, place):
    run = SimpleNamespace(dir="/my runs/offline-run-1/files", **run)
    assert tracking.where_to_look(SimpleNamespace(name="wandb", run=run), "project") == place


# ---------------------------------------------------------------- a run that goes on
# Three updates with a checkpoint after the second, then five: the third is made twice.

FIRST, SECOND = ("--checkpointing_steps", "2"), ("--checkpointing_steps", "2", "--max_train_steps", "5")


def tensorboard_steps(folder, tag="loss"):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return [event.step for event in events.EventAccumulator(str(folder)).Reload().Scalars(tag)]


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    wandb_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, place, parts = path.read_bytes(), 7, b""
    while place < len(content):
        if 2**15 - place % 2**15 < 7:  # the rest of a block, too short for the head of a part
            place += 2**15 - place % 2**15
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_pb2.Record.FromString(parts)
            parts = b""


def finished_records(path):
    """All of a session's records: another process writes them, and ends a moment later."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        records = list(wandb_records(path))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path}: has no end")


def wandb_sessions(out):
    """[(id of the run, its name, steps with a loss)] of what wandb kept on disk, a session each, in their order."""
    sessions = []
    for path in sorted((out / "logs/wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        records = finished_records(path)
        run = [record.run for record in records if record.HasField("run")][-1]
        rows = [record.history for record in records if record.HasField("history")]
        steps = [row.step.num for row in rows if any("loss" in (item.key, *item.nested_key) for item in row.item)]
        sessions.append((run.run_id, run.display_name, steps))
    return sessions


@pytest.fixture
def offline(monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return monkeypatch


@pytest.mark.parametrize(
    ("logging_dir", "folder"), [("logs", "run/logs/{project}"), ("{tmp}/shared", "shared/{project}/run-*")]
)
def test_tensorboard_shows_no_update_twice(logging_dir, folder, train, tmp_path):
    flags = ["--report_to", "tensorboard", "--logging_dir", logging_dir.format(tmp=tmp_path)]
    train(*FIRST, *flags)
    train(*SECOND, *flags)
    [folder] = tmp_path.glob(folder.format(project="cogvideox-text-to-video-lora"))
    assert tensorboard_steps(folder) == [1, 2, 3, 4, 5]
    assert len(list(folder.rglob("hparams.yml"))) == 1  # each would be listed as a run of its own


def test_tensorboard_goes_back_to_an_older_checkpoint(train):
    flags = ["--report_to", "tensorboard", "--checkpointing_steps", "1"]
    out = train(*flags)
    train(*flags, "--max_train_steps", "5")
    train(*flags, "--max_train_steps", "4", "--resume_from_checkpoint", "checkpoint-2")
    assert tensorboard_steps(out / "logs/cogvideox-text-to-video-lora") == [1, 2, 3, 4]


def test_a_start_from_step_0_hides_what_was_tried_there(train):
    flags = ["--report_to", "tensorboard", "--checkpointing_steps", "100"]
    out = train(*flags)
    (out / "status.json").unlink()  # as a killed run leaves it
    train(*flags, "--max_train_steps", "2")
    assert tensorboard_steps(out / "logs/cogvideox-text-to-video-lora") == [1, 2]


def test_runs_in_one_logging_dir_stay_apart(train, tmp_path):
    shared = ["--report_to", "tensorboard", "--logging_dir", str(tmp_path / "shared")]
    train(*shared)
    train(*shared, "--overwrite", "--max_train_steps", "2")
    folders = list((tmp_path / "shared/cogvideox-text-to-video-lora").glob("run-*"))
    assert sorted(tensorboard_steps(folder) for folder in folders) == [[1, 2], [1, 2, 3]]


def test_wandb_goes_on_with_its_run(train, offline):
    out = train(*FIRST, "--report_to", "wandb")
    train(*SECOND, "--report_to", "wandb")
    (run, name, steps), (same_run, same_name, later) = wandb_sessions(out)
    assert run == same_run and name == same_name == "run"
    assert steps + later == [1, 2, 3, 4, 5]


def test_wandb_gets_a_new_run_where_the_training_is_a_new_one(train, offline, tmp_path):
    first = train(*FIRST, "--report_to", "wandb")
    elsewhere = ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(first / "checkpoint-2")]
    train(*SECOND, "--report_to", "wandb", *elsewhere)
    train(*FIRST, "--report_to", "wandb", "--overwrite")
    aside = next(tmp_path.glob("run.*"))
    [(_, _, third)] = wandb_sessions(first)
    [(_, name, later)] = wandb_sessions(tmp_path / "other")
    assert (third, name, later) == ([1, 2, 3], "other", [3, 4, 5])
    assert len({wandb_sessions(out)[0][0] for out in (first, aside, tmp_path / "other")}) == 3


def test_wandb_follows_its_own_variables(train, offline):
    offline.setenv("WANDB_RUN_ID", "chosen-by-a-sweep")
    offline.setenv("WANDB_NAME", "mine")
    assert wandb_sessions(train("--report_to", "wandb"))[0][:2] == ("chosen-by-a-sweep", "mine")


def test_a_tracker_that_comes_later_gets_the_repeated_updates(train, offline):
    out = train(*FIRST, "--report_to", "tensorboard")
    train(*SECOND, "--report_to", "wandb")
    assert [steps for _, _, steps in wandb_sessions(out)] == [[3, 4, 5]]


def test_another_project_is_another_run(train, offline):
    out = train(*FIRST, "--report_to", "wandb")
    train(*SECOND, "--report_to", "wandb", "--tracker_name", "mine")
    (run, _, _), (other, _, later) = wandb_sessions(out)
    assert run != other and later == [3, 4, 5]


@pytest.mark.parametrize("content", ["", "[]", '{"project": "cogvideox-text-to-video-lora"}'])
def test_a_damaged_record_costs_a_new_run_and_no_more(content, train, offline, caplog):
    out = train(*FIRST, "--report_to", "wandb")
    (out / "trackers.json").write_text(content)
    train(*SECOND, "--report_to", "wandb")
    assert "trackers.json: not readable" in caplog.text
    assert [steps for _, _, steps in wandb_sessions(out)] == [[1, 2, 3], [3, 4, 5]]


def test_trackio_goes_on_with_its_run(train, monkeypatch):
    """It is no package of the project: a stand-in records what it is called with."""
    calls, steps = [], []
    run = SimpleNamespace(log=lambda values, step: steps.append(step), finish=lambda: None)
    module = ModuleType("trackio")
    module.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    module.init = lambda **options: calls.append(options) or run
    module.config = SimpleNamespace(update=lambda values, allow_val_change: None)
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr("accelerate.tracking.is_trackio_available", lambda: True)
    train(*FIRST, "--report_to", "trackio")
    train(*SECOND, "--report_to", "trackio")
    first, second = calls
    assert first == second and first["name"].startswith("run-") and first["resume"] == "allow"
    assert steps == [1, 2, 3, 4, 5]
