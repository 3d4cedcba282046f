"""Per-update logging: one line each, values fetched together, non-finite updates named, time counted where it belongs."""

import json
import math
import os
import time

import pytest
import torch
from accelerate import Accelerator

from base.errors import NumbersError
from base.startup import StartupTimer
from engine.update import Update
from run.launch import launch_time
from run.metrics import BadSteps, StepMeter, report_memory


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_meter(path, first_step=0, log_every=10, max_bad_steps=9, start=None):
    bad_steps = BadSteps(max_bad_steps, ["a.mp4", "b.mp4"])
    return StepMeter(path, Accelerator(cpu=True), first_step, 9, log_every, bad_steps, start)


def log_steps(meter, first, last, skipped=(3,), waits=0.0):
    """Updates of two micro-steps each."""
    batches = meter.timed(waited(waits))
    for step in range(first, last + 1):
        for loss in (step + 0.25, 0.5):
            next(batches)
            meter.copied()
            losses = torch.tensor([math.nan if step in skipped and loss != 0.5 else loss])
            meter.add(torch.tensor(loss), losses, [int(loss == 0.5)])
        grad_norm = torch.tensor(math.inf if step in skipped else 1.0)
        meter.log(step, Update(True, lr=0.1 * step, grad_norm=grad_norm, skipped=torch.tensor(step in skipped)))


def waited(seconds):
    while True:
        time.sleep(seconds)
        yield {}


def test_one_line_per_update_whatever_log_every(tmp_path):
    runs = []
    for log_every in (1, 3, 10):
        path = tmp_path / f"{log_every}.jsonl"
        with make_meter(path, log_every=log_every) as meter:
            log_steps(meter, 1, 7)
        runs.append([{name: row[name] for name in row if "seconds" not in name} for row in rows_of(path)])
    assert runs[0] == runs[1] == runs[2]
    assert [row["step"] for row in runs[0]] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for row in runs[0]] == [step + 0.75 for step in range(1, 8)]
    assert [row["skipped"] for row in runs[0]] == [step == 3 for step in range(1, 8)]
    assert [row["grad_norm"] for row in runs[0]] == [None if step == 3 else 1.0 for step in range(1, 8)]
    assert runs[0][1]["lr"] == 0.2
    names = {"step", "lr", "grad_norm", "skipped", "seconds", "data_seconds", "copy_seconds", "loss"}
    assert set(rows_of(path)[0]) == names


def test_numbers_of_the_host_are_written_like_those_of_the_device(tmp_path):
    """Optimizers that cannot skip by themselves know norm and outcome at once."""
    with make_meter(tmp_path / "metrics.jsonl") as meter:
        for result in (Update(True, grad_norm=0.5, lr=1.0), Update(True, True, grad_norm=math.nan, lr=1.0)):
            next(meter.timed([{}]))
            meter.add(torch.tensor(1.0), torch.tensor([1.0]), [0])
            meter.log(1, result)
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [(row["grad_norm"], row["skipped"]) for row in rows] == [(0.5, False), (None, True)]


def test_lines_are_fetched_every_log_every(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with make_meter(path, log_every=3) as meter:
        log_steps(meter, 1, 2)
        assert not path.exists()
        log_steps(meter, 3, 4)
        assert len(rows_of(path)) == 3


def test_events_stand_between_updates_and_take_no_time_of_theirs(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with make_meter(path) as meter:
        report_memory(meter, 0, "before_training")
        log_steps(meter, 1, 2)
        meter.write_event(2, "rest", value=1.5)
        time.sleep(0.3)  # also what is done after the line, such as a checkpoint
        log_steps(meter, 3, 3)
    rows = rows_of(path)
    assert [(row["step"], row.get("event")) for row in rows] == [
        (0, "memory"),
        (1, None),
        (2, None),
        (2, "rest"),
        (3, None),
    ]
    assert rows[3] == {"step": 2, "event": "rest", "value": 1.5} and rows[4]["seconds"] < 0.2
    assert rows[0]["when"] == "before_training" and rows[0]["host_peak_gib"] > 0.1
    with make_meter(path, first_step=2):
        assert rows_of(path) == rows[:4]
    with make_meter(path, first_step=0):  # a run that starts again has none of the earlier events either
        assert path.read_text() == ""


def test_waiting_and_copying_are_parts_of_an_update(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with make_meter(path) as meter:
        batches = meter.timed(waited(0.1))
        for step in (1, 2):
            for _ in range(2):
                next(batches)
                time.sleep(0.05)
                meter.copied()
                time.sleep(0.2)
                meter.add(torch.tensor(1.0), torch.tensor([1.0]), [0])
            meter.log(step, Update(True, lr=1.0, grad_norm=1.0))
    for row in rows_of(path):
        assert 0.2 <= row["data_seconds"] < 0.29 and 0.1 <= row["copy_seconds"] < 0.19
        assert 0.7 <= row["seconds"] < 0.9


def test_what_was_logged_before_an_error_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(NumbersError), make_meter(path) as meter:
        log_steps(meter, 1, 2)
        raise NumbersError("bad")
    assert [row["step"] for row in rows_of(path)] == [1, 2]


@pytest.mark.parametrize("ending", ["log_every", "pause", "the end"])
def test_bad_updates_in_a_row_are_found_with_the_lines_and_named_in_order(ending, tmp_path, caplog):
    """At the next transfer, before a checkpoint, or at the end: all that was made is written, the first run of two counts."""
    path = tmp_path / "metrics.jsonl"
    meter = make_meter(path, log_every=6 if ending == "log_every" else 10, max_bad_steps=2)
    with pytest.raises(NumbersError, match="step 4: 2 updates in a row"), meter:
        log_steps(meter, 1, 6, skipped=(1, 3, 4))
        assert ending != "log_every"
        if ending == "pause":
            meter.pause()
    assert [row["skipped"] for row in rows_of(path)] == [step in (1, 3, 4) for step in range(1, 7)]
    expected = "skipped, gradient norm inf: the loss is not finite for sample 0 (a.mp4)"
    assert [record.getMessage() for record in caplog.records] == [f"step {step} {expected}" for step in (1, 3, 4)]


def test_a_resumed_run_cuts_what_it_makes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with make_meter(path) as meter:
        log_steps(meter, 1, 5)
    kept = path.read_text().splitlines()[:3]
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # a killed run's last line
    with make_meter(path, first_step=3) as meter:
        assert path.read_text().splitlines() == kept
        log_steps(meter, 4, 6)
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3, 4, 5, 6]
    with make_meter(path, first_step=0):
        assert path.read_text() == ""


def test_events_of_cut_updates_are_cut_with_them(tmp_path):
    """A resumed run validates and starts again; what came before its checkpoint stays."""
    path = tmp_path / "metrics.jsonl"
    with make_meter(path) as meter:
        meter.write_event(0, "validation")
        for step in (1, 2, 3):
            log_steps(meter, step, step)
            meter.write_event(step, "validation")
    with make_meter(path, first_step=2):
        assert [(row["step"], row.get("event")) for row in rows_of(path)] == [
            (0, "validation"), (1, None), (1, "validation"), (2, None), (2, "validation"),
        ]  # fmt: skip


def test_the_start_is_told_by_part_after_the_first_update(tmp_path, caplog):
    path, start = tmp_path / "metrics.jsonl", StartupTimer()
    start.begin(launch_time())
    assert 0 < time.time() - start.since < 24 * 3600  # from when the process, or its launcher, was started
    start.mark("imports")
    time.sleep(0.1)
    start.mark("loading")
    caplog.set_level("INFO")
    with make_meter(path, first_step=4, start=start) as meter:
        log_steps(meter, 5, 6, waits=0.1)
        assert len(rows_of(path)) == 2
    rows = rows_of(path)
    assert [(row["step"], row.get("event")) for row in rows] == [(5, None), (5, "start"), (6, None)]
    parts = rows[1]["parts"]
    assert list(parts) == ["imports", "loading", "validation", "first update"] and 0.1 <= parts["loading"] < 0.2
    assert 0.2 <= parts["first update"] < 0.4
    assert rows[1]["seconds"] == pytest.approx(sum(parts.values()), abs=0.01)
    [line] = [message for message in caplog.messages if message.startswith("first update")]
    assert f"imports {parts['imports']:.1f}, loading 0.1, validation 0.0, first update" in line


@pytest.mark.parametrize("script", ["t2v_lora", "i2v_sft"], indirect=True)
def test_a_run_tells_of_every_part_of_its_start(train):
    """Each service marks its own, wherever the script calls it."""
    rows = rows_of(train("out", "--max_train_steps", "1", raw=True) / "metrics.jsonl")
    [start] = [row for row in rows if row.get("event") == "start"]
    assert list(start["parts"]) == [
        "imports", "data", "encoding", "loading", "attention", "engine", "checkpoint", "trackers", "validation",
        "first update",
    ]  # fmt: skip


def test_the_launchers_start_counts(monkeypatch):
    import psutil

    from run import launch

    own = psutil.Process().create_time()
    assert launch.launch_time() == own
    monkeypatch.setattr(launch, "LAUNCHERS", {os.path.basename(word) for word in psutil.Process().parent().cmdline()})
    assert launch.launch_time() == psutil.Process().parent().create_time() <= own
